"""What a rung costs: bytes by default, milliseconds where a device was measured and the measurement resolves them.

Cost is relative, 0 without adapter and 1 at the top rung, so that a budget means the same for every adapter. At batch
size 1 the whole adapter is a few per cent of a step's bytes and no clock separates the rungs; then bytes are the
honest unit and a latency budget is refused instead of guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .limits import Number, Several, Text, check_fields, limited
from .rungs import MOST_RUNGS

MILLISECONDS = Number(0, 1e9)


def adapter_cost(rung_bytes: Tensor) -> Tensor:
    """Bytes of each rung relative to the top one, [J] float32 on the CPU, non-decreasing, 1 at the top.

    `rung_bytes` [J] are `Ladder.rung_bytes()`. Raises ValueError for another shape, bytes that fall from one rung to
    the next, or a top of 0 bytes.
    """
    total = rung_bytes.detach().cpu().double()
    if total.ndim != 1 or len(total) == 0:
        raise ValueError(f"rung_bytes: expected shape [J], got {tuple(rung_bytes.shape)}; pass Ladder.rung_bytes()")
    if float(total.min()) < 0 or bool((total.diff() < 0).any()) or float(total[-1]) <= 0:
        raise ValueError(
            f"rung_bytes: expected bytes of at least 0 that never fall, the top above 0, got {total.tolist()}; check "
            "the ladder"
        )
    return (total / total[-1]).to(torch.float32)


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds per token of every rung on one device."""

    device: str = field(metadata=limited(Text()))
    ms: tuple[float, ...] = field(metadata=limited(Several(MILLISECONDS, 1, MOST_RUNGS)))
    """Median latency of each rung, in the order of the rungs."""
    ms_base: float = field(metadata=limited(MILLISECONDS))
    """Median latency without adapter."""
    spread_ms: float = field(metadata=limited(MILLISECONDS))
    """Noise: the spread of repeated measurements of one rung."""

    def __post_init__(self) -> None:
        check_fields(self, "latency")

    @property
    def resolved(self) -> bool:
        """The top rung is slower than no adapter by more than 3 spreads, and no step falls by more than one."""
        steps = zip((self.ms_base, *self.ms), self.ms, strict=False)
        return self.ms[-1] - self.ms_base > 3 * self.spread_ms and all(b >= a - self.spread_ms for a, b in steps)

    def cost(self) -> tuple[float, ...]:
        """(t(j) - t(0)) / (t(top) - t(0)) of each rung, made non-decreasing. Raises ValueError when not resolved."""
        self._require_resolved()
        share = [(value - self.ms_base) / (self.ms[-1] - self.ms_base) for value in self.ms]
        return tuple(min(max(0.0, *share[: j + 1]), 1.0) for j in range(len(share)))

    def budget_for(self, latency_ms: float) -> float:
        """The budget, in [0, 1], whose mean latency is `latency_ms`. Raises ValueError when that is out of reach."""
        self._require_resolved()
        low, high = self.ms_base + self.cost()[0] * (self.ms[-1] - self.ms_base), self.ms[-1]
        if not low <= latency_ms <= high:
            reach = f"{low:.3f} to {high:.3f} ms, the reachable range on {self.device}"
            raise ValueError(f"latency_budget_ms: expected {reach}, got {latency_ms!r}; choose within it or use budget")
        return min(1.0, max(0.0, (latency_ms - self.ms_base) / (high - self.ms_base)))

    def _require_resolved(self) -> None:
        if not self.resolved:
            reach = f"{self.ms_base:.3f} ms without adapter, {min(self.ms):.3f} to {max(self.ms):.3f} ms with it"
            raise ValueError(
                f"latency_budget_ms: expected rungs that differ by more than noise on {self.device}, "
                f"got {reach}, +- {self.spread_ms:.3f} ms; use budget, a share of the adapter's bytes"
            )

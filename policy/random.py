"""Rungs drawn blindly around the knob: what mixing rungs costs when no signal guides it.

KL falls convexly with rank, so a blind mixture loses to the fixed rung of the same mean; a policy that only ties with
this one has learned nothing. The draw is a hash of (seed, row, position), not a generator: it repeats exactly, needs
no state and no host, and replays inside a captured graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from .contract import Decision, RankPolicy, Summary
from .limits import Limit, Whole
from .rungs import SPREAD, Rung, nearest_rung, rung_scales

_Number = TypeVar("_Number", int, Tensor)
_MASK = 0xFFFFFFFF


def _mix(x: _Number) -> _Number:
    """A 32-bit xorshift-multiply hash; both multipliers stay below 2**31, so int64 products never overflow."""
    x = x & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x2C1B3C6D) & _MASK
    x = x ^ (x >> 12)
    x = (x * 0x297A2D39) & _MASK
    return x ^ (x >> 15)


def uniform_hash(seed: int, row: Tensor, position: Tensor) -> Tensor:
    """Numbers in [0, 1), float32, a pure function of (seed, row [B] long, position [B] long)."""
    bits = _mix(_mix(_mix(seed) + row) + position)
    # 24 bits are what float32 holds exactly; more could round up to 1.
    return (bits >> 8).to(torch.float32) / 2**24


class RandomPolicy(RankPolicy):
    """A rung uniform in [knob - spread, knob + spread], anew for every chunk. `scales` is [J], 1 at the top."""

    kind: ClassVar[str] = "random"
    CONFIG: ClassVar[Mapping[str, Limit]] = {"seed": Whole(-(2**63), 2**63 - 1), "spread": SPREAD}
    scales: Tensor

    def __init__(self, rungs: Sequence[Rung], seed: int, spread: float = 2.0, scales: Tensor | None = None) -> None:
        super().__init__(rungs, seed=seed, spread=spread)
        self.seed: int = self._config["seed"]
        self.spread: float = self._config["spread"]
        self.register_buffer("scales", rung_scales(len(self.rungs), scales))

    def decide(self, summary: Summary, knob: Tensor) -> Decision:
        draw = uniform_hash(self.seed, summary.rows(), summary.position)
        rung = nearest_rung(knob + self.spread * (2 * draw - 1), len(self.rungs))
        return Decision(rung, self.scales.float().expand(len(rung), -1))

    def knob_range(self) -> tuple[float, float]:
        return -self.spread, len(self.rungs) - 1 + self.spread

    def check_tensors(self) -> None:
        rung_scales(len(self.rungs), self.scales)

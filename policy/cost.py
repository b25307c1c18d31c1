"""What a rung costs: bytes by default, milliseconds where a device was measured and the measurement resolves them.

Cost is relative, 0 without adapter and 1 at the top rung, so that a budget means the same for every adapter. At batch
size 1 the whole adapter is a few per cent of a step's bytes and no clock separates the rungs; then bytes are the
honest unit and a latency budget is refused instead of guessed.

A step of many rows takes another time than one of a single row, so the engine is measured by the rows of a batch: one
`LatencyTable` for each batch bucket, together `LatencyTables`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .limits import Maybe, Number, Record, Several, Text, Whole, check_fields, limited, refused
from .rungs import MOST_RUNGS

MILLISECONDS = Number(0, 1e9)
MOST_BATCH, MOST_BUCKETS = 4096, 16


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
    """Measured milliseconds per decode step of every rung on one device."""

    device: str = field(metadata=limited(Text()))
    ms: tuple[float, ...] = field(metadata=limited(Several(MILLISECONDS, 1, MOST_RUNGS)))
    """Median latency of each rung, in the order of the rungs."""
    ms_base: float = field(metadata=limited(MILLISECONDS))
    """Median latency without adapter."""
    spread_ms: float = field(metadata=limited(MILLISECONDS))
    """Noise: the spread of repeated measurements of one rung."""
    batch: int | None = field(default=None, metadata=limited(Maybe(Whole(1, MOST_BATCH))))
    """Rows of the engine's step that was measured; None: one row of the reference path."""
    controller_ms: float | None = field(default=None, metadata=limited(Maybe(Number(-1e9, 1e9))))
    """What deciding adds to a step, where that was measured; below 0 by noise alone."""

    def __post_init__(self) -> None:
        check_fields(self, "latency")

    @property
    def of_engine(self) -> bool:
        """Whether a step of the engine was measured, not one of the reference path."""
        return self.batch is not None

    @property
    def where(self) -> str:
        """What was measured, for people: the device, and of the engine the rows of a batch."""
        return f"{self.device} at batch {self.batch}" if self.of_engine else self.device

    @property
    def resolved(self) -> bool:
        """The top rung is slower than no adapter by more than 3 spreads, and no step falls by more than one."""
        steps = zip((self.ms_base, *self.ms), self.ms, strict=False)
        return self.ms[-1] - self.ms_base > 3 * self.spread_ms and all(b >= a - self.spread_ms for a, b in steps)

    @property
    def says(self) -> str:
        """What the clock says of the rungs, for people."""
        fall = max(a - b for a, b in pairwise((self.ms_base, *self.ms)))
        if self.resolved:
            return "rungs differ by more than noise"
        if fall > self.spread_ms:
            return f"a rung takes {fall:.3f} ms less than the one below it, which reads less"
        return "rungs do not differ by more than noise"

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
            reach = f"{low:.3f} to {high:.3f} ms, the reachable range on {self.where}"
            raise ValueError(f"latency_budget_ms: expected {reach}, got {latency_ms!r}; choose within it or use budget")
        return min(1.0, max(0.0, (latency_ms - self.ms_base) / (high - self.ms_base)))

    def _require_resolved(self) -> None:
        if not self.resolved:
            reach = f"{self.ms_base:.3f} ms without adapter, {min(self.ms):.3f} to {max(self.ms):.3f} ms with it"
            raise ValueError(
                f"latency_budget_ms: expected rungs that differ by more than noise on {self.where}, "
                f"got {reach}, +- {self.spread_ms:.3f} ms ({self.says}); use budget, a share of the adapter's bytes"
            )


@dataclass(frozen=True)
class LatencyTables:
    """Tables of one device, one for each batch bucket that was measured; of the reference path there is one alone."""

    buckets: tuple[LatencyTable, ...] = field(metadata=limited(Several(Record(LatencyTable), 1, MOST_BUCKETS)))
    """In ascending order of their batches."""
    batch: int | None = field(default=None, metadata=limited(Maybe(Whole(1, MOST_BATCH))))
    """The bucket that a fit went by, and that is meant where nobody says how many rows there are."""

    def __post_init__(self) -> None:
        check_fields(self, "latency")
        check_buckets("latency.buckets", self.buckets)
        if self.batch not in [own.batch for own in self.buckets]:
            raise refused("latency.batch", f"one of {_listed(self.buckets)}", self.batch)

    @property
    def device(self) -> str:
        return self.buckets[0].device

    @property
    def of_engine(self) -> bool:
        """Whether the engine's steps were measured, not those of the reference path."""
        return self.chosen.of_engine

    @property
    def chosen(self) -> LatencyTable:
        """The table of `batch`."""
        return next(own for own in self.buckets if own.batch == self.batch)

    def for_rows(self, rows: int | None) -> LatencyTable:
        """The table of the bucket that a batch of `rows` decodes in, the next power of two; None: the chosen one.

        What the reference path takes was measured at one row, and stands for any number. Raises ValueError for a bucket
        that was not measured.
        """
        if rows is None or not self.of_engine:
            return self.chosen
        found = [own for own in self.buckets if own.batch is not None and rows <= own.batch < 2 * rows]
        if not found:
            raise ValueError(
                f"latency_budget_ms: expected a batch in a bucket that was measured ({_listed(self.buckets)}), got "
                f"{rows} rows; use budget, or measure that bucket and fit with its table"
            )
        return found[0]


def check_buckets(name: str, buckets: tuple[LatencyTable, ...]) -> None:
    """Raise ValueError unless `buckets` are of one device and as many rungs, in ascending order of their batches; one
    that has no batch stands alone."""
    batches = [own.batch for own in buckets]
    known = [batch for batch in batches if batch is not None]
    if batches != [None] and (len(known) != len(batches) or any(b <= a for a, b in pairwise(known))):
        raise refused(name, "batches in strictly ascending order, or one table without", batches)
    for what, values in (("one device", [own.device for own in buckets]),
                         ("as many rungs in each", [len(own.ms) for own in buckets])):  # fmt: skip
        if len(set(values)) > 1:
            raise refused(name, what, values, "measure them together")


def _listed(buckets: Iterable[LatencyTable]) -> str:
    return ", ".join(str(own.batch) for own in buckets)

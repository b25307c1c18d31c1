"""Replays a schedule of rungs that was worked out with hindsight: how much any policy could gain at most.

Evaluation only. It belongs to the very tokens it was made for, so it is never exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from .contract import Decision, RankPolicy, Summary
from .rungs import Rung, rung_scales


class OraclePolicy(RankPolicy):
    """The chunk that opens at position n of row b gets `rung[b, n]`; the knob is ignored.

    `rung` is [B, N] long; positions past the schedule repeat its last column. `scales` is [J], 1 at the top. Raises
    ValueError for a schedule of another shape or with a rung that does not exist.
    """

    kind: ClassVar[str] = "oracle"
    rung: Tensor
    scales: Tensor

    def __init__(self, rungs: Sequence[Rung], rung: Tensor, scales: Tensor | None = None) -> None:
        super().__init__(rungs)
        if rung.ndim != 2 or rung.numel() == 0:
            raise ValueError(f"rung: expected a non-empty schedule [B, N], got shape {tuple(rung.shape)}")
        top = len(self.rungs) - 1
        low, high = int(rung.min()), int(rung.max())
        if low < 0 or high > top:
            raise ValueError(f"rung: expected indices in [0, {top}], got {low} to {high}")
        self.register_buffer("rung", rung.detach().long().clone())
        self.register_buffer("scales", rung_scales(len(self.rungs), scales))

    def decide(self, summary: Summary, knob: Tensor) -> Decision:
        column = summary.position.clamp(0, self.rung.shape[1] - 1)
        rung = self.rung[summary.rows(), column]
        return Decision(rung, self.scales.float().expand(len(rung), -1))

    def knob_range(self) -> tuple[float, float]:
        return 0.0, 0.0

"""One rung for every chunk: static truncation, the baseline every other policy has to beat.

The knob is the rung's index. It is also what an export falls back to when nothing better was learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from .contract import Decision, RankPolicy, Summary
from .rungs import Rung, nearest_rung, rung_scales


class FixedPolicy(RankPolicy):
    """Rung `round(knob)` whatever the text. `scales` is [J], the scale of each rung, 1 at the top."""

    kind: ClassVar[str] = "fixed"
    looks: ClassVar[bool] = False
    scales: Tensor

    def __init__(self, rungs: Sequence[Rung], scales: Tensor | None = None) -> None:
        super().__init__(rungs)
        self.register_buffer("scales", rung_scales(len(self.rungs), scales))

    def decide(self, summary: Summary, knob: Tensor) -> Decision:
        rung = nearest_rung(knob, len(self.rungs))
        return Decision(rung, self.scales.float().expand(len(rung), -1))

    def knob_range(self) -> tuple[float, float]:
        return 0.0, float(len(self.rungs) - 1)

    def check_tensors(self) -> None:
        rung_scales(len(self.rungs), self.scales)

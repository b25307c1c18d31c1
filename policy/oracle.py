"""Replays a schedule of rungs that was worked out with hindsight: how much any policy could gain at most.

Evaluation only. It belongs to the very tokens it was made for, so it is never exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .contract import Decision, RankPolicy, Summary


class OraclePolicy(RankPolicy):
    """The chunk that opens at position n of row b gets `rung[b, n]` and `scale[b, n]`; the knob is ignored.

    `rung` is [B, N] long, `scale` [B, N]; positions past the schedule repeat its last column. Raises ValueError for
    shapes that differ, a rung that does not exist, or a scale other than 1 at the top rung.
    """

    kind: ClassVar[str] = "oracle"
    rung: Tensor
    scale: Tensor

    def __init__(self, rungs: Sequence[int], rung: Tensor, scale: Tensor) -> None:
        super().__init__(rungs)
        if rung.ndim != 2 or rung.numel() == 0 or rung.shape != scale.shape:
            shapes = f"{tuple(rung.shape)} and {tuple(scale.shape)}"
            raise ValueError(f"rung, scale: expected two non-empty schedules of one shape [B, N], got {shapes}")
        top = len(self.rungs) - 1
        low, high = int(rung.min()), int(rung.max())
        if low < 0 or high > top:
            raise ValueError(f"rung: expected indices in [0, {top}], got {low} to {high}")
        if bool((scale[rung == top] != 1).any()):
            raise ValueError("scale: expected 1 wherever the rung is the top one, which is exact, got other values")
        self.register_buffer("rung", rung.detach().long().clone())
        self.register_buffer("scale", scale.detach().to(torch.float32).clone())

    def decide(self, summary: Summary, knob: Tensor) -> Decision:
        rows, length = self.rung.shape
        count = summary.position.shape[0]
        if count > rows:
            raise ValueError(f"oracle: expected at most the {rows} rows of its schedule, got {count}; record the rest")
        column = summary.position.clamp(0, length - 1)[:, None]
        rung = self.rung[:count].gather(1, column).squeeze(1)
        return Decision(rung, self.scale[:count].float().gather(1, column).squeeze(1))

    def knob_range(self) -> tuple[float, float]:
        return 0.0, 0.0

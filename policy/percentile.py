"""Rungs from thresholds on one signal, the thresholds being percentiles of calibration text (the paper's rule).

The value of the closed chunk is looked up in a table of calibration quantiles; its percentile u in [0, 1] moves the
rung within a band around the knob: `rung = round(knob + sign * spread * (2u - 1))`. On text like the calibration text
every part of the band is equally likely, so `random` with the same spread is this policy with the signal thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .contract import Decision, RankPolicy, Summary
from .limits import Choice, Limit, refused
from .rungs import SPREAD, Rung, nearest_rung, rung_scales
from .settings import PAPER_SIGNALS, SIGNALS, STATS, TOKEN_SIGNALS, SignalWeights

COMPLEXITY = "complexity"
"""In place of a signal's name: the mean of the known signals, weighted as in the token complexity."""

CHUNK, TOKEN = "chunk", "token"
"""Whose value the thresholds are on: the mean over the chunk just closed, or that of the opening one's first token."""

GRID_POINTS = 101


class PercentilePolicy(RankPolicy):
    """Harder than usual chunks get a rung above the knob, easier ones a rung below it.

    `signal` is one of SIGNALS or "complexity"; `grid` is [101], the ascending quantiles 0, 0.01, ..., 1 of that value
    on calibration text (left out: even steps from 0 to 1); `spread` is half the band's width in rungs; `scales` is
    [J]; `weights` are those of the complexity, by signal (left out: those of the paper all alike); with `sign` -1 high
    values get the lower rungs; `of` "token" takes the value of the token about to be processed, which only signals that
    follow from tokens have. Raises ValueError for an unknown signal, a bad grid or a negative spread.
    """

    kind: ClassVar[str] = "percentile"
    CONFIG: ClassVar[Mapping[str, Limit]] = {
        "signal": Choice((*SIGNALS, COMPLEXITY)),
        "spread": SPREAD,
        "weights": SignalWeights(),
        "sign": Choice((1, -1)),
        "of": Choice((CHUNK, TOKEN)),
    }
    scales: Tensor
    grid: Tensor
    weights: Tensor

    def __init__(
        self,
        rungs: Sequence[Rung],
        signal: str,
        grid: Tensor | None = None,
        scales: Tensor | None = None,
        spread: float = 2.0,
        weights: Mapping[str, float] | None = None,
        sign: int = 1,
        of: str = CHUNK,
    ) -> None:
        weights = dict.fromkeys(PAPER_SIGNALS, 1.0) if weights is None else weights
        super().__init__(rungs, signal=signal, spread=spread, weights=weights, sign=sign, of=of)
        if of == TOKEN and signal not in TOKEN_SIGNALS:
            raise refused("of", f"{CHUNK}: {signal} is not known of a token before it is processed", of)
        self.sign, self.of = int(sign), of
        self.signal: str = self._config["signal"]
        self.spread: float = self._config["spread"]
        used: Mapping[str, float] = self._config["weights"] if signal == COMPLEXITY else {signal: 1.0}
        self.register_buffer("weights", torch.tensor([used.get(name, 0.0) for name in SIGNALS]), persistent=False)
        self.register_buffer("grid", torch.linspace(0, 1, GRID_POINTS) if grid is None else _checked_grid(grid))
        self.register_buffer("scales", rung_scales(len(self.rungs), scales))

    @classmethod
    def calibrate(
        cls,
        values: Tensor,
        rungs: Sequence[Rung],
        signal: str,
        scales: Tensor | None = None,
        spread: float = 2.0,
        weights: Mapping[str, float] | None = None,
        sign: int = 1,
        of: str = CHUNK,
    ) -> PercentilePolicy:
        """The policy whose grid holds the quantiles of `values` [N], one per chunk of calibration text.

        They are what `value` returns where it is known. Raises ValueError for no values or values not finite.
        """
        sample = values.detach().double().flatten().cpu().numpy()
        if sample.size == 0 or not np.isfinite(sample).all():
            raise ValueError(f"values: expected at least one finite value to calibrate on, got {sample.size} values")
        grid = torch.from_numpy(np.quantile(sample, np.linspace(0, 1, GRID_POINTS))).to(torch.float32)
        # Interpolated quantiles of equal neighbours may differ in the last bit, in either direction.
        return cls(rungs, signal, grid.cummax(0).values, scales, spread, weights, sign, of)

    def value(self, summary: Summary) -> tuple[Tensor, Tensor]:
        """The number the thresholds are on, [B] float32 (0 where unknown), and whether it is known, [B] bool."""
        if self.of == TOKEN:
            own = summary.first[:, TOKEN_SIGNALS.index(self.signal)].to(torch.float32)
            return own, torch.ones_like(own, dtype=torch.bool)
        means = summary.stats[..., STATS.index("mean")].to(torch.float32).masked_fill(~summary.valid, 0.0)
        weights = self.weights.float() * summary.valid
        total = weights.sum(1)
        known = total > 0
        return (means * weights).sum(1) / torch.where(known, total, 1.0), known

    def percentile(self, value: Tensor) -> Tensor:
        """Share of calibration values below `value` [B], in [0, 1]; equal ones count half."""
        grid = self.grid.float()
        value = value.contiguous()
        below = torch.searchsorted(grid, value)
        up_to = torch.searchsorted(grid, value, right=True)
        left = grid[(below - 1).clamp(min=0)]
        right = grid[below.clamp(max=GRID_POINTS - 1)]
        gap = right - left
        between = below - 1 + (value - left) / torch.where(gap > 0, gap, 1.0)
        tied = (below + up_to - 1) / 2
        return (torch.where(up_to > below, tied, between) / (GRID_POINTS - 1)).clamp(0, 1)

    def swing(self, value: Tensor, known: Tensor) -> Tensor:
        """[B] how many rungs above the knob a value [B] leads; 0 where it is not known."""
        return self.sign * self.spread * torch.where(known, 2 * self.percentile(value) - 1, 0.0)

    def rung_of(self, knob: Tensor, swing: Tensor) -> Tensor:
        """[B] long: rung index at knob [B], or one for all, and swing [B]."""
        return nearest_rung(knob + swing, len(self.rungs))

    def decide(self, summary: Summary, knob: Tensor) -> Decision:
        rung = self.rung_of(knob, self.swing(*self.value(summary)))
        return Decision(rung, self.scales.float().expand(len(rung), -1))

    def knob_range(self) -> tuple[float, float]:
        return -self.spread, len(self.rungs) - 1 + self.spread

    def check_tensors(self) -> None:
        _checked_grid(self.grid)
        rung_scales(len(self.rungs), self.scales)


def _checked_grid(grid: Tensor) -> Tensor:
    """A copy in float32. Raises ValueError unless it is [101], finite and ascending."""
    grid = grid.detach().to(torch.float32).clone()
    if grid.shape != (GRID_POINTS,) or not bool(grid.isfinite().all()) or bool((grid.diff() < 0).any()):
        raise refused("grid", f"{GRID_POINTS} ascending finite numbers", grid.tolist())
    return grid

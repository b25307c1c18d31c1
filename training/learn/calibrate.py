"""What is set from data, before and after training: thresholds, scales, the range of lambda, the knob curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from policy.contract import RankPolicy
from policy.curve import KnobCurve
from policy.settings import Settings

from ..targets.damage import Trajectory
from .module import interpolate_scale


def calibrated_settings(settings: Settings, paths: Sequence[Trajectory]) -> Settings:
    """Set complexity classes to the terciles of the trajectories' token complexity and KV's threshold to its median."""
    complexity = torch.cat([path.complexity for path in paths]).numpy()
    third, half, two_thirds = (float(q) for q in np.quantile(complexity, [1 / 3, 1 / 2, 2 / 3]))
    # The margin is a quarter of the middle class, so that hysteresis never swallows it.
    chunk = replace(settings.chunk, thresholds=(third, two_thirds), hysteresis=(two_thirds - third) / 4)
    return replace(settings, chunk=chunk, kv=replace(settings.kv, threshold=half))


BLUR = 0.1
"""A best scale is known to this share of the grid's step, by the parabola: KL is not quite one so far from 1."""


def best_scales(damage: Tensor, tokens: Tensor, grid: Sequence[float]) -> Tensor:
    """[J] the scale of least mean damage at every rung, within the measured grid; 1 at the top.

    Nearer to 1 than it is known, it is 1: a rung that is nearly exact would lose more by an error than it has to lose.
    damage [N, J, G], tokens [N].
    """
    mean = (damage * tokens[:, None, None]).sum(0, keepdim=True) / tokens.sum()
    candidates = torch.linspace(min(grid), max(grid), 201)
    measured = torch.tensor(list(grid))
    rungs = mean.shape[1]
    curve = torch.stack([interpolate_scale(mean, s.expand(1, rungs), measured)[0] for s in candidates])
    scales = candidates[curve.argmin(0)]
    step = (max(grid) - min(grid)) / max(1, len(grid) - 1)
    scales[(scales - 1).abs() < BLUR * step] = 1.0
    scales[-1] = 1.0
    return scales


def lambda_range(damage: Tensor, tokens: Tensor, cost: Tensor) -> tuple[float, float]:
    """log lambda from where the average chunk takes the top rung to where it takes the lowest, widened by one nat
    each way; damage [N, J] at the rungs' best scales, cost [J]."""
    mean = (damage * tokens[:, None]).sum(0) / tokens.sum()
    slope = (mean[:-1] - mean[1:]) / (cost[1:] - cost[:-1]).clamp(min=1e-9)
    positive = slope[slope > 0]
    if len(positive) == 0:
        raise ValueError("targets: expected KL to fall with rank, got none that does; is this the model's adapter?")
    return math.log(float(positive.min())) - 1.0, math.log(float(positive.max())) + 1.0


def knob_grid(policy: RankPolicy, count: int) -> list[float]:
    """`count` knobs from the cheapest to the dearest, evenly spaced."""
    return [float(k) for k in np.linspace(*policy.knob_range(), count)]


def calibrate_knob(knobs: Sequence[float], costs: Sequence[float]) -> KnobCurve:
    """The monotone map from mean cost to knob, by isotonic regression of what validation documents showed.

    Knobs run from cheap to dear. Points of equal cost are one point; its knob is their mean.
    """
    order = np.linspace(0, 1, len(knobs))
    smooth = IsotonicRegression(increasing=True).fit_transform(order, np.asarray(costs))
    points: dict[float, list[float]] = {}
    for cost, knob in zip(np.clip(smooth, 0, 1).round(9), knobs, strict=True):
        points.setdefault(float(cost), []).append(float(knob))
    return KnobCurve(tuple(points), tuple(float(np.mean(k)) for k in points.values()))

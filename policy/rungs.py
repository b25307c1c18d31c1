"""From a knob to a rung, and the scale each rung carries: what `fixed`, `percentile` and `random` share."""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import Settings


def nearest_rung(knob: Tensor, settings: Settings) -> Tensor:
    """Rung index [B] long nearest to `knob` [B], kept within the rungs.

    What is not a number gets the top rung: an unused row of a padded batch may hold anything, and an index out of
    range would take the whole batch down with it.
    """
    top = len(settings.rungs) - 1
    return knob.to(torch.float32).clamp(0, top).round().nan_to_num(nan=float(top)).long()


def rung_scales(settings: Settings, scales: Tensor | None) -> Tensor:
    """Scale of each rung, [J] float32; ones when `scales` is None.

    Raises ValueError unless there is one positive scale per rung and the top rung, which is exact, keeps 1.
    """
    count = len(settings.rungs)
    if scales is None:
        return torch.ones(count)
    if scales.shape != (count,):
        raise ValueError(f"scales: expected shape ({count},), one per rung, got {tuple(scales.shape)}")
    scales = scales.detach().to(torch.float32).clone()
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise ValueError(f"scales: expected positive finite numbers, got {scales.tolist()}")
    if float(scales[-1]) != 1.0:
        raise ValueError(f"scales: expected 1 at the top rung, which is exact, got {float(scales[-1])}")
    return scales

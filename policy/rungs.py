"""The rungs a policy moves on, from a knob to a rung, and the scale each rung carries.

A rung is named by its equivalent rank: the rank of a 16-bit adapter of the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .limits import Number, Several, Whole, refused

LARGEST_RANK = 2**16
MOST_RUNGS = 1024
RUNGS = Several(Whole(0, LARGEST_RANK), 1, MOST_RUNGS, distinct=True)
SPREAD = Number(0, MOST_RUNGS)
"""Half the width, in rungs, of the band around a knob."""


def checked_rungs(rungs: Sequence[int]) -> tuple[int, ...]:
    """The rungs as a tuple. Raises ValueError unless they ascend from at least 0, each once, the top above 0."""
    found: tuple[int, ...] = RUNGS.take("rungs", rungs)
    if found[-1] == 0:
        raise refused("rungs", "a top rank above 0", rungs)
    return found


def rung_shares(rungs: Sequence[int]) -> tuple[float, ...]:
    """Every rung relative to the top one: what rungs of adapters of different ranks have in common."""
    return tuple(rung / rungs[-1] for rung in rungs)


def rungs_at_shares(rungs: Sequence[int], rank: int) -> tuple[int, ...]:
    """The rungs of an adapter of `rank` that are the same shares of it as `rungs` are of their top.

    Raises ValueError where a share is no whole number of directions.
    """
    top = rungs[-1]
    if any(rung * rank % top for rung in rungs):
        least = top // math.gcd(*rungs)
        raise ValueError(
            f"adapter: expected a rank of which the policy's rungs {tuple(rungs)} are whole shares, got {rank}; use an "
            f"adapter whose rank is a multiple of {least}"
        )
    return tuple(rung * rank // top for rung in rungs)


def nearest_rung(knob: Tensor, count: int) -> Tensor:
    """Rung index [B] long nearest to `knob` [B], kept within `count` rungs.

    What is not a number gets the top rung: an unused row of a padded batch may hold anything, and an index out of
    range would take the whole batch down with it.
    """
    top = count - 1
    return knob.to(torch.float32).clamp(0, top).round().nan_to_num(nan=float(top)).long()


def rung_scales(count: int, scales: Tensor | None) -> Tensor:
    """Scale of each of `count` rungs, [J] float32; ones when `scales` is None.

    Raises ValueError unless there is one positive scale per rung and the top rung, which is exact, keeps 1.
    """
    if scales is None:
        return torch.ones(count)
    if scales.shape != (count,):
        raise ValueError(f"scales: expected shape ({count},), one per rung, got {tuple(scales.shape)}; give as many")
    scales = scales.detach().to(torch.float32).clone()
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise refused("scales", "positive finite numbers", scales.tolist())
    if float(scales[-1]) != 1.0:
        raise refused("scales", "1 at the top rung, which is exact", float(scales[-1]))
    return scales

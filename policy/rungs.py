"""The rungs a policy moves on, from a knob to a rung, and the scale each rung carries.

A rung is named by its equivalent rank: the rank of a 16-bit adapter of the same bytes, which may be fractional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .limits import Limit, Number, Several, refused
from .settings import DEFAULT_SHARES

Rung = int | float
"""An equivalent rank; a whole one is an int, so that it is written the same everywhere."""

LARGEST_RANK = 2**16
MOST_RUNGS = 1024


@dataclass(frozen=True)
class Rank(Limit):
    """An equivalent rank: a number, ends included, as an int where it is whole."""

    least: float
    most: float

    def __str__(self) -> str:
        return f"a rank in [{self.least:g}, {self.most:g}]"

    def take(self, name: str, value: Any) -> Rung:
        try:
            rank = Number(self.least, self.most).take(name, value)
        except ValueError:
            raise refused(name, self, value) from None
        return int(rank) if rank == int(rank) else rank


RUNG = Rank(0, LARGEST_RANK)
RUNGS = Several(RUNG, 1, MOST_RUNGS, distinct=True)
SPREAD = Number(0, MOST_RUNGS)
"""Half the width, in rungs, of the band around a knob."""
_SHARE_TOLERANCE = 1e-6
"""Shares closer than this, relatively, are the same: a rung is a share of a rank, rounded, sometimes by a user."""


def checked_rungs(rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    """The rungs as a tuple. Raises ValueError unless they ascend from at least 0, each once, the top above 0."""
    found: tuple[Rung, ...] = RUNGS.take("rungs", rungs)
    if found[-1] == 0:
        raise refused("rungs", "a top rank above 0", rungs)
    return found


def rungs_of_rank(rank: int) -> tuple[Rung, ...]:
    """The default rungs of an adapter of `rank`: the same shares of every adapter."""
    return checked_rungs([share * rank for share in DEFAULT_SHARES])


def rung_shares(rungs: Sequence[Rung]) -> tuple[float, ...]:
    """Every rung relative to the top one: what rungs of adapters of different ranks have in common."""
    return tuple(rung / rungs[-1] for rung in rungs)


def same_shares(one: Sequence[Rung], other: Sequence[Rung]) -> bool:
    """Whether two adapters' rungs are the same shares of their tops, but for rounding."""
    if len(one) != len(other):
        return False
    pairs = zip(rung_shares(one), rung_shares(other), strict=True)
    return all(math.isclose(own, its, rel_tol=_SHARE_TOLERANCE) for own, its in pairs)


def rungs_at_shares(rungs: Sequence[Rung], rank: Rung) -> tuple[Rung, ...]:
    """The rungs of an adapter of `rank` that are the same shares of it as `rungs` are of their top."""
    return checked_rungs([float(Fraction(rung) * Fraction(rank) / Fraction(rungs[-1])) for rung in rungs])


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

"""What the ladder in use is worth: in how many fewer bytes it reaches the KL of plain truncation.

Plain truncation is an `svd` ladder of the same adapter at fixed rungs, at scale 1: what static rank reduction gives
without any of this. Both are read in equivalent rank, which is bytes: the KL of an svd rung is looked up on the line
through the fixed rungs of the ladder in use, linear in log KL, since KL falls about exponentially with bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from policy.fixed import FixedPolicy
from policy.settings import DEFAULT_SHARES, Settings
from runtime.ladder import Adapter, Ladder, LoraFactors, build_ladder
from runtime.ladder.factors import SVD

from ..task import common_rank
from .curves import Curve, fixed_curve
from .scorer import HeldOut

HEADLINE_SHARE = 1 / 4
"""The svd rung that is told of in a sentence is the one nearest to this share of the adapter's bytes."""
LEAST_NATS = 1e-6
"""A KL of less is none: nothing is said of it."""


@dataclass(frozen=True)
class SvdCurve:
    """Fixed rungs of the `svd` ladders of the adapters in use."""

    curve: Curve
    rung_rank: np.ndarray
    """[K] equivalent rank of every rung of it."""


@dataclass(frozen=True)
class Reached:
    """One svd rung, and where the ladder in use is as good."""

    rank: float
    kl: float
    at: float
    """Equivalent rank at which the ladder in use has this KL."""
    beyond: bool
    """Whether it is better there already: at its cheapest rung."""

    @property
    def fewer(self) -> float:
        """Bytes of the svd rung over those of the ladder in use."""
        return self.rank / self.at

    def sentence(self, kind: str) -> str:
        """For people."""
        there, least = (" already", "at least ") if self.beyond else ("", "")
        return (
            f"KL of svd at rank {self.rank:.3g} ({self.kl:.2g}) is reached by the {kind} ladder at rank "
            f"{self.at:.2g}{there}: {least}{self.fewer:.2g} times fewer bytes"
        )


def svd_ladders(ladders: Sequence[Ladder]) -> list[Ladder]:
    """The `svd` ladders of the same adapters, at those of the default shares that are whole ranks of all of them.

    Empty where that is the ladder in use, or no share is whole.
    """
    tops = [ladder.rungs[-1] for ladder in ladders]
    shares = [share for share in DEFAULT_SHARES[:-1] if all(float(share * top).is_integer() for top in tops)]
    if not shares or all(ladder.kind == SVD for ladder in ladders):
        return []
    return [
        svd_ladder(ladder).with_rungs([int(share * top) for share in shares])
        for ladder, top in zip(ladders, tops, strict=True)
    ]


def svd_ladder(ladder: Ladder) -> Ladder:
    """The `svd` ladder of the adapter that a ladder holds."""
    exact = {name: LoraFactors(own.a.wide, own.b.wide.T, 1.0) for name, own in ladder.modules.items()}
    return replace(build_ladder(Adapter(Path(), ladder.base_model, exact)), adapter=ladder.adapter)


def measure_svd(test: HeldOut, settings: Settings) -> SvdCurve | None:
    """Score the fixed rungs of the `svd` ladders of the same adapters; None where there is nothing to compare with."""
    plain = svd_ladders([scorer.ladder for scorer in test.scorers])
    if not plain:
        return None
    beside = HeldOut(tuple(scorer.on(own) for scorer, own in zip(test.scorers, plain, strict=True)))
    curve = fixed_curve(FixedPolicy(plain[0].rungs), settings, beside, SVD)
    return SvdCurve(curve, common_rank(plain).double().numpy())


def compare_with_svd(fixed: Curve, rung_rank: np.ndarray, svd: SvdCurve) -> list[Reached]:
    """Every svd rung whose KL the fixed rungs of the ladder in use reach, cheapest first."""
    points = sorted((point.scores.mean(rung_rank), point.scores.value("kl")) for point in fixed.points)
    theirs = sorted((p.scores.mean(svd.rung_rank), p.scores.value("kl")) for p in svd.curve.points)
    ranks, kls = (np.array(column) for column in zip(*points, strict=True))
    found = []
    for rank, kl in theirs:
        below = np.flatnonzero(kls <= kl)
        if kl < LEAST_NATS or not len(below) or ranks[below[0]] == 0:
            continue
        first = int(below[0])
        at = float(ranks[first])
        if first > 0:
            high, low = np.log(np.maximum(kls[first - 1 : first + 1], LEAST_NATS))
            share = (high - np.log(kl)) / (high - low)
            at = float(ranks[first - 1] + share * (ranks[first] - ranks[first - 1]))
        found.append(Reached(rank, kl, at, beyond=first == 0))
    return found


def headline(found: Sequence[Reached], top: float) -> Reached | None:
    """The rung to tell of, of an adapter of rank `top`; None where there is none."""
    return min(found, key=lambda own: abs(own.rank - HEADLINE_SHARE * top), default=None)


def describe(found: Sequence[Reached], kind: str, top: float) -> dict[str, Any]:
    """For the summary."""
    told = headline(found, top)
    return {
        "over_svd": [
            {
                "rank": own.rank,
                "share": own.rank / top,
                "kl": own.kl,
                "reached_at": own.at,
                "fewer_bytes": own.fewer,
                "at_least": own.beyond,
            }
            for own in found
        ],
        "fewer_bytes": None if told is None else told.fewer,
        "worth": None if told is None else told.sentence(kind),
    }

"""Every policy's KL at one and the same mean rank, that of each fixed rung, and the bytes that it saves at equal KL.

A policy's knob was set on validation documents, so on test documents it spends a per cent or so more or less than the
rung that it was aimed at. It is held against what fixed rungs lose at its own bytes: on the line through the measured
rungs, linear in log KL over bytes, for KL falls about exponentially. What is so read lies within a few per cent of a
rung that was measured, where the line is off by a thousandth; no other policy's KL is interpolated.

What chance makes of it is told by resampling documents, the same draw for all policies, so that differences and ratios
are paired, and of policies that were trained several times the seeds as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .curves import Curve, rank_and_kl

Interval = tuple[float, float]

LEAST_NATS = 1e-9
"""What an exact rung is taken to lose where the logarithm is needed."""


@dataclass(frozen=True)
class EqualRank:
    """Of every policy at the mean ranks [K] of all rungs but the top; nan where it does not reach one."""

    ranks: np.ndarray
    """[K]"""
    kl: dict[str, np.ndarray]
    """[K] each: nats per completion token, of several seeds the mean."""
    drawn: dict[str, np.ndarray]
    """[R, K] each: the same on resamples of documents and seeds."""
    saved: dict[str, np.ndarray]
    """[K] each: share of the bytes that fixed rungs need for the same KL."""
    saved_drawn: dict[str, np.ndarray]
    """[R, K] each"""


@dataclass(frozen=True)
class FixedLine:
    """What fixed rungs lose, on each of R draws of documents, the exact top included."""

    ranks: np.ndarray
    """[K + 1]"""
    log_kl: np.ndarray
    """[R, K + 1], never rising"""

    @classmethod
    def of(cls, fixed: Curve, rung_rank: np.ndarray, draws: np.ndarray) -> FixedLine:
        """From the measured rungs; a rung that loses more than a cheaper one counts as that."""
        kl = np.stack([rank_and_kl(point.scores, rung_rank, draws)[1] for point in fixed.points], 1)
        kl = np.concatenate([np.minimum.accumulate(kl, 1), np.zeros((len(draws), 1))], 1)
        ranks = np.array([*(rung_rank[point.rung] for point in fixed.points), rung_rank[-1]], dtype=float)
        return cls(ranks, np.log(np.maximum(kl, LEAST_NATS)))

    def log_kl_at(self, ranks: np.ndarray) -> np.ndarray:
        """[R] at mean ranks [R]; beyond the cheapest rung the line goes on."""
        left = np.clip(np.searchsorted(self.ranks, ranks, side="right") - 1, 0, len(self.ranks) - 2)
        share = (ranks - self.ranks[left]) / (self.ranks[left + 1] - self.ranks[left])
        low, high = (np.take_along_axis(self.log_kl, at[:, None], 1)[:, 0] for at in (left, left + 1))
        return low + share * (high - low)

    @property
    def least(self) -> float:
        """Half of the cheapest rung that has any bytes: fewer are not told apart."""
        return float(self.ranks[self.ranks > 0][0]) / 2

    def rank_at(self, kl: np.ndarray) -> np.ndarray:
        """[R] the least mean rank at which fixed rungs lose kl [R]; beyond the cheapest rung the line goes on, down to
        `least`."""
        wanted = np.log(np.maximum(kl, LEAST_NATS))
        left = np.clip((self.log_kl > wanted[:, None]).sum(1) - 1, 0, len(self.ranks) - 2)
        low, high = (np.take_along_axis(self.log_kl, at[:, None], 1)[:, 0] for at in (left, left + 1))
        fall = np.minimum(high - low, -1e-12)
        found = self.ranks[left] + (wanted - low) / fall * (self.ranks[left + 1] - self.ranks[left])
        return np.maximum(found, self.least)


def at_equal_rank(curves: Mapping[str, Curve], rung_rank: np.ndarray, *, resamples: int, seed: int) -> EqualRank:
    """Read `curves`, of which `fixed` has a point per rung but the top, as measured and on resamples."""
    generator = np.random.default_rng(seed)
    documents = len(curves["fixed"].points[0].scores.tokens)
    # The first draw is everything as it is.
    draws = np.concatenate([np.ones((1, documents)), _draws(generator, resamples, documents)])
    line = FixedLine.of(curves["fixed"], rung_rank, draws)
    kl: dict[str, np.ndarray] = {}
    saved: dict[str, np.ndarray] = {}
    for name, curve in curves.items():
        members = len(curve.members)
        seeds = np.concatenate([np.ones((1, members)), _draws(generator, resamples, members)]) / members
        read = [_read(own, line, rung_rank, draws) for own in curve.members]
        kl[name], saved[name] = (
            np.einsum("rs,srk->rk", seeds, np.stack([own[which] for own in read])) for which in (0, 1)
        )
    return EqualRank(
        rung_rank[:-1],
        {name: values[0] for name, values in kl.items()},
        {name: values[1:] for name, values in kl.items()},
        {name: values[0] for name, values in saved.items()},
        {name: values[1:] for name, values in saved.items()},
    )


def _read(curve: Curve, line: FixedLine, rung_rank: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[R, K] KL at the rungs' ranks and [R, K] bytes saved; nan where there is no point."""
    kl, saved = (np.full((len(draws), len(rung_rank) - 1), np.nan) for _ in range(2))
    for point in curve.points:
        rank, own = rank_and_kl(point.scores, rung_rank, draws)
        aim = np.full(len(draws), float(rung_rank[point.rung]))
        kl[:, point.rung] = own * np.exp(line.log_kl_at(aim) - line.log_kl_at(rank))
        saved[:, point.rung] = 1 - np.maximum(rank, line.least) / line.rank_at(own)
    return kl, saved


def _draws(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    """How often each of `size` is drawn, `count` times: [count, size]."""
    return generator.multinomial(size, np.full(size, 1 / size), size=count).astype(float)


def interval(drawn: np.ndarray) -> Interval:
    """95 % of the resamples [R]."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)

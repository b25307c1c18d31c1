"""Every policy's KL at one and the same mean rank: that of each fixed rung.

A policy's own points lie near the rungs they were aimed at, not on them. Its KL there is interpolated linearly between
its points, which for a convex curve can only overstate it; the fixed rung's is as measured. What documents make of it
by chance is told by resampling them, the same draw for all policies, so that differences and ratios are paired.

Whether a curve reaches a rung is a matter of all documents. On a resample that draws dearer documents its cheapest
point may lie a little above a rung that it reaches; there it is read on the line to the cheapest rung, where every
policy that spends less and less ends. Leaving such resamples out would keep only draws of cheap documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..progress import with_progress
from .curves import Curve, rank_and_kl

Interval = tuple[float, float]


@dataclass(frozen=True)
class EqualRank:
    """KL of every policy at the mean ranks [K] of all rungs but the top, nats per completion token."""

    ranks: np.ndarray
    """[K]"""
    kl: dict[str, np.ndarray]
    """[K] each; nan where a curve does not reach a rung."""
    drawn: dict[str, np.ndarray]
    """[R, K] each: the same on resamples of the documents."""


def at_equal_rank(curves: dict[str, Curve], rung_rank: np.ndarray, *, resamples: int, seed: int) -> EqualRank:
    """Read `curves`, of which `fixed` has a point per rung but the top, as measured and on resampled documents."""
    resampled = with_progress(_resamples(curves["fixed"], resamples, seed), "resampled documents", resamples)
    draws = [_read(curves, rung_rank, draw) for draw in resampled]
    drawn = {name: np.stack([draw[name] for draw in draws]) for name in curves}
    return EqualRank(rung_rank[:-1], _read(curves, rung_rank, None), drawn)


def _read(curves: dict[str, Curve], rung_rank: np.ndarray, draw: np.ndarray | None) -> dict[str, np.ndarray]:
    fixed = np.array([rank_and_kl(point.scores, rung_rank, draw)[1] for point in curves["fixed"].points])
    floor = None if draw is None else float(fixed[0])
    return {
        name: fixed if name == "fixed" else curve.at(rung_rank[:-1], rung_rank, draw, floor)
        for name, curve in curves.items()
    }


def _resamples(curve: Curve, count: int, seed: int) -> Iterator[np.ndarray]:
    """How often each document is drawn, [D], `count` times."""
    documents = len(curve.points[0].scores.tokens)
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield np.bincount(generator.integers(documents, size=documents), minlength=documents).astype(float)


def interval(drawn: np.ndarray) -> Interval:
    """95 % of the resamples [R]."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)

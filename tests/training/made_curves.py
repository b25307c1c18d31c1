"""Curves of every policy on made documents, with numbers small enough to check by hand."""

import numpy as np

from training.compare.curves import Curve, Point
from training.compare.scorer import Scores
from training.compare.verdict import Verdict, judge

RUNGS = (4, 8, 16, 24, 192)
"""A verdict is read at 8, 16 and 24."""
RUNG_RANK = np.array(RUNGS, dtype=float)
DOCUMENTS = 40


def scores(rank: float, kl, tokens=None) -> Scores:
    """Documents of 10 scored tokens (or `tokens`), `kl` nats per token each, mixing two rungs to a mean of `rank`."""
    kl = np.broadcast_to(np.asarray(kl, dtype=float), DOCUMENTS)
    tokens = np.full(DOCUMENTS, 10.0) if tokens is None else tokens
    right = min(int(np.searchsorted(RUNG_RANK, rank, side="right")), len(RUNGS) - 1)
    share = (rank - RUNG_RANK[right - 1]) / (RUNG_RANK[right] - RUNG_RANK[right - 1])
    rungs = np.zeros((DOCUMENTS, len(RUNGS)))
    rungs[:, right - 1], rungs[:, right] = (1 - share) * tokens, share * tokens
    return Scores({"kl": kl * tokens, "perplexity": 2.0 * tokens}, tokens, rungs, rungs)


def curve(name: str, points: list[tuple[float, object]]) -> Curve:
    """Points at these mean ranks, each aimed at the rung that is nearest."""
    found = []
    for number, (rank, kl) in enumerate(points):
        aim = int(np.abs(RUNG_RANK[:-1] - rank).argmin())
        found.append(Point(float(number), scores(rank, kl), aim))
    return Curve(name, tuple(found))


FIXED = curve("fixed", [(4, 0.8), (8, 0.4), (16, 0.2), (24, 0.1)])
ORACLE = curve("oracle", [(4, 0.4), (8, 0.2), (16, 0.1), (24, 0.05)])
RANDOM = curve("random", [(4, 0.9), (8, 0.5), (16, 0.3), (24, 0.2)])
PERCENTILE = curve("percentile", [(4, 0.8), (8, 0.39), (16, 0.21), (24, 0.1)])


def policies(learned: Curve, percentile: Curve = PERCENTILE, **changes: Curve) -> dict[str, Curve]:
    """Every policy's curve, `learned` and what else is given in place of the constants."""
    curves = {"fixed": FIXED, "percentile": percentile, "learned": learned, "random": RANDOM, "oracle": ORACLE}
    return {**curves, **changes}


def verdict(learned: Curve, percentile: Curve = PERCENTILE, **changes: Curve) -> Verdict:
    return judge(policies(learned, percentile, **changes), RUNGS, RUNG_RANK, resamples=200, seed=0)

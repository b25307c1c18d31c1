"""How often a verdict is wrong, on made experiments whose truth is known: as often as its intervals say."""

import numpy as np
import pytest

from training.compare.curves import Curve, Point
from training.compare.equal_rank import at_equal_rank
from training.compare.scorer import Scores
from training.compare.verdict import Verdict, judge

RUNGS = (2, 4, 6, 8, 12, 16, 64)
RANKS = np.array(RUNGS, dtype=float)
READ = (1, 2, 3)
"""Rungs that the verdict is read at: 4, 6 and 8 of rank 64."""
DOCUMENTS = 32
EXPERIMENTS = 300


class Experiment:
    """Documents of different lengths and difficulty; what a policy loses on one of them has noise of its own."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.tokens = self.generator.integers(40, 130, DOCUMENTS).astype(float)
        self.size = self.generator.gamma(6.0, 1 / 6, DOCUMENTS)
        self.fixed = Curve("fixed", tuple(self.point(aim, 1.0, 0.0, 0.0) for aim in range(len(RUNGS) - 1)))

    def point(self, aim: int, share: float, noise: float, off: float) -> Point:
        """`share` of what the fixed rungs lose at its bytes, which are up to `off` from the rung's."""
        rank = RANKS[aim] * (1 + off * self.generator.uniform(-1, 1))
        by_document = rank * (1 + off * self.generator.normal(0, 1, DOCUMENTS))
        kl = share * 0.6 * self.size * np.exp(-0.25 * rank)
        kl = kl * (1 + noise * self.generator.normal(0, 1, DOCUMENTS))
        left = np.clip(np.searchsorted(RANKS, by_document, side="right") - 1, 0, len(RANKS) - 2)
        high = (by_document - RANKS[left]) / (RANKS[left + 1] - RANKS[left])
        counts = np.zeros((DOCUMENTS, len(RUNGS)))
        rows = np.arange(DOCUMENTS)
        counts[rows, left], counts[rows, left + 1] = (1 - high) * self.tokens, high * self.tokens
        return Point(0.0, Scores({"kl": kl * self.tokens}, self.tokens, counts, counts), aim)

    def policy(self, name: str, share: float, noise: float, off: float = 0.01) -> Curve:
        return Curve(name, tuple(self.point(aim, share, noise, off) for aim in READ))

    def verdict(self, learned: float, oracle: float, noise: float = 0.15) -> Verdict:
        """Of policies that lose these shares of what fixed rungs do."""
        curves = {
            "fixed": self.fixed,
            "percentile": self.policy("percentile", 3.0, noise),
            "learned": self.policy("learned", learned, noise),
            "oracle": self.policy("oracle", oracle, noise),
        }
        return judge(curves, RUNGS, RANKS, resamples=200, seed=0)


def verdicts(learned: float, oracle: float, first: int = 0, **options) -> list[Verdict]:
    return [Experiment(first + seed).verdict(learned, oracle, **options) for seed in range(EXPERIMENTS)]


def seldom(wrong: list[bool]) -> bool:
    """Whether that happens in one experiment of twenty, or what chance makes of it in a series (two deviations)."""
    return sum(wrong) <= 0.05 * len(wrong) + 2 * np.sqrt(0.05 * 0.95 * len(wrong))


def test_no_headroom_is_seldom_called_one_and_no_gain_seldom_exported():
    found = verdicts(1.0, 1.0)
    assert seldom([own.headroom_interval[0] > 0 for own in found])
    assert seldom([own.headroom_interval[1] < 0 for own in found])
    assert seldom([own.captured is not None for own in found])
    assert seldom([own.exported == "learned" for own in found])
    assert seldom([own.saved.interval[0] > 0 for own in found])
    # Nothing is floored, so what is found is as often below nothing as above.
    assert 0.4 < np.mean([own.headroom > 0 for own in found]) < 0.6


def test_headroom_that_is_there_is_nearly_always_found_and_its_share_is_right():
    found = verdicts(0.9, 0.8, first=1000)
    assert sum(own.headroom_interval[0] > 0 for own in found) >= 0.99 * EXPERIMENTS
    assert sum(own.exported == "learned" for own in found) >= 0.9 * EXPERIMENTS
    shares = [own for own in found if own.captured is not None]
    assert np.mean([own.captured for own in shares]) == pytest.approx(0.5, abs=0.03)
    covered = np.mean([own.captured_interval[0] <= 0.5 <= own.captured_interval[1] for own in shares])
    assert 0.88 <= covered <= 0.975


def test_bytes_saved_are_those_that_were_planted():
    """A tenth less to lose is worth -log(0.9) / 0.25 ranks, at every rung."""
    needed = RANKS[list(READ)] - np.log(0.9) / 0.25
    truth = float(np.mean(1 - RANKS[list(READ)] / needed))
    found = [own.saved for own in verdicts(0.9, 0.8, first=2000)]
    assert np.mean([own.value for own in found]) == pytest.approx(truth, rel=0.05)
    assert 0.88 <= np.mean([own.interval[0] <= truth <= own.interval[1] for own in found]) <= 0.975


def test_more_documents_make_the_interval_narrower_and_more_resamples_do_not():
    own = Experiment(0)
    curves = {"fixed": own.fixed, "learned": own.policy("learned", 0.9, 0.15)}
    few, many = (
        at_equal_rank(curves, RANKS, resamples=resamples, seed=0).drawn["learned"][:, 2].std()
        for resamples in (400, 4000)
    )
    assert few == pytest.approx(many, rel=0.1)
    twice = {name: Curve(name, tuple(_twice(point) for point in curve.points)) for name, curve in curves.items()}
    drawn = at_equal_rank(twice, RANKS, resamples=4000, seed=0).drawn["learned"][:, 2]
    assert drawn.std() == pytest.approx(many / np.sqrt(2), rel=0.1)


def _twice(point: Point) -> Point:
    return Point(point.knob, Scores.concatenate([point.scores, point.scores]), point.rung)

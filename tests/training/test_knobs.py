"""A knob is set where validation documents spend a fixed rung's bytes, or not at all; what is reported is measured."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy import KVSettings, LearnedPolicy, PercentilePolicy, RankPolicy, Settings
from training.compare.curves import (
    CLOSE,
    KNOB_POINTS,
    ROUNDS,
    capped_curve,
    fixed_curve,
    oracle_curve,
    policy_curve,
    set_knobs,
)
from training.compare.scorer import Scores
from training.compare.verdict import areas

RUNGS = (2, 4, 6, 8, 12, 16, 24, 32, 64)
COST = np.array(RUNGS, dtype=float) / RUNGS[-1]
AIMS = range(len(RUNGS) - 1)
RISING = PercentilePolicy(RUNGS, "entropy", spread=1.0)
FALLING = LearnedPolicy(RUNGS, log_lambda_range=(-9.0, 3.0))
POLICIES = pytest.mark.parametrize("policy", [RISING, FALLING], ids=["rising", "falling"])
"""Whose knob rises, and whose falls, with what is spent."""


@dataclass
class Bench:
    """Spends `spent(share, start)`, the share being how far the knob is on its way from cheap to dear."""

    policy: RankPolicy
    spent: object
    asked: list[tuple[float, int, Scores]] = field(default_factory=list)
    calls: int = 0

    def measure(self, policy, settings, operating, name=None):
        cheap, dear = self.policy.knob_range()
        self.calls += 1
        found = []
        for knob, start in zip(operating.knob.tolist(), operating.start_rung.tolist(), strict=True):
            cost = float(np.clip(self.spent((knob - cheap) / (dear - cheap), start), COST[0], 1))
            top = (cost - COST[0]) / (1 - COST[0])
            counts = np.zeros((3, len(RUNGS)))
            counts[:, 0], counts[:, -1] = 10 * (1 - top), 10 * top
            sums = {"kl": np.full(3, math.exp(-5 * cost)), "perplexity": np.ones(3)}
            found.append(Scores(sums, np.full(3, 10.0), counts, counts))
            self.asked.append((knob, start, found[-1]))
        return found

    def cost_at(self, knob: float, start: int) -> float:
        cheap, dear = self.policy.knob_range()
        return float(np.clip(self.spent((np.float32(knob) - cheap) / (dear - cheap), start), COST[0], 1))


def straight(share: float, start: int) -> float:
    return COST[0] + (1 - COST[0]) * share


def steep(share: float, start: int) -> float:
    """Nearly all of the way within a thirtieth of the knob's."""
    return math.exp(math.log(COST[0]) * (1 - 1 / (1 + math.exp(-(share - 0.6) * 120))))


def late(share: float, start: int) -> float:
    """Next to nothing for most of the way."""
    return COST[0] + (1 - COST[0]) * share**12


def stepped(share: float, start: int) -> float:
    """By steps of 1.5 %: every rung is within 1 % of one of them."""
    size = math.log(1.015)
    return math.exp(round((math.log(COST[0]) * (1 - share)) / size) * size)


def shifted(share: float, start: int) -> float:
    """A dearer start spends more at the same knob: coarse runs, from other starts, mislead."""
    return straight(share, start) * (0.5 + 0.12 * start)


def drawn_to_start(share: float, start: int) -> float:
    """What is spent lies between what the knob says and the start rung."""
    return 0.5 * straight(share, start) + 0.5 * float(COST[start])


CURVES = (straight, steep, late, stepped, shifted, drawn_to_start)


@POLICIES
@pytest.mark.parametrize("spent", CURVES, ids=[spent.__name__ for spent in CURVES])
def test_every_rungs_knob_ends_within_one_per_cent_of_its_bytes(policy, spent):
    bench = Bench(policy, spent)
    knobs, curve = set_knobs("policy", policy, Settings(), bench, COST, AIMS)
    assert sorted(knobs) == list(AIMS)
    for rung, knob in knobs.items():
        assert bench.cost_at(knob, rung) == pytest.approx(COST[rung], rel=CLOSE), rung
    assert bench.calls <= 1 + ROUNDS
    assert all(start in AIMS for _, start, _ in bench.asked[KNOB_POINTS:])
    # What serving reads of the curve at a rung's bytes is the knob that spent as much there.
    for rung in knobs:
        assert bench.cost_at(curve.knob(float(COST[rung])), rung) == pytest.approx(COST[rung], rel=2 * CLOSE)
    cheap, dear = policy.knob_range()
    assert (list(curve.knobs) == sorted(curve.knobs)) == (dear > cheap)


@POLICIES
def test_a_rung_that_is_met_is_not_asked_for_again(policy):
    bench = Bench(policy, straight)
    knobs, _ = set_knobs("policy", policy, Settings(), bench, COST, AIMS)
    for rung in AIMS:
        tried = [(knob, scores.mean(COST)) for knob, start, scores in bench.asked[KNOB_POINTS:] if start == rung]
        met = [abs(cost / COST[rung] - 1) <= CLOSE for _, cost in tried]
        assert met == [False] * (len(met) - 1) + [True]
        assert tried[-1][0] == pytest.approx(knobs[rung], rel=1e-6)


@POLICIES
@pytest.mark.parametrize(
    ("spent", "missed"),
    [
        (lambda share, start: max(0.07, straight(share, start)), [0, 1]),
        (lambda share, start: min(0.2, straight(share, start)), [5, 6, 7]),
        # From 0.055 straight to 0.11: there is nothing between.
        (lambda share, start: own if not 0.055 < (own := straight(share, start)) < 0.11 else 0.055, [1, 2]),
        (lambda share, start: straight(share, start) if start != 3 else 0.3, [3]),
        (lambda share, start: 0.3, list(AIMS)),
    ],
    ids=["below", "above", "gap", "one start", "all"],
)
def test_a_rung_out_of_reach_is_left_out_and_no_other(policy, spent, missed):
    validation, test = Bench(policy, spent), Bench(policy, spent)
    found = policy_curve("learned", policy, Settings(), validation, test, COST, AIMS)
    assert [point.rung for point in found.points] == [rung for rung in AIMS if rung not in missed]
    for point in found.points:
        assert point.scores.mean(COST) == pytest.approx(COST[point.rung], rel=CLOSE)
    assert validation.calls == 1 + ROUNDS, "it is looked for to the end"
    assert test.calls == (1 if found.points else 0)
    assert found.knob_curve is not None, "which serves budgets all the same"
    ranks = np.array(RUNGS, dtype=float)
    capped = capped_curve(found, policy, Settings(), test, COST)
    assert [point.rung for point in capped.points] == [point.rung for point in found.points]
    measured = fixed_curve(RISING, Settings(), Bench(RISING, straight))
    assert (areas({"fixed": measured, "learned": capped}, ranks)["learned"] is None) == (not found.points)


@given(
    knots=st.lists(st.floats(0.3, 3.0), min_size=8, max_size=8),
    flip=st.booleans(),
    lean=st.floats(-0.05, 0.05),
)
def test_whatever_the_cost_curve_a_knob_that_is_set_spends_what_it_should(knots, flip, lean):
    """Any rising curve of piecewise constant slope in log bytes, a little off at other starts: all rungs are met."""
    policy = FALLING if flip else RISING
    heights = np.concatenate([[0.0], np.cumsum(knots)]) / sum(knots)

    def spent(share: float, start: int) -> float:
        level = np.interp(share, np.linspace(0, 1, len(heights)), heights)
        return math.exp(math.log(COST[0]) * (1.02 - 1.04 * level) + lean * (start - 4))

    bench = Bench(policy, spent)
    knobs, _ = set_knobs("policy", policy, Settings(), bench, COST, range(1, 7))
    assert sorted(knobs) == list(range(1, 7))
    for rung, knob in knobs.items():
        assert bench.cost_at(knob, rung) == pytest.approx(COST[rung], rel=CLOSE)


def test_what_is_reported_is_what_was_measured():
    """Nothing is read between knobs: every point's scores are those that test documents gave, at the very knob that
    met its bytes on validation documents, even where test documents spend something else."""
    validation, test = Bench(RISING, shifted), Bench(RISING, lambda share, start: 1.013 * shifted(share, start))
    found = policy_curve("percentile", RISING, Settings(), validation, test, COST, AIMS)
    assert len(found.points) == len(test.asked) == len(AIMS)
    for point, (knob, start, scores) in zip(found.points, test.asked, strict=True):
        assert point.scores is scores
        assert (point.rung, np.float32(point.knob)) == (start, np.float32(knob))
        met = [own for own, rung, _ in validation.asked[KNOB_POINTS:] if rung == start]
        assert np.float32(met[-1]) == np.float32(knob)
    fixed = fixed_curve(RISING, Settings(), test, targets=[2, 5])
    oracle = oracle_curve(Settings(), Measured(test), np.array(RUNGS, dtype=float), [2, 5])
    capped = capped_curve(found, RISING, Settings(), test, COST)
    asked = [scores for _, _, scores in test.asked[len(AIMS) :]]
    reported = [point.scores for curve in (fixed, oracle, capped) for point in curve.points]
    assert len(reported) == len(asked)
    assert all(one is other for one, other in zip(reported, asked, strict=True))
    assert [point.rung for point in (*fixed.points, *oracle.points)] == [2, 5, 2, 5]


@dataclass
class Measured:
    """An oracle that measures on a bench."""

    bench: Bench

    def measure(self, settings, mean_ranks, start_rungs):
        assert mean_ranks == [RUNGS[rung] for rung in start_rungs]
        found = []
        for rank, start in zip(mean_ranks, start_rungs, strict=True):
            scores = Scores({"kl": np.ones(3)}, np.ones(3), np.full((3, len(RUNGS)), rank), np.ones((3, len(RUNGS))))
            self.bench.asked.append((rank, start, scores))
            found.append(scores)
        return found


def test_pages_are_compressed_where_that_is_asked_for_and_nowhere_else():
    seen = []

    class Noting(Bench):
        def measure(self, policy, settings, operating, name=None):
            seen.append(operating.kv.is_full)
            return super().measure(policy, settings, operating, name)

    served = KVSettings()
    for kv, full in ((None, True), (served, False)):
        seen.clear()
        options = {} if kv is None else {"kv": kv}
        policy_curve(
            "learned", FALLING, Settings(), *(Noting(FALLING, straight) for _ in range(2)), COST, [2], **options
        )
        fixed_curve(RISING, Settings(), Noting(RISING, straight), **options)
        assert seen
        assert set(seen) == {full}

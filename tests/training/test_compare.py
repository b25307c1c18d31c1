"""The rules of the comparison, on numbers small enough to check by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from policy import FixedPolicy, KnobCurve, PercentilePolicy, Settings
from policy.rungs import rungs_of_rank
from tests.training.made_curves import (
    DOCUMENTS,
    FIXED,
    PERCENTILE,
    RUNG_RANK,
    RUNGS,
    curve,
    scores,
    verdict,
)
from training.compare.curves import Curve, Point, fixed_curve, policy_curve
from training.compare.equal_rank import at_equal_rank
from training.compare.hindsight import oracle_rungs
from training.compare.scorer import Scores
from training.compare.verdict import areas, judge, verdict_rungs


def test_a_curve_is_linear_between_its_points_and_the_exact_top_rung():
    line = curve("learned", [(12, 0.3), (8, 0.5), (20, 0.2)])
    assert line.at(8, RUNG_RANK) == pytest.approx(0.5)
    assert line.at(10, RUNG_RANK) == pytest.approx(0.4)
    assert line.at(16, RUNG_RANK) == pytest.approx(0.25)
    assert line.at(42, RUNG_RANK) == pytest.approx(0.1)
    assert line.at(64, RUNG_RANK) == 0
    assert np.isnan(line.at(7.9, RUNG_RANK))
    assert line.at(8 * (1 - 1e-15), RUNG_RANK) == pytest.approx(0.5), "a mean of eights, but for its last bits"
    assert line.at([7, 8, 10], RUNG_RANK, floor=0.9)[1:] == pytest.approx([0.5, 0.4]), "a floor matters below"
    assert line.at([4, 6], RUNG_RANK, floor=0.9) == pytest.approx([0.9, 0.7])


def test_a_curve_of_drawn_documents_counts_each_as_often_as_it_is_drawn():
    kl = np.zeros(DOCUMENTS)
    kl[0], kl[1] = 1.0, 3.0
    line = Curve("learned", (Point(0.0, scores(8, kl)),))
    draws = np.zeros(DOCUMENTS)
    draws[0], draws[1] = 3, 1
    assert line.at(8, RUNG_RANK, draws) == pytest.approx(1.5)


def test_the_fixed_rung_is_never_interpolated():
    """Its KL at rank 8 is that of rung 8, even where the measured mean rank is a little off."""
    off = Curve(
        "fixed",
        tuple(
            Point(float(i), scores(r, k)) for i, (r, k) in enumerate([(4.5, 0.8), (8.5, 0.4), (16.5, 0.2), (24.5, 0.1)])
        ),
    )
    found = verdict(curve("learned", [(4, 0.5), (8, 0.3), (16, 0.15), (24, 0.07)]), fixed=off)
    assert found.kl["fixed"] == pytest.approx([0.4, 0.2, 0.1])


def test_headroom_and_captured_add_up_over_the_rungs_compared():
    found = verdict(curve("learned", [(4, 0.5), (8, 0.25), (16, 0.14), (24, 0.07)]))
    assert found.ranks == (8, 16, 24)
    assert found.headroom == pytest.approx((0.2 + 0.1 + 0.05) / 3)
    assert found.captured == pytest.approx((0.15 + 0.06 + 0.03) / 0.35)
    assert found.exported == "learned"
    assert found.captured_interval == pytest.approx((found.captured, found.captured), rel=1e-6), "no spread, no width"


def test_a_gain_within_chance_exports_fixed():
    """On average a little better, but by documents that differ far more than that."""
    wild = np.random.default_rng(1).normal(0.38, 0.3, DOCUMENTS).clip(0)
    wild += 0.38 - wild.mean()
    found = verdict(curve("learned", [(4, 2 * wild), (8, wild), (16, wild - 0.19), (24, wild - 0.285)]))
    assert found.kl["learned"] == pytest.approx([0.38, 0.19, 0.095])
    assert found.gain_interval[0] < 0 < found.gain_interval[1]
    assert found.exported == "fixed"
    assert "within chance" in found.reason


def test_a_loss_exports_fixed():
    found = verdict(curve("learned", [(4, 0.9), (8, 0.5), (16, 0.3), (24, 0.2)]))
    assert found.captured < 0
    assert found.exported == "fixed"


def test_percentile_better_at_one_rung_exports_fixed_and_says_where():
    better = curve("percentile", [(4, 0.8), (8, 0.39), (16, 0.12), (24, 0.1)])
    found = verdict(curve("learned", [(4, 0.5), (8, 0.25), (16, 0.14), (24, 0.07)]), better)
    assert found.exported == "fixed"
    assert found.reason == "percentile thresholds do better at mean rank 16"


def test_no_headroom_captures_nothing():
    found = verdict(FIXED_AS_LEARNED, oracle=replace(FIXED, name="oracle"))
    assert (found.headroom, found.headroom_interval) == (0, (0, 0))
    assert found.captured is found.captured_interval is None
    assert found.exported == "fixed"


FIXED_AS_LEARNED = replace(FIXED, name="learned")


def test_a_rung_that_a_curve_does_not_reach_is_left_out():
    found = verdict(curve("learned", [(10, 0.25), (16, 0.14), (24, 0.07)]))
    assert found.ranks == (16, 24)
    assert all(len(values) == 2 for values in found.kl.values())
    nowhere = verdict(curve("learned", [(25, 0.05)]))
    assert (nowhere.ranks, nowhere.exported) == ((), "fixed")


def few(name: str, points: list[tuple[list[float], list[float]]]) -> Curve:
    """Documents of 10 tokens and rungs 2, 4, 6, 16: per point the rung of every document, and its KL."""
    found = []
    for rung, kl in points:
        tokens = np.full(len(rung), 10.0)
        counts = np.equal.outer(rung, FEW[0]) * 10.0
        found.append(Point(0.0, Scores({"kl": np.array(kl) * 10, "perplexity": tokens}, tokens, counts, counts)))
    return Curve(name, tuple(found))


FEW = ([2, 4, 6, 16], np.array([2.0, 4.0, 6.0, 16.0]))


@pytest.mark.parametrize("documents", [1, 2, 8])
def test_a_rung_that_a_curve_reaches_on_average_only_is_read_on_every_resample(documents):
    """Four documents at rung 2 and four at 6 spend 4 together, and resamples of them more or less.

    Each document's KL is 0.1 a rank below the top, so that it is 1.2 at rank 4 on whatever is drawn: above the
    cheapest point, and below it as well.
    """
    fixed = few("fixed", [([rung] * documents, [0.1 * (16 - rung)] * documents) for rung in (2, 4, 6)])
    half = [2 if number % 2 else 6 for number in range(documents)] if documents > 1 else [4]
    mixed = few("learned", [(half, [0.1 * (16 - rung) for rung in half]), ([6] * documents, [1.0] * documents)])
    curves = {"fixed": fixed, "learned": mixed, "oracle": mixed, "percentile": fixed}
    read = at_equal_rank(curves, FEW[1], resamples=100, seed=0)
    assert np.isnan(read.kl["learned"][0])
    assert read.kl["learned"][1:] == pytest.approx([1.2, 1.0])
    assert read.drawn["learned"].shape == (100, 3)
    assert read.drawn["learned"] == pytest.approx(np.broadcast_to([1.4, 1.2, 1.0], (100, 3)))
    found = judge(curves, *FEW, resamples=100, seed=0)
    assert found.ranks == (4, 6)
    assert found.gain_interval == pytest.approx((0, 0), abs=1e-12)
    assert found.over_fixed.ratios["learned"][0] is None
    assert found.over_fixed.ratios["learned"][1].interval == pytest.approx((1, 1))


def test_resamples_without_headroom_have_no_share_of_it():
    """One document of eight has all the headroom that there is; a resample in three does not draw it."""
    flat, same = [0.4] * 8, [4] * 8
    ends = [([2] * 8, [0.6] * 8), ([6] * 8, [0.2] * 8)]
    fixed = few("fixed", [ends[0], (same, flat), ends[1]])

    def better(name, documents, by):
        return few(name, [ends[0], (same, [0.4 - by * (number < documents) for number in range(8)]), ends[1]])

    curves = {"fixed": fixed, "percentile": fixed, "learned": better("learned", 1, 0.1)}
    found = judge({**curves, "oracle": better("oracle", 1, 0.2)}, *FEW, resamples=100, seed=0)
    assert (found.headroom, found.captured) == (pytest.approx(0.025 / 3), None), "its interval reaches zero"
    # Four of eight: one resample in 256 draws none of them, too few to reach into the interval.
    curves |= {"learned": better("learned", 4, 0.1), "oracle": better("oracle", 4, 0.2)}
    drawn = at_equal_rank(curves, FEW[1], resamples=1000, seed=0).drawn
    assert (drawn["fixed"] == drawn["oracle"]).all(1).any()
    found = judge(curves, *FEW, resamples=1000, seed=0)
    assert found.captured == pytest.approx(0.5)
    assert found.captured_interval == pytest.approx((0.5, 0.5))


def test_the_ratio_to_the_fixed_rungs_is_of_the_same_documents():
    """KL differs from document to document fourfold, but the learned policy's is 3 % higher on each."""
    size = np.linspace(0.5, 2.0, DOCUMENTS)
    levels = [(4, 0.8), (8, 0.4), (16, 0.2), (24, 0.1)]
    fixed, learned = (
        curve(name, [(rank, kl * factor * size) for rank, kl in levels])
        for name, factor in (("fixed", 1.0), ("learned", 1.03))
    )
    found = verdict(learned, fixed=fixed).over_fixed
    assert found.ranks == (4, 8, 16, 24)
    assert found.kl["learned"] == pytest.approx([1.03 * kl * size.mean() for _, kl in levels])
    for ratio in (found.compared["learned"], *found.ratios["learned"]):
        assert (ratio.value, *ratio.interval) == pytest.approx((1.03, 1.03, 1.03)), "resamples are paired"
    for ratio in (found.compared["fixed"], *found.ratios["fixed"]):
        assert (ratio.value, *ratio.interval) == (1, 1, 1)
    low, high = found.compared["oracle"].interval
    assert low < 0.35 / 0.7 / size.mean() < high
    assert high - low > 0.05, "the oracle's KL does not follow the documents"


def test_what_fixed_rungs_do_not_lose_has_no_ratio():
    exact = curve("fixed", [(4, 0.8), (8, 0.4), (16, 0.2), (24, 0.0)])
    found = verdict(replace(exact, name="learned"), exact, fixed=exact, oracle=exact, random=exact).over_fixed
    assert [ratio and ratio.value for ratio in found.ratios["learned"]] == [1, 1, 1, None]
    nothing = curve("fixed", [(rank, 0.0) for rank in (4, 8, 16, 24)])
    found = verdict(replace(nothing, name="learned"), nothing, fixed=nothing, oracle=nothing, random=nothing)
    assert found.over_fixed.compared["learned"] is None
    assert found.sentence == "Fixed rungs are exported: they lose nothing that can be measured"


def wild(better: float) -> Curve:
    """A learned policy better than the fixed rungs by `better` on average, by documents that differ more than that."""
    noise = np.random.default_rng(1).normal(0, 0.1, DOCUMENTS)
    noise -= noise.mean()
    return curve("learned", [(r, kl * (1 - better + noise)) for r, kl in [(4, 0.8), (8, 0.4), (16, 0.2), (24, 0.1)]])


EXACTLY = [(4, 0.5), (8, 0.3), (16, 0.15), (24, 0.075)]
AT_16 = curve("percentile", [(4, 0.8), (8, 0.39), (16, 0.12), (24, 0.1)])


@pytest.mark.parametrize(
    ("learned", "percentile", "says"),
    [
        (
            curve("learned", EXACTLY),
            PERCENTILE,
            "The learned policy is exported: its KL is 25 % lower than the fixed rungs' at equal rank "
            "(95 % interval 25 to 25 %)",
        ),
        (
            wild(-0.123),
            PERCENTILE,
            "Fixed rungs are exported: the learned policy's KL is 12 % higher at equal rank "
            "(95 % interval {low:.2g} to {high:.2g} %)",
        ),
        (
            wild(0.004),
            PERCENTILE,
            "Fixed rungs are exported: the learned policy's KL is 0.4 % lower at equal rank, within chance "
            "(95 % interval {low:.2g} to {high:.2g} %)",
        ),
        (
            replace(FIXED, name="learned"),
            PERCENTILE,
            "Fixed rungs are exported: the learned policy's KL is the same at equal rank, within chance "
            "(95 % interval 0 to 0 %)",
        ),
        (
            curve("learned", EXACTLY),
            AT_16,
            "Fixed rungs are exported: the learned policy's KL is 25 % lower at equal rank (95 % interval 25 to 25 %), "
            "but percentile thresholds do better at mean rank 16",
        ),
        (
            curve("learned", [(25, 0.05)]),
            PERCENTILE,
            "Fixed rungs are exported: no policy's curve reaches a fixed rung",
        ),
    ],
    ids=["better", "worse", "chance", "same", "percentile", "nowhere"],
)
def test_the_sentence_says_what_is_exported_and_how_far_learned_is_from_fixed(learned, percentile, says):
    found = verdict(learned, percentile)
    if found.ranks:
        sign = 1 if "higher" in says else -1
        low, high = sorted(sign * 100 * (ratio - 1) for ratio in found.over_fixed.compared["learned"].interval)
        says = says.format(low=low, high=high)
    assert found.sentence == found.describe()["verdict"] == says


@pytest.mark.parametrize(
    ("rungs", "compared"),
    [
        (rungs_of_rank(64), [8, 16, 24]),
        (rungs_of_rank(32), [4, 8, 12]),
        (rungs_of_rank(8), [1, 2, 3]),
        (rungs_of_rank(2), [0.25, 0.5, 0.75]),
        ((2, 4, 6, 7), [2]),  # 4 is more than a half
        ((2, 10, 40, 64), [10]),  # nearest to all three
        ((9, 15, 30, 64), [9, 15, 30]),
        ((48, 56, 64), [48]),  # no rung below a half
        ((0, 1, 64), [1]),
    ],
)
def test_the_verdict_is_read_at_the_rungs_nearest_to_its_shares(rungs, compared):
    assert verdict_rungs(rungs) == compared


def test_rungs_of_a_small_adapter_may_be_less_than_one():
    rungs = rungs_of_rank(4)
    rank = np.array(rungs, dtype=float)

    def of_few_ranks(name, factor):
        points = []
        for number, kl in enumerate(factor * np.exp(-rank[:-1])):
            counts = np.zeros((DOCUMENTS, len(rungs)))
            counts[:, number] = 10.0
            points.append(Point(float(number), replace(scores(8, kl), rungs=counts)))
        return Curve(name, tuple(points))

    factors = {"fixed": 1.0, "percentile": 1.1, "learned": 0.9, "random": 1.2, "oracle": 0.5}
    found = judge({n: of_few_ranks(n, f) for n, f in factors.items()}, rungs, rank, resamples=5, seed=0)
    assert found.ranks == (0.5, 1, 1.5)
    assert found.kl["learned"] == pytest.approx(0.9 * np.exp([-0.5, -1, -1.5]))
    assert found.exported == "learned"
    assert found.over_fixed.shares == pytest.approx([rung / 4 for rung in rungs[:-1]])


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_covers_the_truth_about_as_often_as_it_says(seed):
    """Share captured is 0.6 by construction; of 30 experiments at 95 %, fewer than 24 covering is a 1 in 10^4 event."""
    generator, covered = np.random.default_rng(seed), 0
    for _ in range(30):
        per_document = generator.gamma(4.0, 0.1, DOCUMENTS)  # fixed KL at rung 8
        noise = generator.normal(0, 0.05, DOCUMENTS)
        fixed = curve("fixed", [(4, 2 * per_document), (8, per_document), (16, 0.5 * per_document), (24, 0.2)])
        oracle = curve("oracle", [(4, per_document), (8, 0.5 * per_document), (16, 0.25 * per_document), (24, 0.2)])
        learned = curve(
            "learned", [(4, 1.4 * per_document), (8, 0.7 * per_document + noise), (16, 0.35 * per_document), (24, 0.2)]
        )
        low, high = verdict(learned, fixed=fixed, oracle=oracle).captured_interval
        covered += low <= 0.6 <= high
    assert covered >= 24


def test_areas_are_trapezoids_over_the_range_all_curves_cover():
    curves = {"fixed": curve("fixed", [(8, 0.4), (16, 0.2)]), "learned": curve("learned", [(16, 0.1)])}
    # From rank 16 to 64: fixed 0.2 -> 0 and learned 0.1 -> 0, both straight.
    assert areas(curves, RUNG_RANK) == pytest.approx({"fixed": 48 * 0.2 / 2, "learned": 48 * 0.1 / 2})
    curves["learned"] = curve("learned", [(8, 0.3), (16, 0.1)])
    expected = {"fixed": 8 * 0.3 + 48 * 0.1, "learned": 8 * 0.2 + 48 * 0.05}
    # The grid of 101 ranks does not hit rank 16: at a kink of slope change s a step h errs by at most s h^2 / 8.
    assert areas(curves, RUNG_RANK) == pytest.approx(expected, abs=2e-3)


class Recorder:
    """A bench that notes how it was asked; a knob of k costs rung k."""

    def __init__(self):
        self.asked = []

    def measure(self, policy, settings, operating, name=None):
        assert operating.kv.is_full, "the comparison judges rank alone"
        knobs = operating.knob.tolist()
        self.asked += zip(operating.start_rung.tolist(), knobs, strict=True)
        return [scores(float(np.interp(knob, range(len(RUNGS)), RUNG_RANK)), 0.1) for knob in knobs]


def test_fixed_rungs_start_at_themselves():
    settings, bench = Settings(), Recorder()
    assert len(fixed_curve(FixedPolicy(RUNGS), settings, bench).points) == len(RUNGS) - 1
    assert bench.asked == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


def test_knobs_are_set_on_validation_and_test_is_asked_once_per_aim():
    settings, validation, test = Settings(), Recorder(), Recorder()
    policy = PercentilePolicy(RUNGS, "entropy", spread=0.0)
    cost = RUNG_RANK / RUNG_RANK[-1]
    found = policy_curve("percentile", policy, settings, validation, test, cost, range(len(RUNGS) - 1))
    assert isinstance(found.knob_curve, KnobCurve)
    # The first block runs at the rung aimed at: no prompt above the baseline's.
    assert [start for start, _ in test.asked] == [0, 1, 2, 3]
    knobs = [knob for _, knob in test.asked]
    assert knobs == sorted(knobs)
    for rung, knob in enumerate(knobs):
        # knobs are float32 where rows carry them
        assert knob == torch.tensor(found.knob_curve.knob(float(cost[rung]))).item()
    assert all(start in range(len(RUNGS)) for start, _ in validation.asked)


def test_the_oracle_meets_its_mean_rank_with_the_least_damage():
    generator = torch.Generator().manual_seed(0)
    damage = torch.rand(6, 4, generator=generator).sort(dim=1, descending=True).values
    damage[:, -1] = 0
    ranks, tokens = torch.tensor([2.0, 4.0, 8.0, 16.0]), torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    rungs = oracle_rungs(damage, tokens, ranks, 8.0)
    mean = float((ranks[rungs] * tokens).sum() / tokens.sum())
    assert mean <= 8.0
    mine = float((damage.gather(1, rungs[:, None])[:, 0] * tokens).sum())
    choices = torch.cartesian_prod(*[torch.arange(4)] * 6)
    means = (ranks[choices] * tokens).sum(1) / tokens.sum()
    totals = (damage[torch.arange(6), choices] * tokens).sum(1)
    # No assignment of at most the mean rank it ended at does better.
    assert mine <= float(totals[means <= mean + 1e-6].min()) + 1e-5

"""The rules of the comparison, on numbers small enough to check by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from policy import FixedPolicy, LatencyTable, Settings
from policy.rungs import rungs_of_rank
from tests.training.made_curves import (
    DOCUMENTS,
    FIXED,
    ORACLE,
    PERCENTILE,
    RUNG_RANK,
    RUNGS,
    curve,
    policies,
    scores,
    verdict,
)
from training import summary
from training.compare.curves import Curve, Point
from training.compare.equal_rank import at_equal_rank
from training.compare.scorer import Scores
from training.compare.verdict import Timing, areas, judge, verdict_rungs


def test_the_fixed_rung_is_never_interpolated():
    """Its KL at its own rank is what was measured, on every resample, even where a dearer rung loses more."""
    noise = np.random.default_rng(0).gamma(2.0, 0.5, DOCUMENTS)
    bumpy = curve("fixed", [(4, 0.8 * noise), (8, 0.3 * noise), (16, 0.4), (24, 0.1)])
    read = at_equal_rank(policies(FIXED_AS_LEARNED, fixed=bumpy), RUNG_RANK, resamples=30, seed=0)
    assert read.kl["fixed"] == pytest.approx([point.scores.value("kl") for point in bumpy.points], rel=1e-12)
    assert read.drawn["fixed"][:, 2] == pytest.approx(np.full(30, 0.4), rel=1e-12)
    assert read.drawn["fixed"][:, 0] == pytest.approx(8 / 3 * read.drawn["fixed"][:, 1], rel=1e-12)


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


def test_a_rung_that_the_learned_policy_does_not_reach_is_left_out():
    found = verdict(curve("learned", [(16, 0.14), (24, 0.07)]))
    assert found.ranks == (16, 24)
    assert all(len(values) == 2 for values in found.kl.values())
    assert found.headroom == pytest.approx((0.1 + 0.05) / 2)
    nowhere = verdict(curve("learned", [(4, 0.05)]))
    assert (nowhere.ranks, nowhere.exported) == ((), "fixed")


REACHED = [(4, 0.5), (8, 0.25), (16, 0.14), (24, 0.07)]


def test_a_rung_that_another_policy_does_not_reach_changes_nothing_of_learned():
    """Percentile thresholds would have won at rung 16; a rung that they miss tells nothing against the learned one."""
    learned = curve("learned", REACHED)
    better = curve("percentile", [(4, 0.8), (8, 0.39), (16, 0.12), (24, 0.1)])
    without = replace(better, points=tuple(point for point in better.points if point.rung != 2))
    assert verdict(learned, better).exported == "fixed"
    whole, found = verdict(learned), verdict(learned, without)
    assert found.exported == "learned"
    assert (found.ranks, found.kl["percentile"]) == ((8, 16, 24), [pytest.approx(0.39), None, pytest.approx(0.1)])
    for name in ("headroom", "captured", "captured_interval", "gain", "gain_interval", "saved"):
        assert getattr(found, name) == getattr(whole, name), name
    assert found.kl["learned"] == whole.kl["learned"]
    assert found.over_fixed.compared["percentile"] is None
    # And one that reaches nothing at all.
    empty = {name: Curve(name, ()) for name in ("percentile", "random")}
    found = verdict(learned, empty["percentile"], random=empty["random"])
    assert (found.exported, found.captured) == ("learned", whole.captured)
    assert found.kl["random"] == [None] * 3


def test_where_the_oracle_misses_a_rung_nothing_is_said_of_a_share():
    short = replace(ORACLE, points=ORACLE.points[2:])
    found = verdict(curve("learned", REACHED), oracle=short)
    assert (found.ranks, found.kl["oracle"][0]) == ((8, 16, 24), None)
    assert found.headroom == pytest.approx((0.1 + 0.05) / 2)
    assert found.captured is found.captured_interval is None
    assert found.gain == pytest.approx((0.15 + 0.06 + 0.03) / 3)


def test_an_oracle_that_loses_has_less_than_no_headroom():
    """Nothing is floored: its tables are of uniform runs, and it may be wrong."""
    worse = curve("oracle", [(4, 0.9), (8, 0.5), (16, 0.3), (24, 0.05)])
    found = verdict(curve("learned", REACHED), oracle=worse)
    assert found.headroom == pytest.approx((-0.1 - 0.1 + 0.05) / 3)
    assert found.headroom_interval == pytest.approx((found.headroom, found.headroom))
    assert found.captured is None
    assert found.exported == "learned"


def few(name: str, points: dict[int, tuple[list[float], list[float]]]) -> Curve:
    """Documents of 10 tokens and rungs 2, 4, 6, 48: per rung aimed at the rung of every document, and its KL."""
    found = []
    for aim, (rung, kl) in points.items():
        tokens = np.full(len(rung), 10.0)
        counts = np.equal.outer(rung, FEW[0]) * 10.0
        found.append(Point(0.0, Scores({"kl": np.array(kl) * 10, "perplexity": tokens}, tokens, counts, counts), aim))
    return Curve(name, tuple(found))


FEW = ([2, 4, 6, 48], np.array([2.0, 4.0, 6.0, 48.0]))


@pytest.mark.parametrize("documents", [1, 2, 8])
def test_a_rung_that_a_curve_reaches_on_average_only_is_read_on_every_resample(documents):
    """Half of the documents at rung 2 and half at 6 spend 4 together, and resamples of them more or less.

    Of every draw the KL is read at rung 4, on what fixed rungs lose from there to the bytes that were spent.
    """
    half = [2 if number % 2 else 6 for number in range(documents)] if documents > 1 else [4]
    fixed = few(
        "fixed", {aim: ([rung] * documents, [2.0 ** (-rung / 2)] * documents) for aim, rung in enumerate(FEW[0][:3])}
    )
    mixed = few("learned", {1: (half, [0.25] * documents), 2: ([6] * documents, [0.125] * documents)})
    curves = {"fixed": fixed, "learned": mixed, "oracle": mixed, "percentile": fixed}
    read = at_equal_rank(curves, FEW[1], resamples=100, seed=0)
    assert np.isnan(read.kl["learned"][0])
    assert read.kl["learned"][1:] == pytest.approx([0.25, 0.125])
    assert read.drawn["learned"].shape == (100, 3)
    assert read.drawn["learned"][:, 2] == pytest.approx(np.full(100, 0.125))
    # A draw of mean rank m loses 0.25, which is what fixed rungs lose at 4; with every two ranks less it would double.
    spent = 4 * (1 - read.saved_drawn["learned"][:, 1])
    assert read.drawn["learned"][:, 1] == pytest.approx(0.25 * 2 ** ((spent - 4) / 2))
    possible = {2 + 4 * number / documents for number in range(documents + 1)} if documents > 1 else {4}
    assert len(possible) / 2 < len({*spent.round(9)} & possible) == len({*spent.round(9)})
    found = judge(curves, *FEW, resamples=100, seed=0)
    assert found.ranks == (4, 6)
    assert found.over_fixed.ratios["learned"][0] is None
    assert found.over_fixed.ratios["learned"][2].interval == pytest.approx((1, 1))


def test_resamples_without_headroom_have_no_share_of_it():
    """One document of eight has all the headroom that there is; a resample in three does not draw it."""
    same = {aim: [rung] * 8 for aim, rung in enumerate(FEW[0][:3])}
    fixed = few("fixed", {0: (same[0], [0.6] * 8), 1: (same[1], [0.4] * 8), 2: (same[2], [0.2] * 8)})

    def better(name, documents, by):
        ends = {2: (same[2], [0.2] * 8)}
        return few(name, {1: (same[1], [0.4 - by * (number < documents) for number in range(8)]), **ends})

    curves = {"fixed": fixed, "percentile": fixed, "learned": better("learned", 1, 0.1)}
    found = judge({**curves, "oracle": better("oracle", 1, 0.2)}, *FEW, resamples=100, seed=0)
    assert (found.headroom, found.captured) == (pytest.approx(0.025 / 2), None), "its interval reaches zero"
    # Four of eight: one resample in 256 draws none of them, too few to reach into the interval.
    curves |= {"learned": better("learned", 4, 0.1), "oracle": better("oracle", 4, 0.2)}
    drawn = at_equal_rank(curves, FEW[1], resamples=1000, seed=0).drawn
    assert (drawn["fixed"][:, 1:] == drawn["oracle"][:, 1:]).all(1).any()
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


def test_where_fixed_rungs_lose_nothing_they_are_exported_whatever_is_gained():
    nearly = curve("fixed", [(4, 8e-7), (8, 4e-7), (16, 2e-7), (24, 1e-7)])
    found = verdict(curve("learned", [(8, 2e-7), (16, 1e-7), (24, 5e-8)]), fixed=nearly, oracle=nearly)
    assert found.gain_interval[0] > 0
    assert (found.saved, found.exported) == (None, "fixed")
    assert found.sentence == "Fixed rungs are exported: they lose nothing that can be measured"


MS = RUNG_RANK / 8
"""Of a step at every rung: an eighth of a millisecond a rank."""


def test_deciding_that_costs_more_time_than_it_saves_exports_fixed_and_says_so():
    """At 8, 16 and 24 it loses what fixed rungs do at 11.3, 19.3 and 26.6: on average those are 0.386 ms dearer."""
    learned = curve("learned", EXACTLY)
    more = np.array([8 * np.log2(4 / 3), 8 * np.log2(4 / 3), 168 * np.log(4 / 3) / np.log(0.1 / 1e-9)])
    for controller_ms, exported in ((0.3, "learned"), (0.5, "fixed")):
        timing = Timing(MS, RUNG_RANK, controller_ms)
        found = judge(policies(learned), RUNGS, RUNG_RANK, resamples=50, seed=0, timing=timing)
        assert found.net_ms == found.describe()["net_ms"] == pytest.approx(more.mean() / 8 - controller_ms)
        assert (found.exported, found.metrics()["exported"]) == (exported, exported)
    assert found.reason == f"deciding costs {-found.net_ms:.3g} ms a step more than it saves on this device"
    assert found.sentence.startswith("Fixed rungs are exported")
    assert found.sentence.endswith(f", but {found.reason}")
    assert found.captured == verdict(learned).captured, "of the headroom in nats it says nothing"
    unresolved = verdict(learned)
    assert (unresolved.net_ms, unresolved.exported) == (None, "learned")
    assert unresolved.describe()["net_ms"] is None


def test_time_is_of_the_steps_that_ran_and_of_the_rungs_between():
    """A run that mixes takes what its rungs take, not what their mean rank would."""
    bent = np.array([1.0, 1.0, 1.0, 2.0, 5.0])
    both = np.tile([0.0, 5.0, 0.0, 5.0, 0.0], (DOCUMENTS, 1))  # half at 8 and half at 24
    mixing = Curve("learned", (Point(0.0, replace(scores(16, 0.12), rungs=both), 2),))
    found = judge(policies(mixing), RUNGS, RUNG_RANK, resamples=5, seed=0, timing=Timing(bent, RUNG_RANK, 0.1))
    needed = 16 + 8 * np.log2(0.2 / 0.12)
    assert 16 < needed < 24
    assert found.net_ms == pytest.approx(np.interp(needed, RUNG_RANK, bent) - 1.5 - 0.1)


def test_a_worse_policy_is_called_worse_whatever_time_it_saves():
    timing = Timing(MS, RUNG_RANK, -100.0)
    worse = curve("learned", [(4, 0.9), (8, 0.5), (16, 0.3), (24, 0.2)])
    found = judge(policies(worse), RUNGS, RUNG_RANK, resamples=5, seed=0, timing=timing)
    assert found.net_ms > 0
    assert found.exported == "fixed"
    assert found.reason.startswith("worse than the fixed rungs")


@pytest.mark.parametrize("resolved", [True, False])
def test_a_device_is_asked_for_its_time_where_its_table_tells_rungs_apart(resolved, monkeypatch):
    measured = []
    monkeypatch.setattr(summary, "measure_controller", lambda model, plan: measured.append((model, plan)) or 0.25)
    learned = curve("learned", EXACTLY)
    ladder = SimpleNamespace(mean_rank=lambda: torch.tensor(RUNGS, dtype=torch.float32))
    context, tasks = SimpleNamespace(model="the model"), [SimpleNamespace(ladder=ladder)]
    calibrated = SimpleNamespace(settings=Settings())
    comparison = SimpleNamespace(curves={"learned": learned}, candidates={"learned": FixedPolicy(RUNGS)})
    table = LatencyTable("here", tuple(MS.tolist()), 0.1, 0.01 if resolved else 100.0)
    found = summary.timing_of(context, tasks, calibrated, comparison, table)
    if not resolved:
        assert (found, measured) == (None, [])
        return
    assert (found.rung_ms.tolist(), found.rung_rank.tolist(), found.controller_ms) == (MS.tolist(), [*RUNGS], 0.25)
    ((model, plan),) = measured
    assert (model, plan.policy) == ("the model", comparison.candidates["learned"])
    assert (plan.operating.knob.item(), plan.operating.start_rung.item()) == (2.0, 2), "a point in the middle"
    nowhere = replace(comparison.curves["learned"], points=())
    comparison.curves["learned"] = nowhere
    assert summary.timing_of(context, tasks, calibrated, comparison, table) is None


def wild(better: float) -> Curve:
    """A learned policy better than the fixed rungs by `better` on average, by documents that differ more than that."""
    noise = np.random.default_rng(1).normal(0, 0.1, DOCUMENTS)
    noise -= noise.mean()
    return curve("learned", [(r, kl * (1 - better + noise)) for r, kl in [(4, 0.8), (8, 0.4), (16, 0.2), (24, 0.1)]])


EXACTLY = [(4, 0.5), (8, 0.3), (16, 0.15), (24, 0.075)]
AT_16 = curve("percentile", [(4, 0.8), (8, 0.39), (16, 0.12), (24, 0.1)])


ONE_NEEDS = "Fixed rungs are exported: the learned policy needs"


@pytest.mark.parametrize(
    ("learned", "percentile", "says"),
    [
        (
            curve("learned", EXACTLY),
            PERCENTILE,
            "The learned policy is exported: it needs 19 % fewer bytes than fixed rungs at equal KL "
            "(95 % interval 19 to 19 %)",
        ),
        (
            wild(-0.123),
            PERCENTILE,
            f"{ONE_NEEDS} 8.1 % more bytes than fixed rungs at equal KL (95 % interval {{low:.2g}} to {{high:.2g}} %)",
        ),
        (
            wild(0.004),
            PERCENTILE,
            f"{ONE_NEEDS} 0.3 % fewer bytes than fixed rungs at equal KL, within chance "
            "(95 % interval {low:.2g} to {high:.2g} %)",
        ),
        (
            replace(FIXED, name="learned"),
            PERCENTILE,
            f"{ONE_NEEDS} as many bytes as fixed rungs at equal KL, within chance (95 % interval 0 to 0 %)",
        ),
        (
            curve("learned", EXACTLY),
            AT_16,
            f"{ONE_NEEDS} 19 % fewer bytes than fixed rungs at equal KL (95 % interval 19 to 19 %), but percentile "
            "thresholds do better at mean rank 16",
        ),
        (
            curve("learned", [(4, 0.05)]),
            PERCENTILE,
            "Fixed rungs are exported: the learned policy reaches no fixed rung",
        ),
    ],
    ids=["better", "worse", "chance", "same", "percentile", "nowhere"],
)
def test_the_sentence_says_what_is_exported_and_how_far_learned_is_from_fixed(learned, percentile, says):
    found = verdict(learned, percentile)
    if found.ranks:
        sign = -1 if " more bytes" in says else 1
        low, high = sorted(sign * 100 * end for end in found.saved.interval)
        says = says.format(low=low, high=high)
    assert found.sentence == found.describe()["verdict"] == says


@pytest.mark.parametrize(
    ("rungs", "compared"),
    [
        (rungs_of_rank(64), [4, 6, 8]),
        (rungs_of_rank(32), [2, 3, 4]),
        (rungs_of_rank(8), [0.5, 0.75, 1]),
        (rungs_of_rank(2), [0.125, 0.1875, 0.25]),
        ((8, 16, 24, 64), [8]),  # nearest to all three
        ((2, 5, 9, 64), [5, 9]),  # 5 to a sixteenth and to three thirty-seconds
        ((4, 8, 64), [4, 8]),  # of two as near the lower one
        ((2, 4, 6, 7), [2]),  # 4 is more than a half
        ((48, 56, 64), [48]),  # no rung below a half
        ((0, 5, 64), [5]),
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
            points.append(Point(float(number), replace(scores(8, kl), rungs=counts), number))
        return Curve(name, tuple(points))

    factors = {"fixed": 1.0, "percentile": 1.1, "learned": 0.9, "random": 1.2, "oracle": 0.5}
    found = judge({n: of_few_ranks(n, f) for n, f in factors.items()}, rungs, rank, resamples=5, seed=0)
    assert found.ranks == (0.25, 0.375, 0.5)
    assert found.kl["learned"] == pytest.approx(0.9 * np.exp([-0.25, -0.375, -0.5]))
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
    # From rank 16 to 192: fixed 0.2 -> 0 and learned 0.1 -> 0, both straight.
    assert areas(curves, RUNG_RANK) == pytest.approx({"fixed": 176 * 0.2 / 2, "learned": 176 * 0.1 / 2})
    curves["learned"] = curve("learned", [(8, 0.3), (16, 0.1)])
    expected = {"fixed": 8 * 0.3 + 176 * 0.1, "learned": 8 * 0.2 + 176 * 0.05}
    # The grid of 101 ranks does not hit rank 16: at a kink of slope change s a step h errs by at most s h^2 / 8.
    assert areas(curves, RUNG_RANK) == pytest.approx(expected, abs=0.025 * 1.84**2 / 8)
    curves["percentile"] = Curve("percentile", ())
    without = areas(curves, RUNG_RANK)
    assert without.pop("percentile") is None, "it reaches nothing, which changes nothing for others"
    assert without == pytest.approx(expected, abs=0.025 * 1.84**2 / 8)

"""The rules of the comparison, on numbers small enough to check by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from policy import FixedPolicy, KnobCurve, PercentilePolicy, Settings
from training.compare.curves import Curve, Point, fixed_curve, policy_curve
from training.compare.hindsight import oracle_rungs
from training.compare.scorer import Scores
from training.compare.verdict import areas, judge, table

RUNGS = (4, 8, 16, 24, 32)
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
    return Curve(name, tuple(Point(float(i), scores(rank, kl)) for i, (rank, kl) in enumerate(points)))


FIXED = curve("fixed", [(4, 0.8), (8, 0.4), (16, 0.2), (24, 0.1)])
ORACLE = curve("oracle", [(4, 0.4), (8, 0.2), (16, 0.1), (24, 0.05)])
RANDOM = curve("random", [(4, 0.9), (8, 0.5), (16, 0.3), (24, 0.2)])
PERCENTILE = curve("percentile", [(4, 0.8), (8, 0.39), (16, 0.21), (24, 0.1)])


def verdict(learned: Curve, percentile: Curve = PERCENTILE, **changes):
    curves = {"fixed": FIXED, "percentile": percentile, "learned": learned, "random": RANDOM, "oracle": ORACLE}
    return judge({**curves, **changes}, RUNGS, RUNG_RANK, resamples=200, seed=0)


def test_a_curve_is_linear_between_its_points_and_the_exact_top_rung():
    line = curve("learned", [(12, 0.3), (8, 0.5), (20, 0.2)])
    assert line.at(8, RUNG_RANK) == pytest.approx(0.5)
    assert line.at(10, RUNG_RANK) == pytest.approx(0.4)
    assert line.at(16, RUNG_RANK) == pytest.approx(0.25)
    assert line.at(26, RUNG_RANK) == pytest.approx(0.1)
    assert line.at(32, RUNG_RANK) == 0
    assert np.isnan(line.at(7.9, RUNG_RANK))


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


def test_small_adapters_are_compared_at_the_rung_below_the_middle():
    points = [(2, 0.8), (4, 0.4), (6, 0.2)]
    rungs, rank = (2, 4, 6, 7), np.array([2.0, 4.0, 6.0, 7.0])

    def small(name):
        def at(r, kl):
            counts = np.zeros((DOCUMENTS, 4))
            counts[:, rungs.index(r)] = 10.0
            return replace(scores(8, kl), rungs=counts)

        return Curve(name, tuple(Point(0.0, at(r, kl)) for r, kl in points))

    names = ("fixed", "percentile", "learned", "random", "oracle")
    assert judge({n: small(n) for n in names}, rungs, rank, resamples=5, seed=0).ranks == (4,)


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
    # From rank 16 to 32: fixed 0.2 -> 0 and learned 0.1 -> 0, both straight.
    assert areas(curves, RUNG_RANK) == pytest.approx({"fixed": 16 * 0.2 / 2, "learned": 16 * 0.1 / 2})
    curves["learned"] = curve("learned", [(8, 0.3), (16, 0.1)])
    expected = {"fixed": 8 * 0.3 + 16 * 0.1, "learned": 8 * 0.2 + 16 * 0.05}
    # The grid of 101 ranks does not hit rank 16: at a kink of slope change s a step h errs by at most s h^2 / 8.
    assert areas(curves, RUNG_RANK) == pytest.approx(expected, abs=2e-3)


def test_the_table_has_one_row_per_point_and_averages_latency_over_active_rungs():
    curves = {"fixed": FIXED, "oracle": Curve("oracle", (Point(None, scores(12, 0.2)),))}
    rows = table(curves, RUNG_RANK, np.array([1.0, 2.0, 4.0, 6.0, 8.0]))
    assert [row["mean_rank"] for row in rows["fixed"]] == pytest.approx([4, 8, 16, 24])
    assert [row["latency_ms"] for row in rows["fixed"]] == pytest.approx([1, 2, 4, 6])
    (row,) = rows["oracle"]
    expected = {"mean_rank": 12, "kl": 0.2, "latency_ms": 3, "prompt_mean_rank": 12, "perplexity": np.exp(2)}
    assert row == pytest.approx(expected)
    assert [row["rung"] for row in rows["fixed"]] == [0, 1, 2, 3]


class Recorder:
    """A bench that notes how it was asked; a knob of k costs rung k."""

    def __init__(self):
        self.asked = []

    def measure(self, policy, settings, operating):
        assert len(operating) == 1
        assert operating.kv.is_full, "the comparison judges rank alone"
        knob = float(operating.knob)
        self.asked.append((int(operating.start_rung), knob))
        return scores(float(np.interp(knob, range(len(RUNGS)), RUNG_RANK)), 0.1)


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

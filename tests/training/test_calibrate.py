"""What is set from data: thresholds, scales, the range of lambda, and the curve from a budget to a knob."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from policy import ChunkSettings, FixedPolicy, LearnedPolicy, Settings, Summary
from tests.training.synthetic import BEST_SCALE, RANKS, RUNGS, SCALES, chunk_samples
from training.compare.scorer import Scores
from training.learn.calibrate import best_scales, calibrate_knob, calibrated_settings, knob_grid, lambda_range
from training.targets.damage import Trajectory

COST = RANKS / RANKS[-1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_knob_curve_ascends_strictly_whatever_was_measured(costs):
    knobs = np.linspace(2.0, -5.0, len(costs))  # log lambda falls from cheap to dear
    curve = calibrate_knob(knobs, costs)
    assert all(a < b for a, b in zip(curve.budgets, curve.budgets[1:], strict=False))
    assert all(a > b for a, b in zip(curve.knobs, curve.knobs[1:], strict=False))
    for budget in np.linspace(0, 1, 7):
        assert -5.0 <= curve.knob(float(budget)) <= 2.0


def test_monotone_measurements_are_kept_as_they_are():
    curve = calibrate_knob([0.0, 1.0, 2.0], [0.1, 0.4, 0.9])
    assert curve.budgets == pytest.approx((0.1, 0.4, 0.9))
    assert curve.knobs == (0.0, 1.0, 2.0)


def test_a_dip_is_levelled_and_equal_costs_are_one_point():
    curve = calibrate_knob([0.0, 1.0, 2.0, 3.0], [0.1, 0.5, 0.3, 0.9])
    assert curve.budgets == pytest.approx((0.1, 0.4, 0.9))
    assert curve.knobs == (0.0, 1.5, 3.0)


def test_mean_cost_weighs_rungs_by_scored_tokens():
    nothing = np.zeros(2)
    rungs, tokens = np.array([[3.0, 1.0], [0.0, 2.0]]), np.array([4.0, 2.0])
    scores = Scores({"kl": nothing}, tokens, rungs, rungs)
    assert scores.mean(np.array([0.2, 1.0])) == pytest.approx((3 * 0.2 + 3 * 1.0) / 6)


def test_knobs_run_evenly_from_cheap_to_dear():
    policy = LearnedPolicy(RUNGS, log_lambda_range=(-4.0, 2.0))
    assert knob_grid(policy, 4) == [2.0, 0.0, -2.0, -4.0]
    assert knob_grid(FixedPolicy(RUNGS), 2) == [0.0, 8.0]


def test_every_rung_gets_the_scale_of_least_mean_damage_and_the_top_keeps_one():
    samples = chunk_samples(torch.maximum, 50, seed=0)
    scales = best_scales(samples.damage, samples.tokens, SCALES)
    assert scales.tolist() == pytest.approx([BEST_SCALE] * 8 + [1.0], abs=2e-3)
    # Two chunks that want different scales: the longer one decides.
    damage = torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    assert best_scales(damage, torch.tensor([9.0, 2.0]), (1.0, 1.2)).tolist() == pytest.approx([1.0, 1.0])
    assert best_scales(damage, torch.tensor([2.0, 9.0]), (1.0, 1.2)).tolist() == pytest.approx([1.2, 1.0])


@pytest.mark.parametrize(("least", "expected"), [(1.01, 1.0), (0.985, 1.0), (1.03, 1.03), (0.95, 0.95)])
def test_a_scale_nearer_to_one_than_it_is_known_is_one(least, expected):
    """To a tenth of the step of 0.2: nearly exact rungs have a KL that the parabola's own error is larger than."""
    damage = ((torch.tensor(SCALES) - least) ** 2).expand(5, 2, len(SCALES)).clone()
    damage[:, 1] = 0
    assert best_scales(damage, torch.ones(5), SCALES).tolist() == pytest.approx([expected, 1.0], abs=2e-3)
    assert best_scales(damage[..., 1:2], torch.ones(5), (1.0,)).tolist() == [1.0, 1.0], "nothing to choose from"


def test_lambda_reaches_from_the_top_rung_to_the_lowest_for_the_average_chunk():
    samples = chunk_samples(lambda entropy, attention: entropy, 200, seed=1)
    low, high = lambda_range(samples.damage[..., 0], samples.tokens, COST)
    mean = (samples.damage[..., 0] * samples.tokens[:, None]).sum(0) / samples.tokens.sum()

    def rung(log_lambda):
        return int((mean + np.exp(log_lambda) * COST).argmin())

    assert rung(low) == len(RANKS) - 1
    assert rung(high) == 0
    assert rung((low + high) / 2) not in (0, len(RANKS) - 1)


def test_damage_that_never_falls_is_refused():
    with pytest.raises(ValueError, match="expected KL to fall with rank"):
        lambda_range(torch.ones(3, len(RANKS)), torch.ones(3), COST)


def test_thresholds_are_terciles_of_complexity_and_pages_split_at_its_median():
    complexity, settings = torch.linspace(0.2, 0.8, 301), Settings(chunk=ChunkSettings(4, 16))
    paths = [Trajectory(torch.tensor([0]), torch.zeros(1, Summary.FEATURES), part) for part in complexity.split(100)]
    found = calibrated_settings(settings, paths)
    assert found.chunk.thresholds == pytest.approx((0.4, 0.6), abs=1e-6)
    assert found.chunk.hysteresis == pytest.approx(0.05, abs=1e-6)
    assert found.kv.threshold == pytest.approx(0.5, abs=1e-6)
    assert (found.chunk.min_tokens, found.kv.hard) == (4, settings.kv.hard)

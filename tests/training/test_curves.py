"""Curves: a policy is asked once per aim, at knobs that others than its documents have set."""

import numpy as np
import pytest
import torch

from policy import FixedPolicy, KnobCurve, PercentilePolicy, Settings
from tests.training.made_curves import DOCUMENTS, RUNG_RANK, RUNGS, scores
from training.compare.curves import CLOSE, fixed_curve, policy_curve, rank_and_kl


def test_a_curve_of_drawn_documents_counts_each_as_often_as_it_is_drawn():
    kl, tokens = np.zeros(DOCUMENTS), np.full(DOCUMENTS, 10.0)
    kl[0], kl[1], tokens[1] = 1.0, 3.0, 30.0
    draws = np.zeros((2, DOCUMENTS))
    draws[0, :2] = 3, 1
    draws[1, 1] = 7
    rank, found = rank_and_kl(scores(9, kl, tokens), RUNG_RANK, draws)
    assert rank == pytest.approx([9, 9])
    assert found == pytest.approx([(3 * 10 * 1.0 + 30 * 3.0) / 60, 3.0])


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
    assert [start for start, _ in test.asked] == [point.rung for point in found.points] == [0, 1, 2, 3]
    knobs = [knob for _, knob in test.asked]
    assert knobs == sorted(knobs)
    for point, (rung, knob) in zip(found.points, test.asked, strict=True):
        # knobs are float32 where rows carry them
        assert knob == torch.tensor(point.knob).item()
        assert (rung, knob) in validation.asked, "the very knob that met its cost there"
        # and what serving reads of the budget spends as much
        served = found.knob_curve.knob(float(cost[rung]))
        assert np.interp(served, range(len(RUNGS)), RUNG_RANK) == pytest.approx(RUNG_RANK[rung], rel=CLOSE)
    assert all(start in range(len(RUNGS)) for start, _ in validation.asked)

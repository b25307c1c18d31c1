"""Planted headroom: where the signals tell the needed rung, the whole fit finds it; where they do not, it says so.

Trained, calibrated, measured and judged by the code that a real fit runs; only the targets are synthetic.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from policy import (
    SIGNALS,
    FixedPolicy,
    LatencyTable,
    LearnedPolicy,
    PercentilePolicy,
    RandomPolicy,
    Settings,
    Summary,
)
from policy.percentile import COMPLEXITY
from runtime.ladder import Adapter, LoraFactors, build_ladder
from tests.training.synthetic import RANKS, RUNGS, SCALES, chunk_samples, shuffled
from tests.training.table_bench import TableBench, TableOracle
from training.amounts import Amounts
from training.compare.curves import Curve, fixed_curve, oracle_curve, policy_curve
from training.compare.verdict import judge
from training.documents import Corpus
from training.learn.calibrate import best_scales
from training.learn.train import new_policy, train_round
from training.targets.samples import Samples
from training.task import AdapterTask, FitContext

FIT = Amounts()
# Of the ladder only the bytes of its rungs matter here: one module of rank 64.
LADDER = build_ladder(Adapter(Path("planted"), None, {"m": LoraFactors(*torch.zeros(2, 64, 64), 1.0)}))
COST = RANKS / RANKS[-1]
RUNG_RANK = RANKS.double().numpy()
AIMS = range(len(RUNGS) - 1)
CHUNKS_PER_DOCUMENT = 15

HARDNESS = {
    # Both signals must be high: either of them alone tells something.
    "product": lambda entropy, attention: entropy * attention,
    # One signal must be far from the other: neither alone, nor their mean, tells anything.
    "difference": lambda entropy, attention: (entropy - attention).abs(),
}


@dataclass(frozen=True)
class Outcome:
    """Curves of one planted case; `percentiles` by signal."""

    curves: dict[str, Curve]
    percentiles: dict[str, Curve]

    def verdict(self, signal: str):
        curves = {**self.curves, "percentile": self.percentiles[signal]}
        return judge(curves, RUNGS, RUNG_RANK, resamples=100, seed=0)


def train(samples: Samples, held_out: Samples, make_trainer, seed: int, folder) -> LearnedPolicy:
    """The pipeline's own stage, given planted samples."""
    saving = functools.partial(make_trainer, enable_checkpointing=True)
    context = FitContext(None, "model", FIT, seed, folder, saving, lambda message: None)
    tasks = [AdapterTask("planted", LADDER, Corpus([], [], []))]
    policy = new_policy(context, tasks, samples)
    train_round(context, tasks, policy, samples, held_out, LatencyTable("none", (1.0,) * len(RANKS), 1.0, 0.0), 0)
    return policy.cpu().eval()


def play(parts: tuple[Samples, Samples, Samples], make_trainer, seed: int, folder) -> Outcome:
    """Train on the first part, set knobs on the second, measure on the third."""
    training = parts[0]
    learned = train(training, parts[1], make_trainer, seed, folder)
    settings = Settings()
    validation, test = (
        TableBench(part, torch.arange(len(part)) // CHUNKS_PER_DOCUMENT, SCALES, RANKS) for part in parts[1:]
    )
    scales = best_scales(training.damage, training.tokens, SCALES)

    def curve(name, policy):
        return policy_curve(name, policy, settings, validation, test, COST.double().numpy(), AIMS)

    summary = Summary.from_features(training.features)
    percentiles = {}
    for signal in (*SIGNALS, COMPLEXITY):
        value, known = PercentilePolicy(RUNGS, signal).value(summary)
        policy = PercentilePolicy.calibrate(value[known], RUNGS, signal, scales=scales)
        percentiles[signal] = curve("percentile", policy)
    curves = {
        "fixed": fixed_curve(FixedPolicy(RUNGS, scales), settings, test),
        "learned": curve("learned", learned),
        "random": curve("random", RandomPolicy(RUNGS, seed=seed, scales=scales)),
        "oracle": oracle_curve(settings, TableOracle(test), RUNG_RANK, AIMS),
    }
    return Outcome(curves, percentiles)


def planted(kind: str, seed: int) -> tuple[Samples, Samples, Samples]:
    train, validation, test = (
        chunk_samples(HARDNESS[kind], count, 10 * seed + i) for i, count in enumerate((1500, 600, 600))
    )
    return train, validation, test


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", HARDNESS)
def test_planted_headroom_is_captured(kind, seed, make_trainer, tmp_path):
    outcome = play(planted(kind, seed), make_trainer, seed, tmp_path)
    for signal in (*SIGNALS, COMPLEXITY):
        verdict = outcome.verdict(signal)
        assert verdict.ranks == (8, 16, 24)
        assert verdict.headroom > 0
        assert verdict.captured >= 0.7
        learned, percentile = verdict.kl["learned"], verdict.kl["percentile"]
        assert all(mine < theirs for mine, theirs in zip(learned, percentile, strict=True)), signal
        assert verdict.exported == "learned", verdict.reason


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", HARDNESS)
def test_shuffled_targets_export_the_fixed_rung(kind, seed, make_trainer, tmp_path):
    parts = tuple(shuffled(part, seed + i) for i, part in enumerate(planted(kind, seed)))
    outcome = play(parts, make_trainer, seed, tmp_path)
    for signal in (*SIGNALS, COMPLEXITY):
        verdict = outcome.verdict(signal)
        assert verdict.exported == "fixed", verdict.reason
        assert "within chance" in verdict.reason or "worse than the fixed rungs" in verdict.reason

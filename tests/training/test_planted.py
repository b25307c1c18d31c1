"""Planted headroom: where the signals tell the needed rung, the whole fit finds it; where they do not, it says so.

Trained, calibrated, measured and judged by the code that a real fit runs; only the targets are synthetic.
"""

from dataclasses import dataclass

import pytest
import torch

from policy import DEFAULT_RUNGS, SIGNALS, FixedPolicy, LearnedPolicy, PercentilePolicy, RandomPolicy, Settings
from policy.percentile import COMPLEXITY
from tests.training.synthetic import RANKS, SCALES, chunk_samples, shuffled
from training.bench import TableBench, summary_of
from training.calibrate import best_scales, lambda_range
from training.compare import VERDICT_RANKS, Curve, fixed_curve, judge, oracle_curve, policy_curve
from training.module import PolicyFit, loader
from training.samples import Samples
from training.settings import FitSettings

FIT = FitSettings()
COST = RANKS / RANKS[-1]
RUNG_RANK = RANKS.double().numpy()
AIMS = range(len(DEFAULT_RUNGS) - 1)
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
        return judge(curves, DEFAULT_RUNGS, RUNG_RANK, resamples=100, seed=0)


def train(samples: Samples, held_out: Samples, make_trainer, seed: int) -> LearnedPolicy:
    """As `pipeline.train_policy` does for one round, at the default settings of a fit."""
    reach = lambda_range(samples.damage.amin(2), samples.tokens, COST)
    torch.manual_seed(seed)
    policy = LearnedPolicy(
        Settings(DEFAULT_RUNGS), hidden=FIT.hidden, scale_range=SCALES[-1] - 1, log_lambda_range=reach, cost=COST
    )
    policy.calibrate(samples.features, samples.damage[..., 0])
    module = PolicyFit(
        policy.train(), SCALES, RANKS, torch.ones(len(RANKS)), learning_rate=FIT.learning_rate, seed=seed
    )
    make_trainer(max_epochs=FIT.epochs).fit(
        module, loader(samples, FIT.batch_chunks, seed=seed), loader(held_out, FIT.batch_chunks)
    )
    return policy.eval()


def play(parts: tuple[Samples, Samples, Samples], make_trainer, seed: int) -> Outcome:
    """Train on the first part, set knobs on the second, measure on the third."""
    training = parts[0]
    learned = train(training, parts[1], make_trainer, seed)
    settings = learned.settings
    validation, test = (
        TableBench(part, torch.arange(len(part)) // CHUNKS_PER_DOCUMENT, SCALES, RANKS) for part in parts[1:]
    )
    scales = best_scales(training.damage, training.tokens, SCALES)

    def curve(name, policy):
        return policy_curve(name, policy, settings, validation, test, COST.double().numpy(), AIMS)

    summary = summary_of(training.features)
    percentiles = {}
    for signal in (*SIGNALS, COMPLEXITY):
        value, known = PercentilePolicy(settings, signal).value(summary)
        policy = PercentilePolicy.calibrate(value[known], settings, signal, scales=scales)
        percentiles[signal] = curve("percentile", policy)
    curves = {
        "fixed": fixed_curve(FixedPolicy(settings, scales), settings, test),
        "learned": curve("learned", learned),
        "random": curve("random", RandomPolicy(settings, seed=seed, scales=scales)),
        "oracle": oracle_curve(settings, test, RUNG_RANK, AIMS),
    }
    return Outcome(curves, percentiles)


def planted(kind: str, seed: int) -> tuple[Samples, Samples, Samples]:
    train, validation, test = (
        chunk_samples(HARDNESS[kind], count, 10 * seed + i) for i, count in enumerate((1500, 600, 600))
    )
    return train, validation, test


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", HARDNESS)
def test_planted_headroom_is_captured(kind, seed, make_trainer):
    outcome = play(planted(kind, seed), make_trainer, seed)
    for signal in (*SIGNALS, COMPLEXITY):
        verdict = outcome.verdict(signal)
        assert verdict.ranks == VERDICT_RANKS
        assert verdict.headroom > 0
        assert verdict.captured >= 0.7
        learned, percentile = verdict.kl["learned"], verdict.kl["percentile"]
        assert all(mine < theirs for mine, theirs in zip(learned, percentile, strict=True)), signal
        assert verdict.exported == "learned", verdict.reason


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", HARDNESS)
def test_shuffled_targets_export_the_fixed_rung(kind, seed, make_trainer):
    parts = tuple(shuffled(part, seed + i) for i, part in enumerate(planted(kind, seed)))
    outcome = play(parts, make_trainer, seed)
    for signal in (*SIGNALS, COMPLEXITY):
        verdict = outcome.verdict(signal)
        assert verdict.exported == "fixed", verdict.reason
        assert "within chance" in verdict.reason or "worse than the fixed rungs" in verdict.reason

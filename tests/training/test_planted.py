"""Planted headroom: where the signals tell the needed rung, the whole fit finds it; where they do not, it says so.

Trained, calibrated, measured and judged by the code that a real fit runs: first on synthetic targets, then the whole of
it, on a model whose adapter does something at some tokens alone.
"""

import functools
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
from policy.difficulty import PAIRS, Difficulty
from policy.percentile import COMPLEXITY
from policy.settings import SIGNAL_SETS
from runtime import load_tokenizer
from runtime.ladder import Adapter, LoraFactors, build_ladder
from tests.training.synthetic import RANKS, RUNGS, SCALES, chunk_samples, shuffled
from tests.training.table_bench import TableBench, TableOracle
from training.amounts import Amounts
from training.compare.curves import Curve, fixed_curve, oracle_curve, policy_curve
from training.compare.hindsight import Oracle
from training.compare.verdict import judge
from training.documents import Corpus
from training.fit import main
from training.learn.calibrate import best_scales
from training.learn.module import DAMAGE, LATENCY
from training.learn.train import Learning, new_policy, train_round
from training.targets import paths
from training.targets.paths import Calibrated
from training.targets.samples import LaterDamage, Samples
from training.targets.token_difficulty import FoldedDifficulty
from training.task import AdapterTask, FitContext, Targets, task_cost

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


def train(
    samples: Samples, held_out: Samples, scales: torch.Tensor, make_trainer, seed: int, folder, objective: str = DAMAGE
) -> LearnedPolicy:
    """The pipeline's own stage, given planted samples."""
    saving = functools.partial(make_trainer, enable_checkpointing=True)
    context = FitContext(None, "model", FIT, seed, folder, saving, lambda message: None)
    difficulty = FoldedDifficulty(Difficulty.neutral(1, PAIRS), (), 0)
    tasks = [AdapterTask("planted", LADDER, Corpus([], [], []), Targets([], {}, difficulty))]
    calibrated = Calibrated(Settings(), scales, LaterDamage((0.0,) * len(RANKS), 0, 0))
    learning = Learning(SIGNAL_SETS["default"], objective)
    policy = new_policy(context, tasks, samples, calibrated, learning, task_cost(tasks))
    latency = LatencyTable("none", (1.0,) * len(RANKS), 1.0, 0.0)
    train_round(context, tasks, policy, samples, held_out, latency, learning, (0, 0))
    return policy.cpu().eval()


def play(parts: tuple[Samples, Samples, Samples], make_trainer, seed: int, folder, objective: str = DAMAGE) -> Outcome:
    """Train on the first part, set knobs on the second, measure on the third."""
    training = parts[0]
    scales = best_scales(training.damage, training.tokens, SCALES)
    learned = train(training, parts[1], scales, make_trainer, seed, folder, objective)
    settings = Settings()
    validation, test = (
        TableBench(part, torch.arange(len(part)) // CHUNKS_PER_DOCUMENT, SCALES, RANKS) for part in parts[1:]
    )

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


NOISE = 0.05
"""The best that signals could tell is then nine tenths of the oracle's headroom, which knows the noise as well."""


def planted(kind: str, seed: int) -> tuple[Samples, Samples, Samples]:
    train, validation, test = (
        chunk_samples(HARDNESS[kind], count, 10 * seed + i, NOISE) for i, count in enumerate((3000, 600, 600))
    )
    return train, validation, test


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kind", "objective"), [*((kind, DAMAGE) for kind in HARDNESS), ("product", LATENCY)])
def test_planted_headroom_is_captured(kind, seed, objective, make_trainer, tmp_path):
    outcome = play(planted(kind, seed), make_trainer, seed, tmp_path, objective)
    for signal in (*SIGNALS, COMPLEXITY):
        verdict = outcome.verdict(signal)
        assert verdict.ranks == (4, 6, 8)
        assert verdict.headroom_interval[0] > 0
        assert verdict.captured >= 0.7
        assert verdict.saved.interval[0] > 0.05
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


OWN = slice(32, 64)
"""Of the hidden state: what the adapter reads. Nothing but the embedding of a hard token writes there."""
RANK = 32
HARD_SHARE = 0.25
LETTERS = "abcdefghijklmnopqrstuvwxyz "


@dataclass(frozen=True)
class Real:
    """Folders of a fit whose headroom is planted in model and adapter, and what it ended with."""

    root: Path
    arguments: list[str]

    def run(self, name: str, **changes) -> dict:
        output = self.root / name
        main([*self.arguments, f"--output={output}", *(f"--{flag}={value}" for flag, value in changes.items())])
        return json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def real(case, tiny_llama_factory, make_peft_adapter, tmp_path_factory) -> Real:
    """A quarter of all tokens are hard: at them every rung loses, and at the others none loses anything.

    The adapter is on the last layer, so that what a token loses it loses alone, and its directions fall by the same
    factor each, so that no mixture of rungs beats a rung unless it knows which tokens are hard.
    """
    root = tmp_path_factory.mktemp("planted")
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(256, 1, generator=generator) < HARD_SHARE
    own = 0.2 * torch.randn(256, RANK, generator=generator)
    read, written = (torch.linalg.qr(torch.randn(n, RANK, generator=generator)).Q for n in (RANK, 160))

    @torch.no_grad()
    def model():
        found = tiny_llama_factory()
        found.model.embed_tokens.weight[:, OWN] = torch.where(hard, own, 0.0)
        for layer in found.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[OWN] = 0
        return found

    model().save_pretrained(root / "model")
    load_tokenizer(case.model).save_pretrained(root / "model")
    options = {"r": RANK, "alpha": RANK, "target_modules": r".*layers\.1\.mlp\.up_proj"}
    weights = make_peft_adapter(model, root / "adapter", **options) / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensor.zero_()[:, OWN] = read
        else:
            tensor.copy_(written * 5.0 * 0.85 ** torch.arange(RANK))
    save_file(tensors, weights, {"format": "pt"})
    source = random.Random(0)
    (root / "text").mkdir()
    for split in ("train", "validation", "test"):
        texts = [" " + "".join(source.choices(LETTERS, k=60)) + "." for _ in range(24)]
        rows = [json.dumps({"prompt": "Say:", "completion": text}) + "\n" for text in texts]
        (root / "text" / f"{split}.jsonl").write_text("".join(rows))
    changes = {
        "model": root / "model", "adapter": root / "adapter", "dataset": root / "text", "ladder": "svd",
        "amounts.train_documents": 24, "amounts.validation_documents": 16, "amounts.test_documents": 16,
        "amounts.epochs": 30, "amounts.bootstrap": 200,
    }  # fmt: skip
    return Real(root, case.arguments(None, **changes))


def test_a_real_fit_captures_headroom_that_is_planted_in_its_model(real, capsys, monkeypatch):
    runs, original = [], Oracle._measure

    def noted(self, *args):
        found = original(self, *args)
        runs.append([scores.value("kl") for scores in found])
        return found

    monkeypatch.setattr(Oracle, "_measure", noted)
    summary = real.run("found")
    assert summary["compared_at"] == [2, 3, 4]
    assert summary["headroom"]["interval_95"][0] > 0
    assert summary["captured"]["share"] >= 0.7
    assert summary["bytes_saved"]["interval_95"][0] > 0.4
    assert summary["exported"] == "learned", summary["reason"]
    assert "percentile: difficulty of the token, sign +1, a band of 2 rungs" in capsys.readouterr().out
    # No token's rung reaches another's: here what tables of uniform runs promise is what a mixed run of the same rungs
    # gives. The curve may have a second run, of other rungs: the prompt's last token reads the rung aimed at, so that
    # the mean is off by a token a document.
    assert summary["oracle_by_table"]["chunks of 1"] == pytest.approx(runs[0], rel=0.002)
    assert {point["kl"] for point in summary["curves"]["oracle"]} <= set(itertools.chain(*runs))
    coarse = summary["oracle_by_table"]["chunks of 4"]
    assert all(own < held for own, held in zip(summary["kl_at"]["learned"], coarse, strict=True)), "a rung a token"


def test_a_real_fit_on_shuffled_targets_exports_the_fixed_rung(real, monkeypatch):
    """Every token has another one's damage; what the oracle knows of test documents is left as it is."""
    original = paths.collect_tables

    def shuffled_tables(*args):
        generator = torch.Generator().manual_seed(0)
        return [table[torch.randperm(len(table), generator=generator)] for table in original(*args)]

    monkeypatch.setattr(paths, "collect_tables", shuffled_tables)
    summary = real.run("shuffled", **{"amounts.probes": 0})
    assert summary["headroom"]["interval_95"][0] > 0, "which nothing could have told"
    assert summary["exported"] == "fixed"
    assert summary["captured"]["interval_95"][0] <= 0.02
    assert summary["captured"]["share"] < 0.05
    assert "within chance" in summary["reason"] or "worse than the fixed rungs" in summary["reason"]

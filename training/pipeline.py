"""One fit, step by step: what `python -m training.fit` does between its arguments and its report.

    documents -> targets (KL of every rung) -> settings from data -> trajectories -> training -> own trajectories ->
    training -> comparison on held-out documents -> verdict

Everything collected lies in resumable shards under the output folder; everything drawn is drawn from the seed, so a run
that was killed ends where the uninterrupted one does.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from transformers import PreTrainedModel

from policy.contract import RankPolicy
from policy.cost import LatencyTable, adapter_cost
from policy.fixed import FixedPolicy
from policy.learned import LearnedPolicy
from policy.percentile import COMPLEXITY, PercentilePolicy
from policy.random import RandomPolicy
from policy.settings import SIGNALS, Settings
from runtime.adaptive import AdaptiveRun, activate
from runtime.ladder import Ladder
from runtime.plan import RunPlan, static_plan

from .bench import Bench, summary_of
from .calibrate import best_scales, calibrated_settings, lambda_range
from .checkpoint_io import SafetensorsCheckpointIO, latest
from .collect import collect_shards
from .command import is_first_process
from .compare import Curve, Progress, fixed_curve, oracle_curve, policy_curve
from .documents import Corpus, Example, make_batch
from .measure import HeldOut, Hindsight
from .module import PolicyFit, loader
from .progress import with_progress
from .samples import LaterDamage, Samples, chunk_samples, measure_later_damage
from .settings import FitSettings
from .shards import ShardStore
from .targets import Trajectory, damage_table, trajectories

TRAJECTORY_DOCUMENTS = 16
"""Documents per shard of trajectories: one row each, where a shard of targets has a row per rung and scale."""


PERCENTILE_SPREADS = (1.0, 2.0)
"""Half-widths, in rungs, of the band that percentile thresholds move in; the better one is the baseline."""


@dataclass(frozen=True)
class FitContext:
    """What every step of a fit works with."""

    model: PreTrainedModel
    ladder: Ladder
    corpus: Corpus
    fit: FitSettings
    seed: int
    root: Path
    """Where shards and checkpoints of the fit go."""
    identity: dict[str, Any]
    """What targets depend on beside documents and settings: fingerprints, dtype."""
    make_trainer: Callable[..., L.Trainer]
    progress: Progress
    device: torch.device

    @property
    def cost(self) -> Tensor:
        """[J] bytes of every rung relative to the top."""
        return adapter_cost(self.ladder.rank_table, self.ladder.row_elements)

    @property
    def rung_rank(self) -> np.ndarray:
        return self.ladder.mean_rank().double().numpy()

    @contextmanager
    def running(self, policy: RankPolicy | None, settings: Settings) -> Iterator[AdaptiveRun]:
        """The model adaptive under `policy` (None: the full rank, with these chunk settings)."""
        if policy is None:
            settings = replace(settings, start_rung=len(settings.rungs) - 1)
            policy = FixedPolicy(settings)
        knob = float(len(settings.rungs) - 1)
        with activate(self.model, RunPlan(self.ladder, policy, settings, knob)) as run:
            yield run

    def collect(
        self,
        name: str,
        examples: Sequence[Example],
        per_shard: int,
        key: dict[str, Any],
        measure: Callable[[Sequence[Example], int], dict[str, list[Tensor]]],
    ) -> dict[str, list[Tensor]]:
        """Resumable per-document tensors: `measure(examples, shard)` gives one list per name."""  # fmt: skip
        groups = [examples[i : i + per_shard] for i in range(0, len(examples), per_shard)]
        documents = hashlib.sha256(json.dumps([e["input_ids"] for e in examples]).encode()).hexdigest()
        full_key = {**self.identity, **key, "documents": documents, "per_shard": per_shard, "seed": self.seed}
        store = ShardStore(self.root / "targets", name, full_key, len(groups))

        def one(index: int) -> dict[str, Tensor]:
            measured = measure(groups[index], index)
            return {f"{field}.{i}": t for field, values in measured.items() for i, t in enumerate(values)}

        made = collect_shards(store, one, self.model, self.make_trainer)
        torch.nn.Module.to(self.model, self.device)  # Lightning leaves it on the CPU
        self.progress(f"{name}: {len(groups) - made} of {len(groups)} shards reused, {made} collected")
        found: dict[str, list[Tensor]] = {}
        for index, group in enumerate(groups):
            tensors = store.read(index)
            for field in {key.rsplit(".", 1)[0] for key in tensors}:
                found.setdefault(field, []).extend(tensors[f"{field}.{i}"] for i in range(len(group)))
        return found


@dataclass(frozen=True)
class Targets:
    """Damage tables of train and validation documents and what was set from them."""

    settings: Settings
    tables: list[Tensor]
    """[T, J, G] per document, train first."""
    scales: Tensor
    """[J] best fixed scale of every rung."""
    later: LaterDamage
    paths: list[Trajectory]
    """Full-rank trajectories under `settings`, in the same order."""


def collect_targets(context: FitContext, settings: Settings) -> Targets:
    """Damage tables, data-set settings, full-rank trajectories and later damage of train and validation documents."""
    examples = [*context.corpus.train, *context.corpus.validation]
    fit, rungs = context.fit, len(settings.rungs)
    grid = torch.tensor(fit.scales).expand(rungs, -1)

    def tables(group: Sequence[Example], shard: int) -> dict[str, list[Tensor]]:
        with activate(context.model, static_plan(context.ladder, settings.rungs[-1])) as run:
            return {"table": damage_table(run, group, grid)}

    found = context.collect("tables", examples, fit.shard_documents, {"scales": fit.scales}, tables)
    paths = collect_paths(context, "trajectory-uncalibrated", None, settings)
    settings = calibrated_settings(settings, paths[: len(context.corpus.train)])
    paths = collect_paths(context, "trajectory-full", None, settings)
    with activate(context.model, static_plan(context.ladder, settings.rungs[-1])) as run:
        train = context.corpus.train
        later = measure_later_damage(run, train, paths[: len(train)], fit, context.seed)
    context.progress(f"later damage: {later.ratio:.3f} nats per nat, from {later.chunks} chunks, {later.tokens} tokens")
    samples = _samples(examples, paths, found["table"], later)
    return Targets(settings, found["table"], best_scales(samples.damage, samples.tokens, fit.scales), later, paths)


def collect_paths(
    context: FitContext,
    name: str,
    policy: LearnedPolicy | None,
    settings: Settings,
    examples: Sequence[Example] | None = None,
) -> list[Trajectory]:
    """Trajectories of `examples` (train and validation) under the full rank, or under `policy` at random lambda."""
    examples = examples if examples is not None else [*context.corpus.train, *context.corpus.validation]
    digest = None if policy is None else _digest(policy.state_dict())

    def paths(group: Sequence[Example], shard: int) -> dict[str, list[Tensor]]:
        knob: Tensor | float = float(len(settings.rungs) - 1)
        if policy is not None:
            generator = torch.Generator().manual_seed(context.seed * 10_007 + shard)
            low, high = policy.log_lambda_range
            knob = (low + (high - low) * torch.rand(len(group), generator=generator)).to(context.model.device)
        with context.running(policy, settings) as run:
            found = trajectories(run, make_batch(group), knob)
        return {field: [getattr(path, field) for path in found] for field in ("starts", "features", "complexity")}

    key = {"settings": settings.to_dict(), "policy": digest}
    columns = context.collect(name, examples, TRAJECTORY_DOCUMENTS, key, paths)
    return [
        Trajectory(*parts) for parts in zip(columns["starts"], columns["features"], columns["complexity"], strict=True)
    ]


def _samples(
    examples: Sequence[Example], paths: Sequence[Trajectory], tables: Sequence[Tensor], later: LaterDamage
) -> Samples:
    rows = zip(examples, paths, tables, strict=True)
    return Samples.concatenate([chunk_samples(example, path, table, later) for example, path, table in rows])


def train_policy(context: FitContext, targets: Targets, latency: LatencyTable) -> LearnedPolicy:
    """Train on full-rank trajectories, then on those of the policy's own, `fit.rounds` times."""
    examples = [*context.corpus.train, *context.corpus.validation]
    split = len(context.corpus.train)
    parts = [_samples(examples[:split], targets.paths[:split], targets.tables[:split], targets.later)]
    held_out = _samples(examples[split:], targets.paths[split:], targets.tables[split:], targets.later)
    first = parts[0]
    unit_scale = context.fit.scales.index(1.0)
    best = first.damage.amin(2)
    policy = _fresh_policy(context, targets, first, best)
    policy.calibrate(first.features, first.damage[..., unit_scale])
    for number in range(context.fit.rounds + 1):
        if number > 0:
            paths = collect_paths(context, f"trajectory-own-{number}", policy, targets.settings)
            parts.append(_samples(examples[:split], paths[:split], targets.tables[:split], targets.later))
        _train_round(context, policy, Samples.concatenate(parts), held_out, latency, number)
    return policy.cpu().eval()


def _fresh_policy(context: FitContext, targets: Targets, samples: Samples, damage: Tensor) -> LearnedPolicy:
    reach = lambda_range(damage, samples.tokens, context.cost)
    widest = max(abs(s - 1.0) for s in context.fit.scales)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        return LearnedPolicy(
            targets.settings, hidden=context.fit.hidden, scale_range=widest, log_lambda_range=reach, cost=context.cost
        )


def _train_round(
    context: FitContext, policy: LearnedPolicy, samples: Samples, held_out: Samples, latency: LatencyTable,
    number: int,
) -> None:  # fmt: skip
    fit = context.fit
    module = PolicyFit(
        policy.train(), fit.scales, context.ladder.mean_rank(), torch.tensor(latency.ms),
        learning_rate=fit.learning_rate, seed=context.seed * 101 + number,
    )  # fmt: skip
    contents = {**policy.state_dict(), "samples.features": samples.features, "samples.damage": samples.damage}
    key = f"{_digest(contents)}-{fit.epochs}-{fit.batch_chunks}-{fit.learning_rate}-{context.seed}"
    folder = context.root / "checkpoints" / f"round-{number}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    resume = latest(folder)
    logger = new_logger(context.root, f"round-{number}", fresh=resume is None)
    keep = ModelCheckpoint(dirpath=folder, filename="last", save_top_k=1, enable_version_counter=False)
    keep.FILE_EXTENSION = ""
    trainer = context.make_trainer(
        callbacks=[keep], logger=logger, max_epochs=fit.epochs, log_every_n_steps=1, plugins=[SafetensorsCheckpointIO()]
    )
    context.progress(f"training round {number}: {len(samples)} chunks, {'resumed' if resume else 'from the start'}")
    chunks = loader(samples, fit.batch_chunks, seed=context.seed)
    trainer.fit(module, chunks, loader(held_out, fit.batch_chunks), ckpt_path=resume)


def new_logger(root: Path, name: str, *, fresh: bool) -> TensorBoardLogger:
    """TensorBoard events in `root/name`; `fresh` removes those of an earlier run, whose lines would lie over these."""
    if fresh and is_first_process():
        for old in (root / name).glob("events.out.tfevents.*"):
            old.unlink()
    return TensorBoardLogger(root, name=name, version="", default_hp_metric=False)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hold back advice of Lightning that does not apply: it is given about data loaders and folders we chose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        yield


def percentile_policy(context: FitContext, targets: Targets, validation: Bench) -> PercentilePolicy:
    """The best signal (or all together) and band, by KL on validation documents with the knob at the middle rung."""
    summary = summary_of(torch.cat([path.features for path in targets.paths[: len(context.corpus.train)]]))
    candidates = []
    for signal in (*SIGNALS, COMPLEXITY):
        value, known = PercentilePolicy(targets.settings, signal).value(summary)
        for spread in PERCENTILE_SPREADS:
            candidate = PercentilePolicy.calibrate(value[known], targets.settings, signal, targets.scales, spread)
            candidates.append(candidate)
    middle = (len(targets.settings.rungs) - 1) // 2
    settings = replace(targets.settings, start_rung=middle)
    kls = []
    for candidate in with_progress(candidates, "percentile signals", len(candidates)):
        scores = validation.measure(candidate, settings, float(middle))
        fixed_rank = scores.mean_rank(context.rung_rank)
        # Candidates land at slightly different mean ranks; a KL that falls like 1/rank makes them comparable.
        kls.append(scores.mean_kl() * fixed_rank)
    best = candidates[int(np.argmin(kls))]
    context.progress(f"percentile: {best.signal} with a band of {best.spread:g} rungs is the best of {len(kls)}")
    return best


def compare_policies(
    context: FitContext, targets: Targets, learned: LearnedPolicy
) -> tuple[dict[str, Curve], FixedPolicy]:
    """Measure every policy on test documents; see `compare` for the rules."""
    settings, rungs = targets.settings, len(targets.settings.rungs)

    def tables(group: Sequence[Example], shard: int) -> dict[str, list[Tensor]]:
        with activate(context.model, static_plan(context.ladder, settings.rungs[-1])) as run:
            return {"table": damage_table(run, group, targets.scales[:, None])}

    key = {"scales": targets.scales.tolist()}
    per_shard = context.fit.shard_documents * len(context.fit.scales)
    found = context.collect("tables-test", context.corpus.test, per_shard, key, tables)
    paths = collect_paths(context, "trajectory-test", None, settings, context.corpus.test)
    hindsight = [
        Hindsight(path.starts, chunks.damage[..., 0], chunks.scored)
        for path, chunks in (
            (path, chunk_samples(example, path, table, targets.later))
            for example, path, table in zip(context.corpus.test, paths, found["table"], strict=True)
        )
    ]
    validation = HeldOut(context.model, context.ladder, context.corpus.validation)
    test = HeldOut(context.model, context.ladder, context.corpus.test).with_hindsight(hindsight, targets.scales)
    aims = range(rungs - 1)
    cost = context.cost.double().numpy()
    fixed = FixedPolicy(settings, targets.scales)
    percentile = percentile_policy(context, targets, validation)
    blind = RandomPolicy(settings, seed=context.seed, scales=targets.scales)
    curves = {"fixed": fixed_curve(fixed, settings, test)}
    context.progress("measured fixed")
    for name, policy in (("percentile", percentile), ("learned", learned), ("random", blind)):
        curves[name] = policy_curve(name, policy, settings, validation, test, cost, aims)
        context.progress(f"measured {name}")
    curves["oracle"] = oracle_curve(settings, test, context.rung_rank, aims)
    context.progress("measured oracle")
    return curves, fixed


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def describe_targets(targets: Targets) -> dict[str, Any]:
    """For the summary."""
    return {
        "later_damage": asdict(targets.later),
        "scales": [round(float(s), 4) for s in targets.scales],
        "settings": targets.settings.to_dict(),
    }

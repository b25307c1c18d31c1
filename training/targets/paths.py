"""The first stage of a fit: tables and trajectories of every task, and what is set from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from policy.difficulty import Difficulty
from policy.operating import Operating
from policy.settings import Settings
from runtime.control.record import Keep
from runtime.plan import RunPlan
from runtime.reference.adaptive import AdaptiveRun, activate

from ..amounts import AROUND_ONE
from ..documents import Batch, Example, make_batch, positions_within
from ..learn.calibrate import best_scales, calibrated_settings
from ..task import AdapterTask, FitContext, Targets, common_rungs, full_rank_plan, scale_grid
from .damage import LOGITS_BYTES, Trajectory, damage_table, trajectories
from .samples import LaterDamage, Samples, document_samples, measure_later_damage
from .shards import tensors_digest
from .token_difficulty import FoldedDifficulty, fit_difficulty

TRAJECTORY_DOCUMENTS = 48
"""Documents per shard of trajectories: one row each, where a shard of targets has a row per rung and scale."""

PARTS_APART = 1_000_003
"""Between the seeds of two documents of a shard, of which there are fewer shards than this."""

OperatingFor = Callable[[int, int], Operating]
"""(rows, shard) -> what the rows of a shard's batch may spend."""
Measure = Callable[[AdaptiveRun, Batch, Operating, Difficulty | None, int], list[Trajectory]]
"""(run, batch, what its rows may spend, token difficulty of every row, seed) -> their trajectories."""


@dataclass(frozen=True)
class Calibrated:
    """What was set from the train documents of all tasks."""

    settings: Settings
    """With complexity classes and the KV threshold."""
    scales: Tensor
    """[J] best fixed scale of every rung."""
    later: LaterDamage

    def describe(self) -> dict[str, Any]:
        """For the summary."""
        return {
            "later_damage": asdict(self.later),
            "scales": [round(float(s), 4) for s in self.scales],
            "settings": self.settings.to_dict(),
        }


def collect_targets(
    context: FitContext, tasks: Sequence[AdapterTask], settings: Settings
) -> tuple[list[AdapterTask], Calibrated]:
    """The tasks with tables and full-rank trajectories of their train and validation documents, and what follows.

    Settings, scales, token difficulty and later damage are set from train documents alone. Trajectories are those of
    both ways to process a text: token by token, as decode does, and in the blocks of prefill.
    """
    common_rungs(tasks)
    # A saved ladder knows what an earlier fit learned of tokens; this one learns it anew.
    tasks = [replace(task, ladder=replace(task.ladder, difficulty=None)) for task in tasks]
    scales = scale_grid(context.amounts, tasks)
    grids = [torch.tensor(scales).expand(len(task.ladder.rungs), -1) for task in tasks]
    tables = [
        collect_tables(context, task, "tables", task.labelled, grid) for task, grid in zip(tasks, grids, strict=True)
    ]
    first = [full_rank_paths(context, task, "trajectory-uncalibrated", task.corpus.train, settings) for task in tasks]
    settings = calibrated_settings(settings, [path for own in first for path in own])
    with_targets = [_with_targets(context, task, own, settings) for task, own in zip(tasks, tables, strict=True)]
    later = _later_damage(context, with_targets)
    training = Samples.concatenate([part for task in with_targets for part in _train_samples(task, later)])
    return with_targets, Calibrated(settings, best_scales(training.damage, training.tokens, scales), later)


def _with_targets(context: FitContext, task: AdapterTask, tables: list[Tensor], settings: Settings) -> AdapterTask:
    train = task.corpus.train
    vocabulary = context.model.config.get_text_config(decoder=True).vocab_size
    difficulty = fit_difficulty(train, tables[: len(train)], task.ladder.rungs, vocabulary)
    task = replace(task, ladder=replace(task.ladder, difficulty=difficulty.whole))
    paths = {
        own.block_tokens: full_rank_paths(
            context, task, f"trajectory-full-{own.block_tokens}", task.labelled, own, difficulty
        )
        for own in judged_blocks(settings)
    }
    return replace(task, targets=Targets(tables, paths, difficulty))


def judged_blocks(settings: Settings) -> list[Settings]:
    """Settings of decode, a block of one token, and of the prefill that is asked for."""
    return [replace(settings, block_tokens=tokens) for tokens in sorted({1, settings.block_tokens})]


def _train_samples(task: AdapterTask, later: LaterDamage) -> list[Samples]:
    train, found = task.corpus.train, task.found()
    return document_samples(train, found.paths[1][: len(train)], found.tables[: len(train)], later)


def _later_damage(context: FitContext, tasks: Sequence[AdapterTask]) -> LaterDamage:
    found = []
    for task in tasks:
        train = task.corpus.train
        with context.full_rank(task) as run:
            paths = task.found().paths[1][: len(train)]
            found.append(measure_later_damage(run, train, paths, context.amounts, context.seed))
    later = LaterDamage.mean(found)
    worst = max(later.nats, default=0.0)
    context.say(f"later damage: at most {worst:.2g} nats a token, from {later.chunks} chunks, {later.tokens} tokens")
    return later


def collect_tables(
    context: FitContext, task: AdapterTask, name: str, examples: Sequence[Example], grid: Tensor
) -> list[Tensor]:
    """[T, J, G] per document: KL of every rung at the scales grid [J, G]."""

    def tables(group: Sequence[Example], shard: int) -> dict[str, list[Tensor]]:
        with context.full_rank(task) as run:
            return {"table": damage_table(run, group, grid)}

    # A shard is a row per rung and scale: of fewer scales it has more documents.
    per_shard = max(1, context.amounts.shard_documents * len(AROUND_ONE) // grid.shape[1])
    return context.collect(task, name, examples, per_shard, {"scales": grid.tolist()}, tables)["table"]


def full_rank_paths(
    context: FitContext, task: AdapterTask, name: str, examples: Sequence[Example], settings: Settings,
    difficulty: FoldedDifficulty | None = None,
) -> list[Trajectory]:  # fmt: skip
    """Trajectories of the exact adapter."""
    plan = full_rank_plan(task, settings)
    return collect_paths(
        context, task, name, plan, examples, {"policy": None}, lambda rows, shard: plan.operating, difficulty=difficulty
    )


def _as_decided(
    run: AdaptiveRun, batch: Batch, operating: Operating, difficulty: Difficulty | None, seed: int
) -> list[Trajectory]:
    return trajectories(run, batch, operating, difficulty)


def collect_paths(
    context: FitContext, task: AdapterTask, name: str, plan: RunPlan, examples: Sequence[Example],
    key: dict[str, object], operating: OperatingFor, measure: Measure = _as_decided,
    difficulty: FoldedDifficulty | None = None,
) -> list[Trajectory]:  # fmt: skip
    """Trajectories of `examples` under a plan's policy; `key` names what they depend on beside its settings.

    With `difficulty`, whose documents they are, each sees the tables that it may see; else those of its ladder.
    """

    def paths(group: Sequence[Example], shard: int) -> dict[str, list[Tensor]]:
        first = shard * TRAJECTORY_DOCUMENTS
        tables = None
        if difficulty is not None:
            tables = difficulty.rows(range(first, first + len(group))).to(context.model.device)
        with activate(context.model, plan, keep=Keep.DECISIONS, hidden=context.hidden) as run:
            spent = operating(len(group), shard).for_rows(len(group))
            rows = max(1, positions_within(run.model, LOGITS_BYTES) // max(len(own["input_ids"]) for own in group))
            found: list[Trajectory] = []
            for part in torch.arange(len(group)).split(rows):
                own = None if tables is None else tables.select(part)
                some = make_batch([group[row] for row in part.tolist()])
                found += measure(run, some, spent.select(part), own, shard + PARTS_APART * int(part[0]))
        columns = {field: [getattr(path, field) for path in found] for field in ("starts", "features", "complexity")}
        columns["log_lambda"] = [torch.tensor(path.log_lambda) for path in found]
        damage = [path.damage for path in found if path.damage is not None]
        return {**columns, "damage": damage} if damage else columns

    tables = () if difficulty is None else (difficulty.whole, *difficulty.folds)
    prints = [tensors_digest({"token": own.token, "pair": own.pair}) for own in tables]
    full_key = {"settings": plan.settings.to_dict(), "difficulty": prints, "hidden": context.hidden, **key}
    columns = context.collect(task, name, examples, TRAJECTORY_DOCUMENTS, full_key, paths)
    knobs = [float(own) for own in columns["log_lambda"]]
    parts = (columns["starts"], columns["features"], columns["complexity"], knobs)
    damage: list[Tensor | None] = [*columns.get("damage", [None] * len(examples))]
    return [Trajectory(*own) for own in zip(*parts, damage, strict=True)]

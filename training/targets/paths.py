"""The first stage of a fit: tables and trajectories of every task, and what is set from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from policy.operating import Operating
from policy.settings import Settings
from runtime.control.record import Keep
from runtime.plan import RunPlan
from runtime.reference.adaptive import activate

from ..amounts import AROUND_ONE
from ..documents import Example, make_batch
from ..learn.calibrate import best_scales, calibrated_settings
from ..task import AdapterTask, FitContext, Targets, common_rungs, full_rank_plan, scale_grid
from .damage import Trajectory, damage_table, trajectories
from .samples import LaterDamage, Samples, document_samples, measure_later_damage

TRAJECTORY_DOCUMENTS = 16
"""Documents per shard of trajectories: one row each, where a shard of targets has a row per rung and scale."""

OperatingFor = Callable[[int, int], Operating]
"""(rows, shard) -> what the rows of a shard's batch may spend."""


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

    Settings, scales and later damage are set from train documents alone.
    """
    common_rungs(tasks)
    scales = scale_grid(context.amounts, tasks)
    grids = [torch.tensor(scales).expand(len(task.ladder.rungs), -1) for task in tasks]
    tables = [
        collect_tables(context, task, "tables", task.labelled, grid) for task, grid in zip(tasks, grids, strict=True)
    ]
    first = [full_rank_paths(context, task, "trajectory-uncalibrated", task.corpus.train, settings) for task in tasks]
    settings = calibrated_settings(settings, [path for own in first for path in own])
    paths = [full_rank_paths(context, task, "trajectory-full", task.labelled, settings) for task in tasks]
    targets = [Targets(*both) for both in zip(tables, paths, strict=True)]
    with_targets = [replace(task, targets=own) for task, own in zip(tasks, targets, strict=True)]
    later = _later_damage(context, with_targets)
    training = Samples.concatenate([part for task in with_targets for part in _train_samples(task, later)])
    return with_targets, Calibrated(settings, best_scales(training.damage, training.tokens, scales), later)


def _train_samples(task: AdapterTask, later: LaterDamage) -> list[Samples]:
    train, found = task.corpus.train, task.found()
    return document_samples(train, found.paths[: len(train)], found.tables[: len(train)], later)


def _later_damage(context: FitContext, tasks: Sequence[AdapterTask]) -> LaterDamage:
    found = []
    for task in tasks:
        train = task.corpus.train
        with context.full_rank(task) as run:
            paths = task.found().paths[: len(train)]
            found.append(measure_later_damage(run, train, paths, context.amounts, context.seed))
    later = LaterDamage.mean(found)
    context.say(f"later damage: {later.ratio:.3f} nats per nat, from {later.chunks} chunks, {later.tokens} tokens")
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
    context: FitContext, task: AdapterTask, name: str, examples: Sequence[Example], settings: Settings
) -> list[Trajectory]:
    """Trajectories of the exact adapter."""
    plan = full_rank_plan(task, settings)
    return collect_paths(context, task, name, plan, examples, {"policy": None}, lambda rows, shard: plan.operating)


def collect_paths(
    context: FitContext, task: AdapterTask, name: str, plan: RunPlan, examples: Sequence[Example],
    key: dict[str, object], operating: OperatingFor,
) -> list[Trajectory]:  # fmt: skip
    """Trajectories of `examples` under a plan's policy; `key` names what they depend on beside its settings."""

    def paths(group: Sequence[Example], shard: int) -> dict[str, list[Tensor]]:
        with activate(context.model, plan, keep=Keep.DECISIONS) as run:
            found = trajectories(run, make_batch(group), operating(len(group), shard))
        return {field: [getattr(path, field) for path in found] for field in ("starts", "features", "complexity")}

    full_key = {"settings": plan.settings.to_dict(), **key}
    columns = context.collect(task, name, examples, TRAJECTORY_DOCUMENTS, full_key, paths)
    parts = zip(columns["starts"], columns["features"], columns["complexity"], strict=True)
    return [Trajectory(*columns) for columns in parts]

"""What a fit works on: one adapter with its documents, its ladder and its targets; a fit has one task or several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.cost import adapter_cost
from policy.fixed import FixedPolicy
from policy.operating import Operating
from policy.rungs import Rung, same_shares
from policy.settings import Settings
from runtime.ladder import Adapter, Ladder
from runtime.plan import RunPlan, static_plan
from runtime.reference.adaptive import AdaptiveRun, activate

from .amounts import AROUND_ONE, Amounts
from .documents import Corpus, Example
from .targets.collect import collect_shards
from .targets.damage import Trajectory
from .targets.shards import ShardStore
from .targets.token_difficulty import FoldedDifficulty

Say = Callable[[str], None]
MakeTrainer = Callable[..., L.Trainer]


@dataclass(frozen=True)
class Targets:
    """Of every train and validation document, train first."""

    tables: list[Tensor]
    """[T, J, G] KL of every rung and scale."""
    paths: dict[int, list[Trajectory]]
    """Full-rank trajectories, by the tokens of a block."""
    difficulty: FoldedDifficulty
    """What the train documents say of every token."""


@dataclass(frozen=True)
class OpenTask:
    """One adapter as it was read, or a ladder that was saved, and its documents."""

    name: str
    source: Adapter | Ladder
    corpus: Corpus


@dataclass(frozen=True)
class AdapterTask:
    """One adapter: its ladder, its documents and, once collected, its targets."""

    name: str
    ladder: Ladder
    corpus: Corpus
    targets: Targets | None = None

    @property
    def labelled(self) -> list[Example]:
        """Train and validation documents, in the order of the targets."""
        return [*self.corpus.train, *self.corpus.validation]

    def found(self) -> Targets:
        """Its targets, which an earlier stage collected."""
        assert self.targets is not None, "collect_targets comes first"
        return self.targets


@dataclass(frozen=True)
class FitContext:
    """What every stage of a fit works with."""

    model: PreTrainedModel
    model_fingerprint: str
    amounts: Amounts
    seed: int
    root: Path
    """Where shards and checkpoints go."""
    make_trainer: MakeTrainer
    say: Say
    hidden: bool = False
    """Whether trajectories tell of the model's states."""

    @contextmanager
    def full_rank(self, task: AdapterTask) -> Iterator[AdaptiveRun]:
        """The model at the task's exact adapter, whose ladder has all its rungs."""
        with activate(self.model, static_plan(task.ladder, task.ladder.rungs[-1])) as run:
            yield run

    def collect(
        self,
        task: AdapterTask,
        name: str,
        examples: Sequence[Example],
        per_shard: int,
        key: dict[str, object],
        measure: Callable[[Sequence[Example], int], dict[str, list[Tensor]]],
    ) -> dict[str, list[Tensor]]:
        """Resumable per-document tensors: `measure(examples, shard)` gives one list per name.

        Document i is in shard i // per_shard.
        """
        groups = [examples[i : i + per_shard] for i in range(0, len(examples), per_shard)]
        own = {**key, "documents": documents_digest(examples), "per_shard": per_shard, "seed": self.seed}
        full_key = {**self.identity(task), **own}
        store = ShardStore(self.root / "targets", name, full_key, len(groups))

        def one(index: int) -> dict[str, Tensor]:
            measured = measure(groups[index], index)
            return {f"{field}.{i}": t for field, values in measured.items() for i, t in enumerate(values)}

        made = collect_shards(store, one, self.model, self.make_trainer, name)
        self.say(f"{name}: {len(groups) - made} of {len(groups)} shards reused, {made} collected")
        found: dict[str, list[Tensor]] = {}
        for index, group in enumerate(groups):
            tensors = store.read(index)
            for field in {key.rsplit(".", 1)[0] for key in tensors}:
                found.setdefault(field, []).extend(tensors[f"{field}.{i}"] for i in range(len(group)))
        return found

    def identity(self, task: AdapterTask) -> dict[str, object]:
        """What targets depend on beside documents and settings."""
        ladder = task.ladder
        prints = {"model": self.model_fingerprint, "adapter": ladder.adapter, "ladder": ladder.fingerprint}
        return {**prints, "dtype": str(self.model.dtype), "rungs": list(ladder.rungs), "kind": ladder.kind}


def scale_grid(amounts: Amounts, tasks: Sequence[AdapterTask]) -> tuple[float, ...]:
    """The scales that every rung is measured at, and among which a policy may choose.

    Rungs that were calibrated when the ladder was built are best as they are, on every chunk: a policy that may scale
    them as well does worse on other text.
    """
    if amounts.scales is not None:
        return amounts.scales
    calibrated = all(any(scale != 1 for scale in task.ladder.scales) for task in tasks)
    return (1.0,) if calibrated else AROUND_ONE


def ladder_folder(root: Path, number: int, tasks: int) -> Path:
    """Where the ladder of this task of so many lies in the output folder."""
    return root / ("ladder" if tasks == 1 else f"ladder-{number}")


def documents_digest(examples: Sequence[Example]) -> str:
    """64 hex digits over the tokens of these documents, in order."""
    return hashlib.sha256(json.dumps([example["input_ids"] for example in examples]).encode()).hexdigest()


def full_rank_plan(task: AdapterTask, settings: Settings) -> RunPlan:
    """The exact adapter throughout, with the chunks, blocks and signals of `settings`."""
    top = len(task.ladder.rungs) - 1
    return RunPlan((task.ladder,), FixedPolicy(task.ladder.rungs), settings, Operating.at(float(top), top))


def common_rungs(tasks: Sequence[AdapterTask]) -> tuple[Rung, ...]:
    """The rungs that one policy moves on: those of the first task, of which all others have the same shares.

    Raises ValueError when one has others, or when there are fewer than two to choose between.
    """
    rungs = tasks[0].ladder.rungs
    for task in tasks:
        if not same_shares(task.ladder.rungs, rungs):
            raise ValueError(
                f"rungs: expected the same shares of every adapter's rank, got {rungs} and {task.ladder.rungs}; name "
                "rungs that are"
            )
    return choosable(rungs)


def choosable(rungs: tuple[Rung, ...]) -> tuple[Rung, ...]:
    """These rungs. Raises ValueError when there are fewer than two to choose between."""
    if len(rungs) < 2:
        raise ValueError(f"rungs: expected at least two to choose between, got {list(rungs)}; add lower ones")
    return rungs


def task_cost(tasks: Sequence[AdapterTask]) -> Tensor:
    """[J] bytes of every rung relative to the top, averaged over the tasks."""
    return torch.stack([adapter_cost(task.ladder.rung_bytes()) for task in tasks]).mean(0)


def task_rank(tasks: Sequence[AdapterTask]) -> Tensor:
    """[J] equivalent rank of every rung: see `common_rank`."""
    return common_rank([task.ladder for task in tasks])


def rung_rank(tasks: Sequence[AdapterTask]) -> np.ndarray:
    """`task_rank` in float64."""
    return task_rank(tasks).double().numpy()


def common_rank(ladders: Sequence[Ladder]) -> Tensor:
    """[J] equivalent rank of every rung: one ladder's own, of several the mean share of the first one's top."""
    if len(ladders) == 1:
        return ladders[0].mean_rank()
    ranks = torch.stack([ladder.mean_rank() / ladder.mean_rank()[-1] for ladder in ladders])
    return ranks.mean(0) * ladders[0].mean_rank()[-1]

"""The rounds of training: on full-rank trajectories, then on those of the policy's own, as they will be served."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from policy.contract import Summary
from policy.cost import LatencyTable
from policy.difficulty import Difficulty
from policy.learned import LearnedPolicy
from policy.operating import Operating
from policy.settings import HIDDEN
from runtime.plan import RunPlan
from runtime.reference.adaptive import AdaptiveRun

from ..console import is_first_process
from ..documents import Batch
from ..progress import BatchBar
from ..targets.context import measured_paths
from ..targets.damage import Trajectory, trajectories
from ..targets.paths import Calibrated, collect_paths, judged_blocks
from ..targets.samples import Samples, document_samples
from ..targets.shards import tensors_digest
from ..task import AdapterTask, FitContext, common_rungs, scale_grid, task_cost, task_rank
from .calibrate import lambda_range
from .checkpoint_io import SafetensorsCheckpointIO, latest
from .module import DAMAGE, LATENCY, PolicyFit, loader


@dataclass(frozen=True)
class Learning:
    """What is to be learned, and how."""

    signals: tuple[str, ...]
    """What the policy looks at."""
    objective: str
    """One of `OBJECTIVES`."""


def train_policies(
    context: FitContext, tasks: Sequence[AdapterTask], calibrated: Calibrated, latency: LatencyTable, learning: Learning
) -> list[LearnedPolicy]:
    """`amounts.seeds` policies, each from its own seed through all rounds."""
    return [
        train_policy(context, tasks, calibrated, latency, learning, number) for number in range(context.amounts.seeds)
    ]


def train_policy(
    context: FitContext, tasks: Sequence[AdapterTask], calibrated: Calibrated, latency: LatencyTable,
    learning: Learning, number: int = 0,
) -> LearnedPolicy:  # fmt: skip
    """Train policy `number` on the train documents of all tasks, then on own trajectories through them,
    `amounts.rounds` times; validation documents say when to stop."""
    blocks = [own.block_tokens for own in judged_blocks(calibrated.settings)]
    first = [
        split_samples(tasks, [dict(enumerate(task.found().paths[block])) for task in tasks], calibrated)
        for block in blocks
    ]
    training, held_out = ([part[which] for part in first] for which in (0, 1))
    price, rung_bytes = penalty(tasks, latency, learning), task_cost(tasks)
    policy = new_policy(context, tasks, Samples.concatenate(training), calibrated, learning, price, number)
    served = first[blocks.index(1)][0]
    for round_number in range(context.amounts.rounds + 1):
        if round_number > 0:
            paths = [
                own_paths(context, task, policy, calibrated, served, rung_bytes, learning, (number, round_number))
                for task in tasks
            ]
            for parts, more in zip((training, held_out), split_samples(tasks, paths, calibrated), strict=True):
                parts.append(more)
        samples, unseen = Samples.concatenate(training), Samples.concatenate(held_out)
        train_round(context, tasks, policy, samples, unseen, latency, learning, (number, round_number))
    return policy.cpu().eval()


def split_samples(
    tasks: Sequence[AdapterTask], paths: Sequence[Mapping[int, Trajectory]], calibrated: Calibrated
) -> tuple[Samples, Samples]:
    """Chunks of the train and of the validation documents of all tasks; `paths` per task, by the number of the labelled
    document."""
    train: list[Samples] = []
    validation: list[Samples] = []
    for task, own in zip(tasks, paths, strict=True):
        tables, split = task.found().tables, len(task.corpus.train)
        for part, numbers in ((train, [i for i in own if i < split]), (validation, [i for i in own if i >= split])):
            documents, found = [task.labelled[i] for i in numbers], [tables[i] for i in numbers]
            part += document_samples(documents, [own[i] for i in numbers], found, calibrated.later)
    return Samples.concatenate(train), Samples.concatenate(validation)


def member_seed(context: FitContext, number: int) -> int:
    """The seed of policy `number`."""
    return context.seed + 7_919 * number


def penalty(tasks: Sequence[AdapterTask], latency: LatencyTable, learning: Learning) -> Tensor:
    """[J] what lambda is a price of, 1 at the top: with the objective `latency` the share of the milliseconds that the
    adapter adds, where the engine was measured and its table tells the rungs apart; else the share of its bytes."""
    if learning.objective == LATENCY and latency.of_engine and latency.resolved:
        return torch.tensor(latency.cost())
    return task_cost(tasks)


def new_policy(
    context: FitContext, tasks: Sequence[AdapterTask], samples: Samples, calibrated: Calibrated, learning: Learning,
    cost: Tensor, number: int = 0,
) -> LearnedPolicy:  # fmt: skip
    """An untrained policy of rungs at these costs [J], whose normalisers and range of lambda are those of the training
    samples, with the mean token difficulty of the tasks for whoever has none."""
    amounts, scales = context.amounts, scale_grid(context.amounts, tasks)
    reach = lambda_range(samples.damage.amin(2), samples.tokens, cost)
    widest = max(abs(scale - 1.0) for scale in scales)
    difficulty = Difficulty.mean([task.found().difficulty.whole for task in tasks])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(member_seed(context, number))
        policy = LearnedPolicy(
            common_rungs(tasks), hidden=amounts.hidden, scale_range=widest, log_lambda_range=reach, cost=cost,
            signals=learning.signals, vocabulary=len(difficulty.token),
            width=(samples.features.shape[1] - Summary.FEATURES) // 2 if HIDDEN in learning.signals else 0,
        )  # fmt: skip
    policy.calibrate(samples.features, samples.damage[..., scales.index(1.0)])
    policy.set_scales(calibrated.scales)
    policy.set_difficulty(difficulty)
    return policy


def own_paths(
    context: FitContext, task: AdapterTask, policy: LearnedPolicy, calibrated: Calibrated, samples: Samples,
    rung_bytes: Tensor, learning: Learning, number: tuple[int, int],
) -> dict[int, Trajectory]:  # fmt: skip
    """Trajectories of decode under the policy at random lambda, each starting where serving would start it, with what a
    few rungs of every token would have lost there; `rung_bytes` [J] are the rungs' shares of bytes, `number` is that of
    the policy and of the round."""
    member, round_number = number
    # The latency objective needs every rung of a chunk: it takes those of uniform runs.
    probes = context.amounts.probes if learning.objective == DAMAGE else 0

    def operating(rows: int, shard: int) -> Operating:
        generator = torch.Generator().manual_seed(member_seed(context, member) * 10_007 + 101 * round_number + shard)
        low, high = policy.log_lambda_range
        knob = low + (high - low) * torch.rand(rows, generator=generator)
        return Operating.at(knob, served_start(policy, samples, knob, rung_bytes))

    scales = scale_grid(context.amounts, [task])
    grid = torch.tensor(scales).expand(len(task.ladder.rungs), -1)

    def measure(
        run: AdaptiveRun, batch: Batch, spent: Operating, difficulty: Difficulty | None, seed: int
    ) -> list[Trajectory]:
        if not probes:
            return trajectories(run, batch, spent, difficulty)
        generator = torch.Generator().manual_seed(member_seed(context, member) * 20_011 + 103 * round_number + seed)
        return measured_paths(run, batch, spent, grid, probes, generator, difficulty)

    # One row stands for the plan; every batch brings what its own rows may spend.
    settings = replace(calibrated.settings, block_tokens=1)
    plan = RunPlan((task.ladder,), policy, settings, Operating.at(policy.knob_range()[1], -1))
    key: dict[str, object] = {
        "policy": tensors_digest(policy.state_dict()), "start": "served", "probes": probes, "scales": list(scales),
        "number": list(number),
    }  # fmt: skip
    name = f"trajectory-own-{member}-{round_number}"
    train, found = task.corpus.train, task.found().difficulty
    # Of the train documents the first ones, then all validation documents, each with the tables that it may see.
    chosen = [*range(min(len(train), context.amounts.own_documents)), *range(len(train), len(task.labelled))]
    examples = [task.labelled[document] for document in chosen]
    own = collect_paths(context, task, name, plan, examples, key, operating, measure, found.reordered(chosen))
    return dict(zip(chosen, own, strict=True))


def served_start(policy: LearnedPolicy, samples: Samples, knob: Tensor, rung_bytes: Tensor) -> Tensor:
    """[B] long: the dearest rung within the budget that each knob [B] spends on the chunks of `samples`;
    `rung_bytes` [J] are the rungs' shares of bytes, which a budget is of whatever lambda is a price of.

    It is where `PolicyCheckpoint.operating` starts a row whose budget leads to that knob.
    """
    device = policy.cost.device
    some = torch.linspace(0, len(samples) - 1, min(len(samples), START_CHUNKS)).long()
    summary = Summary.from_features(samples.features[some].to(device))
    cost, scored = rung_bytes.to(device).double(), samples.scored[some].to(device).double()
    starts = []
    for own in knob.to(device):
        rung = policy.decide(summary, own.expand(len(some))).rung
        budget = (cost[rung] * scored).sum() / scored.sum()
        starts.append((cost <= budget + 1e-6).sum() - 1)
    return torch.stack(starts).clamp(min=0).cpu()


def train_round(
    context: FitContext, tasks: Sequence[AdapterTask], policy: LearnedPolicy, samples: Samples, held_out: Samples,
    latency: LatencyTable, learning: Learning, number: tuple[int, int],
) -> None:  # fmt: skip
    """Train `policy` in place on `samples` until `held_out` gets no better; resumes the same round where it was
    killed. `number` is that of the policy and of the round."""
    amounts, (member, round_number) = context.amounts, number
    module = PolicyFit(
        policy.train(), scale_grid(amounts, tasks), task_rank(tasks), torch.tensor(latency.ms),
        learning_rate=amounts.learning_rate, seed=member_seed(context, member) * 101 + round_number,
        objective=learning.objective, weight_decay=amounts.weight_decay,
    )  # fmt: skip
    contents = policy.state_dict()
    for part, own in (("samples", samples), ("held_out", held_out)):
        contents |= {f"{part}.{field.name}": getattr(own, field.name) for field in fields(own)}
    how = (amounts.epochs, amounts.patience, amounts.batch_chunks, amounts.learning_rate, amounts.weight_decay)
    key = f"{tensors_digest(contents)}-{how}-{learning}-{member_seed(context, member)}"
    name = f"round-{round_number}" if member == 0 else f"seed-{member}-round-{round_number}"
    folder = context.root / "checkpoints" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    resume = latest(folder)
    logger = new_logger(context.root, name, fresh=resume is None)
    keep = ModelCheckpoint(dirpath=folder, filename="last", save_top_k=1, enable_version_counter=False)
    keep.FILE_EXTENSION = ""
    best = BestWeights("eval/loss")
    trainer = context.make_trainer(
        callbacks=[best, Patience("eval/loss", patience=amounts.patience), keep, BatchBar(f"training {name}")],
        logger=logger,
        max_epochs=amounts.epochs,
        log_every_n_steps=1,
        plugins=[SafetensorsCheckpointIO()],
    )
    context.say(f"training {name}: {len(samples)} chunks, {'resumed' if resume else 'from the start'}")
    chunks = loader(samples, amounts.batch_chunks, seed=member_seed(context, member))
    trainer.fit(module, chunks, loader(held_out, amounts.batch_chunks), ckpt_path=resume)
    best.restore(module)


class Patience(EarlyStopping):
    """Lightning's, but a round that has stopped stays so: resumed, it would make one more epoch each time."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


class BestWeights(L.Callback):
    """Keeps the weights of the epoch with the least `monitor`, through checkpoints too."""

    def __init__(self, monitor: str) -> None:
        self.monitor, self.least = monitor, math.inf
        self.weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.least:
            self.least = value
            self.weights = {name: own.detach().cpu().clone() for name, own in pl_module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"least": self.least, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.least, self.weights = state_dict["least"], state_dict["weights"]

    def restore(self, module: L.LightningModule) -> None:
        """Give the module the weights that were kept."""
        module.load_state_dict(self.weights)


START_CHUNKS = 2**14
"""Chunks, evenly spread, on which is found what a knob spends."""


class FitLogger(TensorBoardLogger):
    """Lightning's, without the `epoch` that it logs beside everything: TensorBoard would open on that card."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def new_logger(root: Path, name: str, *, fresh: bool) -> FitLogger:
    """TensorBoard events in `root/name`; `fresh` removes those of an earlier run, whose lines would lie over these."""
    if fresh and is_first_process():
        for old in (root / name).glob("events.out.tfevents.*"):
            old.unlink()
    return FitLogger(root, name=name, version="", default_hp_metric=False)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hold back advice of Lightning that does not apply: it is given about data loaders and folders we chose."""
    with catch_warnings():
        filterwarnings("ignore", message=".*does not have many workers")
        filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        yield

"""The rounds of training: on full-rank trajectories, then on those of the policy's own, as they will be served."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from warnings import catch_warnings, filterwarnings

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from policy.contract import Summary
from policy.cost import LatencyTable
from policy.learned import LearnedPolicy
from policy.operating import Operating
from runtime.plan import RunPlan

from ..console import is_first_process
from ..progress import BatchBar
from ..targets.damage import Trajectory
from ..targets.paths import Calibrated, collect_paths
from ..targets.samples import Samples, document_samples
from ..task import AdapterTask, FitContext, common_rungs, scale_grid, task_cost, task_rank
from .calibrate import lambda_range
from .checkpoint_io import SafetensorsCheckpointIO, latest
from .module import PolicyFit, loader


def train_policy(
    context: FitContext, tasks: Sequence[AdapterTask], calibrated: Calibrated, latency: LatencyTable
) -> LearnedPolicy:
    """Train on the train documents of all tasks, then on own trajectories through them, `amounts.rounds` times."""
    training, held_out = split_samples(tasks, [task.found().paths for task in tasks], calibrated)
    parts = [training]
    policy = new_policy(context, tasks, training)
    for number in range(context.amounts.rounds + 1):
        if number > 0:
            paths = [own_paths(context, task, policy, calibrated, training, number) for task in tasks]
            parts.append(split_samples(tasks, paths, calibrated)[0])
        train_round(context, tasks, policy, Samples.concatenate(parts), held_out, latency, number)
    return policy.cpu().eval()


def split_samples(
    tasks: Sequence[AdapterTask], paths: Sequence[Sequence[Trajectory]], calibrated: Calibrated
) -> tuple[Samples, Samples]:
    """Chunks of the train and of the validation documents of all tasks; `paths` per task, per labelled document."""
    train, validation = [], []
    for task, own in zip(tasks, paths, strict=True):
        samples = document_samples(task.labelled, own, task.found().tables, calibrated.later)
        split = len(task.corpus.train)
        train += samples[:split]
        validation += samples[split:]
    return Samples.concatenate(train), Samples.concatenate(validation)


def new_policy(context: FitContext, tasks: Sequence[AdapterTask], samples: Samples) -> LearnedPolicy:
    """An untrained policy whose normalisers and range of lambda are those of the training samples."""
    amounts, cost, scales = context.amounts, task_cost(tasks), scale_grid(context.amounts, tasks)
    reach = lambda_range(samples.damage.amin(2), samples.tokens, cost)
    widest = max(abs(scale - 1.0) for scale in scales)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        policy = LearnedPolicy(
            common_rungs(tasks), hidden=amounts.hidden, scale_range=widest, log_lambda_range=reach, cost=cost
        )
    policy.calibrate(samples.features, samples.damage[..., scales.index(1.0)])
    return policy


def own_paths(
    context: FitContext, task: AdapterTask, policy: LearnedPolicy, calibrated: Calibrated, samples: Samples, number: int
) -> list[Trajectory]:
    """Trajectories under the policy at random lambda, each starting where serving would start it."""

    def operating(rows: int, shard: int) -> Operating:
        generator = torch.Generator().manual_seed(context.seed * 10_007 + shard)
        low, high = policy.log_lambda_range
        knob = low + (high - low) * torch.rand(rows, generator=generator)
        return Operating.at(knob, served_start(policy, samples, knob))

    # One row stands for the plan; every batch brings what its own rows may spend.
    plan = RunPlan((task.ladder,), policy, calibrated.settings, Operating.at(policy.knob_range()[1], -1))
    key: dict[str, object] = {"policy": digest(policy.state_dict()), "start": "served"}
    return collect_paths(context, task, f"trajectory-own-{number}", plan, task.labelled, key, operating)


def served_start(policy: LearnedPolicy, samples: Samples, knob: Tensor) -> Tensor:
    """[B] long: the dearest rung within the budget that each knob [B] spends on the chunks of `samples`.

    It is where `PolicyCheckpoint.operating` starts a row whose budget leads to that knob.
    """
    device = policy.cost.device
    summary = Summary.from_features(samples.features.to(device))
    cost, scored = policy.cost.double(), samples.scored.to(device).double()
    starts = []
    for own in knob.to(device):
        rung = policy.decide(summary, own.expand(len(samples))).rung
        budget = (cost[rung] * scored).sum() / scored.sum()
        starts.append((cost <= budget + 1e-6).sum() - 1)
    return torch.stack(starts).clamp(min=0).cpu()


def train_round(
    context: FitContext, tasks: Sequence[AdapterTask], policy: LearnedPolicy, samples: Samples, held_out: Samples,
    latency: LatencyTable, number: int,
) -> None:  # fmt: skip
    """Train `policy` in place on `samples`; resumes the same round where it was killed."""
    amounts = context.amounts
    module = PolicyFit(
        policy.train(), scale_grid(amounts, tasks), task_rank(tasks), torch.tensor(latency.ms),
        learning_rate=amounts.learning_rate, seed=context.seed * 101 + number,
    )  # fmt: skip
    contents = {**policy.state_dict(), "samples.features": samples.features, "samples.damage": samples.damage}
    key = f"{digest(contents)}-{amounts.epochs}-{amounts.batch_chunks}-{amounts.learning_rate}-{context.seed}"
    folder = context.root / "checkpoints" / f"round-{number}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    resume = latest(folder)
    logger = new_logger(context.root, f"round-{number}", fresh=resume is None)
    keep = ModelCheckpoint(dirpath=folder, filename="last", save_top_k=1, enable_version_counter=False)
    keep.FILE_EXTENSION = ""
    trainer = context.make_trainer(
        callbacks=[keep, BatchBar(f"training round {number}")],
        logger=logger,
        max_epochs=amounts.epochs,
        log_every_n_steps=1,
        plugins=[SafetensorsCheckpointIO()],
    )
    context.say(f"training round {number}: {len(samples)} chunks, {'resumed' if resume else 'from the start'}")
    chunks = loader(samples, amounts.batch_chunks, seed=context.seed)
    trainer.fit(module, chunks, loader(held_out, amounts.batch_chunks), ckpt_path=resume)


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


def digest(tensors: dict[str, Tensor]) -> str:
    """12 hex digits over names and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]

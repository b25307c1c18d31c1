"""The LightningModule that learns the policy. The policy itself knows nothing of Lightning.

The objective, per chunk and latency weight lambda drawn anew for every chunk and epoch:

    E_pi[ KL(full || rung, scale) ] + lambda * E_pi[ cost ]

with pi the softmax of the policy's logits and KL interpolated between the measured scales. Divided by lambda,
gradients have one size along the whole trade-off curve.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from policy.learned import LearnedPolicy

from ..targets.samples import Samples


def interpolate_scale(damage: Tensor, scale: Tensor, grid: Tensor) -> Tensor:
    """Damage at continuous scales: damage [N, J, G] measured at `grid` [G], scale [N, J] -> [N, J].

    The polynomial through the measured points (Lagrange): KL is smooth and nearly quadratic in a scale close to 1, so
    three points find its minimum between them. Scales are kept within the grid; differentiable in scale inside it.
    """
    scale = scale.clamp(float(grid.min()), float(grid.max()))
    total = torch.zeros_like(scale)
    for i, own in enumerate(grid):
        others = torch.cat([grid[:i], grid[i + 1 :]])
        basis = ((scale[..., None] - others) / (own - others)).prod(-1)
        total = total + basis * damage[..., i]
    return total.clamp(min=0.0)  # a parabola through noisy points can dip below what KL can be


class PolicyFit(L.LightningModule):
    """Trains `policy` on chunk samples.

    `rung_rank` [J] and `rung_ms` [J] turn the expected rung into mean rank and milliseconds for the logs.
    """

    grid: Tensor
    rung_rank: Tensor
    rung_ms: Tensor

    def __init__(
        self,
        policy: LearnedPolicy,
        scales: tuple[float, ...],
        rung_rank: Tensor,
        rung_ms: Tensor,
        *,
        learning_rate: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.learning_rate, self.seed = learning_rate, seed
        self._steps: list[tuple[dict[str, Tensor], int]] = []
        self.register_buffer("grid", torch.tensor(scales), persistent=False)
        self.register_buffer("rung_rank", rung_rank, persistent=False)
        self.register_buffer("rung_ms", rung_ms, persistent=False)

    def objective(self, features: Tensor, damage: Tensor, tokens: Tensor, log_lambda: Tensor) -> dict[str, Tensor]:
        """Loss and its parts over [N] chunks, weighted by their tokens; all scalars."""
        logits, scale = self.policy.logits(features, log_lambda)
        pi = logits.softmax(1)
        kl = (pi * interpolate_scale(damage, scale, self.grid)).sum(1)
        cost = (pi * self.policy.cost).sum(1)
        weight = tokens / tokens.sum()
        loss = (weight * (kl / log_lambda.exp() + cost)).sum()
        return {
            "loss": loss,
            "kl": (weight * kl).sum(),
            "cost": (weight * cost).sum(),
            "mean_rank": (weight * (pi @ self.rung_rank)).sum(),
            "latency_ms": (weight * (pi @ self.rung_ms)).sum(),
        }

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        features, damage, tokens = batch
        # Drawn from (seed, epoch, step) alone, so that a resumed run draws what the uninterrupted one would.
        generator = torch.Generator().manual_seed((self.seed * 100_003 + self.current_epoch) * 1_009 + index)
        low, high = self.policy.log_lambda_range
        log_lambda = (low + (high - low) * torch.rand(len(tokens), generator=generator)).to(self.device)
        parts = self.objective(features, damage, tokens, log_lambda)
        self._steps.append(({name: value.detach() for name, value in parts.items()}, len(tokens)))
        return parts["loss"]

    def on_train_epoch_end(self) -> None:
        """Log means over the epoch's chunks: Lightning's bookkeeping of every step would take as long as the step."""
        steps, self._steps = self._steps, []
        sizes = torch.tensor([float(size) for _, size in steps], device=self.device)
        columns = {name: torch.stack([parts[name] for parts, _ in steps]) for name in steps[0][0]}
        means = {name: (column * sizes).sum() / sizes.sum() for name, column in columns.items()}
        self._log("train", means, int(sizes.sum()))

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        features, damage, tokens = batch
        low, high = self.policy.log_lambda_range
        shares = (torch.arange(len(tokens), device=self.device) + 0.5) / len(tokens)
        # Every chunk at the same spread of lambda each epoch, decorrelated from the documents' order.
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(self.seed)).to(self.device)
        self._log("eval", self.objective(features, damage, tokens, low + (high - low) * shares[order]), len(tokens))

    def _log(self, stage: str, parts: dict[str, Tensor], size: int) -> None:
        names = {f"{stage}/{name}": value for name, value in parts.items()}
        self.log_dict(names, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class _Chunks(TensorDataset):
    """Tensors of chunks, read a batch at a time: one by one costs more than the step that uses them."""

    def __getitems__(self, index: list[int]) -> list[Tensor]:
        rows = torch.tensor(index)
        return [tensor[rows] for tensor in self.tensors]


def loader(samples: Samples, batch_chunks: int, *, seed: int | None = None) -> DataLoader[Any]:
    """Batches of (features, damage, tokens); with a seed, shuffled by (seed, epoch) alone."""
    dataset = _Chunks(samples.features, samples.damage, samples.tokens)
    if seed is None:
        return DataLoader(dataset, batch_size=len(dataset), collate_fn=_as_read)
    # One replica: on several devices each sees all of these few thousand chunks, and the shuffle stays reproducible.
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
    return DataLoader(dataset, batch_size=batch_chunks, sampler=sampler, collate_fn=_as_read)


def _as_read(batch: list[Tensor]) -> list[Tensor]:
    return batch

"""The LightningModule that learns the policy. The policy itself knows nothing of Lightning.

Two objectives, per chunk:

    damage     deviance of a Poisson regression of the measured KL, rung by rung, each over its mean: the policy is told
               what every rung costs here, and its rule, least damage + lambda * cost, does the rest
    latency    E_pi[ KL(full || rung, scale) ] + lambda * E_pi[ cost ] with pi the softmax of the policy's logits and
               lambda the knob that the chunk's run was at, else drawn anew for every chunk and epoch

The cost is the policy's own: bytes, or for the second objective milliseconds, where these tell the rungs apart
(`train.penalty`).

The first is unbiased for the mean, needs no rung to be measured where others are, and cannot collapse to one rung; the
second is divided by lambda, so that gradients have one size along the whole trade-off curve. KL is interpolated between
the measured scales.
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

DAMAGE, LATENCY = OBJECTIVES = ("damage", "latency")


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
    """Trains `policy` on chunk samples by one of `OBJECTIVES`.

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
        objective: str = DAMAGE,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.policy, self.by_damage = policy, objective == DAMAGE
        self.learning_rate, self.weight_decay, self.seed = learning_rate, weight_decay, seed
        # What is regressed on is the damage at the scales that the policy starts with.
        policy.scale_head.requires_grad_(not self.by_damage)
        # Nor is the softness of a choice that nothing is learned by; several processes would wait for its gradient.
        policy.log_temperature.requires_grad_(not self.by_damage)
        self._steps: list[tuple[dict[str, Tensor], int]] = []
        self.register_buffer("grid", torch.tensor(scales), persistent=False)
        self.register_buffer("rung_rank", rung_rank, persistent=False)
        self.register_buffer("rung_ms", rung_ms, persistent=False)

    def objective(self, features: Tensor, damage: Tensor, tokens: Tensor, log_lambda: Tensor) -> dict[str, Tensor]:
        """Loss and its parts over [N] chunks, weighted by their tokens; all scalars.

        A rung that was not measured counts in the parts as predicted; chunks with one are no part of the latency loss.
        """
        logits, scale = self.policy.logits(features, log_lambda)
        predicted = self.policy.damage(features)
        known = damage.isfinite().all(2)
        # What is not measured must not reach a gradient, where nan times 0 is nan; by damage no scale has one.
        damage = torch.where(known[..., None], damage, 0.0)
        measured = interpolate_scale(damage, scale.detach() if self.by_damage else scale, self.grid)
        pi = logits.softmax(1)
        kl = (pi * torch.where(known, measured, predicted.detach())).sum(1)
        cost = (pi * self.policy.cost).sum(1)
        weight = tokens / tokens.sum()
        if self.by_damage:
            loss = _deviance(predicted, measured, known, weight, self.policy.mean_damage())
        else:
            whole = tokens * known.all(1)
            loss = (whole * (kl / log_lambda.exp() + cost)).sum() / whole.sum().clamp(min=1e-9)
        return {
            "loss": loss,
            "kl": (weight * kl).sum(),
            "cost": (weight * cost).sum(),
            "mean_rank": (weight * (pi @ self.rung_rank)).sum(),
            "latency_ms": (weight * (pi @ self.rung_ms)).sum(),
        }

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        features, damage, tokens, known_lambda = batch
        # Drawn from (seed, epoch, step) alone, so that a resumed run draws what the uninterrupted one would.
        generator = torch.Generator().manual_seed((self.seed * 100_003 + self.current_epoch) * 1_009 + index)
        low, high = self.policy.log_lambda_range
        drawn = (low + (high - low) * torch.rand(len(tokens), generator=generator)).to(self.device)
        log_lambda = torch.where(known_lambda.isfinite(), known_lambda, drawn)
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
        features, damage, tokens, known_lambda = batch
        low, high = self.policy.log_lambda_range
        shares = (torch.arange(len(tokens), device=self.device) + 0.5) / len(tokens)
        # Every chunk at the same spread of lambda each epoch, decorrelated from the documents' order.
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(self.seed)).to(self.device)
        log_lambda = torch.where(known_lambda.isfinite(), known_lambda, low + (high - low) * shares[order])
        self._log("eval", self.objective(features, damage, tokens, log_lambda), len(tokens))

    def _log(self, stage: str, parts: dict[str, Tensor], size: int) -> None:
        names = {f"{stage}/{name}": value for name, value in parts.items()}
        self.log_dict(names, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)


def _deviance(predicted: Tensor, measured: Tensor, known: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    """Of a Poisson regression, 0 where all is predicted: [N, J] each, weight [N], every rung below the top in units of
    its mean [J]. Linear in what is measured, so its minimum is the mean, however long the tail."""
    q, y, known, mean = predicted[:, :-1], measured[:, :-1], known[:, :-1], mean[:-1]
    y = torch.where(known, y, 0.0)
    per_rung = (q - y + torch.xlogy(y, y) - y * q.clamp(min=1e-30).log()) / mean * known
    weight = weight[:, None] * known
    return ((weight * per_rung).sum(0) / weight.sum(0).clamp(min=1e-9)).mean()


class _Chunks(TensorDataset):
    """Tensors of chunks, read a batch at a time: one by one costs more than the step that uses them."""

    def __getitems__(self, index: list[int]) -> list[Tensor]:
        rows = torch.tensor(index)
        return [tensor[rows] for tensor in self.tensors]


def loader(samples: Samples, batch_chunks: int, *, seed: int | None = None) -> DataLoader[Any]:
    """Batches of (features, damage, tokens, log lambda); with a seed, shuffled by (seed, epoch) alone."""
    dataset = _Chunks(samples.features, samples.damage, samples.tokens, samples.log_lambda)
    if seed is None:
        return DataLoader(dataset, batch_size=len(dataset), collate_fn=_as_read)
    # One replica: on several devices each sees all of these few thousand chunks, and the shuffle stays reproducible.
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
    return DataLoader(dataset, batch_size=batch_chunks, sampler=sampler, collate_fn=_as_read)


def _as_read(batch: list[Tensor]) -> list[Tensor]:
    return batch

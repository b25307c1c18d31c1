"""Linears that share their input as one: the weights of a model, and the adapters of a batch.

    qkv, gate_up    several weights in one tensor, of which the model's own become views: no memory is taken
    o, down         as they are

Shape legend: B rows, n linears of a site, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .shapes import adapted_linears

SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
Adapters = dict[str, tuple[Tensor, Tensor]]
"""A [B, R, d_in] and B [B, d_out, R] of every adapted linear by its path, each row's scale folded into its B."""


@dataclass(frozen=True)
class Fused:
    """The linears of a site."""

    weight: Tensor
    """[sum of d_out, d_in]"""
    bias: Tensor | None


@dataclass(frozen=True)
class Update:
    """What every row's adapter adds to the outputs of a site."""

    a: Tensor
    """[B, n R, d_in]"""
    b: Tensor | tuple[Tensor, ...]
    """[B n, d_out, R] of linears of one width, else [B, d_out, R] of each"""

    def add(self, x: Tensor, y: Tensor) -> None:
        """x [B, d_in], y [B, sum of d_out], which is added to in place."""
        shrunk = self._shrunk(x)
        if isinstance(self.b, Tensor):
            y.view(len(self.b), -1, 1).baddbmm_(self.b, shrunk.view(len(self.b), -1, 1))
            return
        parts = y.split([own.shape[1] for own in self.b], 1)
        for part, own, u in zip(parts, self.b, shrunk.chunk(len(self.b), 1), strict=True):
            part[..., None].baddbmm_(own, u[..., None])

    def of(self, x: Tensor) -> Tensor:
        """What `add` adds, [B, sum of d_out]: a compiler makes more of plain products."""
        shrunk = self._shrunk(x)
        if isinstance(self.b, Tensor):
            return torch.bmm(self.b, shrunk.view(len(self.b), -1, 1)).view(len(x), -1)
        parts = zip(self.b, shrunk.chunk(len(self.b), 1), strict=True)
        return torch.cat([torch.bmm(own, u[..., None])[..., 0] for own, u in parts], 1)

    def _shrunk(self, x: Tensor) -> Tensor:
        """[B, n R]"""
        if len(x) == 1:
            return torch.mv(self.a[0], x[0])[None]
        return torch.bmm(self.a, x[..., None])[..., 0]


@torch.no_grad()
def fuse(model: PreTrainedModel) -> list[dict[str, Fused]]:
    """The linears of every layer by site. The model's own parameters become views of what is fused, a layer at a time;
    where they are already nothing is done."""
    layers: Any = model.model.layers
    return [
        {site: _fused([layer.get_submodule(name) for name in names]) for site, names in SITES.items()}
        for layer in layers
    ]


def _fused(linears: list[nn.Linear]) -> Fused:
    biases = [own.bias for own in linears if own.bias is not None]
    bias = torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None
    if len(linears) == 1:
        return Fused(linears[0].weight, bias)
    sizes = [own.out_features for own in linears]
    first = linears[0].weight
    whole = first.untyped_storage()
    if whole.nbytes() == sum(own.weight.nbytes for own in linears) and all(
        own.weight.untyped_storage().data_ptr() == whole.data_ptr() for own in linears
    ):
        return Fused(torch.as_strided(first, (sum(sizes), first.shape[1]), first.stride(), 0), bias)
    weight = torch.cat([own.weight for own in linears])
    for own, part in zip(linears, weight.split(sizes), strict=True):
        own.weight = nn.Parameter(part, requires_grad=own.weight.requires_grad)
    return Fused(weight, bias)


def updates(model: PreTrainedModel, adapters: Adapters) -> list[dict[str, Update]]:
    """Adapters of every layer by site. Raises ValueError where a site has them in part."""
    return [_of_layer(layer, adapters) for layer in range(model.config.num_hidden_layers)]


def random_updates(model: PreTrainedModel, batch: int, rank: int) -> list[dict[str, Update]]:
    """An adapter for every row, in the model's dtype, of the size that `shapes.write_adapter` gives its own; made a
    layer at a time, so that there are never two copies of all of them."""
    options: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    layers: Any = model.model.layers
    found = []
    for number, layer in enumerate(layers):
        own = {
            f"model.layers.{number}.{name}": (
                torch.randn(batch, rank, linear.in_features, **options).mul_(linear.in_features**-0.5),
                torch.randn(batch, linear.out_features, rank, **options).mul_(0.16 * rank**-0.5),
            )
            for name, linear in adapted_linears(layer).items()
        }
        found.append(_of_layer(number, own))
    return found


def _of_layer(layer: int, adapters: Adapters) -> dict[str, Update]:
    found = {}
    for site, names in SITES.items():
        own = [adapters[path] for name in names if (path := f"model.layers.{layer}.{name}") in adapters]
        if own and len(own) < len(names):
            raise ValueError(f"adapters: expected all linears of {site} or none, got {len(own)}; give all")
        if own:
            found[site] = _update(own)
    return found


def _update(own: list[tuple[Tensor, Tensor]]) -> Update:
    a, halves = torch.cat([one for one, _ in own], 1), [two for _, two in own]
    if len({two.shape[1] for two in halves}) > 1:
        return Update(a, tuple(halves))
    return Update(a, torch.stack(halves, 1).flatten(0, 1))

"""The oracle's choice of rungs: what a policy could gain, knowing every rung's damage on these very documents."""

from __future__ import annotations

import torch
from torch import Tensor


def oracle_rungs(damage: Tensor, tokens: Tensor, rung_rank: Tensor, mean_rank: float) -> Tensor:
    """[N] rungs of least damage at a byte-weighted mean rank of at most about `mean_rank`.

    damage [N, J] nats per token, tokens [N] (those that count for the mean). The price of rank is found by bisection;
    the mean rank falls with it.
    """

    def at(price: float) -> Tensor:
        return (damage + price * rung_rank).argmin(1)

    low, high = 0.0, float(damage.max()) / float((rung_rank[1:] - rung_rank[:-1]).min()) + 1e-9
    for _ in range(50):
        middle = (low + high) / 2
        mean = float((rung_rank[at(middle)] * tokens).sum() / tokens.sum())
        low, high = (middle, high) if mean > mean_rank else (low, middle)
    return at(high)


def by_position(starts: Tensor, values: Tensor, length: int) -> Tensor:
    """Spread one value per chunk over the chunk's positions: starts [C] from 0, values [C] -> [length]."""
    positions = torch.arange(length)
    return values[torch.searchsorted(starts, positions, right=True) - 1]

"""What depends on the token before, token by token: the complexity class with its hysteresis, and where chunks open.

Shape legend: B rows, T tokens of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy.settings import ChunkSettings


def class_bounds(complexity: Tensor, chunk: ChunkSettings, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest class that a token of this complexity [...] may leave its row in, long [...].

    The class moves only as far as the complexity is past a threshold by the margin.
    """
    at_least = (complexity[..., None] > thresholds + chunk.hysteresis).sum(-1)
    at_most = (complexity[..., None] > thresholds - chunk.hysteresis).sum(-1)
    return at_least, at_most


def levels(level: Tensor, at_least: Tensor, at_most: Tensor, real: Tensor) -> Tensor:
    """Class after every token [B, T] long, from level [B] before the block; bounds and real are [B, T]."""
    found = []
    for t in range(real.shape[1]):
        moved = torch.minimum(torch.maximum(level, at_least[:, t]), at_most[:, t])
        level = torch.where(real[:, t], moved, level)
        found.append(level)
    return torch.stack(found, 1)


def openings(
    start: Tensor, opened_level: Tensor, positions: Tensor, level: Tensor, real: Tensor, chunk: ChunkSettings
) -> tuple[Tensor, Tensor]:
    """Where chunks open, [B, T] bool, and where each token's chunk starts, [B, T] long.

    start and opened_level [B] are of the chunk that is open before the block; positions and level [B, T] long. A chunk
    closes at `max_tokens`, or from `min_tokens` on when the class is no longer the one it opened with.
    """
    opens, starts = [], []
    for t in range(real.shape[1]):
        position, now = positions[:, t], level[:, t]
        length = position - start
        changed = (now != opened_level) & (length >= chunk.min_tokens)
        opening = ((position == 0) | (length >= chunk.max_tokens) | changed) & real[:, t]
        start, opened_level = torch.where(opening, position, start), torch.where(opening, now, opened_level)
        opens.append(opening)
        starts.append(start)
    return torch.stack(opens, 1), torch.stack(starts, 1)

"""What consumes the linears' outputs for tokens of prompts, in plain PyTorch: what the kernels must equal.

Everything is computed in float32 and rounded once, to the dtype in which it is stored. Tiles are gone through one by
one, on the host's account: it waits for every number that it looks at. Tokens of no tile are left alone.

Shape legend: T tokens, N tiles, t tokens of a tile, D channels of the residual, F inner channels, H query heads, Hkv
key and value heads, C channels of a head, N_i outputs of a member, R directions at most, Q columns of a block of B'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ..norm import Norm
from ..packed import ENDS
from ..pages import Pages
from ..prompt.matrices import Added
from ..prompt.tiles import COUNT, FACTORS, FIRST, POSITION, ROW
from ..prompt.token_residual import BLOCK
from ..rotary import Heads
from . import decode


@dataclass(frozen=True)
class Tile:
    """Tokens of one row, and what linears put out for them."""

    tokens: slice
    """Which of the T"""
    row: int
    position: int
    """Of the first"""
    y: Tensor
    """[t, sum of N_i] float32, with updates, normed, with biases"""


def settle_tokens(
    y: Sequence[Tensor], tiles: Tensor, *, update: Added | None = None, norm: Norm | None = None,
    biases: Sequence[Tensor] | None = None,
) -> Iterator[Tile]:  # fmt: skip
    """Of every tile in use what the linears of a site, y [T, N_i] each, come to."""
    for tile in tiles.tolist():
        first, count, row, position, factors = (tile[field] for field in (FIRST, COUNT, ROW, POSITION, FACTORS))
        if count == 0:
            continue
        tokens = slice(first, first + count)
        outputs = torch.cat([own[tokens].float() for own in y], 1)
        if update is not None and factors >= 0:
            outputs += torch.cat(_expanded(update, tokens, factors, [own.shape[1] for own in y]), 1)
        if norm is not None:
            outputs = decode.settle(outputs, squares=norm.squares[tokens], width=norm.width, eps=norm.eps)
        yield Tile(tokens, row, position, decode.settle(outputs, biases=biases))


def _expanded(update: Added, tokens: slice, factors: int, sizes: Sequence[int]) -> list[Tensor]:
    """B'u [t, N_i] of every member for tokens that read one set of factors."""
    own, found, first = update.factors, [], 0
    for member, size in enumerate(sizes):
        n = int(own.reads.records[factors, own.site + member, ENDS + 3])
        blocks = -(-size // own.columns)
        # The columns of all blocks side by side; those that fill up the last one are nobody's.
        columns = own.b[factors, first : first + blocks, :n].transpose(0, 1).flatten(1)[:, :size]
        found.append(update.u[tokens, member, :n].float() @ columns.float())
        first += blocks
    return found


def rotate_tokens(
    y: tuple[Tensor, Tensor, Tensor], query: Tensor, pages: Pages, heads: Heads, tiles: Tensor, *,
    update: Added | None = None, norm: Norm | None = None, biases: tuple[Tensor, ...] | None = None,
) -> None:  # fmt: skip
    """y [T, H C], [T, Hkv C], [T, Hkv C] -> query [T, H, C], and keys and values in the pages of the tokens' rows."""
    weights = None if heads.q_norm is None or heads.k_norm is None else (heads.q_norm, heads.k_norm)
    counts = query.shape[1], pages.units.heads
    for tile in settle_tokens(y, tiles, update=update, norm=norm, biases=biases):
        position = tile.position + torch.arange(len(tile.y), device=tile.y.device)
        query[tile.tokens], *both = decode.rotate(
            tile.y, heads.cosine, heads.sine, position + 1, counts, query.dtype, norms=weights, eps=heads.eps
        )
        _write(pages, tile.row, position, *both)


def _write(pages: Pages, row: int, position: Tensor, keys: Tensor, values: Tensor) -> None:
    """Put keys and values [t, Hkv, C] at positions [t] of a row, in its live pages."""
    part, width = pages.units.part_tokens, pages.units.channels
    slot = position % PAGE_TOKENS
    unit = pages.tables.full[row, position // PAGE_TOKENS, slot // part].long()
    numbers = pages.memory.view(keys.dtype)[..., : 2 * part * width].unflatten(2, (2, part, width))
    numbers[unit, :, 0, slot % part] = keys
    numbers[unit, :, 1, slot % part] = values


def gate_up_tokens(
    gate: Tensor, up: Tensor, h: Tensor, tiles: Tensor, *, update: Added | None = None, norm: Norm | None = None,
    biases: tuple[Tensor, ...] | None = None,
) -> None:  # fmt: skip
    """gate and up [T, F] -> h [T, F]."""
    for tile in settle_tokens((gate, up), tiles, update=update, norm=norm, biases=biases):
        h[tile.tokens] = decode.gate_up(tile.y, h.dtype)


def add_residual_tokens(
    y: Tensor, r: Tensor, normed: Tensor, squares: Tensor, weight: Tensor, tiles: Tensor, *,
    update: Added | None = None, bias: Tensor | None = None,
) -> None:  # fmt: skip
    """y [T, D] -> r [T, D] float32 in place, normed [T, D], and sums of squares by blocks of columns [T, blocks]."""
    for tile in settle_tokens((y,), tiles, update=update, biases=None if bias is None else (bias,)):
        r[tile.tokens], normed[tile.tokens], _ = decode.add_residual(tile.y, r[tile.tokens], weight, normed.dtype)
        squares[tile.tokens] = torch.stack([own.square().sum(1) for own in r[tile.tokens].split(BLOCK, 1)], 1)

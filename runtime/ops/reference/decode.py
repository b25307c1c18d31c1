"""A decode step between one attention and the next in plain PyTorch: what its kernels must equal.

Everything is computed in float32, or in float64 of an x or y that is float64, and rounded once, to the `dtype` in which
a kernel stores it.

Shape legend: B rows, D inputs or channels, N outputs, F inner channels, H query heads, Hkv key and value heads, C
channels of a head, M modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from policy.settings import PAGE_TOKENS

from ..pages import Pages

Factors = tuple[Tensor, Tensor]
"""a [n, D] and b [n, N] of the n directions that a row reads."""


def resolve(
    slot: Tensor, rung: Tensor, weight: Tensor, edges: Tensor, bank_of: Tensor, parts: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the ranges of every row and module end, [B, M, 4], and where they lie, [B, M, 16]; both int32.

    slot, rung and weight [B]; edges [SLOTS, J, M, 4], bank_of [SLOTS, J], parts [SLOTS, BANKS, M, 16]. A row of slot -1
    or weight 0 reads nothing: its ranges end at 0, and where they lie means nothing.
    """
    used = (slot >= 0) & (weight != 0)
    own, at = slot.where(used, 0).long(), rung.where(used, 0).long()
    ends = edges[own, at].where(used[:, None, None], 0)
    return ends, parts[own, bank_of[own, at].long()]


def linear(x: Tensor, weights: Sequence[Tensor], *, squares: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """[B, sum of N_i]: W x of linears that share x [B, D], weights [N_i, D].

    With squares [B, blocks], of which a row's sum is that of a residual r, x is r * weight, and W x is that of its RMS
    norm.
    """
    wide = _wide(x)
    y = wide @ torch.cat(list(weights)).to(wide.dtype).T
    return y if squares is None else y * _rstd(squares, x.shape[1], eps, wide.dtype)


def updates(x: Tensor, factors: Sequence[Factors], weight: Tensor) -> Tensor:
    """[B, N]: weight * b.T (a x), what every row's own adapter adds to the outputs of one linear.

    x [B, D]; of every row its factors and weight [B].
    """
    wide = _wide(x)
    rows = [own @ a.to(wide.dtype).T @ b.to(wide.dtype) for own, (a, b) in zip(wide, factors, strict=True)]
    return torch.stack(rows) * weight[:, None].to(wide.dtype)


def settle(
    y: Tensor, *, squares: Tensor | None = None, width: int = 1, eps: float = 0.0,
    biases: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """y [B, N] of linears, updates included, normed where their input [B, width] has yet to be; with biases [N_i]."""
    if squares is not None:
        y = y * _rstd(squares, width, eps, y.dtype)
    return y if biases is None else y + torch.cat(list(biases)).to(y.dtype)


def add_residual(y: Tensor, r: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """r + y, and what the next RMS norm takes: that times its weight [D] in `dtype`, and sums of squares [B, 1].

    y and r [B, D].
    """
    total = r.to(y.dtype) + y
    return total, (total * weight.to(y.dtype)).to(dtype), total.square().sum(-1, keepdim=True)


def gate_up(y: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, F] in `dtype`: silu(gate) * up of y [B, 2 F], gate before up."""
    gate, up = y.chunk(2, dim=-1)
    return (silu(gate) * up).to(dtype)


def rotate(
    y: Tensor, cosine: Tensor, sine: Tensor, lengths: Tensor, heads: tuple[int, int], dtype: torch.dtype, *,
    norms: tuple[Tensor, Tensor] | None = None, eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query [B, H, C], keys and values [B, Hkv, C] in `dtype`, queries and keys turned to their positions.

    y [B, (H + 2 Hkv) C]; cosine and sine [positions, C / 2]; lengths [B] of rows with the token that is decoded, the
    position of which is one less; heads H and Hkv; norms the weights [C] of RMS norms of queries and of keys.
    """
    count, shared = heads
    query, keys, values = y.unflatten(1, (count + 2 * shared, -1)).split([count, shared, shared], dim=1)
    if norms is not None:
        query, keys = (
            own * own.square().mean(-1, keepdim=True).add(eps).rsqrt() * weight.to(y.dtype)
            for own, weight in zip((query, keys), norms, strict=True)
        )
    position = (lengths.long() - 1).clamp_min(0)
    cos, sin = (own[position, None].to(y.dtype) for own in (cosine, sine))
    query, keys = (
        torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        for first, second in (own.chunk(2, dim=-1) for own in (query, keys))
    )
    return query.to(dtype), keys.to(dtype), values.to(dtype)


def token_places(pages: Pages) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows in use their numbers, the unit that the newest token of each is in, and which of the unit's tokens it is;
    lengths as `rotate` has them."""
    tables, part = pages.tables, pages.units.part_tokens
    rows = tables.lengths.nonzero()[:, 0]
    page, slot = (tables.lengths[rows].long() - 1).div(PAGE_TOKENS, rounding_mode="floor"), tables.lengths[rows] - 1
    slot = slot.long() % PAGE_TOKENS
    return rows, tables.full[rows, page, slot // part].long(), slot % part


def write_page(pages: Pages, keys: Tensor, values: Tensor) -> None:
    """Put every row's keys and values [B, Hkv, C] in their place of its live page, in the dtype that they have."""
    rows, unit, token = token_places(pages)
    width, part = keys.shape[2], pages.units.part_tokens
    numbers = pages.memory.view(keys.dtype)
    for own, first in ((keys, 0), (values, part)):
        at = (first + token)[:, None] * width + torch.arange(width, device=token.device)
        numbers[unit[:, None, None], torch.arange(keys.shape[1], device=token.device)[:, None], at[:, None]] = own[rows]


def embed(
    tokens: Tensor, table: Tensor, weight: Tensor, lengths: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The residual of tokens [B], rows of table [V, D], with what `add_residual` leaves beside it, and the lengths [B]
    that rows have now: one more where they are in use."""
    r = _wide(table[tokens])
    return *add_residual(torch.zeros_like(r), r, weight, dtype), lengths + (lengths > 0).to(lengths.dtype)


def _wide(x: Tensor) -> Tensor:
    """x in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rstd(squares: Tensor, width: int, eps: float, dtype: torch.dtype) -> Tensor:
    """[B, 1] in `dtype`: 1 over the root mean square of rows of `width` values."""
    return (squares.to(dtype).sum(-1, keepdim=True) / width + eps).rsqrt()

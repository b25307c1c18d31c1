"""`residual` for tokens of prompts: r += y + bias + B'u, and what the next norm takes.

Every consumer's program reads all sums of squares of its tokens, so there are few: a program goes through a wide block
of columns, some at a time.

Shape legend: T tokens, N tiles, D channels. In kernels: SUB tokens of a program, and C columns at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import dependent, release, wait
from .expanded import Patch, arguments, directions_at, directions_of, expanded
from .matrices import Added
from .tiles import TILE, tile_of

BLOCK = 512
"""Columns of which one program leaves the sum of squares: no fewer, see above; no more, so that a short pass has
programs for every part of the device."""
_BLOCK: tl.constexpr = tl.constexpr(BLOCK)


@triton.jit(do_not_specialize=["site"])
def _token_residual(
    y, bias, r, normed, squares, weight, tiles, u, b, records, site,
    D: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr, MEMBERS: tl.constexpr, SET: tl.constexpr, R: tl.constexpr,
    Q: tl.constexpr, K: tl.constexpr, LORA: tl.constexpr, SUB: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    # Tiles are there before the pass begins.
    first, count, _, _, factors = tile_of(tiles, tl.program_id(2))
    wait(PDL)
    lane = tl.program_id(1) * SUB + tl.arange(0, SUB)
    if tl.program_id(1) * SUB >= count:
        return
    there = lane < count
    token = first + lane
    n = directions_of(records, factors, site, M, LORA)
    kept = directions_at(u, 0, token, there, 0, n, MEMBERS, R, K, LORA)
    block = tl.program_id(0)
    squared = tl.zeros([SUB], tl.float32)
    for start in tl.range(block * _BLOCK, tl.minimum((block + 1) * _BLOCK, D), C, num_stages=STAGES):
        column = start + tl.arange(0, C)
        real = column < D
        mask = there[:, None] & real[None, :]
        place = (token * D)[:, None] + column[None, :]
        own = tl.load(y + place, mask=mask, other=0.0)
        value = tl.load(r + place, mask=mask, other=0.0)
        value += own.to(tl.float32)
        value += expanded(
            kept, u, b, token, there, factors, 0, n, column // Q, column % Q, real, MEMBERS, SET, R, Q, K, LORA, SUB, C
        )
        if BIAS:
            value += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
        scale = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
        tl.store(r + place, value, mask=mask)
        tl.store(normed + place, (value * scale).to(normed.dtype.element_ty), mask=mask)
        # Columns that are not real are 0.
        squared += tl.sum(value * value, axis=1)
    tl.store(squares + token * tl.num_programs(0) + block, squared, mask=there)


def patch_of(dtype: torch.dtype) -> Patch:
    """What a program takes at a time. Measured, not derived."""
    return Patch(32, 64, 0, 4, 1) if dtype == torch.float32 else Patch(16, 128, 0, 4, 2)


def add_residual_tokens(
    y: Tensor, r: Tensor, normed: Tensor, squares: Tensor, weight: Tensor, tiles: Tensor, *,
    update: Added | None = None, bias: Tensor | None = None, patch: Patch | None = None,
) -> None:  # fmt: skip
    """r += y + bias + B'u in place, and the next norm's: r [T, D] float32, y [T, D] in the model's dtype; normed [T, D]
    in the model's dtype is r * weight [D]; squares [T, blocks] float32, as many as `squares_of_tokens` says.

    tiles [N, FIELDS]; nothing is read or written of tokens that are of no tile. patch: what a program takes at a time,
    for who wants to say so; its columns divide BLOCK.
    """
    adapters, constants = arguments(update, r)
    width = r.shape[1]
    patch = patch or patch_of(y.dtype)
    _token_residual[(squares_of_tokens(width), TILE // patch.tokens, len(tiles))](
        y, r if bias is None else bias, r, normed, squares, weight, tiles, *adapters, D=width, BIAS=bias is not None,
        **constants, SUB=patch.tokens, C=patch.columns, STAGES=patch.stages, num_warps=patch.warps,
        **dependent(r.device),
    )  # fmt: skip


def squares_of_tokens(width: int) -> int:
    """How many sums of squares of a token `add_residual_tokens` leaves."""
    return triton.cdiv(width, BLOCK)

"""`gated` for tokens of prompts: h = silu(gate + B'u) * (up + B'u), both normed and with their bias.

Shape legend: T tokens, N tiles, F inner channels. In kernels: SUB tokens of a program, and C columns at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import dependent, release, wait
from ..norm import Norm
from .expanded import Patch, arguments, directions_at, directions_of, expanded, rstd_of_tokens
from .matrices import Added
from .tiles import TILE, tile_of


@triton.jit(do_not_specialize=["site"])
def _token_gated(
    gate, up, squares, bias, bias_up, h, tiles, u, b, records, site,
    F: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
    EPS: tl.constexpr, IN: tl.constexpr, M: tl.constexpr, MEMBERS: tl.constexpr, SET: tl.constexpr, R: tl.constexpr,
    Q: tl.constexpr, K: tl.constexpr, LORA: tl.constexpr, SUB: tl.constexpr, C: tl.constexpr, TURNS: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
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
    n_up = directions_of(records, factors, site + 1, M, LORA)
    kept = directions_at(u, 0, token, there, 0, n, MEMBERS, R, K, LORA)
    kept_up = directions_at(u, 0, token, there, 1, n_up, MEMBERS, R, K, LORA)
    if NORM:
        rstd = rstd_of_tokens(squares, token, there, BLOCKS, PADDED, IN, EPS)[:, None]
    begin = tl.program_id(0) * (TURNS * C)
    for start in tl.range(begin, tl.minimum(begin + TURNS * C, F), C, num_stages=STAGES):
        column = start + tl.arange(0, C)
        real = column < F
        mask = there[:, None] & real[None, :]
        place = (token * F)[:, None] + column[None, :]
        g = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
        block, within = column // Q, column % Q
        # The blocks of up lie behind those of gate.
        block_up = block + (F + Q - 1) // Q
        g += expanded(kept, u, b, token, there, factors, 0, n, block, within, real, MEMBERS, SET, R, Q, K, LORA, SUB, C)
        v += expanded(
            kept_up, u, b, token, there, factors, 1, n_up, block_up, within, real, MEMBERS, SET, R, Q, K, LORA, SUB, C
        )
        if NORM:
            g *= rstd
            v *= rstd
        if BIAS:
            g += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
            v += tl.load(bias_up + column, mask=real, other=0.0).to(tl.float32)[None, :]
        tl.store(h + place, (g * tl.sigmoid(g) * v).to(h.dtype.element_ty), mask=mask)


def patch_of(dtype: torch.dtype) -> Patch:
    """What a program takes. Measured, not derived."""
    return Patch(32, 64, 1, 4, 1) if dtype == torch.float32 else Patch(32, 64, 4, 4, 2)


def gate_up_tokens(
    gate: Tensor, up: Tensor, h: Tensor, tiles: Tensor, *, update: Added | None = None, norm: Norm | None = None,
    biases: tuple[Tensor, ...] | None = None, patch: Patch | None = None,
) -> None:  # fmt: skip
    """gate and up [T, F]; h [T, F] is written, all in the model's dtype.

    tiles [N, FIELDS]; nothing is read or written of tokens that are of no tile. norm and biases [F] are those of the
    linears. patch: what a program takes, for who wants to say so.
    """
    adapters, constants = arguments(update, h)
    norms, norm_constants = Norm.arguments(norm, h)
    width = h.shape[1]
    patch = patch or patch_of(gate.dtype)
    _token_gated[(triton.cdiv(width, patch.turns * patch.columns), TILE // patch.tokens, len(tiles))](
        gate, up, norms, *(biases or (h, h)), h, tiles, *adapters, F=width, BIAS=biases is not None, **norm_constants,
        **constants, SUB=patch.tokens, C=patch.columns, TURNS=patch.turns, STAGES=patch.stages, num_warps=patch.warps,
        **dependent(h.device),
    )  # fmt: skip

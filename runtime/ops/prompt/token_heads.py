"""`rotary` for tokens of prompts: from what q, k and v put out to the queries and to the row's pages.

One program handles some tokens of a tile and some heads of one module, one after the other. Rotary mixes a head's
halves, so it has them apart.

Shape legend: T tokens, N tiles, H query heads, Hkv key and value heads, D channels of a head. In kernels: SUB tokens of
a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ...kv.formats import FULL
from ..launch import dependent, release, wait
from ..norm import Norm
from ..pages import Pages
from ..rotary import Heads
from .expanded import Patch, arguments, directions_at, directions_of, expanded, rstd_of_tokens
from .matrices import Added
from .tiles import TILE, tile_of

_PAGE: tl.constexpr = tl.constexpr(PAGE_TOKENS)


@triton.jit(do_not_specialize=["site"])
def _token_heads(
    y_q, y_k, y_v, squares, bias_q, bias_k, bias_v, query, numbers, table, cosine, sine, q_norm, k_norm, tiles, pages,
    u, b, records, site,
    H: tl.constexpr, HKV: tl.constexpr, HEAD_NORM: tl.constexpr, HEAD_EPS: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr, IN: tl.constexpr,
    M: tl.constexpr, MEMBERS: tl.constexpr, SET: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    LORA: tl.constexpr, UNIT_HEAD: tl.constexpr, F: tl.constexpr, HALF: tl.constexpr, L: tl.constexpr,
    SUB: tl.constexpr, TURNS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    # Tiles are there before the pass begins.
    first, count, row, position, factors = tile_of(tiles, tl.program_id(2))
    wait(PDL)
    lane = tl.program_id(1) * SUB + tl.arange(0, SUB)
    if tl.program_id(1) * SUB >= count:
        return
    HEAD: tl.constexpr = 2 * HALF
    # q, k and v are three modules: which one, and which of its heads.
    group = tl.program_id(0)
    GROUPS: tl.constexpr = (H + TURNS - 1) // TURNS
    SHARED: tl.constexpr = (HKV + TURNS - 1) // TURNS
    member = tl.where(group < GROUPS, 0, tl.where(group < GROUPS + SHARED, 1, 2))
    group -= tl.where(member == 0, 0, tl.where(member == 1, GROUPS, GROUPS + SHARED))
    heads = tl.where(member == 0, H, HKV)
    before = tl.where(member == 0, 0, tl.where(member == 1, H, H + HKV))
    y = y_q
    bias = bias_q
    if member == 2:
        y = y_v
        bias = bias_v
    elif member == 1:
        y = y_k
        bias = bias_k
    there = lane < count
    token = first + lane
    channel = tl.arange(0, L)
    real = channel < HALF
    mask = there[:, None] & real[None, :]
    n = directions_of(records, factors, site + member, M, LORA)
    kept = directions_at(u, 0, token, there, member, n, MEMBERS, R, K, LORA)
    if NORM:
        rstd_in = rstd_of_tokens(squares, token, there, BLOCKS, PADDED, IN, EPS)[:, None]
    position += lane
    # Values are not turned.
    turned = mask & (member < 2)
    angle = (position * HALF)[:, None] + channel[None, :]
    cos = tl.load(cosine + angle, mask=turned, other=1.0)
    sin = tl.load(sine + angle, mask=turned, other=0.0)
    # A unit has some tokens' keys, and behind them their values.
    PART: tl.constexpr = _PAGE // F
    slot = position % _PAGE
    paged = there & (member > 0)
    unit = tl.load(table + (row * pages + position // _PAGE) * F + slot // PART, mask=paged, other=0).to(tl.int64)
    in_page = unit * (HKV * UNIT_HEAD) + ((member - 1) * PART + slot % PART) * HEAD
    out = query
    if member > 0:
        out = numbers
    target = tl.where(member == 0, token.to(tl.int64) * (H * HEAD), in_page)[:, None] + channel[None, :]
    # From a head to the next of a token.
    stride = tl.where(member == 0, HEAD, UNIT_HEAD)
    place = (token * (heads * HEAD))[:, None] + channel[None, :]
    for head in tl.range(group * TURNS, tl.minimum((group + 1) * TURNS, heads), num_stages=STAGES):
        y0 = tl.load(y + place + head * HEAD, mask=mask, other=0.0).to(tl.float32)
        y1 = tl.load(y + place + head * HEAD + HALF, mask=mask, other=0.0).to(tl.float32)
        # A block of B' is a head.
        block = before + head
        y0 += expanded(
            kept, u, b, token, there, factors, member, n, block, channel, real, MEMBERS, SET, R, Q, K, LORA, SUB, L
        )
        y1 += expanded(
            kept, u, b, token, there, factors, member, n, block, channel + HALF, real, MEMBERS, SET, R, Q, K, LORA, SUB,
            L,
        )  # fmt: skip
        if NORM:
            y0 *= rstd_in
            y1 *= rstd_in
        if BIAS:
            own_bias = bias + head * HEAD + channel
            y0 += tl.load(own_bias, mask=real, other=0.0).to(tl.float32)[None, :]
            y1 += tl.load(own_bias + HALF, mask=real, other=0.0).to(tl.float32)[None, :]
        # Two conditions: without norms there are no weights, and the compiler must not look at what reads them.
        if HEAD_NORM:  # noqa: SIM102
            if member < 2:
                # Columns that are not real are 0.
                rstd = tl.rsqrt(tl.sum(y0 * y0 + y1 * y1, axis=1) / HEAD + HEAD_EPS)[:, None]
                scale = q_norm
                if member == 1:
                    scale = k_norm
                y0 *= rstd * tl.load(scale + channel, mask=real, other=0.0).to(tl.float32)[None, :]
                y1 *= rstd * tl.load(scale + HALF + channel, mask=real, other=0.0).to(tl.float32)[None, :]
        at = out + head * stride + target
        tl.store(at, (y0 * cos - y1 * sin).to(query.dtype.element_ty), mask=mask)
        tl.store(at + HALF, (y1 * cos + y0 * sin).to(query.dtype.element_ty), mask=mask)


def patch_of(dtype: torch.dtype) -> Patch:
    """What a program takes; columns are a head's, turns are heads. Measured, not derived."""
    return Patch(32, 0, 1, 4, 1) if dtype == torch.float32 else Patch(64, 0, 4, 8, 3)


def rotate_tokens(
    y: tuple[Tensor, Tensor, Tensor], query: Tensor, pages: Pages, heads: Heads, tiles: Tensor, *,
    update: Added | None = None, norm: Norm | None = None, biases: tuple[Tensor, ...] | None = None,
    patch: Patch | None = None,
) -> None:  # fmt: skip
    """q, k and v of tokens, y [T, H D], [T, Hkv D] and [T, Hkv D] in the model's dtype -> query [T, H, D], and the live
    pages of their rows, the tables of which name the units of all of the tiles' positions.

    tiles [N, FIELDS]; nothing is read or written of tokens that are of no tile. D is a multiple of 4, and a block of
    B' has as many columns; the rotary halves are the first and the last D / 2 channels of a head. norm and biases are
    those of the linears. patch: what a program takes, for who wants to say so; its turns are heads.
    """
    adapters, constants = arguments(update, query)
    norms, norm_constants = Norm.arguments(norm, query)
    _, count, width = query.shape
    assert update is None or update.factors.columns == width, "a block of B' must be a head"
    units, tables = pages.units, pages.tables
    weights = (heads.q_norm, heads.k_norm) if heads.q_norm is not None and heads.k_norm is not None else (query, query)
    patch = patch or patch_of(y[0].dtype)
    groups = triton.cdiv(count, patch.turns) + 2 * triton.cdiv(units.heads, patch.turns)
    _token_heads[(groups, TILE // patch.tokens, len(tiles))](
        *y, norms, *(biases or (query,) * 3), query, pages.memory.view(query.dtype), tables.full, heads.cosine,
        heads.sine, *weights, tiles, tables.full.shape[1], *adapters, H=count, HKV=units.heads,
        HEAD_NORM=heads.q_norm is not None, HEAD_EPS=heads.eps, BIAS=biases is not None, **norm_constants, **constants,
        UNIT_HEAD=units.head_bytes // units.itemsize, F=units.of(FULL), HALF=width // 2,
        L=max(16, triton.next_power_of_2(width // 2)), SUB=patch.tokens, TURNS=patch.turns,
        STAGES=patch.stages, num_warps=patch.warps, **dependent(query.device),
    )  # fmt: skip

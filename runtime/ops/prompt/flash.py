"""Attention of a prompt's tokens over the pages of their rows, of every format, in one launch.

One program handles up to a tile of tokens of one row, its queries, and one query head. It walks over what the tokens
see with a running softmax (flash attention): coded pages first, then pages in the model's dtype, as if those followed
each other. Of these it goes without any mask as far as every query sees all, and with one over the few steps behind.
Products are on tensor cores; what is coded becomes numbers of the model's dtype on the way there.

The pages already hold the keys and values of the tokens themselves. Settled pages all lie before a tile, so causality
is a matter of live pages alone, and of those the page number, hence the position, is the entry.

A late tile sees more than an early one of its row, so late ones start first: what is left for the end is short.
Softmaxes are base 2: log2(e) is folded into the scale. Source: Dao 2023, FlashAttention-2, arXiv 2307.08691.

Shape legend: T tokens of a pass, N tiles, H query heads, Hkv KV heads, D channels of a head.
In kernels: D of WIDTH; ROWS queries of a program; TOKENS of a step; F units of a page, of PART tokens each; HEAD bytes
of a head in a unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ...kv.formats import FULL
from ..attend import NOTHING, PAGE
from ..launch import dependent, dot, release, wait
from ..pages import Pages
from .tiles import TILE, tile_of

_HALF: tl.constexpr = tl.constexpr(PAGE_TOKENS // 2)
_DOT_SIDE = 16
"""The least side of a matrix that tensor cores multiply."""


@dataclass(frozen=True)
class Steps:
    """How a program goes through what its tokens see."""

    queries: int
    """Tokens of a program; a power of two that divides a tile, at least 16"""
    tokens: int
    """Of a step, a power of two, at least a page"""
    warps: int
    stages: int
    """Of Triton's pipeline; 1: a step is read when it is due"""
    coded_stages: int = 1

    @classmethod
    def of(cls, channels: int, dtype: torch.dtype) -> Steps:
        """The largest that spill nothing, read off the kernels compiled for an H200; numbers in float32 are multiplied
        without tensor cores, of which a program takes fewer."""
        wide = channels > 128
        if dtype == torch.float32:
            return cls(16 if wide else 32, 16, 4 if wide else 8, 2)
        return cls(64, 32, 8, 3) if wide else cls(128, 64, 8, 3)


@triton.jit
def _full_step(
    full, table, head, start, begin, end, kept, shift, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    HEAD: tl.constexpr, F: tl.constexpr, PART: tl.constexpr, CODED: tl.constexpr, MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Keys and values [TOKENS, WIDTH] of one KV head in the model's dtype, from token `start` on, the first of its
    page; HEAD in numbers. MASKED: those before `begin` and from `end` on are 0, as 0 times what lies there need not be
    0; else all are there."""
    lane = tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH)
    entry = start // PAGE + lane // PAGE
    if CODED:  # behind those that stay full for good come the live ones
        entry += tl.where(entry < kept, 0, shift)
    place = table + entry * F + lane % PAGE // PART
    if MASKED:
        seen = (lane < end - start) & (lane >= begin - start)
        unit = tl.load(place, mask=seen, other=0).to(tl.int64)
        mask = seen[:, None] & (channel < D)[None, :]
    else:
        unit = tl.load(place).to(tl.int64)
        mask = (channel < D)[None, :]
    at = (unit * (HKV * HEAD) + head * HEAD + lane % PART * D)[:, None] + channel[None, :]
    return tl.load(full + at, mask=mask, other=0.0), tl.load(full + at + PART * D, mask=mask, other=0.0)


@triton.jit
def _coded_step(
    codes, scales, table, head, start, pages, kind: tl.constexpr, BITS: tl.constexpr, HKV: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Keys and values [TOKENS, WIDTH] in `kind` of pages in int8 or int4, from the table's entry `start` on, and which
    are there [TOKENS]; the others are 0."""
    lane = tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH)
    page, token = start + lane // PAGE, lane % PAGE
    there = page < pages
    mask = there[:, None] & (channel < D)[None, :]
    if BITS == 8:
        k_unit = tl.load(table + 2 * page, mask=there, other=0).to(tl.int64)
        v_unit = tl.load(table + 2 * page + 1, mask=there, other=0).to(tl.int64)
        byte_row, values = token, 0
    else:
        k_unit = tl.load(table + page, mask=there, other=0).to(tl.int64)
        v_unit = k_unit
        byte_row, values = token % _HALF, _HALF * D
    k_unit = k_unit * (HKV * HEAD) + head * HEAD
    v_unit = v_unit * (HKV * HEAD) + head * HEAD
    own = (byte_row * D)[:, None] + channel[None, :]
    k = tl.load(codes + k_unit[:, None] + own, mask=mask, other=0)
    v = tl.load(codes + (v_unit + values)[:, None] + own, mask=mask, other=0)
    if BITS == 4:  # tokens of the page's second half are in the upper halves of bytes
        up = (token // _HALF * 4).to(tl.uint8)[:, None]
        k = (k >> up) & 15
        v = (v >> up) & 15
    ZERO: tl.constexpr = 2 ** (BITS - 1)
    k_scale = tl.load(scales + (k_unit // 2 + _HALF * D)[:, None] + channel[None, :], mask=mask, other=0.0)
    at = v_unit // 2 + (_HALF + 1) * D + token % _HALF * 2 + token // _HALF
    v_scale = tl.load(scales + at, mask=there, other=0.0)
    k = ((k.to(tl.float32) - ZERO) * k_scale.to(tl.float32)).to(kind)
    v = ((v.to(tl.float32) - ZERO) * v_scale.to(tl.float32)[:, None]).to(kind)
    return k, v, there


@triton.jit
def _scores(q, k, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """[ROWS, TOKENS], not yet scaled."""
    return dot(q, tl.trans(k), tl.zeros([ROWS, TOKENS], tl.float32))


@triton.jit
def _added(score, v, factor, top, total, far, sums, before, DISTANT: tl.constexpr):
    """The softmax with a step's scores and values in it; `far` too, by weights of tokens that are `before`, if DISTANT.
    Scores are scaled where they meet the maximum: the two are one operation."""
    higher = tl.maximum(top, tl.max(score, axis=1) * factor)
    fade = tl.exp2(top - higher)
    weight = tl.exp2(score * factor - higher[:, None])
    total = total * fade + tl.sum(weight, axis=1)
    if DISTANT:
        far = far * fade + tl.sum(tl.where(before, weight, 0.0), axis=1)
    sums = dot(weight.to(v.dtype), v, sums * fade[:, None])
    return higher, total, far, sums


@triton.jit
def _coded_pages(
    q, codes, scales, table, head, pages, factor, top, total, far, sums, BITS: tl.constexpr, HKV: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The softmax with all `pages` pages of a coded format in it: every query sees them."""
    for start in tl.range(0, pages, TOKENS // PAGE, num_stages=STAGES):
        k, v, there = _coded_step(
            codes, scales, table, head, start, pages, q.dtype, BITS, HKV, D, WIDTH, HEAD, TOKENS
        )  # fmt: skip
        score = tl.where(there[None, :], _scores(q, k, ROWS, TOKENS), float("-inf"))
        top, total, far, sums = _added(score, v, factor, top, total, far, sums, there, False)
    return top, total, far, sums


@triton.jit
def _attend_prompt(
    query, codes, full, scales, out, distant, table, table8, table4, settled, counts, tiles, factor,
    MAXPAGES: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    HEAD: tl.constexpr, F: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, WINDOW: tl.constexpr,
    DISTANT: tl.constexpr, RECENT: tl.constexpr, CODED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, CODED_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    NUMBERS: tl.constexpr = HEAD // (full.dtype.element_ty.primitive_bitwidth // 8)
    release(PDL)
    own = tl.program_id(0)
    head = own // (H // HKV)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    wait(PDL)
    first, count, row, position, _factors = tile_of(tiles, part // PARTS)
    first += part % PARTS * ROWS
    position += part % PARTS * ROWS
    count = tl.minimum(count - part % PARTS * ROWS, ROWS)
    if count > 0:
        table += row * (MAXPAGES * F)
        index = tl.arange(0, ROWS)
        channel = tl.arange(0, WIDTH)
        lane = tl.arange(0, TOKENS)
        real = (index < count)[:, None] & (channel < D)[None, :]
        place = ((first + index) * (H * D) + own * D)[:, None] + channel[None, :]
        q = tl.load(query + place, mask=real, other=0.0)
        top = tl.full([ROWS], NOTHING, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        far = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, WIDTH], tl.float32)
        kept, shift = 0, 0
        if CODED:
            kept = tl.load(counts + row * 3)
            shift = tl.load(settled + row) - kept
            top, total, far, sums = _coded_pages(
                q, codes, scales, table8 + row * (MAXPAGES * 2), head, tl.load(counts + row * 3 + 1), factor, top,
                total, far, sums, 8, HKV, D, ROWS, WIDTH, HEAD, TOKENS, CODED_STAGES,
            )  # fmt: skip
            top, total, far, sums = _coded_pages(
                q, codes, scales, table4 + row * MAXPAGES, head, tl.load(counts + row * 3 + 2), factor, top,
                total, far, sums, 4, HKV, D, ROWS, WIDTH, HEAD, TOKENS, CODED_STAGES,
            )  # fmt: skip
        # From here on as if the pages in the model's dtype followed each other: coded and dropped ones are left out of
        # where the first query is, and of where what is distant to each query ends, which they all lie before.
        at = position - shift * PAGE
        end = at + count
        boundary = ((position + index) // PAGE + 1 - RECENT - shift) * PAGE
        # Steps up to here all queries see, and they are distant to all where that is asked.
        whole = at + 1
        if DISTANT:
            whole = tl.minimum(whole, tl.maximum(position // PAGE + 1 - RECENT - shift, 0) * PAGE)
        whole = whole // TOKENS * TOKENS
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(at + 1 - WINDOW, 0)
            whole = begin // PAGE * PAGE
        else:
            for start in tl.range(0, whole, TOKENS, num_stages=STAGES):
                k, v = _full_step(
                    full, table, head, start, 0, 0, kept, shift, HKV, D, WIDTH, NUMBERS, F, PART, CODED, False, TOKENS
                )  # fmt: skip
                score = _scores(q, k, ROWS, TOKENS)
                top, total, far, sums = _added(score, v, factor, top, total, far, sums, False, False)
        far = total
        for start in tl.range(whole, end, TOKENS, num_stages=STAGES):
            k, v = _full_step(
                full, table, head, start, begin, end, kept, shift, HKV, D, WIDTH, NUMBERS, F, PART, CODED, True, TOKENS
            )  # fmt: skip
            # How far behind its query a token is
            behind = (at + index)[:, None] - (start + lane)[None, :]
            seen = behind >= 0
            if WINDOW > 0:
                seen = seen & (behind < WINDOW)
            score = tl.where(seen, _scores(q, k, ROWS, TOKENS), float("-inf"))
            before = (start + lane)[None, :] < boundary[:, None]
            top, total, far, sums = _added(score, v, factor, top, total, far, sums, before, DISTANT)
        # Queries that are not there may see nothing.
        norm = 1.0 / tl.where(total > 0.0, total, 1.0)
        tl.store(out + place, (sums * norm[:, None]).to(out.dtype.element_ty), mask=real)
        if DISTANT:
            tl.store(distant + (first + index) * H + own, far * norm, mask=index < count)


def attend_prompt(
    query: Tensor, pages: Pages, out: Tensor, tiles: Tensor, *, scale: float, distant: Tensor | None = None,
    recent_pages: int = 0, window: int = 0, steps: Steps | None = None,
) -> None:  # fmt: skip
    """Launch it: `reference.prompt_attention.attend_prompt` of query [T, H, D] into `out` [T, H * D] and, where given,
    `distant` [T, H] float32, for the tokens of `tiles` [N, 8] (`tiles.written`); of others nothing is read or written.

    All tensors are contiguous. `scale` is above 0. Where pages may be coded there is no window, and none of the last
    `recent_pages` pages of any token is coded or dropped.
    """
    _, heads, channels = query.shape
    tables, units, memory = pages.tables, pages.units, pages.memory
    assert not (units.coded and window), "which token a coded page begins with is not known"
    assert scale > 0, "the largest score must be so when scaled too"
    steps = steps or Steps.of(channels, query.dtype)
    parts = TILE // steps.queries
    _attend_prompt[(heads, len(tiles) * parts)](
        query, memory, memory.view(query.dtype), memory.view(torch.bfloat16), out, distant, tables.full, tables.int8,
        tables.int4, tables.settled, tables.counts, tiles, scale * math.log2(math.e), MAXPAGES=tables.full.shape[1],
        H=heads, HKV=units.heads, D=channels, WIDTH=max(_DOT_SIDE, triton.next_power_of_2(channels)),
        HEAD=units.head_bytes, F=units.of(FULL), PART=units.part_tokens, PARTS=parts, WINDOW=window,
        DISTANT=distant is not None, RECENT=recent_pages, CODED=units.coded, ROWS=steps.queries, TOKENS=steps.tokens,
        STAGES=steps.stages, CODED_STAGES=steps.coded_stages, num_warps=steps.warps, **dependent(query.device),
    )  # fmt: skip

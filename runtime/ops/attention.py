"""Attention of one new token per row over its pages, split over the context (flash-decoding), in one launch.

One program reads the keys and values of one row and one KV head, for all query heads that share it, over a contiguous
share of the row's pages. The grid is fixed when a graph is captured, shares are not: they follow from the row's length
on the device, and a program whose share is empty does nothing. Whoever finishes last of a row and KV head merges the
partial results of all; where one share holds all pages there is nothing to merge.

Softmaxes are base 2: log2(e) is folded into the scale. Source: Dao et al. 2023, flash-decoding; Milakov and Gimelshein,
arXiv 1805.02867, for merging.

Shape legend: B rows, H query heads, Hkv KV heads, G = H / Hkv of them share one, D channels of a head, P pages.
In kernels: GROUP = G, of which a tile has ROWS; D of WIDTH; TOKENS of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.settings import PAGE_TOKENS

from .launch import dependent, dot, fetch, release, wait

_PAGE: tl.constexpr = tl.constexpr(PAGE_TOKENS)
# The maximum over no scores. Finite: the difference of two of them is 0, not NaN.
_NOTHING: tl.constexpr = tl.constexpr(-1e38)
_DOT_SIDE = 16
"""The least side of a matrix that tensor cores multiply."""


@dataclass(frozen=True)
class Tiles:
    """How a program goes through its share."""

    tokens: int
    """Of one step, a power of two, at least a page."""
    warps: int
    stages: int
    """Of Triton's pipeline: with 3, and 5 where tensor cores multiply, two steps are on their way to shared memory, as
    their page numbers must be there before them; with 1 a step is read into registers when it is due."""
    ahead: int = 8
    """Pages that are fetched into the L2 cache while the kernel before still runs"""

    @classmethod
    def of(cls, group: int, channels: int, dtype: torch.dtype, splits: int) -> Tiles:
        """Steps of 8 KiB of keys, or 16 where several heads share what is read: so four and three programs fit on a
        multiprocessor of an H100, with 128 KiB or more under way. Read off the compiled kernels. Of short shares two
        warps are faster than four (measured, one row of 512 tokens)."""
        row_bytes = triton.next_power_of_2(channels) * dtype.itemsize
        step_bytes, stages = (2**13, 3) if group == 1 else (2**14, 5)
        return cls(min(128, max(PAGE_TOKENS, step_bytes // row_bytes)), 2 if splits > 1 and group == 1 else 4, stages)


@dataclass(frozen=True)
class AttentionScratch:
    """What the programs of one launch leave for the last of them; launches that follow each other share it."""

    sums: Tensor
    """[B, H, splits, D] float32: values by weights, of each share by its own maximum."""
    softmax: Tensor
    """[B, H, splits, 3] float32: maximum score, sum of weights, and the part of it on distant slots."""
    arrived: Tensor
    """[B, H] int32: shares that are done, at the first head of those that share a KV head; 0 between launches."""

    @classmethod
    def of(cls, rows: int, heads: int, head_dim: int, splits: int, device: torch.device) -> AttentionScratch:
        """For batches of up to `rows` rows; D = `head_dim`."""
        return cls(
            torch.empty(rows, heads, splits, head_dim, device=device),
            torch.empty(rows, heads, splits, 3, device=device),
            torch.zeros(rows, heads, dtype=torch.int32, device=device),
        )


@triton.jit
def _tile(
    keys, values, table, head, start, begin, end, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Keys and values [TOKENS, WIDTH] of one KV head from token `start` on, the first of its page, and which are seen;
    the others are 0: 0 times what lies there need not be 0."""
    lane = tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH)
    seen = lane < end - start
    if WINDOW > 0:
        seen = seen & (lane >= begin - start)
    page = tl.load(table + start // _PAGE + lane // _PAGE, mask=seen, other=0).to(tl.int64)
    at = (page * (HKV * _PAGE * D))[:, None] + ((head * _PAGE + lane % _PAGE) * D)[:, None] + channel[None, :]
    mask = seen[:, None] & (channel < D)[None, :]
    return tl.load(keys + at, mask=mask, other=0.0), tl.load(values + at, mask=mask, other=0.0), seen


@triton.jit
def _attend_alone(
    query, keys, values, table, head, begin, first, end, boundary, factor, HKV: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, DISTANT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_attend_group` for a query head that shares with no other: ROWS = 1.

    Every lane of a tile keeps a softmax of its own, so that no warp waits for another before the end.
    """
    lane = tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH)
    q = tl.load(query + channel, mask=channel < D, other=0.0).to(tl.float32) * factor
    top = tl.full([TOKENS], _NOTHING, tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    far = tl.zeros([TOKENS], tl.float32)
    sums = tl.zeros([TOKENS, WIDTH], tl.float32)
    for start in tl.range(first, end, TOKENS, num_stages=STAGES):
        k, v, seen = _tile(keys, values, table, head, start, begin, end, HKV, D, WIDTH, WINDOW, TOKENS)
        score = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], axis=1), float("-inf"))
        higher = tl.maximum(top, score)
        fade = tl.exp2(top - higher)
        weight = tl.exp2(score - higher)
        total = total * fade + weight
        if DISTANT:
            far = far * fade + tl.where(lane < boundary - start, weight, 0.0)
        sums = sums * fade[:, None] + weight[:, None] * v.to(tl.float32)
        top = higher
    highest = tl.max(top, axis=0, keep_dims=True)
    fade = tl.exp2(top - highest)
    total = tl.sum(total * fade, axis=0, keep_dims=True)
    far = tl.sum(far * fade, axis=0, keep_dims=True)
    return highest, total, far, tl.sum(sums * fade[:, None], axis=0, keep_dims=True)


@triton.jit
def _attend_group(
    query, keys, values, table, head, begin, first, end, boundary, factor, HKV: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, DISTANT: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Over tokens `first` to `end`, those before `begin` unseen: the maximum score, the sum of weights and the part of
    it before `boundary` [ROWS], and values summed by weight [ROWS, WIDTH], all float32."""
    lane = tl.arange(0, TOKENS)
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    q = tl.load(query + row * D + channel, mask=(row < GROUP) & (channel < D), other=0.0)
    top = tl.full([ROWS], _NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    far = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(first, end, TOKENS, num_stages=STAGES):
        k, v, seen = _tile(keys, values, table, head, start, begin, end, HKV, D, WIDTH, WINDOW, TOKENS)
        score = dot(q, tl.trans(k), tl.zeros([ROWS, TOKENS], tl.float32)) * factor
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        fade = tl.exp2(top - higher)
        weight = tl.exp2(score - higher[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        if DISTANT:
            far = far * fade + tl.sum(tl.where((lane < boundary - start)[None, :], weight, 0.0), axis=1)
        sums = dot(weight.to(v.dtype), v, sums * fade[:, None])
        top = higher
    return top, total, far, sums


@triton.jit
def _merged(
    sums, softmax, live, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, DISTANT: tl.constexpr,
):  # fmt: skip
    """What `_attend_group` returns but the maximum, of the first `live` shares together."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    top = tl.full([ROWS], _NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    far = tl.zeros([ROWS], tl.float32)
    merged = tl.zeros([ROWS, WIDTH], tl.float32)
    # Unrolled: all reads are under way together. They pass by the L1, which does not see what other programs write.
    for split in tl.static_range(SPLITS):
        there = row < tl.where(live > split, GROUP, 0)
        at = row * SPLITS + split
        mask = there[:, None] & (channel < D)[None, :]
        own = tl.load(softmax + 3 * at, mask=there, other=_NOTHING, cache_modifier=".cg")
        own_total = tl.load(softmax + 3 * at + 1, mask=there, other=0.0, cache_modifier=".cg")
        own_sums = tl.load(sums + at[:, None] * D + channel[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, own)
        fade = tl.exp2(top - higher)
        rise = tl.exp2(own - higher)
        total = total * fade + own_total * rise
        if DISTANT:
            own_far = tl.load(softmax + 3 * at + 2, mask=there, other=0.0, cache_modifier=".cg")
            far = far * fade + own_far * rise
        merged = merged * fade[:, None] + own_sums * rise[:, None]
        top = higher
    return total, far, merged


@triton.jit
def _share(length, split, SPLITS: tl.constexpr, WINDOW: tl.constexpr):
    """Of a row of `length` tokens: the first that it sees, its pages, those of a share, and the first page of one."""
    begin = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    pages = tl.cdiv(length, _PAGE) - begin // _PAGE
    share = tl.cdiv(pages, SPLITS)
    return begin, pages, share, begin // _PAGE + split * share


@triton.jit
def _fetch_pages(
    keys, values, table, lengths, row, head, split, HKV: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Up to AHEAD pages of a share, while the newest token is still on its way to the last of them. So may its row's
    length be; what is fetched is looked up again after the wait."""
    length = tl.load(lengths + row)
    _, _, share, first = _share(length, split, SPLITS, WINDOW)
    for page in range(first, tl.minimum(first + tl.minimum(share, AHEAD), tl.cdiv(length, _PAGE))):
        at = (tl.load(table + page).to(tl.int64) * HKV + head) * (_PAGE * D)
        size: tl.constexpr = _PAGE * D * keys.dtype.element_ty.primitive_bitwidth // 8
        fetch(keys + at, size, True)
        fetch(values + at, size, True)


@triton.jit
def _decode_attention(
    query, keys, values, table, lengths, out, distant, partial_sums, partial_softmax, arrived, factor,
    MAXPAGES: tl.constexpr, HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, DISTANT: tl.constexpr, RECENT: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row, head, split = tl.program_id(0) // HKV, tl.program_id(0) % HKV, tl.program_id(1)
    heads = row * (HKV * GROUP) + head * GROUP
    if AHEAD > 0 and PDL:
        _fetch_pages(keys, values, table + row * MAXPAGES, lengths, row, head, split, HKV, D, SPLITS, WINDOW, AHEAD)
    wait(PDL)
    length = tl.load(lengths + row)
    begin, pages, share, first_page = _share(length, split, SPLITS, WINDOW)
    # Of a row that sees nothing the first program is at work too: it writes the zeros.
    live = tl.maximum(tl.cdiv(pages, tl.maximum(share, 1)), 1)
    if split < live:
        first = first_page * _PAGE
        end = tl.minimum(first + share * _PAGE, length)
        boundary = ((length - 1) // _PAGE + 1 - RECENT) * _PAGE
        query += heads * D
        table += row * MAXPAGES
        if GROUP == 1:
            top, total, far, sums = _attend_alone(
                query, keys, values, table, head, begin, first, end, boundary, factor, HKV, D, WIDTH, WINDOW, DISTANT,
                TOKENS, STAGES,
            )  # fmt: skip
        else:
            top, total, far, sums = _attend_group(
                query, keys, values, table, head, begin, first, end, boundary, factor, HKV, GROUP, D, ROWS, WIDTH,
                WINDOW, DISTANT, TOKENS, STAGES,
            )  # fmt: skip
        own = tl.arange(0, ROWS)
        channel = tl.arange(0, WIDTH)
        mask = (own < GROUP)[:, None] & (channel < D)[None, :]
        before = live - 1
        if SPLITS > 1 and live > 1:
            partial_sums += heads * SPLITS * D
            partial_softmax += heads * SPLITS * 3
            at = own * SPLITS + split
            tl.store(partial_sums + at[:, None] * D + channel[None, :], sums, mask=mask)
            tl.store(partial_softmax + 3 * at, top, mask=own < GROUP)
            tl.store(partial_softmax + 3 * at + 1, total, mask=own < GROUP)
            if DISTANT:
                tl.store(partial_softmax + 3 * at + 2, far, mask=own < GROUP)
            # One thread counts for all: what the others have stored comes first.
            tl.debug_barrier()
            before = tl.atomic_add(arrived + heads, 1, sem="acq_rel")
            if before == live - 1:
                total, far, sums = _merged(
                    partial_sums, partial_softmax, live, GROUP, D, ROWS, WIDTH, SPLITS, DISTANT
                )  # fmt: skip
                tl.store(arrived + heads, 0)
        if before == live - 1:
            norm = 1.0 / tl.where(total > 0.0, total, 1.0)
            result = (sums * norm[:, None]).to(out.dtype.element_ty)
            tl.store(out + (heads + own)[:, None] * D + channel[None, :], result, mask=mask)
            if DISTANT:
                tl.store(distant + heads + own, far * norm, mask=own < GROUP)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    out: Tensor,
    scratch: AttentionScratch | None,
    *,
    splits: int,
    scale: float,
    distant: Tensor | None = None,
    recent_pages: int = 0,
    window: int = 0,
    tiles: Tiles | None = None,
) -> None:
    """Launch it: `reference.attention.decode_attention` into `out` [B, H * D] and, where given, `distant` [B, H].

    All tensors are contiguous. `splits` programs share a row's pages, at most: as many as fill the device at the
    contexts expected. `scratch` is for at least these rows and heads, D and splits; a single split needs none.
    """
    rows, heads, channels = query.shape
    shared = keys.shape[1]
    group = heads // shared
    # Only a head that shares with no other is no product on the tensor cores.
    side = 1 if group == 1 else _DOT_SIDE
    tiles = tiles or Tiles.of(group, channels, query.dtype, splits)
    partial: tuple[Tensor | None, ...] = (None, None, None)
    if splits > 1:
        assert scratch is not None, "shares need a place for what they leave"
        partial = (scratch.sums, scratch.softmax, scratch.arrived)
    _decode_attention[(rows * shared, splits)](
        query, keys, values, table, lengths, out, distant, *partial, scale * math.log2(math.e),
        MAXPAGES=table.shape[1], HKV=shared, GROUP=group, D=channels,
        ROWS=max(side, triton.next_power_of_2(group)),
        WIDTH=max(side, triton.next_power_of_2(channels)), SPLITS=splits, WINDOW=window,
        DISTANT=distant is not None, RECENT=recent_pages, TOKENS=tiles.tokens, STAGES=tiles.stages, AHEAD=tiles.ahead,
        num_warps=tiles.warps, **dependent(query.device),
    )  # fmt: skip

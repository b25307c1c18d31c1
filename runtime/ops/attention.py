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

from ..kv.formats import FULL
from .attend import NOTHING, PAGE, full_alone, full_group, merge
from .attend_coded import coded_alone, coded_group, first_rows
from .launch import dependent, fetch, release, wait
from .pages import Pages

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
    coded_pages: int = 1
    """Coded pages of one step; from 2 on where heads share a KV head"""
    coded_stages: int = 3

    @classmethod
    def of(cls, group: int, channels: int, dtype: torch.dtype, splits: int, coded: bool) -> Tiles:
        """Steps of 8 KiB of keys, or 16 where several heads share what is read: so four and three programs fit on a
        multiprocessor of an H100, with 128 KiB or more under way. Read off the compiled kernels. Of short shares two
        warps are faster than four (measured, one row of 512 tokens). Where pages may be coded a head that shares with
        no other has one warp and a page a step: more wait for each other (docs/log.md)."""
        row_bytes = triton.next_power_of_2(channels) * dtype.itemsize
        step_bytes, stages = (2**13, 3) if group == 1 else (2**14, 5)
        tokens = min(128, max(PAGE_TOKENS, step_bytes // row_bytes))
        if group > 1:
            return cls(tokens, 4, stages, coded_pages=max(2, _DOT_SIDE // triton.next_power_of_2(group)))
        return cls(PAGE_TOKENS, 1, stages) if coded else cls(tokens, 2 if splits > 1 else 4, stages)


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
def _merged(
    sums, softmax, live, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, DISTANT: tl.constexpr,
):  # fmt: skip
    """What `_attend_group` returns but the maximum, of the first `live` shares together."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    top = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    far = tl.zeros([ROWS], tl.float32)
    merged = tl.zeros([ROWS, WIDTH], tl.float32)
    # Unrolled: all reads are under way together. They pass by the L1, which does not see what other programs write.
    for split in tl.static_range(SPLITS):
        there = row < tl.where(live > split, GROUP, 0)
        at = row * SPLITS + split
        mask = there[:, None] & (channel < D)[None, :]
        own = tl.load(softmax + 3 * at, mask=there, other=NOTHING, cache_modifier=".cg")
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
def _share(count, split, SPLITS: tl.constexpr):
    """Of `count` pages those of one share, first and stop, and how many shares have any."""
    share = tl.cdiv(count, SPLITS)
    first = tl.minimum(split * share, count)
    return first, tl.minimum(first + share, count), tl.cdiv(count, tl.maximum(share, 1))


@triton.jit
def _row(lengths, settled, counts, row, WINDOW: tl.constexpr, CODED: tl.constexpr):
    """Of a row: its tokens, the first that is seen, settled pages in the model's dtype, how much further on the entries
    of the others are, and all pages in that dtype."""
    length = tl.load(lengths + row)
    begin = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    pages = tl.cdiv(length, PAGE)
    kept, shift = 0, 0
    if CODED:
        kept = tl.load(counts + row * 3)
        shift = tl.load(settled + row) - kept
    return length, begin, kept, shift, pages - shift


@triton.jit
def _fetch_pages(
    units, table, head, first, stop, kept, shift, HKV: tl.constexpr, HEAD: tl.constexpr, UNITS: tl.constexpr,
    BYTES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Up to AHEAD pages of a share, BYTES of each unit, while the newest token is still on its way to the last of them.
    So may its row's length be; what is fetched is looked up again after the wait."""
    for page in range(first, tl.minimum(first + AHEAD, stop)):
        entry = page + tl.where(page < kept, 0, shift)
        for part in tl.static_range(UNITS):
            unit = tl.load(table + entry * UNITS + part).to(tl.int64)
            fetch(units + (unit * HKV + head) * HEAD, BYTES, True)


@triton.jit
def _decode_attention(
    query, units, words, full, scales, out, distant, partial_sums, partial_softmax, arrived, table, table8, table4,
    lengths, settled, counts, factor,
    MAXPAGES: tl.constexpr, HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    OUT: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, F: tl.constexpr, PART: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, DISTANT: tl.constexpr, RECENT: tl.constexpr, CODED: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, CODED_PAGES: tl.constexpr, LANES: tl.constexpr,
    CODED_STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    ITEM: tl.constexpr = full.dtype.element_ty.primitive_bitwidth // 8
    release(PDL)
    row, head, split = tl.program_id(0) // HKV, tl.program_id(0) % HKV, tl.program_id(1)
    heads = row * (HKV * GROUP) + head * GROUP
    table += row * (MAXPAGES * F)
    table8 += row * (MAXPAGES * 2)
    table4 += row * MAXPAGES
    if AHEAD > 0 and PDL:
        _, begin, kept, shift, pages = _row(lengths, settled, counts, row, WINDOW, CODED)
        first, stop, _ = _share(pages - begin // PAGE, split, SPLITS)
        first += begin // PAGE
        stop += begin // PAGE
        _fetch_pages(units, table, head, first, stop, kept, shift, HKV, HEAD, F, 2 * PART * D * ITEM, AHEAD)
        if CODED:
            first, stop, _ = _share(tl.load(counts + row * 3 + 1), split, SPLITS)
            _fetch_pages(units, table8, head, first, stop, 0, 0, HKV, HEAD, 2, HEAD, AHEAD)
            first, stop, _ = _share(tl.load(counts + row * 3 + 2), split, SPLITS)
            _fetch_pages(units, table4, head, first, stop, 0, 0, HKV, HEAD, 1, HEAD, AHEAD)
    wait(PDL)
    length, begin, kept, shift, pages = _row(lengths, settled, counts, row, WINDOW, CODED)
    first_page, stop_page, live = _share(pages - begin // PAGE, split, SPLITS)
    first8, stop8, first4, stop4 = 0, 0, 0, 0
    if CODED:
        first8, stop8, live8 = _share(tl.load(counts + row * 3 + 1), split, SPLITS)
        first4, stop4, live4 = _share(tl.load(counts + row * 3 + 2), split, SPLITS)
        live = tl.maximum(live, tl.maximum(live8, live4))
    # Of a row that sees nothing the first program is at work too: it writes the zeros.
    live = tl.maximum(live, 1)
    if split < live:
        first = (begin // PAGE + first_page) * PAGE
        # As if the pages in the model's dtype followed each other.
        end = tl.minimum((begin // PAGE + stop_page) * PAGE, length - shift * PAGE)
        boundary = ((length - 1) // PAGE + 1 - RECENT - shift) * PAGE
        query += heads * D
        if GROUP == 1:
            top, total, far, sums = full_alone(
                query, full, table, head, begin, first, end, boundary, factor, kept, shift, HKV, D, WIDTH,
                HEAD // ITEM, F, PART, WINDOW, DISTANT, CODED, TOKENS, STAGES,
            )  # fmt: skip
        else:
            top, total, far, sums = full_group(
                query, full, table, head, begin, first, end, boundary, factor, kept, shift, HKV, GROUP, D, ROWS, WIDTH,
                HEAD // ITEM, F, PART, WINDOW, DISTANT, CODED, TOKENS, STAGES,
            )  # fmt: skip
        if CODED:
            if GROUP == 1:
                top2, total2, far2, sums2 = coded_alone(
                    query, words, table8, first8, stop8, table4, first4, stop4, head, factor, HKV, D, WIDTH, HEAD,
                    CODED_PAGES, LANES, CODED_STAGES,
                )  # fmt: skip
            else:
                top, total, far, sums = first_rows(top, total, far, sums, ROWS, OUT, WIDTH)
                top2, total2, far2, sums2 = coded_group(
                    query, units, scales, table8, first8, stop8, table4, first4, stop4, head, factor, HKV, GROUP, D,
                    OUT, WIDTH, HEAD, CODED_PAGES, CODED_STAGES,
                )  # fmt: skip
            top, total, far, sums = merge(top, total, far, sums, top2, total2, far2, sums2)
        own = tl.arange(0, OUT)
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
                    partial_sums, partial_softmax, live, GROUP, D, OUT, WIDTH, SPLITS, DISTANT
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
    pages: Pages,
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

    All tensors are contiguous. `splits` programs share a row's pages, at most: as many
    as fill the device at the contexts expected. `scratch` is for at least these rows and heads, D and splits; a single
    split needs none. Where pages may be coded there is no window, and no recent page is.
    """
    rows, heads, channels = query.shape
    tables, units, memory = pages.tables, pages.units, pages.memory
    group = heads // units.heads
    # Only a head that shares with no other is no product on the tensor cores.
    side = 1 if group == 1 else _DOT_SIDE
    coded = units.coded
    assert not (coded and window), "which token a coded page begins with is not known"
    tiles = tiles or Tiles.of(group, channels, query.dtype, splits, coded)
    shown = triton.next_power_of_2(group)
    rows_of_tile, width = max(side, shown), max(side, triton.next_power_of_2(channels))
    partial: tuple[Tensor | None, ...] = (None, None, None)
    if splits > 1:
        assert scratch is not None, "shares need a place for what they leave"
        partial = (scratch.sums, scratch.softmax, scratch.arrived)
    views = (memory, memory.view(torch.int32), memory.view(query.dtype), memory.view(torch.bfloat16))
    _decode_attention[(rows * units.heads, splits)](
        query, *views, out, distant, *partial, tables.full, tables.int8, tables.int4, tables.lengths, tables.settled,
        tables.counts, scale * math.log2(math.e), MAXPAGES=tables.full.shape[1], HKV=units.heads, GROUP=group,
        D=channels, ROWS=rows_of_tile, OUT=shown if coded else rows_of_tile, WIDTH=width, HEAD=units.head_bytes,
        F=units.of(FULL), PART=units.part_tokens, SPLITS=splits, WINDOW=window, DISTANT=distant is not None,
        RECENT=recent_pages, CODED=coded, TOKENS=tiles.tokens, STAGES=tiles.stages, CODED_PAGES=tiles.coded_pages,
        # A warp reads as many rows of bytes at once, sixteen bytes a thread.
        LANES=min(PAGE_TOKENS // 2, max(1, 512 // width)), CODED_STAGES=tiles.coded_stages, AHEAD=tiles.ahead,
        num_warps=tiles.warps, **dependent(query.device),
    )  # fmt: skip

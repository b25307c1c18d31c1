"""Which units every row's pages are, on the device: pages begin, leave the window and go without the host.

A step opens with `turn`. It gives back what the step before has coded away, says what becomes of at most one page a
row, and begins a page where a token needs one; `quantise` then writes what has got fewer bits. At most one page a row
is due at a step of decode; a prompt may leave several due, which then go one a step. Free units are a stack. All rows
are one program, so who takes which unit follows from sums over rows, and no lock is needed.

Units on the stack, units that tables name and those whose pages were coded away at the last step are all units, each
once, between any two steps.

Shape legend: B rows, P pages of a row, F units of a page in the model's dtype, U units, n rows that come or go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ..kv.formats import FULL, INT4, INT8, NONE
from ..kv.units import Units
from .launch import dependent, release, wait

_PAGE: tl.constexpr = tl.constexpr(PAGE_TOKENS)
_NONE: tl.constexpr = tl.constexpr(NONE)
_FULL: tl.constexpr = tl.constexpr(FULL)
_INT8: tl.constexpr = tl.constexpr(INT8)
_INT4: tl.constexpr = tl.constexpr(INT4)
_TILE = 256
"""Units that are handed over at a time when rows come or go."""


def _zeros(device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class PageTables:
    """Which units every row's pages are.

    Of `full` entry p is page p of the row as long as that is live, its format not final; settled pages that stay in the
    model's dtype are its first entries, of which there are never more than settled pages. `int8` and `int4` only grow,
    in the order of pages. Entries that are neither mean nothing.
    """

    full: Tensor
    """[B, P, F] int32"""
    int8: Tensor
    """[B, P, 2] int32"""
    int4: Tensor
    """[B, P, 1] int32"""
    lengths: Tensor
    """[B] int32: tokens whose keys and values are there; 0: row not in use"""
    settled: Tensor
    """[B] int32: pages, from the first on, whose format is final"""
    counts: Tensor
    """[B, 3] int32: those of them in the model's dtype, in int8 and in int4: each table's first entries"""

    @classmethod
    def of(cls, rows: int, pages: int, units: Units, device: torch.device) -> PageTables:
        """Of rows that are not in use, with room for `pages` pages each."""
        full, int8, int4 = (_zeros(device, rows, pages, number) for number in (units.of(FULL), 2, 1))
        return cls(full, int8, int4, _zeros(device, rows), _zeros(device, rows), _zeros(device, rows, 3))


@dataclass(frozen=True)
class Pages:
    """A layer's pages of all rows."""

    memory: Tensor
    """[U, Hkv, head_bytes] uint8"""
    tables: PageTables
    units: Units


@dataclass(frozen=True)
class FreeUnits:
    """Units that nobody has."""

    stack: Tensor
    """[U] int32: the first `top` are free, the last of them is the next to go"""
    top: Tensor
    """[1] int32"""
    dry: Tensor
    """[1] int32: how many rows could not begin a page for want of units. Whoever lets rows in sees to it that none ever
    is; what such a row reads and writes from then on are units of others, and only tests go on from there."""

    @classmethod
    def of(cls, units: int, device: torch.device) -> FreeUnits:
        """All of `units` units."""
        stack = torch.arange(units, dtype=torch.int32, device=device)
        return cls(stack, torch.full((1,), units, dtype=torch.int32, device=device), _zeros(device, 1))


@dataclass(frozen=True)
class Turned:
    """What has become of pages at this step, at most one a row. Units mean something only where the code says so."""

    code: Tensor
    """[B] int32: the format that a page of the row has got, or NONE"""
    source: Tensor
    """[B, F] int32: where it was, if it is not there any more; given back at the next step"""
    target: Tensor
    """[B, 2] int32: where it goes, as many units as its format has"""

    @classmethod
    def of(cls, rows: int, units: Units, device: torch.device) -> Turned:
        """Nothing."""
        return cls(_zeros(device, rows), _zeros(device, rows, units.of(FULL)), _zeros(device, rows, 2))


@dataclass(frozen=True)
class PagePolicy:
    """What becomes of every row's pages: `policy.operating.KVRows` on the device, and what pages are judged by."""

    hard: Tensor
    """[B] int32: code of `kv.formats` of a page that is hard: FULL, INT8, INT4 or DROPPED"""
    easy: Tensor
    """[B] int32: and of one that is not"""
    threshold: Tensor
    """[B] float32: a page whose mean complexity is at least this is hard"""
    sink_pages: Tensor
    """[B] int32"""
    window_tokens: Tensor
    """[B] int32"""
    complexity: Tensor
    """[B, P] float64: sums over each page's tokens, complete before the page is due"""

    @classmethod
    def of(cls, rows: int, pages: int, device: torch.device) -> PagePolicy:
        """Rows of which all pages stay as they are."""
        sums = torch.zeros(rows, pages, dtype=torch.float64, device=device)
        threshold = torch.zeros(rows, device=device)
        hard, easy = _zeros(device, rows) + FULL, _zeros(device, rows) + FULL
        return cls(hard, easy, threshold, _zeros(device, rows), _zeros(device, rows), sums)


@triton.jit
def before(count):
    """Of every row [BP] the sum of `count` over the rows before it."""
    return tl.cumsum(count, 0) - count


@triton.jit
def _turn(
    full, int8, int4, lengths, settled, counts, stack, top, dry, code, source, target, hard, easy, threshold,
    sinks, windows, complexity, pages,
    B: tl.constexpr, BP: tl.constexpr, F: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # In this order: what the kernels of a step fetch before they wait was written before this one.
    wait(PDL)
    release(PDL)
    row = tl.arange(0, BP)
    real = row < B
    part = tl.arange(0, F)[None, :]
    pair = tl.arange(0, 2)[None, :]
    length = tl.load(lengths + row, mask=real, other=0)
    page = tl.load(settled + row, mask=real, other=0)
    fulls = tl.load(counts + 3 * row, mask=real, other=0)
    int8s = tl.load(counts + 3 * row + 1, mask=real, other=0)
    int4s = tl.load(counts + 3 * row + 2, mask=real, other=0)
    was = tl.load(code + row, mask=real, other=_NONE)
    left = tl.load(top)
    missed = tl.load(dry)

    end = tl.maximum(length - tl.load(windows + row, mask=real, other=0), 0) // _PAGE
    due = (length > 0) & (page < end)
    # As the reference compares: the mean in float64, with the threshold made as wide.
    mean = tl.load(complexity + row * pages + page, mask=due, other=0.0) * (1.0 / _PAGE)
    is_hard = mean >= tl.load(threshold + row, mask=real, other=0.0).to(tl.float64)
    what = tl.where(is_hard, tl.load(hard + row, mask=due, other=_FULL), tl.load(easy + row, mask=due, other=_FULL))
    what = tl.where(page < tl.load(sinks + row, mask=real, other=0), _FULL, what)

    # Give back what was coded away, or dropped, at the step before.
    gone = was > _FULL
    place = left + before(gone.to(tl.int32)) * F
    given = tl.load(source + row[:, None] * F + part, mask=gone[:, None], other=0)
    tl.store(stack + place[:, None] + part, given, mask=gone[:, None])
    left += tl.sum(gone.to(tl.int32), 0) * F
    # What one thread has put on the stack another takes from it; and all warps have read the rows: the first to be
    # done must not write what another one has yet to read.
    tl.debug_barrier()

    # Begin pages, first, as these cannot wait.
    wants = ((length > 0) & (length % _PAGE == 0)).to(tl.int32)
    taken = before(wants) * F
    begins = (wants > 0) & (taken + F <= left)
    unit = tl.load(stack + left - 1 - (taken[:, None] + part), mask=begins[:, None], other=0)
    tl.store(full + (row * pages + length // _PAGE)[:, None] * F + part, unit, mask=begins[:, None])
    begun = tl.sum(begins.to(tl.int32), 0)
    tl.store(dry, missed + tl.sum(wants, 0) - begun)
    left -= begun * F

    # Settle pages; one that finds no units, and all behind it that want some, wait for the next step.
    wanted = tl.where(due, tl.where(what == _INT8, 2, tl.where(what == _INT4, 1, 0)), 0)
    taken = before(wanted)
    settles = due & ((wanted == 0) | (taken + wanted <= left))
    what = tl.where(settles, what, _NONE)
    coded = (pair < wanted[:, None]) & settles[:, None]
    unit = tl.load(stack + left - 1 - (taken[:, None] + pair), mask=coded, other=0)
    tl.store(target + row[:, None] * 2 + pair, unit, mask=coded)
    tl.store(int8 + (row * pages + int8s)[:, None] * 2 + pair, unit, mask=coded & (what == _INT8)[:, None])
    tl.store(int4 + (row * pages + int4s)[:, None] + pair, unit, mask=coded & (what == _INT4)[:, None])
    there = tl.load(full + (row * pages + page)[:, None] * F + part, mask=settles[:, None], other=0)
    # No live page is at this entry: no more pages have stayed than are settled.
    tl.store(full + (row * pages + fulls)[:, None] * F + part, there, mask=(what == _FULL)[:, None])
    tl.store(source + row[:, None] * F + part, there, mask=(what > _FULL)[:, None])
    tl.store(code + row, what, mask=real)
    tl.store(settled + row, page + 1, mask=settles)
    tl.store(counts + 3 * row, fulls + 1, mask=what == _FULL)
    tl.store(counts + 3 * row + 1, int8s + 1, mask=what == _INT8)
    tl.store(counts + 3 * row + 2, int4s + 1, mask=what == _INT4)
    tl.store(top, left - tl.sum(tl.where(settles, wanted, 0), 0))


def turn(tables: PageTables, free: FreeUnits, turned: Turned, policy: PagePolicy) -> None:
    """Open a step, before the token is counted: units of `turned` go back, of every row the page behind the settled
    ones gets its format where it has left the window, and a row whose pages are full begins one.

    A page is due when p < (length - window_tokens) // 16. One of the first `sink_pages` stays as it is; another is
    judged by its complexity. Rows take units in their order, those that begin a page before those that settle one; a
    settling page that finds too few of them is left for the next step. There is room for the page that begins.
    """
    batch, pages, parts = tables.full.shape
    padded = triton.next_power_of_2(batch)
    _turn[(1,)](
        tables.full, tables.int8, tables.int4, tables.lengths, tables.settled, tables.counts, free.stack, free.top,
        free.dry, turned.code, turned.source, turned.target, policy.hard, policy.easy, policy.threshold,
        policy.sink_pages, policy.window_tokens, policy.complexity, pages,
        B=batch, BP=padded, F=parts, num_warps=max(1, min(padded // 32, 4)), **dependent(tables.lengths.device),
    )  # fmt: skip


@triton.jit
def _give(stack, left, units, count, TILE: tl.constexpr):
    """Put `count` units on the stack; how many it has then."""
    for start in range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < count
        tl.store(stack + left + at, tl.load(units + at, mask=inside, other=0), mask=inside)
    return left + count


@triton.jit(do_not_specialize=["count"])
def _leave(
    rows, full, int8, int4, lengths, settled, counts, stack, top, code, source, pages, count,
    F: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    release(PDL)
    left = tl.load(top)
    for index in range(count):
        row = tl.load(rows + index)
        done = tl.load(settled + row)
        live = tl.cdiv(tl.load(lengths + row), _PAGE) - done
        gone = tl.load(code + row) > _FULL
        own = full + row * pages * F
        left = _give(stack, left, own, tl.load(counts + 3 * row) * F, TILE)
        left = _give(stack, left, int8 + row * pages * 2, tl.load(counts + 3 * row + 1) * 2, TILE)
        left = _give(stack, left, int4 + row * pages, tl.load(counts + 3 * row + 2), TILE)
        left = _give(stack, left, own + done * F, live * F, TILE)
        left = _give(stack, left, source + row * F, tl.where(gone, F, 0), TILE)
        # Every warp has read the row, and in the first round the top.
        tl.debug_barrier()
        tl.store(lengths + row, 0)
        tl.store(settled + row, 0)
        tl.store(code + row, _NONE)
        for kind in tl.static_range(3):
            tl.store(counts + 3 * row + kind, 0)
    tl.store(top, left)


def leave(tables: PageTables, free: FreeUnits, turned: Turned, rows: Tensor) -> None:
    """Give back all that rows [n] int32 have, each named once; they are not in use any more.

    Between steps: then a page that began for a token has one.
    """
    _, pages, parts = tables.full.shape
    _leave[(1,)](
        rows, tables.full, tables.int8, tables.int4, tables.lengths, tables.settled, tables.counts, free.stack,
        free.top, turned.code, turned.source, pages, len(rows),
        F=parts, TILE=_TILE, num_warps=4, **dependent(rows.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _claim(
    rows, new, full, lengths, stack, top, dry, pages, count, F: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr
):
    wait(PDL)
    release(PDL)
    left = tl.load(top)
    missed = tl.load(dry)
    for index in range(count):
        row = tl.load(rows + index)
        length = tl.load(lengths + row)
        grown = tl.load(new + index)
        first = tl.cdiv(length, _PAGE)
        wanted = (tl.cdiv(grown, _PAGE) - first) * F
        fits = wanted <= left
        wanted = tl.where(fits, wanted, 0)
        own = full + (row * pages + first) * F
        for start in range(0, wanted, TILE):
            at = start + tl.arange(0, TILE)
            inside = at < wanted
            tl.store(own + at, tl.load(stack + left - 1 - at, mask=inside, other=0), mask=inside)
        left -= wanted
        missed += 1 - fits.to(tl.int32)
        # Every warp has read the row, and in the first round the top.
        tl.debug_barrier()
        tl.store(lengths + row, tl.where(fits, grown, length))
    tl.store(top, left)
    tl.store(dry, missed)


def claim(tables: PageTables, free: FreeUnits, rows: Tensor, lengths: Tensor) -> None:
    """Rows [n] int32, each named once, grow to `lengths` [n] int32 tokens, none of them shorter than it is: pages in
    the model's dtype that are yet to be written. A row for which too few units are left stays as it is, and is counted
    as dry. Between steps."""
    _, pages, parts = tables.full.shape
    _claim[(1,)](
        rows, lengths, tables.full, tables.lengths, free.stack, free.top, free.dry, pages, len(rows),
        F=parts, TILE=_TILE, num_warps=4, **dependent(rows.device),
    )  # fmt: skip

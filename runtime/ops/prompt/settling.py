"""Pages of prompts get their format: all of a row that have left the window with a part of its prompt, by one launch.

`ops.pages.turn` settles one page of a row at every step of decode. A part of a prompt brings hundreds of tokens, and
whatever has left the window behind them is to be coded before the next part needs its room. So behind every part:

    settle_pages(tables, free, policy, rows, settled)     # which pages, to which units
    quantise_turned(memory, settled, units, dtype)        # write what has got fewer bits
    give_back(free, settled)                              # where these were is free again

What settles is listed in entries of a `Turned`, of pages in the place of rows. The pages of a row are looked at side by
side: who takes which entry and which units follows from sums over them. Rows go one after another.

Units on the stack, units that tables name, and those of entries whose pages were coded away or dropped, until they are
given back, are all units, each once, between any two launches.

Shape legend: B rows, P pages of a row, F units of a page in the model's dtype, U units, S rows that are named, n
entries.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ...kv.formats import FULL, INT4, INT8, NONE
from ..launch import dependent, release, wait
from ..pages import FreeUnits, PagePolicy, PageTables, Turned, before

_PAGE: tl.constexpr = tl.constexpr(PAGE_TOKENS)
_NONE: tl.constexpr = tl.constexpr(NONE)
_FULL: tl.constexpr = tl.constexpr(FULL)
_INT8: tl.constexpr = tl.constexpr(INT8)
_INT4: tl.constexpr = tl.constexpr(INT4)
_BLOCK = 128
"""Pages, or entries, that are looked at side by side: those of 2048 tokens."""


@triton.jit(do_not_specialize=["count", "entries"])
def _settle(
    rows, full, int8, int4, lengths, settled, counts, stack, top, code, source, target, hard, easy, threshold, sinks,
    windows, complexity, pages, count, entries, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # In this order, as in `ops.pages`: what kernels behind fetch before they wait was written before this one.
    wait(PDL)
    release(PDL)
    index = tl.arange(0, BLOCK)
    part = tl.arange(0, F)[None, :]
    pair = tl.arange(0, 2)[None, :]
    left = tl.load(top)
    used = 0
    # Whether every page that was due so far has settled: nobody overtakes one that waits.
    going = tl.full([], 1, tl.int1)
    for number in range(count):
        row = tl.load(rows + number)
        real = row >= 0
        length = tl.load(lengths + row, mask=real, other=0)
        first = tl.load(settled + row, mask=real, other=0)
        fulls = tl.load(counts + 3 * row, mask=real, other=0)
        int8s = tl.load(counts + 3 * row + 1, mask=real, other=0)
        int4s = tl.load(counts + 3 * row + 2, mask=real, other=0)
        bar = tl.load(threshold + row, mask=real, other=0.0).to(tl.float64)
        if_hard = tl.load(hard + row, mask=real, other=_FULL)
        if_easy = tl.load(easy + row, mask=real, other=_FULL)
        sink_end = tl.load(sinks + row, mask=real, other=0)
        end = tl.maximum(length - tl.load(windows + row, mask=real, other=0), 0) // _PAGE
        done = first
        for start in range(first, end, BLOCK):
            page = start + index
            entry = used + index
            due = (page < end) & going
            # As the reference compares: the mean in float64, with the threshold made as wide.
            mean = tl.load(complexity + row * pages + page, mask=due, other=0.0) * (1.0 / _PAGE)
            what = tl.where(page < sink_end, _FULL, tl.where(mean >= bar, if_hard, if_easy))
            wanted = tl.where(due, tl.where(what == _INT8, 2, tl.where(what == _INT4, 1, 0)), 0)
            taken = before(wanted)
            # Both sides only grow with the pages: those that settle are the first ones.
            settles = due & (entry < entries) & (taken + wanted <= left)
            what = tl.where(settles, what, _NONE)
            coded = (pair < wanted[:, None]) & settles[:, None]
            unit = tl.load(stack + left - 1 - (taken[:, None] + pair), mask=coded, other=0)
            there = tl.load(full + (row * pages + page)[:, None] * F + part, mask=settles[:, None], other=0)
            in_full, in_int8, in_int4 = (what == _FULL), (what == _INT8), (what == _INT4)
            # All warps have read these pages, and in the first round the row and the top: a page that stays moves to
            # an entry that may be that of another one here. It is none of a later round: no more pages have stayed than
            # there are pages before.
            tl.debug_barrier()
            tl.store(code + entry, what, mask=settles)
            tl.store(source + entry[:, None] * F + part, there, mask=(what > _FULL)[:, None])
            tl.store(target + entry[:, None] * 2 + pair, unit, mask=coded)
            at = row * pages + fulls + before(in_full.to(tl.int32))
            tl.store(full + at[:, None] * F + part, there, mask=in_full[:, None])
            at = row * pages + int8s + before(in_int8.to(tl.int32))
            tl.store(int8 + at[:, None] * 2 + pair, unit, mask=coded & in_int8[:, None])
            at = row * pages + int4s + before(in_int4.to(tl.int32))
            tl.store(int4 + at[:, None] + pair, unit, mask=coded & in_int4[:, None])
            settling = tl.sum(settles.to(tl.int32), 0)
            going = going & (settling == tl.sum(due.to(tl.int32), 0))
            done += settling
            used += settling
            fulls += tl.sum(in_full.to(tl.int32), 0)
            int8s += tl.sum(in_int8.to(tl.int32), 0)
            int4s += tl.sum(in_int4.to(tl.int32), 0)
            left -= tl.sum(tl.where(settles, wanted, 0), 0)
        # Of a row that had no page due, what is written is what was there.
        tl.store(settled + row, done, mask=real)
        tl.store(counts + 3 * row, fulls, mask=real)
        tl.store(counts + 3 * row + 1, int8s, mask=real)
        tl.store(counts + 3 * row + 2, int4s, mask=real)
    tl.store(top, left)
    for start in range(0, entries, BLOCK):
        entry = start + index
        tl.store(code + entry, _NONE, mask=(entry >= used) & (entry < entries))


def settle_pages(tables: PageTables, free: FreeUnits, policy: PagePolicy, rows: Tensor, settled: Turned) -> None:
    """Pages of `rows` that are due get their format, by the rules of `ops.pages.turn`: rows in the order in which they
    are named, pages in that of their tokens.

    `rows` [S] int32: each row once, -1 for none; `tables.lengths` says how many tokens of them are processed. A page p
    is due when p < (length - window_tokens) // 16. `settled`, of n entries where `Turned.of` has rows: entry i is the
    i-th page that settled, one that stays in the model's dtype too; the code of all entries is written, NONE behind the
    last one. A page that finds no entry, or too few units, is left for a later call, and all behind it with it, of its
    row and of later ones. Units of `settled` are given back by `give_back` before the next call.
    """
    _, pages, parts = tables.full.shape
    _settle[(1,)](
        rows, tables.full, tables.int8, tables.int4, tables.lengths, tables.settled, tables.counts, free.stack,
        free.top, settled.code, settled.source, settled.target, policy.hard, policy.easy, policy.threshold,
        policy.sink_pages, policy.window_tokens, policy.complexity, pages, len(rows), len(settled.code),
        F=parts, BLOCK=_BLOCK, num_warps=4, **dependent(rows.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["entries"])
def _give_back(
    stack, top, code, source, entries, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait(PDL)
    release(PDL)
    part = tl.arange(0, F)[None, :]
    left = tl.load(top)
    for start in range(0, entries, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < entries
        gone = tl.load(code + entry, mask=inside, other=_NONE) > _FULL
        place = left + before(gone.to(tl.int32)) * F
        unit = tl.load(source + entry[:, None] * F + part, mask=gone[:, None], other=0)
        tl.store(stack + place[:, None] + part, unit, mask=gone[:, None])
        left += tl.sum(gone.to(tl.int32), 0) * F
        # All warps have read the codes, and in the first round the top.
        tl.debug_barrier()
        tl.store(code + entry, _NONE, mask=inside)
    tl.store(top, left)


def give_back(free: FreeUnits, settled: Turned) -> None:
    """Units of entries whose pages were coded away or dropped go back, in the order of entries, and no entry is in use
    any more. Behind what reads these units: `ops.quantise.quantise_turned`."""
    _give_back[(1,)](
        free.stack, free.top, settled.code, settled.source, len(settled.code),
        F=settled.source.shape[1], BLOCK=_BLOCK, num_warps=4, **dependent(free.stack.device),
    )  # fmt: skip

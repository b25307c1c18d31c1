"""The pool of pages: one memory for all layers, in units that pages of every format take (`kv.units`).

Unit number n is unit n in each layer. Which units are free is on the device (`ops.pages`), where pages begin and get
their formats; the host puts rows in place that a prefill has begun, and knows how many units a row takes at most.

Shape legend: L layers, U units, Hkv KV heads, B rows, P pages of a row, n of B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.operating import KVRows
from policy.settings import PAGE_ACTIONS, PAGE_TOKENS

from ..kv.formats import FORMATS, FULL, INT4, INT8
from ..kv.units import CODED, Units, pages_for
from ..ops.pages import FreeUnits, PagePolicy, PageTables, Turned
from ..sending import to_device
from .model import Model

_BEYOND = 3
"""Pages in the model's dtype beside sinks and window: one that the window begins in, one that the newest token is in,
and one that has been coded and is given back a step later."""


def units_of(model: Model, coded: bool) -> Units:
    """Units of a model's pages, which may be coded or never are."""
    return Units(model.shape.kv_heads, model.shape.head_dim, model.dtype.itemsize, coded)


@dataclass(frozen=True)
class Pool:
    """Memory for pages of all layers, and which of it is free."""

    memory: Tensor
    """[L, U, Hkv, head_bytes] uint8"""
    units: Units
    free: FreeUnits

    @classmethod
    def of(cls, model: Model, count: int, coded: bool) -> Pool:
        """`count` units, of pages that may be coded or that never are. What is in them is arbitrary."""
        units = units_of(model, coded)
        shape = (model.shape.layers, count, units.heads, units.head_bytes)
        memory = torch.empty(shape, dtype=torch.uint8, device=model.device)
        return cls(memory, units, FreeUnits.of(count, model.device))

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def clear(self) -> None:
        """All units are free."""
        self.free.stack.copy_(torch.arange(len(self), dtype=torch.int32))
        self.free.top.fill_(len(self))
        self.free.dry.zero_()

    def __len__(self) -> int:
        return self.memory.shape[1]


def units_needed(kv: KVRows, tokens: Sequence[int], units: Units, part_tokens: int = 0) -> int:
    """Units that rows of up to `tokens` tokens take at most, whatever their text: what admits them.

    While a part of their prompts of up to `part_tokens` tokens is under way its pages are in the model's dtype, and
    when it is through they are that as long as they are coded.
    """
    total = spare = 0
    for row, count in enumerate(tokens):
        pages = pages_for(count)
        coded = max(units.of(FORMATS.index(PAGE_ACTIONS[int(own[row])])) for own in (kv.hard, kv.easy))
        window = pages_for(int(kv.window_tokens[row]))
        full = min(pages, int(kv.sink_pages[row]) + window + _BEYOND)
        total += units.of(FULL) * full + coded * (pages - full)
        spare += pages - full if coded < units.of(FULL) else 0
    under_way = pages_for(part_tokens) + len(tokens) if part_tokens else 0
    return total + units.of(FULL) * min(under_way, spare)


def place(
    pool: Pool, tables: PageTables, turned: Turned, formats: Tensor, lengths: Sequence[int], settled: Sequence[int]
) -> dict[int, Tensor]:
    """Put n rows into the first n of the tables, and none else: all other units are free.

    formats [n, pages] on the host: codes of `kv.formats`, NONE behind a row's last page; of the first `settled` pages
    of a row they are final, the others are in the model's dtype. Returns, by format, units [k, N] long of its pages,
    row after row, oldest first: what is in them is the caller's to write. Raises MemoryError where the pool has too
    few.
    """
    rows, pages = formats.shape
    codes = formats.long()
    taken = torch.zeros(len(FORMATS), dtype=torch.long)
    for code in (FULL, *(CODED if pool.units.coded else ())):
        taken[code] = pool.units.of(code)
    # From the highest unit downwards, so that those that are left are the first ones.
    start = len(pool) - taken[codes].flatten().cumsum(0).view(rows, pages)
    left = int(start.min())
    if left < 0:
        raise MemoryError(
            f"pool: expected room for {len(pool) - left} units of {rows} rows, got {len(pool)}; make it larger, or the "
            "rows fewer or shorter"
        )
    final = torch.arange(pages) < torch.tensor(settled)[:, None]
    host = {FULL: tables.full, INT8: tables.int8, INT4: tables.int4}
    numbers, counts = {}, torch.zeros(rows, len(host), dtype=torch.int32)
    for kind, (code, table) in enumerate(host.items()):
        mine = codes == code
        row, page = mine.nonzero(as_tuple=True)
        if len(row) == 0:
            continue
        # Entries of settled pages are packed, a live page's is its number.
        entry = torch.where(final, (mine & final).cumsum(1) - 1, torch.arange(pages))[row, page]
        counts[:, kind] = (mine & final).sum(1)
        numbers[code] = start[row, page] + torch.arange(table.shape[2])[:, None]
        table[row.to(table.device), entry.to(table.device)] = numbers[code].T.to(table)
    for kept in (tables.lengths, tables.settled, tables.counts, turned.code):
        kept.zero_()
    tables.counts[:rows] = counts.to(tables.counts.device)
    for table, given in ((tables.lengths, lengths), (tables.settled, settled)):
        table[:rows] = torch.tensor(given, dtype=torch.int32).to(table.device)
    pool.free.stack.copy_(torch.arange(len(pool), dtype=torch.int32))
    pool.free.top.fill_(left)
    pool.free.dry.zero_()
    return {code: own.to(pool.memory.device) for code, own in numbers.items()}


def set_policy(policy: PagePolicy, kv: KVRows, first: int = 0) -> None:
    """What becomes of the pages of rows from `first` on, as many as kv has; other rows keep theirs."""
    rows, device = slice(first, first + len(kv)), policy.hard.device
    codes = torch.tensor([FORMATS.index(action) for action in PAGE_ACTIONS], dtype=torch.int32)
    values = (
        (policy.hard, codes[kv.hard]), (policy.easy, codes[kv.easy]), (policy.threshold, kv.threshold),
        (policy.sink_pages, kv.sink_pages), (policy.window_tokens, kv.window_tokens),
    )  # fmt: skip
    for kept, given in values:
        kept[rows] = to_device(given.to(kept.dtype), device)


def kv_bytes(tables: PageTables, lengths: Sequence[int], units: Units, layers: int) -> int:
    """Bytes of keys and values of the first rows, of so many tokens, each page in its format, scales included; of pages
    in the model's dtype the tokens in them count, as in the reference path's cache. Waits for the device."""
    settled, counts = (own[: len(lengths)].long().cpu() for own in (tables.settled, tables.counts))
    whole = sum(lengths) - PAGE_TOKENS * int((settled - counts[:, 0]).sum())
    coded = sum(int(counts[:, kind].sum()) * units.page_bytes(code) for kind, code in ((1, INT8), (2, INT4)))
    return layers * (whole * units.page_bytes(FULL) // PAGE_TOKENS + coded)

"""Pages of prompts that get their format many at a time, in plain PyTorch: what `ops.prompt.settling` must equal.

Page by page, on the host's account, as in `reference.pages`.

Shape legend: B rows, F units of a page in the model's dtype, S rows that are named, n entries.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...kv.formats import DROPPED, FULL, INT4, INT8, NONE
from ..pages import FreeUnits, PagePolicy, PageTables, Turned
from .pages import due, pop, push


def settle_pages(tables: PageTables, free: FreeUnits, policy: PagePolicy, rows: Sequence[int], settled: Turned) -> None:
    """Pages of `rows` [S], -1 for none, that are due get their format, as the kernel has it."""
    settled.code.fill_(NONE)
    entry = 0
    for row in rows:
        while row >= 0 and (code := due(tables, policy, row)) != NONE:
            wanted = {INT8: 2, INT4: 1}.get(code, 0)
            if entry == len(settled.code) or wanted > int(free.top):
                return  # nobody overtakes a page that waits
            there = tables.full[row, int(tables.settled[row])].clone()
            numbers = there if code == FULL else pop(free, wanted)
            settled.code[entry] = code
            if code > FULL:
                settled.source[entry], settled.target[entry, :wanted] = there, numbers
            if code != DROPPED:
                table, kind = {FULL: (tables.full, 0), INT8: (tables.int8, 1), INT4: (tables.int4, 2)}[code]
                table[row, int(tables.counts[row, kind])] = numbers
                tables.counts[row, kind] += 1
            tables.settled[row] += 1
            entry += 1


def give_back(free: FreeUnits, settled: Turned) -> None:
    """Units of entries whose pages were coded away or dropped go back; no entry is in use any more."""
    for entry, code in enumerate(settled.code.tolist()):
        if code > FULL:
            push(free, settled.source[entry])
    settled.code.fill_(NONE)

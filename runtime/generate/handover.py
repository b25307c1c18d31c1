"""A prompt's pages from the reference path's cache to the engine's pool: the same formats, bit by bit, in its units."""

from __future__ import annotations

from ..engine.page_pool import Pool, place
from ..ops.pages import PageTables, Turned
from ..ops.reference.pages import pack_page
from ..reference.run import AdaptiveCache


def hand_over(cache: AdaptiveCache, pool: Pool, tables: PageTables, turned: Turned) -> None:
    """Put all rows of a cache into the first ones of the tables, none else being in use, and their pages into the pool.

    Raises MemoryError where it has too little room.
    """
    table = cache.table
    numbers = place(pool, tables, turned, table.formats, cache.lengths, table.settled)
    for code, units in numbers.items():
        own = table.index[table.formats == code].long()
        for memory, layer in zip(pool.memory, cache.layers, strict=True):
            ids = own.to(layer.device)
            parts = {name: part.index_select(1, ids) for name, part in layer.pools[code].parts.items()}
            memory[units] = pack_page(code, parts, pool.units)

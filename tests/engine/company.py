"""A policy that codes pages, and what an engine has when nobody is left."""

from __future__ import annotations

from dataclasses import replace

from policy import KVSettings

BLOCK = 16
CODED = KVSettings(window_tokens=16, threshold=0.7, sink_pages=0)


def coding(checkpoint, **kv):
    """The policy with pages in few bits, in blocks of whole pages."""
    settings = replace(checkpoint.settings, block_tokens=BLOCK, prompt_tokens=BLOCK, kv=replace(CODED, **kv))
    return replace(checkpoint, settings=settings)


def assert_all_is_free(engine):
    free = engine.pool.free
    assert int(free.top) == len(engine.pool)
    assert sorted(free.stack.tolist()) == list(range(len(engine.pool)))
    assert int(free.dry) == 0
    assert engine.live == 0
    assert not engine.busy
    assert sorted(engine._free_rows) == list(range(engine.rows))
    assert not engine._texts

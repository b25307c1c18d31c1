"""Nothing is read that this step or an earlier one has not written: what else a buffer holds is NaN, and changes no
bit of what comes out."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.engine.serving import NEW_TOKENS, State, assert_same, outputs

pytestmark = pytest.mark.gpu

STEPS = NEW_TOKENS - 1
BYTES = 0xFF
"""NaN in every float format; of an int32 -1."""


def poison(serving, begun_lengths):
    """All that a step overwrites before it reads, and all that no row in use names.

    Left alone are what one step hands to the next, and by their contracts the arrivals that attention counts (0 between
    launches) and what lies behind the last token of a row's own pages (numbers).
    """
    decoder, rows = serving.decoder, serving.rows
    b, scratch, pool = decoder.buffers, decoder._scratch, decoder.pool
    found = [b.r, b.normed, b.squares, b.y, b.added, b.u, b.query, b.attended, b.inner, b.logits]
    found += [scratch.found, scratch.scaled, scratch.noisy]
    if b.scratch is not None:
        found += [b.scratch.sums, b.scratch.softmax]
    if not decoder.bucket.decides:
        found += [b.distant, decoder.lanes.entropy, decoder.lanes.surprisal]
    for own in found:
        own.fill_(torch.nan)
    pool.memory[:, pool.free.stack[: int(pool.free.top)].long()] = 255
    scratch.winner.fill_(2**30)
    decoder._forward.reads.records.fill_(-1)
    for own in (b.tables.full, b.tables.int8, b.tables.int4):
        own[rows:].fill_(2**30)


def run(serving, begun, each_step):
    begun.restore()
    shown = []
    for _ in range(STEPS):
        each_step()
        serving.decoder.run()
        shown.append(outputs(serving))
    return shown


def test_what_no_step_has_written_is_not_read(serving):
    begun = State(serving.decoder)
    clean = run(serving, begun, lambda: None)
    found = run(serving, begun, lambda: poison(serving, begun))
    begun.restore()
    for step, (own, expected) in enumerate(zip(found, clean, strict=True)):
        assert_same(own, expected, f"step {step}")


def test_slots_and_bytes_that_no_row_names_are_not_read(fixed):
    """Rows use the first ladder; where the second was there are other bytes, and its slot says nonsense."""
    begun, store = State(fixed.decoder), fixed.path.store
    clean = run(fixed, begun, lambda: None)
    start, length = store._stretch[1]
    store.evict(1)
    store.arena[start : start + length].fill_(BYTES)
    for own in (store.tables.edges, store.tables.bank_of, store.tables.parts):
        own[1].fill_(2**30)
    found = run(fixed, begun, lambda: None)
    begun.restore()
    assert store.load(fixed.plan.ladders[1]) == 1
    for step, (own, expected) in enumerate(zip(found, clean, strict=True)):
        assert_same(own, expected, f"step {step}")


def test_poison_would_be_noticed(fixed):
    """In what a step does read: the newest token's embedding goes through a weight that is NaN."""
    begun, norm = State(fixed.decoder), fixed.decoder.model.norm
    kept = norm.clone()
    with torch.no_grad():
        norm[3] = torch.nan
    shown = run(fixed, begun, lambda: None)
    with torch.no_grad():
        norm.copy_(kept)
    begun.restore()
    with pytest.raises(AssertionError):
        assert_same(shown[0], shown[0], "poisoned weights")

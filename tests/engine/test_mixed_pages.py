"""Pages of every format in the engine: tokens, decisions and formats are the reference path's, and no unit is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from policy import FULL_KV, KVSettings
from policy.operating import KVRows
from runtime import adaptive
from runtime.engine.model import model_of
from runtime.engine.page_pool import Pool, place, units_needed
from runtime.generate import fast as fast_path
from runtime.kv.formats import DROPPED, FORMATS, FULL, INT4, INT8, NONE
from runtime.kv.units import Units, pages_for
from runtime.ops.pages import PageTables, Turned
from tests.engine import tiny
from tests.engine.tiny import GREEDY, prompts

SHORT = KVSettings(hard="int8", easy="int4", threshold=0.85, sink_pages=1, window_tokens=16)
"""Of a window of one page, so that short texts have pages of both formats."""
NEW = 18
"""More than a page: of every row one leaves the window while it decodes."""


pytestmark = pytest.mark.usefixtures("made")


@pytest.fixture(autouse=True)
def exactly(monkeypatch):
    """Pools have no unit more than rows may need."""
    monkeypatch.setattr(fast_path, "_rounded", lambda count: count)


def both(llama, ladders, policy, given, kv, *, new=NEW, **options):
    """New tokens of the engine and its decoder, and page formats [B, P] of the reference path; what both must agree
    on is compared. `kv` is what becomes of every row's pages."""
    ids, mask = (own.to(llama.device) for own in given)
    found, formats = [], None
    for fast in (True, False):
        with adaptive(llama, ladders, policy=policy, fast=fast, **options) as run:
            operating = run.plan.operating.for_rows(len(ids))
            run.plan = replace(run.plan, operating=replace(operating, kv=KVRows.of(kv)))
            out = llama.generate(ids, attention_mask=mask, **GREEDY, max_new_tokens=new)
            last = run.last
            found.append((out.tolist(), last.kv_bytes(), last.kv_bytes_full(), run.row_mean_rank()))
            if not fast:
                formats = last.page_formats()
    fast, reference = found
    assert fast[0] == reference[0]
    assert fast[1:3] == reference[1:3]
    assert fast[3] == pytest.approx(reference[3])
    return out[:, ids.shape[1] :], formats


def held(decoder, rows):
    """By row how many pages of each format the decoder has; of the model's dtype also those that live."""
    tables = decoder.buffers.tables
    for row in range(rows):
        full, int8, int4 = tables.counts[row].tolist()
        settled, pages = int(tables.settled[row]), pages_for(int(tables.lengths[row]))
        yield Counter({FULL: full + pages - settled, INT8: int8, INT4: int4, DROPPED: settled - full - int8 - int4})


def check_units(decoder, rows):
    """Every unit is free, named by one page, or given back at the next step; none ran dry."""
    tables, free, turned = decoder.buffers.tables, decoder.pool.free, decoder.buffers.turned
    named = free.stack[: int(free.top)].tolist()
    for row in range(rows):
        full, int8, int4 = tables.counts[row].tolist()
        # `turn` has begun a page for the token that would come next.
        pages = int(tables.lengths[row]) // 16 + 1
        for table, entries in (
            (tables.full, [*range(full), *range(int(tables.settled[row]), pages)]),
            (tables.int8, range(int8)), (tables.int4, range(int4)),
        ):  # fmt: skip
            named += table[row, list(entries)].flatten().tolist()
        if int(turned.code[row]) > FULL:
            named += turned.source[row].tolist()
    assert sorted(named) == list(range(len(decoder.pool)))
    assert int(free.dry) == 0


@pytest.mark.parametrize(
    ("kv", "lengths"),
    [
        ([SHORT] * 3, (60, 9, 33)),
        ([replace(SHORT, easy="dropped", sink_pages=0)], (70,)),
        ([SHORT, FULL_KV, replace(SHORT, hard="full", sink_pages=2, window_tokens=32)], (60, 40, 100)),
    ],
    ids=["int8 and int4", "dropped", "rows of their own"],
)
def test_pages_are_the_reference_paths(llama, ladders, learned, made, kv, lengths):
    rows = len(lengths)
    budgets = [0.3, 0.9, 0.6][:rows]
    _, formats = both(llama, list(ladders[:1]) * rows, learned, prompts(*lengths), kv, budget=budgets)
    (decoder,) = made
    expected = [Counter(row[row != NONE].tolist()) for row in formats]
    assert list(held(decoder, rows)) == expected
    kinds = {FORMATS.index(name) for own in kv for name in (own.hard, own.easy)}
    assert kinds <= set(sum(expected, Counter())), "each format is met"
    check_units(decoder, rows)


def test_a_fixed_policy_judges_pages_as_well(llama, ladders, made):
    _, formats = both(llama, ladders[0], None, prompts(50), [replace(SHORT, threshold=0.7)], rung=2)
    assert {INT8, INT4} <= set(formats.flatten().tolist())
    assert made[0].bucket.decides
    check_units(made[0], 1)


def test_rows_that_end_early_leave_the_books_right(llama, ladders, learned, made):
    """The engine runs a step beyond the last row's end before it knows: that says nothing of kv bytes."""
    given, kv = prompts(60, 47), [SHORT] * 2
    new, _ = both(llama, ladders[0], learned, given, kv, budget=0.6, new=6)
    ends = [int(new[0, 3]), int(new[1, 4])]
    ids, mask = given
    found = []
    for fast in (True, False):
        with adaptive(llama, ladders[0], policy=learned, budget=0.6, fast=fast) as run:
            run.plan = replace(run.plan, operating=replace(run.plan.operating, kv=KVRows.of(kv[:1])))
            options = GREEDY | {"eos_token_id": ends, "max_new_tokens": NEW}
            out = llama.generate(ids.to(llama.device), attention_mask=mask.to(llama.device), **options)
            found.append((out.tolist(), run.last.kv_bytes()))
    assert found[0] == found[1]
    assert len(found[0][0][0]) < ids.shape[1] + NEW


def test_a_pool_made_anew_where_formats_or_room_change(llama, ladders, learned, made):
    ids, mask = (own.to(llama.device) for own in prompts(40, 20))
    with adaptive(llama, ladders[0], policy=learned, budget=0.6, fast=True) as run:
        tokens = []
        for kv in (SHORT, FULL_KV, SHORT):
            run.plan = replace(run.plan, operating=replace(run.plan.operating, kv=KVRows.of([kv])))
            tokens.append(llama.generate(ids, attention_mask=mask, **GREEDY, max_new_tokens=4).tolist())
    assert [own.pool.units.coded for own in made] == [True, False, True]
    assert tokens[0] == tokens[2]


@pytest.mark.parametrize("coded", [True, False])
def test_units_needed_are_counted_by_hand(coded):
    """Of a row sinks, window and what is under way in the model's dtype, all else in the dearer format."""
    units = Units(2, 8, 4, coded)
    kv = KVRows.of([SHORT, FULL_KV] if coded else [FULL_KV] * 2)
    lengths = (200, 90)
    whole = units.of(FULL)
    # Sinks 1, window 1, and 3 beside them; int8 takes two units.
    expected = 5 * whole + 8 * 2 + 6 * whole if coded else 19 * whole
    assert units_needed(kv, lengths, units) == expected


def test_rows_are_placed_once_each_and_a_pool_that_is_too_small_says_so(llama):
    own = model_of(llama, 16)
    pool = Pool.of(own, 40, coded=True)
    tables, turned = PageTables.of(3, 6, pool.units, own.device), Turned.of(3, pool.units, own.device)
    formats = torch.tensor([[FULL, INT8, DROPPED, INT4, FULL, NONE], [FULL, FULL, NONE, NONE, NONE, NONE]])
    numbers = place(pool, tables, turned, formats, (70, 20), (4, 0))
    assert {code: tuple(found.shape) for code, found in numbers.items()} == {FULL: (8, 4), INT8: (2, 1), INT4: (1, 1)}
    assert tables.counts.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert tables.settled.tolist() == [4, 0, 0]
    assert tables.lengths.tolist() == [70, 20, 0]
    assert tables.full[0, [0, 4]].tolist() == numbers[FULL].T[:2].tolist()
    assert tables.full[1, [0, 1]].tolist() == numbers[FULL].T[2:].tolist()
    assert tables.int8[0, 0].tolist() == numbers[INT8][:, 0].tolist()
    assert tables.int4[0, 0].tolist() == numbers[INT4][:, 0].tolist()
    named = torch.cat([found.flatten() for found in numbers.values()]).tolist()
    assert sorted(named + pool.free.stack[: int(pool.free.top)].tolist()) == list(range(40))
    small = Pool.of(own, 34, coded=True)
    with pytest.raises(MemoryError, match="pool: expected room for 35 units of 2 rows, got 34; make it larger"):
        place(small, tables, turned, formats, (70, 20), (4, 0))


@pytest.mark.parametrize(
    ("kv", "clause"),
    [
        (replace(SHORT, easy="sparse"), "its KV policy makes pages sparse"),
        (replace(SHORT, window_tokens=15), "its KV policy keeps a window of 15 tokens, and attention is listened to"),
    ],
    ids=["sparse", "a short window"],
)
def test_policies_that_are_not_covered(llama, ladders, kv, clause):
    own = tiny.checkpoint(llama, ladders[0], kv=kv)
    with pytest.raises(ValueError, match=f"fast: expected a run that the engine covers.*{clause}"), adaptive(
        llama, ladders[0], policy=own, budget=0.5, fast=True
    ):  # fmt: skip
        pass


def test_layers_that_see_a_window_keep_their_pages(device):
    model = tiny.model("mistral", sliding_window=24, device=device)
    ladder = tiny.ladder(model)
    own = tiny.checkpoint(model, ladder, kv=SHORT)
    with pytest.raises(ValueError, match="layers of the model see a window of the text"), adaptive(
        model, ladder, policy=own, budget=0.5, fast=True
    ):  # fmt: skip
        pass

"""Pages of prompts that settle many at a time against the reference, through histories of prompts beside rows that
decode.

Whatever means nothing is poisoned before every launch: entries beyond a table's, the stack above its top, sums of pages
that nobody judges, what entries say that are not in use. Everything is compared afterwards, poison included, and what
lies around it.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from policy.operating import KVRows
from policy.settings import PAGE_TOKENS, KVSettings
from runtime.kv.formats import DROPPED, FULL, INT4, INT8, NONE, decode, encode
from runtime.kv.units import Units
from runtime.ops import pages as decoding
from runtime.ops.pages import FreeUnits, PagePolicy, PageTables, Turned
from runtime.ops.prompt import settling
from runtime.ops.quantise import quantise_turned
from runtime.ops.reference import pages as decoding_reference
from runtime.ops.reference import prompt_pages as reference
from runtime.reference.pages.table import ACTION_CODES, PageTable

from ..near import arriving
from ..test_pages import NEAR_IT, POLICIES, THRESHOLD, UNITS, poison, same

Record = TypeVar("Record", PageTables, FreeUnits, Turned, PagePolicy)
GUARD, WALL = 256, -77
COUNTED = (FULL, INT8, INT4)


def walled(own: Record) -> Record:
    """A copy of it, with walls around each of its tensors."""
    made = []
    for part in fields(own):
        values = getattr(own, part.name)
        whole = torch.full((values.numel() + 2 * GUARD,), WALL, dtype=values.dtype, device=values.device)
        made.append(whole[GUARD:-GUARD].view(values.shape).copy_(values))
    return type(own)(*made)


def check_walls(own: Record) -> None:
    """Nothing was written around what `walled` gave."""
    for part in fields(own):
        values = getattr(own, part.name)
        whole = values.as_strided((values.numel() + 2 * GUARD,), (1,), 0)
        assert bool((whole[:GUARD] == WALL).all() & (whole[-GUARD:] == WALL).all()), part.name


@dataclass
class House:
    """Rows with prompts on their way, and rows that decode: of a row, one of its two lengths is 0."""

    rows: int
    pages: int
    units: Units
    count: int
    """U"""
    entries: int
    """n"""
    device: torch.device
    seed: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """How often what happened"""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.tables = walled(PageTables.of(self.rows, self.pages, self.units, self.device))
        self.prompts = replace(self.tables, lengths=torch.zeros_like(self.tables.lengths))
        """The same tables, with the lengths of prompts"""
        self.free = walled(FreeUnits.of(self.count, self.device))
        self.turned = walled(Turned.of(self.rows, self.units, self.device))
        self.settled = walled(Turned.of(self.entries, self.units, self.device))
        self.policy = walled(PagePolicy.of(self.rows, self.pages, self.device))
        whole = {"full", "dropped"}
        self.policies = [kv for kv in POLICIES if self.units.coded or {kv.hard, kv.easy} <= whole]
        self.kv = [self.policies[0]] * self.rows
        self.sums = torch.zeros(self.rows, self.pages, dtype=torch.float64)
        """What pages are judged by"""
        self.formats: list[list[int]] = [[] for _ in range(self.rows)]
        self.targets = [0] * self.rows
        """Tokens of every row's prompt"""

    def numbers(self, own: list[int]) -> Tensor:
        return torch.tensor(own, dtype=torch.int32, device=self.device)

    def lengths(self) -> list[int]:
        """Tokens of every row that are processed, in a prompt or since."""
        return (self.tables.lengths + self.prompts.lengths).tolist()

    def give_policy(self, row: int, kv: KVSettings) -> None:
        self.kv[row] = kv
        rows = KVRows.of([kv])
        for own, value in (
            (self.policy.hard, ACTION_CODES[rows.hard]), (self.policy.easy, ACTION_CODES[rows.easy]),
            (self.policy.threshold, rows.threshold), (self.policy.sink_pages, rows.sink_pages),
            (self.policy.window_tokens, rows.window_tokens),
        ):  # fmt: skip
            own[row] = value[0]
        means = [self.random.choice(NEAR_IT) for _ in range(self.pages)]
        self.sums[row] = PAGE_TOKENS * torch.tensor(means, dtype=torch.float64)

    def poison(self) -> None:
        """Of everything what means nothing now, whatever comes next."""
        page = torch.arange(self.pages)
        settled, length = self.tables.settled.cpu()[:, None], torch.tensor(self.lengths())[:, None]
        counts = self.tables.counts.cpu()
        live = (page >= settled) & (page < -(-length // PAGE_TOKENS))
        poison(self.tables.full, live | (page < counts[:, :1]))
        poison(self.tables.int8, page < counts[:, 1:2])
        poison(self.tables.int4, page < counts[:, 2:3])
        poison(self.free.stack, torch.arange(self.count) < self.free.top.cpu())
        for own in (self.turned, self.settled):
            poison(own.source, own.code.cpu() > FULL)
            poison(own.target, torch.zeros(len(own.code), dtype=torch.bool))
        self.policy.complexity.copy_(self.sums)
        poison(self.policy.complexity, live & (page < length // PAGE_TOKENS))
        for own in (self.policy.hard, self.policy.easy, self.policy.sink_pages, self.policy.window_tokens):
            poison(own, length[:, 0] > 0)

    def check_units(self) -> None:
        """Each is in one place."""
        here = replace(self.tables, lengths=self.numbers(self.lengths()))
        places = [self.free.stack[: int(self.free.top)]]
        places += [own.source[own.code > FULL] for own in (self.turned, self.settled)]
        places += [own for row in range(self.rows) for own in decoding_reference.held(here, row)]
        found = [unit for own in places for unit in own.flatten().tolist()]
        assert sorted(found) == list(range(self.count))

    def check_formats(self) -> None:
        """What the table of the reference path chooses of the same rows."""
        for row, length in enumerate(self.lengths()):
            table = PageTable(KVRows.of([self.kv[row]]))
            table.lengths, table.settled, table.complexity = [length], [0], self.sums[row : row + 1]
            chosen = {int(page): code for code, (_, found) in table.choose().items() for page in found}
            wanted = [chosen.get(page, FULL) for page in range(table.settled[0])]
            own = self.formats[row]
            assert own == wanted[: len(own)]
            assert int(self.tables.settled[row]) == len(own)
            assert self.tables.counts[row].tolist() == [own.count(code) for code in COUNTED]

    def due(self, row: int) -> int:
        """Pages of a row whose tokens have left the window and whose format is not final."""
        end = max(0, self.lengths()[row] - self.kv[row].window_tokens) // PAGE_TOKENS
        return max(0, end - int(self.tables.settled[row]))

    def settle(self, rows: list[int], *, late: bool = False) -> list[int]:
        """The launch behind a part of `rows`, held against the reference: the codes of entries. `late`: all is
        something else until it has waited."""
        self.poison()
        # Whatever codes were there, that of every entry is written.
        poison(self.settled.code, torch.zeros(self.entries, dtype=torch.bool))
        state = (self.prompts, self.free, self.policy)
        expected, listed = [_copied(own) for own in state], _copied(self.settled)
        due, before = [self.due(row) for row in rows if row >= 0], self.tables.settled.tolist()
        named = self.numbers(rows)
        written = [getattr(own, part.name) for own in state for part in fields(own)]
        with arriving([settling], named, *written) if late else nullcontext():
            settling.settle_pages(*state, named, self.settled)
        reference.settle_pages(*expected, rows, listed)
        for found, wanted in zip((*state, self.settled), (*expected, listed), strict=True):
            same(found, wanted)
        self.check_walls()
        codes = self.settled.code.tolist()
        used = len(codes) - codes.count(NONE)
        assert codes[used:] == [NONE] * (len(codes) - used)
        at, waits = 0, False
        for row, most in zip((row for row in rows if row >= 0), due, strict=True):
            more = int(self.tables.settled[row]) - before[row]
            assert more == 0 if waits else more <= most
            waits |= more < most
            self.formats[row] += codes[at : at + more]
            at += more
        assert at == used
        self.seen["waited for an entry"] += waits and used == self.entries
        self.seen["waited for units"] += waits and used < self.entries
        self.seen["many at once"] += used > 8
        for code in codes[:used]:
            self.seen[f"settled as {code}"] += 1
        self.check_units()
        self.check_formats()
        return codes

    def give_back(self, *, late: bool = False) -> None:
        self.poison()
        expected, listed = _copied(self.free), _copied(self.settled)
        written = [self.free.stack, self.free.top, self.settled.code, self.settled.source]
        with arriving([settling], *written) if late else nullcontext():
            settling.give_back(self.free, self.settled)
        reference.give_back(expected, listed)
        same(self.free, expected)
        same(self.settled, listed)
        self.check_walls()
        self.check_units()

    def check_walls(self) -> None:
        for own in (self.tables, self.free, self.turned, self.settled, self.policy):
            check_walls(own)

    def part(self, rows: list[int], lengths: list[int]) -> None:
        """A part of these rows' prompts, up to so many tokens."""
        decoding.claim(self.prompts, self.free, self.numbers(rows), self.numbers(lengths))

    def go(self, row: int) -> None:
        own = self.tables if int(self.tables.lengths[row]) else self.prompts
        decoding.leave(own, self.free, self.turned, self.numbers([row]))
        self.formats[row] = []

    def step(self) -> None:
        """A part of some rows' prompts, and a step of those that decode, behind it or in the midst; some leave."""
        rows = [row for row in range(self.rows) if not int(self.tables.lengths[row])]
        self.random.shuffle(rows)
        rows, grown = rows[: self.random.randint(0, len(rows))], []
        for row in rows:
            length = int(self.prompts.lengths[row])
            if not length:
                self.give_policy(row, self.policies[self.seen["began"] % len(self.policies)])
                self.seen["began"] += 1
                self.targets[row] = self.random.randint(1, PAGE_TOKENS * self.pages - 1)
            grown.append(min(self.targets[row], length + self.random.choice((1, 16, 40, 100))))
        self.part(rows, grown)
        in_the_midst = self.random.random() < 0.5
        self.settle([own for row in rows for own in (row, -1)[: self.random.randint(1, 2)]] or [-1])
        if in_the_midst:
            self.decode()
        pending = bool((self.settled.code > FULL).any())
        if rows and self.random.random() < (0.3 if pending else 0.1):
            self.seen["left with units pending"] += pending
            self.go(rows[0])
        self.give_back()
        for row in rows:
            if int(self.prompts.lengths[row]) == self.targets[row] and self.random.random() < 0.5:
                self.tables.lengths[row], self.prompts.lengths[row] = self.targets[row], 0
                self.seen["went on to decode"] += 1
        if not in_the_midst:
            self.decode()

    def decode(self) -> None:
        """A step of rows that decode. Those that find no units for their next page leave, and some others."""
        dry = int(self.free.dry)
        self.poison()
        decoding.turn(self.tables, self.free, self.turned, self.policy)
        for row, code in enumerate(self.turned.code.tolist()):
            self.formats[row] += [code] * (code != NONE)
        lengths = self.tables.lengths.tolist()
        began = [row for row, length in enumerate(lengths) if length and length % PAGE_TOKENS == 0]
        short = began[len(began) - (int(self.free.dry) - dry) :]
        for row, length in enumerate(lengths):
            if row in short or length + 1 == PAGE_TOKENS * self.pages or (length and self.random.random() < 0.05):
                self.tables.lengths[row] += row not in short
                self.go(row)
            elif length:
                self.tables.lengths[row] += 1
        self.check_units()
        self.check_formats()


def _copied(own: Record) -> Record:
    return type(own)(*(getattr(own, part.name).cpu().clone() for part in fields(own)))


def house(rows: int, pages: int, units: Units, device: torch.device, seed: int, *, share: float, entries: int) -> House:
    """With units for `share` of the pages that there can be, and for what is yet to be given back."""
    return House(rows, pages, units, int(share * rows * (pages * units.of(FULL) + 2)), entries, device, seed)


@UNITS
@pytest.mark.parametrize(("rows", "entries", "steps"), [(1, 20, 25), (4, 40, 50), (4, 5, 45)])
def test_prompts_beside_rows_that_decode(rows, entries, steps, units, device):
    own = house(rows, 16, units, device, entries, share=1.2, entries=entries)
    for _ in range(steps):
        own.step()
    assert not own.free.dry.any()
    assert not own.seen["waited for units"]
    assert bool(own.seen["waited for an entry"]) == (entries == 5)
    if rows > 1:
        codes = (FULL, INT8, INT4, DROPPED) if units.coded else (FULL, DROPPED)
        assert all(own.seen[f"settled as {code}"] for code in codes)
        assert own.seen["many at once"] or entries < 8
        assert own.seen["went on to decode"] > 2
        assert own.seen["left with units pending"]
    for row in range(rows):
        own.go(row)
    decoding.turn(own.tables, own.free, own.turned, own.policy)
    assert int(own.free.top) == own.count


@UNITS
def test_units_are_few(units, device):
    own = house(5, 16, units, device, 4, share=0.2, entries=30)
    for _ in range(35):
        own.step()
    assert own.seen["waited for units"] or not units.coded
    assert own.free.dry.any()


@UNITS
def test_pages_of_long_prompts(units, device):
    """More than are looked at side by side, of rows that keep some in the model's dtype and give up others."""
    pages = 2 * settling._BLOCK + 50
    own = house(2, pages, units, device, 5, share=1.0, entries=2 * pages)
    coded = ("int8", "int4") if units.coded else ("dropped", "full")
    for row, (hard, easy) in enumerate((("full", "dropped"), coded)):
        own.give_policy(row, KVSettings(hard, easy, THRESHOLD, sink_pages=1, window_tokens=20))
    own.part([0, 1], [PAGE_TOKENS * pages - 1] * 2)
    used = 0
    # Pages wait for units that others have not given back.
    while any(own.due(row) for row in (0, 1)):
        codes = own.settle([1, 0])
        used += len(codes) - codes.count(NONE)
        own.give_back()
    assert used == 2 * ((PAGE_TOKENS * pages - 1 - 20) // PAGE_TOKENS)


def three(units: int, entries: int, device: torch.device) -> House:
    """Rows of three pages each, all of them due: to be dropped, in int8, and in int4 and dropped by turns; so many
    units are free."""
    own = House(3, 4, Units(1, 8, 2), 3 * 3 * 4 + units, entries, device)
    own.part([0, 1, 2], [48, 48, 48])
    for row, (hard, easy) in enumerate((("dropped", "dropped"), ("int8", "int8"), ("dropped", "int4"))):
        own.give_policy(row, KVSettings(hard, easy, THRESHOLD, sink_pages=0, window_tokens=0))
    own.sums[2] = PAGE_TOKENS * torch.tensor([0.0, 1.0, 0.0, 1.0])
    return own


def test_rows_are_taken_in_the_order_in_which_they_are_named(device):
    own = three(30, 9, device)
    assert own.settle([-1, 2, -1, 0, 1]) == [INT4, DROPPED, INT4, *[DROPPED] * 3, *[INT8] * 3]
    # From the top of the stack downwards.
    assert own.settled.target[[0, 2], 0].tolist() == [29, 28]
    assert own.settled.target[6].tolist() == [27, 26]
    own.give_back()
    assert int(own.free.top) == 30 - 2 - 6 + 9 * 4
    assert own.settled.code.tolist() == [NONE] * 9


def test_where_entries_run_out_the_others_wait(device):
    own = three(30, 4, device)
    assert own.settle([1, 2, 0]) == [INT8, INT8, INT8, INT4]
    assert own.tables.settled.tolist() == [0, 3, 1]
    own.give_back()
    assert own.settle([1, 2, 0]) == [DROPPED, INT4, DROPPED, DROPPED]
    own.give_back()
    assert own.settle([1, 2, 0]) == [DROPPED, NONE, NONE, NONE]
    own.give_back()
    assert own.settle([1, 2, 0]) == [NONE] * 4


def test_where_units_run_out_nobody_overtakes(device):
    own = three(3, 9, device)
    # 1 unit is left behind the first page. The next wants 2; others would be content with it, or with none.
    assert own.settle([1, 2, 0]) == [INT8, *[NONE] * 8]
    assert int(own.free.top) == 1
    own.give_back()
    # The 5 that there are now are enough for two, and one of those behind; then for one more that wants none.
    assert own.settle([1, 2, 0]) == [INT8, INT8, INT4, DROPPED, *[NONE] * 5]
    own.give_back()
    assert own.settle([-1, 2, 0]) == [INT4, DROPPED, DROPPED, DROPPED, *[NONE] * 5]


def test_pages_that_stay_move_to_the_front_together(device):
    own = House(1, 8, Units(1, 8, 2), 8 * 4, 8, device)
    own.part([0], [8 * PAGE_TOKENS])
    own.give_policy(0, KVSettings("full", "dropped", THRESHOLD, sink_pages=1, window_tokens=17))
    own.sums[0] = PAGE_TOKENS * torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    before = own.tables.full[0].tolist()
    assert own.settle([0]) == [FULL, DROPPED, FULL, FULL, DROPPED, FULL, NONE, NONE]
    assert own.tables.full[0, :4].tolist() == [before[page] for page in (0, 2, 3, 5)]
    assert own.tables.full[0, 6:].tolist() == before[6:]
    assert own.settled.source[[1, 4]].tolist() == [before[1], before[4]]
    # The last token of the page behind is in the window.
    assert own.tables.settled.tolist() == [6]


def test_nothing_is_read_before_the_launch_before_has_ended(device):
    own = three(30, 8, device)
    own.settle([1, -1, 2], late=True)
    own.give_back(late=True)
    own.settle([0], late=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_sees_its_tokens_in_the_formats_of_their_pages(dtype, device):
    """Part by part with `quantise_turned` as decode has it: no token is lost, or changed otherwise, on the way."""
    units, rows, pages = Units(1, 8, dtype.itemsize), 2, 12
    own = house(rows, pages, units, device, 6, share=0.9, entries=9)
    own.give_policy(0, KVSettings("int8", "int4", THRESHOLD, sink_pages=1, window_tokens=9))
    own.give_policy(1, KVSettings("full", "dropped", THRESHOLD, sink_pages=0, window_tokens=0))
    pool = torch.full((1, own.count, 1, units.head_bytes), 255, dtype=torch.uint8, device=device)
    tokens = torch.randn(2, 1, rows, pages, PAGE_TOKENS, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes = dict.fromkeys((FULL, INT8, INT4, DROPPED), 0)
    for length in (40, 41, 100, 150, 16 * pages - 3):
        own.part([0, 1], [length, length])
        for row in range(rows):
            # What a page holds already is written again.
            for page in range(int(own.tables.settled[row]), -(-length // PAGE_TOKENS)):
                keys, values = tokens[:, :, row, page : page + 1]
                whole = decoding_reference.pack_page(FULL, {"keys": keys, "values": values}, units)
                pool[0, own.tables.full[row, page].long()] = whole[:, 0].to(device)
        own.settle([1, 0])
        quantise_turned(pool, own.settled, units, dtype)
        own.give_back()
        here = PageTables(*(x.cpu() for x in vars(own.prompts).values()))
        for row in range(rows):
            kinds: dict[int, list[Tensor]] = {FULL: [], INT8: [], INT4: [], DROPPED: []}
            for page, code in enumerate(own.formats[row]):
                codes[code] += 1
                if code != DROPPED:
                    parts = encode(code, *tokens[:, :, row, page : page + 1])
                    kinds[code].append(torch.stack(decode(code, parts, (dtype, dtype)))[:, 0, 0])
            live = tokens[:, 0, row].flatten(1, 2)[:, PAGE_TOKENS * len(own.formats[row]) : length]
            wanted = torch.cat([page for kind in kinds.values() for page in kind] + [live], 1)
            found = torch.stack(decoding_reference.read_row(pool[0].cpu(), here, row, units, dtype))
            torch.testing.assert_close(found[:, :, 0], wanted, rtol=0, atol=0)
    assert all(codes.values())

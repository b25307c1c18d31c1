"""Page tables on the device against the reference, step by step, through histories of rows that come and go.

Whatever means nothing is poisoned before every launch: entries beyond a table's, the stack above its top, sums of pages
that nobody judges. Everything is compared afterwards, poison included, so nothing else was written, and nothing read.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from policy.operating import KVRows
from policy.settings import PAGE_TOKENS, KVSettings
from runtime.kv.formats import DROPPED, FULL, INT4, INT8, NONE, decode, encode
from runtime.kv.units import Units
from runtime.ops import pages as kernels
from runtime.ops.pages import FreeUnits, PagePolicy, PageTables, Turned
from runtime.ops.reference import pages as reference
from runtime.reference.pages.table import ACTION_CODES, PageTable

from .near import arriving

Record = TypeVar("Record", PageTables, FreeUnits, Turned, PagePolicy)
POISON = torch.tensor([-1, 2**31 - 1], dtype=torch.int32)
THRESHOLD = 0.3
"""No number of float32, which takes it for more than it is."""
NEAR_IT = (THRESHOLD, float(torch.tensor(THRESHOLD)), 0.1, 0.9)
"""Mean complexities, of which the first is that of an easy page and the second that of a hard one."""
POLICIES = (
    KVSettings("int8", "int4", THRESHOLD, sink_pages=1, window_tokens=20),
    KVSettings("full", "dropped", THRESHOLD, sink_pages=0, window_tokens=0),
    KVSettings("int4", "full", THRESHOLD, sink_pages=2, window_tokens=32),
    KVSettings("full", "full", THRESHOLD, sink_pages=0, window_tokens=40),
    KVSettings("int8", "int8", THRESHOLD, sink_pages=0, window_tokens=16),
    KVSettings("dropped", "int8", THRESHOLD, sink_pages=0, window_tokens=0),
    KVSettings("int4", "int4", THRESHOLD, sink_pages=10**9, window_tokens=17),
    KVSettings("int4", "dropped", THRESHOLD, sink_pages=0, window_tokens=1),
    KVSettings("int8", "int4", THRESHOLD, sink_pages=0, window_tokens=10**9),
)


def copied(own: Record) -> Record:
    return type(own)(*(getattr(own, part.name).cpu().clone() for part in fields(own)))


def same(found: Record, wanted: Record) -> None:
    for part in fields(found):
        own, other = getattr(found, part.name).cpu(), getattr(wanted, part.name)
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True, msg=f"{part.name}: {own} {other}")


def poison(own: Tensor, meant: Tensor) -> None:
    """Replace what is not meant, a mask of the tensor's first axes."""
    unmeant = ~meant.view(*meant.shape, *[1] * (own.dim() - meant.dim())).expand_as(own)
    if own.is_floating_point():
        own[unmeant.to(own.device)] = torch.nan
    else:
        filled = POISON.repeat(own.numel() // 2 + 1)[: own.numel()].view(own.shape)
        own.copy_(torch.where(unmeant.to(own.device), filled.to(own.device), own))


@dataclass
class History:
    """Rows that come, take steps and go, on the device; every launch is held against the reference."""

    rows: int
    pages: int
    units: Units
    count: int
    """U"""
    device: torch.device
    seed: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """How often what happened"""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.tables = PageTables.of(self.rows, self.pages, self.units, self.device)
        self.free = FreeUnits.of(self.count, self.device)
        self.turned = Turned.of(self.rows, self.units, self.device)
        self.policy = PagePolicy.of(self.rows, self.pages, self.device)
        whole = {"full", "dropped"}
        self.policies = [kv for kv in POLICIES if self.units.coded or {kv.hard, kv.easy} <= whole]
        self.kv = [self.policies[0]] * self.rows
        self.sums = torch.zeros(self.rows, self.pages, dtype=torch.float64)
        """What pages are judged by"""
        self.formats: list[list[int]] = [[] for _ in range(self.rows)]

    def lengths(self) -> list[int]:
        return self.tables.lengths.tolist()

    def poison(self) -> None:
        """Of everything what means nothing now."""
        page = torch.arange(self.pages)
        settled, length = self.tables.settled.cpu()[:, None], self.tables.lengths.cpu()[:, None]
        counts = self.tables.counts.cpu()
        live = (page >= settled) & (page < -(-length // PAGE_TOKENS))
        poison(self.tables.full, live | (page < counts[:, :1]))
        poison(self.tables.int8, page < counts[:, 1:2])
        poison(self.tables.int4, page < counts[:, 2:3])
        poison(self.free.stack, torch.arange(self.count) < self.free.top.cpu())
        poison(self.turned.source, self.turned.code.cpu() > FULL)
        poison(self.turned.target, torch.zeros(self.rows, dtype=torch.bool))
        self.policy.complexity.copy_(self.sums)
        poison(self.policy.complexity, live & (page < length // PAGE_TOKENS))
        for own in (self.policy.hard, self.policy.easy, self.policy.sink_pages, self.policy.window_tokens):
            poison(own, length[:, 0] > 0)

    def check_units(self) -> None:
        """Each is in one place."""
        places = [self.free.stack[: int(self.free.top)], self.turned.source[self.turned.code > FULL]]
        places += [own for row in range(self.rows) for own in reference.held(self.tables, row)]
        found = [unit for own in places for unit in own.flatten().tolist()]
        assert sorted(found) == list(range(self.count))

    @property
    def state(self) -> tuple[PageTables, FreeUnits, Turned, PagePolicy]:
        return self.tables, self.free, self.turned, self.policy

    def compare(self, name: str, *numbers: list[int], late: bool = False) -> None:
        """One launch, and what it must equal; `late`: all is something else until it has waited."""
        self.poison()
        expected = tuple(map(copied, self.state))
        takes = {"turn": 4, "leave": 3, "claim": 2}[name]
        written = [getattr(own, part.name) for own in self.state for part in fields(own)] if late else []
        with arriving([kernels], *written) if late else nullcontext():
            getattr(kernels, name)(*self.state[:takes], *map(self.numbers, numbers))
        getattr(reference, name)(*expected[:takes], *numbers)
        for found, wanted in zip(self.state, expected, strict=True):
            same(found, wanted)

    def numbers(self, own: list[int]) -> Tensor:
        return torch.tensor(own, dtype=torch.int32, device=self.device)

    def come(self, rows: list[int], lengths: list[int]) -> None:
        """Rows begin, or go on, with prompts."""
        fresh = [row for row in rows if not self.lengths()[row]]
        self.compare("claim", rows, lengths)
        for row in fresh:
            self.give_policy(row, self.policies[self.seen["came"] % len(self.policies)])
            self.seen["came"] += 1
        self.check_units()

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

    def go(self, rows: list[int]) -> None:
        self.seen["left with units pending"] += int((self.turned.code[rows] > FULL).sum())
        self.compare("leave", rows)
        assert not any(self.lengths()[row] for row in rows)
        for row in rows:
            self.formats[row] = []
        self.check_units()

    def open(self) -> list[int]:
        """Open a step; rows that found no units for the page that they need."""
        lengths, settled = self.lengths(), self.tables.settled.tolist()
        self.compare("turn")
        short = []
        for row, code in enumerate(self.turned.code.tolist()):
            due = settled[row] < max(0, lengths[row] - self.kv[row].window_tokens) // PAGE_TOKENS
            self.formats[row] += [code] * (code != NONE)
            self.seen["waited"] += due and code == NONE
            self.seen[f"settled as {code}"] += 1
            assert due or code == NONE
            assert int(self.tables.settled[row]) == settled[row] + (code != NONE)
            page = lengths[row] // PAGE_TOKENS
            if lengths[row] and lengths[row] % PAGE_TOKENS == 0:
                entry = self.tables.full[row, page]
                short += [row] * bool(((entry < 0) | (entry >= self.count)).any())
        return short

    def count_tokens(self, but: Sequence[int] = ()) -> None:
        """What `embed` does, of some rows not."""
        more = (self.tables.lengths > 0).int()
        more[list(but)] = 0
        self.tables.lengths.add_(more)
        self.check_units()

    def check_formats(self) -> None:
        """What the table of the reference path chooses of the same rows."""
        for row, length in enumerate(self.lengths()):
            kv = self.kv[row]
            table = PageTable(KVRows.of([kv]))
            table.lengths, table.settled, table.complexity = [length], [0], self.sums[row : row + 1]
            chosen = {int(page): code for code, (_, found) in table.choose().items() for page in found}
            wanted = [chosen.get(page, FULL) for page in range(table.settled[0])]
            assert self.formats[row] == wanted[: len(self.formats[row])]
            assert self.tables.counts[row].tolist() == [self.formats[row].count(code) for code in (FULL, INT8, INT4)]

    def step(self) -> None:
        """Rows come and go at random, the others take a step."""
        lengths, most = self.lengths(), PAGE_TOKENS * self.pages
        going = [row for row, n in enumerate(lengths) if n == most or (n and self.random.random() < 0.02)]
        if going:
            self.random.shuffle(going)
            self.go(going)
        lengths = self.lengths()
        coming = [row for row, n in enumerate(lengths) if self.random.random() < (0.03 if n else 0.3)]
        if coming:
            self.random.shuffle(coming)
            self.come(coming, [min(lengths[row] + self.random.randint(1, 60), most - 1) for row in coming])
        short = self.open()
        self.check_formats()
        self.count_tokens(but=short)
        if short:
            self.seen["short"] += len(short)
            self.go(short)


UNITS = pytest.mark.parametrize(
    "units", [Units(1, 8, 2), Units(1, 8, 4), Units(1, 8, 2, coded=False)], ids=["bf16", "fp32", "uncoded"]
)


def history(rows: int, pages: int, units: Units, device: torch.device, seed: int, *, share: float = 1.0) -> History:
    """With units for `share` of the pages that there can be; what is coded away still has its own for a step."""
    return History(rows, pages, units, int(share * rows * (pages * units.of(FULL) + 2)), device, seed)


@UNITS
@pytest.mark.parametrize(("rows", "steps"), [(1, 40), (5, 100)])
def test_rows_come_take_steps_and_go(rows, steps, units, device):
    own = history(rows, 8, units, device, rows)
    for _ in range(steps):
        own.step()
    assert not own.free.dry.any()
    assert not own.seen["waited"]
    if rows > 1:
        codes = (FULL, INT8, INT4, DROPPED) if units.coded else (FULL, DROPPED)
        assert min(own.seen[f"settled as {code}"] for code in codes) > 2
        assert own.seen["left with units pending"]
    own.go(list(range(rows)))
    assert int(own.free.top) == own.count


@UNITS
def test_units_are_few(units, device):
    own = history(5, 5, units, device, 4, share=0.35)
    for _ in range(70):
        own.step()
    assert own.seen["waited"] or not units.coded
    assert own.seen["short"]
    assert int(own.free.dry) > own.seen["short"]  # a prompt that found no room is counted as well


def test_many_rows(device):
    own = history(200, 4, Units(1, 8, 2), device, 5)
    own.come(list(range(200)), [own.random.randint(1, 63) for _ in range(200)])
    for _ in range(3):
        own.step()


def test_pages_that_begin_come_first_and_nobody_overtakes(device):
    own = History(4, 4, Units(1, 8, 2), 3 * 4 + 5, device)
    own.come([0, 1, 2], [17, 16, 1])
    for row, action in enumerate(("int8", "int4", "int4")):
        own.give_policy(row, KVSettings(action, action, sink_pages=0, window_tokens=0))
    # 1 unit is free. Row 0 wants 2 units for int8, row 1 all of 4 for a page, and 1 for int4.
    assert own.open() == [1]
    assert int(own.free.dry) == 1
    assert own.turned.code.tolist() == [NONE] * 4
    assert own.tables.settled.tolist() == [0] * 4
    # Without row 1 there are 5.
    own.go([1])
    assert own.open() == []
    assert own.turned.code.tolist() == [INT8, NONE, NONE, NONE]
    assert int(own.free.dry) == 1


def test_a_page_is_moved_to_the_front_and_units_come_back_a_step_later(device):
    own = History(1, 4, Units(1, 8, 2), 32, device)
    own.come([0], [48])
    own.give_policy(0, KVSettings("full", "dropped", sink_pages=0, window_tokens=0))
    own.sums[0] = torch.tensor([0.0, 16.0, 0.0, 0.0])
    first, second = own.tables.full[0, :2].tolist()
    own.open()
    own.count_tokens()
    assert own.turned.code.tolist() == [DROPPED]
    assert own.turned.source.tolist() == [first]
    own.open()
    assert own.turned.code.tolist() == [FULL]
    assert own.tables.full[0, 0].tolist() == second
    assert own.free.stack[: int(own.free.top)].tolist()[-4:] == first
    assert own.tables.counts.tolist() == [[1, 0, 0]]


def test_nothing_is_read_before_the_launch_before_has_ended(device):
    own = history(3, 5, Units(1, 8, 2), device, 6)
    own.come([0, 1, 2], [64, 33, 17])
    own.open()
    own.count_tokens()
    for name, numbers in (("turn", ()), ("claim", ([1, 2], [50, 51])), ("leave", ([2, 0],))):
        own.compare(name, *numbers, late=True)


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("channels", [8, 20, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pages_of_every_format_are_read_back(dtype, channels, coded):
    units = Units(3, channels, dtype.itemsize, coded)
    keys, values = torch.randn(2, 3, 5, PAGE_TOKENS, channels).to(dtype)
    for code in (FULL, INT8, INT4) if coded else (FULL,):
        parts = encode(code, keys, values)
        packed = reference.pack_page(code, parts, units)
        assert packed.shape == (units.of(code), 5, 3, units.head_bytes)
        found = reference.unpack_page(code, packed, units, dtype)
        assert found.keys() == parts.keys()
        for name, own in found.items():
            torch.testing.assert_close(own, parts[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_sees_settled_pages_then_live_ones(dtype):
    units = Units(2, 12, dtype.itemsize)
    formats, length = [INT4, FULL, DROPPED, INT8, FULL, INT8], 16 * 6 + 16 + 5
    keys, values = torch.randn(2, 2, 8, PAGE_TOKENS, 12).to(dtype)
    pool = torch.full((200, 2, units.head_bytes), 255, dtype=torch.uint8)
    order = torch.randperm(200).tolist()
    tables = PageTables.of(2, 10, units, torch.device("cpu"))
    for table in (tables.full, tables.int8, tables.int4):
        table.fill_(2**31 - 1)
    wanted: dict[int, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in (FULL, INT8, INT4, NONE)}
    for page, code in enumerate([*formats, NONE, NONE]):
        if code == DROPPED:
            continue
        form = code or FULL
        parts = encode(form, keys[:, page : page + 1], values[:, page : page + 1])
        numbers = torch.tensor([order.pop() for _ in range(units.of(form))])
        pool[numbers[:, None]] = reference.pack_page(form, parts, units)
        table = {FULL: tables.full, INT8: tables.int8, INT4: tables.int4}[form]
        table[1, page if code == NONE else len(wanted[code])] = numbers
        wanted[code].append(decode(form, parts, (dtype, dtype)))
    tables.lengths[1], tables.settled[1], tables.counts[1] = length, 6, torch.tensor([2, 2, 1])
    found = reference.read_row(pool, tables, 1, units, dtype)
    for own, part in zip(found, (0, 1), strict=True):
        pages = torch.cat([page[part] for kind in wanted.values() for page in kind], 1).flatten(1, 2)
        seen = pages[:, : 16 * 6 + 5].transpose(0, 1)
        torch.testing.assert_close(own, seen, rtol=0, atol=0)
    assert [own.shape for own in reference.read_row(pool, tables, 0, units, dtype)] == [(0, 2, 12)] * 2
    exact = reference.read_row(pool, tables, 1, units, dtype, torch.float64)
    for own, other in zip(exact, found, strict=True):
        torch.testing.assert_close(own.to(dtype), other, rtol=0, atol=0)


def test_a_row_of_units_that_are_pages():
    units, dtype = Units(2, 12, 2, coded=False), torch.bfloat16
    keys, values = torch.randn(2, 2, 3, PAGE_TOKENS, 12).to(dtype)
    pool = torch.full((9, 2, units.head_bytes), 255, dtype=torch.uint8)
    tables = PageTables.of(1, 4, units, torch.device("cpu"))
    tables.full[0, :3, 0], tables.lengths[0] = torch.tensor([7, 0, 4]), 40
    pool[tables.full[0, :3].long().T] = reference.pack_page(FULL, {"keys": keys, "values": values}, units)
    found = reference.read_row(pool, tables, 0, units, dtype)
    for own, whole in zip(found, (keys, values), strict=True):
        assert torch.equal(own, whole.flatten(1, 2).transpose(0, 1)[:40])

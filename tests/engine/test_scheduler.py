"""Who runs and who waits: what a row may take is never less than what the device takes of units, and not much more."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy import KVSettings, Operating
from policy.settings import FULL_KV, PAGE_TOKENS
from runtime.engine.model import model_of
from runtime.engine.request import Answer, Request
from runtime.engine.scheduler import LEAST_PAGES, Account, Queue, Seat, most_units, pool_units
from runtime.kv.formats import FORMATS, FULL
from runtime.kv.units import Units
from tests.engine import tiny

CODED = Units(1, 8, 4)
"""A page in float32 is eight of them."""
NARROW = Units(2, 16, 2)
"""In bfloat16 it is four."""
PLAIN = Units(1, 8, 4, coded=False)


def answer_of(prompt: int = 5, new: int = 4, kv: KVSettings = FULL_KV, number: int = 0, priority: int = 0) -> Answer:
    operating = Operating.at(0.0, 0, kv)
    return Answer(Request([1] * prompt, operating, max_new_tokens=new, priority=priority), number)


@dataclass
class Row:
    """What the device has of a row."""

    seat: Seat
    kv: KVSettings
    length: int = 0
    settled: int = 0
    held: list[int] = field(default_factory=list)
    """Units of every page"""
    pending: int = 0
    """Units of the page that was coded away at the last step"""


class Device:
    """Units as `turn`, `claim`, `settle_pages`, `give_back` and `leave` count them, page by page."""

    def __init__(self, free: int, units: Units, draw: random.Random) -> None:
        self.free, self.units, self.draw = free, units, draw
        self.rows: list[Row] = []

    def take(self, count: int) -> None:
        self.free -= count
        assert self.free >= 0, "the pool is dry"

    def settle(self, row: Row) -> int:
        """The page behind the settled ones gets its format; what is free again when it has been written."""
        kv = row.kv
        action = "full" if row.settled < kv.sink_pages else self.draw.choice([kv.hard, kv.easy])
        taken = self.units.of(FORMATS.index(action))
        before, row.settled = row.settled, row.settled + 1
        if action == "full":
            return 0
        self.take(taken)
        gone, row.held[before] = row.held[before], taken
        return gone

    def due(self, row: Row) -> bool:
        return row.settled < max(row.length - row.kv.window_tokens, 0) // PAGE_TOKENS

    def part(self, row: Row, tokens: int) -> None:
        """A pass over a prompt: pages are claimed, then all that are due are coded, then what they were is free."""
        row.length += tokens
        while len(row.held) * PAGE_TOKENS < row.length:
            self.take(self.units.of(FULL))
            row.held.append(self.units.of(FULL))
        if self.units.coded:
            gone = 0
            while self.due(row):
                gone += self.settle(row)
            self.free += gone

    def step(self, rows: list[Row]) -> None:
        """A step of decode."""
        for row in rows:
            self.free += row.pending
            row.pending = 0
        for row in rows:
            if row.length % PAGE_TOKENS == 0:
                self.take(self.units.of(FULL))
                row.held.append(self.units.of(FULL))
        for row in rows:
            if self.due(row):
                row.pending = self.settle(row)
            row.length += 1

    def leave(self, row: Row) -> None:
        self.free += sum(row.held) + row.pending
        self.rows.remove(row)


def drawn_kv(draw: random.Random, units: Units) -> KVSettings:
    actions = ("full", "int8", "int4", "dropped") if units.coded else ("full",)
    hard, easy = draw.choice(actions), draw.choice(actions)
    return KVSettings(hard, easy, 0.5, draw.choice([0, 1, 3]), draw.choice([0, 5, 16, 31, 40]))


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from([CODED, NARROW, PLAIN]))
def test_what_is_launched_never_takes_more_than_was_promised(seed, units):
    """Rows come, grow by parts and steps, and go; the host is told how many units are free a step late, if at all."""
    draw = random.Random(seed)
    device = Device(units.of(FULL) * draw.choice([6, 12, 20]), units, draw)
    account, notes = Account(device.free), []
    for _ in range(60):
        if draw.random() < 0.4:
            kv = drawn_kv(draw, units)
            device.rows.append(Row(Seat(answer_of(kv=kv), 0, units), kv))
        begun = [row for row in device.rows if row.length]
        for row in device.rows:
            tokens = draw.randint(1, 70)
            if (row not in begun) or draw.random() < 0.1:
                most = row.seat.prompt_units(tokens)
                if most <= account.least:
                    account.take(most)
                    row.seat.prompted(tokens)
                    device.part(row, tokens)
        going = [row for row in begun if draw.random() < 0.9]
        most = sum(row.seat.step_units() for row in going)
        if most <= account.least:
            account.take(most)
            device.step(going)
            for row in going:
                row.seat.stepped()
        assert account.least <= device.free
        for row in device.rows:
            assert row.seat.length == row.length
            if units.coded:
                assert row.seat.settled == row.settled
        notes.append(device.free)
        account.note()
        while len(notes) > draw.choice([0, 1, 1, 2]):
            account.told(notes.pop(0))
            assert account.least <= device.free
        if device.rows and draw.random() < 0.25:
            device.leave(draw.choice(device.rows))
        if draw.random() < 0.1:
            notes.clear()
            account.known(device.free)
            assert account.least == device.free


@pytest.mark.parametrize("units", [CODED, NARROW, PLAIN])
@pytest.mark.parametrize("action", ["full", "int8", "int4", "dropped"])
def test_what_is_promised_is_what_is_taken_where_every_page_gets_the_same_format(units, action):
    if action != "full" and not units.coded:
        return
    kv = KVSettings(action, action, sink_pages=0, window_tokens=20)
    for first, second in ((5, 60), (16, 16), (33, 3), (48, 50)):
        device = Device(10**6, units, random.Random(0))
        row = Row(Seat(answer_of(kv=kv), 0, units), kv)
        for tokens in (first, second):
            most, before = row.seat.prompt_units(tokens), device.free
            row.seat.prompted(tokens)
            settled = row.settled
            device.part(row, tokens)
            gone = (row.settled - settled) * units.of(FULL) if action != "full" else 0
            assert most == before - device.free + gone
        for _ in range(60):
            most, before, back = row.seat.step_units(), device.free, row.pending
            row.seat.stepped()
            device.step([row])
            assert most == before + back - device.free


def test_the_dearer_of_two_formats_is_what_a_page_may_take():
    kv = KVSettings("int4", "int8", window_tokens=0)
    seat = Seat(answer_of(kv=kv), 0, CODED, length=16)
    assert seat.step_units() == 8 + 2
    assert Seat(answer_of(kv=KVSettings("dropped", "full", window_tokens=0)), 0, CODED, length=17).step_units() == 0
    assert seat.prompt_units(33) == 3 * 8 + 3 * 2


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from([CODED, NARROW, PLAIN]))
def test_a_request_alone_never_waits_in_a_pool_that_it_was_let_into(seed, units):
    """Of as many units as it takes at most there are always enough: else it would give way to itself for ever."""
    draw = random.Random(seed)
    kv, part = drawn_kv(draw, units), draw.choice([1, 16, 30, 64])
    prompt, new = draw.randint(1, 150), draw.randint(1, 80)
    answer = answer_of(prompt, new, kv)
    device = Device(most_units(answer, units, part), units, draw)
    row = Row(Seat(answer, 0, units), kv)
    while row.length < prompt:
        tokens = min(part, prompt - row.length)
        assert row.seat.prompt_units(tokens) <= device.free
        row.seat.prompted(tokens)
        device.part(row, tokens)
    # The host learns a step late that it is over.
    for _ in range(new):
        assert row.seat.step_units() <= device.free
        row.seat.stepped()
        device.step([row])


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from([CODED, NARROW, PLAIN]))
def test_who_is_let_in_gets_as_far_as_it_was(seed, units):
    """With what is to come and no unit more, from wherever on, a row gets through its prompt and its answer so far."""
    draw = random.Random(seed)
    kv, part = drawn_kv(draw, units), draw.choice([1, 16, 30, 64])
    prompt, answered = draw.randint(1, 150), draw.choice([0, 1, 40, 90])
    answer = answer_of(prompt, answered + 1, kv)
    answer.tokens = [1] * answered
    device = Device(10**6, units, draw)
    row, known = Row(Seat(answer, 0, units), kv), prompt + max(0, answered - 1)
    begin = draw.randint(0, known - 1)
    while row.length < known:
        if row.length >= begin and device.free > 10**5:
            device.free = row.seat.to_come(part)
        if row.length < prompt:
            tokens = min(part, prompt - row.length)
            assert row.seat.prompt_units(tokens) <= device.free
            row.seat.prompted(tokens)
            device.part(row, tokens)
        else:
            assert row.seat.step_units() <= device.free + row.pending
            row.seat.stepped()
            device.step([row])
    assert row.seat.to_come(part) == 0


def test_a_long_prompt_whose_pages_are_coded_is_let_in_where_there_is_room_for_it_coded():
    """Not as if all of it were in the model's dtype at once."""
    kv = KVSettings("int4", "int4", sink_pages=1, window_tokens=32)
    seat = Seat(answer_of(1600, 4, kv), 0, CODED)
    assert seat.prompt_units(1600) > 800
    assert 100 < seat.to_come(64) < 250
    seat.prompted(64)
    rest = seat.to_come(64)
    assert rest < Seat(answer_of(1600, 4, kv), 0, CODED).to_come(64)


def test_the_account_forgets_what_it_has_been_told_of():
    account = Account(10)
    account.take(3)
    account.note()
    account.take(2)
    account.note()
    assert account.least == 5
    account.told(8)  # at the first note; some have come back
    assert account.least == 6
    account.told(4)
    assert account.least == 4
    account.take(4)
    with pytest.raises(AssertionError, match="nobody takes"):
        account.take(1)
    account.known(9)
    assert account.least == 9


def test_who_waits_is_let_in_by_priority_and_then_by_arrival():
    queue = Queue()
    given = [answer_of(number=number, priority=priority) for number, priority in enumerate((0, 2, 0, 2, -1))]
    for answer in given[::-1]:
        queue.put(answer)
    assert not queue.remove(answer_of(number=1, priority=2)), "another one of the same rank"
    assert queue.remove(given[3])
    assert not queue.remove(given[3])
    order = []
    while len(queue):
        order.append(queue.first.number)
        queue.remove(queue.first)
    assert order == [1, 0, 2, 4]
    assert queue.first is None
    # Who gives way first is the last of these.
    assert max(given, key=lambda own: own.rank) is given[4]


def test_the_size_of_a_pool(device):
    model = model_of(tiny.model(layers=2, device=device), 8)
    for coded, page, turning in ((True, 8, 2), (False, 1, 0)):
        units = Units(1, 8, 4, coded)
        each, least = 2 * units.bytes, LEAST_PAGES * page
        assert pool_units(model, 3, 33, 10**9, coded=coded) == 3 * 3 * (page + turning), "what rows may ever have"
        assert pool_units(model, 3, 33, each * least + each - 1, coded=coded) == least
        with pytest.raises(MemoryError, match=f"pool_bytes: expected at least {each * least}, got 77;"):
            pool_units(model, 3, 33, 77, coded=coded)
        assert pool_units(model, 1, 17, 10**9, coded=coded) == 2 * (page + turning), "less than the least of others"
    if model.device.type != "cuda":
        assert pool_units(model, 3, 33, None, coded=False) == 9


@pytest.mark.parametrize("units", [CODED, NARROW, PLAIN])
def test_a_pool_without_a_limit_has_room_for_a_row_as_long_as_any(units, device):
    model = model_of(tiny.model(device=device), 8)
    draw = random.Random(0)
    for _ in range(50):
        kv, tokens = drawn_kv(draw, units), draw.randint(2, 200)
        prompt = draw.randint(1, tokens - 1)
        answer = answer_of(prompt, tokens - prompt, kv)
        own = Units(model.shape.kv_heads, model.shape.head_dim, model.dtype.itemsize, units.coded)
        count = pool_units(model, 1, tokens + 1, 10**9, coded=units.coded)
        assert most_units(answer, own, 512) <= count

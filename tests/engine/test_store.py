"""Ladders in a store: the bytes that its tables point to are those of the ladders, and no others are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from runtime.engine.store import AdapterStore, Module, needed_bytes
from runtime.ladder import Ladder, build_ladder
from runtime.ladder.formats import BITS, CODED, LEVELS
from runtime.ops.packed import ALIGNMENT, FIRSTS, ROWS, SCALES, STARTS_A, STARTS_B
from runtime.packing import unpack
from tests.ops.ladders import RANK, ladders_of, mixed_ladder, random_adapter

MODULES = {"one": Module(20, 100, 64), "two": Module(36, 24, 8), "three": Module(4, 36, 16), "four": Module(8, 8, 8)}
CPU = torch.device("cpu")
FP32 = torch.float32


@pytest.fixture(scope="module")
def ladders() -> list[Ladder]:
    """Handmade ones, one in all formats, one of which a part is resident, an svd one, and one of a few modules."""
    found = [*ladders_of(MODULES), build_ladder(random_adapter(MODULES, 5, 7), (0, 2))]
    banks, edges = ({name: own[name] for name in ("three", "one")} for own in found[0].banks), found[0].edges[:, [2, 0]]
    return [*found, replace(found[0], banks=tuple(banks), edges=edges)]


def store_of(ladders: list[Ladder], *, slots: int = 8, extra: int = 0, dtype: torch.dtype = FP32) -> AdapterStore:
    """An empty store with room for these ladders, garbage in its arena."""
    size = needed_bytes(ladders, MODULES, RANK, dtype) + extra
    store = AdapterStore(
        MODULES, slots=slots, capacity_bytes=size, rungs=6, directions=RANK, dtype=dtype, device=CPU
    )  # fmt: skip
    store.arena.fill_(255)
    return store


@dataclass(frozen=True)
class Found:
    """Directions first to stop of a module at a format, as they lie in a store."""

    first: int
    stop: int
    a: Tensor
    """[n, D] values of 16 and 8 bits in the store's dtype, codes of fewer"""
    b: Tensor
    """[n, N]"""
    scales: Tensor
    """[n] float32, of codes; none of values"""


def stored(store: AdapterStore, slot: int, bank: int, name: str) -> Iterator[tuple[int, Found]]:
    """By bits what lies in the store, read by nothing but the tables."""
    own, part = MODULES[name], store.tables.parts[slot, bank, list(MODULES).index(name)].tolist()
    for f, bits in enumerate(BITS):
        rows, first = part[ROWS - STARTS_A + f], part[FIRSTS - STARTS_A + f - 1] if f else 0
        if not rows:
            continue

        def read(field: int, count: int, bits: int = bits, part: list[int] = part) -> Tensor:
            """count values of 16 or 8 bits, or the bytes of as many codes."""
            stretch = store.arena[part[field - STARTS_A] * ALIGNMENT :]
            if bits >= 8:
                return stretch[: count * store.dtype.itemsize].view(store.dtype)
            return stretch[: count * bits // 8]

        blocks = -(-own.outputs // own.columns)
        a, b = read(STARTS_A + f, rows * own.inputs), read(STARTS_B + f, blocks * rows * own.columns)
        if bits < 8:
            a = unpack(a.view(rows, -1), bits, own.inputs)
            b = unpack(b.view(blocks, rows, -1), bits, own.columns)
        whole = b.view(blocks, rows, own.columns).transpose(0, 1).flatten(1)
        assert not whole[:, own.outputs :].any(), "the last block is filled up with zeros"
        start = part[SCALES - STARTS_A] * ALIGNMENT
        scales = store.arena[start : start + 4 * 2 * RANK].view(FP32).view(2, RANK)
        scale = scales[f - 2, first : first + rows] if bits < 8 else scales[:0]
        yield bits, Found(first, first + rows, a.view(rows, -1), whole[:, : own.outputs], scale)


def check(store: AdapterStore, slot: int, ladder: Ladder) -> None:
    """All that the ladder's resident rungs read lies in the slot, and nothing else is named there."""
    assert store.ladders[slot] is ladder
    names, read = list(ladder.modules), set()
    for name in MODULES:
        number = list(MODULES).index(name)
        for j in range(store.tables.edges.shape[1]):
            ends = store.tables.edges[slot, j, number].tolist()
            if name not in names or j > ladder.highest:
                assert ends == [0, 0, 0, 0]
                continue
            assert ends == ladder.edges[j, names.index(name)].tolist()
            bank = int(store.tables.bank_of[slot, j])
            assert bank == ladder.bank_of[j]
            there = dict(stored(store, slot, bank, name))
            for bits, start, stop in zip(BITS, [0, *ends], ends, strict=False):
                if stop > start:
                    check_range(there[bits], bits, start, stop, ladder, bank, name)
                    read.add((bank, name, bits))
    kept = {
        (bank, name, bits)
        for bank in range(store.tables.parts.shape[1])
        for name in MODULES
        for bits, _ in stored(store, slot, bank, name)
    }
    assert kept == read


def check_range(found: Found, bits: int, start: int, stop: int, ladder: Ladder, bank: int, name: str) -> None:
    assert found.first <= start < stop <= found.stop
    here = slice(start - found.first, stop - found.first)
    own = ladder.banks[bank][name]
    for half, rows in ((found.a, own.a), (found.b, own.b)):
        wanted = rows.wide[start:stop].to(half.dtype) if bits == 16 else rows.codes(start, stop, bits)
        if bits == 8:
            values = LEVELS[8][wanted.int()] * rows.scales[CODED.index(8)][start:stop, None].float()
            wanted = values.to(half.dtype)
        assert torch.equal(half[here], wanted)
    if bits < 8:
        scales = [rows.scales[CODED.index(bits)][start:stop].float() for rows in (own.a, own.b)]
        assert torch.equal(found.scales[here], scales[0] * scales[1])


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_what_lies_where_the_tables_say(dtype, ladders):
    store = store_of(ladders, dtype=dtype)
    assert [store.load(ladder) for ladder in ladders] == list(range(len(ladders)))
    for slot, ladder in enumerate(ladders):
        check(store, slot, ladder)
        assert store.bytes_of(slot) == needed_bytes([ladder], MODULES, RANK, dtype)
    assert sum(map(store.bytes_of, range(8))) == len(store.arena), "the store is full to the last byte"


@pytest.mark.parametrize(("dtype", "value"), [(FP32, 4), (torch.bfloat16, 2)], ids=str)
def test_bytes_by_hand(dtype, value):
    """One, one, three and two directions at 16, 8, 4 and 2 bits: those at 8 bits are numbers as well."""
    modules = {"one": Module(256, 128, 64)}
    whole = mixed_ladder(modules, 0)
    numbers, codes = 2 * (256 + 128) * value, (3 * 128 + 256) + (128 + 128)
    assert needed_bytes([whole.up_to(whole.rungs[0])], modules, RANK, dtype) == 128 + numbers + codes


def test_ladders_come_and_go(ladders):
    small, middle, large = sorted({needed(own): own for own in ladders}.values(), key=needed)[-3:]
    assert needed(middle) < needed(large) <= needed(small) + needed(middle), "two that are gone make room for it"
    store = store_of([small, middle, large])
    for ladder in (small, middle, large):
        store.load(ladder)
    before = tables_of(store)
    for slot in (0, 1):
        store.evict(slot)
        assert (store.ladders[slot], store.bytes_of(slot)) == (None, 0)
    assert store.load(large) == 0
    for slot in (0, 2):
        check(store, slot, large)
    for table, old in zip(tables_of(store), before, strict=True):
        assert torch.equal(table[1:], old[1:]), "rows that name other slots may be at work"
    with pytest.raises(ValueError, match="slot: expected one that holds an adapter, got 1; it is empty already"):
        store.evict(1)


def tables_of(store: AdapterStore) -> list[Tensor]:
    return [own.clone() for own in (store.tables.edges, store.tables.bank_of, store.tables.parts)]


def needed(ladder: Ladder) -> int:
    return needed_bytes([ladder], MODULES, RANK, FP32)


def test_loads_in_the_background(ladders):
    store = store_of(ladders[:2])
    slots = [store.load_later(ladder) for ladder in ladders[:2]]
    for slot, ladder in zip(slots, ladders, strict=False):
        check(store, slot.result(timeout=60), ladder)
    with pytest.raises(MemoryError):
        store.load_later(ladders[0]).result(timeout=60)


def test_a_full_store_says_so_in_a_line_and_stays_as_it_is(ladders):
    store = store_of(ladders[:2], extra=-ALIGNMENT)
    store.load(ladders[0])
    tables = tables_of(store)
    with pytest.raises(MemoryError, match=r"adapters: expected \d+ bytes in one stretch, got \d+ of \d+") as error:
        store.load(ladders[1])
    assert "\n" not in str(error.value)
    for table, old in zip(tables_of(store), tables, strict=True):
        assert torch.equal(table, old)
    check(store, 0, ladders[0])
    store.evict(0)
    assert store.load(ladders[1]) == 0
    one = store_of(ladders[:2], slots=1)
    one.load(ladders[0])
    with pytest.raises(MemoryError, match="adapters: expected at most 1 at a time, got one more") as error:
        one.load(ladders[1])
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_model_is_refused_by_name(ladders):
    strange = {**MODULES, "five": Module(8, 8, 8)}
    wide = {**MODULES, "four": Module(8, 12, 8)}
    store = store_of(ladders[:1])
    for modules, message in (
        (strange, "adapter: expected linears of the model's layers, got five"),
        (wide, r"adapter: expected four with \(in, out\) \(8, 8\), got \(8, 12\); it is of another model"),
    ):
        with pytest.raises(ValueError, match=message):
            store.load(build_ladder(random_adapter(modules, 2, 0)))
    assert store.ladders == [None] * 8


@pytest.mark.parametrize(("name", "room"), [("rungs", 5), ("banks", 2), ("directions", 7)])
def test_more_than_there_is_room_for_is_refused(name, room, ladders):
    options = {"rungs": 6, "banks": 3, "directions": 8} | {name: room}
    store = AdapterStore(MODULES, slots=1, capacity_bytes=2**20, dtype=FP32, device=CPU, **options)
    with pytest.raises(ValueError, match=f"{name}: expected at most {room}, got {room + 1}; make the store with more"):
        store.load(ladders[0])


def test_rungs_above_the_resident_one_need_no_room(ladders):
    part = ladders[0].up_to(ladders[0].rungs[1])
    store = AdapterStore(
        MODULES, slots=1, capacity_bytes=needed(part), rungs=6, directions=RANK, dtype=FP32, device=CPU
    )
    check(store, store.load(part), part)
    assert needed(part) < needed(ladders[0])

"""What adapters add to the outputs of linears, and what becomes of those, against float64.

A layer of awkward widths is the second of two, so its modules begin at number 7. Adapters of all kinds lie in one
store. Whatever no row may read is NaN: the arena around them, scales of what is not read, directions of u that a row
does not have, every buffer's surroundings, and what is to be written before it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from policy.settings import PAGE_TOKENS
from runtime.engine.store import AdapterStore, Module
from runtime.ladder import Ladder
from runtime.ops import alone
from runtime.ops.alone import Source, linear_gated, linear_residual, linear_rotary, residual_programs
from runtime.ops.expand import Cut
from runtime.ops.gated import gate_up
from runtime.ops.linear import linear
from runtime.ops.norm import Norm
from runtime.ops.packed import Reads
from runtime.ops.reference import decode as reference
from runtime.ops.residual import add_residual, embed, squares_of
from runtime.ops.resolve import Rows, reads_for, resolve
from runtime.ops.rotary import Heads, Pages, rotate
from runtime.ops.shrink import Shrink, shrink
from tests.ops.ladders import RANK, factors, ladders_of, stored
from tests.ops.near import check_guards, check_near, guarded, poisoned

HIDDEN, INNER, HEADS, KV_HEADS, CHANNELS, COLUMNS = 116, 76, 3, 1, 20, 32
LAYER = {
    "q": Module(HIDDEN, HEADS * CHANNELS, CHANNELS),
    "k": Module(HIDDEN, KV_HEADS * CHANNELS, CHANNELS),
    "v": Module(HIDDEN, KV_HEADS * CHANNELS, CHANNELS),
    "o": Module(HEADS * CHANNELS, HIDDEN, COLUMNS),
    "gate": Module(HIDDEN, INNER, COLUMNS),
    "up": Module(HIDDEN, INNER, COLUMNS),
    "down": Module(INNER, HIDDEN, COLUMNS),
}
MODULES = {f"{layer}.{name}": own for layer in range(2) for name, own in LAYER.items()}
QKV, GATE_UP, OUT = ("1.q", "1.k", "1.v"), ("1.gate", "1.up"), ("1.o",)
FP32, BF16 = torch.float32, torch.bfloat16
EPS = 0.1
GARBAGE = 2**30

Use = tuple[int, int, float]
"""Of a row its slot, rung and weight."""
BATCHES: dict[str, list[Use]] = {
    "kinds": [(0, 3, 0.7), (-1, GARBAGE, 0.9), (2, 1, -1.3), (1, 5, 1.0), (1, 2, 0.0)],
    "mixed": [(2, 0, 0.8), (3, 3, 1.1), (2, 2, 1.0), (3, 1, 0.6)],
    "few bits": [(0, 0, 1.0), (1, 1, -0.9), (0, 4, 1.2)],
    "exact": [(2, 3, 0.5), (0, 5, 1.0)],
}


@dataclass(frozen=True)
class Adapters:
    """Resident ladders, and what rows read of them."""

    store: AdapterStore
    dtype: torch.dtype

    def reads(self, uses: list[Use]) -> Reads:
        device = self.store.device
        slot, rung, weight = (torch.tensor(own, device=device) for own in zip(*uses, strict=True))
        reads = reads_for(len(uses), len(MODULES), self.store.arena, self.dtype)
        resolve(reads, Rows(slot.int(), rung.int(), weight.float()), self.store.tables)
        return reads

    def factors(self, uses: list[Use], name: str, dtype: torch.dtype) -> list[reference.Factors]:
        """What every row reads of a module, in `dtype`."""
        own, found = MODULES[name], []
        for slot, rung, _ in uses:
            ladder = self.store.ladders[slot] if rung != GARBAGE else None
            none = torch.zeros(0, own.inputs), torch.zeros(0, own.outputs)
            found.append(none if ladder is None else factors(ladder, name, rung))
        return [tuple(half.to(self.store.device, dtype) for half in pair) for pair in found]


@pytest.fixture(scope="module")
def ladders() -> list[Ladder]:
    return ladders_of(MODULES)


@pytest.fixture(scope="module")
def stores(ladders, device) -> dict[torch.dtype, Adapters]:
    """By dtype of the model."""
    return {dtype: Adapters(stored(ladders, MODULES, dtype, device), dtype) for dtype in (FP32, BF16)}


@pytest.fixture(autouse=True)
def several_steps(monkeypatch):
    """Programs that do everything for one row go through several pairs of outputs, on a large device too."""
    monkeypatch.setattr(alone, "_multiprocessors", lambda device: 4)


class Group:
    """Linears that share their input, what rows of a batch give them, and what adapters add."""

    def __init__(self, adapters: Adapters, names: tuple[str, ...], uses: list[Use], *, normed: bool, seed: int = 0):
        self.adapters, self.names, self.uses = adapters, names, uses
        self.random, self.device, self.dtype = (
            torch.Generator().manual_seed(seed),
            adapters.store.device,
            adapters.dtype,
        )
        batch, inputs = len(uses), MODULES[names[0]].inputs
        self.outputs = [MODULES[name].outputs for name in names]
        self.x = self.drawn(batch, inputs).div_(10)  # so that no exponential overflows
        self.weights = tuple(self.drawn(n, inputs) for n in self.outputs)
        self.biases = tuple(self.drawn(n) for n in self.outputs) if normed else None
        self.squares = guarded(torch.rand(batch, 3, generator=self.random).to(self.device) * inputs / 10)
        self.norm = Norm(self.squares, EPS) if normed else None
        self.reads = adapters.reads(uses)

    def drawn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return guarded(torch.randn(*shape, generator=self.random).to(self.device, dtype or self.dtype))

    @property
    def site(self) -> int:
        return list(MODULES).index(self.names[0])

    def shrink(self, **cut: int) -> Shrink:
        """What the kernel makes of the rows' directions; those that a row does not read stay as they are."""
        u = poisoned(len(self.uses), len(self.names), RANK, device=self.device)
        shrink(self.x, u, self.reads, self.site, self.norm, **cut)
        check_guards(u)
        self.check_untouched(u)
        return Shrink(u, self.reads, self.site)

    def check_untouched(self, u: Tensor) -> None:
        for member, name in enumerate(self.names):
            counts = [len(own[0]) for own in self.adapters.factors(self.uses, name, FP32)]
            for row, (count, (_, _, weight)) in enumerate(zip(counts, self.uses, strict=True)):
                assert u[row, member, count if weight else 0 :].isnan().all()

    def y(self) -> Tensor:
        """[B, all outputs] of linears, as if a kernel had put them out."""
        return self.drawn(len(self.uses), sum(self.outputs), dtype=FP32)

    def adapted(self, dtype: torch.dtype, y: Tensor | None = None) -> Tensor:
        """y and what adapters add, in PyTorch; without a y, with that of the linears.

        In float64 factors are what codes and scales say, in float32 what they are in the model's dtype.
        """
        x = self.x.to(torch.promote_types(self.dtype, dtype))
        norm = {"squares": None if self.norm is None else self.squares, "eps": EPS}
        weight = torch.tensor([own[2] for own in self.uses], device=self.device)
        read = [self.adapters.factors(self.uses, name, x.dtype if dtype != FP32 else self.dtype) for name in self.names]
        added = torch.cat([reference.updates(x, own, weight, **norm) for own in read], 1)
        return added + (reference.linear(x, self.weights, biases=self.biases, **norm) if y is None else y)


class ResidualCase(Group):
    """The o projection, the residual, and the next norm."""

    def __init__(self, adapters: Adapters, uses: list[Use], seed: int = 0):
        super().__init__(adapters, OUT, uses, normed=False, seed=seed)
        self.r, self.weight = self.drawn(len(uses), HIDDEN, dtype=FP32), self.drawn(HIDDEN)

    def outputs_of(self, programs: int) -> tuple[Tensor, Tensor, Tensor]:
        """r, normed and squares that a kernel writes."""
        normed = poisoned(len(self.uses), HIDDEN, device=self.device, dtype=self.dtype)
        return guarded(self.r), normed, poisoned(len(self.uses), programs, device=self.device)

    def check(self, found: tuple[Tensor, Tensor, Tensor], y: Tensor | None = None) -> None:
        check_guards(*found)
        r, normed, squares = found
        truth = reference.add_residual(self.adapted(torch.float64, y), self.r, self.weight, torch.float64)
        eager = reference.add_residual(self.adapted(FP32, y), self.r, self.weight, self.dtype)
        check_near(r, eager[0], truth[0])
        check_near(normed, eager[1], truth[1])
        # One number of a row, of which PyTorch's error may be any: here against the residual that was written.
        check_near(*(own.sum(1, keepdim=True) for own in (squares, r.square(), r.double().square())))


class GatedCase(Group):
    """Gate and up projection and their product."""

    def __init__(self, adapters: Adapters, uses: list[Use], seed: int = 0):
        super().__init__(adapters, GATE_UP, uses, normed=True, seed=seed)

    def inner(self) -> Tensor:
        return poisoned(len(self.uses), INNER, device=self.device, dtype=self.dtype)

    def check(self, h: Tensor, y: Tensor | None = None) -> None:
        check_guards(h)
        truth = reference.gate_up(self.adapted(torch.float64, y), torch.float64)
        check_near(h, reference.gate_up(self.adapted(FP32, y), self.dtype), truth)


class RotaryCase(Group):
    """q, k and v, heads that may have norms, and pages dealt out at random; a row of length 0 has none."""

    def __init__(self, adapters: Adapters, uses: list[Use], lengths: list[int], *, norms: bool = False, seed: int = 0):
        super().__init__(adapters, QKV, uses, normed=True, seed=seed)
        batch, most = len(uses), 3
        # Page 0 is nobody's.
        self.table = torch.zeros((batch, most), dtype=torch.int32)
        for row, length in enumerate(lengths):
            if length:
                self.table[row, (length - 1) // PAGE_TOKENS] = batch - row
        self.table = self.table.to(self.device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        angles = 6 * torch.rand(max(lengths), CHANNELS // 2, generator=self.random)
        weights = (self.drawn(CHANNELS), self.drawn(CHANNELS)) if norms else (None, None)
        self.heads = Heads(*(guarded(own.to(self.device)) for own in (angles.cos(), angles.sin())), *weights, EPS)

    def outputs_of(self) -> tuple[Tensor, Pages]:
        batch = len(self.uses)
        query = poisoned(batch, HEADS, CHANNELS, device=self.device, dtype=self.dtype)
        keys, values = (
            poisoned(batch + 1, KV_HEADS, PAGE_TOKENS, CHANNELS, device=self.device, dtype=self.dtype) for _ in range(2)
        )
        return query, Pages(keys, values, self.table, self.lengths)

    def check(self, query: Tensor, pages: Pages, y: Tensor | None = None) -> None:
        check_guards(query, pages.keys, pages.values)
        used = self.lengths > 0
        (q, *kv), (true_q, *true_kv) = self.rotated(FP32, y), self.rotated(torch.float64, y)
        check_near(query, q, true_q)
        for pool, own, true in zip((pages.keys, pages.values), kv, true_kv, strict=True):
            wanted = torch.full_like(pool, torch.nan)
            reference.write_page(wanted, own, self.table, self.lengths)
            assert torch.equal(wanted.isnan(), pool.isnan())
            there = pool[~pool.isnan()].view(int(used.sum()), -1)
            # Pages are dealt out from the last row on.
            check_near(there.flip(0), own[used], true[used])

    def rotated(self, dtype: torch.dtype, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        h = self.heads
        norms = None if h.q_norm is None or h.k_norm is None else (h.q_norm, h.k_norm)
        return reference.rotate(
            self.adapted(dtype, y), h.cosine, h.sine, self.lengths, (HEADS, KV_HEADS),
            self.dtype if dtype == FP32 else dtype, norms=norms, eps=EPS,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "cut", "dtype"),
    [
        ("kinds", None, FP32),
        ("kinds", Cut(3, 2, 1, 1), BF16),
        ("mixed", None, BF16),
        ("mixed", Cut(3, 2, 1, 1), FP32),
        ("few bits", Cut(2, 4, 2, 2), FP32),
        ("exact", None, FP32),
    ],
    ids=str,
)
def test_residual(batch, cut, dtype, stores):
    case = ResidualCase(stores[dtype], BATCHES[batch])
    update = case.shrink(**({} if cut is None else {"directions": 2, "shares": 3, "inputs": 32}))
    programs = squares_of(len(case.uses), HIDDEN, COLUMNS) if cut is None else -(-HIDDEN // (cut.blocks * COLUMNS))
    y, found = case.y(), case.outputs_of(programs)
    add_residual(y, *found, case.weight, columns=COLUMNS, update=update, cut=cut)
    case.check(found, y)


@pytest.mark.parametrize(
    ("batch", "cut", "dtype"),
    [("kinds", None, FP32), ("mixed", Cut(2, 4, 2, 2), FP32), ("few bits", Cut(3, 2, 1, 1), BF16)],
    ids=str,
)
def test_gate_and_up(batch, cut, dtype, stores):
    case = GatedCase(stores[dtype], BATCHES[batch])
    y, h = case.y(), case.inner()
    gate_up(y, h, columns=COLUMNS, update=case.shrink(directions=8, shares=1, inputs=64), cut=cut)
    case.check(h, y)


@pytest.mark.parametrize(
    ("batch", "norms", "cut", "dtype"),
    [("kinds", True, None, FP32), ("mixed", False, Cut(1, 4, 2, 1), FP32), ("mixed", True, None, BF16)],
    ids=str,
)
def test_rotary(batch, norms, cut, dtype, stores):
    case = RotaryCase(stores[dtype], BATCHES[batch], [17, 1, 0, 33, 16][: len(BATCHES[batch])], norms=norms)
    y, (query, pages) = case.y(), case.outputs_of()
    rotate(y, query, pages, case.heads, update=case.shrink(shares=2), cut=cut)
    case.check(query, pages, y)


def source(case: Group, u: Tensor, counts: Tensor) -> Source:
    """What a single launch reads; it counts in the middle of counts [3]."""
    counts.zero_()
    return Source(case.x, case.weights, case.biases, case.norm, Shrink(u, case.reads, case.site), counts[1:])


@pytest.mark.parametrize(
    ("uses", "dtype"),
    [
        ([(2, 1, 0.8), (0, 2, -1.1)], FP32),
        ([(1, 5, 1.0), (-1, GARBAGE, 0.5)], FP32),
        ([(3, 3, 0.9), (0, 0, 1.0)], FP32),
        ([(2, 2, 1.1)], BF16),
    ],
    ids=str,
)
def test_one_row_in_a_single_launch(uses, dtype, stores, device):
    counts, programs = torch.zeros(3, dtype=torch.int32, device=device), residual_programs(HIDDEN, device)
    us = {names: poisoned(1, len(names), RANK, device=device) for names in (OUT, GATE_UP, QKV)}
    for step, use in enumerate(uses):  # the second finds what the first has left, as steps of a graph do
        residual = ResidualCase(stores[dtype], [use], seed=step)
        found = residual.outputs_of(programs)
        linear_residual(source(residual, us[OUT], counts), *found, residual.weight, columns=COLUMNS)
        residual.check(found)
        assert counts.tolist() == [0, RANK, 0]
        gated = GatedCase(stores[dtype], [use], seed=step)
        h = gated.inner()
        linear_gated(source(gated, us[GATE_UP], counts), h, columns=COLUMNS)
        gated.check(h)
        assert counts.tolist() == [0, 2 * RANK, 0]
        rotary = RotaryCase(stores[dtype], [use], [17 + 16 * step], seed=step)
        query, pages = rotary.outputs_of()
        linear_rotary(source(rotary, us[QKV], counts), query, pages, rotary.heads)
        rotary.check(query, pages)
        assert counts.tolist() == [0, 3 * RANK, 0]
        check_guards(*us.values())
        if step == 0:
            for case in (residual, gated, rotary):
                case.check_untouched(us[case.names])


def test_one_row_equals_one_of_several(stores, device):
    """The kernels of many rows may be given one, and then add the same as the one that does all."""
    use, counts = (2, 2, 0.8), torch.zeros(3, dtype=torch.int32, device=device)
    case = ResidualCase(stores[FP32], [use])
    single, several = case.outputs_of(residual_programs(HIDDEN, device)), case.outputs_of(-(-HIDDEN // COLUMNS))
    u = poisoned(1, 1, RANK, device=device)
    linear_residual(source(case, u, counts), *single, case.weight, columns=COLUMNS)
    y, update = poisoned(1, HIDDEN, device=device), case.shrink()
    linear(case.x, case.weights, y)
    add_residual(y, *several, case.weight, columns=COLUMNS, update=update)
    case.check(several)
    torch.testing.assert_close(u, update.u, rtol=1e-5, atol=1e-5, equal_nan=True)
    for one, other in zip(single[:2], several[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_without_adapters_and_over_many_columns(device):
    """More inputs than one step of a program reads, and nothing that says where adapters lie."""
    random = torch.Generator().manual_seed(0)
    x, weight, r, norm_weight = (
        guarded(torch.randn(*shape, generator=random).to(device)) for shape in ((1, 2100), (12, 2100), (1, 12), (12,))
    )
    counts = torch.zeros(1, dtype=torch.int32, device=device)
    found = guarded(r), poisoned(1, 12, device=device), poisoned(1, residual_programs(12, device), device=device)
    linear_residual(Source(x, (weight,), None, None, None, counts), *found, norm_weight, columns=12)
    check_guards(*found)
    eager, truth = (reference.linear(own, [weight]) for own in (x, x.double()))
    wanted = reference.add_residual(truth, r, norm_weight, torch.float64)
    near = reference.add_residual(eager, r, norm_weight, FP32)
    for own, close, true in zip((*found[:2], found[2].sum(1, keepdim=True)), near, wanted, strict=True):
        check_near(own, close, true)
    assert not counts.any()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_step_begins(dtype, device):
    random = torch.Generator().manual_seed(0)
    table, weight = (
        guarded(torch.randn(*shape, generator=random).to(device, dtype)) for shape in ((7, HIDDEN), (HIDDEN,))
    )
    tokens, lengths = torch.tensor([6, 0, 3], device=device), torch.tensor([15, 0, 1], dtype=torch.int32, device=device)
    counts = torch.full((5,), GARBAGE, dtype=torch.int32, device=device)
    r, squares = poisoned(3, HIDDEN, device=device), poisoned(3, 7, device=device)
    normed = poisoned(3, HIDDEN, device=device, dtype=dtype)
    wanted = reference.embed(tokens, table.double(), weight, lengths, torch.float64)
    eager = reference.embed(tokens, table, weight, lengths, dtype)
    embed(tokens, table, r, normed, squares, weight, lengths, counts[:4])
    check_guards(r, normed, squares)
    for own, near, true in zip((r, normed, squares.sum(1, keepdim=True)), eager[:3], wanted[:3], strict=True):
        check_near(own, near, true)
    assert lengths.tolist() == eager[3].tolist() == [16, 0, 2]
    assert counts.tolist() == [0, 0, 0, 0, GARBAGE]


def test_what_is_left_for_the_norm_makes_one(device):
    """A residual times a weight, and its squares, give a linear what an RMS norm in between would."""
    random = torch.Generator().manual_seed(0)
    y, r, weight, w = (
        torch.randn(*shape, generator=random).double().to(device) for shape in ((3, 20), (3, 20), (20,), (5, 20))
    )
    total, normed, squares = reference.add_residual(y, r, weight, torch.float64)
    wanted = rms_norm(total, (20,), weight, EPS) @ w.T
    torch.testing.assert_close(reference.linear(normed, [w], squares=squares, eps=EPS), wanted)

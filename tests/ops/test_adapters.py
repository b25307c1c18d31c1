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
from runtime.ops.expand import Cut
from runtime.ops.gated import gate_up
from runtime.ops.linear import linear
from runtime.ops.norm import Norm
from runtime.ops.packed import Reads
from runtime.ops.reference import decode as reference
from runtime.ops.residual import add_residual, embed, squares_of
from runtime.ops.resolve import Rows, reads_for, resolve
from runtime.ops.rotary import Heads, Pages, rotate
from runtime.ops.shrink import Shares, Shrink, shrink
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
        reads = reads_for(len(uses), len(MODULES), self.store.arena)
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
        self.biases = tuple(self.drawn(n) for n in self.outputs)
        self.squares = guarded(torch.rand(batch, 3, generator=self.random).to(self.device) * inputs / 10)
        self.norm = Norm(self.squares, EPS, inputs) if normed else None
        self.reads = adapters.reads(uses)

    def drawn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return guarded(torch.randn(*shape, generator=self.random).to(self.device, dtype or self.dtype))

    def update(self, u: Tensor, ready: int) -> Shrink:
        """With its input there already, or not yet; the site before it, the layer's first, was there."""
        flags = torch.zeros(len(MODULES), dtype=torch.int32, device=self.device)
        flags[self.site], flags[0] = ready, 1
        return Shrink(u, self.reads, self.site, MODULES[self.names[0]].columns, flags, 0)

    @property
    def site(self) -> int:
        return list(MODULES).index(self.names[0])

    def shrink(self, shares: Shares | None = None) -> Shrink:
        """What the kernel makes of the rows' directions; those that a row does not read stay as they are."""
        u = poisoned(len(self.uses), len(self.names), RANK, device=self.device)
        update = self.update(u, ready=1)
        shrink(self.x, update, [*self.outputs, 0, 0][:3], shares=shares)
        check_guards(u)
        self.check_untouched(u)
        return update

    def linear(self) -> tuple[Tensor, Shrink]:
        """What the kernel puts out, and with it."""
        weights = tuple(self.drawn(n, self.x.shape[1]) for n in self.outputs)
        y, u = (
            poisoned(len(self.uses), *shape, device=self.device)
            for shape in ((sum(self.outputs),), (len(self.names), RANK))
        )
        update = self.update(u, ready=0)
        linear(self.x, weights, y, update=update)
        check_guards(y, u)
        self.check_untouched(u)
        # Of one row there is no launch that waits.
        several = len(self.uses) > 1
        assert (int(update.ready[0]), int(update.ready[self.site])) == ((0, 1) if several else (1, 0))
        check_near(y, *(reference.linear(own, weights) for own in (self.x, self.x.double())))
        return y, update

    def check_untouched(self, u: Tensor) -> None:
        for member, name in enumerate(self.names):
            counts = [len(own[0]) for own in self.adapters.factors(self.uses, name, FP32)]
            for row, (count, (_, _, weight)) in enumerate(zip(counts, self.uses, strict=True)):
                assert u[row, member, count if weight else 0 :].isnan().all()

    def y(self) -> Tensor:
        """[B, all outputs] of linears, as if a kernel had put them out."""
        return self.drawn(len(self.uses), sum(self.outputs), dtype=FP32)

    def adapted(self, dtype: torch.dtype, y: Tensor) -> Tensor:
        """y and what adapters add, normed and with biases, in PyTorch.

        In float64 factors are what codes and scales say, in float32 what they are in the model's dtype.
        """
        x = self.x.to(torch.promote_types(self.dtype, dtype))
        weight = torch.tensor([own[2] for own in self.uses], device=self.device)
        read = [self.adapters.factors(self.uses, name, x.dtype if dtype != FP32 else self.dtype) for name in self.names]
        total = torch.cat([reference.updates(x, own, weight) for own in read], 1) + y
        norm = {} if self.norm is None else {"squares": self.squares, "width": x.shape[1], "eps": EPS}
        return reference.settle(total, biases=self.biases, **norm)


class ResidualCase(Group):
    """The o projection, the residual, and the next norm."""

    def __init__(self, adapters: Adapters, uses: list[Use], seed: int = 0):
        super().__init__(adapters, OUT, uses, normed=False, seed=seed)
        self.r, self.weight = self.drawn(len(uses), HIDDEN, dtype=FP32), self.drawn(HIDDEN)

    def outputs_of(self, programs: int) -> tuple[Tensor, Tensor, Tensor]:
        """r, normed and squares that a kernel writes."""
        normed = poisoned(len(self.uses), HIDDEN, device=self.device, dtype=self.dtype)
        return guarded(self.r), normed, poisoned(len(self.uses), programs, device=self.device)

    def check(self, found: tuple[Tensor, Tensor, Tensor], y: Tensor) -> None:
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

    def check(self, h: Tensor, y: Tensor) -> None:
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

    def check(self, query: Tensor, pages: Pages, y: Tensor) -> None:
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

    def rotated(self, dtype: torch.dtype, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
        ("kinds", Cut(3, 2, 4, 1, 1), BF16),
        ("mixed", None, BF16),
        ("mixed", Cut(3, 2, 4, 1, 1), FP32),
        ("few bits", Cut(2, 4, 2, 2, 2), FP32),
        ("exact", None, FP32),
    ],
    ids=str,
)
def test_residual(batch, cut, dtype, stores):
    case = ResidualCase(stores[dtype], BATCHES[batch])
    update = case.shrink(None if cut is None else Shares(3, 2, 32, 16, 1))
    programs = squares_of(len(case.uses), HIDDEN, COLUMNS) if cut is None else -(-HIDDEN // (cut.blocks * COLUMNS))
    y, found = case.y(), case.outputs_of(programs)
    add_residual(y, *found, case.weight, columns=COLUMNS, update=update, bias=case.biases[0], cut=cut)
    case.check(found, y)


@pytest.mark.parametrize(
    ("batch", "cut", "dtype"),
    [("kinds", None, FP32), ("mixed", Cut(2, 4, 2, 2, 2), FP32), ("few bits", Cut(3, 2, 4, 1, 1), BF16)],
    ids=str,
)
def test_gate_and_up(batch, cut, dtype, stores):
    case = GatedCase(stores[dtype], BATCHES[batch])
    y, h = case.y(), case.inner()
    update = case.shrink(Shares(1, 8, 64, 64, 2))
    gate_up(y, h, columns=COLUMNS, update=update, norm=case.norm, biases=case.biases, cut=cut)
    case.check(h, y)


@pytest.mark.parametrize(
    ("batch", "norms", "cut", "dtype"),
    [("kinds", True, None, FP32), ("mixed", False, Cut(1, 1, 4, 2, 1), FP32), ("mixed", True, None, BF16)],
    ids=str,
)
def test_rotary(batch, norms, cut, dtype, stores):
    case = RotaryCase(stores[dtype], BATCHES[batch], [17, 1, 0, 33, 16][: len(BATCHES[batch])], norms=norms)
    y, (query, pages) = case.y(), case.outputs_of()
    update = case.shrink(Shares(2, 2, 128, 64, 1))
    rotate(y, query, pages, case.heads, update=update, norm=case.norm, biases=case.biases, cut=cut)
    case.check(query, pages, y)


@pytest.mark.parametrize(
    ("use", "dtype"),
    [((2, 1, 0.8), FP32), ((0, 2, -1.1), FP32), ((1, 5, 1.0), BF16), ((-1, GARBAGE, 0.5), FP32), ((3, 3, 0.9), BF16)],
    ids=str,
)
def test_one_row(use, dtype, stores):
    """Linear and shrink of a batch of one are a single launch; all three consumers."""
    residual = ResidualCase(stores[dtype], [use])
    (y, update), found = residual.linear(), residual.outputs_of(squares_of(1, HIDDEN, COLUMNS))
    add_residual(y, *found, residual.weight, columns=COLUMNS, update=update, bias=residual.biases[0])
    residual.check(found, y)
    gated = GatedCase(stores[dtype], [use])
    (y, update), h = gated.linear(), gated.inner()
    gate_up(y, h, columns=COLUMNS, update=update, norm=gated.norm, biases=gated.biases)
    gated.check(h, y)
    rotary = RotaryCase(stores[dtype], [use], [17])
    (y, update), (query, pages) = rotary.linear(), rotary.outputs_of()
    rotate(y, query, pages, rotary.heads, update=update, norm=rotary.norm, biases=rotary.biases)
    rotary.check(query, pages, y)


@pytest.mark.parametrize("batch", ["mixed", "exact"])
def test_a_linear_brings_what_adapters_make_of_its_input(batch, stores):
    case = GatedCase(stores[FP32], BATCHES[batch])
    y, update = case.linear()
    assert torch.equal(update.u.nan_to_num(), case.shrink().u.nan_to_num())
    h = case.inner()
    gate_up(y, h, columns=COLUMNS, update=update, norm=case.norm, biases=case.biases)
    case.check(h, y)


def test_without_adapters(device):
    """Nothing that says where any lie."""
    random = torch.Generator().manual_seed(0)
    y, r, norm_weight = (
        guarded(torch.randn(*shape, generator=random).to(device)) for shape in ((1, 12), (1, 12), (12,))
    )
    found = guarded(r), poisoned(1, 12, device=device), poisoned(1, squares_of(1, 12, 12), device=device)
    add_residual(y, *found, norm_weight, columns=12)
    check_guards(*found)
    wanted = reference.add_residual(y.double(), r, norm_weight, torch.float64)
    near = reference.add_residual(y, r, norm_weight, FP32)
    for own, close, true in zip((*found[:2], found[2].sum(1, keepdim=True)), near, wanted, strict=True):
        check_near(own, close, true)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_step_begins(dtype, device):
    random = torch.Generator().manual_seed(0)
    table, weight = (
        guarded(torch.randn(*shape, generator=random).to(device, dtype)) for shape in ((7, HIDDEN), (HIDDEN,))
    )
    tokens, lengths = torch.tensor([6, 0, 3], device=device), torch.tensor([15, 0, 1], dtype=torch.int32, device=device)
    r, squares = poisoned(3, HIDDEN, device=device), poisoned(3, 7, device=device)
    normed = poisoned(3, HIDDEN, device=device, dtype=dtype)
    wanted = reference.embed(tokens, table.double(), weight, lengths, torch.float64)
    eager = reference.embed(tokens, table, weight, lengths, dtype)
    embed(tokens, table, r, normed, squares, weight, lengths)
    check_guards(r, normed, squares)
    for own, near, true in zip((r, normed, squares.sum(1, keepdim=True)), eager[:3], wanted[:3], strict=True):
        check_near(own, near, true)
    assert lengths.tolist() == eager[3].tolist() == [16, 0, 2]


def test_what_is_left_for_the_norm_makes_one(device):
    """A residual times a weight, and its squares, give a linear what an RMS norm in between would."""
    random = torch.Generator().manual_seed(0)
    y, r, weight, w = (
        torch.randn(*shape, generator=random).double().to(device) for shape in ((3, 20), (3, 20), (20,), (5, 20))
    )
    total, normed, squares = reference.add_residual(y, r, weight, torch.float64)
    wanted = rms_norm(total, (20,), weight, EPS) @ w.T
    torch.testing.assert_close(reference.linear(normed, [w], squares=squares, eps=EPS), wanted)

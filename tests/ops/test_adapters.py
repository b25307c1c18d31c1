"""What adapters add to the outputs of linears, and what becomes of those, against float64.

A layer of awkward widths is the second of two, so its modules begin at number 7. Adapters of all kinds lie in one
store. Whatever no row may read is NaN: the arena around them, scales of what is not read, directions of u and what is
added where a row has none, every buffer's surroundings, and what is to be written before it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS
from runtime.engine.store import AdapterStore, Module
from runtime.kv.formats import FULL
from runtime.kv.units import Units
from runtime.ladder import Ladder
from runtime.ladder.formats import BITS, CODED
from runtime.ops import linear as linears
from runtime.ops import shrink
from runtime.ops.adapters import Update
from runtime.ops.expand import Cut
from runtime.ops.gated import gate_up
from runtime.ops.linear import Tiles, linear
from runtime.ops.norm import Norm
from runtime.ops.packed import ALIGNMENT, ENDS, FIRSTS, ROWS, STARTS_B, STRETCH, Reads
from runtime.ops.pages import Pages, PageTables
from runtime.ops.ready import LINE, X, nothing_ready
from runtime.ops.reference import decode as reference
from runtime.ops.residual import add_residual, squares_of
from runtime.ops.resolve import Rows, reads_for, resolve
from runtime.ops.rotary import Heads, rotate
from runtime.ops.shrink import Shares
from tests.ops.ladders import RANK, factors, ladders_of, stored
from tests.ops.near import arriving, check_guards, check_near, guarded, poisoned
from tests.ops.watched import BEFORE, Seen, makers, watched

HIDDEN, INNER, HEADS, KV_HEADS, CHANNELS = 116, 96, 3, 1, 20
"""A quarter of INNER is whole words, of HIDDEN an odd number."""
LAYER = {
    "q": Module(HIDDEN, HEADS * CHANNELS, CHANNELS),
    "k": Module(HIDDEN, KV_HEADS * CHANNELS, CHANNELS),
    "v": Module(HIDDEN, KV_HEADS * CHANNELS, CHANNELS),
    "o": Module(HEADS * CHANNELS, HIDDEN, 32),
    "gate": Module(HIDDEN, INNER, 64),
    "up": Module(HIDDEN, INNER, 64),
    "down": Module(INNER, HIDDEN, 48),
}
MODULES = {f"{layer}.{name}": own for layer in range(2) for name, own in LAYER.items()}
QKV, GATE_UP, OUT, DOWN = ("1.q", "1.k", "1.v"), ("1.gate", "1.up"), ("1.o",), ("1.down",)
FP32, BF16 = torch.float32, torch.bfloat16
EPS = 0.1
GARBAGE = 2**30
UNUSED = -3
"""What `ready` says of sites that are nobody's."""

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

    def scales(self, use: Use, name: str) -> Tensor:
        """[n] float64: what u has beside A'x, scales of B' at 4 and 2 bits, by which sums of levels are stretched."""
        ladder = self.store.ladders[use[0]]
        assert ladder is not None
        own, ends = ladder.banks[ladder.bank_of[use[1]]][name].b, ladder.edges[use[1], list(MODULES).index(name)]
        found = [torch.ones(int(ends[1]), dtype=torch.float64)]
        for bits, first, stop in zip((4, 2), ends[1:3].tolist(), ends[2:].tolist(), strict=True):
            scales = own.scales[CODED.index(bits)][first:stop].double()
            found.append(scales / STRETCH[bits] if self.dtype == BF16 else scales)
        return torch.cat(found).to(self.store.device)


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

    @property
    def site(self) -> int:
        return list(MODULES).index(self.names[0])

    def update(self) -> Update:
        """Nothing is there yet but of the site before."""
        batch, device = len(self.uses), self.device
        u = poisoned(batch, len(self.names), RANK, device=device)
        added = poisoned(batch, sum(self.outputs), device=device)
        ready = torch.full_like(nothing_ready(len(MODULES), batch, device), UNUSED)
        before = 7 if self.site > 7 else 6
        ready[self.site], ready[before] = 0, BEFORE
        return Update(u, added, self.reads, self.site, MODULES[self.names[0]].columns, ready, before)

    def linear(
        self, shares: Shares | None = None, cut: Cut | None = None, tiles: Tiles | None = None
    ) -> tuple[Tensor, Update]:
        """What the kernels put out, and what they add to it."""
        batch, update = len(self.uses), self.update()
        weights = tuple(self.drawn(n, self.x.shape[1]) for n in self.outputs)
        y = poisoned(batch, sum(self.outputs), device=self.device)
        with (
            watched(self.x, update) as seen,
            arriving([linears, shrink], self.x, told=seen.waited if seen else lambda: None),
        ):
            linear(self.x, weights, y, update=update, shares=shares, cut=cut, tiles=tiles)
        check_guards(y, update.u, update.added)
        check_near(y, *(reference.linear(own, weights) for own in (self.x, self.x.double())))
        shares = shares or Shares.of(batch, self.x.shape[1], RANK)
        programs = torch.stack([makers(self.reads, self.site + member, shares) for member in range(len(self.names))])
        wanted = torch.full_like(update.ready, UNUSED)
        wanted[self.site], wanted[update.before] = 0, BEFORE
        wanted[update.before, :, : X + 1] = 0
        wanted[self.site, :, : len(self.names)] = programs.T
        # Of several rows it is said that x is there.
        wanted[self.site, :, X] = batch > 1
        assert torch.equal(update.ready, wanted)
        if seen is not None:
            self.check_waits(seen, update, programs)
            self.check_fetched(seen)
            assert seen.ended == (batch > 1), "who adds is to find what the linear puts out"
        self.check_u(update.u)
        self.check_added(update.added)
        return y, update

    def counts(self, member: int) -> list[int]:
        """How many directions every row reads of a member."""
        read = self.adapters.factors(self.uses, self.names[member], FP32)
        return [len(own[0]) if weight else 0 for own, (_, _, weight) in zip(read, self.uses, strict=True)]

    def check_waits(self, seen: Seen, update: Update, programs: Tensor) -> None:
        """For all of a member's u those that need any, and of several rows for x those that make it."""
        batch, found = len(self.uses), set()
        for address, count in seen.waits:
            site, row = divmod((address - update.ready.data_ptr()) // 4, batch * LINE)
            found.add((site, *divmod(row, LINE), count))
        wanted = set()
        for row, counts in enumerate(programs.T.tolist()):
            wanted |= {(self.site, row, member, count) for member, count in enumerate(counts) if count}
            if batch > 1 and any(counts):
                wanted.add((self.site, row, X, 1))
        assert found == wanted

    def check_fetched(self, seen: Seen) -> None:
        """The stretches of B' that are read, where they are whole units, once for each row; of several rows codes."""
        wanted, arena, records = [], self.adapters.store.arena, self.reads.records
        for row in range(len(self.uses)):
            for member, name in enumerate(self.names):
                record, own = records[row, self.site + member].tolist(), MODULES[name]
                ends = [0, *record[ENDS : ENDS + 4]]
                for f, bits in enumerate(BITS):
                    size = own.columns * (torch.finfo(self.dtype).bits if bits >= 8 else bits) // 8
                    first, stop = ends[f : f + 2]
                    if stop == first or size % 16 or (bits >= 8 and len(self.uses) > 1):
                        continue
                    start = arena.data_ptr() + ALIGNMENT * record[STARTS_B + f]
                    skipped = first - (record[FIRSTS + f - 1] if f else 0)
                    for block in range(-(-own.outputs // own.columns)):
                        wanted.append((start + (block * record[ROWS + f] + skipped) * size, (stop - first) * size))
        assert sorted(seen.fetched) == sorted(wanted)

    def check_u(self, u: Tensor) -> None:
        """weight * scale * A'x; directions that a row does not read are as they were."""
        for member, name in enumerate(self.names):
            counts = self.counts(member)
            read = torch.arange(RANK, device=self.device) < torch.tensor(counts, device=self.device)[:, None]
            assert torch.equal(~u[:, member].isnan(), read)
            wanted = {}
            for dtype in (FP32, torch.float64):
                x = self.x.to(dtype)
                wanted[dtype] = torch.zeros(len(self.uses), RANK, dtype=dtype, device=self.device)
                both = self.adapters.factors(self.uses, name, dtype if dtype != FP32 else self.dtype)
                for row, count in enumerate(counts):
                    if count:
                        scales = self.adapters.scales(self.uses[row], name).to(dtype)
                        wanted[dtype][row, :count] = both[row][0].to(dtype) @ x[row] * scales * self.uses[row][2]
            check_near(u[:, member].nan_to_num(), *wanted.values())

    def check_added(self, added: Tensor) -> None:
        """B'u; where a row reads no directions it is as it was."""
        for member, own in enumerate(added.split(self.outputs, 1)):
            read = torch.tensor(self.counts(member), device=self.device)[:, None] > 0
            assert torch.equal(~own.isnan(), read.expand_as(own))
            check_near(own.nan_to_num().contiguous(), *(self.updates(dtype)[member] for dtype in (FP32, torch.float64)))

    def updates(self, dtype: torch.dtype) -> list[Tensor]:
        """What adapters add to every member, in PyTorch.

        In float64 factors are what codes and scales say, in float32 what they are in the model's dtype.
        """
        x = self.x.to(torch.promote_types(self.dtype, dtype))
        weight = torch.tensor([own[2] for own in self.uses], device=self.device)
        read = [self.adapters.factors(self.uses, name, x.dtype if dtype != FP32 else self.dtype) for name in self.names]
        return [reference.updates(x, own, weight) for own in read]

    def adapted(self, dtype: torch.dtype, y: Tensor) -> Tensor:
        """y and what adapters add, normed and with biases, in PyTorch."""
        total = torch.cat(self.updates(dtype), 1) + y
        norm = {} if self.norm is None else {"squares": self.squares, "width": self.x.shape[1], "eps": EPS}
        return reference.settle(total, biases=self.biases, **norm)


class ResidualCase(Group):
    """The o or down projection, the residual, and the next norm."""

    def __init__(self, adapters: Adapters, uses: list[Use], seed: int = 0, names: tuple[str, ...] = OUT):
        super().__init__(adapters, names, uses, normed=False, seed=seed)
        self.r, self.weight = self.drawn(len(uses), HIDDEN, dtype=FP32), self.drawn(HIDDEN)

    def outputs_of(self) -> tuple[Tensor, Tensor, Tensor]:
        """r, normed and squares that a kernel writes."""
        batch = len(self.uses)
        normed = poisoned(batch, HIDDEN, device=self.device, dtype=self.dtype)
        return guarded(self.r), normed, poisoned(batch, squares_of(batch, HIDDEN), device=self.device)

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
        # Of both kinds of units, as norms come and go.
        self.units = Units(KV_HEADS, CHANNELS, self.dtype.itemsize, coded=norms)
        parts = self.units.of(FULL)
        self.tables = PageTables.of(batch, most, self.units, self.device)
        self.tables.full.fill_(GARBAGE)
        # The first units are nobody's.
        for row, length in enumerate(lengths):
            if length:
                own = (batch - row) * parts + torch.arange(parts)
                self.tables.full[row, (length - 1) // PAGE_TOKENS] = own.to(self.tables.full)
        self.lengths = self.tables.lengths
        self.lengths.copy_(torch.tensor(lengths))
        angles = 6 * torch.rand(max(lengths), CHANNELS // 2, generator=self.random)
        weights = (self.drawn(CHANNELS), self.drawn(CHANNELS)) if norms else (None, None)
        self.heads = Heads(*(guarded(own.to(self.device)) for own in (angles.cos(), angles.sin())), *weights, EPS)

    def outputs_of(self) -> tuple[Tensor, Pages]:
        batch = len(self.uses)
        query = poisoned(batch, HEADS, CHANNELS, device=self.device, dtype=self.dtype)
        shape = ((batch + 1) * self.units.of(FULL), KV_HEADS, self.units.head_bytes // self.dtype.itemsize)
        self.numbers = poisoned(*shape, device=self.device, dtype=self.dtype)
        return query, Pages(self.numbers.view(torch.uint8), self.tables, self.units)

    def check(self, query: Tensor, pages: Pages, y: Tensor) -> None:
        check_guards(query, self.numbers)
        (q, *kv), (true_q, *true_kv) = self.rotated(FP32, y), self.rotated(torch.float64, y)
        check_near(query, q, true_q)
        wanted = torch.full_like(self.numbers, torch.nan)
        reference.write_page(replace(pages, memory=wanted.view(torch.uint8)), *kv)
        assert torch.equal(wanted.isnan(), self.numbers.isnan())
        rows, unit, token = reference.token_places(pages)
        tokens = self.numbers[..., : 2 * self.units.part_tokens * CHANNELS].unflatten(2, (2, -1, CHANNELS))
        for part, (own, true) in enumerate(zip(kv, true_kv, strict=True)):
            check_near(tokens[unit, :, part, token], own[rows], true[rows])

    def rotated(self, dtype: torch.dtype, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.heads
        norms = None if h.q_norm is None or h.k_norm is None else (h.q_norm, h.k_norm)
        return reference.rotate(
            self.adapted(dtype, y), h.cosine, h.sine, self.lengths, (HEADS, KV_HEADS),
            self.dtype if dtype == FP32 else dtype, norms=norms, eps=EPS,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "names", "shares", "cut", "dtype"),
    [
        ("kinds", OUT, None, None, FP32),
        ("kinds", DOWN, Shares(3, 2, 32, 16), Cut(100, 2, 4), BF16),
        ("mixed", OUT, None, None, BF16),
        ("mixed", DOWN, Shares(5, 1, 16, 128), Cut(1, 4, 2), FP32),
        ("few bits", OUT, Shares(1, 4, 64, 32), Cut(100, 1, 1), FP32),
        ("few bits", DOWN, Shares(1, 4, 64, 32), None, BF16),
        ("exact", DOWN, None, None, FP32),
    ],
    ids=str,
)
def test_residual(batch, names, shares, cut, dtype, stores):
    case = ResidualCase(stores[dtype], BATCHES[batch], names=names)
    (y, update), found = case.linear(shares, cut), case.outputs_of()
    add_residual(y, *found, case.weight, update=update, bias=case.biases[0])
    case.check(found, y)


@pytest.mark.parametrize(
    ("batch", "shares", "cut", "dtype"),
    [
        ("kinds", Shares(1, 8, 64, 64), None, FP32),
        ("mixed", Shares(2, 2, 128, 16), Cut(64, 2, 2), FP32),
        ("few bits", None, Cut(200, 8, 1), BF16),
    ],
    ids=str,
)
def test_gate_and_up(batch, shares, cut, dtype, stores):
    case = GatedCase(stores[dtype], BATCHES[batch])
    (y, update), h = case.linear(shares, cut), case.inner()
    gate_up(y, h, update=update, norm=case.norm, biases=case.biases)
    case.check(h, y)


@pytest.mark.parametrize(
    ("batch", "norms", "shares", "cut", "dtype"),
    [
        ("kinds", True, Shares(2, 2, 128, 64), None, FP32),
        ("mixed", False, Shares(3, 1, 32, 32), Cut(40, 1, 4), FP32),
        ("mixed", True, None, None, BF16),
        ("few bits", False, None, Cut(1, 2, 2), FP32),
    ],
    ids=str,
)
def test_rotary(batch, norms, shares, cut, dtype, stores):
    case = RotaryCase(stores[dtype], BATCHES[batch], [17, 1, 0, 33, 16][: len(BATCHES[batch])], norms=norms)
    (y, update), (query, pages) = case.linear(shares, cut), case.outputs_of()
    rotate(y, query, pages, case.heads, update=update, norm=case.norm, biases=case.biases)
    case.check(query, pages, y)


@pytest.mark.parametrize(
    ("use", "cuts", "dtype"),
    [
        ((2, 1, 0.8), (), FP32),
        ((0, 2, -1.1), (Shares(3, 2, 32, 16), Cut(64, 2, 4), Tiles(64, 32, 4, 1)), FP32),
        ((0, 0, 0.9), (None, Cut(1, 4, 1), Tiles(128, 64, 4, 1)), FP32),
        ((1, 5, 1.0), (), BF16),
        ((2, 2, -0.7), (Shares(1, 4, 16, 128), Cut(100, 1, 2), None), BF16),
        ((-1, GARBAGE, 0.5), (), FP32),
        ((1, 2, 0.0), (), FP32),
        ((3, 3, 0.9), (Shares(13, 1, 64, 64), None, None), BF16),
    ],
    ids=str,
)
def test_one_row(use, cuts, dtype, stores):
    """What adapters add to a batch of one is made in the linear's own launch, between weights or, of few, before them;
    all three consumers."""
    residual = ResidualCase(stores[dtype], [use], names=DOWN)
    (y, update), found = residual.linear(*cuts), residual.outputs_of()
    add_residual(y, *found, residual.weight, update=update, bias=residual.biases[0])
    residual.check(found, y)
    gated = GatedCase(stores[dtype], [use])
    (y, update), h = gated.linear(*cuts), gated.inner()
    gate_up(y, h, update=update, norm=gated.norm, biases=gated.biases)
    gated.check(h, y)
    rotary = RotaryCase(stores[dtype], [use], [17])
    (y, update), (query, pages) = rotary.linear(*cuts), rotary.outputs_of()
    rotate(y, query, pages, rotary.heads, update=update, norm=rotary.norm, biases=rotary.biases)
    rotary.check(query, pages, y)

"""Directions out of the store as matrices: kernel and reference against what the ladders say, in float64.

Sets are of different ladders and rungs, of a layer of awkward widths whose modules begin at number 7; one set reads
nothing. The arena is NaN wherever no ladder lies, as are scales of directions that are not read, and everything that is
to be written before it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from runtime.engine.store import AdapterStore, Module
from runtime.ladder import Ladder
from runtime.ladder.formats import BITS, CODED
from runtime.ops.launch import INTERPRETED
from runtime.ops.packed import ENDS, FIRSTS, STRETCH, Reads
from runtime.ops.prompt import dense, token_shrink
from runtime.ops.prompt.dense import unpack_layers
from runtime.ops.prompt.matrices import Factors
from runtime.ops.prompt.tiles import Part, tiles_of
from runtime.ops.prompt.token_shrink import ShrinkScratch, shrink_tokens
from runtime.ops.reference import prompt_factors as reference
from runtime.ops.resolve import Rows, reads_for, resolve
from tests.ops.ladders import RANK, factors, ladders_of, stored
from tests.ops.near import arriving, check_guards, poisoned
from tests.ops.prompt.tables import written

HIDDEN, INNER, HEADS, KV_HEADS, CHANNELS = 116, 96, 3, 1, 20
"""Widths that fill no block of 64 or 48 columns, quarters that are no power of two."""
LAYER = {
    "q": Module(HIDDEN, HEADS * CHANNELS, CHANNELS),
    "k": Module(HIDDEN, KV_HEADS * CHANNELS, CHANNELS),
    "v": Module(HIDDEN, 2 * KV_HEADS * CHANNELS, CHANNELS),
    "o": Module(HEADS * CHANNELS, HIDDEN, 32),
    "gate": Module(HIDDEN, INNER, 64),
    "up": Module(HIDDEN, INNER, 64),
    "down": Module(INNER, HIDDEN, 48),
}
MODULES = {f"{layer}.{name}": own for layer in range(2) for name, own in LAYER.items()}
SITES = {"qkv": ("1.q", "1.k", "1.v"), "o": ("1.o",), "gate_up": ("1.gate", "1.up"), "down": ("1.down",)}
GARBAGE = 2**30

Use = tuple[int, int, float]
"""Of a set its slot, rung and weight."""
USES: dict[str, list[Use]] = {
    "kinds": [(0, 3, 0.7), (-1, GARBAGE, 0.9), (2, 1, -1.3), (1, 5, 1.0), (1, 2, 0.0)],
    "mixed": [(2, 0, 0.8), (3, 3, 1.1), (2, 2, 1.0)],
    "few bits": [(0, 0, 1.0), (1, 1, -0.9), (0, 4, 1.2)],
    "exact": [(2, 3, 0.5), (0, 5, 1.0)],
}


def unpack(found: Factors, sizes: Sequence[int]) -> None:
    """A site's factors, in one layer."""
    unpack_layers(found.reads, found.site, 0, found.a[None], found.b[None], sizes)


@dataclass(frozen=True)
class Sets:
    """What sets read of a site, and where it is to be written."""

    store: AdapterStore
    dtype: torch.dtype
    names: tuple[str, ...]
    uses: list[Use]

    @property
    def site(self) -> int:
        return list(MODULES).index(self.names[0])

    @property
    def sizes(self) -> list[int]:
        return [MODULES[name].outputs for name in self.names]

    @property
    def columns(self) -> int:
        return MODULES[self.names[0]].columns

    def reads(self) -> Reads:
        device = self.store.device
        slot, rung, weight = (torch.tensor(own, device=device) for own in zip(*self.uses, strict=True))
        reads = reads_for(len(self.uses), len(MODULES), self.store.arena, self.dtype)
        resolve(reads, Rows(slot.int(), rung.int(), weight.float()), self.store.tables)
        return reads

    def factors(self) -> Factors:
        """Nothing is there yet."""
        sets, device, blocks = len(self.uses), self.store.device, sum(-(-size // self.columns) for size in self.sizes)
        a = poisoned(sets, len(self.names), RANK, MODULES[self.names[0]].inputs, device=device, dtype=self.dtype)
        b = poisoned(sets, blocks, RANK, self.columns, device=device, dtype=self.dtype)
        return Factors(self.reads(), self.site, a, b)

    def ladder(self, own: int) -> Ladder | None:
        """Of a set that reads something."""
        slot, _, weight = self.uses[own]
        return self.store.ladders[slot] if slot >= 0 and weight else None

    def update(self, own: int, name: str) -> tuple[Tensor, Tensor]:
        """a [n, D] and b [n, N] float64 of a set, as its ladder has them."""
        ladder, module = self.ladder(own), MODULES[name]
        if ladder is None:
            none = torch.zeros(0, dtype=torch.float64)
            return none.view(0, module.inputs), none.view(0, module.outputs)
        return factors(ladder, name, self.uses[own][1])

    def scales(self, own: int, name: str) -> Tensor:
        """[n] float64: what of a direction of A' is in B'."""
        ladder, (_, rung, _) = self.ladder(own), self.uses[own]
        if ladder is None:
            return torch.zeros(0, dtype=torch.float64)
        a, ends = ladder.banks[ladder.bank_of[rung]][name].a, ladder.edges[rung, list(MODULES).index(name)].tolist()
        found = [torch.ones(ends[1], dtype=torch.float64)]
        for bits, first, stop in zip(BITS[2:], ends[1:], ends[2:], strict=False):
            stretch = STRETCH[bits] if self.dtype == torch.bfloat16 else 1
            found.append(a.scales[CODED.index(bits)][first:stop].double() / stretch)
        return torch.cat(found)

    def allowed(self, own: int, name: str) -> Tensor:
        """[n]: how far off numbers are in the store, of their size. In bfloat16 levels are a thousandth, and what has 8
        bits is rounded."""
        if self.dtype == torch.float32:
            return torch.full((len(self.scales(own, name)),), 1e-6, dtype=torch.float64)
        ends = self.reads().records[own, list(MODULES).index(name), ENDS : ENDS + 4].cpu()
        most = torch.tensor([1e-6, 2.0**-8, 1.2e-3, 1.2e-3], dtype=torch.float64)
        return most.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)))


@pytest.fixture(scope="module")
def stores(device) -> dict[torch.dtype, AdapterStore]:
    """By dtype of the model."""
    ladders = ladders_of(MODULES)
    return {dtype: stored(ladders, MODULES, dtype, device) for dtype in (torch.float32, torch.bfloat16)}


def members(sets: Sets, written_to: Factors, own: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every member a [R, D], b [R, N], and what fills up the last block of b [R, .]."""
    found, first = [], 0
    for member, size in enumerate(sets.sizes):
        blocks = -(-size // sets.columns)
        b = written_to.b[own, first : first + blocks].transpose(0, 1).flatten(1)
        found.append((written_to.a[own, member], b[:, :size], b[:, size:]))
        first += blocks
    return found


@pytest.mark.parametrize(
    ("uses", "site", "dtype"),
    [
        ("kinds", "qkv", torch.float32),
        ("kinds", "down", torch.bfloat16),
        ("mixed", "gate_up", torch.float32),
        ("mixed", "qkv", torch.bfloat16),
        ("mixed", "o", torch.bfloat16),
        ("few bits", "qkv", torch.float32),
        ("exact", "down", torch.bfloat16),
    ],
    ids=str,
)
def test_directions(uses, site, dtype, stores, monkeypatch):
    # So that there are several programs along every axis.
    monkeypatch.setattr(dense, "_DIRECTIONS", 4)
    monkeypatch.setattr(dense, "_PLACES", 16)
    sets = Sets(stores[dtype], dtype, SITES[site], USES[uses])
    found = sets.factors()
    with arriving([dense], found.reads.records):
        unpack(found, sets.sizes)
    check_guards(found.a, found.b)
    for own in range(len(sets.uses)):
        for name, (a, b, filling) in zip(sets.names, members(sets, found, own), strict=True):
            sizes = {"inputs": a.shape[1], "outputs": b.shape[1], "columns": sets.columns, "directions": RANK}
            module, device = list(MODULES).index(name), a.device
            eager = reference.dense(found.reads, own, module, **sizes, dtype=dtype)
            exact = reference.dense(found.reads, own, module, **sizes, dtype=dtype, wide=torch.float64)
            truth, scales = sets.update(own, name), sets.scales(own, name)[:, None]
            true_a, true_b = (truth[0] / scales).to(device), (truth[1] * scales).to(device)
            count = len(true_a)
            for half in (a, b, filling):
                assert bool(half[count:].isnan().all())
            assert bool((filling[:count] == 0).all())
            for spec, true in zip(exact, (true_a, true_b), strict=True):
                assert bool(((spec - true).abs() <= sets.allowed(own, name).to(device)[:, None] * true.abs()).all())
            assert torch.equal(a[:count].float(), eager[0]), "numbers and levels are exact"
            torch.testing.assert_close(eager[1].double(), exact[1], rtol=1e-6, atol=0)
            # Triton's interpreter cuts off the bits that bfloat16 has no room for.
            half = eager[1].to(dtype)
            if dtype == torch.bfloat16 and INTERPRETED:
                half = (eager[1].view(torch.int32) & -65536).view(torch.float32).to(dtype)
            assert torch.equal(b[:count], half)


def test_layers_side_by_side(stores):
    """Of two layers at once what each has alone."""
    names = ("q", "k", "v")
    both = [
        Sets(stores[torch.float32], torch.float32, tuple(f"{layer}.{own}" for own in names), USES["mixed"])
        for layer in range(2)
    ]
    first, second = alone = [own.factors() for own in both]
    for own, sets in zip(alone, both, strict=True):
        unpack(own, sets.sizes)
    a, b = (poisoned(2, *like.shape, device=like.device, dtype=like.dtype) for like in (first.a, first.b))
    unpack_layers(first.reads, first.site, second.site - first.site, a, b, both[0].sizes)
    check_guards(a, b)
    for layer, own in enumerate(alone):
        torch.testing.assert_close(a[layer], own.a, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(b[layer], own.b, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(first.a.nan_to_num(), second.a.nan_to_num())


def test_what_the_uses_read(stores):
    """Four formats at once, and directions of a format that do not begin at its first row."""
    sets = Sets(stores[torch.float32], torch.float32, SITES["gate_up"], USES["mixed"])
    own = sets.reads().records[:, sets.site : sets.site + 2]
    ends, firsts = own[..., ENDS : ENDS + 4], own[..., FIRSTS : FIRSTS + 3]
    starts = torch.nn.functional.pad(ends[..., :-1], (1, 0))
    assert bool((ends > starts)[0].all())
    read = (ends > starts)[..., 1:]
    assert bool((starts[..., 1:] > firsts)[read].any())
    assert bool((firsts[read] > 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_unpacked_is_multiplied(dtype, stores):
    """Tokens of every set, from the store to u: that times B' is what the ladder adds, by the weight."""
    sets = Sets(stores[dtype], dtype, SITES["gate_up"], USES["kinds"])
    found, counts = sets.factors(), [3, 2, 1, 4, 2]
    device, random = found.a.device, torch.Generator().manual_seed(0)
    total = sum(counts)
    parts = [Part(own, 0, count, own) for own, count in enumerate(counts)]
    x = torch.randn(total, HIDDEN, generator=random).to(device, dtype)
    weights = torch.rand(total, generator=random).to(device)
    u = poisoned(total, 2, RANK, device=device, dtype=dtype)
    tiles = written(tiles_of(parts), len(counts) + 1, device)
    unpack(found, sets.sizes)
    with arriving([token_shrink], found.a, x):
        scratch = ShrinkScratch.of(total, len(tiles), [(2, HIDDEN)], RANK, dtype, device)
        shrink_tokens(x, found, weights, tiles, u, scratch)
    token = 0
    for own, count in enumerate(counts):
        for member, (name, (_, b, _)) in enumerate(zip(sets.names, members(sets, found, own), strict=True)):
            a, true_b = (half.to(device) for half in sets.update(own, name))
            read, tokens = len(a), slice(token, token + count)
            truth = x[tokens].double() @ a.T @ true_b * weights[tokens, None].double()
            added = u[tokens, member, :read].double() @ b[:read].double()
            assert bool((u[tokens, member, read:] == 0).all())
            # In bfloat16 levels, b and u are rounded, and Triton's interpreter cuts them off.
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            assert float((added - truth).norm()) <= tolerance * float(truth.norm())
        token += count

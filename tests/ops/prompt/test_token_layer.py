"""What consumes the linears' outputs for tokens of prompts, kernels and reference, against float64.

The truth goes by parts of rows and by whole matrices B', not by tiles and blocks. Whatever may not be read is NaN:
every buffer's surroundings, tokens of no tile, directions behind the last that is read, columns that fill up a block,
and what is to be written before it is; numbers that may not be looked at are far out of bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS
from runtime.kv.formats import FULL
from runtime.kv.units import Units
from runtime.ops.launch import INTERPRETED
from runtime.ops.norm import Norm
from runtime.ops.packed import ENDS, RECORD, Reads
from runtime.ops.pages import Pages, PageTables
from runtime.ops.prompt import token_gated, token_heads, token_residual
from runtime.ops.prompt.expanded import Patch
from runtime.ops.prompt.matrices import Added, Factors
from runtime.ops.prompt.tiles import FIELDS, Part, tiles_of
from runtime.ops.prompt.token_residual import BLOCK, squares_of_tokens
from runtime.ops.reference import decode
from runtime.ops.reference import prompt_layer as reference
from runtime.ops.rotary import Heads
from tests.ops.near import arriving, check_guards, check_near, guarded, poisoned

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
EPS = 0.1
GARBAGE = 2**30
MODULES, SITE, SETS = 7, 3, 4
PAGES = 12
"""Of a row"""


@dataclass(frozen=True)
class Pass:
    """Parts of prompts, some of which are of no tile."""

    parts: tuple[Part, ...]
    missing: tuple[int, ...] = ()


PASSES = {
    # Two tiles of one part; parts that begin and end within a page; one token; no factors; factors without directions.
    "kinds": Pass(
        (Part(3, 5, 150, 0), Part(0, 0, 1, 1), Part(1, 30, 17, -1), Part(4, 16, 40, 2), Part(2, 47, 33, 1),
         Part(5, 100, 48, 3)), missing=(4,),
    ),
    "short": Pass((Part(1, 0, 3, 0), Part(0, 15, 2, -1), Part(2, 31, 5, 1), Part(3, 64, 16, 2)), missing=(1,)),
    "whole": Pass((Part(0, 0, 128, 1),)),
}  # fmt: skip


class Case:
    """Linears that share their input, and what adapters add to their outputs, of sizes N_i in blocks of `columns`."""

    kernel: ModuleType

    def __init__(
        self, name: str, sizes: list[int], columns: int, dtype: torch.dtype, device: torch.device, *,
        directions: int = 12, normed: bool = False, biased: bool = True, lora: bool = True,
    ):  # fmt: skip
        self.random, self.device, self.dtype, self.sizes = torch.Generator().manual_seed(0), device, dtype, sizes
        own = PASSES[name]
        self.total = sum(part.tokens for part in own.parts)
        self.place(own)
        self.y = tuple(self.drawn(self.total, size) for size in sizes)
        self.biases = tuple(self.drawn(size) for size in sizes) if biased else None
        self.inputs = 50
        squares = torch.rand(self.total, 3, generator=self.random).to(device) * self.inputs
        self.norm = Norm(guarded(squares), EPS, self.inputs) if normed else None
        self.counts = self.counts_of(directions)
        self.records = torch.full((SETS, MODULES, RECORD), GARBAGE, dtype=torch.int32)
        self.records[:, SITE : SITE + len(sizes), ENDS + 3] = self.counts
        self.records = self.records.to(device)
        self.matrices = [[self.drawn(int(n), size) for n, size in zip(*own, strict=True)] for own in self.each_set()]
        self.update = self.added(directions, columns) if lora else None
        self.outside = torch.ones(self.total, dtype=torch.bool, device=device)
        self.outside[self.tokens] = False
        for tensor in (*self.y, squares if self.norm is None else self.norm.squares):
            tensor[self.outside] = torch.nan

    def each_set(self) -> list[tuple[list[int], list[int]]]:
        return [(own, self.sizes) for own in self.counts.tolist()]

    def drawn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return guarded(torch.randn(*shape, generator=self.random).to(self.device, dtype or self.dtype))

    def counts_of(self, most: int) -> Tensor:
        """[SETS, members]: directions of every set; set 2 has none of the first member, set 3 none at all."""
        counts = torch.tensor([[most, 3, 9], [5, most - 1, most], [0, 8, 1], [0, 0, 0]])
        return counts[:, : len(self.sizes)]

    def place(self, own: Pass) -> None:
        """Tiles in another order than tokens, with some not in use; and of all tokens of tiles, in the order of the
        tokens, which of the T they are, their rows, positions and factors."""
        tiles = tiles_of(own.parts)
        starts = [sum(part.tokens for part in own.parts[:i]) for i in range(len(own.parts) + 1)]
        gone = [range(starts[i], starts[i + 1]) for i in own.missing]
        tiles = [[*tile[:5], GARBAGE, GARBAGE, GARBAGE] for tile in tiles if not any(tile[0] in part for part in gone)]
        unused = [GARBAGE, 0, GARBAGE, GARBAGE, GARBAGE, GARBAGE, GARBAGE, GARBAGE]
        # The first stays the first: what is read too early shows in the first program.
        self.tiles = torch.tensor([tiles[0], unused, *tiles[:0:-1], unused], dtype=torch.int32).to(self.device)
        assert self.tiles.shape[1] == FIELDS
        kept = [(i, part) for i, part in enumerate(own.parts) if i not in own.missing]
        self.parts = [part for _, part in kept]
        self.slices = [slice(starts[i], starts[i + 1]) for i, _ in kept]
        self.tokens = torch.cat([torch.arange(self.total)[one] for one in self.slices]).to(self.device)
        self.positions = torch.cat([part.position + torch.arange(part.tokens) for part in self.parts])
        self.rows = torch.cat([torch.full((part.tokens,), part.row) for part in self.parts])

    def added(self, directions: int, columns: int) -> Added:
        """u and B' in blocks; NaN where no direction is read, and in columns beyond a member's."""
        members = len(self.sizes)
        u = poisoned(self.total, members, directions, device=self.device, dtype=self.dtype)
        for part, own in zip(self.parts, self.slices, strict=True):
            for member, n in enumerate(self.counts[part.factors].tolist() if part.factors >= 0 else []):
                u[own, member, :n] = torch.randn(part.tokens, n, generator=self.random).to(u)
        blocks = [-(-size // columns) for size in self.sizes]
        b = poisoned(SETS, sum(blocks), directions, columns, device=self.device, dtype=self.dtype)
        for own, matrices in zip(b, self.matrices, strict=True):
            first = 0
            for matrix, size, number in zip(matrices, self.sizes, blocks, strict=True):
                for column in range(size):
                    own[first + column // columns, : len(matrix), column % columns] = matrix[:, column]
                first += number
        like = torch.zeros(0, device=self.device)
        return Added(u, Factors(Reads(self.records, like.byte(), like), SITE, b.new_empty(0), b))

    def adapted(self, dtype: torch.dtype) -> Tensor:
        """[tokens, sum of N_i] in `dtype`: y and B'u, normed and with biases, by parts."""
        total = torch.cat([own.to(dtype) for own in self.y], 1)
        if self.update is not None:
            for part, own in zip(self.parts, self.slices, strict=True):
                if part.factors < 0:
                    continue
                pairs = enumerate(self.matrices[part.factors])
                added = [self.update.u[own, m, : len(b)].to(dtype) @ b.to(dtype) for m, b in pairs]
                total[own] += torch.cat(added, 1)
        norm = {}
        if self.norm is not None:
            norm = {"squares": self.norm.squares[self.tokens], "width": self.inputs, "eps": EPS}
        return decode.settle(total[self.tokens], biases=self.biases, **norm)

    def arriving(self, *more: Tensor):
        """What kernels before this one write is there when it waits."""
        made = list(self.y) + list(more)
        if self.update is not None:
            made += [self.update.u, self.update.factors.b, self.records]
        if self.norm is not None:
            made.append(self.norm.squares)
        return arriving([self.kernel], *made)

    def check_rows(self, found: Tensor, eager: Tensor, truth: Tensor) -> None:
        """Tokens of tiles are near; others are as they were, NaN."""
        assert bool(found[self.outside].isnan().all())
        check_near(found[self.tokens], eager, truth)


class HeadsCase(Case):
    """q, k and v, and pages dealt out at random."""

    kernel = token_heads

    def __init__(self, name, counts, width, dtype, device, *, norms=False, coded=False, **more):
        self.heads, self.shared, self.width = *counts, width
        sizes = [counts[0] * width, counts[1] * width, counts[1] * width]
        super().__init__(name, sizes, width, dtype, device, normed=True, **more)
        self.units = Units(self.shared, width, dtype.itemsize, coded)
        rows = int(self.rows.max()) + 1
        self.tables = PageTables.of(rows, PAGES, self.units, device)
        for table in vars(self.tables).values():
            table.fill_(GARBAGE)
        pages = sorted(set(zip(self.rows.tolist(), (self.positions // PAGE_TOKENS).tolist(), strict=True)))
        parts = self.units.of(FULL)
        # The first unit is nobody's.
        order = 1 + torch.randperm(len(pages) * parts, generator=self.random).view(-1, parts)
        for (row, page), own in zip(pages, order, strict=True):
            self.tables.full[row, page] = own.to(self.tables.full)
        shape = (order.numel() + 1, self.shared, self.units.head_bytes // dtype.itemsize)
        self.numbers = poisoned(*shape, device=device, dtype=dtype)
        self.query = poisoned(self.total, self.heads, width, device=device, dtype=dtype)
        angles = 6 * torch.rand(int(self.positions.max()) + 1, width // 2, generator=self.random)
        angles[: int(self.positions.min())] = torch.nan
        weights = (self.drawn(width), self.drawn(width)) if norms else (None, None)
        self.fixed = Heads(*(guarded(own.to(device)) for own in (angles.cos(), angles.sin())), *weights, EPS)

    def run(self, source: ModuleType, **more) -> None:
        pages = Pages(self.numbers.view(torch.uint8), self.tables, self.units)
        given = {"update": self.update, "norm": self.norm, "biases": self.biases, **more}
        source.rotate_tokens(self.y, self.query, pages, self.fixed, self.tiles, **given)

    def check(self) -> None:
        check_guards(self.query, self.numbers)
        (q, *kv), (true_q, *true_kv) = self.rotated(FP32), self.rotated(FP64)
        self.check_rows(self.query, q, true_q)
        part = self.units.part_tokens
        slot = self.positions % PAGE_TOKENS
        unit = self.tables.full.cpu()[self.rows, self.positions // PAGE_TOKENS, slot // part].long()
        tokens = self.numbers[..., : 2 * part * self.width].unflatten(2, (2, part, self.width))
        for which, (own, true) in enumerate(zip(kv, true_kv, strict=True)):
            check_near(tokens[unit, :, which, slot % part], own, true)
            tokens[unit, :, which, slot % part] = torch.nan
        assert bool(self.numbers.isnan().all()), "somebody else's place was written"

    def rotated(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        own = self.fixed
        norms = None if own.q_norm is None or own.k_norm is None else (own.q_norm, own.k_norm)
        return decode.rotate(
            self.adapted(dtype), own.cosine, own.sine, self.positions.to(self.device) + 1, (self.heads, self.shared),
            self.dtype if dtype == FP32 else dtype, norms=norms, eps=EPS,
        )  # fmt: skip


class GatedCase(Case):
    """Gate and up projection and their product."""

    kernel = token_gated

    def __init__(self, name, width, columns, dtype, device, **more):
        super().__init__(name, [width, width], columns, dtype, device, **{"normed": True, **more})
        for own in self.y:
            own.div_(4)  # so that no exponential overflows
        # Triton's interpreter cuts off what a GPU rounds, and in a row with one large product that is all there is:
        # round behind it.
        self.h = poisoned(self.total, width, device=device, dtype=FP32 if INTERPRETED else dtype)

    def run(self, source: ModuleType, **more) -> None:
        given = {"update": self.update, "norm": self.norm, "biases": self.biases, **more}
        source.gate_up_tokens(*self.y, self.h, self.tiles, **given)

    def check(self) -> None:
        check_guards(self.h)
        eager, truth = decode.gate_up(self.adapted(FP32), self.dtype), decode.gate_up(self.adapted(FP64), FP64)
        self.check_rows(self.h.to(self.dtype), eager, truth)


class ResidualCase(Case):
    """The o or down projection, the residual, and the next norm."""

    kernel = token_residual

    def __init__(self, name, width, columns, dtype, device, **more):
        super().__init__(name, [width], columns, dtype, device, **more)
        self.before, self.weight = self.drawn(self.total, width, dtype=FP32), self.drawn(width)
        self.before[self.outside] = torch.nan
        self.r = guarded(self.before)
        self.normed = poisoned(self.total, width, device=device, dtype=dtype)
        self.squares = poisoned(self.total, squares_of_tokens(width), device=device)

    def run(self, source: ModuleType, **more) -> None:
        given = {"update": self.update, "bias": self.biases[0] if self.biases else None, **more}
        source.add_residual_tokens(*self.y, self.r, self.normed, self.squares, self.weight, self.tiles, **given)

    def check(self) -> None:
        check_guards(self.r, self.normed, self.squares)
        before = self.before[self.tokens]
        truth = decode.add_residual(self.adapted(FP64), before, self.weight, FP64)
        eager = decode.add_residual(self.adapted(FP32), before, self.weight, self.dtype)
        self.check_rows(self.r, eager[0], truth[0])
        self.check_rows(self.normed, eager[1], truth[1])
        # Of one number PyTorch's error may be any: here against the residual that was written.
        assert bool(self.squares[self.outside].isnan().all())
        for block, (sums, own) in enumerate(zip(self.squares.unbind(1), self.r.split(BLOCK, 1), strict=True)):
            eager, truth = (wide[self.tokens].square().sum(1, keepdim=True) for wide in (own, own.double()))
            check_near(sums[self.tokens, None], eager, truth), block


def both(case: Case, arrived: tuple[Tensor, ...] = (), **more) -> None:
    """The kernel does what is to be done."""
    with case.arriving(*arrived):
        case.run(case.kernel, **more)
    case.check()


HEADS = [
    ("kinds", (3, 1), 20, FP32, {"norms": True, "coded": True}),
    ("kinds", (3, 2), 16, BF16, {"coded": True, "directions": 72}),
    ("short", (2, 2), 32, BF16, {"norms": True}),
    ("short", (2, 1), 36, FP32, {"directions": 40, "biased": False}),
    ("whole", (1, 1), 64, BF16, {"lora": False, "coded": True}),
]


@pytest.mark.parametrize(("name", "counts", "width", "dtype", "more"), HEADS, ids=str)
def test_heads(name, counts, width, dtype, more, device):
    both(HeadsCase(name, counts, width, dtype, device, **more))


@pytest.mark.parametrize(("name", "counts", "width", "dtype", "more"), HEADS, ids=str)
def test_heads_in_pytorch(name, counts, width, dtype, more, device):
    case = HeadsCase(name, counts, width, dtype, device, **more)
    case.run(reference)
    case.check()


@pytest.mark.parametrize("patch", [Patch(16, 0, 2, 2, 1), Patch(128, 0, 3, 4, 2)], ids=str)
def test_heads_by_any_patch(patch, device):
    both(HeadsCase("kinds", (5, 2), 12, BF16, device), patch=patch)


def test_heads_whose_input_is_normed(device):
    case = HeadsCase("short", (2, 1), 20, FP32, device)
    case.norm = None
    both(case)


GATED = [
    ("kinds", 96, 64, FP32, {}),
    ("kinds", 100, 48, BF16, {"directions": 72}),
    ("short", 140, 32, BF16, {"biased": False}),
    ("short", 40, 40, FP32, {"directions": 40, "normed": False}),
    ("whole", 64, 64, BF16, {"lora": False}),
]


@pytest.mark.parametrize(("name", "width", "columns", "dtype", "more"), GATED, ids=str)
def test_gate_and_up(name, width, columns, dtype, more, device):
    both(GatedCase(name, width, columns, dtype, device, **more))


@pytest.mark.parametrize(("name", "width", "columns", "dtype", "more"), GATED, ids=str)
def test_gate_and_up_in_pytorch(name, width, columns, dtype, more, device):
    case = GatedCase(name, width, columns, dtype, device, **more)
    case.run(reference)
    case.check()


@pytest.mark.parametrize("patch", [Patch(16, 16, 2, 2, 1), Patch(128, 32, 1, 4, 2)], ids=str)
def test_gate_and_up_by_any_patch(patch, device):
    both(GatedCase("kinds", 40, 24, BF16, device), patch=patch)


RESIDUAL = [
    ("kinds", 116, 64, FP32, {}),
    ("kinds", 1100, 48, BF16, {"directions": 72}),
    ("short", 1024, 64, BF16, {"biased": False}),
    ("short", 530, 32, FP32, {"directions": 40}),
    ("whole", 116, 64, BF16, {"lora": False}),
]


@pytest.mark.parametrize(("name", "width", "columns", "dtype", "more"), RESIDUAL, ids=str)
def test_residual(name, width, columns, dtype, more, device):
    case = ResidualCase(name, width, columns, dtype, device, **more)
    both(case, (case.r,))


@pytest.mark.parametrize(("name", "width", "columns", "dtype", "more"), RESIDUAL, ids=str)
def test_residual_in_pytorch(name, width, columns, dtype, more, device):
    case = ResidualCase(name, width, columns, dtype, device, **more)
    case.run(reference)
    case.check()


@pytest.mark.parametrize(("width", "patch"), [(116, Patch(16, 16, 0, 2, 1)), (560, Patch(128, 64, 0, 4, 2))], ids=str)
def test_residual_by_any_patch(width, patch, device):
    case = ResidualCase("kinds", width, 24, BF16, device)
    both(case, (case.r,), patch=patch)

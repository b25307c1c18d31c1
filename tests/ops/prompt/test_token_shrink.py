"""A'x of the tokens of a pass: kernels and reference against sums in float64.

Tiles are full and not, of several sets and of none, and some are not in use; tokens of no tile lie between those of
others. What must not be read is NaN: directions behind those that a set reads, sets that no tile names, tokens of no
tile and their weights, and scratch; so is u before it is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from runtime.ops import launch
from runtime.ops.packed import ENDS, RECORD, Reads
from runtime.ops.prompt import token_shrink
from runtime.ops.prompt.matrices import Factors
from runtime.ops.prompt.tiles import FIELDS, TILE, tiles_for
from runtime.ops.prompt.token_shrink import ShrinkCut, ShrinkScratch, shrink_tokens
from runtime.ops.reference import prompt_factors as reference
from tests.ops.near import arriving, check_guards, check_near, guarded, poisoned
from tests.ops.prompt.tables import written

FP32, BF16 = torch.float32, torch.bfloat16
SITE, MODULES = 2, 6
GARBAGE = 2**30
UNREAD, EMPTY = 1, 3
"""A set that no tile names, and one that reads nothing."""

TILES = [
    [0, TILE, 5, 0, 2],
    [TILE, 7, 5, TILE, 2],
    [140, 33, 1, 900, -1],
    [180, 70, 0, 3, 0],
    [251, 1, 2, 0, EMPTY],
    [252, 20, 2, 0, 4],
]
"""Their first five numbers; behind the last one two are not in use. Tokens 135 to 139, 173 to 179 and 250 are of no
tile, and those from 272 on."""
TOKENS = 275


@dataclass(frozen=True)
class Case:
    """A pass at a site."""

    x: Tensor
    factors: Factors
    counts: Tensor
    """[S, members]: what sets read"""
    weights: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, members: int, directions: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Case:
        random = torch.Generator().manual_seed(members)

        def drawn(*shape: int) -> Tensor:
            return guarded(torch.randn(*shape, generator=random).to(device, dtype))

        sets = 5
        counts = torch.randint(1, directions, (sets, members), generator=random)
        counts[0], counts[2, 0], counts[EMPTY] = directions, directions - 1, 0
        a = drawn(sets, members, directions, inputs)
        a[UNREAD] = torch.nan
        for own in range(sets):
            for member, count in enumerate(counts[own].tolist()):
                a[own, member, count:] = torch.nan
        # Who takes -1 for a set's number finds a set that reads nothing, and writes zeros.
        records = torch.full((1 + sets, MODULES, RECORD), GARBAGE, dtype=torch.int32, device=device)
        records[0] = 0
        records = records[1:]
        records[:, SITE : SITE + members, ENDS + 3] = counts.int().to(device)
        reads = Reads(records, torch.empty(0, dtype=torch.uint8, device=device), torch.zeros(26))
        x, weights = drawn(TOKENS, inputs), guarded(torch.randn(TOKENS, generator=random).to(device))
        named = torch.zeros(TOKENS, dtype=torch.bool)
        for first, tokens, *_ in TILES:
            named[first : first + tokens] = True
        x[~named], weights[~named] = torch.nan, torch.nan
        tiles = written([own + [GARBAGE] * (FIELDS - 5) for own in TILES], len(TILES) + 2, device)
        return cls(x, Factors(reads, SITE, a, a), counts, weights, tiles)

    def u(self) -> Tensor:
        _, members, directions, _ = self.factors.a.shape
        return poisoned(len(self.x), members, directions, device=self.x.device, dtype=self.x.dtype)

    def scratch(self, shares: int) -> ShrinkScratch:
        """Of NaN, of just so many numbers."""
        _, members, directions, _ = self.factors.a.shape
        padded = max(16, 1 << (directions - 1).bit_length())
        size = len(self.tiles) * shares * TILE * members * padded if shares > 1 else 0
        return ShrinkScratch(poisoned(size, device=self.x.device))

    def check(self, u: Tensor) -> None:
        """Against both specifications, where anything was to be written; nothing else was."""
        check_guards(u, self.x, self.weights)
        adapted = torch.zeros(len(self.x), dtype=torch.bool, device=u.device)
        truth = torch.zeros(u.shape, dtype=torch.float64, device=u.device)
        for first, tokens, _, _, own in TILES:
            for token in range(first, first + tokens if own >= 0 else 0):
                adapted[token] = True
                for member, count in enumerate(self.counts[own].tolist()):
                    a = self.factors.a[own, member, :count].double()
                    truth[token, member, :count] = a @ self.x[token].double() * self.weights[token].double()
        assert torch.equal(~u.isnan(), adapted[:, None, None].expand_as(u))
        given = (self.x, self.factors.a, self.counts, self.weights, self.tiles)
        eager = reference.shrink_tokens(*given, torch.full_like(u, torch.nan))
        exact = reference.shrink_tokens(*given, torch.full_like(u, torch.nan, dtype=torch.float64))
        assert torch.equal(exact.isnan(), u.isnan())
        torch.testing.assert_close(exact[adapted], truth[adapted])
        check_near(u[adapted], eager[adapted], truth[adapted])
        behind = torch.arange(u.shape[2]) >= self.counts[:, :, None]
        for first, tokens, _, _, own in TILES:
            if own >= 0:
                assert bool((u[first : first + tokens][:, behind[own].to(u.device)] == 0).all())


@pytest.mark.parametrize(
    ("members", "directions", "inputs", "dtype", "cut"),
    [
        (3, 12, 116, FP32, ShrinkCut(32, 16, 48, 4, 2)),
        (3, 16, 96, BF16, ShrinkCut(64, 32, 32, 4, 3)),
        (2, 21, 100, FP32, ShrinkCut(128, 32, 128, 8, 2)),
        (2, 8, 116, BF16, ShrinkCut(32, 16, 80, 4, 2)),
        (1, 40, 64, BF16, ShrinkCut(128, 64, 64, 8, 4)),
        (1, 33, 300, FP32, None),
        (3, 12, 1100, BF16, None),
    ],
    ids=str,
)
def test_tokens(members, directions, inputs, dtype, cut, device, monkeypatch):
    # Fewer programs, of which each still has a part of a tile.
    monkeypatch.setattr(token_shrink, "_JOINED", 32)
    case = Case.of(members, directions, inputs, dtype, device)
    reckoned = cut or ShrinkCut.of(TOKENS, members, directions, inputs, dtype)
    shares = reckoned.splits(inputs)
    scratch, found = case.scratch(shares), case.u()
    waits: list[None] = []
    with arriving(
        [token_shrink], case.x, case.weights, case.factors.a, case.factors.reads.records, case.tiles,
        told=lambda: waits.append(None),
    ):  # fmt: skip
        shrink_tokens(case.x, case.factors, case.weights, case.tiles, found, scratch, cut)
    if launch.INTERPRETED:
        programs = len(case.tiles) * TILE // reckoned.tokens * shares
        joins = len(case.tiles) * TILE // token_shrink._JOINED * members if shares > 1 else 0
        assert len(waits) == programs + joins, "all programs of both launches wait"
    check_guards(scratch.sums)
    case.check(found)


def test_the_same_every_time(device):
    """Shares are added in their order, by as many programs as in earnest: to the bit, and right."""
    case = Case.of(1, 12, 64, FP32, device)
    found = [case.u() for _ in range(2)]
    for own in found:
        shrink_tokens(
            case.x, case.factors, case.weights, case.tiles, own, case.scratch(4), ShrinkCut(128, 16, 16, 4, 2)
        )  # fmt: skip
    case.check(found[0])
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("tokens", [1, 512, 1000, 2048, 40000])
def test_cuts(tokens, dtype):
    """Shares are whole steps and cover the inputs, none is empty, and scratch has room for every site's."""
    tiles = tiles_for(tokens, 8)
    sites = [(3, 4096), (1, 4096), (2, 4096), (1, 11008), (3, 116)]
    for directions in (1, 12, 64, 100):
        scratch = ShrinkScratch.of(tokens, tiles, sites, directions, dtype, torch.device("cpu"))
        needed = []
        for members, inputs in sites:
            cut = ShrinkCut.of(tokens, members, directions, inputs, dtype)
            splits = cut.splits(inputs)
            assert TILE % cut.tokens == cut.share % cut.inputs == 0
            assert cut.share * (splits - 1) < inputs <= cut.share * splits
            assert splits == 1 or -(-tokens // cut.tokens) * splits <= 132
            padded = max(16, 1 << (directions - 1).bit_length())
            needed.append(tiles * splits * TILE * members * padded if splits > 1 else 0)
        assert scratch.sums.numel() == max(needed)


def test_a_pass_of_one_row_fills_the_device():
    """LLaMA-7B, 64 directions: programs of 2,048 and 512 tokens, and what they hold of shared memory."""
    for members, inputs, tokens, splits in (
        (3, 4096, 2048, 4), (1, 11008, 2048, 4), (3, 4096, 512, 16), (1, 11008, 512, 16),
    ):  # fmt: skip
        cut = ShrinkCut.of(tokens, members, 64, inputs, BF16)
        assert (cut.tokens, cut.splits(inputs)) == (TILE // 2, splits)
        assert cut.stages * (cut.tokens + 64 * members) * cut.inputs * 2 <= 200 * 1024


def test_scratch_too_small_is_refused(device):
    case = Case.of(2, 12, 200, FP32, device)
    with pytest.raises(AssertionError, match="shares need a place"):
        shrink_tokens(
            case.x, case.factors, case.weights, case.tiles, case.u(), case.scratch(6), ShrinkCut(32, 16, 32, 4, 2)
        )  # fmt: skip

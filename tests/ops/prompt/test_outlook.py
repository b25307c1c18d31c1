"""Entropy and surprisal at tokens of prompts, kernel and reference, against float64.

The truth goes by tokens, not by tiles. Logits that no program may read are far above all others, what scales them there
is NaN, numbers of tiles that may not be looked at are far out of bounds; outputs are NaN, within and around.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from runtime.control import signals
from runtime.ops.launch import INTERPRETED
from runtime.ops.prompt import outlook as kernel
from runtime.ops.prompt.tiles import Part, tiles_of
from runtime.ops.reference import prompt_outlook as reference
from tests.ops.near import arriving, check_guards, guarded, poisoned

from ..test_sampling import check_error

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
GARBAGE = 2**30
ABOVE = 2.0**100
"""A logit that outweighs all others; a number, as what is none counts for nothing."""


class Case:
    """Logits [T, V] float32, which become the model's dtype, and what parts of prompts make of them; a part is (tokens,
    whether it has tiles)."""

    def __init__(self, logits: Tensor, parts: Sequence[tuple[int, bool]], dtype: torch.dtype, device: torch.device):
        random = torch.Generator().manual_seed(len(logits))
        total, self.vocabulary = logits.shape
        assert sum(tokens for tokens, _ in parts) == total
        self.there = torch.cat([torch.full((tokens,), own) for tokens, own in parts]).to(device)
        wide = torch.full((total + 2, self.vocabulary), ABOVE, dtype=dtype, device=device)
        self.logits = wide[1:-1].copy_(logits.to(dtype))
        self.logits[~self.there] = ABOVE
        self.scale = guarded(torch.empty(total).uniform_(0.2, 3.0, generator=random).to(device))
        self.scale[~self.there] = torch.nan
        # What lies around them is of no vocabulary; near the edges of this one ids are as likely as elsewhere.
        ids = torch.randint(0, self.vocabulary, (total,), generator=random)
        ids[::5], ids[1::7] = 0, self.vocabulary - 1
        self.tokens = torch.full((total + 2,), GARBAGE, device=device)[1:-1].copy_(ids)
        self.tiles = self.placed(parts).to(device)

    @staticmethod
    def placed(parts: Sequence[tuple[int, bool]]) -> Tensor:
        """Tiles in another order than tokens, one of them not in use, the last mostly in use."""
        tiles = tiles_of(Part(GARBAGE, GARBAGE, tokens, GARBAGE) for tokens, _ in parts)
        starts = [sum(tokens for tokens, _ in parts[:i]) for i in range(len(parts))]
        gone = [range(start, start + tokens) for start, (tokens, own) in zip(starts, parts, strict=True) if not own]
        tiles = [[*tile[:2], *[GARBAGE] * 6] for tile in tiles if not any(tile[0] in part for part in gone)]
        unused = [GARBAGE, 0, *[GARBAGE] * 6]
        # The first stays the first: what is read too early shows in the first program.
        return torch.tensor([*tiles[:1], unused, *tiles[:0:-1]], dtype=torch.int32)

    def run(self, by: ModuleType = kernel, *early: Tensor) -> tuple[Tensor, Tensor]:
        entropy, surprisal = (poisoned(len(self.tokens), device=self.logits.device) for _ in range(2))
        with arriving([kernel] if early else [], *early):
            by.outlook(self.logits, self.scale, self.tokens, self.tiles, entropy, surprisal)
        check_guards(entropy, surprisal)
        for found in (entropy, surprisal):
            assert bool((found.isnan() == ~self.there).all()), "written for tokens of tiles, and no other"
        return entropy, surprisal

    def true(self) -> tuple[Tensor, Tensor]:
        """In float64."""
        logits = self.logits.double() * self.scale.double()[:, None]
        log_p = logits.log_softmax(-1).clamp(min=torch.finfo(FP32).min)
        surprisal = torch.zeros_like(log_p[:, 0])
        surprisal[:-1] = signals.surprisal(log_p[:-1], self.tokens[1:])
        return signals.next_token_entropy(log_p), surprisal

    def check(self, *early: Tensor) -> tuple[Tensor, Tensor]:
        """Kernel and reference; what the kernel says."""
        own = self.there
        logits = (self.logits.double() * self.scale.double()[:, None])[own]
        largest = logits.masked_fill(logits.isinf(), 0.0).abs().amax()
        # Logits are rounded before they are subtracted; and sums of V numbers differ with their order.
        rounding = 2.0**-22 * (1 + float(largest) / math.log(self.vocabulary)) + 2.0**-24 * math.sqrt(self.vocabulary)
        found = self.run(kernel, *early)
        for got, eager, truth in zip(found, self.run(reference), self.true(), strict=True):
            check_error(got[own], eager[own], truth[own])
            torch.testing.assert_close(eager[own].double(), truth[own], atol=rounding, rtol=0)
        return found


def drawn(tokens: int, vocabulary: int, spread: float = 2.0) -> Tensor:
    """[T, V]; what stands out is somewhere else at every token."""
    random = torch.Generator().manual_seed(vocabulary)
    logits = spread * torch.randn(tokens, vocabulary, generator=random)
    logits[torch.arange(tokens), torch.randint(0, vocabulary, (tokens,), generator=random)] += 3 * spread
    return logits


PASSES = {
    "one token": [(1, True)],
    "whole tiles and more": [(128, True), (2, True), (129, True)],
    "some without tiles": [(3, True), (130, False), (1, True), (20, True), (7, False), (16, True)],
    "the last has none": [(5, True), (6, False)],
}


@DTYPES
@pytest.mark.parametrize("name", PASSES)
def test_parts_of_prompts(name, dtype, device):
    parts = PASSES[name]
    case = Case(drawn(sum(tokens for tokens, _ in parts), 40), parts, dtype, device)
    _, surprisal = case.check(case.logits, case.scale, case.tokens)
    if parts[-1][1]:
        assert surprisal[-1] == 0, "nothing follows the last token"


@DTYPES
@pytest.mark.parametrize("vocabulary", [2, 40, 257, 2048, 4097, 32000, 128256])
def test_vocabularies(vocabulary, dtype, device):
    Case(drawn(5, vocabulary), [(4, True), (1, True)], dtype, device).check()


@DTYPES
@pytest.mark.parametrize("spread", [0.0, 0.01, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("vocabulary", [40, 5000])
def test_logits_of_any_size(vocabulary, spread, dtype, device):
    Case(drawn(6, vocabulary, spread), [(6, True)], dtype, device).check()


@DTYPES
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_far_from_zero(offset, dtype, device):
    """Where bfloat16 is left with few different numbers they still differ."""
    Case(drawn(6, 5000, 50.0) + offset, [(6, True)], dtype, device).check()


@DTYPES
def test_what_overflows_when_it_is_scaled(dtype, device):
    """As it is subtracted first, the largest stays what it is."""
    logits = torch.full((3, 40), -3e37)
    logits[:2, 7], logits[1, 30] = 3e37, 3e37
    case = Case(logits, [(3, True)], dtype, device)
    case.scale.fill_(20.0)
    case.tokens.copy_(torch.tensor([7, 7, 8]))
    entropy, surprisal = case.run()
    expected = torch.tensor([0.0, math.log(2) / math.log(40), 1.0], device=device)
    torch.testing.assert_close(entropy, expected, atol=1e-6, rtol=0)
    assert surprisal.tolist() == pytest.approx([0.0, 1.0, 0.0])


@DTYPES
@pytest.mark.parametrize("falling", [False, True])
def test_the_largest_comes_early_or_late(falling, dtype, device):
    """What was summed before is weighed anew, over many blocks."""
    logits = torch.linspace(-6, 6, 10_000).repeat(3, 1)
    Case(logits.flip(1) if falling else logits, [(3, True)], dtype, device).check()


RULED_OUT = {
    "a third": slice(None, None, 3),
    "the first blocks": slice(0, 4500),
    "the last blocks": slice(500, None),
    "all but one": slice(0, -1),
    "all but the first": slice(1, None),
}


@DTYPES
@pytest.mark.parametrize("name", RULED_OUT)
def test_some_are_ruled_out(name, dtype, device):
    logits = drawn(6, 5000)
    logits[:, RULED_OUT[name]] = -torch.inf
    case = Case(logits, [(6, True)], dtype, device)
    entropy, surprisal = case.check()
    if name.startswith("all"):
        assert not entropy.any(), "there is one choice"
    never = case.logits[torch.arange(5), case.tokens[1:]].isinf()
    assert bool((surprisal[:-1][never] == 1).all())
    assert bool(never.any()), "a token that follows has been ruled out"


@DTYPES
@pytest.mark.parametrize("none", [-torch.inf, torch.nan])
def test_where_nothing_is_left_the_signals_are_numbers(none, dtype, device):
    case = Case(torch.full((2, 40), none), [(2, True)], dtype, device)
    for found in case.run():
        assert bool(((found >= 0) & (found <= 1)).all())


@DTYPES
def test_what_is_no_number_counts_as_ruled_out(dtype, device):
    logits = drawn(6, 5000)
    logits[:, ::3] = -torch.inf
    case = Case(logits, [(6, True)], dtype, device)
    expected = case.run()
    case.logits[:, ::3] = torch.nan
    for found, own in zip(case.run(), expected, strict=True):
        assert torch.equal(found, own)


@DTYPES
def test_tokens_beyond_the_vocabulary(dtype, device):
    """As `signals.surprisal` has it: the nearest there is."""
    case = Case(drawn(6, 40), [(6, True)], dtype, device)
    case.tokens.copy_(torch.tensor([3, signals.NO_TOKEN, 40, -(2**40), 2**40, 39]))
    case.check()
    _, surprisal = case.run()
    near = Case(drawn(6, 40), [(6, True)], dtype, device)
    near.tokens.copy_(torch.tensor([3, 0, 39, 0, 39, 39]))
    assert torch.equal(surprisal, near.run()[1])


@DTYPES
def test_a_token_says_the_same_in_every_pass(dtype, device):
    """What else is in a pass, and where, changes no bit."""
    whole = Case(drawn(20, 257), [(20, True)], dtype, device)
    alone = Case(drawn(20, 257)[9:12], [(3, True)], dtype, device)
    alone.scale.copy_(whole.scale[9:12])
    alone.tokens.copy_(whole.tokens[9:12])
    (entropy, surprisal), (own_entropy, own_surprisal) = whole.run(), alone.run()
    assert torch.equal(own_entropy, entropy[9:12])
    assert torch.equal(own_surprisal[:2], surprisal[9:11])


@pytest.mark.skipif(not INTERPRETED, reason="where memory is given out whole it is 4 GiB of it")
def test_logits_beyond_two_to_the_31(device):
    """Of most of the memory nothing is touched."""
    total, vocabulary = 67_200, 32_000
    logits = torch.empty(total, vocabulary, dtype=BF16, device=device)
    scale, tokens = torch.empty(total, device=device), torch.zeros(total, dtype=torch.long, device=device)
    near = Case(drawn(3, vocabulary), [(3, True)], BF16, device)
    logits[-3:], scale[-3:], tokens[-3:] = near.logits, near.scale, near.tokens
    tiles = near.tiles[:1].clone()
    tiles[0, 0] = total - 3
    entropy, surprisal = (poisoned(total, device=device) for _ in range(2))
    kernel.outlook(logits, scale, tokens, tiles, entropy, surprisal)
    expected = near.run()
    assert torch.equal(entropy[-3:], expected[0])
    assert torch.equal(surprisal[-3:], expected[1])

"""Token difficulty: codes that stand for ratios, neutral where nothing is known, every row by its own tables."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from policy.difficulty import PAIRS, Difficulty, hashed_pairs

VOCABULARY = 50
CPU = torch.device("cpu")


def table(size: int, seed: int) -> Tensor:
    return torch.randint(0, 255, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def difficulty(seed: int = 0, vocabulary: int = VOCABULARY, pairs: int = PAIRS) -> Difficulty:
    return Difficulty(table(vocabulary, seed), table(pairs, seed + 1000))


def one_row(own: Difficulty) -> Difficulty:
    return Difficulty.stack([own])


def ids(rows: int, length: int, seed: int, most: int = VOCABULARY) -> Tensor:
    return torch.randint(0, most, (rows, length), generator=torch.Generator().manual_seed(seed))


def same(one: Difficulty, other: Difficulty) -> bool:
    return torch.equal(one.token, other.token) and torch.equal(one.pair, other.pair)


def test_a_value_is_the_code_of_its_token_and_of_its_pair() -> None:
    own, before, tokens = difficulty(), ids(1, 40, 1), ids(1, 40, 2)
    found = one_row(own).values(before, tokens)
    assert (found.shape, found.dtype) == ((1, 40, 2), torch.float32)
    for i, (earlier, token) in enumerate(zip(before[0].tolist(), tokens[0].tolist(), strict=True)):
        # The hash, written out in whole numbers of any size.
        entry = (earlier * 1_000_003 + token * 8_191 + 1) % 2_147_483_647 % 65_536
        expected = [int(own.token[token]) / 254, int(own.pair[entry]) / 254]
        assert found[0, i].tolist() == pytest.approx(expected, abs=1e-7)
    assert found.unique().numel() > 20


@given(ratio=st.floats(1e-30, 1e30))
def test_values_lie_in_0_to_1_and_stand_for_ratios(ratio: float) -> None:
    ratios = torch.tensor([ratio], dtype=torch.float64)
    own = one_row(Difficulty.of(ratios, ratios.expand(PAIRS)))
    found = own.values(torch.zeros(1, 1).long(), torch.zeros(1, 1).long()).flatten().tolist()
    assert found[0] == found[1]
    assert 0 <= found[0] <= 1
    if math.exp(-4) <= ratio <= math.exp(4):
        # Half a step of 254 over 8 nats.
        assert 8 * (found[0] - 0.5) == pytest.approx(math.log(ratio), abs=4 / 254 + 1e-6)
    else:
        assert found[0] == float(ratio > 1)


def test_codes_rise_with_the_ratio_and_an_average_token_is_in_the_middle() -> None:
    ratios = torch.logspace(-3, 3, 500)
    codes = Difficulty.of(ratios, torch.ones(1)).token.int()
    assert bool((codes.diff() >= 0).all())
    assert (int(codes[0]), int(codes[-1])) == (0, 254)
    assert Difficulty.of(torch.ones(3), torch.ones(2)).token.tolist() == [127] * 3
    # Every code but those at the ends is that of the ratio it stands for.
    every = torch.arange(255, dtype=torch.uint8)
    meant = ((every.double() / 254 - 0.5) * 8).exp()
    assert torch.equal(Difficulty.of(meant, meant).token, every)


def test_what_is_not_known_is_average() -> None:
    neutral = one_row(Difficulty.neutral())
    tokens = ids(1, 30, 3, most=10**6)
    assert bool((neutral.values(tokens, tokens) == 0.5).all())
    extreme = one_row(Difficulty(torch.zeros(VOCABULARY).byte(), torch.full((PAIRS,), 254).byte()))
    inside, beyond, none = VOCABULARY - 1, VOCABULARY, -1
    before = torch.tensor([[inside, inside, beyond, none, none, inside]])
    tokens = torch.tensor([[inside, beyond, inside, inside, none, none]])
    by_token, by_pair = extreme.values(before, tokens)[0].unbind(-1)
    assert by_token.tolist() == [0, 0.5, 0, 0, 0.5, 0.5]
    assert by_pair.tolist() == [1, 1, 1, 0.5, 0.5, 0.5], "of any pair of ids, but of nothing before"


def test_the_mean_is_that_of_the_codes() -> None:
    parts = [difficulty(seed) for seed in range(3)]
    mean = Difficulty.mean(parts)
    for name, own in (("token", mean.token), ("pair", mean.pair)):
        codes = torch.stack([getattr(part, name) for part in parts]).double()
        assert own.dtype == torch.uint8
        assert float((own - codes.mean(0)).abs().max()) <= 0.5
    assert same(Difficulty.mean(parts[:1]), parts[0])
    assert same(Difficulty.mean([difficulty()] * 5), difficulty())


def test_tables_of_different_sizes_lie_side_by_side_each_with_its_own_values() -> None:
    parts = [difficulty(1), Difficulty.neutral(), difficulty(2, vocabulary=20), difficulty(3, pairs=500)]
    stacked = Difficulty.stack(parts)
    assert (stacked.token.shape, stacked.pair.shape) == ((4, VOCABULARY), (4, PAIRS))
    assert stacked.token.dtype == stacked.pair.dtype == torch.uint8
    before, tokens = ids(4, 300, 4), ids(4, 300, 5, most=VOCABULARY + 20)
    together = stacked.values(before, tokens)
    for row, part in enumerate(parts):
        alone = one_row(part).values(before[row : row + 1], tokens[row : row + 1])
        assert torch.equal(together[row : row + 1], alone), row
    assert bool((together[1] == 0.5).all())
    assert bool((together[2, tokens[2] >= 20, 0] == 0.5).all())


def test_every_row_reads_the_tables_of_its_adapter() -> None:
    parts = [difficulty(seed) for seed in range(3)]
    adapter = torch.tensor([2, 0, 2, 1])
    own = Difficulty.stack(parts).select(adapter)
    before, tokens = ids(4, 25, 6), ids(4, 25, 7)
    found = own.values(before, tokens)
    for row, number in enumerate(adapter.tolist()):
        alone = one_row(parts[number]).values(before[row : row + 1], tokens[row : row + 1])
        assert torch.equal(found[row : row + 1], alone)
    assert same(own.to(CPU), own)


@given(rows=st.integers(1, 5), length=st.integers(1, 20), seed=st.integers(0, 999))
def test_a_value_depends_on_its_two_tokens_and_nothing_beside_them(rows: int, length: int, seed: int) -> None:
    own = Difficulty.stack([difficulty(7, pairs=300)] * rows)
    text = ids(rows, length + 1, seed)
    text[:, 0] = -1
    before, tokens = text[:, :-1], text[:, 1:]
    whole = own.values(before, tokens)
    row, at = seed % rows, seed % length
    alone = one_row(difficulty(7, pairs=300)).values(before[row, at].view(1, 1), tokens[row, at].view(1, 1))
    assert torch.equal(whole[row, at], alone[0, 0])


def test_the_hash_spreads_pairs_over_its_entries_and_takes_their_order() -> None:
    before, tokens = (grid.flatten() for grid in torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij"))
    entry = hashed_pairs(before, tokens, 64)
    assert torch.equal(entry, hashed_pairs(before, tokens, 64))
    assert (int(entry.min()), int(entry.max())) == (0, 63)
    # 90,000 pairs in 64 entries of 1,406: chi-square of 63 degrees of freedom stays below 103.4 with p = 0.999.
    counts, expected = torch.bincount(entry).double(), 90_000 / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 103.4
    assert float((hashed_pairs(tokens, before, PAIRS) == hashed_pairs(before, tokens, PAIRS)).double().mean()) < 0.01


@given(before=st.integers(-(2**31), 2**31), token=st.integers(-(2**31), 2**31), entries=st.integers(1, PAIRS))
def test_the_hash_of_any_pair_is_an_entry(before: int, token: int, entries: int) -> None:
    entry = int(hashed_pairs(torch.tensor(before), torch.tensor(token), entries))
    assert 0 <= entry < entries
    assert entry == (before * 1_000_003 + token * 8_191 + 1) % 2_147_483_647 % entries


def test_looking_up_never_reads_a_value_back() -> None:
    # Tensors on the meta device have no values, so whatever would synchronise raises.
    meta = torch.device("meta")
    own = Difficulty.stack([difficulty(), Difficulty.neutral()]).to(meta).select(torch.zeros(3, device=meta).long())
    assert own.values(ids(3, 5, 8).to(meta), ids(3, 5, 9).to(meta)).shape == (3, 5, 2)

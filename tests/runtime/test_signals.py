"""Every signal equals its definition in plain Python, lies in [0, 1], and streams in blocks of any size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy import PAGE_TOKENS
from policy.difficulty import PAIRS, Difficulty
from runtime.control.signals import (
    NO_TOKEN,
    distant_attention,
    history_tokens,
    log_probabilities,
    next_token_entropy,
    ngram_novelty,
    positional_prior,
    roll_history,
    surprisal,
)
from tests.runtime.reference import naive_difficulty, naive_entropy, naive_novelty, naive_surprisal

numbers = st.floats(-80, 80, width=32)


@st.composite
def distributions(draw):
    """Logits [N, V] in lists; any but one of a row may be ruled out."""
    vocabulary, number = draw(st.integers(2, 9)), st.one_of(numbers, st.just(-math.inf))
    rows = draw(st.lists(st.lists(number, min_size=vocabulary, max_size=vocabulary), min_size=1, max_size=4))
    for row in rows:
        row[draw(st.integers(0, vocabulary - 1))] = draw(numbers)
    return rows


def entropy_of(logits):
    return next_token_entropy(log_probabilities(logits))


@given(distributions())
def test_entropy_equals_the_definition(rows):
    got = entropy_of(torch.tensor(rows))
    expected = torch.tensor([naive_entropy(row) for row in rows])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert ((got >= 0) & (got <= 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 257, 32000])
def test_entropy_at_its_ends(dtype, vocabulary):
    logits = torch.zeros(2, 3, vocabulary, dtype=dtype)
    torch.testing.assert_close(entropy_of(logits), torch.ones(2, 3))
    logits[..., 1] = 1e4
    assert not entropy_of(logits).any()
    assert entropy_of(logits).dtype == torch.float32


def test_entropy_of_a_vocabulary_with_forbidden_tokens():
    logits = torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    assert entropy_of(logits).item() == pytest.approx(0.5)


@given(distributions())
def test_surprisal_of_every_token_equals_the_definition(rows):
    logits, vocabulary = torch.tensor(rows), len(rows[0])
    before = logits.clone()
    got = surprisal(
        log_probabilities(logits)[:, None].expand(-1, vocabulary, -1), torch.arange(vocabulary).expand(len(rows), -1)
    )
    expected = torch.tensor([[naive_surprisal(row, token) for token in range(vocabulary)] for row in rows])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert ((got >= 0) & (got <= 1)).all()
    assert torch.equal(logits, before), "the model's logits are left as they are"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 257, 32000])
def test_surprisal_at_its_ends(dtype, vocabulary):
    logits, tokens = torch.zeros(1, 4, vocabulary, dtype=dtype), torch.tensor([[0, 1, vocabulary - 1, NO_TOKEN]])
    torch.testing.assert_close(surprisal(log_probabilities(logits), tokens), torch.ones(1, 4))
    logits[..., 1] = 1e4
    got = surprisal(log_probabilities(logits), tokens)
    last = float(vocabulary > 2)  # of two tokens the expected one is the last
    assert got.tolist() == [[1, 0, last, 1]]
    assert got.dtype == torch.float32


def test_surprisal_of_plain_cases():
    """Even odds of two of four tokens are half of log 4; what is ruled out is as surprising as anything can be."""
    log_p = log_probabilities(torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])).expand(4, -1)
    assert surprisal(log_p, torch.arange(4)).tolist() == pytest.approx([0.5, 0.5, 1, 1])


@given(distributions())
def test_entropy_is_the_surprisal_to_be_expected(rows):
    """Of what is cut at 1 a little less."""
    log_p, every = log_probabilities(torch.tensor(rows)), torch.arange(len(rows[0])).expand(len(rows), -1)
    own = surprisal(log_p[:, None].expand(-1, len(rows[0]), -1), every)
    mean, entropy = (own * log_p.exp()).sum(1), next_token_entropy(log_p)
    assert (mean <= entropy + 1e-5).all()
    uncut = (own < 1).all(1)
    torch.testing.assert_close(mean[uncut], entropy[uncut], atol=1e-5, rtol=0)


texts = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 40).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=rows, max_size=rows
        )
    )
)


def stream_novelty(tokens, window, blocks):
    history = torch.full((tokens.shape[0], history_tokens(window)), NO_TOKEN)
    out = []
    for block in tokens.split(blocks, dim=1):
        out.append(ngram_novelty(history, block, window))
        history = roll_history(history, block, torch.full((tokens.shape[0],), block.shape[1]))
    return torch.cat(out, dim=1)


@st.composite
def split(draw, length):
    blocks = []
    while sum(blocks) < length:
        blocks.append(draw(st.integers(1, length - sum(blocks))))
    return blocks


@given(texts, st.integers(1, 12), st.data())
def test_novelty_equals_a_set_of_ngrams_however_it_is_split(rows, window, data):
    tokens = torch.tensor(rows)
    expected = torch.tensor([naive_novelty(row, window) for row in rows])
    torch.testing.assert_close(stream_novelty(tokens, window, [tokens.shape[1]]), expected, atol=1e-6, rtol=0)
    blocks = data.draw(split(tokens.shape[1]))
    assert torch.equal(stream_novelty(tokens, window, blocks), stream_novelty(tokens, window, [tokens.shape[1]]))


def test_novelty_of_plain_cases():
    def novelty(text, window=256):
        return stream_novelty(torch.tensor([text]), window, [len(text)])[0].tolist()

    assert novelty([1, 2, 3, 4, 5]) == [1.0] * 5
    assert novelty([7] * 6) == pytest.approx([1, 1, 1 / 2, 1 / 3, 0, 0])
    assert novelty([1, 2, 1, 2, 1, 2]) == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 0])
    # the first "1 2" has left a window of two tokens when the second one comes
    assert novelty([1, 2, 3, 4, 5, 1, 2], window=2)[-1] == 1.0
    # token 0 is a token like any other, not padding
    assert novelty([0, 0, 0, 0, 0])[-1] == 0.0


@given(texts, st.integers(1, 12))
def test_novelty_never_looks_ahead(rows, window):
    tokens = torch.tensor(rows)
    whole = stream_novelty(tokens, window, [tokens.shape[1]])
    for end in range(1, tokens.shape[1]):
        assert torch.equal(stream_novelty(tokens[:, :end], window, [end]), whole[:, :end])


@given(texts, st.data())
def test_rolling_takes_the_real_tokens_of_every_row(rows, data):
    tokens = torch.tensor(rows)
    counts = [data.draw(st.integers(0, tokens.shape[1])) for _ in rows]
    history = torch.arange(100, 105).repeat(len(rows), 1)
    got = roll_history(history, tokens, torch.tensor(counts))
    for row, count in enumerate(counts):
        assert got[row].tolist() == [*history[row].tolist(), *rows[row][:count]][-5:]


@given(st.integers(0, 30), st.integers(1, 80))
def test_prior_is_one_in_the_prompt_and_then_decays(prompt, decay):
    positions = torch.arange(60)[None]
    prior = positional_prior(positions, torch.tensor([prompt]), decay)[0]
    assert (prior[:prompt] == 1).all()
    assert prior[prompt] == 1
    assert (prior[prompt:].diff() <= 0).all()
    expected = [math.exp(-i / decay) for i in range(60 - prompt)]
    torch.testing.assert_close(prior[prompt:], torch.tensor(expected), atol=1e-6, rtol=1e-5)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 70), st.integers(0, 100))
def test_distant_attention_is_the_mass_before_the_recent_pages(recent, heads, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(2, heads, tokens, tokens, generator=generator).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    positions = torch.arange(tokens).repeat(2, 1)
    got = distant_attention(weights.mean(1), positions, recent)
    assert ((got >= 0) & (got <= 1)).all()
    for t in range(tokens):
        first_recent = (t // PAGE_TOKENS - (recent - 1)) * PAGE_TOKENS
        expected = weights[:, :, t, : max(first_recent, 0)].sum(-1).mean(1)
        torch.testing.assert_close(got[:, t], expected, atol=1e-6, rtol=1e-5)


@st.composite
def tables(draw, rows):
    """Codes of every row: some tokens are beyond the table, of the pairs all, half or a few are in it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    sizes = (draw(st.integers(1, 6)), draw(st.sampled_from([PAIRS, PAIRS // 2, 9])))
    return Difficulty(*(torch.randint(0, 255, (rows, size), generator=generator, dtype=torch.uint8) for size in sizes))


def stream_difficulty(difficulty, tokens, blocks):
    """[B, T, 2] block by block, the last token of each handed on."""
    last, found = torch.full((len(tokens), 1), NO_TOKEN), []
    for block in tokens.split(blocks, dim=1):
        found.append(difficulty.values(torch.cat([last, block[:, :-1]], 1), block))
        last = block[:, -1:]
    return torch.cat(found, 1)


@given(texts, st.data())
def test_difficulty_equals_a_look_in_both_tables_however_it_is_split(rows, data):
    tokens, difficulty = torch.tensor(rows), data.draw(tables(len(rows)))
    got = stream_difficulty(difficulty, tokens, data.draw(split(tokens.shape[1])))
    expected = [
        naive_difficulty(row, codes, pairs)
        for row, codes, pairs in zip(rows, difficulty.token.tolist(), difficulty.pair.tolist(), strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=0)
    assert ((got >= 0) & (got <= 1)).all()
    assert (got[:, 0, 1] == 0.5).all(), "nothing comes before the first token"


@given(texts, st.data())
def test_difficulty_never_looks_ahead(rows, data):
    tokens, difficulty = torch.tensor(rows), data.draw(tables(len(rows)))
    whole = stream_difficulty(difficulty, tokens, [tokens.shape[1]])
    for end in range(1, tokens.shape[1]):
        assert torch.equal(stream_difficulty(difficulty, tokens[:, :end], [end]), whole[:, :end])

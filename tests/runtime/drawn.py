"""Streams drawn at random: settings, policies, rows of text and what they may spend, and how one is driven."""

from functools import lru_cache

import torch
from hypothesis import strategies as st

from policy import FADES, SIGNALS, ChunkSettings, Operating, PercentilePolicy, Settings, SignalSettings
from policy.difficulty import PAIRS, Difficulty
from policy.operating import UNLIMITED
from runtime.control.bucket import Offer
from runtime.control.record import Keep
from runtime.control.signals import positional_prior
from runtime.control.stream import Stream
from tests.runtime.reference import (
    AgePolicy,
    PositionPolicy,
    drawn_tables,
    drive,
    naive_difficulty,
    naive_entropy,
    naive_novelty,
    naive_surprisal,
)

CPU = torch.device("cpu")
RUNGS = (0, 2, 4, 8, 16)
COST = torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0], dtype=torch.float64)
BANKS = torch.tensor([0, 0, 1, 1, 2])
"""Of the rungs above: from one to the next there are fades within a bank, and fades from bank to bank."""
BUDGETS = (UNLIMITED, 0.0, 0.07, 0.25, 0.41, 1.0)
ENTROPY, ATTENTION, SURPRISAL, NOVELTY, PRIOR, DIFFICULTY, PAIR = range(len(SIGNALS))
VOCABULARY = 6
WEIGHTS = [
    (1, 1, 0, 1, 1, 0, 0), (1, 0, 0, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0, 0), (0.5, 1, 0, 2, 0.25, 0, 0),
    (0, 1, 0, 0, 1, 0, 0), (0, 0, 1, 0, 0, 0, 0), (0.25, 0.5, 2, 0, 0, 1, 0.75), (0, 0, 0, 0, 0, 1, 1),
]  # fmt: skip


@st.composite
def settings_strategy(draw):
    fade = draw(st.sampled_from(FADES))
    least = draw(st.integers(fade, max(fade, 6)))
    most = draw(st.integers(least, least + 5))
    if draw(st.integers(0, 3)) == 0:
        fade = least = most = 1  # every token a chunk, as by default
    weights = draw(st.sampled_from(WEIGHTS))
    return Settings(
        block_tokens=draw(st.integers(1, 12)),
        fade_tokens=fade,
        signals=SignalSettings(novelty_window_tokens=8, prior_decay_tokens=draw(st.integers(1, 20))),
        chunk=ChunkSettings(
            least,
            most,
            dict(zip(SIGNALS, weights, strict=True)),
            draw(st.sampled_from([0.3, 0.5, 1.0])),
            # numbers that no mean of signals hits exactly: the two sides of a comparison round differently
            draw(st.sampled_from([(), (0.5013,), (0.4137, 0.6171), (0.3011, 0.5013, 0.7017)])),
            draw(st.sampled_from([0.0, 0.0371, 0.2])),
        ),
    )


def complexity_policy(rungs):
    return PercentilePolicy(rungs, "complexity", scales=torch.tensor([1.2, 1.1, 1.05, 1.25, 1.0]), spread=4.0)


def surprisal_policy(rungs):
    return PercentilePolicy(rungs, "surprisal", torch.linspace(0.1, 0.9, 101), spread=4.0, sign=-1)


def pair_policy(rungs):
    return PercentilePolicy(rungs, "pair", spread=4.0, of="token")


policies = st.sampled_from([complexity_policy, PositionPolicy, surprisal_policy, pair_policy, AgePolicy])


@st.composite
def batches(draw, most_rows=3):
    """(tokens [B, T], lengths, logits [B, T, VOCABULARY], attention [B, T], prompt tokens [B])"""
    lengths = draw(st.lists(st.integers(1, 45), min_size=1, max_size=most_rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    shape = (len(lengths), max(lengths))
    tokens = torch.randint(0, draw(st.integers(1, VOCABULARY)), shape, generator=generator)
    # stretches of easy and of hard text: the class must really change
    sharpness = torch.randint(0, 2, (shape[0], shape[1] // 7 + 1, 1), generator=generator).repeat_interleave(7, 1)
    logits = torch.randn(*shape, VOCABULARY, generator=generator) * (0.2 + 6 * sharpness[:, : shape[1]])
    # some tokens are ruled out, the first never
    logits[..., 1:] = logits[..., 1:].masked_fill(
        torch.rand(logits[..., 1:].shape, generator=generator) < 0.1, -torch.inf
    )
    attention = torch.rand(shape, generator=generator)
    prompts = torch.tensor([draw(st.integers(0, length)) for length in lengths])
    return tokens, lengths, logits, attention, prompts


def spends(batch, knob=1.37, limited=True):
    """Every row its own knob, start rung and budget: they follow from its prompt, so that a row alone gets the same."""
    prompts = batch[4]
    budgets = torch.tensor(BUDGETS, dtype=torch.float64)[(prompts * 7) % len(BUDGETS)] if limited else UNLIMITED
    return Operating.at(knob + 0.61 * (prompts % 4), prompts % len(RUNGS), budget=budgets)


def offers(prompts):
    """Some rows' ladders are in memory up to rung 8 alone; that too follows from the prompt."""
    resident = torch.where(prompts % 5 == 3, 3, len(RUNGS) - 1)
    return Offer.of(COST.expand(len(prompts), -1), BANKS.expand(len(prompts), -1), resident)


@lru_cache(maxsize=64)
def tables_of(prompt):
    """Tables of a row that say nothing of the last token, and some of them nothing of half the pairs."""
    return drawn_tables(prompt, VOCABULARY - 1, PAIRS if prompt % 3 else PAIRS // 2)


def make_stream(settings, policy, operating, prompts=None, keep=Keep.DECISIONS, hidden=False):
    offer = offers(torch.zeros(len(operating)) if prompts is None else prompts)
    difficulty = None if prompts is None else Difficulty.stack([tables_of(prompt) for prompt in prompts.tolist()])
    return Stream(settings, policy, operating, offer, CPU, prompts, keep=keep, difficulty=difficulty, hidden=hidden)


def naive_signals(settings, batch, row):
    """Of one row: outputs [T, 2], the surprisal of every token, and the signals [T, 4] that follow from its tokens."""
    tokens, lengths, logits, attention, prompts = batch
    length, own = lengths[row], tokens[row, : lengths[row]].tolist()
    rows = logits[row, :length].tolist()
    outputs = torch.stack([torch.tensor([naive_entropy(one) for one in rows]), attention[row, :length]], -1)
    surprisals = [0.0, *(naive_surprisal(one, token) for one, token in zip(rows, own[1:], strict=False))]
    novelty = naive_novelty(own, settings.signals.novelty_window_tokens)
    prior = positional_prior(torch.arange(length)[None], prompts[row, None], settings.signals.prior_decay_tokens)[0]
    tables = tables_of(int(prompts[row]))
    difficulty = torch.tensor(naive_difficulty(own, tables.token.tolist(), tables.pair.tolist()))
    return outputs, surprisals, torch.cat([torch.tensor(novelty)[:, None], prior[:, None], difficulty], 1)


def read_at(weights):
    """[B, N] bytes that tokens of these weights [B, N, J] read: of every bank what its dearest active rung does."""
    read = torch.where(weights > 0, COST, 0.0)
    return sum(read.masked_fill(bank != BANKS, 0.0).amax(-1) for bank in BANKS.unique())


def run(settings, policy, batch, rows=slice(None), limited=True):
    tokens, lengths, logits, attention, prompts = batch
    lengths = lengths[rows]
    operating = spends(batch, limited=limited).select(torch.arange(len(prompts))[rows])
    stream = make_stream(settings, policy, operating, prompts[rows])
    drive(stream, tokens[rows], lengths, logits[rows], attention[rows], settings.block_tokens)
    return stream


def assert_same_decisions(one, other):
    for name in ("positions", "opens", "rung", "active", "held_valid"):
        assert torch.equal(one[name], other[name]), name
    for name in ("scale", "held", "first", "age"):
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-6)

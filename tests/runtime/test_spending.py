"""What rows spend: never more than budget and slack, counted to the byte, and no less than they may."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy import ChunkSettings, FixedPolicy, Operating, Settings
from runtime.control.bucket import SLACK_TOKENS
from runtime.control.record import RESPONSE
from tests.runtime.drawn import COST, RUNGS, batches, make_stream, policies, read_at, run, settings_strategy
from tests.runtime.reference import drive, weights_of


@given(settings_strategy(), policies, batches(), st.sampled_from([0.0, 0.07, 0.25, 0.41, 0.8]))
def test_no_stretch_of_a_row_spends_more_than_its_budget_and_the_slack(settings, policy_of, batch, budget):
    """Whatever the text and the policy, prompt included: spent <= budget (n + 64) over every n tokens."""
    tokens, lengths, logits, attention, prompts = batch
    # a policy that spends far more than the budget, on a text long enough for the bucket to run dry
    long = [part.repeat(1, 6, *[1] * (part.dim() - 2)) for part in (tokens, logits, attention)]
    operating = Operating.at(96.0, (budget >= COST).sum() - 1, budget=budget)
    stream = make_stream(settings, policy_of(RUNGS), operating.for_rows(len(lengths)), prompts)
    drive(stream, long[0], [6 * tokens.shape[1]] * len(lengths), long[1], long[2], settings.block_tokens)
    read = read_at(weights_of(stream.columns(), settings, len(RUNGS)))
    spent = torch.nn.functional.pad(read.cumsum(1), (1, 0))
    steps = torch.arange(spent.shape[1])
    stretch = spent[:, None, :] - spent[:, :, None]  # [B, from, to]
    allowed = budget * (steps - steps[:, None] + SLACK_TOKENS)
    assert ((stretch - allowed).triu() <= 1e-6).all()
    assert (stream.state.bucket.balance >= -1e-6).all()


@given(settings_strategy(), policies, batches())
def test_the_sums_know_what_was_read(settings, policy_of, batch):
    """To the byte, fades from bank to bank included."""
    stream = run(settings, policy_of(RUNGS), batch)
    record, prompts = stream.columns(), batch[4]
    read = read_at(weights_of(record, settings, len(RUNGS)))
    for part, inside in enumerate((record["positions"] < prompts[:, None], record["positions"] >= prompts[:, None])):
        counted = record["real"] & inside
        sums = (stream.sums.counts + stream.sums.beside)[:, part] @ COST
        torch.testing.assert_close(sums, (read * counted).sum(1))
        assert torch.equal(stream.sums.counts[:, part].sum(1), counted.sum(1).double()), "every token once"


def test_a_fade_between_banks_is_counted_at_both_rungs():
    """Chunks of four tokens, faded over all four: three of them read both of their rungs, the last its own."""
    settings = Settings(block_tokens=4, fade_tokens=4, chunk=ChunkSettings(4, 4))
    for start, to, both in ((2, 4, True), (2, 3, False), (0, 2, True)):
        stream = make_stream(settings, FixedPolicy(RUNGS), Operating.at(float(to), start))
        drive(stream, torch.zeros(1, 12, dtype=torch.long), [12], torch.zeros(1, 12, 4), torch.zeros(1, 12), 4)
        counts, beside = stream.sums.counts[0, RESPONSE].tolist(), stream.sums.beside[0, RESPONSE].tolist()
        assert counts == [4.0 * (j == start) + 8.0 * (j == to) for j in range(5)]
        assert beside == [3.0 * (j == start and both) for j in range(5)]


def test_a_bucket_caps_what_would_overspend_and_spends_what_it_has():
    """A policy that always wants the top rung gets a run of it from the full bucket, then its budget on average."""
    settings = Settings(block_tokens=1, chunk=ChunkSettings(1, 1))
    policy = FixedPolicy(RUNGS)
    stream = make_stream(settings, policy, Operating.at(4.0, 2, budget=0.25))
    drive(stream, torch.zeros(1, 400, dtype=torch.long), [400], torch.zeros(1, 400, 4), torch.zeros(1, 400), 1)
    rungs = stream.columns()["rung"][0]
    assert rungs[0] == 2, "the start rung, before anything is known"
    full = int((rungs[1:] != 4).nonzero()[0])
    assert full == 21, "16 in the bucket, 0.75 more than its budget a token"
    rest = COST[rungs[1 + full :]]
    assert float(rest.mean()) == pytest.approx(0.25, abs=0.005)

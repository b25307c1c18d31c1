"""The state machine against the definition token by token, and every promise DESIGN sections 5 and 6 make about it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy import FADES, SIGNALS, ChunkSettings, FixedPolicy, Operating, PercentilePolicy, Settings, SignalSettings
from policy.operating import UNLIMITED
from runtime.control.bucket import SLACK_TOKENS, Offer
from runtime.control.record import RESPONSE, Keep, trace
from runtime.control.recurrence import class_bounds, levels
from runtime.control.signals import next_token_entropy, positional_prior
from runtime.control.stream import Stream
from tests.runtime.reference import (
    FeaturePolicy,
    PositionPolicy,
    drive,
    naive_chunks,
    naive_novelty,
    row_of,
    weights_of,
)

CPU = torch.device("cpu")
RUNGS = (0, 2, 4, 8, 16)
COST = torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0], dtype=torch.float64)
BANKS = torch.tensor([0, 0, 1, 1, 2])
"""Of the rungs above: from one to the next there are fades within a bank, and fades from bank to bank."""
BUDGETS = (UNLIMITED, 0.0, 0.07, 0.25, 0.41, 1.0)
ENTROPY, ATTENTION, NOVELTY, PRIOR = range(len(SIGNALS))


@st.composite
def settings_strategy(draw):
    fade = draw(st.sampled_from(FADES))
    least = draw(st.integers(fade, max(fade, 6)))
    weights = draw(st.sampled_from([(1, 1, 1, 1), (1, 0, 0, 0), (0, 0, 1, 0), (0.5, 1, 2, 0.25), (0, 1, 0, 1)]))
    return Settings(
        block_tokens=draw(st.integers(1, 12)),
        fade_tokens=fade,
        signals=SignalSettings(novelty_window_tokens=8, prior_decay_tokens=draw(st.integers(1, 20))),
        chunk=ChunkSettings(
            least,
            draw(st.integers(least, least + 5)),
            dict(zip(SIGNALS, weights, strict=True)),
            draw(st.sampled_from([0.3, 0.5, 1.0])),
            # numbers that no mean of signals hits exactly: the two sides of a comparison round differently
            draw(st.sampled_from([(), (0.5013,), (0.4137, 0.6171), (0.3011, 0.5013, 0.7017)])),
            draw(st.sampled_from([0.0, 0.0371, 0.2])),
        ),
    )


def complexity_policy(rungs):
    return PercentilePolicy(rungs, "complexity", scales=torch.tensor([1.2, 1.1, 1.05, 1.25, 1.0]), spread=4.0)


policies = st.sampled_from([complexity_policy, PositionPolicy])


@st.composite
def batches(draw, most_rows=3):
    """(tokens [B, T], lengths, logits [B, T, 6], attention [B, T], prompt tokens [B])"""
    lengths = draw(st.lists(st.integers(1, 45), min_size=1, max_size=most_rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    shape = (len(lengths), max(lengths))
    tokens = torch.randint(0, draw(st.integers(1, 6)), shape, generator=generator)
    # stretches of easy and of hard text: the class must really change
    sharpness = torch.randint(0, 2, (shape[0], shape[1] // 7 + 1, 1), generator=generator).repeat_interleave(7, 1)
    logits = torch.randn(*shape, 6, generator=generator) * (0.2 + 6 * sharpness[:, : shape[1]])
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


def make_stream(settings, policy, operating, prompts=None, keep=Keep.DECISIONS):
    offer = offers(torch.zeros(len(operating)) if prompts is None else prompts)
    return Stream(settings, policy, operating, offer, CPU, prompts, keep=keep)


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
    for name in ("scale", "held", "first"):
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-6)


@given(settings_strategy(), policies, batches())
def test_decisions_equal_the_definition(settings, policy_of, batch):
    policy = policy_of(RUNGS)
    record = run(settings, policy, batch).columns()
    tokens, lengths, logits, attention, prompts = batch
    operating = spends(batch)
    for row, length in enumerate(lengths):
        outputs = torch.stack([next_token_entropy(logits[row]), attention[row]], -1)[:length]
        novelty = naive_novelty(tokens[row, :length].tolist(), settings.signals.novelty_window_tokens)
        prior = positional_prior(torch.arange(length)[None], prompts[row, None], settings.signals.prior_decay_tokens)[0]
        blocks = [min(settings.block_tokens, length - i) for i in range(0, length, settings.block_tokens)]
        signals = torch.stack([torch.tensor(novelty), prior], -1)
        own_spends = operating.select(torch.tensor([row]))
        chunks, naive_weights = naive_chunks(
            outputs, signals, int(prompts[row]), blocks, settings, policy, own_spends, COST.tolist(), BANKS.tolist(),
            int(offers(prompts).resident[row]),
        )  # fmt: skip
        weights = weights_of(record, settings, len(RUNGS))

        got = row_of(record, row)
        starts = got["opens"].nonzero()[:, 0].tolist()
        assert starts == [chunk.start for chunk in chunks]
        assert got["rung"][starts].tolist() == [chunk.rung for chunk in chunks]
        assert got["scale"][starts].tolist() == pytest.approx([chunk.scale for chunk in chunks], abs=1e-6)
        for start, chunk in zip(starts, chunks, strict=True):
            assert got["held_valid"][start].tolist() == [held is not None for held in chunk.held]
            for signal, held in enumerate(chunk.held):
                if held is not None:
                    torch.testing.assert_close(got["held"][start, signal], torch.tensor(held), atol=1e-5, rtol=1e-5)
        own = weights[row][record["real"][row]]
        torch.testing.assert_close(own, torch.tensor(naive_weights).double(), atol=1e-6, rtol=0)


@given(settings_strategy(), policies, batches())
def test_chunks_tile_the_sequence_within_their_lengths(settings, policy_of, batch):
    stream = run(settings, policy_of(RUNGS), batch)
    record = stream.columns()
    for row, length in enumerate(batch[1]):
        got = row_of(record, row)
        assert got["positions"].tolist() == list(range(length))
        chunks = trace(got, length, RUNGS, [], 16)
        assert chunks[0].start == 0
        assert sum(chunk.length for chunk in chunks) == length
        for before, after in pairwise(chunks):
            assert before.start + before.length == after.start
            assert settings.chunk.min_tokens <= before.length <= settings.chunk.max_tokens
        assert 1 <= chunks[-1].length <= settings.chunk.max_tokens
        for chunk in chunks:
            part = slice(chunk.start, chunk.start + chunk.length)
            assert got["rung"][part].unique().numel() == 1, "one rung a chunk"
            assert got["scale"][part].unique().numel() == 1, "one scale a chunk"


@given(settings_strategy(), policies, batches())
def test_row_in_a_batch_decides_as_it_does_alone(settings, policy_of, batch):
    policy = policy_of(RUNGS)
    together = run(settings, policy, batch)
    for row in range(len(batch[1])):
        alone = run(settings, policy, batch, rows=slice(row, row + 1))
        assert_same_decisions(row_of(together.columns(), row), row_of(alone.columns(), 0))
        one, other = (row_of(stream.columns(), i)["complexity"] for stream, i in ((together, row), (alone, 0)))
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@given(settings_strategy(), policies, batches(), batches(most_rows=1))
def test_short_row_goes_on_as_it_would_alone(settings, policy_of, batch, more):
    """While its neighbours are still in their prompts, a row sees nothing but padding; then all go on."""
    policy, count = policy_of(RUNGS), len(batch[1])
    tokens, (length,), logits, attention, _ = more
    together = run(settings, policy, batch)
    shared = (tokens.expand(count, -1), [length] * count, logits.expand(count, -1, -1), attention.expand(count, -1))
    drive(together, *shared, settings.block_tokens)
    for row in range(count):
        alone = run(settings, policy, batch, rows=slice(row, row + 1))
        drive(alone, tokens, [length], logits, attention, settings.block_tokens)
        assert_same_decisions(row_of(together.columns(), row), row_of(alone.columns(), 0))


@given(settings_strategy(), batches(most_rows=1), st.data())
def test_the_future_changes_no_earlier_decision(settings, batch, data):
    policy = FeaturePolicy(RUNGS)
    tokens, lengths, logits, attention, prompts = batch
    change = data.draw(st.integers(0, lengths[0] - 1))
    other = [tokens.clone(), lengths, logits.clone(), attention.clone(), prompts]
    other[0][:, change:] += 10
    other[2][:, change:] = logits[:, change:].flip(-1) * 3
    other[3][:, change:] = 1 - attention[:, change:]
    before, after = (row_of(run(settings, policy, b).columns(), 0) for b in (batch, other))
    for name in before:
        assert torch.equal(before[name][:change], after[name][:change]), name
    # What a model puts out for a block is not known inside it: with the tokens as they were, the block stays as it was.
    other[0] = tokens
    end = (change // settings.block_tokens + 1) * settings.block_tokens
    after = row_of(run(settings, policy, other).columns(), 0)
    for name in before.keys() - {"complexity"}:  # which is what the model put out
        assert torch.equal(before[name][:end], after[name][:end]), name


@given(settings_strategy(), policies, batches())
def test_first_block_runs_at_the_start_rung(settings, policy_of, batch):
    record = run(settings, policy_of(RUNGS), batch, limited=False).columns()
    first = record["rung"][:, : settings.block_tokens]
    assert (first == torch.minimum(spends(batch).start_rung, offers(batch[4]).resident)[:, None]).all()
    # at the scale that the policy gives it
    scales = record["scale"][:, : settings.block_tokens]
    if policy_of is complexity_policy:
        assert torch.equal(scales, policy_of(RUNGS).scales[first])


@given(settings_strategy(), batches())
def test_signals_are_valid_once_they_exist(settings, batch):
    record = run(settings, PositionPolicy(RUNGS), batch).columns()
    for row in range(len(batch[1])):
        got = row_of(record, row)
        chunk = got["opens"].long().cumsum(0)
        assert not got["held_valid"][chunk == 1].any(), "nothing is known when the first chunk opens"
        assert got["held_valid"][chunk > 1][:, [NOVELTY, PRIOR]].all(), "tokens are known when their chunk has closed"
        outputs = got["held_valid"][:, [ENTROPY, ATTENTION]]
        assert not outputs[: settings.block_tokens].any(), "the model has put out nothing within the first block"
        # the first chunk that opens after a block holds tokens of a completed block
        late = (chunk > 1) & (torch.arange(len(chunk)) >= settings.block_tokens + settings.chunk.max_tokens)
        assert outputs[late].all()
        assert (got["held_valid"].long().diff(dim=0) >= 0).all(), "what is known stays known"
        assert ((got["held"] >= 0) & (got["held"] <= 1)).all()


@given(settings_strategy(), policies, batches())
def test_fade_ends_exactly_at_the_one_hot_times_scale(settings, policy_of, batch):
    tokens, lengths, logits, attention, prompts = batch
    stream = make_stream(settings, policy_of(RUNGS), spends(batch), prompts)
    gates = []
    for start in range(0, max(lengths), settings.block_tokens):
        part = slice(start, min(start + settings.block_tokens, max(lengths)))
        real = torch.arange(part.start, part.stop) < torch.tensor(lengths)[:, None]
        gates.append(stream.open_block(tokens[:, part], real))
        stream.close_block(logits[:, part], attention[:, part])
    weights, record = torch.cat(gates, 1), stream.columns()
    for row in range(len(lengths)):
        real = record["real"][row]
        expected = weights_of(record, settings, len(RUNGS))[row][real]
        torch.testing.assert_close(weights[row][real].double(), expected, atol=1e-6, rtol=0)
        own, age = row_of(record | {"weights": weights}, row), 0
        for t in range(lengths[row]):
            age = 1 if own["opens"][t] else age + 1
            target = torch.nn.functional.one_hot(own["rung"][t], len(RUNGS)) * own["scale"][t]
            if age >= settings.fade_tokens:
                assert torch.equal(own["weights"][t], target)
            assert (own["weights"][t] >= 0).all()
            assert own["active"][t] == own["weights"][t].nonzero().max()


@pytest.mark.parametrize("fade", FADES)
def test_weights_of_unscaled_rungs_sum_to_one(fade):
    settings = Settings(fade_tokens=fade, block_tokens=1, chunk=ChunkSettings(fade, fade + 2))
    policy = PercentilePolicy(RUNGS, "entropy", spread=4.0)
    stream = make_stream(settings, policy, Operating.at(2.0, torch.full((4,), 4)), keep=Keep.SUMS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        gates = stream.open_block(torch.randint(0, 9, (4, 1), generator=generator), torch.ones(4, 1).bool())
        torch.testing.assert_close(gates.sum(-1), torch.ones(4, 1))
        logits = torch.randn(4, 1, 9, generator=generator) * 3
        stream.close_block(logits, torch.rand(4, 1, generator=generator))


@pytest.mark.parametrize("most", [1, 2, 5])
def test_shortest_chunks_allowed(most):
    """L_min = L_max = 1 opens a chunk at every token; with L_min = 1 a change of class closes one at once."""
    chunk = ChunkSettings(1, most, weights={"entropy": 1}, smoothing=1.0, thresholds=(0.5,), hysteresis=0.0)
    settings = Settings(block_tokens=1, chunk=chunk)
    hard = [0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0]
    logits = torch.where(torch.tensor(hard).bool()[:, None], 0.0, torch.tensor([30.0, 0, 0, 0]))[None]
    stream = make_stream(settings, FixedPolicy(RUNGS), Operating.at(1.0, 4))
    drive(stream, torch.zeros(1, 13, dtype=torch.long), [13], logits, torch.zeros(1, 13), 1)
    starts = stream.columns()["opens"][0].nonzero()[:, 0].tolist()
    # the class of a token is heard at the next one
    expected, since, opened = [], 0, 0
    for t, level in enumerate([0, *hard[:-1]]):
        if t == 0 or t - since >= most or level != opened:
            expected.append(t)
            since, opened = t, level
    assert starts == expected
    if most == 1:
        assert starts == list(range(13))


def test_chunk_length_alone_decides_without_thresholds():
    settings = Settings(chunk=ChunkSettings(2, 7, thresholds=()))
    stream = make_stream(settings, FixedPolicy(RUNGS), Operating.at(1.0, 4))
    drive(stream, torch.arange(40)[None], [40], torch.randn(1, 40, 5), torch.rand(1, 40), 32)
    assert stream.columns()["opens"][0].nonzero()[:, 0].tolist() == list(range(0, 40, 7))


shares = st.floats(0, 1, width=32)


@given(shares, st.integers(0, 3), st.floats(0, 0.3), st.lists(shares, min_size=3, max_size=3).map(sorted))
def test_class_changes_only_past_the_margin(complexity, level, margin, thresholds):
    chunk = ChunkSettings(thresholds=tuple(thresholds), hysteresis=margin)
    bounds = torch.tensor(chunk.thresholds)

    def step(value, at):
        bounded = class_bounds(torch.tensor([[value]]), chunk, bounds)
        return int(levels(torch.tensor([at]), *bounded, torch.tensor([[True]])))

    after = step(complexity, level)
    assert step(complexity, after) == after, "the same complexity again changes nothing"
    assert 0 <= after <= 3
    value = torch.tensor(complexity)
    if after > level:
        assert value > bounds[after - 1] + margin
    if after < level:
        assert value <= bounds[after] - margin
    # no class in between could be kept: every threshold that was crossed was passed by the margin
    if level < 3 and value > bounds[level] + margin:
        assert after > level
    if level > 0 and value <= bounds[level - 1] - margin:
        assert after < level


def test_complexity_within_the_margin_never_flaps():
    chunk = ChunkSettings(thresholds=(0.5,), hysteresis=0.05)
    values = torch.tensor([[0.52, 0.46, 0.54, 0.56, 0.52, 0.46, 0.51, 0.44, 0.54, 0.46]])
    bounds = class_bounds(values, chunk, torch.tensor([0.5]))
    seen = levels(torch.tensor([0]), *bounds, torch.ones_like(values, dtype=torch.bool))
    assert seen.tolist() == [[0, 0, 0, 1, 1, 1, 1, 0, 0, 0]]


def test_prompt_counts_as_hard_and_the_response_less_and_less():
    settings = Settings(signals=SignalSettings(prior_decay_tokens=10), chunk=ChunkSettings(4, 4, thresholds=()))
    operating = Operating.at(0.0, torch.tensor([4, 4]))
    stream = make_stream(settings, FixedPolicy(RUNGS), operating, torch.tensor([12, 0]))
    drive(stream, torch.zeros(2, 32, dtype=torch.long), [32, 32], torch.zeros(2, 32, 4), torch.zeros(2, 32), 8)
    prior = stream.columns()["held"][:, 4::4, PRIOR, 0]
    assert (prior[0, :3] == 1).all()
    assert (prior[0, 3:].diff() < 0).all()
    assert (prior[1].diff() < 0).all()
    first = stream.columns()["first"][..., 1]
    assert (first[0, :13] == 1).all()
    assert first[1, 0] == 1, "without a prompt the response starts at the first token"
    assert first[1, 1] < 1


@given(settings_strategy(), batches(), st.data())
def test_selected_rows_go_on_independently(settings, batch, data):
    lengths = batch[1]
    stream = run(settings, PositionPolicy(RUNGS), batch)
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    copy = stream.select_rows(torch.tensor(index))
    more = torch.arange(5).repeat(len(lengths), 1)
    shape = (len(lengths), 5)
    copy.open_block(more[index], torch.ones(len(index), 5, dtype=torch.bool))
    stream.open_block(more, torch.ones(shape, dtype=torch.bool))
    for name in ("positions", "opens", "rung", "scale", "held"):
        assert torch.equal(getattr(copy.block, name), getattr(stream.block, name)[index]), name
    assert torch.equal(copy.sums.counts, stream.sums.counts[index])


@given(settings_strategy(), batches())
def test_complexity_of_every_token_is_the_weighted_mean_of_its_signals(settings, batch):
    tokens, lengths, logits, attention, prompts = batch
    stream = run(settings, PositionPolicy(RUNGS), batch)
    weights = torch.tensor([settings.chunk.weights[name] for name in SIGNALS])
    for row, length in enumerate(lengths):
        window, decay = settings.signals.novelty_window_tokens, settings.signals.prior_decay_tokens
        novelty = torch.tensor(naive_novelty(tokens[row, :length].tolist(), window))
        prior = positional_prior(torch.arange(length)[None], prompts[row, None], decay)[0]
        signals = torch.stack([next_token_entropy(logits[row, :length]), attention[row, :length], novelty, prior], -1)
        expected = (signals * weights).sum(-1) / weights.sum()
        complexity = row_of(stream.columns(), row)["complexity"]
        torch.testing.assert_close(complexity, expected, atol=1e-6, rtol=1e-5)
        assert ((complexity >= 0) & (complexity <= 1)).all()


@given(settings_strategy(), batches())
def test_a_prompt_never_runs_above_the_start_rung(settings, batch):
    record = run(settings, PositionPolicy(RUNGS), batch).columns()
    in_prompt = record["real"] & record["opens"] & (record["positions"] < batch[-1][:, None])
    start = spends(batch).start_rung[:, None].expand_as(in_prompt)
    assert (record["rung"][in_prompt] <= start[in_prompt]).all()


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

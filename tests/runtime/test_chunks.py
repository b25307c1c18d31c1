"""The state machine against the definition token by token, and every promise DESIGN sections 5 and 6 make about it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from policy import FADES, SIGNALS, ChunkSettings, FixedPolicy, Operating, PercentilePolicy, Settings, SignalSettings
from runtime.control.record import Keep, Record, trace
from runtime.control.recurrence import class_bounds, levels
from tests.runtime.drawn import (
    ATTENTION,
    BANKS,
    COST,
    DIFFICULTY,
    ENTROPY,
    NOVELTY,
    PAIR,
    PRIOR,
    RUNGS,
    SURPRISAL,
    VOCABULARY,
    assert_same_decisions,
    batches,
    complexity_policy,
    make_stream,
    naive_signals,
    offers,
    policies,
    run,
    settings_strategy,
    spends,
)
from tests.runtime.reference import (
    FeaturePolicy,
    PositionPolicy,
    drive,
    naive_chunks,
    naive_surprisal,
    row_of,
    weights_of,
)


@given(settings_strategy(), policies, batches())
def test_decisions_equal_the_definition(settings, policy_of, batch):
    policy = policy_of(RUNGS)
    record = run(settings, policy, batch).columns()
    lengths, prompts = batch[1], batch[4]
    operating = spends(batch)
    for row, length in enumerate(lengths):
        outputs, surprisals, signals = naive_signals(settings, batch, row)
        blocks = [min(settings.block_tokens, length - i) for i in range(0, length, settings.block_tokens)]
        own_spends = operating.select(torch.tensor([row]))
        chunks, naive_weights = naive_chunks(
            outputs, surprisals, signals, int(prompts[row]), blocks, settings, policy, own_spends, COST.tolist(),
            BANKS.tolist(), int(offers(prompts).resident[row]),
        )  # fmt: skip
        weights = weights_of(record, settings, len(RUNGS))

        got = row_of(record, row)
        starts = got["opens"].nonzero()[:, 0].tolist()
        assert starts == [chunk.start for chunk in chunks]
        assert got["rung"][starts].tolist() == [chunk.rung for chunk in chunks]
        assert got["scale"][starts].tolist() == pytest.approx([chunk.scale for chunk in chunks], abs=1e-6)
        assert got["age"][starts].tolist() == pytest.approx([chunk.age for chunk in chunks], abs=1e-6)
        torch.testing.assert_close(got["first"], signals, atol=1e-6, rtol=1e-6)
        for start, chunk in zip(starts, chunks, strict=True):
            assert got["held_valid"][start].tolist() == [held is not None for held in chunk.held]
            for signal, held in enumerate(chunk.held):
                if held is not None:
                    torch.testing.assert_close(got["held"][start, signal], torch.tensor(held), atol=1e-5, rtol=1e-5)
        own = weights[row][record["real"][row]]
        torch.testing.assert_close(own, torch.tensor(naive_weights).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(got["weights"].double(), own, atol=1e-6, rtol=0)


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
        tokens = got["held_valid"][chunk > 1][:, [NOVELTY, PRIOR, DIFFICULTY, PAIR]]
        assert tokens.all(), "tokens are known when their chunk has closed"
        outputs = got["held_valid"][:, [ENTROPY, ATTENTION, SURPRISAL]]
        assert not outputs[: settings.block_tokens].any(), "the model has put out nothing within the first block"
        # the first chunk that opens after a block holds tokens of a completed block
        late = (chunk > 1) & (torch.arange(len(chunk)) >= settings.block_tokens + settings.chunk.max_tokens)
        assert outputs[late].all()
        assert (got["held_valid"].long().diff(dim=0) >= 0).all(), "what is known stays known"
        # an opening at a pass's first token sees at once how surprising that is, and what was put out before it
        at_once = got["opens"] & (got["positions"] % settings.block_tokens == 0) & (got["positions"] > 0)
        assert outputs[at_once].all()
        for name in ("held", "first", "age"):
            assert ((got[name] >= 0) & (got[name] <= 1)).all(), name


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


@examples(max_examples=40)
@given(settings_strategy(), policies, batches(), st.data())
def test_selected_rows_go_on_independently(settings, policy_of, batch, data):
    """Other tokens may follow each copy of a row; it goes on as the row would alone, and what it is copied from too."""
    rows, policy = len(batch[1]), policy_of(RUNGS)
    stream = run(settings, policy, batch)
    index = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    for going_on, sources in ((stream.select_rows(torch.tensor(index)), index), (stream, range(rows))):
        shape = (len(sources), settings.block_tokens + 2)
        tokens, attention = (
            torch.randint(0, VOCABULARY, shape, generator=generator),
            torch.rand(shape, generator=generator),
        )
        logits = 3 * torch.randn(*shape, VOCABULARY, generator=generator)
        going_on.record = Record()
        drive(going_on, tokens, [shape[1]] * shape[0], logits, attention, settings.block_tokens)
        for row, source in enumerate(sources):
            alone = run(settings, policy, batch, rows=slice(source, source + 1))
            alone.record = Record()
            part = slice(row, row + 1)
            drive(alone, tokens[part], [shape[1]], logits[part], attention[part], settings.block_tokens)
            assert_same_decisions(row_of(going_on.columns(), row), row_of(alone.columns(), 0))
            assert torch.equal(going_on.sums.counts[row], alone.sums.counts[0])


@given(batches(), st.data())
def test_a_copy_of_a_row_knows_how_surprising_its_next_token_is(batch, data):
    """By what its source expected, wherever the source's last token was in its block."""
    lengths, logits = batch[1:3]
    settings = Settings(block_tokens=data.draw(st.integers(1, 12)))
    stream = run(settings, PositionPolicy(RUNGS), batch)
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5))
    copy = stream.select_rows(torch.tensor(index))
    following = torch.randint(0, VOCABULARY, (len(index), 1), generator=torch.Generator().manual_seed(lengths[0]))
    copy.open_block(following, torch.ones_like(following, dtype=torch.bool))
    for at, row in enumerate(index):
        expected = naive_surprisal(logits[row, lengths[row] - 1].tolist(), int(following[at]))
        assert copy.block.held_valid[at, 0, SURPRISAL]
        assert float(copy.block.held[at, 0, SURPRISAL, 2]) == pytest.approx(expected, abs=1e-5)


@examples(max_examples=60)
@given(settings_strategy(), policies, batches(), st.data())
def test_a_row_that_waits_for_others_decides_as_it_does_alone(settings, policy_of, batch, data):
    """Its first token may come in any block, some blocks hold none of its own, and padding says nothing."""
    tokens, lengths, logits, attention, prompts = batch
    rows, most, policy, operating = len(lengths), settings.block_tokens, policy_of(RUNGS), spends(batch)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    together = make_stream(settings, policy, operating, prompts, hidden=True)
    alone = [
        make_stream(settings, policy, operating.select(row), prompts[row], hidden=True)
        for row in torch.arange(rows)[:, None]
    ]
    first, done = [data.draw(st.integers(0, 3)) for _ in range(rows)], [0] * rows
    for block in range(12):
        counts = [
            min(data.draw(st.integers(0, most)), lengths[row] - done[row]) if block >= first[row] else 0
            for row in range(rows)
        ]
        shape = (rows, max(1, *counts))
        ids, heard = torch.randint(0, VOCABULARY, shape, generator=generator), torch.rand(shape, generator=generator)
        put_out = 4 * torch.randn(*shape, VOCABULARY, generator=generator)
        embeddings, states = torch.randn(2, *shape, 3, generator=generator)
        for row, count in enumerate(counts):
            part = slice(done[row], done[row] + count)
            for whole, own in ((ids, tokens), (put_out, logits), (heard, attention)):
                whole[row, :count] = own[row, part]
            if count:  # alone it waits for nobody
                own, own_states = embeddings[row, None, :count], states[row, None, :count]
                real = torch.ones(1, count, dtype=torch.bool)
                alone[row].open_block(tokens[row, None, part], real, full=True, embeddings=own)
                alone[row].close_block(logits[row, None, part], attention[row, None, part], own_states)
            done[row] += count
        together.open_block(ids, torch.arange(shape[1]) < torch.tensor(counts)[:, None], embeddings=embeddings)
        together.close_block(put_out, heard, states)
    for row in range(rows):
        if done[row]:
            one, other = row_of(together.columns(), row), row_of(alone[row].columns(), 0)
            assert_same_decisions(one, other)
            assert torch.equal(one["hidden"], other["hidden"])
            torch.testing.assert_close(one["complexity"], other["complexity"], atol=1e-6, rtol=1e-6)


@given(settings_strategy(), batches())
def test_complexity_of_every_token_is_the_weighted_mean_of_its_signals(settings, batch):
    """Surprisal is none of them: that of the token behind the last is not known when its page is judged."""
    stream = run(settings, PositionPolicy(RUNGS), batch)
    weights = torch.tensor([settings.chunk.weights[name] for name in SIGNALS if name != "surprisal"])
    for row in range(len(batch[1])):
        outputs, _, own = naive_signals(settings, batch, row)
        expected = (torch.cat([outputs, own], -1) * weights).sum(-1) / (weights.sum() or 1.0)
        complexity = row_of(stream.columns(), row)["complexity"]
        torch.testing.assert_close(complexity, expected, atol=1e-6, rtol=1e-5)
        assert ((complexity >= 0) & (complexity <= 1)).all()


@given(settings_strategy(), policies, batches(), st.booleans())
def test_a_prompt_runs_at_the_start_rung(settings, policy_of, batch, limited):
    """Or below it, where that is not in memory or the budget cannot pay for it."""
    record = run(settings, policy_of(RUNGS), batch, limited=limited).columns()
    in_prompt = record["real"] & record["opens"] & (record["positions"] < batch[-1][:, None])
    start = torch.minimum(spends(batch).start_rung, offers(batch[4]).resident)[:, None].expand_as(in_prompt)
    assert (record["rung"][in_prompt] <= start[in_prompt]).all()
    if not limited:
        assert torch.equal(record["rung"][in_prompt], start[in_prompt])

"""The state machine against the definition token by token, and every promise DESIGN sections 5 and 6 make about it."""

from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from policy import FADES, SIGNALS, ChunkSettings, FixedPolicy, Operating, PercentilePolicy, Settings, SignalSettings
from policy.difficulty import PAIRS, Difficulty
from policy.operating import UNLIMITED
from runtime.control.bucket import SLACK_TOKENS, Offer
from runtime.control.record import RESPONSE, Keep, Record, trace
from runtime.control.recurrence import class_bounds, levels
from runtime.control.signals import positional_prior
from runtime.control.stream import Stream
from tests.runtime.reference import (
    AgePolicy,
    FeaturePolicy,
    PositionPolicy,
    drawn_tables,
    drive,
    naive_chunks,
    naive_difficulty,
    naive_entropy,
    naive_novelty,
    naive_surprisal,
    row_of,
    weights_of,
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

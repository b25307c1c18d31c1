"""Whole texts in few passes take the decisions, and give the logits, of step-by-step decode."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy import SIGNALS, ChunkSettings, Decision, Operating, PercentilePolicy, Settings, Summary
from runtime import build_ladder, load_adapter
from runtime.control.record import Keep
from runtime.plan import RunPlan
from runtime.reference.adaptive import activate
from runtime.reference.whole import settled
from tests.runtime.reference import WavyPolicy, drawn_tables

LENGTHS, PROMPTS = (40, 23, 31), (6, 0, 9)


@pytest.fixture(scope="module")
def model(tiny_llama_factory):
    return tiny_llama_factory()


@pytest.fixture(scope="module")
def ladder(make_peft_adapter, tiny_llama_factory, tmp_path_factory):
    folder = make_peft_adapter(tiny_llama_factory, tmp_path_factory.mktemp("whole") / "adapter", alpha=48)
    return replace(build_ladder(load_adapter(folder), [1, 2, 4, 6]), difficulty=drawn_tables(5))


@pytest.fixture(scope="module")
def batch():
    tokens = torch.randint(3, 256, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.where(real, tokens, 0), real, torch.tensor(PROMPTS)


def plan_of(policy, ladder, chunk: ChunkSettings, fade: int = 1, **operating) -> RunPlan:
    settings = Settings(block_tokens=1, fade_tokens=fade, chunk=chunk)
    low, high = policy.knob_range()
    knob = torch.tensor([low + (high - low) * share for share in (0.3, 0.5, 0.6)])
    return RunPlan((ladder,), policy, settings, Operating.at(knob, torch.tensor([2, 1, 3]), **operating))


def both(model, plan, batch):
    tokens, real, prompts = batch
    with activate(model, plan, keep=Keep.DECISIONS) as run:
        cache = run.new_cache(len(tokens), prompt_tokens=prompts)
        logits = run.logits(tokens, real, cache)
        found = settled(run, tokens, real, prompts)
    return logits, cache.stream, found


@pytest.mark.parametrize(
    "chunk", [ChunkSettings(), ChunkSettings(1, 4), ChunkSettings(4, 16), ChunkSettings(16, 16)], ids=str
)
@pytest.mark.parametrize("kind", ["wavy", "percentile"])
def test_whole_texts_take_the_decisions_of_stepping(model, ladder, batch, kind, chunk):
    policy = WavyPolicy(ladder.rungs, 3)
    if kind == "percentile":
        policy = PercentilePolicy(ladder.rungs, "surprisal", torch.linspace(0.4, 0.9, 101), spread=2.0)
    logits, stream, found = both(model, plan_of(policy, ladder, chunk), batch)
    real = batch[1]
    stepped, whole = stream.columns(), found.stream.columns()
    assert len(stepped["rung"][real].unique()) > 2, "a run that never moves shows nothing"
    for name in ("opens", "rung", "held_valid"):
        assert torch.equal(stepped[name][real], whole[name][real]), name
    for name in ("held", "first", "age", "scale", "complexity"):
        torch.testing.assert_close(stepped[name][real], whole[name][real], atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(found.logits[real], logits[real], atol=1e-4, rtol=1e-4)
    assert torch.equal(found.stream.sums.counts, stream.sums.counts)


class SeeingPolicy(WavyPolicy):
    """Its rung swings with the model's states too."""

    wants_hidden = True

    def decide(self, summary: Summary, knob: torch.Tensor) -> Decision:
        assert summary.hidden is not None
        assert summary.hidden.shape[1] == 2 * 64
        direction = torch.linspace(-1, 1, 2 * 64)
        return super().decide(replace(summary, hidden=None), knob + 3 * summary.hidden @ direction)


@pytest.mark.parametrize("block", [1, 5])
def test_what_looks_at_states_sees_that_of_the_latest_completed_token(model, ladder, batch, block):
    plan = plan_of(SeeingPolicy(ladder.rungs, 3), ladder, ChunkSettings())
    tokens, real, prompts = batch
    blocks = replace(plan, settings=replace(plan.settings, block_tokens=block))
    with activate(model, blocks, keep=Keep.DECISIONS) as run:
        cache = run.new_cache(3, prompt_tokens=prompts)
        run.logits(tokens, real, cache)
        stream = cache.stream
        # The same rungs once more, in one pass: what every token's state was.
        run.gated(tokens, real, stream.columns()["weights"])
        states = run.states
    embeddings = model.get_input_embeddings()(tokens)
    seen = stream.columns()["hidden"]
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            latest = t // block * block - 1
            before = states[row, latest] if latest >= 0 else torch.zeros(64)
            torch.testing.assert_close(seen[row, t, :64], before, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(seen[row, t, 64:], embeddings[row, t])


def test_states_are_those_of_stepping(model, ladder, batch):
    logits, stream, found = both(model, plan_of(SeeingPolicy(ladder.rungs, 3), ladder, ChunkSettings()), batch)
    real = batch[1]
    assert torch.equal(stream.columns()["rung"][real], found.stream.columns()["rung"][real])
    hidden = (own.columns()["hidden"][real] for own in (stream, found.stream))
    torch.testing.assert_close(*hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.logits[real], logits[real], atol=1e-4, rtol=1e-4)


def test_fades_and_budgets_are_those_of_stepping(model, ladder, batch):
    policy = WavyPolicy(ladder.rungs, 4)
    plan = plan_of(policy, ladder, ChunkSettings(4, 8), fade=4, budget=torch.tensor([0.3, 0.6, 0.4]))
    logits, stream, found = both(model, plan, batch)
    real = batch[1]
    for name in ("opens", "rung", "active"):
        assert torch.equal(stream.columns()[name][real], found.stream.columns()[name][real]), name
    torch.testing.assert_close(found.logits[real], logits[real], atol=1e-4, rtol=1e-4)


def test_where_it_starts_changes_nothing_but_the_passes(model, ladder, batch):
    plan = plan_of(WavyPolicy(ladder.rungs, 3), ladder, ChunkSettings())
    tokens, real, prompts = batch
    with activate(model, plan, keep=Keep.DECISIONS) as run:
        first = settled(run, tokens, real, prompts)
        again = settled(run, tokens, real, prompts, outputs=first.outputs)
        odd = settled(run, tokens, real, prompts, outputs=torch.rand_like(first.outputs))
    assert again.passes == 1 < first.passes
    for other in (again, odd):
        assert torch.equal(other.weights[real], first.weights[real])


@given(seed=st.integers(0, 1000), block=st.sampled_from([2, 5, 32]), cut=st.integers(1, 38))
def test_no_decision_looks_ahead(model, ladder, batch, seed, block, cut):
    """What comes behind a token changes nothing at it, in blocks of any size and whole."""
    tokens, real, prompts = batch
    other = tokens.clone()
    other[:, cut:] = torch.randint(3, 256, other[:, cut:].shape, generator=torch.Generator().manual_seed(seed))
    plan = plan_of(WavyPolicy(ladder.rungs, seed), ladder, ChunkSettings())
    blocks = replace(plan, settings=replace(plan.settings, block_tokens=block))
    found = []
    with activate(model, plan, keep=Keep.DECISIONS) as run:
        found.append([settled(run, text, real, prompts).stream.columns() for text in (tokens, other)])
    with activate(model, blocks, keep=Keep.DECISIONS) as run:
        caches = [run.new_cache(3, prompt_tokens=prompts) for _ in range(2)]
        for text, cache in zip((tokens, other), caches, strict=True):
            run.logits(text, real, cache)
        found.append([cache.stream.columns() for cache in caches])
    until = real & (torch.arange(real.shape[1]) < cut)
    for one, two in found:
        assert torch.equal(one["rung"][until], two["rung"][until])
        for s, name in enumerate(SIGNALS):
            torch.testing.assert_close(one["held"][until][:, s], two["held"][until][:, s], msg=name)

"""Damage inside a policy's own run is what one token at another rung loses there, to the last digit that there is."""

import math
from dataclasses import replace

import pytest
import torch

from policy import LearnedPolicy, Operating, Settings
from policy.difficulty import PAIRS, Difficulty
from runtime import build_ladder, load_adapter
from runtime.control.record import Keep
from runtime.plan import RunPlan, static_plan
from runtime.reference.adaptive import activate
from training.documents import make_batch
from training.targets.context import REACH, context_damage, drawn_rungs, measured_paths, streams
from training.targets.damage import trajectories

EXACT = {"atol": 2e-6, "rtol": 1e-4}
"""Both put the same float32 products together, in another order."""


@pytest.fixture(scope="module")
def tiny_mistral_factory():
    """As `tiny_llama`, and no token sees further back than seven."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=7, initializer_range=0.1,
    )  # fmt: skip

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MistralForCausalLM(config).eval()

    return make


@pytest.fixture(scope="module")
def served(request, tmp_path_factory, make_peft_adapter, tiny_llama_factory, tiny_gpt2_factory, tiny_mistral_factory):
    """`served(name)`: a model and a ladder of it; `mixed` is the llama with rungs in few bits."""
    found = {}

    def get(name: str):
        if name == "mixed":
            return tiny_llama_factory(), request.getfixturevalue("mixed_ladder")
        if name not in found:
            make = {"llama": tiny_llama_factory, "gpt2": tiny_gpt2_factory, "mistral": tiny_mistral_factory}[name]
            folder = make_peft_adapter(make, tmp_path_factory.mktemp("context") / name, alpha=48)
            found[name] = make(), build_ladder(load_adapter(folder), [1, 2, 3, 4, 5, 6, 7])
        return found[name]

    return get


@pytest.fixture
def batch(make_example):
    return make_batch([make_example(24, 5, seed=1), make_example(15, 0, seed=2), make_example(19, 19, seed=3)])


def mixed_weights(shape, scales, generator) -> torch.Tensor:
    """[B, T, J] of runs that change their rung at every token."""
    rungs = torch.randint(0, len(scales), shape, generator=generator)
    return torch.nn.functional.one_hot(rungs, len(scales)) * scales[rungs][..., None]


def kl(full_logits, logits):
    """KL(full || other) in float64 from its definition."""
    log_p, log_q = (x.double().log_softmax(-1) for x in (full_logits, logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def naive_damage(run, tokens, weights, rungs, scales):
    """[T, J, G] of one text: for each token a run of its own, up to it at the path's weights and there at the rung."""
    length, count = weights.shape
    found = torch.full((length, count, scales.shape[1]), torch.nan, dtype=torch.float64)
    top = torch.eye(count)[-1].expand(1, 1, -1)
    for t in range(length):
        text = tokens[None, : t + 1]
        real = torch.ones_like(text, dtype=torch.bool)
        exact = run.gated(text, real, top)[0, -1]
        for rung in rungs[:, t].tolist():
            for g, scale in enumerate(scales[rung].tolist()):
                own = weights[None, : t + 1].clone()
                own[0, t] = scale * torch.eye(count)[rung]
                found[t, rung, g] = kl(exact, run.gated(text, real, own)[0, -1])
        found[t, -1] = 0.0
    return found


@pytest.mark.parametrize("name", ["llama", "mixed", "gpt2", "mistral"])
def test_context_damage_is_that_of_one_token_at_the_rung_behind_the_mixed_run(served, batch, name):
    model, ladder = served(name)
    generator, count = torch.Generator().manual_seed(3), len(ladder.rungs)
    scales = 0.8 + 0.4 * torch.rand(count, 2, generator=generator)
    scales[-1] = 1.0
    weights = mixed_weights(batch.tokens.shape, scales[:, 0], generator)
    rungs = drawn_rungs(torch.randint(0, count, batch.tokens.shape, generator=generator), 2, count, generator)
    with activate(model, static_plan(ladder, ladder.rungs[-1])) as run:
        found = context_damage(run, batch, weights, rungs, scales)
        assert found.shape == (*batch.tokens.shape, count, 2)
        assert found.dtype == torch.float32
        for row, length in enumerate(batch.real.sum(1).tolist()):
            own = batch.tokens[row, :length], weights[row, :length], rungs[row, :, :length]
            expected = naive_damage(run, *own, scales)
            torch.testing.assert_close(found[row, :length].double(), expected, **EXACT, equal_nan=True)
            measured = expected[:, :-1]
            assert measured.nanmean() > 1e-3, "the rungs must differ for this to say anything"
            assert (measured.isfinite().sum(1) == rungs.shape[1]).all(), "those that were drawn and no others"
            assert not found[row, :length, -1].any()


def test_the_past_is_the_mixed_runs_and_not_the_probes_own(served, batch):
    """A uniform run at the rung, of which tables are made, has another past: the two tell the same at the first token
    alone."""
    model, ladder = served("llama")
    scales, count = torch.ones(len(ladder.rungs), 1), len(ladder.rungs)
    weights = torch.nn.functional.one_hot(torch.full(batch.tokens.shape, 2), count).float()
    rungs = torch.zeros(len(batch.tokens), 1, batch.tokens.shape[1], dtype=torch.long)
    with activate(model, static_plan(ladder, ladder.rungs[-1])) as run:
        found = context_damage(run, batch, weights, rungs, scales)[..., 0, 0]
        at_own = context_damage(run, batch, weights, rungs + 2, scales)[..., 2, 0]
        exact, low, own = (
            run.gated(batch.tokens, batch.real, torch.eye(count)[rung].expand(3, 1, -1)) for rung in (count - 1, 0, 2)
        )
    uniform = kl(exact, low).float()
    torch.testing.assert_close(found[:, 0], uniform[:, 0], **EXACT)
    apart = (found - uniform).abs()[:, 1:][batch.real[:, 1:]]
    assert (apart > 1e-3).float().mean() > 0.9
    # and a probe at the rung of the run itself is that run
    torch.testing.assert_close(at_own[batch.real], kl(exact, own).float()[batch.real], **EXACT)


def test_a_probe_sees_the_first_streams_past_and_itself_and_is_seen_by_nobody():
    """What is ahead in the first stream is the model's own rule to hide."""
    length, probes = 5, 3
    found = streams(length, probes, torch.device("cpu"))
    slots = [(stream, t) for stream in range(1 + probes) for t in range(length)]
    assert found.slots.tolist() == [t for _, t in slots]
    for query, (stream, t) in enumerate(slots):
        for key, (other, s) in enumerate(slots):
            itself, of_first = (other, s) == (stream, t), other == 0 and (stream == 0 or s < t)
            assert bool(found.sees[query, key]) == (itself or of_first)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@torch.no_grad()
def test_a_probe_reaches_no_other_token_of_any_stream(served, batch, name):
    """Another rung at one token of one probe moves that token's logits and nothing else."""
    model, ladder = served(name)
    length, probes, count = batch.tokens.shape[1], 3, len(ladder.rungs)
    generator = torch.Generator().manual_seed(0)
    weights = mixed_weights((3, (1 + probes) * length), torch.ones(count), generator)
    tokens, real = batch.tokens.repeat(1, 1 + probes), batch.real.repeat(1, 1 + probes)
    # the rungs active in a pass stay the same ones
    assert ((weights[:, : 2 * length] > 0) & real[:, : 2 * length, None]).flatten(0, 1).any(0).all()
    side_by_side = streams(length, probes, tokens.device)
    with activate(model, static_plan(ladder, ladder.rungs[-1])) as run:
        before = run.gated(tokens, real, weights, streams=side_by_side)
        for stream, t in ((2, 0), (2, 9), (3, 14)):
            slot, other = stream * length + t, weights.clone()
            other[:, slot] = weights[:, slot].roll(1, -1)
            moved = (run.gated(tokens, real, other, streams=side_by_side) != before).any(-1)
            expected = torch.zeros_like(moved)
            expected[:, slot] = real[:, slot]
            assert torch.equal(moved & real, expected)


@torch.no_grad()
def test_the_first_stream_is_the_mixed_run_itself(served, batch):
    model, ladder = served("llama")
    length, count = batch.tokens.shape[1], len(ladder.rungs)
    weights = mixed_weights((3, 3 * length), torch.ones(count), torch.Generator().manual_seed(0))
    tokens, real = batch.tokens.repeat(1, 3), batch.real.repeat(1, 3)
    with activate(model, static_plan(ladder, ladder.rungs[-1])) as run:
        found = run.gated(tokens, real, weights, streams=streams(length, 2, tokens.device))[:, :length]
        alone = run.gated(batch.tokens, batch.real, weights[:, :length])
    torch.testing.assert_close(found[batch.real], alone[batch.real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [2, 3, 5, 6, 9, 12])
@pytest.mark.parametrize("probes", [1, 3, 5, 8])
def test_drawn_rungs_are_different_ones_below_the_top_and_nearest_the_chosen(count, probes):
    chosen = torch.arange(count).repeat(200)[None].repeat(2, 1)
    found = drawn_rungs(chosen, probes, count, torch.Generator().manual_seed(0))
    among = min(2 * REACH + 1, count - 1)
    assert found.shape == (2, min(probes, among), chosen.shape[1])
    assert (found.sort(1).values.diff(dim=1) > 0).all(), "each once"
    for own in range(count):
        nearest = sorted(range(count - 1), key=lambda rung: abs(rung - own))[:among]
        drawn = found.movedim(1, 0)[:, chosen == own]
        share = torch.bincount(drawn.flatten(), minlength=count) / drawn.shape[1]
        assert {int(rung) for rung in drawn.flatten()} == set(nearest)
        # each of them as often as the others: 400 draws, four standard deviations
        expected, spread = found.shape[1] / among, 4 * math.sqrt(0.25 / 400)
        assert all(abs(share[rung] - expected) <= spread for rung in nearest)


def test_what_is_drawn_depends_on_the_generator_alone():
    chosen = torch.randint(0, 9, (3, 40), generator=torch.Generator().manual_seed(0))

    def draw(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        return drawn_rungs(chosen, 3, 9, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(5, 0), draw(5, 1))
    assert not torch.equal(draw(5, 0), draw(6, 0))


@pytest.fixture
def own_plan(tiny_llama, served):
    """A policy that moves between rungs from token to token, by what it sees."""
    _, ladder = served("llama")
    torch.manual_seed(0)
    policy = LearnedPolicy(ladder.rungs, hidden=8, scale_range=0.2, log_lambda_range=(-6.0, 1.0))
    for parameter in policy.damage_head.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    policy.set_scales(torch.tensor([1.1, 1.08, 1.05, 1.0, 0.95, 1.02, 1.01, 1.0]))
    knob = torch.tensor([-2.5, -2.0, -3.0])
    return RunPlan((ladder,), policy, Settings(), Operating.at(knob, torch.tensor([1, 4, 0])))


@pytest.mark.parametrize("block", [1, 8])
def test_own_trajectories_carry_the_damage_inside_of_themselves(tiny_llama, own_plan, batch, block):
    """At the rungs drawn for them near those that they ran at; whatever fits into memory at a time."""
    plan = replace(own_plan, settings=Settings(block_tokens=block))
    count, scales = len(plan.ladder.rungs), torch.tensor([0.9, 1.1]).expand(8, -1)
    generator = torch.Generator().manual_seed(1)
    tables = Difficulty(*(torch.randint(0, 255, (3, n), generator=generator, dtype=torch.uint8) for n in (256, PAIRS)))
    with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run:
        found = measured_paths(run, batch, plan.operating, scales, 2, torch.Generator().manual_seed(7), tables)
        plain = trajectories(run, batch, plan.operating, tables)
        cache = run.new_cache(3, prompt_tokens=batch.prompt_tokens, difficulty=tables)
        run.logits(batch.tokens, batch.real, cache)
        record = cache.stream.columns()
        rungs = drawn_rungs(record["rung"], 2, count, torch.Generator().manual_seed(7))
        expected = context_damage(run, batch, record["weights"], rungs, scales)
    assert len(record["rung"][batch.real].unique()) > 2, "a run that never moves shows nothing"
    for row, length in enumerate(batch.real.sum(1).tolist()):
        for name in ("starts", "features", "complexity", "log_lambda"):
            assert torch.equal(*(torch.as_tensor(getattr(own[row], name)) for own in (found, plain))), name
        assert found[row].damage.shape == (length, count, 2)
        torch.testing.assert_close(found[row].damage, expected[row, :length], **EXACT, equal_nan=True)


@pytest.mark.parametrize("room", [1, 24 * 5, 2 * 24 * 5])
def test_damage_in_slices_is_the_same_damage(tiny_llama, own_plan, batch, monkeypatch, room):
    """Logits of at most so many positions at a time, or of one row, at the same draws."""
    scales = torch.tensor([0.9, 1.1]).expand(8, -1)
    found = []
    with activate(tiny_llama, own_plan, keep=Keep.DECISIONS) as run:
        seen, gated = [], run.gated

        def noted(tokens, *args, **kwargs):
            if kwargs.get("streams") is not None:
                seen.append(tuple(tokens.shape))
            return gated(tokens, *args, **kwargs)

        monkeypatch.setattr(run, "gated", noted)
        for size in (2**29, room * 256 * 4):
            monkeypatch.setattr("training.targets.context.LOGITS_BYTES", size)
            generator = torch.Generator().manual_seed(7)
            found.append(measured_paths(run, batch, own_plan.operating, scales, 2, generator))
    rows = max(1, room // (24 * 5))
    whole, *parts = seen
    assert whole == (3, 24 * 5), "a text and two probes at two scales each"
    assert [own[0] for own in parts] == [rows] * (3 // rows) + [3 % rows] * (3 % rows > 0)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.damage, other.damage, **EXACT, equal_nan=True)

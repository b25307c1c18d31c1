"""Targets are what PEFT itself says: KL of every rung, alone and through the cache, and the chunks of real runs."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from policy import (
    SIGNALS,
    STATS,
    TOKEN_SIGNALS,
    ChunkSettings,
    LearnedPolicy,
    Operating,
    PercentilePolicy,
    Settings,
    Summary,
)
from policy.difficulty import PAIRS, Difficulty
from runtime.control.record import Keep
from runtime.export import export_rung
from runtime.plan import RunPlan, static_plan
from runtime.reference.adaptive import activate
from training.documents import make_batch
from training.targets.damage import Exact, damage_table, decided, later_damage, token_kl, trajectories
from training.targets.samples import (
    LaterDamage,
    document_samples,
)

GRID = (1.0, 1.2)
NATS = {"atol": 2e-5, "rtol": 1e-3}
"""Logits of the two agree within 1e-4 (see tests/runtime/test_export.py). KL d moves by sqrt(2 d) times that."""


@pytest.fixture(scope="module")
def peft_model(ladder, tiny_llama_factory, tmp_path_factory):
    """`peft_model(rung index, scale)`: `tiny_llama` with PEFT's own copy of that rung."""
    from peft import PeftModel

    folder = tmp_path_factory.mktemp("rungs")

    def load(rung: int, scale: float = 1.0):
        path = folder / f"{rung}-{scale}"
        if not path.exists():
            export_rung(ladder, ladder.rungs[rung], path, scale=scale)
        return PeftModel.from_pretrained(tiny_llama_factory(), path).eval()

    return load


def kl(full_logits, logits):
    """KL(full || other) in float64 from its definition: [..., V] twice -> [...]."""
    p, q = (x.double().softmax(-1) for x in (full_logits, logits))
    return (p * (p.log() - q.log())).sum(-1)


@torch.no_grad()
def logits_of(model, ids, **kwargs):
    return model(torch.tensor([ids]), **kwargs).logits[0]


def test_token_kl_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    full, other = torch.randn(2, 5, 30, generator=generator)
    torch.testing.assert_close(
        token_kl(Exact.of(full), other.log_softmax(-1)).double(), kl(full, other), atol=1e-6, rtol=1e-5
    )
    assert (token_kl(Exact.of(full), full.log_softmax(-1)) >= 0).all()
    # and where there is next to none: KL falls with the square of what the logits are off by
    close = full + 1e-3 * other
    expected = kl(full.double(), close.double())
    assert expected.max() < 1e-5
    # float32 knows a log-probability of 4 nats to 2.4e-7
    found = token_kl(Exact.of(full), close.log_softmax(-1)).double()
    torch.testing.assert_close(found, expected, atol=2.4e-7, rtol=0)


def test_the_damage_table_equals_what_pefts_adapters_give(full_rank_run, ladder, make_example, peft_model):
    examples = [make_example(23, 5, seed=1), make_example(40, 0, seed=2)]
    scales = torch.tensor(GRID).expand(len(ladder.rungs), -1)
    tables = damage_table(full_rank_run, examples, scales)
    top = len(ladder.rungs) - 1
    for example, table in zip(examples, tables, strict=True):
        ids = example["input_ids"]
        assert table.shape == (len(ids), len(ladder.rungs), len(GRID))
        full = logits_of(peft_model(top), ids)
        for rung in range(top):
            for g, scale in enumerate(GRID):
                expected = kl(full, logits_of(peft_model(rung, scale), ids))
                assert expected.mean() > 0.01, "the rungs must differ for this to say anything"
                torch.testing.assert_close(table[:, rung, g].double(), expected, **NATS)
        assert not table[:, top].any()


def test_scales_may_differ_by_rung(full_rank_run, ladder, make_example):
    example = [make_example(20, seed=3)]
    scales = torch.tensor([[1.2], [1.1], [1.0], [1.0]])
    (one,) = damage_table(full_rank_run, example, scales)
    (all_of_them,) = damage_table(full_rank_run, example, torch.tensor([1.0, 1.1, 1.2]).expand(4, -1))
    for rung, column in enumerate((2, 1, 0, 0)):
        torch.testing.assert_close(one[:, rung, 0], all_of_them[:, rung, column], atol=1e-5, rtol=1e-4)


@pytest.fixture
def passes(full_rank_run, monkeypatch):
    """(rows, columns, active rungs) of every pass that targets take."""
    seen, gated = [], full_rank_run.gated

    def noted(tokens, real, weights):
        seen.append((*tokens.shape, (weights > 0).flatten(0, 1).any(0).nonzero()[:, 0].tolist()))
        return gated(tokens, real, weights)

    monkeypatch.setattr(full_rank_run, "gated", noted)
    return seen


@pytest.mark.parametrize("room", [1, 20, 40, 43, 80, 160, 1000])
def test_a_table_in_slices_is_the_same_table(full_rank_run, ladder, make_example, monkeypatch, passes, room):
    """Logits of at most so many positions at a time, or of one row; documents share a pass where there is room."""
    examples = [make_example(length, seed=length) for length in (20, 43, 19, 20)]
    scales = torch.tensor((0.9, *GRID)).expand(len(ladder.rungs), -1)
    whole = [damage_table(full_rank_run, [example], scales)[0] for example in examples]
    passes.clear()
    monkeypatch.setattr("training.targets.damage.LOGITS_BYTES", room * 256 * 4)
    sliced = damage_table(full_rank_run, examples, scales)
    assert all(rows * columns <= room for rows, columns, _ in passes if rows > 1)
    assert sum(rows for rows, _, _ in passes) == len(examples) * (1 + 3 * len(scales[0])), "the reference once"
    assert all(len(active) == 1 for *_, active in passes), "one rung at a time"
    shared = max(rows for rows, _, active in passes if active == [len(ladder.rungs) - 1])
    assert shared == {1000: 3, 160: 2}.get(room, 1), "of three that are alike"
    for one, other in zip(sliced, whole, strict=True):
        torch.testing.assert_close(one, other, **NATS)


def test_a_table_of_a_ladder_in_few_bits_is_that_of_its_rungs(tiny_llama, mixed_ladder, make_example):
    examples = [make_example(23, 5, seed=1), make_example(20, 0, seed=2)]
    scales = torch.tensor(GRID).expand(len(mixed_ladder.rungs), -1)
    with activate(tiny_llama, static_plan(mixed_ladder, 8)) as run:
        tables = damage_table(run, examples, scales)
    for example, table in zip(examples, tables, strict=True):
        found = []
        for rung in mixed_ladder.rungs:
            with activate(tiny_llama, static_plan(mixed_ladder, rung)):
                found.append(logits_of(tiny_llama, example["input_ids"]))
        expected = torch.stack([kl(found[-1], own) for own in found], 1)
        torch.testing.assert_close(table[..., 0].double(), expected, **NATS)
        assert (expected[:, :-1].mean(0) > 1e-5).all(), "every rung loses something"
        assert (table[:, :-1, 1] != table[:, :-1, 0]).any()


def mixed_kl(peft_model, rung, top, ids, start, end):
    """KL at every token when `rung` handles [start, end) and the full rank the rest: three PEFT models, one cache."""
    full, cut = peft_model(top), peft_model(rung)
    cache, parts = DynamicCache(), []
    for model, part in ((full, ids[:start]), (cut, ids[start:end]), (full, ids[end:])):
        if part:
            parts.append(logits_of(model, part, past_key_values=cache, use_cache=True))
    return kl(logits_of(full, ids), torch.cat(parts))


@pytest.mark.parametrize(("start", "end"), [(0, 6), (10, 17), (24, 40)])
def test_later_damage_is_what_reaches_later_tokens_through_the_cache(
    full_rank_run, ladder, make_example, peft_model, start, end
):
    example, horizon, top = make_example(40, 4, seed=5), 12, len(ladder.rungs) - 1
    immediate, later = later_damage(full_rank_run, example, start, end, horizon)
    assert immediate[top] == later[top] == 0
    for rung in range(top):
        expected = mixed_kl(peft_model, rung, top, example["input_ids"], start, end)
        torch.testing.assert_close(immediate[rung].double(), expected[start:end].sum(), **NATS)
        torch.testing.assert_close(later[rung].double(), expected[end : end + horizon].sum(), **NATS)
    assert (later[0] > 0) == (end < 40)


def test_immediate_damage_of_a_whole_document_is_its_damage_table(full_rank_run, ladder, make_example):
    example = make_example(25, seed=6)
    (table,) = damage_table(full_rank_run, [example], torch.ones(len(ladder.rungs), 1))
    immediate, later = later_damage(full_rank_run, example, 0, 25, 64)
    torch.testing.assert_close(immediate, table[..., 0].sum(0), atol=1e-4, rtol=1e-4)
    assert not later.any()


@pytest.fixture(
    params=[(8, 2, 7), (8, 1, 1), (1, 2, 7), (1, 1, 1)], ids="blocks of {0[0]}, chunks of {0[1]} to {0[2]}".format
)
def moving_plan(ladder, request):
    """A policy that really moves between rungs: in blocks, whose decisions wait for them, and as decode takes them."""
    block, least, most = request.param
    settings = Settings(block_tokens=block, chunk=ChunkSettings(min_tokens=least, max_tokens=most))
    return RunPlan((ladder,), PercentilePolicy(ladder.rungs, "prior", spread=3.0), settings, Operating.at(0.5, 3))


def test_trajectories_are_the_chunks_of_every_document_run_alone(tiny_llama, moving_plan, make_example):
    examples = [make_example(n, p, seed=n) for n, p in ((30, 0), (41, 9), (17, 3))]
    with activate(tiny_llama, moving_plan, keep=Keep.DECISIONS) as run:
        found, ranks = trajectories(run, make_batch(examples), moving_plan.operating), set()
        for example, path in zip(examples, found, strict=True):
            length = len(example["input_ids"])
            cache = run.new_cache(1, prompt_tokens=torch.tensor([example["prompt_tokens"]]))
            run.forward(torch.tensor([example["input_ids"]]), past_key_values=cache)
            chunks, columns = run.trace(0, length), cache.stream.columns()
            ranks |= {chunk.rung for chunk in chunks}
            assert path.starts.tolist() == [chunk.start for chunk in chunks]
            assert path.complexity.shape == (length,)
            torch.testing.assert_close(path.complexity, columns["complexity"][0], atol=1e-5, rtol=0)
            assert path.damage is None
            assert path.features.shape == (len(chunks), Summary.FEATURES)
            for features, chunk in zip(path.features, chunks, strict=True):
                for s, signal in enumerate(SIGNALS):
                    known = chunk.signals[signal]
                    assert bool(features[len(SIGNALS) * len(STATS) + s]) == (known is not None)
                    expected = [0.0] * 3 if known is None else [known[stat] for stat in STATS]
                    torch.testing.assert_close(features[3 * s : 3 * s + 3], torch.tensor(expected), atol=1e-5, rtol=0)
                own, age = features[len(SIGNALS) * (len(STATS) + 1) :].split([len(TOKEN_SIGNALS), 1])
                torch.testing.assert_close(own, columns["first"][0, chunk.start], atol=1e-5, rtol=0)
                since = chunk.start % moving_plan.settings.block_tokens
                assert age.item() == pytest.approx(1 - 1 / (1 + since))
    assert len(ranks) > 1


@pytest.mark.parametrize("block", [1, 8])
def test_trajectories_see_the_difficulty_of_their_own_row(tiny_llama, ladder, make_example, block):
    """Tables by row, whatever the ladder has; without, the ladder's."""
    generator = torch.Generator().manual_seed(0)

    def some(*rows: int) -> Difficulty:
        sizes = ((*rows, 256), (*rows, PAIRS))
        return Difficulty(*(torch.randint(0, 255, own, generator=generator, dtype=torch.uint8) for own in sizes))

    own = replace(ladder, difficulty=some())
    plan = RunPlan((own,), PercentilePolicy(own.rungs, "prior"), Settings(block_tokens=block), Operating.at(1.5, 3))
    examples = [make_example(20, 3, seed=9), make_example(12, 0, seed=10)]
    tables = some(2)
    with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run:
        given = trajectories(run, make_batch(examples), plan.operating, tables)
        left_out = trajectories(run, make_batch(examples), plan.operating)
    first = slice(len(SIGNALS) * (len(STATS) + 1) + TOKEN_SIGNALS.index("difficulty"), -1)
    for row, example in enumerate(examples):
        ids = torch.tensor([example["input_ids"]])
        before = torch.cat([torch.tensor([[-1]]), ids[:, :-1]], 1)
        for path, seen in (
            (given[row], tables.select(torch.tensor([row]))),
            (left_out[row], Difficulty.stack([own.difficulty])),
        ):
            torch.testing.assert_close(path.features[:, first], seen.values(before, ids)[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_trajectories_tell_of_the_models_states_where_they_are_asked_for(tiny_llama, moving_plan, make_example):
    """The last one before the head at the latest completed token, zeros before the first, and the token's embedding."""
    examples = [make_example(n, p, seed=n) for n, p in ((20, 0), (13, 4))]
    batch, block = make_batch(examples), moving_plan.settings.block_tokens
    with activate(tiny_llama, moving_plan, keep=Keep.DECISIONS, hidden=True) as run:
        found = trajectories(run, batch, moving_plan.operating)
        weights, heard = decided(run, batch, moving_plan.operating).weights, []
        hook = tiny_llama.lm_head.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        run.gated(batch.tokens, batch.real, weights)
        hook.remove()
    with activate(tiny_llama, moving_plan, keep=Keep.DECISIONS) as run:
        plain = trajectories(run, batch, moving_plan.operating)
    for row, (path, without) in enumerate(zip(found, plain, strict=True)):
        assert torch.equal(path.starts, without.starts)
        known, states = path.features.split([Summary.FEATURES, 2 * 64], 1)
        assert torch.equal(known, without.features)
        for start, own in zip(path.starts.tolist(), states, strict=True):
            latest = start - start % block - 1
            state = heard[0][row, latest] if latest >= 0 else torch.zeros(64)
            embedding = tiny_llama.model.embed_tokens(batch.tokens[row, start])
            torch.testing.assert_close(own, torch.cat([state, embedding]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block", [1, 8])
def test_a_trajectory_knows_the_lambda_it_ran_at_where_its_policy_is_learned(tiny_llama, ladder, make_example, block):
    examples = [make_example(12, seed=n) for n in range(2)]
    settings, knob = Settings(block_tokens=block), torch.tensor([-2.0, 0.5])
    for policy, expected in (
        (LearnedPolicy(ladder.rungs, hidden=4), knob),
        (PercentilePolicy(ladder.rungs, "prior"), torch.full((2,), torch.nan)),
    ):
        plan = RunPlan((ladder,), policy, settings, Operating.at(knob, 3))
        with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run:
            paths = trajectories(run, make_batch(examples), plan.operating)
        found = torch.tensor([path.log_lambda for path in paths])
        torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)
        parts = document_samples(examples, paths, [torch.ones(12, 4, 1)] * 2, LaterDamage((0.0,) * 4, 0, 0))
        for part, own in zip(parts, expected, strict=True):
            torch.testing.assert_close(part.log_lambda, own.expand(len(part)), atol=0, rtol=0, equal_nan=True)


def test_trajectories_take_a_knob_per_row(tiny_llama, moving_plan, make_example):
    """Where the rung moves entropy, the path of a row depends on its own knob and on no other row's."""
    examples = [make_example(40, seed=8)] * 2
    with activate(tiny_llama, moving_plan, keep=Keep.DECISIONS) as run:
        cheap, dear = trajectories(run, make_batch(examples), Operating.at(torch.tensor([-3.0, 6.0]), 3))
        alone = [trajectories(run, make_batch(examples[:1]), Operating.at(knob, 3))[0] for knob in (-3.0, 6.0)]
    for together, single in zip((cheap, dear), alone, strict=True):
        torch.testing.assert_close(together.features, single.features, atol=1e-5, rtol=0)
    assert not torch.allclose(cheap.complexity, dear.complexity, atol=1e-4)

"""No more of an adapter in memory than its rungs up to the resident one read: what is served then, what is refused."""

import dataclasses
import warnings

import pytest
import torch

from policy import (
    FULL_KV,
    ChunkSettings,
    Fingerprints,
    FixedPolicy,
    KnobCurve,
    Operating,
    PercentilePolicy,
    PolicyCheckpoint,
    Settings,
)
from runtime import adaptive, generate, load_adapter, load_ladder, open_ladder, save_ladder
from runtime.control.record import Keep
from runtime.fingerprint import model_fingerprint
from runtime.plan import plan_run, static_plan
from runtime.reference.adaptive import activate
from tests.runtime.reference import PositionPolicy, handmade_ladder
from tests.runtime.test_kinds import linears

GREEDY = {"do_sample": False, "pad_token_id": 0}
EXACTLY = GREEDY | {"max_new_tokens": 30, "min_new_tokens": 30}
RUNGS = (0.5, 1, 1.25, 2, 4, 8)


@pytest.fixture(scope="module")
def saved(llama_adapter, tmp_path_factory):
    return save_ladder(handmade_ladder(load_adapter(llama_adapter)), tmp_path_factory.mktemp("ladders") / "ladder")


@pytest.fixture
def ids():
    return torch.randint(3, 256, (2, 41), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_policy(tiny_llama, saved):
    """`make_policy(policy, curve=None, **more)`: a checkpoint for the coded ladder."""
    ladder = load_ladder(saved)
    prints = Fingerprints(
        model=model_fingerprint(tiny_llama), adapter=ladder.adapter, ladder=ladder.fingerprint, shared=False
    )
    cost = tuple((ladder.rung_bytes() / ladder.rung_bytes()[-1]).tolist())

    def make(policy, curve=None, **more):
        return PolicyCheckpoint(
            policy(ladder.rungs),
            Settings(block_tokens=4, prompt_tokens=4, chunk=ChunkSettings(1, 5)),
            curve,
            cost,
            prints,
            **more,
        )

    return make


@pytest.fixture
def wasteful(make_policy):
    """A policy whose every knob asks for the top rung of this text."""
    return make_policy(
        lambda rungs: PercentilePolicy(rungs, "complexity", torch.linspace(0.0, 0.01, 101), spread=2.0),
        KnobCurve((0.2, 1.0), (4.0, 5.0)),
    )


def held_bytes(model):
    return sum(own.nbytes for linear in linears(model).values() for own in linear.directions.values())


@pytest.mark.parametrize("kind", ["coded", "svd"])
def test_without_a_policy_the_resident_rung_is_served_and_a_warning_says_so(
    tiny_llama, saved, llama_adapter, ids, kind
):
    source, rung = {"coded": (saved, 1.25), "svd": (llama_adapter, 5)}[kind]
    with pytest.warns(UserWarning, match=rf"^every token gets rung {rung}, the resident one, not the exact adapter 8$"):
        out = generate(tiny_llama, source, ids, resident_rung=rung, **EXACTLY)
    expected = generate(tiny_llama, source, ids, rung=rung, **EXACTLY)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.adapter_bytes == expected.adapter_bytes
    assert out.mean_rank == pytest.approx(expected.mean_rank)


def test_a_ladder_loaded_in_part_is_served_as_far_as_it_goes(tiny_llama, saved, ids):
    part = load_ladder(saved, resident_rung=2)
    with pytest.warns(UserWarning, match="every token gets rung 2,"), adaptive(tiny_llama, part):
        logits = tiny_llama(ids).logits
    with adaptive(tiny_llama, part, rung=1.25):
        lower = tiny_llama(ids).logits
    for rung, found in ((2, logits), (1.25, lower)):
        with adaptive(tiny_llama, saved, rung=rung):
            torch.testing.assert_close(tiny_llama(ids).logits, found)


def test_the_resident_rung_at_the_top_is_everything(tiny_llama, saved, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = generate(tiny_llama, saved, ids, resident_rung=8, **EXACTLY)
    assert torch.equal(out.sequences, generate(tiny_llama, saved, ids, **EXACTLY).sequences)
    assert out.adapter_share == 1


def test_a_rung_above_it_is_refused(tiny_llama, saved, llama_adapter, ids):
    asked = [
        (saved, {"rung": 4, "resident_rung": 2}),
        (saved, {"rung": [1, 8], "resident_rung": 2}),
        (llama_adapter, {"rung": 6, "resident_rung": 5}),
        (load_ladder(saved, resident_rung=2), {"rung": 4}),
        (load_ladder(saved, resident_rung=2), {"resident_rung": 4}),
    ]
    for source, arguments in asked:
        with pytest.raises(ValueError, match=r"^rung: expected at most the resident rung [25], got [468]; ") as error:
            plan_run(source, **arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"expected at most the resident rung 1\.25, got 2"):
        static_plan(open_ladder(saved, resident_rung=1.25), 2)
    with activate(tiny_llama, static_plan(open_ladder(saved, resident_rung=1.25), 1)) as run:
        weights = torch.zeros(2, 1, 6)
        weights[:, :, 2] = 1
        run.gated(ids, torch.ones_like(ids).bool(), weights)
        weights[1, :, 3] = 1
        with pytest.raises(ValueError, match=r"expected at most the resident rung 1\.25, got 2"):
            run.gated(ids, torch.ones_like(ids).bool(), weights)


def test_a_resident_rung_that_there_is_not_is_refused(saved, llama_adapter, make_policy, tiny_llama):
    policy = make_policy(FixedPolicy)
    cases = [
        (saved, {"resident_rung": 3}, r"^rung: expected one of \(0\.5, .*\), got 3"),
        (saved, {"resident_rung": -1}, r"^resident_rung: expected a rank in \[0, 65536\], got -1"),
        (llama_adapter, {"resident_rung": 9}, "^rungs: expected ranks up to the adapter's 8, got 9"),
        (
            saved,
            {"resident_rung": 3, "policy": policy, "budget": 0.5, "model_fingerprint": model_fingerprint(tiny_llama)},
            r"^resident_rung: expected one of \(0\.5, .*\), got 3; take one of them$",
        ),
    ]
    for source, arguments, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            plan_run(source, **arguments)
        assert "\n" not in str(error.value)


def test_a_budget_of_one_is_refused_where_it_is_asked_for(tiny_llama, saved, wasteful):
    model = model_fingerprint(tiny_llama)
    message = r"^budget: expected less than 1, which is the exact adapter 8, with the resident rung 4, got 1; lower it"
    for budget in (1.0, [0.5, 1.0]):
        with pytest.raises(ValueError, match=message):
            plan_run(saved, policy=wasteful, budget=budget, resident_rung=4, model_fingerprint=model)
    with pytest.raises(ValueError, match=message):
        plan_run(saved, budget=1.0, resident_rung=4)
    # where it is the policy's default nobody asked for it
    assert wasteful.default_budget == 1
    plan_run(saved, policy=wasteful, resident_rung=4, model_fingerprint=model)


@pytest.mark.parametrize("budget", [None, 0.9, 0.3])
def test_a_policy_chooses_among_the_rungs_in_memory(tiny_llama, saved, wasteful, ids, budget):
    """Prompt and start included: all its chunks are at 1.25, and what it would choose of all rungs is above."""
    with adaptive(tiny_llama, saved, policy=wasteful, budget=budget, resident_rung=1.25, keep_record=True) as run:
        tiny_llama.generate(ids, **EXACTLY)
        assert {chunk.rung for row in range(2) for chunk in run.trace(row, 70)} == {1.25}
    with adaptive(tiny_llama, saved, policy=wasteful, budget=budget, keep_record=True) as run:
        tiny_llama.generate(ids, **EXACTLY)
        assert max(chunk.rung for chunk in run.trace(0, 70)) > 1.25


def test_rows_of_ladders_in_memory_to_different_rungs(tiny_llama, saved, llama_adapter, ids, make_plan):
    parts = [load_ladder(saved, resident_rung=1.25), load_ladder(saved)]
    plan = make_plan(parts[1], PositionPolicy, chunk=ChunkSettings(2, 3), block_tokens=4)
    plan = dataclasses.replace(
        plan, ladders=tuple(parts), operating=Operating.at(0.0, torch.tensor([5, 5]), adapter=torch.tensor([0, 1]))
    )
    with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run:
        logits = tiny_llama(ids).logits
        rungs = run.last.stream.columns()["rung"]
        for row in range(2):
            cache = run.new_cache(1, operating=plan.operating.select(torch.tensor([row])))
            alone = tiny_llama(ids[row, None], past_key_values=cache).logits[0]
            torch.testing.assert_close(logits[row], alone, atol=2e-5, rtol=1e-5)
    assert rungs[0].max() == 2
    assert rungs[1].unique().numel() > 4
    assert torch.equal(rungs[0], rungs[1].clamp(max=2)), "the same choices, as far as there is memory"


@pytest.mark.parametrize("budget", [0.9, 0.3])
def test_a_fixed_policy_stays_within_memory_and_looks_at_nothing(tiny_llama, saved, make_policy, ids, budget):
    policy = dataclasses.replace(
        make_policy(FixedPolicy),
        settings=Settings(block_tokens=4, prompt_tokens=4, chunk=ChunkSettings(1, 5), kv=FULL_KV),
    )
    with adaptive(tiny_llama, saved, policy=policy, budget=budget, resident_rung=1.25) as run:
        tiny_llama.generate(ids, **EXACTLY)
        assert run.last.stream.static == [2, 2]
        assert run.mean_rank()[0] == pytest.approx(float(load_ladder(saved).mean_rank()[2]))


def test_what_is_not_read_is_not_held(tiny_llama, saved, llama_adapter, wasteful):
    """By the adapted linears: up to the resident rung with a policy, and without one what is served alone."""
    ladder, exact = load_ladder(saved), load_ladder(saved).rung_bytes()[-1]
    with adaptive(tiny_llama, saved, policy=wasteful):
        assert held_bytes(tiny_llama) == ladder.resident_bytes()
    with adaptive(tiny_llama, saved, policy=wasteful, resident_rung=1):
        assert 0 < held_bytes(tiny_llama) == ladder.up_to(1).resident_bytes() < exact / 4
    for source, rung, most in ((saved, 1, exact / 4), (saved, 4, 0.6 * exact), (llama_adapter, 2, exact / 4)):
        with adaptive(tiny_llama, source, rung=rung):
            assert 0 < held_bytes(tiny_llama) <= most
    for source in (saved, llama_adapter):  # the exact adapter alone
        with adaptive(tiny_llama, source):
            assert held_bytes(tiny_llama) == exact
    with adaptive(tiny_llama, saved, rung=0):
        assert held_bytes(tiny_llama) == 0


def test_an_adapter_of_another_model_is_refused_whatever_is_in_memory(tiny_llama, tiny_gpt2, saved):
    with pytest.raises(ValueError, match="of another model"), adaptive(tiny_gpt2, saved, rung=1):
        pass
    part = load_ladder(saved, resident_rung=1)
    large = dataclasses.replace(
        part,
        banks=tuple(
            {
                name: dataclasses.replace(
                    own, a=dataclasses.replace(own.a, scales=tuple(1e6 * scale for scale in own.a.scales))
                )
                for name, own in bank.items()
            }
            for bank in part.banks
        ),
    )
    message = r"adapter: expected updates within torch\.float16, at most 65504, got a norm of .* in model\.layers"
    with pytest.raises(ValueError, match=message), adaptive(tiny_llama.half(), large, rung=1):
        pass

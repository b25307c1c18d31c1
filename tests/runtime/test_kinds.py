"""A ladder of any kind runs at any rung, per token and per row: two banks in few bits, and the exact adapter on top."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from policy import (
    ChunkSettings,
    Fingerprints,
    FixedPolicy,
    KnobCurve,
    Operating,
    PercentilePolicy,
    PolicyCheckpoint,
    Settings,
)
from runtime import adaptive, build_ladder, generate, load_adapter, save_ladder
from runtime.control.record import Keep
from runtime.fingerprint import model_fingerprint
from runtime.ladder.formats import BITS, row_bytes
from runtime.plan import plan_run, static_plan
from runtime.reference.adaptive import activate
from runtime.reference.gate import AdaptedLinear
from tests.runtime.reference import PositionPolicy, definition_hooks, handmade_ladder, row_of

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
GREEDY = {"do_sample": False, "pad_token_id": 0}
RUNGS = (0.5, 1, 1.25, 2, 4, 8)
TOP = len(RUNGS) - 1


@pytest.fixture(scope="module")
def ladder(llama_adapter):
    return handmade_ladder(load_adapter(llama_adapter))


@pytest.fixture(scope="module")
def saved(ladder, tmp_path_factory):
    return save_ladder(ladder, tmp_path_factory.mktemp("ladders") / "ladder")


@pytest.fixture
def ids():
    return torch.randint(3, 256, (3, 41), generator=torch.Generator().manual_seed(0))


@contextmanager
def merged(model, ladder, rung):
    """The plain model with a rung's update in its weights."""
    before = {name: model.get_submodule(name).weight.data.clone() for name in ladder.modules}
    for name in ladder.modules:
        linear, (a, b) = model.get_submodule(name), ladder.update(name, rung, torch.float64)
        update = a.T @ b if isinstance(linear, Conv1D) else b.T @ a
        linear.weight.data = (linear.weight.double() + update).to(linear.weight.dtype)
    try:
        yield
    finally:
        for name, weight in before.items():
            model.get_submodule(name).weight.data = weight


def linears(model):
    """The adapted linears of a model that is inside `activate`, by name."""
    found = {name: vars(module).get("forward") for name, module in model.named_modules()}
    return {name: forward for name, forward in found.items() if isinstance(forward, AdaptedLinear)}


@pytest.mark.parametrize("rung", range(TOP + 1))
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_every_rung_equals_the_merged_weights(rung, architecture, request, ids):
    model = request.getfixturevalue(f"tiny_{architecture}")
    ladder = handmade_ladder(load_adapter(request.getfixturevalue(f"{architecture}_adapter")))
    with activate(model, static_plan(ladder, ladder.rungs[rung])):
        logits = model(ids).logits
    with merged(model, ladder, rung):
        torch.testing.assert_close(logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("rung", range(TOP + 1))
@torch.no_grad()
def test_every_rung_on_a_trained_model_equals_the_merged_weights(rung, stories_path, stories_adapter, load_model):
    model, ladder = load_model(stories_path), handmade_ladder(load_adapter(stories_adapter))
    ids = torch.randint(3, 512, (2, 60), generator=torch.Generator().manual_seed(0))
    with activate(model, static_plan(ladder, ladder.rungs[rung])):
        logits = model(ids).logits
    with merged(model, ladder, rung):
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=0)


def test_the_top_rung_is_pefts(tiny_llama, ladder, llama_adapter, saved, peft_load, tiny_llama_factory, ids):
    options = GREEDY | {"max_new_tokens": 30, "min_new_tokens": 30}
    peft = peft_load(tiny_llama_factory(), llama_adapter)
    for source in (ladder, saved):
        with adaptive(tiny_llama, source):
            assert torch.equal(tiny_llama.generate(ids, **options), peft.generate(input_ids=ids, **options))
            with torch.no_grad():
                torch.testing.assert_close(tiny_llama(ids).logits, peft(ids).logits, **CLOSE)


def test_rows_at_every_rung_equal_separate_runs(tiny_llama, ladder):
    lengths = torch.tensor([31, 9, 17, 1, 24, 12])
    ids = torch.randint(3, 60, (6, 31), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(31) >= 31 - lengths[:, None]).long()
    options = GREEDY | {"max_new_tokens": 20, "min_new_tokens": 20}
    with adaptive(tiny_llama, ladder, rung=list(RUNGS)) as run:
        logits = tiny_llama(ids * mask, attention_mask=mask).logits
        tokens = tiny_llama.generate(ids * mask, attention_mask=mask, **options)[:, 31:]
        assert run.row_mean_rank() == pytest.approx(ladder.mean_rank().tolist())
    for row, rung in enumerate(RUNGS):
        own = ids[row, mask[row].bool()][None]
        with adaptive(tiny_llama, ladder, rung=rung):
            torch.testing.assert_close(tiny_llama(own).logits[0], logits[row, mask[row].bool()], atol=2e-5, rtol=1e-5)
            assert torch.equal(tiny_llama.generate(own, **options)[0, -20:], tokens[row])


def test_two_ladders_of_different_kinds_share_a_batch(tiny_llama, ladder, llama_adapter, ids):
    with adaptive(tiny_llama, [ladder, llama_adapter, ladder], rung=[1.25, 3, 8]) as run:
        together = tiny_llama(ids).logits
        assert run.row_mean_rank()[1:] == [3, 8]
    for row, (source, rung) in enumerate(((ladder, 1.25), (llama_adapter, 3), (ladder, 8))):
        with adaptive(tiny_llama, source, rung=rung):
            torch.testing.assert_close(tiny_llama(ids[row, None]).logits[0], together[row], atol=2e-5, rtol=1e-5)


def first_queries(model, call):
    """[B, T, d] what the first layer's queries are in `call`: of its tokens alone, no other token plays a part."""
    heard = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: heard.append(args[-1].clone()))
    try:
        call()
    finally:
        hook.remove()
    return torch.cat(heard, 1)


def test_every_token_of_a_row_runs_at_its_own_rung(tiny_llama, ladder, make_plan, ids):
    plan = make_plan(ladder, PositionPolicy, torch.tensor([0.0, 3.0, 8.0]), chunk=ChunkSettings(1, 3), block_tokens=7)
    with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run:
        mixed = first_queries(tiny_llama, lambda: tiny_llama(ids))
        logits, record = tiny_llama(ids).logits, run.last.stream.columns()
        for row in range(3):  # and in a batch every row decides and computes what it does alone
            cache = run.new_cache(1, operating=plan.operating.select(torch.tensor([row])))
            alone = tiny_llama(ids[row, None], past_key_values=cache).logits[0]
            torch.testing.assert_close(alone, logits[row], atol=2e-5, rtol=1e-5)
            assert torch.equal(row_of(record, row)["rung"], row_of(cache.stream.columns(), 0)["rung"])
    assert record["rung"].unique().numel() == TOP + 1
    with activate(tiny_llama, static_plan(ladder, 8)) as run:
        for j in range(TOP + 1):
            here = record["rung"] == j
            weights = torch.nn.functional.one_hot(torch.full((3, 1), j), TOP + 1) * 1.0
            uniform = first_queries(tiny_llama, lambda: run.gated(ids, torch.ones_like(ids).bool(), weights))  # noqa: B023
            plain = first_queries(tiny_llama, lambda: run.gated(ids, torch.ones_like(ids).bool(), 0 * weights))  # noqa: B023
            scaled = plain + record["scale"][..., None] * (uniform - plain)
            torch.testing.assert_close(mixed[here], scaled[here], **CLOSE)


def test_tokens_of_any_weights_equal_the_definition(tiny_llama, ladder, ids):
    """Some rungs of every token at once, within a bank and across, and some tokens without any."""
    weights = torch.rand(3, 41, TOP + 1, generator=torch.Generator().manual_seed(2))
    weights = weights * (torch.rand(weights.shape, generator=torch.Generator().manual_seed(3)) < 0.3)
    with activate(tiny_llama, static_plan(ladder, 8)) as run:
        logits = run.gated(ids, torch.ones_like(ids).bool(), weights)
    with definition_hooks(tiny_llama, ladder, weights), torch.no_grad():
        torch.testing.assert_close(logits, tiny_llama(ids).logits, **CLOSE)


def fading(ladder, start, to):
    """From rung `start` to rung `to` over eight tokens, from the ninth token on."""
    settings = Settings(block_tokens=1, fade_tokens=8, chunk=ChunkSettings(8, 8, thresholds=()))
    operating = Operating.at(torch.tensor([float(to)]), start)
    plan = static_plan(ladder, 8)
    return dataclasses.replace(plan, policy=StartsLater(ladder.rungs), settings=settings, operating=operating)


class StartsLater(FixedPolicy):
    """The rung of the knob, at the start rung until something is known."""


@pytest.mark.parametrize(("start", "to"), [(0, 1), (3, 2), (1, 4), (4, 5), (5, 0)])
def test_a_fade_is_exact_at_both_ends_and_reads_what_both_need(tiny_llama, ladder, ids, start, to):
    read = []
    with activate(tiny_llama, fading(ladder, start, to)) as run:
        cache, heard = run.new_cache(1), []
        for t in range(24):
            step = ids[:1, t, None]
            heard.append(first_queries(tiny_llama, lambda: tiny_llama(step, past_key_values=cache)))  # noqa: B023
            read.append({name: own._key[0] for name, own in linears(tiny_llama).items() if own.decoded})
        mixed = torch.cat(heard, 1)
        counts = (cache.stream.sums.counts + cache.stream.sums.beside)[0, 1]
    tokens, whole = ids[:1, :24], torch.ones(1, 24).bool()
    with activate(tiny_llama, static_plan(ladder, 8)) as run:
        alphas = torch.eye(TOP + 1)
        for t in range(24):
            passed = min(max(t - 7, 0) / 8, 1.0)
            weights = torch.lerp(alphas[start], alphas[to], passed)[None, None]
            expected = first_queries(tiny_llama, lambda: run.gated(tokens, whole, weights))  # noqa: B023
            torch.testing.assert_close(mixed[:, t], expected[:, t], **CLOSE)
    # what was read is what the rungs of the moment need: one, both, the other
    for t, rungs in ((0, [start]), (7, [start]), (8, sorted([start, to])), (14, sorted([start, to])), (15, [to])):
        ranges = dict(zip(ladder.modules, map(tuple, ladder.ranges(rungs)), strict=True))
        assert read[t] == {name: own for name, own in ranges.items() if own}
    apart = ladder.bank_of[start] != ladder.bank_of[to]
    expected = [8.0 * (j == start) + 9.0 * (j == to) for j in range(TOP + 1)]
    for rung in (start, to) if apart else (max(start, to),):
        expected[rung] += 7
    assert counts.tolist() == expected


def by_hand(ladder, rung):
    """Bytes that a rung reads: row by row, from its edges and the width of a row in every format."""
    total = 0
    for m, own in enumerate(ladder.modules.values()):
        ends = [0, *ladder.edges[rung, m].tolist()]
        for bits, first, last in zip(BITS, ends, ends[1:], strict=False):
            total += (last - first) * (row_bytes(own.a.width, bits) + row_bytes(own.b.width, bits))
    return total


@pytest.mark.parametrize("rung", range(TOP + 1))
def test_what_a_rung_reads_is_reported(tiny_llama, ladder, saved, ids, rung):
    out = generate(tiny_llama, saved, ids, rung=RUNGS[rung], **GREEDY, max_new_tokens=5, min_new_tokens=5)
    assert out.adapter_bytes == by_hand(ladder, rung)
    assert out.adapter_share == pytest.approx(by_hand(ladder, rung) / by_hand(ladder, TOP))
    assert out.mean_rank == pytest.approx(8 * out.adapter_share, rel=1e-6)


@pytest.fixture
def policy(tiny_llama, ladder):
    """A policy fitted to the coded ladder, whose default is a third of the adapter's bytes."""
    prints = Fingerprints(
        model=model_fingerprint(tiny_llama), adapter=ladder.adapter, ladder=ladder.fingerprint, shared=False
    )
    cost = tuple((ladder.rung_bytes() / ladder.rung_bytes()[-1]).tolist())
    return PolicyCheckpoint(
        PercentilePolicy(ladder.rungs, "complexity", torch.linspace(0.4, 0.9, 101), spread=2.0),
        Settings(block_tokens=4, prompt_tokens=4, chunk=ChunkSettings(1, 5)),
        KnobCurve((0.2, 0.5, 1.0), (1.0, 3.5, 5.0)), cost, prints, default_budget=0.35,
    )  # fmt: skip


def test_a_generation_reports_the_bytes_of_its_trace(tiny_llama, ladder, saved, policy, ids):
    out = generate(
        tiny_llama, saved, ids, policy=policy, return_trace=True, **GREEDY, max_new_tokens=40, min_new_tokens=40
    )
    spent = []
    for chunks in out.trace:
        rungs = [chunk.rung for chunk in chunks for _ in range(chunk.length)]
        spent += [by_hand(ladder, RUNGS.index(rung)) for rung in rungs[41:]]
    assert len(set(spent)) > 1
    assert len(spent) == 3 * 39
    assert out.adapter_bytes == pytest.approx(sum(spent) / len(spent))
    assert out.adapter_share == pytest.approx(out.adapter_bytes / by_hand(ladder, TOP))


def test_a_policy_of_another_ladder_of_the_adapter_says_what_to_pass(tiny_llama, ladder, llama_adapter, policy):
    model = model_fingerprint(tiny_llama)
    others = {
        "rungs: expected": llama_adapter,
        "ladder: expected fingerprint": handmade_ladder(load_adapter(llama_adapter), seed=1),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=rf"^{message} .*; pass the folder `ladder` that the fit wrote") as error:
            plan_run(other, policy=policy, model_fingerprint=model)
        assert "\n" not in str(error.value)
    assert plan_run(ladder, policy=policy, model_fingerprint=model).ladder is ladder


def test_a_rung_between_two_is_refused_by_name(llama_adapter, ladder):
    with pytest.raises(
        ValueError, match=r"^rung: expected one of \(0\.5, 1, .*\), got 3; build the ladder with that rung$"
    ):
        plan_run(ladder, rung=3)
    with pytest.raises(ValueError, match=r"^rungs: expected whole ranks of an svd ladder, got \[2\.5\]; "):
        plan_run(llama_adapter, rung=2.5)
    with pytest.raises(ValueError, match=r"^rung: expected a rank in \[0, 65536\], got nan; correct it$"):
        plan_run(llama_adapter, rung=float("nan"))


def test_a_rung_may_be_written_with_a_point(tiny_llama, llama_adapter, ids):
    assert plan_run(llama_adapter, rung=4.0).ladder.rungs == (4, 8)
    assert build_ladder(load_adapter(llama_adapter)).with_rungs([4]).rungs == (4, 8)

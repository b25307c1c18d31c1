"""A served budget is a promise about bytes, whatever the text: what rows read of their adapter, token by token."""

import dataclasses
import math

import pytest
import torch

from policy import (
    FULL_KV,
    ChunkSettings,
    Fingerprints,
    FixedPolicy,
    KnobCurve,
    KVSettings,
    Operating,
    PercentilePolicy,
    PolicyCheckpoint,
    Settings,
)
from runtime import adaptive, build_ladder, generate, load_adapter
from runtime.control.bucket import SAME_COST, SLACK_TOKENS, Bucket, Offer, affordable, filled, pay
from runtime.control.record import Keep
from runtime.control.stream import Stream
from runtime.fingerprint import model_fingerprint
from runtime.plan import plan_run, static_plan
from runtime.reference.adaptive import activate
from tests.runtime.reference import PositionPolicy, row_of

RUNGS = (2, 4, 6, 8)
COST = (0.25, 0.5, 0.75, 1.0)
NEW_TOKENS = 260
OPTIONS = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}


@pytest.fixture
def make_policy(tiny_llama, llama_adapter):
    """`make_policy(policy, curve)`: a checkpoint for `llama_adapter` at `RUNGS`."""
    ladder = build_ladder(load_adapter(llama_adapter), RUNGS)
    prints = Fingerprints(
        model=model_fingerprint(tiny_llama), adapter=ladder.adapter, ladder=ladder.fingerprint, shared=False
    )

    def make(policy, curve=None):
        settings = Settings(block_tokens=4, prompt_tokens=4, chunk=ChunkSettings(1, 5), kv=FULL_KV)
        return PolicyCheckpoint(policy, settings, curve, COST, prints)

    return make


@pytest.fixture
def spendthrift(make_policy):
    """Calibrated on quite other text: on this one every budget's knob asks for the top rung."""
    policy = PercentilePolicy(RUNGS, "complexity", torch.linspace(0.0, 0.01, 101), spread=2.0)
    return make_policy(policy, KnobCurve((0.25, 1.0), (2.0, 3.0)))


@pytest.fixture
def prompt():
    return torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(0))


def spent_by(stream):
    """[N] share of the adapter that every token of the first row read."""
    return torch.tensor(COST)[row_of(stream.columns(), 0)["active"]]


@pytest.mark.parametrize("budget", [0.25, 0.375, 0.5, 0.8])
def test_a_generation_keeps_its_budget_where_its_policy_would_not(
    tiny_llama, llama_adapter, spendthrift, prompt, budget
):
    with adaptive(tiny_llama, llama_adapter, policy=spendthrift, budget=budget, keep_record=True) as run:
        tiny_llama.generate(prompt, **OPTIONS)
        spent = spent_by(run.last.stream)
    tokens = torch.arange(1, len(spent) + 1)
    assert (spent.cumsum(0) <= budget * (tokens + SLACK_TOKENS) + 1e-6).all()
    # and spends what it has: beyond the prompt, which stays at the start rung, hardly less than its budget
    assert float(spent[40:].mean()) >= 0.97 * budget


def test_without_its_bucket_the_same_run_overspends(tiny_llama, llama_adapter, spendthrift, prompt):
    """So that the test above says something: the same policy, knob and start, and no budget to keep."""
    model = spendthrift.fingerprints["model"]
    plan = plan_run(llama_adapter, policy=spendthrift, budget=0.375, model_fingerprint=model)
    assert plan.operating.budget.tolist() == [0.375]
    free = Operating.at(plan.operating.knob, plan.operating.start_rung)
    with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run:
        cache = run.new_cache(1, prompt_tokens=torch.tensor([40]), operating=free)
        tiny_llama.generate(prompt, past_key_values=cache, **OPTIONS)
        spent = spent_by(run.last.stream)
    assert float(spent.sum()) > 0.375 * (len(spent) + SLACK_TOKENS)


def test_mean_rank_reports_what_the_bucket_allowed(tiny_llama, llama_adapter, spendthrift, prompt):
    out = generate(tiny_llama, llama_adapter, prompt, policy=spendthrift, budget=0.5, **OPTIONS)
    assert 0.97 * 4 <= out.mean_rank <= 4 * (NEW_TOKENS + SLACK_TOKENS) / NEW_TOKENS


def test_a_prompt_saves_no_more_than_the_slack_for_its_answer(tiny_llama, llama_adapter, spendthrift):
    """A long prompt at the start rung, below its budget: the answer may not spend all that it left over."""
    long = torch.randint(3, 60, (1, 240), generator=torch.Generator().manual_seed(1))
    with adaptive(tiny_llama, llama_adapter, policy=spendthrift, budget=0.74, keep_record=True) as run:
        tiny_llama.generate(long, **{**OPTIONS, "min_new_tokens": 200, "max_new_tokens": 200})
        spent = spent_by(run.last.stream)[240:]
    assert float(spent.sum()) <= 0.74 * (len(spent) + SLACK_TOKENS) + 1e-6


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.2499])
def test_a_budget_below_the_smallest_rung_is_refused(tiny_llama, llama_adapter, spendthrift, prompt, budget):
    message = rf"budget: expected at least 0\.25, which the smallest rung 2 costs, got {budget}; raise it"
    with pytest.raises(ValueError, match=message) as caught:
        generate(tiny_llama, llama_adapter, prompt, policy=spendthrift, budget=budget, max_new_tokens=4)
    assert "\n" not in str(caught.value)


def test_a_share_with_few_digits_pays_for_the_rung_it_means():
    cost = torch.tensor([[1 / 6, 1 / 3, 1.0]], dtype=torch.float64)
    bucket = Bucket.full(torch.tensor([0.3333333], dtype=torch.float64), cost)
    assert bucket.budget.item() == 1 / 3
    off = 2 * SAME_COST
    bucket = Bucket.full(torch.tensor([1 / 3 - off], dtype=torch.float64), cost)
    assert bucket.budget.item() == 1 / 3 - off


def test_a_fixed_rung_is_never_lowered_by_its_own_budget(tiny_llama, llama_adapter, make_policy, prompt):
    policy = make_policy(FixedPolicy(RUNGS))
    out = generate(tiny_llama, llama_adapter, prompt, policy=policy, budget=0.4999999, return_trace=True, **OPTIONS)
    assert {chunk.rung for chunk in out.trace[0]} == {4}


def stream_of(policy, kv=FULL_KV, start=1, knob=1.0, keep=Keep.SUMS, budget=float("inf"), resident=3):
    offer = Offer.of(torch.tensor([COST], dtype=torch.float64), resident=torch.tensor([resident]))
    return Stream(
        Settings(kv=kv), policy, Operating.at(knob, start, kv, budget=budget), offer, torch.device("cpu"), keep=keep
    )


def test_only_what_no_token_can_change_is_static():
    fixed = FixedPolicy(RUNGS)
    assert stream_of(fixed).static == [1]
    assert stream_of(fixed, budget=0.5).static == [1]
    assert stream_of(fixed, keep=Keep.RUNGS).static == [1]
    assert stream_of(fixed, keep=Keep.DECISIONS).static is None, "a trace wants the signals"
    assert stream_of(fixed, kv=KVSettings()).static is None, "pages are judged by them"
    assert stream_of(fixed, start=2).static is None, "it goes elsewhere after the first block"
    assert stream_of(fixed, budget=0.3).static is None, "the budget pays for less"
    assert stream_of(fixed, start=3, knob=2.0, resident=1).static == [1], "no more than that is in memory"
    assert stream_of(PositionPolicy(RUNGS)).static is None


@pytest.mark.parametrize("rows", [1, 3])
def test_a_static_stream_computes_what_a_deciding_one_does(tiny_llama, llama_adapter, rows):
    """Same policy, with and without a record: logits, tokens and what is reported, padded rows included."""
    ladder = build_ladder(load_adapter(llama_adapter), RUNGS)
    scales = torch.tensor([1.3, 1.2, 1.1, 1.0])
    plan = static_plan(ladder, [4, 8, 2][:rows])
    plan = type(plan)(plan.ladders, FixedPolicy(RUNGS, scales), plan.settings, plan.operating)
    ids = torch.randint(3, 250, (rows, 50), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(50) >= torch.tensor([0, 17, 44])[:rows, None]).long()
    found = {}
    for keep in (Keep.SUMS, Keep.DECISIONS):
        with activate(tiny_llama, plan, keep=keep) as run:
            logits = tiny_llama(ids * mask, attention_mask=mask).logits
            tokens = tiny_llama.generate(
                ids * mask, attention_mask=mask, do_sample=False, pad_token_id=0, min_new_tokens=20, max_new_tokens=20
            )
            assert (run.last.stream.static is None) == (keep is Keep.DECISIONS)
            found[keep] = logits, tokens, run.row_mean_rank(), run.mean_rank()
    static, deciding = found.values()
    torch.testing.assert_close(static[0][mask.bool()], deciding[0][mask.bool()], atol=1e-5, rtol=1e-5)
    assert torch.equal(static[1], deciding[1])
    assert static[2:] == deciding[2:]


def test_a_static_stream_listens_to_nothing(tiny_llama, llama_adapter, monkeypatch):
    """No entropy, no attention, no decision: neither in the prompt nor in decode."""
    heard = []
    with adaptive(tiny_llama, llama_adapter, rung=4):
        monkeypatch.setattr("runtime.reference.attention.AttentionProbe.record", lambda *_: heard.append("attention"))
        monkeypatch.setattr(Stream, "close_block", lambda *_: heard.append("block"))
        tiny_llama.generate(torch.arange(3, 40)[None], do_sample=False, max_new_tokens=5, pad_token_id=0)
    assert not heard


def test_a_static_rung_takes_whole_prompts_whatever_the_policys_block(tiny_llama, llama_adapter, make_policy, prompt):
    policy, calls = make_policy(FixedPolicy(RUNGS)), []
    with adaptive(tiny_llama, llama_adapter, policy=policy, budget=0.5) as run:
        forward = run._forward
        run._forward = lambda **inputs: calls.append(inputs["input_ids"].shape[1]) or forward(**inputs)
        tiny_llama(prompt)
    assert calls == [40]


def test_a_default_budget_that_pays_for_no_rung_is_refused(make_policy):
    with pytest.raises(ValueError, match=r"default_budget: expected at least 0\.25, which the smallest rung 2 costs"):
        dataclasses.replace(make_policy(FixedPolicy(RUNGS)), default_budget=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_a_block_that_can_be_paid_for_leaves_what_paying_token_by_token_leaves(seed):
    """Rungs within the budget, and a few above it that what is left can pay for; buckets full, empty and bottomless."""
    random = torch.Generator().manual_seed(seed)
    rows, tokens = 5, 90
    cost = (0.3 + 0.4 * torch.rand(rows, 4, generator=random, dtype=torch.float64)).sort(1).values
    cost[:, -1] = 1.0
    budget = cost[:, 2].clone()
    budget[4] = math.inf
    bucket = dataclasses.replace(
        Bucket.full(budget, cost), balance=64 * budget * torch.tensor([1.0, 0.0, 0.5, 0.01, 1.0])
    )
    rung = torch.randint(0, 3, (rows, tokens), generator=random)
    rung[0, 10:20] = 3  # dearer than the budget, of a full bucket
    counts = torch.tensor([90, 0, 41, 90, 90])
    real = torch.arange(tokens) < counts[:, None]
    positions = torch.arange(tokens).expand(rows, -1)
    none = torch.zeros(rows, dtype=torch.long)
    paid, expected = pay(bucket, Offer.of(cost), none, none, rung, real, positions, positions, real, Settings())
    assert torch.equal(paid[real], rung[real]), "all could be paid for"
    found = filled(bucket, cost.gather(1, rung), real)
    torch.testing.assert_close(found.balance, expected.balance, rtol=1e-12, atol=1e-12)
    assert found.budget is bucket.budget
    assert found.balance[1] == bucket.balance[1] == 0, "no token, nothing comes in"


def test_who_can_pay_for_the_start_rung_for_good():
    cost = torch.tensor([[0.1, 0.3, 1.0]], dtype=torch.float64)
    for start, budget, resident, fits in (
        (1, 0.3, None, True), (1, 0.2, None, False), (2, 0.3, None, False), (2, 0.3, 1, True),
        (2, math.inf, None, True),
    ):  # fmt: skip
        offer = Offer.of(cost, resident=None if resident is None else torch.tensor([resident]))
        assert affordable(Operating.at(0.0, start, budget=budget), offer) is fits

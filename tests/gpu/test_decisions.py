"""Decisions on a CUDA device: those of the CPU in float32, whatever device the policy was made on."""

from dataclasses import replace

import pytest
import torch

from policy import FixedPolicy, LearnedPolicy, Operating, PercentilePolicy, RandomPolicy
from policy.settings import FULL_KV, PAPER_SIGNALS, SIGNALS, STATS, ChunkSettings, Settings
from runtime.control.record import Keep
from runtime.plan import RunPlan
from runtime.reference.adaptive import activate
from runtime.reference.whole import settled
from tests.runtime.reference import drawn_tables

pytestmark = pytest.mark.gpu

TOKENS = 160
# not a multiple of what quantiles and knob could put exactly between two rungs
SPREAD = 2.3


def run_record(model, plan, ids):
    """What the stream decided for `ids`, on the host, and the page formats."""
    with activate(model, plan, keep=Keep.DECISIONS) as run:
        model(input_ids=ids)
        record = {name: value.cpu() for name, value in run.last.stream.columns().items()}
        return record | {"formats": run.last.page_formats()}


CHUNKS = ChunkSettings(min_tokens=2, max_tokens=8)


def percentile_plan(ladder, model, ids, signal, chunk):
    """A percentile policy calibrated on this very text, so that every rung of its band is used."""
    settings = Settings(block_tokens=8, chunk=chunk)
    top = len(ladder.rungs) - 1
    knob = top / 2
    first = RunPlan((ladder,), FixedPolicy(ladder.rungs), settings, Operating.at(float(top), top))
    record = run_record(model, first, ids)
    known = record["opens"] & record["held_valid"].all(-1)
    means = record["held"][..., STATS.index("mean")][known]
    names = PAPER_SIGNALS if signal == "complexity" else (signal,)
    values = means[:, [SIGNALS.index(name) for name in names]].mean(-1)
    # Thresholds between the values: on one of them rounding would decide.
    values = values.sort().values
    between = (values[1:] + values[:-1]) / 2
    policy = PercentilePolicy.calibrate(between, ladder.rungs, signal, spread=SPREAD)
    return RunPlan((ladder,), policy, settings, Operating.at(knob, top, settings.kv))


@pytest.mark.parametrize("chunk", [CHUNKS, ChunkSettings()], ids=["chunks", "tokens"])
@pytest.mark.parametrize("signal", ["entropy", "attention", "surprisal", "complexity"])
def test_decisions_equal_those_of_the_cpu(tiny_llama_factory, ladder, random_ids, device, signal, chunk):
    model, ids = tiny_llama_factory(), random_ids(2, TOKENS).cpu()
    plan = percentile_plan(replace(ladder, difficulty=drawn_tables(0)), model, ids, signal, chunk)
    on_cpu = run_record(model, plan, ids)
    on_gpu = run_record(model.to(device), plan, ids.to(device))
    for name in ("positions", "opens", "rung", "active", "formats"):
        assert torch.equal(on_cpu[name], on_gpu[name]), name
    for name in ("held", "complexity", "scale", "first", "age"):
        torch.testing.assert_close(on_gpu[name], on_cpu[name], atol=1e-4, rtol=0)
    assert len(on_cpu["rung"][on_cpu["opens"]].unique()) > 1, "the comparison needs rungs that change"


POLICIES = {
    "fixed": FixedPolicy,
    "percentile": lambda rungs: PercentilePolicy(rungs, "complexity"),
    "random": lambda rungs: RandomPolicy(rungs, seed=0),
    "learned": LearnedPolicy,
}


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_from_the_host_serves_a_model_on_the_gpu(tiny_llama_factory, ladder, random_ids, device, kind, dtype):
    settings = Settings(prompt_tokens=8)
    policy = POLICIES[kind](ladder.rungs)
    knob = sum(policy.knob_range()) / 2
    model, ids = tiny_llama_factory().to(device, dtype), random_ids(2, 40)
    operating = Operating.at(knob, 3, settings.kv)
    with activate(model, RunPlan((ladder,), policy, settings, operating), keep=Keep.DECISIONS) as run:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        trace = run.trace(0, 40)
        response, prompt = run.mean_rank()
    assert out.device.type == device.type
    assert sum(chunk.length for chunk in trace) == 40
    assert 0 <= response <= ladder.rungs[-1]
    assert 0 <= prompt <= ladder.rungs[-1]


@pytest.mark.parametrize("chunk", [CHUNKS, ChunkSettings()], ids=["chunks", "tokens"])
def test_prefill_in_blocks_of_one_decides_as_decode_does(tiny_llama_factory, ladder, random_ids, device, chunk):
    model, ids = tiny_llama_factory().to(device), random_ids(1, 64)
    settings = Settings(block_tokens=1, chunk=chunk)
    policy = PercentilePolicy(ladder.rungs, "complexity", spread=SPREAD)
    plan = RunPlan((ladder,), policy, settings, Operating.at(1.5, 3, settings.kv))
    blocks = run_record(model, plan, ids)
    with activate(model, plan, keep=Keep.DECISIONS) as run:
        cache = run.new_cache(1)
        for step in range(ids.shape[1]):
            model(input_ids=ids[:, step : step + 1], past_key_values=cache)
        steps = {name: value.cpu() for name, value in cache.stream.columns().items()}
    for name in ("opens", "rung", "active"):
        assert torch.equal(blocks[name], steps[name]), name


@pytest.mark.parametrize("chunk", [CHUNKS, ChunkSettings()], ids=["chunks", "tokens"])
def test_whole_texts_are_decided_as_step_by_step(tiny_llama_factory, ladder, random_ids, device, chunk):
    """Rows of two lengths, some of which settle before others; with tables of difficulty, which are on the host."""
    model, ids = tiny_llama_factory().to(device), random_ids(3, 48)
    real = torch.arange(48, device=device) < torch.tensor([48, 31, 40], device=device)[:, None]
    prompts = torch.tensor([5, 0, 12], device=device)
    ladder = replace(ladder, difficulty=drawn_tables(0))
    policy = PercentilePolicy(ladder.rungs, "surprisal", torch.linspace(0.5, 1, 101), spread=SPREAD)
    settings = Settings(block_tokens=1, chunk=chunk, kv=FULL_KV)
    plan = RunPlan((ladder,), policy, settings, Operating.at(1.6, 3))
    with activate(model, plan, keep=Keep.DECISIONS) as run:
        cache = run.new_cache(3, prompt_tokens=prompts)
        logits = run.logits(ids, real, cache)
        found = settled(run, ids, real, prompts)
    stepped, whole = cache.stream.columns(), found.stream.columns()
    for name in ("opens", "rung", "active"):
        assert torch.equal(stepped[name][real], whole[name][real]), name
    for name in ("held", "first", "age"):
        torch.testing.assert_close(whole[name][real], stepped[name][real], atol=1e-4, rtol=0)
    assert len(stepped["rung"][real].unique()) > 1, "the comparison needs rungs that change"
    torch.testing.assert_close(found.logits[real], logits[real], atol=1e-4, rtol=1e-4)

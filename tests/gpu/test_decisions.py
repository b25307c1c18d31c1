"""Decisions on a CUDA device: those of the CPU in float32, whatever device the policy was made on."""

import pytest
import torch

from policy import FixedPolicy, LearnedPolicy, Operating, PercentilePolicy, RandomPolicy
from policy.settings import SIGNALS, STATS, ChunkSettings, Settings
from runtime.control.record import Keep
from runtime.plan import RunPlan
from runtime.reference.adaptive import activate

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


def percentile_plan(ladder, model, ids, signal):
    """A percentile policy calibrated on this very text, so that every rung of its band is used."""
    settings = Settings(block_tokens=8, chunk=ChunkSettings(min_tokens=2, max_tokens=8))
    top = len(ladder.rungs) - 1
    knob = top / 2
    first = RunPlan((ladder,), FixedPolicy(ladder.rungs), settings, Operating.at(float(top), top))
    record = run_record(model, first, ids)
    known = record["opens"] & record["held_valid"].all(-1)
    means = record["held"][..., STATS.index("mean")][known]
    values = means.mean(-1) if signal == "complexity" else means[:, SIGNALS.index(signal)]
    policy = PercentilePolicy.calibrate(values, ladder.rungs, signal, spread=SPREAD)
    return RunPlan((ladder,), policy, settings, Operating.at(knob, top, settings.kv))


@pytest.mark.parametrize("signal", ["entropy", "attention", "complexity"])
def test_decisions_equal_those_of_the_cpu(tiny_llama_factory, ladder, random_ids, device, signal):
    model, ids = tiny_llama_factory(), random_ids(2, TOKENS).cpu()
    plan = percentile_plan(ladder, model, ids, signal)
    on_cpu = run_record(model, plan, ids)
    on_gpu = run_record(model.to(device), plan, ids.to(device))
    for name in ("positions", "opens", "rung", "active", "formats"):
        assert torch.equal(on_cpu[name], on_gpu[name]), name
    for name in ("held", "complexity", "scale"):
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
    settings = Settings(block_tokens=8)
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


def test_prefill_in_blocks_of_one_decides_as_decode_does(tiny_llama_factory, ladder, random_ids, device):
    model, ids = tiny_llama_factory().to(device), random_ids(1, 64)
    settings = Settings(block_tokens=1)
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

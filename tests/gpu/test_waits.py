"""How often a forward waits for the device: once for its counts, and once per block where a rung is decided."""

import warnings

import pytest
import torch

from policy import FULL_KV, ChunkSettings, KVSettings, Operating, PercentilePolicy, Settings
from runtime.plan import RunPlan, static_plan
from runtime.reference.adaptive import activate

pytestmark = pytest.mark.gpu


def waits(call):
    """How many synchronising operations PyTorch sees in `call`."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not every such warning is of a wait: switching the mode on warns once that it is a prototype.
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def deciding(ladder, kv=FULL_KV, budget=0.5, block_tokens=8):
    """Everything at work: signals, chunks of any length, a budget to keep."""
    top = len(ladder.rungs) - 1
    settings = Settings(block_tokens=block_tokens, chunk=ChunkSettings(1, 8), kv=kv)
    operating = Operating.at(top / 2, 1, kv, budget=budget)
    return RunPlan((ladder,), PercentilePolicy(ladder.rungs, "complexity"), settings, operating)


def step(run, cache, ids):
    """One decoded token, with the mask that transformers' loop passes along."""
    mask = torch.ones(len(ids), cache.seen_columns + 1, dtype=torch.long, device=ids.device)
    return waits(lambda: run.forward(ids[:, :1], attention_mask=mask, past_key_values=cache))


@pytest.mark.parametrize("kind", ["ladder", "coded"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_a_decode_step_waits_once_for_its_counts_and_once_for_its_rungs(
    tiny_llama_factory, request, random_ids, device, rows, kind
):
    """Whatever it decodes: directions in few bits are unpacked on the device."""
    ladder = request.getfixturevalue(kind)
    model, ids = tiny_llama_factory().to(device), random_ids(rows, 30)
    for plan, expected in ((static_plan(ladder, 4), 1), (deciding(ladder), 2)):
        with activate(model, plan) as run:
            # what few bits stand for is brought to a device once
            run.gated(
                ids[:, :1], torch.ones_like(ids[:, :1]).bool(), torch.ones(1, 1, len(ladder.rungs), device=device)
            )
            cache = run.new_cache(rows)
            run.forward(ids, past_key_values=cache)
            # over a page's end, where the next page is claimed
            assert {step(run, cache, ids) for _ in range(20)} == {expected}
            # without a mask every column is a token, and there is nothing to wait for
            assert waits(lambda: run.forward(ids[:, :1], past_key_values=cache)) == expected - 1  # noqa: B023


@torch.no_grad()
def test_a_page_that_leaves_the_window_waits_once_more(tiny_llama_factory, ladder, random_ids, device):
    model, ids = tiny_llama_factory().to(device), random_ids(1, 32)
    kv = KVSettings("int8", "int4", sink_pages=0, window_tokens=16)
    with activate(model, deciding(ladder, kv)) as run:
        cache = run.new_cache(1)
        run.forward(ids, past_key_values=cache)
        found = [step(run, cache, ids) for _ in range(32)]
    assert sorted(set(found)) == [2, 3]
    assert found.count(3) == 2, "two pages in 32 tokens"


@torch.no_grad()
def test_a_prompt_waits_once_and_once_per_block_that_decides(tiny_llama_factory, ladder, random_ids, device):
    model, ids = tiny_llama_factory().to(device), random_ids(2, 64)
    mask = torch.ones_like(ids)
    for plan, expected in ((static_plan(ladder, 4), 1), (deciding(ladder), 1 + 8)):
        with activate(model, plan) as run:
            cache = run.new_cache(2)
            found = waits(lambda: run.forward(ids, attention_mask=mask, past_key_values=cache))  # noqa: B023
        assert found == expected

"""What the engine is not asked for in vain: one line says what was expected."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from policy import KVSettings, Operating, PercentilePolicy
from policy.settings import FULL_KV, SignalSettings
from runtime.engine.request import Request
from runtime.engine.serving import Engine
from tests.engine import tiny
from tests.engine.company import CODED, assert_all_is_free, coding

pytestmark = pytest.mark.usefixtures("made")


def refused(call, message, error=ValueError):
    with pytest.raises(error) as found:
        call()
    assert str(found.value).startswith(message), str(found.value)
    assert "\n" not in str(found.value)
    assert "expected" in str(found.value)


def test_requests_that_are_refused(llama, ladders, learned):
    a, b = ladders
    plain = Engine(llama, {"a": a, "b": b}, rows=1, context=20)
    policed = Engine(llama, {"a": a}, policy=coding(learned), rows=1, context=100, pool_bytes=8_000)
    low = Engine(llama, {"a": a}, policy=learned, resident_rung=a.rungs[2], rows=1, context=20)
    own, spent = plain.operating("a"), policed.operating("a", budget=0.3)
    refused(lambda: plain.operating("c"), "adapter: expected one of a, b, got 'c'")
    refused(lambda: plain.operating("a", budget=0.5), "policy: expected one to spend budget=0.5 by")
    refused(lambda: plain.operating("a", rung=3), "rung: expected one of (")
    refused(lambda: policed.operating("a", rung=8), "rung: expected a budget")
    refused(lambda: policed.operating("a", budget=1.5), "budget: expected")
    refused(lambda: low.operating("a", budget=1), "budget: expected less than 1")
    refused(lambda: Request([], own), "request.prompt: expected at least one token id")
    refused(lambda: Request([3, 2.5], own), "request.prompt: expected token ids, got 2.5")
    refused(lambda: Request([True], own), "request.prompt: expected token ids, got True")
    refused(lambda: Request(torch.tensor([3, 4]), own), "request.prompt: expected token ids, got tensor(3)")
    refused(lambda: Request([3], own, max_new_tokens=0), "request.max_new_tokens: expected")
    refused(lambda: Request([3], own, sampling={"top_k": 3}), "request.sampling: expected a Sampling, got {'top_k': 3}")
    refused(lambda: Request([3], own, priority=0.5), "request.priority: expected")
    refused(lambda: Request([3], own, stop="ab"), "request.stop: expected strings")
    refused(lambda: Request([3], own, stop=("",)), "request.stop: expected strings")
    two = Operating.at(torch.zeros(2), torch.zeros(2).long())
    refused(lambda: Request([3], two), "request.operating: expected that of one row, got 2 rows")

    def adding(engine, operating, prompt=(3,), **options):
        return partial(engine.add, Request(list(prompt), operating, **options))

    refused(adding(plain, own, range(3, 13), max_new_tokens=11), "request: expected at most 20 tokens, got 10 and 11")
    one = {"max_new_tokens": 1}
    refused(adding(plain, own, [40], **one), "request.prompt: expected token ids below 40")
    refused(adding(plain, own, [-1], **one), "request.prompt: expected token ids below 40")
    refused(adding(plain, own, max_new_tokens=1, stop=("a",)), "request.stop: expected an engine with a tokenizer")
    refused(adding(plain, plain.operating("a", kv=CODED), **one), "kv: expected pages in the model's own dtype")
    refused(adding(plain, replace(own, adapter=torch.tensor([2])), **one), "adapter: expected a number below 2, got 2")
    moving = replace(own, start_rung=torch.tensor([0]))
    refused(adding(plain, moving, **one), "operating: expected a rung that stays")
    dear = replace(spent, start_rung=torch.tensor([5]))
    refused(adding(policed, dear, **one), "operating: expected a start rung within the budget 0.3, got rung number 5")
    sparse = policed.operating("a", kv=KVSettings(hard="sparse"))
    refused(adding(policed, sparse, **one), "kv: expected pages that the engine keeps, got others: its KV policy makes")
    near = policed.operating("a", kv=KVSettings(window_tokens=0))
    refused(adding(policed, near, **one), "kv: expected pages that the engine keeps, got others: its KV policy keeps a")
    whole = policed.operating("a", kv=FULL_KV)
    refused(adding(policed, whole, [3] * 90, **one), "pool: expected room for", MemoryError)
    with pytest.raises(ValueError, match="below 40"):
        plain.run([Request([3], own, max_new_tokens=1), Request([40], own, max_new_tokens=1)])
    for engine in (plain, policed, low):
        assert_all_is_free(engine)


def test_engines_that_are_refused(llama, ladders, learned, device):
    a, _ = ladders
    engine = partial(Engine, llama, {"a": a})
    refused(lambda: Engine(llama, {}), "adapters: expected at least one by name")
    refused(lambda: engine(rows=0), "rows: expected")
    refused(lambda: engine(rows=129), "rows: expected")
    refused(lambda: engine(context=129), "context: expected at most 128")
    refused(lambda: engine(context=0), "context: expected")
    refused(lambda: engine(part_tokens=0), "part_tokens: expected")
    refused(lambda: engine(context=20, pool_bytes=1000), "pool_bytes: expected at least", MemoryError)
    percentile = replace(learned, policy=PercentilePolicy(learned.policy.rungs, "complexity"))
    cannot = "engine: expected a model and a policy that it covers, got others: "
    refused(lambda: engine(policy=percentile), cannot + "it is of the kind percentile")
    refused(lambda: engine(policy=coding(learned, hard="sparse")), cannot + "its KV policy makes pages sparse")
    far = coding(learned)
    far = replace(far, settings=replace(far.settings, signals=SignalSettings(recent_pages=3)))
    refused(lambda: engine(policy=far), cannot + "its KV policy keeps a window of 16 tokens")
    mistral = tiny.model("mistral", sliding_window=6, device=device)
    own = tiny.ladder(mistral)
    windowed = partial(Engine, mistral, {"a": own}, policy=coding(tiny.checkpoint(mistral, own)))
    refused(windowed, cannot + "its KV policy codes pages, and layers")
    refused(lambda: Engine(tiny.model(device=device).half(), {"a": a}), cannot + "it computes in float16")


def test_an_engine_without_a_gpu_is_refused(llama, ladders, device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("needs a model on the CPU, and kernels run on a GPU here")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"^engine: expected .* is on cpu, and the engine's kernels need a GPU"):
        Engine(llama, {"a": ladders[0]})

"""The engine's greedy tokens in float32 are the reference path's: at fixed rungs, decided, switched at every step."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar

import pytest
import torch
from transformers import LlamaConfig

from policy import LearnedPolicy, Operating, RankPolicy, Settings
from policy.contract import Decision
from runtime import build_ladder, load_adapter
from runtime.engine.decoder import Decoder
from runtime.engine.graph import WARM_UPS
from runtime.generate.fast import FastPath
from runtime.plan import RunPlan, plan_run, static_plan
from runtime.reference.adaptive import activate
from tests.engine import tiny
from tests.engine.tiny import BUDGETS
from tests.gpu.engine.serving import LENGTHS, NEW_TOKENS, asked, endless
from tests.runtime.reference import seeded_model

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """Every decoder that is made, and with which trace where `made.trace` is one."""
    fast = import_module("runtime.generate.fast")

    class Made(list):
        trace: Any = None

    found = Made()

    def make(*args, **kwargs):
        found.append(Decoder(*args, **kwargs, trace=found.trace))
        return found[-1]

    monkeypatch.setattr(fast, "Decoder", make)
    return found


def both(model, plan, lengths, operating=()):
    """New tokens of rows of these lengths and their mean ranks, equal on both paths, of a plan and with other values of
    what its rows may spend: nothing is compiled for those."""
    ids, given = asked(model, lengths)
    found = []
    with activate(model, plan) as run:
        path = FastPath(model, run)
        for own in (plan.operating, *operating):
            run.plan = replace(plan, operating=own)
            pair = []
            for tokens in (lambda: path.generate(ids, given), lambda: model.generate(ids, **given)):
                pair.append((tokens()[:, ids.shape[1] :].tolist(), run.row_mean_rank()))
            assert pair[0][0] == pair[1][0]
            assert pair[0][1] == pytest.approx(pair[1][1], rel=1e-9)
            found.append(pair[0])
    return found


@pytest.mark.parametrize("kind", ["handmade", "svd"])
def test_one_row_at_every_rung(llama, ladders, tiny_adapter, kind):
    ladder = ladders[0] if kind == "handmade" else build_ladder(load_adapter(tiny_adapter), (1, 2, 4))
    plans = [static_plan(ladder, rung) for rung in ladder.rungs]
    found = both(llama, plans[0], LENGTHS[:1], [plan.operating for plan in plans[1:]])
    assert len({tuple(own) for (own,), _ in found}) > len(plans) // 2, "rungs that say the same would prove nothing"


def test_rows_at_rungs_of_adapters_of_their_own(llama, ladders):
    rungs = [ladders[0].rungs[j] for j in (5, 2, 4)]
    plan, swapped = (static_plan(ladders[:2], rungs, numbers) for numbers in ([0, 1, 0], [1, 0, 1]))
    (tokens, ranks), (others, _) = both(llama, plan, LENGTHS, [swapped.operating])
    assert len(set(ranks)) == 3
    assert all(own != other for own, other in zip(tokens, others, strict=True))


def test_every_head_has_keys_of_its_own(device):
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = endless(seeded_model(config)).to(device)
    ladder = tiny.ladder(model)
    both(model, static_plan(ladder, [ladder.rungs[j] for j in (3, 5, 1)], [0] * 3), LENGTHS)


def deciding(adapters, learned, budgets):
    return plan_run(adapters, policy=learned, budget=budgets, model_fingerprint=learned.fingerprints["model"])


def test_one_row_is_decided_for(llama, ladders, learned, made):
    both(llama, deciding([ladders[1]], learned, [0.45]), LENGTHS[:1])
    assert made[0].bucket.decides
    assert len(made[0].rungs[0, : NEW_TOKENS - 1].unique()) > 1


def test_rows_of_budgets_and_adapters_of_their_own_are_decided_for(llama, ladders, learned, made):
    a, b, _ = ladders
    both(llama, deciding([a, b, a], learned, list(BUDGETS)), LENGTHS)
    rungs = made[0].rungs[:3, : NEW_TOKENS - 1]
    assert len(rungs.unique()) >= 3
    assert all(len(own.unique()) > 1 for own in rungs)


class TracePolicy(RankPolicy):
    """Of every row, which the knob names, the rung that a table has for the token's position."""

    kind: ClassVar[str] = "trace"

    def __init__(self, rungs, table):
        super().__init__(rungs)
        self.register_buffer("table", table)

    def decide(self, summary, knob):
        rung = self.table[knob.long(), summary.position.clamp(max=self.table.shape[1] - 1)]
        return Decision(rung, torch.ones(len(rung), len(self.rungs), device=rung.device))

    def knob_range(self):
        return 0.0, float(len(self.table) - 1)


def traced(rows: int, rungs: int, steps: int) -> torch.Tensor:
    """[rows, steps] long: at every step of every row another rung than at the one before."""
    start, stride = torch.arange(rows)[:, None], torch.tensor([1, 5, 2, 3])
    moves = stride[(torch.arange(steps)[None] + start) % 4] * torch.ones(rows, 1, dtype=torch.long)
    trace = (2 * start + moves.cumsum(1)) % rungs
    assert bool((trace.diff(dim=1) != 0).all())
    return trace


@pytest.mark.parametrize("count", [1, 3])
def test_a_trace_that_switches_at_every_step(llama, ladders, made, device, count):
    """Nothing of what was resolved for the step before is read: a trace late by a step gives other tokens."""
    used, rungs, lengths = tuple(ladders[:2]), ladders[0].rungs, LENGTHS[:count]
    ids, options = asked(llama, lengths)
    steps, settings = NEW_TOKENS - 1, Settings(prompt_tokens=4)
    start, adapter = torch.tensor((5, 0, 3)[:count]), torch.arange(count) % 2
    operating = Operating.at(torch.arange(count).float(), start, adapter=adapter)
    trace = traced(count, len(rungs), steps)

    def reference(rungs_of):
        table = torch.zeros(count, max(lengths) + NEW_TOKENS, dtype=torch.long)
        for row, length in enumerate(lengths):
            table[row, length : length + steps] = rungs_of[row]
        with activate(llama, RunPlan(used, TracePolicy(rungs, table), settings, operating)):
            return llama.generate(ids, **options)[:, ids.shape[1] :].tolist()

    made.trace = torch.full((1 if count == 1 else 4, 32), -1, dtype=torch.int16, device=device)
    made.trace[:count, :steps] = trace.to(device, torch.int16)
    with activate(llama, RunPlan(used, LearnedPolicy(rungs), settings, operating)) as run:
        fast = FastPath(llama, run).generate(ids, options)[:, ids.shape[1] :].tolist()
    assert made[0].rungs[:count, :steps].tolist() == trace.tolist()
    assert fast == reference(trace)
    late = torch.cat([start[:, None], trace[:, :-1]], 1)
    assert all(own != other for own, other in zip(fast, reference(late), strict=True))


def test_the_steps_of_a_generation_are_replays(llama, ladders, made, monkeypatch):
    """The host calls the step to warm up and to capture it, and no more."""
    calls = {"step": 0, "run": 0}

    def noted(name, own):
        def call(self):
            calls[name] += 1
            own(self)

        return call

    for name in calls:
        monkeypatch.setattr(Decoder, name, noted(name, getattr(Decoder, name)))
    both(llama, static_plan(ladders[0], [ladders[0].rungs[3]] * 3, [0] * 3), LENGTHS)
    assert len(made) == 1
    assert calls == {"step": WARM_UPS + 1, "run": NEW_TOKENS - 1}

"""A latency budget where the policy's table is of the engine: which bucket it is of, and that the engine serves it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import StoppingCriteria

from policy import LatencyTable, LatencyTables
from runtime import adaptive, generate
from runtime.loading import device_name
from tests.engine import tiny
from tests.engine.tiny import GREEDY, prompts

STEPS = {"batch 1": (4.0, 5.0, 6.0, 7.0, 8.0, 9.0), "batch 4": (20.0, 24.0, 28.0, 32.0, 36.0, 40.0)}
"""Milliseconds of the rungs of `tiny.ladder`."""


@pytest.fixture
def timed(llama, learned):
    """The policy with tables of batches of 1 and 4, its fit gone by the former."""
    here = device_name(llama.device)
    one, four = (
        LatencyTable(here, ms, ms[0] - 1, 0.01, batch, 0.0) for batch, ms in zip((1, 4), STEPS.values(), strict=True)
    )
    return replace(learned, latency=LatencyTables((one, four), 1))


class Never(StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        return False


def spends(llama, ladders, timed, latency_ms, **options) -> list[float]:
    with adaptive(llama, ladders[0], policy=timed, latency_budget_ms=latency_ms, fast=True, **options) as run:
        return run.plan.operating.budget.tolist()


def test_milliseconds_become_the_bytes_of_the_bucket_that_the_rows_are_in(llama, ladders, timed):
    for rung in (1, 3, 4):
        one, four = (ms[rung] for ms in STEPS.values())
        for latency_ms, options in ((one, {}), (one, {"batch": 1}), (four, {"batch": 3}), (four, {"batch": 4})):
            assert spends(llama, ladders, timed, latency_ms, **options) == pytest.approx([timed.cost[rung]])
    by_four = replace(timed, latency=replace(timed.latency, batch=4))
    assert spends(llama, ladders, by_four, 28.0) == pytest.approx([timed.cost[2]]), "the fit's own, unless told"
    with pytest.raises(ValueError, match=r"expected 20.000 to 40.000 ms, the reachable range .* at batch 4, got 6.0"):
        spends(llama, ladders, timed, 6.0, batch=3)


@pytest.mark.parametrize(("rows", "name"), [(1, "batch 1"), (3, "batch 4")])
def test_generate_asks_for_the_bucket_of_its_prompts(llama, ladders, timed, rows, name):
    """One token, of the prompt, which runs at the budget's rung."""
    ids, mask = (own.to(llama.device) for own in prompts(*[5] * rows))
    given = {"attention_mask": mask, "policy": timed, "max_new_tokens": 1, "fast": True, **GREEDY}
    out = generate(llama, ladders[0], ids, latency_budget_ms=STEPS[name][3], **given)
    assert out.path.startswith("fast: ")
    assert out.prompt_mean_rank == pytest.approx(float(ladders[0].mean_rank()[3]))


def test_a_bucket_that_was_not_measured_is_refused(llama, ladders, timed):
    message = r"latency_budget_ms: expected a batch in a bucket that was measured \(1, 4\), got 2 rows; use budget"
    with pytest.raises(ValueError, match=message):
        generate(llama, ladders[0], prompts(5, 5)[0].to(llama.device), policy=timed, latency_budget_ms=6.0, fast=True)


def test_a_run_or_a_call_that_would_go_another_way_is_refused(llama, ladders, timed, learned):
    ids = prompts(5)[0].to(llama.device)
    ask = {"policy": timed, "latency_budget_ms": 6.0, "max_new_tokens": 1, **GREEDY}
    end = "the policy's milliseconds are the engine's; use budget"
    with pytest.raises(ValueError, match=rf"latency_budget_ms: expected a run .*: fast=False; {end}"):
        generate(llama, ladders[0], ids, fast=False, **ask)
    with pytest.raises(ValueError, match=r"fast: expected a call .*: stopping_criteria is asked for; leave fast out"):
        generate(llama, ladders[0], ids, fast=True, stopping_criteria=[Never()], **ask)
    here = device_name(llama.device)
    reference = replace(learned, latency=LatencyTables((LatencyTable(here, STEPS["batch 1"], 3.0, 0.01),)))
    out = generate(llama, ladders[0], ids, **ask | {"policy": reference, "fast": False})
    assert out.path == "reference: fast=False", "a table of the reference path insists on nothing"
    if llama.device.type == "cuda":
        with pytest.raises(ValueError, match=rf"latency_budget_ms: expected a call .*: stopping_criteria .*; {end}"):
            generate(llama, ladders[0], ids, stopping_criteria=[Never()], **ask)


def test_the_tables_are_of_the_rungs_of_the_ladder_that_these_tests_have(llama):
    assert len(tiny.ladder(llama).rungs) == len(STEPS["batch 1"]) == len(STEPS["batch 4"])

"""The recorder serves a policy as in use: decisions of decoding, within its budget."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import record_trace
from benchmarks.traces import load_traces
from policy.settings import FULL_KV, ChunkSettings
from runtime import generate
from runtime.control.bucket import SLACK_TOKENS
from runtime.ladder import save_ladder
from tests.engine import tiny

STEPS = 12


@pytest.fixture(scope="module")
def model():
    return tiny.model(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def fit(model, tmp_path_factory):
    """A fit's output folder, as far as the recorder looks at it."""
    folder = tmp_path_factory.mktemp("fit") / "some"
    ladder = tiny.ladder(model)
    folder.mkdir()
    save_ladder(ladder, folder / "ladder")
    tiny.checkpoint(model, ladder).save(folder / "learned")
    return folder


@pytest.fixture(scope="module")
def opened(model, fit):
    return record_trace.open_plan(model, fit / "ladder", fit / "learned")


def documents(model, count):
    ids, _ = tiny.prompts(*[5 + STEPS] * count)
    return [{"id": str(row), "input_ids": ids[row].tolist(), "prompt_tokens": 5} for row in range(count)]


def test_rungs_are_those_of_decoding(model, opened):
    checkpoint, plan = opened
    # Prompts too go token by token, and pages are kept as they are.
    checkpoint = replace(checkpoint, settings=replace(checkpoint.settings, prompt_tokens=1, kv=FULL_KV))
    prompt, mask = tiny.prompts(5, 5)
    budget = tiny.BUDGETS[1]
    out = generate(
        model, plan.ladder, prompt, attention_mask=mask, policy=checkpoint, budget=budget, max_new_tokens=STEPS,
        do_sample=False, return_trace=True, fast=False, eos_token_id=None,
    )  # fmt: skip
    texts = [{"id": "0", "input_ids": row.tolist(), "prompt_tokens": 5} for row in out.sequences]
    found = record_trace.chosen(model, checkpoint, plan, texts, budget)
    for row, trace in zip(found, out.trace, strict=True):
        by_token = {chunk.start + i: chunk.rung for chunk in trace for i in range(chunk.length)}
        # The last token is never processed while it is generated.
        assert row[:-1] == [by_token[5 + i] for i in range(STEPS - 1)]


def test_budgets_are_kept_and_rungs_move(model, opened):
    checkpoint, plan = opened
    cost = dict(zip(plan.ladder.rungs, checkpoint.cost, strict=True))
    for budget in tiny.BUDGETS[1:]:
        found = record_trace.chosen(model, checkpoint, plan, documents(model, 3), budget)
        assert [len(row) for row in found] == [STEPS] * 3
        assert all(sum(cost[rung] for rung in row) <= budget * (STEPS + SLACK_TOKENS) for row in found)
    assert len({rung for row in found for rung in row}) > 1


def test_the_command_writes_what_decode_reads(model, fit, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record_trace, "load_model", lambda *args, **kwargs: model)
    monkeypatch.setattr(record_trace, "held_out", lambda dataset, name, rows, steps, most: documents(model, rows))
    output = tmp_path / "trace.json"
    rung = str(tiny.ladder(model).rungs[1])
    flags = ("--fit", fit, "--rows", 3, "--steps", STEPS, "--max-tokens", 40, "--around", rung, "--output", output)
    monkeypatch.setattr("sys.argv", ["record_trace", *map(str, flags)])
    record_trace.main()
    (trace,) = load_traces(output)
    assert (trace.adapter, trace.around, len(trace.rungs)) == ("some", float(rung), 3)
    record = json.loads(output.read_text())
    assert record["policy"]["kind"] == "learned"
    assert record["documents"] == ["0", "1", "2"]
    assert record["traces"][0]["mean_rank"] == pytest.approx(trace.mean_rank)
    assert f"rung {rung}" in capsys.readouterr().out


def test_a_policy_that_the_engine_does_not_cover_is_refused(model, fit, tmp_path):
    ladder = tiny.ladder(model)
    tiny.checkpoint(model, ladder, fade_tokens=4, chunk=ChunkSettings(4, 8)).save(tmp_path / "learned")
    with pytest.raises(ValueError, match="--fit: expected one of a learned policy that the engine covers, got one"):
        record_trace.open_plan(model, fit / "ladder", tmp_path / "learned")

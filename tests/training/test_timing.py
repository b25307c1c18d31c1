"""A fit that is given a table of latency: which milliseconds every stage is handed, and what is refused."""

import dataclasses
import functools
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from policy import LatencyTable, PolicyCheckpoint
from policy.measured import MeasuredCost
from runtime import build_ladder, generate, load_adapter, load_model, load_tokenizer, save_ladder
from runtime.fingerprint import model_fingerprint
from runtime.loading import device_name
from training import fit as fit_module
from training.fit import main

HERE = device_name(torch.device("cpu"))
ONE = LatencyTable(HERE, (4.0, 5.0, 8.0), 3.0, 0.01, 1, 0.25)
MANY = LatencyTable(HERE, (31.0, 38.0, 40.0), 30.0, 0.02, 32, 0.75)
SHARES = {1: (0.2, 0.4, 1.0), 32: (0.1, 0.8, 1.0)}
"""Of the milliseconds that the adapter adds, rung by rung."""
SHORT = {
    "amounts.train_documents": 4, "amounts.validation_documents": 2, "amounts.test_documents": 3, "amounts.epochs": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def ladder(case):
    """Rungs 2, 4 and 8."""
    return build_ladder(load_adapter(case.adapter), [2, 4])


@pytest.fixture(scope="module")
def cost(case, ladder):
    model = load_model(case.model, device=torch.device("cpu"))
    return MeasuredCost(
        model_fingerprint(model), ladder.adapter, ladder.fingerprint, "bfloat16", ladder.rungs, 512, 4, (ONE, MANY)
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(ladder, cost, tmp_path_factory):
    """Where a user keeps a ladder and its table."""
    folder = tmp_path_factory.mktemp("timed")
    save_ladder(ladder, folder / "ladder")
    cost.save(folder / "table.json")
    return folder


def not_called(*_, **__):
    raise AssertionError("nothing is measured where there is a table")


@pytest.fixture(scope="module", params=[None, 32], ids=["the smallest", "batch 32"])
def timed(request, case, folder, tmp_path_factory):
    """What a fit handed to its stages, its output, its table and what it says."""
    output, handed, lines = tmp_path_factory.mktemp("fit") / "out", {}, []

    def noted(name, position, own):
        @functools.wraps(own)
        def stage(*args, **kwargs):
            handed[name] = args[position]
            return own(*args, **kwargs)

        return stage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "measure_latency", not_called)
        patch.setattr("training.summary.measure_controller", not_called)
        for name, position in (("train_policies", 3), ("timing_of", 4), ("candidates", 5), ("summarise", 5)):
            patch.setattr(fit_module, name, noted(name, position, getattr(fit_module, name)))
        judge = fit_module.judge
        patch.setattr(
            fit_module, "judge", lambda *a, timing, **kw: handed.update(judge=timing) or judge(*a, timing=timing, **kw)
        )
        patch.setattr(fit_module, "_say", lines.append)
        given = {"adapter": folder / "ladder", "latency": folder / "table.json", "objective": "latency", **SHORT}
        main(case.arguments(output, latency_batch=request.param, **given))
    return handed, output, MANY if request.param else ONE, lines


def test_every_stage_is_handed_the_bucket_asked_for(timed):
    handed, _, table, _ = timed
    assert handed["train_policies"] == handed["timing_of"] == handed["summarise"] == table
    assert handed["candidates"].buckets == (ONE, MANY)
    assert handed["candidates"].chosen == table
    assert handed["judge"].rung_ms.tolist() == list(table.ms)
    assert handed["judge"].controller_ms == table.controller_ms


def test_the_exported_policy_carries_all_buckets_and_its_milliseconds_are_those_of_the_fit(timed):
    _, output, table, _ = timed
    for name in ("policy", "learned"):
        saved = PolicyCheckpoint.load(output / name)
        assert (saved.latency.buckets, saved.latency.batch) == ((ONE, MANY), table.batch)
        assert saved.cost == (0.25, 0.5, 1.0), "budgets are shares of bytes"
        assert saved.budget_for(latency_budget_ms=table.ms[1]) == 0.5
        assert (
            saved.budget_for(latency_budget_ms=38.0, rows=20) == saved.budget_for(latency_budget_ms=5.0, rows=1) == 0.5
        )
    assert saved.policy.cost.tolist() == pytest.approx(SHARES[table.batch]), "which lambda is a price of"


def test_reports_are_over_the_milliseconds_of_the_bucket(timed):
    _, output, table, _ = timed
    summary = json.loads((output / "summary.json").read_text())
    assert summary["latency"] == json.loads(json.dumps(dataclasses.asdict(table))) | {"resolved": True}
    assert [row["latency_ms"] for row in summary["curves"]["fixed"]] == pytest.approx(table.ms[:2])
    for row in summary["curves"]["learned"]:
        assert table.ms[0] <= row["latency_ms"] <= table.ms[-1]
    assert summary["operating_point"]["latency_ms"] is not None
    assert set(EventAccumulator(str(output)).Reload().Tags()["images"]) == {"compare/tradeoff", "compare/latency"}
    assert not (output / "latency.json").exists(), "that is what a fit measures itself"


def test_it_is_said_which_bucket_that_is(timed, folder):
    _, _, table, lines = timed
    (line,) = [line for line in lines if line.startswith("latency of")]
    low, high, base, spread = table.ms[0], table.ms[-1], table.ms_base, table.spread_ms
    assert line == (
        f"latency of {folder / 'table.json'}: {HERE} at batch {table.batch} (of 1, 32), bfloat16, context 512: "
        f"{base:.3f} ms without adapter, {low:.3f} to {high:.3f} with it, +- {spread:.3f}: "
        "rungs differ by more than noise"
    )


def test_the_engines_milliseconds_are_of_the_engine_alone(timed, folder, case):
    """What goes another way is refused, and so are a bucket that is not there and what no rung reaches."""
    _, output, _, _ = timed
    model, tokenizer = load_model(case.model, device=torch.device("cpu")), load_tokenizer(case.model)
    ask = functools.partial(
        generate, model, folder / "ladder", policy=output / "policy", tokenizer=tokenizer, max_new_tokens=2
    )
    with pytest.raises(ValueError, match=r"latency_budget_ms: expected a run that the engine covers, got one"):
        ask("Say: the rank", latency_budget_ms=5.0, fast=False)
    with pytest.raises(ValueError, match=r"in a bucket that was measured \(1, 32\), got 3 rows; use budget"):
        ask(["Say: the rank"] * 3, latency_budget_ms=5.0)
    with pytest.raises(ValueError, match=rf"4.000 to 8.000 ms, the reachable range on {HERE} at batch 1, got 31"):
        ask("Say: the rank", latency_budget_ms=31.0)
    with pytest.raises(ValueError, match=rf"31.000 to 40.000 ms, the reachable range on {HERE} at batch 32, got 5"):
        ask(["Say: the rank"] * 32, latency_budget_ms=5.0)
    assert ask("Say: the rank", budget=0.5).mean_rank <= 4.01, "a budget goes any way"


def refusal(case, output, capsys, **changes) -> str:
    with pytest.raises(SystemExit) as caught:
        main(case.arguments(output, **SHORT, **changes))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("text", "changes", "says"),
    [
        ("oops", {}, "table.json: expected JSON, got"),
        ("{}", {}, "table.json: model: expected text"),
        ("", {"latency": "/nowhere.json"}, "latency: expected a file, got /nowhere.json, which is none; measure it"),
        (None, {"latency_batch": 8}, "latency_batch: expected one that was measured (1, 32), got 8; take one of them"),
        (
            None,
            {"latency": None, "latency_batch": 8},
            "latency_batch: expected --latency with it, got 8 alone; add it",
        ),
        ({"adapter": "0" * 16}, {}, "latency: expected the adapter of this fit, fingerprint "),
        ({"model": "0" * 16}, {}, "latency: expected the model of this fit, fingerprint "),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_anything_is_written(
    text, changes, says, case, folder, cost, tmp_path, capsys
):
    path, output = tmp_path / "table.json", tmp_path / "runs" / "out"
    if isinstance(text, str):
        path.write_text(text)
    else:
        dataclasses.replace(cost, **(text or {})).save(path)
    line = refusal(case, output, capsys, **{"adapter": folder / "ladder", "latency": path, **changes})
    assert says in line
    assert not output.parent.exists()


def test_a_table_of_another_ladder_is_refused(case, folder, cost, tmp_path, capsys):
    """The adapter's own, but of other rungs, or of the same rungs in other bits."""
    given = {"adapter": folder / "ladder", "latency": folder / "table.json"}
    line = refusal(case, tmp_path / "one", capsys, **given, rungs="[2]")
    assert (
        "latency: expected rungs (2, 8), got the table of (2, 4, 8); measure the folder `ladder` that the fit" in line
    )
    dataclasses.replace(cost, ladder="0" * 16).save(tmp_path / "other.json")
    line = refusal(case, tmp_path / "two", capsys, **given | {"latency": tmp_path / "other.json"})
    assert "latency: expected the ladder of this fit, fingerprint " in line
    assert (tmp_path / "two" / "ladder").is_dir(), "to be measured"

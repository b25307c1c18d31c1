"""`python -m training.fit` as a user meets it: what it writes, what it reuses and how it survives."""

import csv
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from policy import SIGNALS, ChunkSettings, KVSettings, LatencyTable, PolicyCheckpoint, SignalSettings
from policy.rungs import rungs_of_rank
from policy.settings import SIGNAL_SETS
from runtime import generate, load_ladder, load_model, load_tokenizer
from tests.training.fitting import POLICIES, RUNGS, SHORT, summary_of
from training import fit as fit_module
from training import pipeline
from training.amounts import Amounts
from training.compare.tradeoff import flat
from training.compare.verdict import MEASURABLE_NATS
from training.fit import main

ROOT = Path(__file__).resolve().parents[2]
READ = [0.5, 0.75, 1]
CHANGES = {"amounts.shard_documents": 1, "amounts.epochs": 6}
UNRESOLVED = LatencyTable("here", (1.0,) * len(RUNGS), 1.0, 1.0)
"""Of a clock that tells no rungs apart: what a fit exports does not hang on how fast the machine is just now."""


@pytest.fixture(scope="module")
def fitted(case, tmp_path_factory) -> Path:
    """Output of one uninterrupted fit."""
    output = tmp_path_factory.mktemp("fit") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "measure_latency", lambda *_: UNRESOLVED)
        main(case.arguments(output, **CHANGES))
    return output


def without_latency(curves: dict) -> dict:
    return {
        name: [{key: value for key, value in row.items() if key != "latency_ms"} for row in rows]
        for name, rows in curves.items()
    }


def shards(output: Path) -> dict[str, int]:
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob("shard-*.safetensors")}


def test_the_output_folder_holds_what_was_promised_and_no_scratch_files(fitted):
    names = {path.name for path in fitted.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert events
    assert names - events <= {
        "summary.json", "policy", "learned", "tradeoff.csv", "tradeoff.png", "targets", "checkpoints", "latency.json",
        "hparams.yaml", "round-0", "round-1", "ladder",
    }  # fmt: skip
    assert {"summary.json", "policy", "tradeoff.csv", "tradeoff.png", "targets"} <= names
    assert not [path for path in fitted.rglob("*") if path.name.startswith(".") or path.suffix in (".pt", ".ckpt")]
    assert (fitted / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_has_every_key_and_only_finite_numbers(fitted, case):
    summary = summary_of(fitted)
    keys = {"model", "adapter", "ladder", "rungs", "versions", "seed", "curves", "area", "headroom", "captured"}
    assert keys | {"exported"} <= summary.keys()
    assert (summary["model"], summary["adapter"]) == (str(case.model), str(case.adapter))
    assert summary["rungs"] == RUNGS
    assert summary["compared_at"] == READ
    assert {"torch", "lightning", "transformers"} <= summary["versions"].keys()
    assert tuple(summary["curves"]) == (*POLICIES, "svd")
    assert tuple(summary["area"]) == tuple(summary["kl_at"]) == tuple(summary["over_fixed"]["kl"]) == POLICIES
    ranks = summary["over_fixed"]["mean_rank"]
    for name, rows in summary["curves"].items():
        aims = [row["aimed_at"] for row in rows]
        if name in ("fixed", "svd"):
            assert len(rows) == (4 if name == "svd" else 8), "every rung but the top, which is exact"
        elif name == "oracle":
            assert aims == [ranks[RUNGS.index(rung)] for rung in READ]
        else:
            # Where it is out of reach on validation documents, a policy has no point.
            among = ranks if name in ("learned", "capped") else [ranks[RUNGS.index(rung)] for rung in READ]
            assert aims == sorted({*aims} & {*among})
        for row in rows:
            assert {"mean_rank", "kl"} <= row.keys()
            assert "latency_ms" not in row, "the clock does not tell"
            assert all(math.isfinite(value) for value in row.values())
            assert 0.2 <= row["mean_rank"] <= 8
            assert row["kl"] >= 0
            assert ("log_lambda" in row) == (name in ("learned", "capped"))
    assert [row["aimed_at"] for row in summary["curves"]["capped"]] == [
        row["aimed_at"] for row in summary["curves"]["learned"]
    ]
    low, high = summary["headroom"]["interval_95"]
    assert low <= summary["headroom"]["nats"] <= high
    captured = summary["captured"]
    assert (captured["share"] is None) == (captured["interval_95"] is None) == (low <= MEASURABLE_NATS)
    assert summary["exported"] in ("learned", "fixed")
    assert summary["net_ms"] is summary["operating_point"]["latency_ms"] is None
    assert not summary["latency"]["resolved"]


def test_the_summary_has_the_oracles_by_table_blocks_and_seeds(fitted):
    summary = summary_of(fitted)
    by_table = summary["oracle_by_table"]
    assert list(by_table) == ["chunks of 1", "chunks of 4", "chunks of 16"]
    fixed = [summary["over_fixed"]["kl"]["fixed"][RUNGS.index(rung)] for rung in READ]
    for finer, coarser in itertools.pairwise([*by_table.values(), fixed]):
        assert all(0 < one <= other * 1.01 for one, other in zip(finer, coarser, strict=True))
    ranks = summary["over_fixed"]["mean_rank"]
    names = {f"{ranks[RUNGS.index(rung)]:g}" for rung in READ}
    for served in (summary["in_blocks"], summary["in_steps"]):
        assert served
        assert served.keys() <= names
        for own in served.values():
            low, high = own["interval_95"]
            assert low <= own["bytes_saved"] <= high
            assert own["kl"] > 0 < own["kl_fixed"]
    (seed,) = summary["seeds"]
    rows = summary["curves"]["learned"]
    assert [(own["mean_rank"], own["kl"]) for own in seed] == [(row["mean_rank"], row["kl"]) for row in rows]
    saved, every = summary["bytes_saved"], summary["over_fixed"]["bytes_saved"]["learned"]
    assert saved["interval_95"][0] <= saved["ratio"] <= saved["interval_95"][1]
    mine = [every[RUNGS.index(rung)]["ratio"] for rung in summary["compared_at"]]
    assert saved["ratio"] == pytest.approx(np.mean(mine))
    assert summary["signals"] == list(SIGNAL_SETS["default"])
    assert summary["objective"] == "damage"


def test_measured_points_spend_about_what_they_were_aimed_at(fitted):
    """Knobs are set to 1 % on validation documents; test documents are others, a few in this case."""
    curves = summary_of(fitted)["curves"]
    for name in ("percentile", "learned", "random"):
        for row in curves[name]:
            assert row["mean_rank"] == pytest.approx(row["aimed_at"], rel=0.2), name


def test_the_summary_says_what_the_ladder_is_and_what_it_is_worth(fitted):
    summary, saved = summary_of(fitted), load_ladder(fitted / "ladder")
    ladder = summary["ladder"]
    assert (ladder["kind"], saved.kind) == ("mixed", "mixed")
    assert ladder["bytes"] == saved.rung_bytes().tolist()
    assert ladder["lost_energy"] == sorted(ladder["lost_energy"], reverse=True)
    svd, fixed = summary["curves"]["svd"], summary["curves"]["fixed"]
    assert [row["mean_rank"] for row in svd] == pytest.approx([1, 2, 3, 4])
    assert all(svd[i]["kl"] > svd[i + 1]["kl"] for i in range(3))
    for own in ladder["over_svd"]:
        reached = np.interp(
            own["reached_at"], [row["mean_rank"] for row in fixed], np.log([row["kl"] for row in fixed])
        )
        assert own["at_least"] or np.exp(reached) == pytest.approx(own["kl"], rel=1e-6)
        assert own["fewer_bytes"] == pytest.approx(own["rank"] / own["reached_at"])
    at = next(own for own in ladder["over_svd"] if own["rank"] == pytest.approx(2))
    assert ladder["fewer_bytes"] == at["fewer_bytes"] > 1
    assert ladder["worth"].startswith(f"KL of svd at rank 2 ({at['kl']:.2g}) is reached by the mixed ladder at rank ")


def test_no_policys_prompt_runs_above_the_baselines(fitted):
    curves = summary_of(fitted)["curves"]
    for name in POLICIES:
        fixed = {row["aimed_at"]: row["prompt_mean_rank"] for row in curves["fixed"]}
        for row in curves[name]:
            assert row["prompt_mean_rank"] <= fixed[row["aimed_at"]] + 1e-6


def test_the_csv_repeats_the_curves(fitted):
    with (fitted / "tradeoff.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves = summary_of(fitted)["curves"]
    expected = [(name, row["mean_rank"], row["kl"]) for name, points in curves.items() for row in points]
    assert [(row["policy"], float(row["mean_rank"]), float(row["kl"])) for row in rows] == expected


def test_the_policy_loads_and_serves(fitted, case):
    checkpoint = PolicyCheckpoint.load(fitted / "policy")
    assert checkpoint.policy.kind == summary_of(fitted)["exported"]
    model, tokenizer = load_model(case.model, device=torch.device("cpu")), load_tokenizer(case.model)
    arguments = {"policy": fitted / "policy", "tokenizer": tokenizer, "max_new_tokens": 8, "do_sample": False}
    for budget in (None, 0.25, 0.5, 1.0):
        found = generate(model, fitted / "ladder", "Say: the rank of a page", budget=budget, **arguments)
        assert 1 <= found.tokens[0] <= 8
        assert 0.2 <= found.mean_rank <= 8
    assert found.mean_rank == 8
    with pytest.raises(ValueError, match="pass the folder `ladder` that the fit wrote beside the policy as --adapter"):
        generate(model, case.adapter, "Say: the rank of a page", **arguments)


def test_tensorboard_shows_training_the_tradeoff_and_what_to_compare_runs_by(fitted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    scalars, images, hparams = {}, set(), {}
    for folder in {path.parent for path in fitted.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(folder)).Reload()
        found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        scalars |= {tag: values for tag, values in found.items() if len(values) >= len(scalars.get(tag, ()))}
        images |= set(events.Tags()["images"])
        if "_hparams_/session_start_info" in events.summary_metadata:
            content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
            hparams |= dict(HParamsPluginData.FromString(content).session_start_info.hparams)
    for stage in ("train", "eval"):
        for name in ("loss", "kl", "mean_rank", "latency_ms"):
            assert len(scalars[f"{stage}/{name}"]) == CHANGES["amounts.epochs"], "one value an epoch"
    assert images == {"compare/tradeoff"}
    # Cards are sorted by tag, and the first two groups are open: the figure, and how validation went.
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in sorted({*images, *scalars})))
    assert groups == ["compare", "eval", "hp", "tradeoff", "train"]
    over_fixed = summary_of(fitted)["over_fixed"]
    percent = [3, 6, 9, 12, 19, 25, 38, 50]  # of the adapter's bytes, and a rung of theirs is a little below its name
    for name in POLICIES[1:]:
        shown = [(event.step, event.value) for event in scalars[f"tradeoff/{name}_over_fixed"]]
        found = zip(percent, over_fixed["at_rank"][name], strict=True)
        expected = [(step, ratio["ratio"]) for step, ratio in found if ratio is not None]
        assert [value for _, value in shown] == pytest.approx([value for _, value in expected])
        assert [step for step, _ in shown] == pytest.approx([step for step, _ in expected], abs=1)
    worth = summary_of(fitted)["ladder"]
    shown = [(event.step, event.value) for event in scalars["tradeoff/svd_bytes_over_ladder"]]
    assert shown == [(round(100 * own["share"]), pytest.approx(own["fewer_bytes"])) for own in worth["over_svd"]]
    assert scalars["hp/svd_bytes_over_ladder"][0].value == pytest.approx(worth["fewer_bytes"])
    hp = {"hp/quality", "hp/headroom", "hp/bytes_saved", "hp/learned_over_fixed", "hp/learned_kl_at_1"}
    assert hp <= scalars.keys()
    assert ("hp/captured" in scalars) == (summary_of(fitted)["captured"]["share"] is not None)
    assert "hp/latency" not in scalars, "the clock does not tell"
    assert scalars["hp/learned_over_fixed"][0].value == pytest.approx(over_fixed["compared"]["learned"]["ratio"])
    every = {
        "model",
        "adapter",
        "dataset",
        "seed",
        "ladder",
        "rungs",
        "block_tokens",
        "fade_tokens",
        "objective",
        "signals",
        "settings.dtype",
        "settings.prompt_tokens",
    }
    for name, settings in (
        ("amounts", Amounts),
        ("signals", SignalSettings),
        ("chunk", ChunkSettings),
        ("kv", KVSettings),
    ):
        every |= {f"settings.{name}.{field.name}" for field in fields(settings)}
    every -= {"settings.chunk.weights"}
    every |= {f"settings.chunk.weights.{signal}" for signal in SIGNALS}
    assert hparams.keys() == every
    assert hparams["settings.amounts.epochs"].number_value == CHANGES["amounts.epochs"]
    assert hparams["rungs"].string_value == str(RUNGS)
    assert hparams["ladder"].string_value == "mixed"
    assert hparams["objective"].string_value == "damage"
    assert hparams["signals"].string_value == str([*SIGNAL_SETS["default"]])


def test_a_second_run_reuses_ladder_and_shards_and_ends_the_same(fitted, case, capsys, monkeypatch):
    before, first = shards(fitted), summary_of(fitted)
    monkeypatch.setattr(pipeline, "build", None)  # not called
    main(case.arguments(fitted, **CHANGES))
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[fit]")]
    assert f" {first['ladder']['worth']}. " in " ".join(" ".join(printed).split())
    assert f"--adapter {fitted / 'ladder'} --policy {fitted / 'policy'} " in printed[printed.index("serve it:") + 1]
    # commands stay on one line, to be copied
    assert max(map(len, printed[: printed.index("serve it:")])) <= 80
    assert f" {first['verdict']}. " in " ".join(" ".join(printed).split()), "whole words"
    assert shards(fitted) == before, "no shard written again, none added"
    # The latency table was kept, so that even milliseconds are the same.
    for key in (
        "curves",
        "area",
        "headroom",
        "captured",
        "exported",
        "kl_at",
        "ladder",
        "bytes_saved",
        "in_blocks",
        "in_steps",
    ):
        assert summary_of(fitted)[key] == first[key], key


def keep_clock(fitted: Path, output: Path) -> None:
    """A fit into this folder finds the time of every rung measured, and so exports the same."""
    output.mkdir()
    shutil.copy(fitted / "latency.json", output)


def finish_line(output: Path, stage: str) -> bool:
    """Whether a running fit has got to `stage`."""
    if stage == "targets":
        return any(output.glob("targets/tables-*/shard-00002.json"))
    return any(output.glob("checkpoints/round-1-*/last/checkpoint.json"))


STOPPED = "; the same command goes on where it stopped\n"


@pytest.mark.parametrize(
    ("stage", "number", "status", "says"),
    [
        ("targets", signal.SIGKILL, -signal.SIGKILL, ""),
        ("targets", signal.SIGTERM, 143, f"terminated{STOPPED}"),
        ("targets", signal.SIGINT, 130, f"interrupted{STOPPED}"),
        ("training", signal.SIGTERM, 143, f"terminated{STOPPED}"),
    ],
    ids=["targets-kill", "targets-term", "targets-int", "training-term"],
)
def test_stopped_half_way_and_run_again_it_ends_as_if_nothing_had_happened(
    fitted, case, tmp_path, stage, number, status, says
):
    arguments = case.arguments(tmp_path / "out", **CHANGES)
    keep_clock(fitted, tmp_path / "out")
    # Sums in fp32 depend on the number of threads. Coverage is left out: stopped inside its tracer, it holds a lock of
    # its own for ever.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    process = subprocess.Popen(
        [sys.executable, "-m", "training.fit", *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not finish_line(tmp_path / "out", stage) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    sent = time.monotonic()
    _, errors = process.communicate()
    assert time.monotonic() - sent < 5
    assert (process.returncode, errors.decode()) == (status, says)
    assert not (tmp_path / "out" / "summary.json").exists()
    left = shards(tmp_path / "out")
    assert 0 < len(left) < len(shards(fitted))

    main(arguments)
    whole = [path for path in left if (tmp_path / "out" / path).with_suffix(".json").exists()]
    after = shards(tmp_path / "out")
    assert after.keys() == shards(fitted).keys(), "same names: nothing depends on where it was killed"
    assert sum(after[path] == left[path] for path in whole) >= len(left) - 1, "at most the last shard is made again"
    resumed, uninterrupted = summary_of(tmp_path / "out"), summary_of(fitted)
    assert without_latency(resumed["curves"]) == without_latency(uninterrupted["curves"])
    for key in (
        "area",
        "headroom",
        "captured",
        "exported",
        "kl_at",
        "bytes_saved",
        "oracle_by_table",
        "in_blocks",
        "in_steps",
        "seeds",
    ):
        assert resumed[key] == uninterrupted[key], key


def test_two_adapters_make_a_policy_that_both_share(case, make_peft_adapter, tiny_llama_factory, tmp_path):
    """Of ranks 8 and 16, on the same documents: the rungs are the same shares, and either adapter is served."""
    wide = make_peft_adapter(tiny_llama_factory, tmp_path / "wide", r=16, alpha=64, seed=2)
    output = tmp_path / "out"
    main(case.arguments(output, adapter=f"[{case.adapter},{wide}]", **{"amounts.train_documents": 4}))
    summary, saved = summary_of(output), PolicyCheckpoint.load(output / "policy")
    assert summary["adapter"] == [str(case.adapter), str(wide)]
    assert summary["documents"] == {"train": 8, "validation": 8, "test": 12}
    assert saved.fingerprints["shared"]
    assert [load_ladder(output / f"ladder-{n}").rungs for n in (0, 1)] == [rungs_of_rank(8), rungs_of_rank(16)]
    assert [row["mean_rank"] for row in summary["curves"]["svd"]] == pytest.approx([1, 2, 3, 4])
    model, tokenizer = load_model(case.model, device=torch.device("cpu")), load_tokenizer(case.model)
    found = generate(
        model, [output / "ladder-0", output / "ladder-1"], ["Say: the rank", "Say: a page"], policy=saved,
        budget=[1.0, 1.0], tokenizer=tokenizer, max_new_tokens=6, min_new_tokens=6, do_sample=False,
    )  # fmt: skip
    assert found.row_mean_rank == [8, 16]


@pytest.mark.slow
def test_two_processes_end_where_one_does(fitted, case, tmp_path):
    flags = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    keep_clock(fitted, tmp_path / "out")
    process = subprocess.run(
        [sys.executable, "-m", "training.fit", *case.arguments(tmp_path / "out", **CHANGES), *flags],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    two, one = summary_of(tmp_path / "out"), summary_of(fitted)
    assert without_latency(two["curves"]) == without_latency(one["curves"])
    assert len(PolicyCheckpoint.load(tmp_path / "out" / "policy").cost) == len(two["rungs"])


def test_where_the_clock_tells_rungs_apart_time_is_written_down_and_judged(case, tmp_path, monkeypatch):
    """Rungs of 1 to 9 ms: nothing that choosing saves makes up for deciding that takes 50 ms a step."""
    table = LatencyTable("here", tuple(float(n) for n in range(1, 10)), 0.5, 0.1)
    monkeypatch.setattr(fit_module, "measure_latency", lambda *_: table)
    monkeypatch.setattr("training.summary.measure_controller", lambda *_: 50.0)
    output = tmp_path / "out"
    main(case.arguments(output, **SHORT))
    summary = summary_of(output)
    assert summary["latency"]["resolved"]
    for name, rows in summary["curves"].items():
        assert all(("latency_ms" in row) == (name != "svd") for row in rows)
    assert [row["latency_ms"] for row in summary["curves"]["fixed"]] == pytest.approx(range(1, 9))
    assert summary["operating_point"]["latency_ms"] in [row["latency_ms"] for row in summary["curves"]["fixed"]]
    assert -60 < summary["net_ms"] < -40
    assert summary["exported"] == "fixed"


def test_several_seeds_are_several_policies_and_the_first_is_the_one_to_serve(case, tmp_path):
    """The interval is over them as well; the others are measured where the verdict is read."""
    output = tmp_path / "out"
    main(case.arguments(output, **{**SHORT, "amounts.seeds": 2}))
    summary = summary_of(output)
    first, second = summary["seeds"]
    assert {own["rung"] for own in second} <= {RUNGS.index(rung) for rung in READ}
    rows = summary["curves"]["learned"]
    assert [(own["mean_rank"], own["kl"]) for own in first] == [(row["mean_rank"], row["kl"]) for row in rows]
    both = {own["rung"]: own["kl"] for own in first if own["rung"] in [other["rung"] for other in second]}
    assert any(own["kl"] != both[own["rung"]] for own in second if own["rung"] in both), "another policy"
    assert len(list((output / "checkpoints").glob("seed-1-round-0-*"))) == 1


def test_settings_become_flat_parameters():
    nested = {"seed": 0, "rungs": [2, 4], "policy": None, "kv": {"easy": "int4", "deep": {"share": 0.5}}}
    expected = {"seed": 0, "rungs": "[2, 4]", "policy": "None", "kv.easy": "int4", "kv.deep.share": 0.5}
    assert flat(nested) == expected

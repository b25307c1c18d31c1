"""`python -m runtime.generate`: streams, ends in one JSON line, and in one line for every mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from policy import ChunkSettings, Fingerprints, KnobCurve, KVSettings, PercentilePolicy, PolicyCheckpoint, Settings
from runtime import build_ladder, load_adapter, load_ladder, load_model, load_tokenizer, save_ladder
from runtime.fingerprint import adapter_fingerprint, model_fingerprint
from runtime.generate.__main__ import main
from runtime.ladder.adapter import WEIGHTS_NAME
from tests.runtime.reference import handmade_ladder

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "text", "path", "tokens", "ms_per_token", "mean_rank", "adapter_bytes", "adapter_share", "kv_bytes",
    "kv_bytes_full", "kv_bytes_allocated", "chunks",
}  # fmt: skip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Else `--fast` is refused: the command's model is not on a GPU."""
PATH = "path: reference: the model is on cpu, and the engine's kernels need a GPU\n"


@pytest.fixture(scope="module")
def policy(stories_path, stories_adapter, load_model, tmp_path_factory):
    adapter = load_adapter(stories_adapter)
    ladder = build_ladder(adapter, (2, 4, 8))
    settings = Settings(
        block_tokens=4, prompt_tokens=4, chunk=ChunkSettings(2, 6), kv=KVSettings(sink_pages=1, window_tokens=0)
    )
    prints = Fingerprints(
        model=model_fingerprint(load_model(stories_path)),
        adapter=adapter_fingerprint(adapter),
        ladder=ladder.fingerprint,
        shared=False,
    )
    folder = tmp_path_factory.mktemp("policies") / "policy"
    curve = KnobCurve((0.3, 0.6, 1.0), (0.0, 1.0, 2.0))
    policy = PercentilePolicy(ladder.rungs, "complexity")
    PolicyCheckpoint(policy, settings, curve, (0.25, 0.5, 1.0), prints, 0.6).save(folder)
    return folder


@pytest.fixture
def command(stories_path, stories_adapter, monkeypatch, capsys):
    """`command(*more, model=..., adapter=...)`: runs the command in this process; (exit status, stdout, stderr)."""

    def run(*more, model=stories_path, adapter=stories_adapter):
        arguments = ["--model", model, "--adapter", adapter, "--prompt", "Once upon a time", "--max-new-tokens", "40"]
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, [*arguments, *more])])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_json_line_ends_the_stream(command, policy):
    status, out, err = command("--policy", policy, "--json")
    assert (status, err) == (0, PATH)
    *streamed, last = out.splitlines()
    result = json.loads(last)
    assert set(result) == KEYS
    assert f"path: {result['path']}\n" == PATH
    assert "\n".join(streamed).strip() == result["text"].strip()
    assert result["tokens"] == 40
    assert result["ms_per_token"] > 0
    assert 2 <= result["mean_rank"] <= 8
    assert 0 < result["kv_bytes"] <= min(result["kv_bytes_full"], result["kv_bytes_allocated"])
    assert result["kv_bytes_full"] > 0
    assert set(result["chunks"][0]) == {"start", "length", "signals", "rung", "scale", "kv_format"}
    assert {page for chunk in result["chunks"] for page in chunk["kv_format"]} & {"int8", "int4"}


def test_without_policy_or_with_the_whole_budget_all_is_full(command, policy):
    results = []
    for more in ((), ("--policy", policy, "--budget", "1.0"), ("--rung", "8")):
        status, out, _ = command("--json", *more)
        assert status == 0
        results.append(json.loads(out.splitlines()[-1]))
    assert {result["text"] for result in results} == {results[0]["text"]}
    assert {result["mean_rank"] for result in results} == {8.0}
    formats = {page for result in results for chunk in result["chunks"] for page in chunk["kv_format"]}
    assert len(formats) == 1
    assert not formats & {"int8", "int4"}


def test_text_alone_without_json(command):
    status, out, err = command("--dtype", "float32", "--no-fast")
    assert (status, err) == (0, "path: reference: fast=False\n")
    assert len(out.strip()) > 20
    assert "{" not in out


def test_single_token_has_no_time_between_tokens(command):
    _, out, _ = command("--json", "--max-new-tokens", "1")
    assert json.loads(out.splitlines()[-1])["ms_per_token"] is None


def test_sampling_repeats_with_its_seed(command):
    options = ("--do-sample", "--temperature", "1.2", "--seed")
    first, again, other = (command(*options, seed)[1] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("flag", "value"), [("--top-k", "1"), ("--top-p", "1e-6"), ("--min-p", "1")])
def test_what_leaves_one_token_to_draw_is_greedy(command, flag, value):
    assert command("--do-sample", flag, value)[:2] == command()[:2]


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: set TRITON_INTERPRET=1")
def test_the_engine_is_asked_for_and_said(command):
    """It draws from the command's seed; without chunks, as it keeps no record."""
    options = ("--fast", "--json", "--max-new-tokens", "1", "--do-sample", "--temperature", "3", "--top-k", "200")
    (first, err), again, other = (command(*options, "--seed", seed)[1:] for seed in ("1", "1", "5"))
    result = json.loads(first.splitlines()[-1])
    assert set(result) == KEYS
    assert err == f"path: {result['path']}\n"
    assert result["path"].startswith("fast: ")
    assert result["chunks"] is None
    assert (first, err) == again != other


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: set TRITON_INTERPRET=1")
def test_a_policy_that_the_engine_does_not_cover_is_named(command, policy):
    status, out, err = command("--fast", "--policy", policy)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: fast: expected .*it is of the kind percentile, .*; leave fast out, .*\n", err)


def test_repetition_penalty_changes_the_text(command):
    assert command("--repetition-penalty", "1.8")[1] != command()[1]


@pytest.fixture(scope="module")
def coded(stories_adapter, tmp_path_factory):
    return save_ladder(handmade_ladder(load_adapter(stories_adapter)), tmp_path_factory.mktemp("ladders") / "ladder")


def test_a_rung_between_whole_ranks(command, coded):
    status, out, err = command("--rung", "1.25", "--json", adapter=coded)
    assert (status, err) == (0, PATH)
    result, ladder = json.loads(out.splitlines()[-1]), load_ladder(coded)
    assert {chunk["rung"] for chunk in result["chunks"]} == {1.25}
    assert result["adapter_bytes"] == float(ladder.rung_bytes()[2])
    assert result["adapter_share"] == pytest.approx(float(ladder.rung_bytes()[2] / ladder.rung_bytes()[-1]))
    assert result["mean_rank"] == pytest.approx(float(ladder.mean_rank()[2]))


@pytest.mark.filterwarnings("always:every token gets rung")
def test_the_resident_rung_is_served_and_said_in_one_line(command, coded):
    status, out, err = command("--resident-rung", "1.25", adapter=coded)
    warning = "warning: every token gets rung 1.25, the resident one, not the exact adapter 8\n"
    assert (status, err) == (0, warning + PATH)
    assert out == command("--rung", "1.25", adapter=coded)[1]
    assert command("--resident-rung", "1.25", "--rung", "0.5", adapter=coded)[::2] == (0, PATH)
    status, out, err = command("--resident-rung", "1.25", "--rung", "2", adapter=coded)
    assert (status, out) == (2, "")
    assert err.startswith("error: rung: expected at most the resident rung 1.25, got 2; ")


def test_a_single_new_token_has_no_bytes_of_its_own(command):
    _, out, _ = command("--json", "--max-new-tokens", "1")
    result = json.loads(out.splitlines()[-1])
    assert [result[name] for name in ("mean_rank", "adapter_bytes", "adapter_share")] == [None] * 3


def damaged(folder, path, name=WEIGHTS_NAME):
    shutil.copytree(folder, path)
    weights = path / name
    weights.write_bytes(weights.read_bytes()[:-100])
    return path


MISTAKES = {
    "model path": lambda f: ((), {"model": "/nowhere/model"}),
    "model id": lambda f: ((), {"model": "some-user/no-such-model"}),
    "relative model path": lambda f: ((), {"model": "./nowhere"}),
    "bare model name": lambda f: ((), {"model": "no-such-model-anywhere"}),
    "adapter path": lambda f: ((), {"adapter": "/nowhere/adapter"}),
    "adapter id": lambda f: ((), {"adapter": "some-user/no-such-adapter"}),
    "adapter of another model": lambda f: ((), {"adapter": f("llama_adapter")}),
    "truncated adapter": lambda f: ((), {"adapter": damaged(f("stories_adapter"), f("tmp_path") / "adapter")}),
    "truncated model": lambda f: (
        (),
        {"model": damaged(f("stories_path"), f("tmp_path") / "model", "model.safetensors")},
    ),
    "adapter given as model": lambda f: ((), {"model": f("stories_adapter")}),
    "model given as adapter": lambda f: ((), {"adapter": f("stories_path")}),
    "rung above the rank": lambda f: (("--rung", "9"), {}),
    "negative rung": lambda f: (("--rung", "-1"), {}),
    "rung that is no number": lambda f: (("--rung", "nan"), {}),
    "rung between whole ranks of an svd ladder": lambda f: (("--rung", "2.5"), {}),
    "rung above the resident one": lambda f: (("--rung", "4", "--resident-rung", "2"), {}),
    "whole budget beside a resident rung": lambda f: (
        ("--policy", f("policy"), "--budget", "1", "--resident-rung", "4"),
        {},
    ),
    "negative budget": lambda f: (("--policy", f("policy"), "--budget", "-0.5"), {}),
    "budget that is no number": lambda f: (("--policy", f("policy"), "--budget", "nan"), {}),
    "budget without policy": lambda f: (("--budget", "0.5"), {}),
    "latency without policy": lambda f: (("--latency-budget-ms", "5"), {}),
    "latency without table": lambda f: (("--policy", f("policy"), "--latency-budget-ms", "5"), {}),
    "budget and latency": lambda f: (("--policy", f("policy"), "--budget", "0.5", "--latency-budget-ms", "5"), {}),
    "rung and policy": lambda f: (("--policy", f("policy"), "--rung", "4"), {}),
    "policy path": lambda f: (("--policy", "/nowhere/policy"), {}),
    "empty prompt": lambda f: (("--prompt", ""), {}),
    "no tokens": lambda f: (("--max-new-tokens", "0"), {}),
    "more tokens than the context": lambda f: (("--max-new-tokens", "100000"), {}),
    "more tokens than any text": lambda f: (("--max-new-tokens", str(10**30)), {}),
    **{
        f"temperature {value}": lambda f, value=value: (("--do-sample", "--temperature", value), {})
        for value in ("-1", "0", "1e-320", "1e-30", "nan", "inf", "1e300")
    },
    **{
        f"repetition penalty {value}": lambda f, value=value: (("--repetition-penalty", value), {})
        for value in ("-1", "0", "1e-320", "nan", "inf", "1e300")
    },
    **{f"{flag} alone": lambda f, flag=flag: ((flag, "1"), {}) for flag in ("--top-k", "--top-p", "--min-p")},
    "negative seed": lambda f: (("--do-sample", "--seed", "-1"), {}),
    "huge seed": lambda f: (("--do-sample", "--seed", str(2**32)), {}),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_ends_in_one_line_and_status_two(mistake, command, request):
    more, folders = mistake(request.getfixturevalue)
    status, out, err = command(*more, **folders)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("--temperature", value) for value in ("-1", "0", "1e-320", "nan", "inf", "1e300")],
        *[("--repetition-penalty", value) for value in ("-1", "0", "1e-320", "nan", "inf", "1e300")],
        *[("--top-k", value) for value in ("-1", str(2**31))],
        *[(flag, value) for flag in ("--top-p", "--min-p") for value in ("-1", "1.5", "nan", "inf")],
        *[("--max-new-tokens", value) for value in ("0", "-1", str(10**30))],
        *[("--seed", value) for value in ("-1", str(2**32))],
        *[(flag, value) for flag in ("--rung", "--resident-rung") for value in ("-1", "nan", "inf", "1e300")],
    ],
)
def test_a_number_beyond_its_limit_is_named_before_anything_is_read(flag, value, monkeypatch, capsys):
    given = ["--model", "/nowhere", "--adapter", "/nowhere", "--prompt", "One day", "--do-sample", flag, value]
    monkeypatch.setattr(sys, "argv", ["generate", *given])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert re.fullmatch(
        rf"error: {flag[2:]}: expected a .*(number|rank) in .*, got .*; correct it\n", capsys.readouterr().err
    )


@pytest.mark.parametrize("temperature", ["1e-6", "1e6"])
@pytest.mark.parametrize("penalty", ["1e-3", "1e3"])
def test_the_ends_of_what_is_allowed_still_give_text(temperature, penalty, command):
    status, out, err = command("--do-sample", "--temperature", temperature, "--repetition-penalty", penalty)
    assert (status, err) == (0, PATH)
    assert out.strip()


def run_python(*arguments):
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_as_a_process_without_warnings(stories_path, stories_adapter, policy):
    done = run_python(
        "-m", "runtime.generate", "--model", stories_path, "--adapter", stories_adapter, "--policy", policy,
        "--budget", "0.5", "--prompt", "One day", "--max-new-tokens", "20", "--json",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, PATH)
    assert set(json.loads(done.stdout.splitlines()[-1])) == KEYS


def test_as_a_process_with_a_mistake(stories_path):
    done = run_python("-m", "runtime.generate", "--model", stories_path, "--adapter", "/nowhere", "--prompt", "One day")
    assert done.returncode == 2
    assert done.stderr.startswith("error: adapter: expected")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_adapter])
def test_a_mistyped_relative_path_is_not_looked_up_on_the_hub(load, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="check the path") as error:
        load("checkpoints/bse")
    assert "hub id" in str(error.value) or "expected a folder" in str(error.value)

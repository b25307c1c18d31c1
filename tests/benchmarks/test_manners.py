"""Every benchmark runs as the README gives it, and says in one line, before any work, what is wrong with its flags."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
WORK = {
    "agreement": "load_model", "controller": "load_model", "decode": "gate", "kernels": "gate", "kv": "load_model",
    "ladder": "random_factors", "memory": "LlamaConfig", "plot": "figure", "record_trace": "load_model",
    "reference": "copy_bandwidth", "perplexity": "load_model", "prefill": "gate", "serve": "gate",
    "soak": "build_model",
}  # fmt: skip
"""What each one calls first when it gets to work."""


@pytest.fixture
def command(monkeypatch, capsys):
    """`command(name, *arguments)`: runs a benchmark in this process; (exit status, stdout, stderr)."""

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        status = 0
        try:
            importlib.import_module(f"benchmarks.{name}").main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def idle(monkeypatch):
    """Whoever begins to work fails."""
    for name, first in WORK.items():
        monkeypatch.setattr(f"benchmarks.{name}.{first}", lambda *args, **kwargs: pytest.fail("work has begun"))


def readme_commands():
    found = re.findall(r"`python -m benchmarks\.(\w+)([^`]*)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    return [(name, shlex.split(more)) for name, more in found]


def test_the_readme_shows_every_benchmark():
    assert {name for name, _ in readme_commands()} == {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main()" in path.read_text(encoding="utf-8")
    }


@pytest.mark.parametrize(("name", "more"), readme_commands())
def test_flags_are_accepted_as_the_readme_gives_them(name, more, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, *more])
    args = importlib.import_module(f"benchmarks.{name}").arguments()
    assert all(Path(getattr(args, path)).exists() for path in ("model", "text") if hasattr(args, path))


def test_kv_runs_on_what_comes_with_the_repository(command, tmp_path):
    status, out, _ = command("kv", "--max-tokens", "128", "--window", "64", "--output", tmp_path / "kv.json")
    assert status == 0
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((tmp_path / "kv.json").read_text())
    assert (record["model"], record["text"], record["tokens"]) == ("embedded", "test.jsonl.xz", 128)
    assert set(record["configurations"]) == {"full", "int8", "int4", "mixed (default)", "sparse", "dropped (window)"}


def test_kv_reads_a_text_file_as_it_is(command, tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    names = ("--model-name", "a name", "--text-name", "another")
    status, out, _ = command(
        "kv", "--text", text, "--max-tokens", "64", "--window", "32", "--output", tmp_path / "deep" / "kv.json", *names
    )
    assert status == 0
    record = json.loads(out.splitlines()[-1])
    assert (record["model"], record["text"]) == ("a name", "another")


def test_memory_runs_at_the_least_it_takes(command, tmp_path):
    status, out, _ = command("memory", "--tokens", "64", "--output", tmp_path / "memory.json")
    assert status == 0
    assert json.loads(out.splitlines()[-1]) == json.loads((tmp_path / "memory.json").read_text())


def test_ladder_writes_every_module_of_a_model(command, tmp_path):
    # At this size neither the speedup nor the errors say anything: only what is recorded is looked at.
    flags = ("--size", "64", "--rank", "8", "--repeats", "2", "--shape", "tiny", "--output", tmp_path / "ladder.json")
    status, out, _ = command("ladder", *flags)
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((tmp_path / "ladder.json").read_text())
    assert status == (0 if record["passed"] else 1)
    writing = record["writing"]
    layer = 2 * (128 + 128) + 2 * (128 + 64) + 2 * (128 + 352) + (352 + 128)
    assert (writing["modules"], writing["values"]) == (14, 2 * 8 * layer)
    # Eight bits a value and three scales a row.
    assert writing["stored_bytes"] == 2 * 8 * (layer + 2 * 7 * 3 * 2)
    assert writing["adapter_bytes"] == 2 * writing["values"]
    assert writing["factoring_seconds"] > 0
    assert writing["encoding_seconds"] > 0


BAD_FLAGS = [
    *[("ladder", "--rank", value) for value in ("-1", "0", "100000")],
    ("ladder", "--rank", "65", "--size", "64"),
    *[("ladder", "--size", value) for value in ("0", str(10**12))],
    *[("ladder", "--repeats", value) for value in ("0", "-3")],
    *[("decode", flag, "0") for flag in ("--context", "--batch-context", "--adapters", "--repeats")],
    ("decode", "--adapters", str(10**12)),
    *[("agreement", flag, "0") for flag in ("--rows", "--batch", "--tokens", "--prompt-tokens")],
    ("agreement", "--rungs", "-1"),
    ("decode", "--context", "127"),
    *[("record_trace", flag, "0") for flag in ("--rows", "--steps", "--max-tokens")],
    ("record_trace", "--around", "-1"),
    ("plot", "--record", "/nowhere.json"),
    ("decode", "--trace", "/nowhere.json"),
    *[("kernels", flag, "0") for flag in ("--context", "--batch-context", "--repeats")],
    *[("reference", flag, "0") for flag in ("--batch", "--prompt-tokens", "--new-tokens", "--repeats")],
    ("reference", "--new-tokens", "1"),
    ("reference", "--batch", str(10**12)),
    *[("memory", "--tokens", value) for value in ("0", "-1", "63", str(10**13))],
    *[("kv", flag, value) for flag in ("--window", "--max-tokens") for value in ("0", "-1", "15", str(10**13))],
    *[(name, "--text", "/nowhere.txt") for name in ("kv", "perplexity")],
    *[("perplexity", flag, "0") for flag in ("--window", "--max-tokens", "--prompt")],
    ("perplexity", "--prompt", "16", "--window", "16"),
    *[("prefill", flag, "0") for flag in ("--tokens", "--block", "--repeats")],
    *[("serve", flag, "0") for flag in ("--adapters", "--rows", "--block", "--requests")],
    *[("soak", "--steps", value) for value in ("0", "19", str(10**10))],
    *[("controller", "--seeds", value) for value in ("0", "101")],
    *[("controller", "--own-text", value) for value in ("-1", str(10**12))],
    ("controller", "--ladder", "quadratic"),
    *[("controller", "--amounts", value) for value in ("epoch=3", "epochs", "epochs=some")],
]


@pytest.mark.parametrize("arguments", BAD_FLAGS, ids=" ".join)
def test_a_bad_flag_ends_in_one_line_and_status_two(arguments, command, idle):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"error: {arguments[1]}: expected .*, got .*; .*\n", err)


@pytest.mark.parametrize("name", WORK)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(name, command, idle, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "x.json", tmp_path / "file" / "deep" / "x.json", tmp_path):
        status, out, err = command(name, "--output", output)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"error: --output: expected .*, got .*; .*\n", err)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["decode", "kernels", "prefill", "serve"])
def test_what_times_a_gpu_says_in_one_line_that_there_is_none(name, command, idle, tmp_path):
    status, out, err = command(name, "--output", tmp_path / "record.json")
    assert (status, out) == (2, "")
    assert err == "error: device: expected a GPU, whose speed is measured, got cpu; run it on one\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["agreement", "perplexity", "soak"])
def test_what_needs_kernels_says_in_one_line_that_none_run(name, command, idle, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status, out, err = command(name, "--output", tmp_path / "record.json")
    assert (status, out) == (2, "")
    assert err == "error: device: expected a GPU, or TRITON_INTERPRET=1 to have kernels interpreted, got cpu; set it\n"


def test_a_window_beyond_the_models_context_is_one_line(command, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.kv.windows", lambda *args: pytest.fail("work has begun"))
    status, out, err = command("kv", "--window", "1025", "--output", tmp_path / "kv.json")
    assert (status, out) == (2, "")
    assert "error: --window: expected a whole number in [16, 1024], got 1025" in err

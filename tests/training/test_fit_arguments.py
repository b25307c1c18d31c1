"""`python -m training.fit`: how arguments are read, and how it refuses what does not fit."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from policy import Settings, SignalSettings
from policy.settings import SIGNAL_SETS
from training.fit import fit, main, make_parser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def truncated(case, tmp_path):
    """A copy of the adapter whose weight file lost its second half."""
    folder = tmp_path / "truncated"
    folder.mkdir()
    for path in case.adapter.iterdir():
        if path.is_file():
            data = path.read_bytes()
            (folder / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    return folder


@pytest.fixture
def truncated_model(case, tmp_path):
    folder = tmp_path / "truncated-model"
    folder.mkdir()
    for path in case.model.iterdir():
        data = path.read_bytes()
        (folder / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    return folder


@pytest.fixture
def empty(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.touch()
    return path


@pytest.fixture
def empty_folder(tmp_path):
    path = tmp_path / "empty"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "/nowhere/model"}, "/nowhere/model"),
        ({"model": "truncated_model"}, "expected whole files"),
        ({"adapter": "/nowhere/adapter"}, "/nowhere/adapter"),
        ({"adapter": "other_adapter"}, "it is of another model"),
        ({"adapter": "truncated"}, "expected"),
        ({"dataset": "empty"}, "expected"),
        ({"dataset": "/nowhere/text.jsonl"}, "/nowhere/text.jsonl"),
        ({"rungs": "[4,16]"}, "expected ranks up to the adapter's 8, got 16"),
        ({"rungs": "[8]"}, "rungs: expected at least two to choose between, got [8]"),
        ({"amounts.max_tokens": 513}, "amounts.max_tokens: expected at most the model's context of 512, got 513"),
        ({"dataset": "empty_folder"}, "expected train.jsonl, validation.jsonl or test.jsonl in"),
        ({"dataset": "no-such/dataset"}, "no-such/dataset"),
        ({"dataset": "wikitext"}, "expected to reach the hub"),
        ({"rungs": "[-1,4]"}, "rungs[0]: expected a rank in [0, 65536], got -1"),
        ({"rungs": "[4,4]"}, "rungs: expected a list of 1 to 1024, strictly ascending"),
        ({"rungs": "[2,6]"}, "rungs: expected"),
        ({"rungs": "[0.5]", "ladder": "svd"}, "expected whole ranks of an svd ladder, got [0.5]"),
        ({"ladder": "thin"}, "ladder: expected one of svd, ranked, mixed, got 'thin'"),
        ({"signals": "five"}, f"signals: expected one of {', '.join(SIGNAL_SETS)}, got 'five'"),
        ({"objective": "speed"}, "objective: expected one of damage, latency, got 'speed'"),
        ({"signal_settings.recent_pages": 0}, "signals.recent_pages: expected a whole number in [1, "),
        ({"dtype": "float8"}, "dtype: expected one of"),
        ({"fade_tokens": 3}, "fade_tokens: expected one of"),
        ({"block_tokens": 0}, "block_tokens: expected"),
        ({"prompt_tokens": 0}, "prompt_tokens: expected"),
        ({"amounts.min_completion_tokens": 63}, "completion tokens"),
        ({"amounts.epochs": 0}, "epochs: expected"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(change, says, case, tmp_path, capsys, request):
    def resolve(value):
        if value == "other_adapter":
            return case.other_adapter
        fixtures = ("truncated", "truncated_model", "empty", "empty_folder")
        return request.getfixturevalue(value) if value in fixtures else value

    output = tmp_path / "runs" / "out"
    with pytest.raises(SystemExit) as caught:
        main(case.arguments(output, **{name: resolve(value) for name, value in change.items()}))
    errors = capsys.readouterr().err
    assert caught.value.code == 2
    assert len(errors.strip().splitlines()) == 1, errors
    assert errors.startswith("error: ")
    assert says in errors
    assert not output.parent.exists()


@pytest.mark.parametrize("below", ["", "out", "runs/out"])
def test_an_output_that_is_a_file_or_under_one_is_refused_before_the_work(below, case, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main(case.arguments(path / below, model="/nowhere/model"))
    errors = capsys.readouterr().err
    assert caught.value.code == 2
    assert errors == f"error: output: expected a folder, got the file {path}; choose another path\n"
    assert path.read_text() == "mine"


@pytest.mark.parametrize("module", ["training.fit", "training.evaluate"])
def test_a_broken_line_of_a_dataset_is_one_line_of_ours(module, case, tmp_path):
    """In a process of its own: the loader's log goes to the stderr it found when it was imported."""
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\noops\n')
    flags = [
        f"--{name}={value}" for name, value in (("model", case.model), ("adapter", case.adapter), ("dataset", path))
    ]
    done = subprocess.run([sys.executable, "-m", module, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a JSON object at ")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("name", ["block_tokens", "prompt_tokens", "fade_tokens"])
def test_a_flag_of_a_setting_has_the_default_of_the_setting(name):
    assert inspect.signature(fit).parameters[name].default == getattr(Settings(), name)


def test_flags_may_be_written_with_dashes(case, tmp_path, capsys):
    printed = []
    for seed, epochs in (("--block-tokens", "--amounts.batch-chunks"), ("--block_tokens", "--amounts.batch_chunks")):
        with pytest.raises(SystemExit):
            main([*case.arguments(tmp_path / "my-run"), seed, "8", f"{epochs}=9", "--print_config"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "block_tokens: 8\n" in printed[0]
    assert "batch_chunks: 9\n" in printed[0]
    assert "my-run" in printed[0]


@pytest.mark.parametrize("flag", ["signal_settings", "signal-settings", "signals"])
def test_settings_of_signals_are_read_by_their_name_and_by_the_one_they_had(flag, case, tmp_path, capsys):
    """`--signals` alone says what a policy looks at."""
    name = "recent_pages" if "_" in flag else "recent-pages"
    arguments = [*case.arguments(tmp_path / "out"), f"--{flag}.{name}=7", "--signals=four", "--objective=latency"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["signal_settings"]["recent_pages"] == 7
    assert printed["signal_settings"]["prior_decay_tokens"] == SignalSettings().prior_decay_tokens
    assert (printed["signals"], printed["objective"]) == ("four", "latency")


def test_without_flags_the_policy_looks_at_everything_and_learns_by_damage(capsys):
    with pytest.raises(SystemExit):
        main(["--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["signals"], printed["objective"]) == ("default", "damage")


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    flags = ("--config", "--print_config", "--seed", "--model", "--adapter", "--dataset", "--output")
    for flag in (*flags, "--signals", "--signal_settings.recent_pages", "--objective"):
        assert flag in shown
    assert "--trainer.devices" in shown


def test_a_printed_configuration_reads_back_as_the_same_arguments(case, tmp_path, capsys):
    arguments = [
        *case.arguments(tmp_path / "out", **{"amounts.epochs": 6}),
        "--seed=7",
        "--chunk.max_tokens=9",
        "--rungs=[2,8]",
    ]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--print_config"])
    assert caught.value.code == 0
    config = tmp_path / "config.yaml"
    config.write_text(capsys.readouterr().out)
    parser = make_parser()
    direct, through_file = (parser.parse_args(given) for given in (arguments, ["--config", str(config)]))
    for parsed in (direct, through_file):
        parsed.pop("config")
    assert direct == through_file
    assert (direct.seed, direct.chunk.max_tokens, direct.rungs) == (7, 9, [2, 8])

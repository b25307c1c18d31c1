"""What a fit says at its end: commands that run as they are printed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from training.closing import next_commands
from training.fit import main

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_that_a_fit_prints_last_serves_its_policy(case, tmp_path, capsys):
    """From a folder and into one whose names a shell would take apart."""
    model = tmp_path / "the model's"
    model.symlink_to(case.model)
    output = tmp_path / "my runs" / "$out"
    main(case.arguments(output, model=model, **{"amounts.train_documents": 4}))
    *_, serve, command, export, _ = capsys.readouterr().out.splitlines()
    assert serve == "serve it:"
    assert export.startswith("export ")
    given = shlex.split(command)
    flags = dict(zip(given[3::2], given[4::2], strict=True))
    assert flags == {
        "--model": str(model), "--adapter": str(output / "ladder"), "--policy": str(output / "policy"),
        "--dtype": "float32",
        "--prompt": "Your prompt",
    }  # fmt: skip
    done = subprocess.run(f"{command} --max-new-tokens 3 --json", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert re.fullmatch(r"path: reference: .*\n", done.stderr)
    assert '"tokens": ' in done.stdout


def test_a_fixed_rung_can_be_exported_and_a_learned_policy_cannot():
    python = shlex.quote(next_commands("m", ["a"], Path("p"), "auto", "fixed")[1].split()[0])
    assert python in ("python", sys.executable)
    serve = f"{python} -m runtime.generate --model m --adapter you/a --policy runs/a/policy --dtype auto"
    fixed = next_commands("m", ["you/a"], Path("runs/a/policy"), "auto", "fixed")
    assert fixed == [
        "serve it:",
        f"{serve} --prompt 'Your prompt'",
        "export the rung that it serves as a PEFT adapter, for any server:",
        f"{python} -m runtime.export --adapter you/a --policy runs/a/policy --output runs/a/adapter",
    ]
    learned = next_commands("m", ["you/a"], Path("runs/a/policy"), "auto", "learned")
    assert learned == [
        *fixed[:2],
        "it mixes rungs from token to token, so it is no single adapter that could be exported",
    ]


def test_a_shared_policy_has_a_command_for_every_adapter():
    lines = next_commands("m", ["a", "b"], Path("runs/ab/policy"), "float32", "fixed")
    assert [line.split()[6] for line in lines if "runtime.generate" in line] == ["a", "b"]
    assert [line.split()[-1] for line in lines if "runtime.export" in line] == [
        "runs/ab/adapter-0",
        "runs/ab/adapter-1",
    ]


@pytest.mark.parametrize("first", [True, False], ids=["on the path", "elsewhere"])
def test_the_interpreter_is_named_so_that_the_shell_finds_it(first, monkeypatch, tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent if first else tmp_path))
    command = next_commands("m", ["a"], Path("p"), "auto", "fixed")[1]
    assert command.split(" -m ")[0] == ("python" if first else shlex.quote(sys.executable))

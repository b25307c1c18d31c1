"""What the sanitizer is pointed at exists, and where there is none a line says so; no device is needed for that."""

from pathlib import Path

import pytest

from tests.gpu import sanitize

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_is_named_is_there():
    for own in sanitize.TESTS:
        path, name = own.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), own


def test_without_the_tool_it_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["sanitize"])
    with pytest.raises(SystemExit) as stop:
        sanitize.main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: compute-sanitizer: expected NVIDIA's tool of that name on the PATH, got none; ")
    assert err.count("\n") == 1


def test_the_tests_get_memory_of_their_own_and_the_status_is_handed_on(monkeypatch, capfd, tmp_path):
    tool = tmp_path / sanitize.SANITIZER
    tool.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"\nexit 9\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("sys.argv", ["sanitize", "--tool", "racecheck", "tests/ops"])
    with pytest.raises(SystemExit) as stop:
        sanitize.main()
    assert stop.value.code == sanitize.FOUND
    said = capfd.readouterr().out
    assert said.startswith("1 --tool racecheck --error-exitcode 9 ")
    assert said.rstrip().endswith("pytest -q -x -p no:cacheprovider tests/ops")

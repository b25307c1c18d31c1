"""One fit at a time writes to a folder: the second is refused at once, and a lock never outlives its process."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from training.fit import main
from training.lock import LOCK, locked

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from training.lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path/runs/out`, as a fit does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "runs" / "out")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_fit_into_a_folder_is_refused_before_the_model_is_loaded(holder, case, tmp_path, capsys):
    output = tmp_path / "runs" / "out"
    with pytest.raises(SystemExit) as caught:
        main(case.arguments(output, model="/nowhere/model"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"error: output: expected a folder that no other run is writing to, got {output}; wait for it or choose "
        "another\n"
    )
    assert holder.poll() is None


def test_a_lock_left_by_a_killed_process_does_not_block(holder, tmp_path):
    output = tmp_path / "runs" / "out"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert [path.name for path in output.iterdir()] == [LOCK]
    with locked(output, print):
        (output / "written").touch()
    assert [path.name for path in output.iterdir()] == ["written"]


def test_where_nothing_was_written_not_even_the_folder_stays(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="mistake"), locked(tmp_path / "runs" / "some" / "out", print):
        raise ValueError("mistake")
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


def test_a_folder_that_was_there_stays(tmp_path):
    with locked(tmp_path, print):
        assert (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_the_other_processes_of_a_fit_take_no_lock(holder, tmp_path, monkeypatch):
    monkeypatch.setattr("training.lock.is_first_process", lambda: False)
    with locked(tmp_path / "runs" / "out", print):
        pass
    assert holder.poll() is None
    assert (tmp_path / "runs" / "out" / LOCK).exists()


def test_a_file_system_without_locks_is_said_and_does_not_stop_a_fit(tmp_path, monkeypatch):
    def unsupported(lock: FileLock) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(FileLock, "_acquire", unsupported)
    said = []
    with locked(tmp_path / "out", said.append):
        (tmp_path / "out" / "written").touch()
    assert said == [f"the file system of {tmp_path / 'out'} knows no locks: see that no other run writes to it"]
    assert (tmp_path / "out" / "written").exists()


def test_a_fit_that_was_refused_leaves_nothing_of_its_lock(case, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(case.arguments(tmp_path / "runs" / "out", model="/nowhere/model"))
    assert "/nowhere/model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

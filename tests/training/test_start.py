"""A command of training is ready for signals before its imports, and survives being stopped anywhere."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import runtime.stop
from runtime.command import one_line_errors
from tests.processes import gone
from tests.training.test_fit import CHANGES, STOPPED, summary_of, without_latency
from training.fit import main
from training.start import ENDINGS, wait_passively

ROOT = Path(__file__).resolve().parents[2]
TWO_PROCESSES = ("--trainer.devices=2", "--trainer.strategy=ddp")
AT_TORCH = """
import os, runpy, signal, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            handlers = [signal.getsignal(number).__qualname__ for number in (signal.SIGINT, signal.SIGTERM)]
            print(os.environ.get("OMP_WAIT_POLICY"), *handlers, flush=True)
            os._exit(0)
sys.meta_path.insert(0, Spy())
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""
FOLLOWER = "import time; from training.start import prepare; prepare(); print('ready', flush=True); time.sleep(60)"
LAUNCHES = f"""
import os, subprocess, sys
from training.start import prepare
prepare()
os.environ["LOCAL_RANK"] = "1"
print(subprocess.Popen([sys.executable, "-c", {FOLLOWER!r}]).pid, flush=True)
input()
"""
RUN = "import os, signal, sys, time; from training.start import prepare, run; prepare(); run(lambda: {})"


def python(*arguments: str, **changes: str) -> subprocess.Popen:
    """A process of ours with changes to its environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **changes}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, text=True, **pipes)


def catches(process: subprocess.Popen, number: int) -> bool:
    """Whether a process has set a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


def children(process: subprocess.Popen) -> list[int]:
    """Processes whose parent is `process`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == process.pid:
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("module", ["training.fit", "training.evaluate"])
def test_a_command_is_ready_before_it_imports_pytorch(module):
    process = python("-c", AT_TORCH, module)
    assert process.communicate() == ("passive _end _end\n", "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"])
@pytest.mark.parametrize(("rank", "says"), [("0", True), ("1", False)])
def test_a_signal_during_the_imports_is_one_line_of_the_first_process(number, status, rank, says):
    process = python("-m", "training.fit", RANK=rank)
    while not catches(process, signal.SIGTERM):
        time.sleep(0.001)
    time.sleep(0.3)
    process.send_signal(number)
    out, errors = process.communicate()
    assert (process.returncode, out, errors) == (status, "", f"{ENDINGS[number]}\n" if says else "")


def test_both_halves_of_a_commands_life_say_the_same():
    assert runtime.stop.ENDINGS == ENDINGS


@pytest.mark.parametrize("own", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_how_threads_wait_is_the_users_to_say(own, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(own, "active")
    wait_passively()
    assert os.environ.get("OMP_WAIT_POLICY") == ("active" if own == "OMP_WAIT_POLICY" else None)


def test_a_process_ends_with_the_one_that_launched_it():
    with python("-c", LAUNCHES) as process:
        child = int(process.stdout.readline())
        assert process.stdout.readline() == "ready\n"
        assert not gone(child, 0.5)
        process.kill()
        assert gone(child, 2)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("sys.exit(2)", 2, ""),
        ("print('kept') or sys.exit(143)", 143, "kept\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
        ("None", 0, ""),
    ],
)
def test_a_commands_status_is_its_own(body, status, says):
    process = python("-c", RUN.format(body), PYTHONUNBUFFERED="")
    assert process.communicate()[0] == says
    assert process.returncode == status


def test_once_the_work_is_done_a_signal_changes_nothing():
    process = python("-c", f"{RUN.format('None')}; print('done', flush=True); time.sleep(0.5)")
    assert process.stdout.readline() == "done\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("first", [True, False])
def test_of_several_processes_of_a_fit_the_first_says_how_to_go_on(first, monkeypatch, capsys):
    told = []

    def recorded(**told_now):
        told.append(told_now)
        return one_line_errors(**told_now)

    monkeypatch.setattr("training.fit.one_line_errors", recorded)
    monkeypatch.setattr("training.fit.is_first_process", lambda: first)
    with pytest.raises(SystemExit):
        main(["--no_such_flag"])
    assert told == [{"afterwards": STOPPED.strip("; \n"), "first": first}]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("stage", ["targets", "later"])
def test_several_processes_end_together(number, status, stage, case, tmp_path):
    process = python("-m", "training.fit", *case.arguments(tmp_path / "out", **CHANGES), *TWO_PROCESSES)
    reached = "targets/tables-*/shard-00003.json" if stage == "targets" else "round-1"
    while not any((tmp_path / "out").glob(reached)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    (child,) = children(process)
    sent = time.monotonic()
    process.send_signal(number)
    assert gone(child, 5)
    _, errors = process.communicate()
    assert time.monotonic() - sent < 5
    assert process.returncode == status
    if number != signal.SIGKILL:
        assert errors == f"{ENDINGS[number]}{STOPPED}"


@pytest.mark.slow
def test_stopped_at_any_moment_it_ends_as_if_nothing_had_happened(case, tmp_path):
    """20 folders, each fitted by three runs: one killed and one terminated, in either order, and one to the end.

    Two runs at a time. Moments are drawn over the imports and, for most, over the work behind them.
    """

    def start(folder):
        return python("-m", "training.fit", *case.arguments(folder, **CHANGES))

    def whole(folder):
        began, process = time.monotonic(), start(folder)
        process.stdout.readline()
        introduced = time.monotonic()
        process.communicate()
        return introduced - began, time.monotonic() - introduced

    def stop(plan):
        """(signal, whether the work had begun, status, seconds until it ended, stderr) of every run stopped."""
        folder, stops = plan
        ends = []
        for number, working, share in stops:
            process = start(folder)
            while not catches(process, signal.SIGTERM):
                time.sleep(0.001)
            if working:
                process.stdout.readline()
            with suppress(subprocess.TimeoutExpired):
                process.wait(share * (work_seconds if working else import_seconds))
            sent = time.monotonic()
            process.send_signal(number)
            _, errors = process.communicate()
            ends.append((number.name, working, process.returncode, round(time.monotonic() - sent, 2), errors))
        return ends

    source = random.Random(0)
    plans = []
    for number in range(20):
        signals = source.sample([signal.SIGKILL, signal.SIGTERM], 2)
        # A second run has less ahead of it than the first one had.
        stops = [(signals[run], source.random() < 0.85, source.random() * most) for run, most in enumerate((1.0, 0.7))]
        plans.append((tmp_path / f"stopped-{number}", stops))
    with ThreadPoolExecutor(2) as pool:
        times = list(pool.map(whole, (tmp_path / "whole", tmp_path / "beside")))
        import_seconds, work_seconds = (min(column) for column in zip(*times, strict=True))
        ends = [end for part in pool.map(stop, plans) for end in part]
    print(json.dumps({"seconds": [import_seconds, work_seconds], "ends": ends}))
    for name, _, status, seconds, errors in ends:
        if status == 0:
            assert errors == ""
        elif name == "SIGKILL":
            assert (status, errors) == (-signal.SIGKILL, "")
        else:
            assert status == 143
            assert errors in ("terminated\n", f"terminated{STOPPED}")
            assert seconds < 5
    assert sum(working and status != 0 for _, working, status, _, _ in ends) >= 20, "most are stopped at work"
    expected = summary_of(tmp_path / "whole")
    for folder, _ in plans:
        main(case.arguments(folder, **CHANGES))
        again = summary_of(folder)
        assert without_latency(again["curves"]) == without_latency(expected["curves"])
        for key in ("area", "headroom", "captured", "exported", "kl_at"):
            assert again[key] == expected[key], key

"""Signals end a command's body: it unwinds, or after a grace it is ended; one line and the status of a shell."""

import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from runtime.command import one_line_errors
from runtime.stop import ENDINGS, GRACE_SECONDS, Stopped, stops_on_signals
from tests.processes import gone

ROOT = Path(__file__).resolve().parents[2]
BODIES = {
    "waiting": "time.sleep(60)",
    "holding a folder": "with new_folder(sys.argv[1]) as scratch: say(); time.sleep(60)",
    "keeping what is raised": "while True:\n    try: time.sleep(60)\n    except BaseException: pass",
    "inside a library": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    "in a finaliser": "class Slow:\n    def __del__(self): time.sleep(1)\nwhile True: Slow()",
    "beside a process": "child = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\ntime.sleep(60)",
}
PROCESS = """
import hashlib, subprocess, sys, time, types
for name in ("policy", "runtime"):  # the packages without what they import, which would take most of the time
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name]
from policy.files import new_folder
from runtime.command import one_line_errors
def say(): print("ready", flush=True)
with one_line_errors(afterwards="call again", first=FIRST):
    say()
    exec(BODY)
"""


@pytest.fixture
def start(tmp_path):
    """`start(body, first=True)`: a process inside `one_line_errors` that is at `body`."""
    started = []

    def run(body: str, first: bool = True) -> subprocess.Popen:
        source = PROCESS.replace("BODY", repr(body)).replace("FIRST", str(first))
        command = [sys.executable, "-c", source, str(tmp_path / "made")]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        for _ in range(1 + body.count("say()")):
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)  # into the body
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"])
def test_a_signal_ends_it_in_time_with_one_line_wherever_it_is(body, number, status, start, tmp_path):
    process = start(BODIES[body])
    sent = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate()
    assert time.monotonic() - sent < 5
    assert (process.returncode, errors) == (status, f"{ENDINGS[number]}; call again\n")
    assert list(tmp_path.iterdir()) == [], "scratch files are gone"


def test_the_processes_it_started_end_with_it_and_nothing_waits_for_them(start):
    body = (
        f"child = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\n{BODIES['keeping what is raised']}"
    )
    process = start(body)
    child = int(process.stdout.readline())
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert gone(child, sent + GRACE_SECONDS - time.monotonic())
    assert time.monotonic() - sent < GRACE_SECONDS


def test_of_several_processes_the_others_end_at_once_without_a_word(start):
    process = start(BODIES["keeping what is raised"], first=False)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert time.monotonic() - sent < GRACE_SECONDS
    assert (process.returncode, errors) == (143, "")


def test_a_second_signal_changes_nothing(start):
    process = start("try: time.sleep(60)\nfinally: time.sleep(0.5)")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (143, "terminated; call again\n")


def test_a_signal_that_comes_when_the_body_is_done_is_not_lost():
    with pytest.raises(Stopped) as caught, stops_on_signals(lambda stopped: None), suppress(Stopped):
        signal.raise_signal(signal.SIGTERM)  # kept by the body
    assert caught.value.status == 143
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_without_a_signal_nothing_of_it_is_left():
    before = [signal.getsignal(number) for number in ENDINGS], sys.unraisablehook, threading.active_count()
    with one_line_errors():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert ([signal.getsignal(number) for number in ENDINGS], sys.unraisablehook, threading.active_count()) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_command_may_run_in_another_thread():
    before, found = signal.getsignal(signal.SIGTERM), []

    def command():
        with one_line_errors():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert found == [before]

"""What a command of this package does before anything heavy is imported: how threads wait, and what a signal does.

Imports only the standard library, because it has to come before PyTorch: OpenMP reads its environment once, when it is
loaded, and the imports take seconds in which a signal should already end the process as it does later
(`runtime.stop`), with one line and its exit status. Nothing has been written by then, so it just ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Where launchers write a process's number: torchrun, Lightning, SLURM."""
LAUNCHER = "CHUNKWISE_LORA_LAUNCHER"
"""Process id of the command that started the others of this machine."""
WATCH_SECONDS = 0.2
STDERR = 2


def prepare() -> None:
    """Set how this process waits and ends; call it before PyTorch is imported."""
    wait_passively()
    launched = LAUNCHER in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
    launcher = int(os.environ.setdefault(LAUNCHER, str(os.getpid())))
    for number in ENDINGS:
        signal.signal(number, _end)
    if launched:
        threading.Thread(target=_end_with, args=(launcher,), daemon=True, name="end-with-launcher").start()


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has set how.

    Spinning, its default, saves microseconds where every thread has a core. Where other processes hold the cores it
    burns a whole time slice at each of many tiny operations, until the thread that is waited for is scheduled.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def run(main: Callable[[], None]) -> None:
    """Run a command in a process that is prepared; once its work is done, signals no longer change its status."""
    try:
        main()
    except SystemExit as end:
        if end.code in [128 + number for number in ENDINGS]:
            # It has unwound and said so. What is left, taking the interpreter down, lasts seconds on a busy machine.
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(end.code)
        raise
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    if next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0":
        os.write(STDERR, f"{ENDINGS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(WATCH_SECONDS)
    os._exit(128 + signal.SIGTERM)

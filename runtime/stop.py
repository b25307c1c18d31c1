"""SIGTERM and Ctrl-C end a command within seconds, wherever it is.

A signal raises `Stopped` in the main thread, so that scratch files are removed and a progress bar leaves the terminal.
It is no KeyboardInterrupt: libraries take that for their own. Where the main thread does not get to it (a long call
into a library, a handler of a library that keeps it), a thread ends the process once the grace is over: what is on disk
is whole at any moment. Processes that compute together wait for each other, so there the first one ends all at once.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
GRACE_SECONDS = 3.0


class Stopped(BaseException):
    """A signal told the process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(ENDINGS[signal.Signals(number)])
        self.status = 128 + number
        """Exit status, as shells give it to a process that the signal ended."""


@contextmanager
def stops_on_signals(last_words: Callable[[Stopped], None], grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """Raise `Stopped` from the body on the first SIGTERM or Ctrl-C; after the grace, end the process with `last_words`.

    There is no grace where this process has started others: it ends them and itself. In another thread than the main
    one, which no signal interrupts, there is nothing to do. Behind it signals do what they did before, unless one came:
    then the process is on its way out, and further ones change nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    inside = True

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1 and inside:
            raise Stopped(number)

    def unraisable(lost: Any) -> None:
        # One raised inside a finaliser cannot get out of it; the thread will see to the end.
        if not isinstance(lost.exc_value, Stopped):
            hook(lost)

    # Python writes a signal's number here at once, whatever the main thread is at, and whoever else handles it.
    arrived, arrives = os.pipe()
    os.set_blocking(arrives, False)
    about = (arrived, last_words, grace_seconds)
    watcher = threading.Thread(target=_watch, args=about, daemon=True, name="stop")
    watcher.start()
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    wakeup = signal.set_wakeup_fd(arrives, warn_on_full_buffer=False)
    before = {number: signal.signal(number, stop) for number in ENDINGS}
    try:
        yield
    finally:
        inside = False
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if came else handler)
        signal.set_wakeup_fd(wakeup)
        sys.unraisablehook = hook
        os.close(arrives)
        watcher.join()
        os.close(arrived)
    if came:  # while leaving, or kept by a library
        raise Stopped(came[0])


def _watch(arrived: int, last_words: Callable[[Stopped], None], grace_seconds: float) -> None:
    stopped: Stopped | None = None
    deadline = 0.0
    while True:
        left = None if stopped is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([arrived], [], [], left)
        if stopped is not None and not ready:
            last_words(stopped)
            os._exit(stopped.status)
        byte = os.read(arrived, 1)
        if not byte:  # closed: the main thread is out
            return
        if stopped is None and byte[0] in ENDINGS:
            stopped = Stopped(byte[0])
            deadline = time.monotonic() + (0.0 if _end_children() else grace_seconds)


def _end_children() -> bool:
    """Kill the processes that this one has started; whether there were any."""
    found = False
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            # number (name) state parent ...; a name may hold anything.
            parent = path.read_text(errors="replace").rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)
                found = True
    return found

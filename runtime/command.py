"""What every command of this project does with a mistake, a missing file or a signal: one line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from .stop import GRACE_SECONDS, Stopped, stops_on_signals

BAD_INPUT = 2
STDERR = 2
CLEAN_LINE = "\r\x1b[2K\x1b[?25h"
"""To a terminal on which a progress bar was drawn: an empty line, and the cursor."""


@contextmanager
def one_line_errors(*, afterwards: str = "", first: bool = True) -> Iterator[None]:
    """Turn ValueError and OSError into one line and exit status 2, Ctrl-C and SIGTERM into one line and 130 or 143.

    Those are how this project and the system say that input is wrong or not there. Anything else is a defect and keeps
    its traceback. `afterwards` is what a user whose command was stopped can do; of several processes that compute
    together only the `first` says so, and the others end without a word.
    """

    def last_words(stopped: Stopped) -> None:
        # Straight to the file: the main thread may be holding the lock of the stream.
        line = "; ".join(filter(None, (str(stopped), afterwards)))
        if first:
            os.write(STDERR, f"{CLEAN_LINE if os.isatty(STDERR) else ''}{line}\n".encode())

    try:
        with stops_on_signals(last_words, GRACE_SECONDS if first else 0.0):
            yield
    except BrokenPipeError:  # the reader (head, a pager) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (ValueError, OSError) as error:
        traceback.clear_frames(error.__traceback__)  # a progress bar that they hold goes before the line comes
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except (Stopped, KeyboardInterrupt) as stop:  # the latter where a library makes one of its own
        stopped = stop if isinstance(stop, Stopped) else Stopped(signal.SIGINT)
        traceback.clear_frames(stop.__traceback__)
        last_words(stopped)
        raise SystemExit(stopped.status) from None


def one_line(error: Exception) -> str:
    """The error's message on one line; of the system's own errors, what happened and to which path."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}; choose another path"
    return " ".join(str(error).split())

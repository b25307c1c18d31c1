"""What every command of this project does with a mistake, a missing file or Ctrl-C: one line and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BAD_INPUT = 2
INTERRUPTED = 130


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn ValueError and OSError into one line and exit status 2, and Ctrl-C into one line and exit status 130.

    Those are how this project and the system say that input is wrong or not there. Anything else is a defect and keeps
    its traceback.
    """
    try:
        yield
    except BrokenPipeError:  # the reader (head, a pager) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def one_line(error: Exception) -> str:
    """The error's message on one line; of the system's own errors, what happened and to which path."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}; choose another path"
    return " ".join(str(error).split())

"""What every command of this project does with a user's mistake: one line on stderr and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn ValueError, FileNotFoundError and FileExistsError into one line and exit status 2.

    Those three are how this project says that its input is wrong. Anything else is a defect and keeps its traceback.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None

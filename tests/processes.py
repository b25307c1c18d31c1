"""Whether processes that tests have started still run."""

from __future__ import annotations

import time
from pathlib import Path


def running(number: int) -> bool:
    """Whether there is such a process that has not ended; one whose end nobody has taken note of has."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(number: int, seconds: float) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + seconds
    while running(number) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not running(number)

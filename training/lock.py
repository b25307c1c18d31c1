"""One run at a time writes to an output folder."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .console import is_first_process
from .task import Say

LOCK = ".fit.lock"


@contextmanager
def locked(folder: Path, say: Say) -> Iterator[None]:
    """Hold `folder` against other runs; of several processes of one, the first one holds it for all.

    The system lets go of it when the process ends, however it ends. Nothing stays behind but what the body wrote: the
    lock file goes, and the folders that were made for it where they stayed empty. Raises ValueError at once when
    another fit holds the folder.
    """
    if not is_first_process():
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, blocking=False, fallback_to_soft=False)
    try:
        with _held(lock, folder, say):
            yield
    finally:
        with suppress(OSError):  # not empty: the body wrote something
            for path in made:
                path.rmdir()


@contextmanager
def _held(lock: FileLock, folder: Path, say: Say) -> Iterator[None]:
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"output: expected a folder that no other run is writing to, got {folder}; wait for it or choose another"
        ) from None
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        say(f"the file system of {folder} knows no locks: see that no other run writes to it")
        yield
        return
    try:
        yield
    finally:
        # Before it is let go: a fit that opened this very file meanwhile sees that it has no name any more.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()

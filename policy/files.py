"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a scratch folder beside `path`; on success it becomes `path`, on an exception it is removed.

    Raises FileExistsError when `path` exists and `overwrite` is False.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"output: expected a path that does not exist, got {path}; choose another or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
        if path.exists():
            # A folder cannot be replaced in one step; the old one is moved aside first, so `path` is always whole.
            aside = scratch.with_name(f"{scratch.name}.old")
            os.replace(path, aside)
            os.replace(scratch, path)
            shutil.rmtree(aside)
        else:
            os.replace(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside `path`, then move it into place."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(data)
    os.replace(scratch, path)

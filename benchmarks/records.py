"""Records of `benchmarks.decode`, read back: to draw them, and to add peers to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from policy.reading import read_json

NEEDED = ("batch", "context", "controller", "floor_ms", "ms_per_step", "name", "peer", "rung")
AGAIN = "measure it again with benchmarks.decode"


def load_record(path: Path) -> dict[str, Any]:
    """A record of `benchmarks.decode`. Raises FileNotFoundError, or ValueError, naming the file, for another file."""
    if not path.is_file():
        raise FileNotFoundError(f"--record: expected a file, got none at {path}; name a record")
    record = read_json(path, AGAIN)
    cases = record.get("cases")
    if record.get("benchmark") != "decode" or not isinstance(cases, list) or not cases:
        raise ValueError(f"{path}: expected a record of benchmarks.decode, got another file; {AGAIN}")
    for number, case in enumerate(cases):
        missing = [name for name in NEEDED if not isinstance(case, dict) or name not in case]
        if missing:
            raise ValueError(f"{path}: cases[{number}]: expected {missing[0]}, got none; {AGAIN}")
    return record


def newest(folder: Path) -> list[Path]:
    """The newest record of every shape in a folder, shapes by name. Raises FileNotFoundError where there is none."""
    found: dict[str, tuple[str, str, Path]] = {}
    for path in sorted(folder.glob("decode-*.json")):
        record = load_record(path)
        own = (record["date"], path.name, path)
        found[record["shape"]] = max(found.get(record["shape"], own), own)
    if not found:
        raise FileNotFoundError(f"--record: expected decode-*.json in {folder}, got none; run benchmarks.decode")
    return [found[shape][2] for shape in sorted(found)]

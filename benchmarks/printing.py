"""What all benchmarks share: checked arguments, the machine they ran on, medians with their spread, table and record.

A speed is judged against the time the machine needs to move the bytes that any version must move, so the bandwidth is
measured on the spot by a large copy, bytes read and bytes written both counted, and not taken from a data sheet.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from policy.limits import Limit
from runtime.loading import default_device, device_name, kernels_why_not

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft")

__all__ = [
    "commit", "copy_bandwidth", "default_device", "device_name", "device_slug", "finish", "header", "parse",
    "print_table", "read_bandwidth", "require_gpu", "require_kernels", "result_path", "seconds", "spread",
    "synchronise", "versions", "write",
]  # fmt: skip


def parse(parser: argparse.ArgumentParser, limits: Mapping[str, Limit]) -> argparse.Namespace:
    """The command line, every flag of `limits` (by its name without dashes) within its limit.

    Raises ValueError, naming the flag, where one is not.
    """
    args = parser.parse_args()
    for name, limit in limits.items():
        limit.take(f"--{name}", getattr(args, name.replace("-", "_")))
    return args


def require_gpu(device: torch.device) -> None:
    """Raises ValueError for another device, the speed of which nobody asks for."""
    if device.type != "cuda":
        raise ValueError(f"device: expected a GPU, whose speed is measured, got {device.type}; run it on one")


def require_kernels(device: torch.device) -> None:
    """Raises ValueError where the engine's kernels run neither on the device nor in Triton's interpreter."""
    if kernels_why_not(device, interpreted=True) is not None:
        raise ValueError(
            f"device: expected a GPU, or TRITON_INTERPRET=1 to have kernels interpreted, got {device.type}; set it"
        )


def result_path(output: str | Path | None, default_name: str) -> Path:
    """Where the record goes (default: `results/<default_name>.json`), known to be writable before any work is done.

    Raises FileExistsError for a folder, or for a path beneath a file, and PermissionError where nothing may be written.
    """
    path = Path(output) if output else RESULTS / f"{default_name}.json"
    if path.is_dir():
        raise FileExistsError(f"--output: expected a file, got the folder {path}; name a file in it")
    standing = next(parent for parent in path.absolute().parents if parent.exists())
    if not standing.is_dir():
        raise FileExistsError(
            f"--output: expected a path in a folder, got one beneath the file {standing}; choose another"
        )
    if not os.access(path if path.exists() else standing, os.W_OK):
        raise PermissionError(f"--output: expected a path that may be written, got {path}; choose another")
    return path


def device_slug(device: torch.device) -> str:
    """The device in a file name: `h200`, `cpu`."""
    if device.type == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device).lower().removeprefix("nvidia ").replace(" ", "-")


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def header(benchmark: str, device: torch.device) -> dict[str, Any]:
    """The first fields of every record."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"benchmark": benchmark, "date": today, "device": device_name(device), "versions": versions()}


def commit() -> str | None:
    """The commit that is checked out, where there is one, and whether anything was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "HEAD")
    return (head + ("+changes" if git("status", "--porcelain") else "")) or None


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest of at least one measurement, and how many there were."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a host clock read next to this means what it says."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a copy within device memory: median of ten after two warm-ups."""
    # Far larger than any cache, and random: some devices move zeros faster than data.
    size = 2**32 if device.type == "cuda" else 2**28
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(12)][2:]
    return 2 * size / statistics.median(times)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading device memory: a maximum over random numbers, median of ten after two warm-ups."""
    size = 2**32 if device.type == "cuda" else 2**28
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    times = [seconds(lambda: source.amax(), device) for _ in range(12)][2:]
    return size / statistics.median(times)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people: the first column flush left, numbers flush right."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, ["-" * width for width in widths], *rows):
        first, *numbers = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in numbers)]).rstrip())


def write(record: dict[str, Any], path: Path) -> None:
    """Write the record, or what there is of it so far, to a `result_path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def finish(record: dict[str, Any], path: Path) -> None:
    """Write the record to a `result_path` and print it as the last line of stdout."""
    write(record, path)
    print(json.dumps(record), flush=True)

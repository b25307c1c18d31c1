"""What all benchmarks share: the machine they ran on, medians with their spread, a table and a JSON record.

A speed is judged against the time the machine needs to move the bytes that any version must move, so the bandwidth is
measured on the spot by a large copy, bytes read and bytes written both counted, and not taken from a data sheet.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from runtime.loading import default_device, device_name

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft")

__all__ = [
    "copy_bandwidth", "default_device", "device_name", "device_slug", "finish", "header", "print_table", "seconds",
    "spread", "synchronise", "versions",
]  # fmt: skip


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


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people: the first column flush left, numbers flush right."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, ["-" * width for width in widths], *rows):
        first, *numbers = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in numbers)]).rstrip())


def finish(record: dict[str, Any], output: str | Path | None, default_name: str) -> None:
    """Write the record (default: `results/<default_name>.json`) and print it as the last line of stdout."""
    path = Path(output) if output else RESULTS / f"{default_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)

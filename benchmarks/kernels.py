"""Every kernel of a decode step alone: what it must read, how long that takes, and how long it takes.

    predicted = bytes it reads / measured read bandwidth
    measured  = a CUDA graph of launches over different memory, from a cold cache, over their number

Kernels are launched as a step launches them: each waits for the one before, and fetches what it can until then. In a
step its neighbours are other kernels, so the sum over a step is an estimate of it and no bound. At a rung a linear
reads its weights and what the rung reads, as what adapters add is made beside it (`launches`); what that costs is by
how much longer it takes than without adapters. Those who consume both read as much at every rung.

    python -m benchmarks.kernels --shape llama-7b               # one GPU with 80 GB
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policy.limits import Whole
from runtime.command import one_line_errors
from runtime.engine.graph import Graph
from runtime.engine.model import model_of
from runtime.engine.store import AdapterStore, needed_bytes

from .decode import gate
from .ladders import MIX, RANK, fill, random_ladder
from .launches import RUNGS, Kernel, Kernels
from .peers import release
from .printing import (
    commit,
    default_device,
    device_name,
    device_slug,
    finish,
    header,
    parse,
    print_table,
    read_bandwidth,
    require_gpu,
    result_path,
    spread,
)  # fmt: skip
from .shapes import SHAPES, build_model

BATCH = 32
FLUSH_BYTES = 2**30
"""Read before every replay: far more than a cache holds, and long enough for the host to be ahead of the device."""


def kernels_of(
    shape: str, dtype: torch.dtype, device: torch.device, adapters: int, contexts: dict[int, int]
) -> list[Kernels]:
    """The kernels of a random model of a shape with so many adapters resident, by batch the context in `contexts`."""
    model = model_of(build_model(shape, dtype, device), max(contexts.values()))
    ladder = random_ladder(model.modules(), dtype, device)
    one = needed_bytes([ladder], model.modules(), RANK, dtype)
    store = AdapterStore(
        model.modules(), slots=adapters, capacity_bytes=adapters * one, rungs=len(MIX), directions=RANK, dtype=dtype,
        device=device,
    )  # fmt: skip
    fill(store, ladder, adapters)
    return [Kernels(model, store, ladder, batch, context) for batch, context in contexts.items()]


def microseconds(kernel: Kernel, repeats: int, flush: Tensor) -> list[float]:
    """Microseconds a launch, of each of `repeats` replays behind a read of `flush`, which fills the cache.

    Raises ValueError where something is written that is no number.
    """

    def run() -> None:
        for launch in kernel.launches:
            launch()

    graph = Graph(run, flush.device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats + 1):
        for _ in range(4):
            flush.amax()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / len(kernel.launches))
    check(kernel)
    return times[1:]


def check(kernel: Kernel) -> None:
    """Raise ValueError unless all that a kernel has written are finite numbers."""
    if not all(bool(own.isfinite().all()) for own in kernel.outputs):
        raise ValueError(f"{kernel.name}: expected finite numbers, got others; its figures would mean nothing")


def record_of(kernel: Kernel, times: Sequence[float], bandwidth: float) -> dict[str, Any]:
    """A kernel's line of the record; bandwidth in bytes a second."""
    predicted = 1e6 * kernel.read_bytes / bandwidth
    return {
        "kernel": kernel.name, "batch": kernel.batch, "rung": kernel.rung, "read_bytes": kernel.read_bytes,
        "predicted_us": predicted, "measured_us": statistics.median(times), "spread": spread(times),
        "ratio": statistics.median(times) / predicted, "launches": len(kernel.launches),
    }  # fmt: skip


def table(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For people: a line for each kernel and batch; measured microseconds, and in brackets the predicted ones."""
    lines: dict[tuple[str, int], dict[Any, str]] = {}
    for own in records:
        cell = f"{own['measured_us']:.1f} ({own['predicted_us']:.1f})"
        lines.setdefault((own["kernel"], own["batch"]), {})[own["rung"]] = cell
    return [
        [f"{name}, {batch} row{'s' * (batch > 1)}", cells.get(None, ""), *(cells.get(rung, "") for rung in RUNGS)]
        for (name, batch), cells in sorted(lines.items(), key=lambda line: line[0][1])
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="Each kernel of a step alone.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--context", type=int, default=512, help="of the single row")
    parser.add_argument("--batch-context", type=int, default=2048, help=f"of {BATCH} rows")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/kernels-SHAPE-DEVICE.json)")
    tokens = Whole(32, 10**6)
    return parse(parser, {"context": tokens, "batch-context": tokens, "repeats": Whole(1, 10**4)})


def main() -> None:
    with one_line_errors():
        benchmark(arguments())


def benchmark(args: argparse.Namespace) -> None:
    """Check what is asked for, then time every kernel of the shape; print the table and write the record."""
    device = default_device()
    path = result_path(args.output, f"kernels-{args.shape}-{device_slug(device)}")
    require_gpu(device)
    measure(args, device, path)


def measure(args: argparse.Namespace, device: torch.device, path: Path) -> None:
    """The work, once it is known what it is."""
    passed = gate(device)
    bandwidth = read_bandwidth(device)
    print(f"{args.shape}, bfloat16, random weights, {device_name(device)}; gate: {passed}")
    print(f"limit: {bandwidth / 1e12:.3f} TB/s (read)", flush=True)
    contexts = {1: args.context, BATCH: args.batch_context}
    flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    records = []
    for kernels in kernels_of(args.shape, torch.bfloat16, device, BATCH, contexts):
        for kernel in kernels.all():
            records.append(record_of(kernel, microseconds(kernel, args.repeats, flush), bandwidth))
        release(device)
    columns = ("measured (predicted) us", "", *("exact" if rung == RANK else f"rung {rung}" for rung in RUNGS[:-1]))
    print_table((*columns, "no adapter"), table(records))
    finish(
        header("kernels", device)
        | {"shape": args.shape, "read_tb_s": bandwidth / 1e12, "gate": passed, "kernels": records, "commit": commit()},
        path,
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""`python -m runtime.measure`: write down what every rung takes on this GPU."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runtime.command import one_line_errors
from runtime.ladder import open_ladder
from runtime.loading import DTYPES, default_device, load_model, quiet_libraries

if TYPE_CHECKING:
    from runtime.measure.steps import Clock


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m runtime.measure",
        description="Milliseconds of a decode step at every rung of an adapter, for training.fit --latency.",
    )
    p.add_argument("--model", required=True, help="folder or hub id of the base model")
    p.add_argument("--adapter", required=True, help="saved ladder (of a PEFT LoRA folder or hub id its svd ladder)")
    p.add_argument("--batch", type=int, nargs="+", default=[1], help="rows of a step, powers of two (default: 1)")
    p.add_argument("--context", type=int, default=512, help="tokens that every row holds (default: 512)")
    p.add_argument("--adapters", type=int, default=1, help="copies of the adapter that rows take in turn (default: 1)")
    p.add_argument("--dtype", choices=sorted(DTYPES), default="auto")
    p.add_argument("--output", required=True, help="JSON file to write")
    return p


def main() -> None:
    args = parser().parse_args()
    quiet_libraries()
    with one_line_errors():
        measure(args, default_device())


def measure(args: argparse.Namespace, device: torch.device, clock: Clock | None = None) -> None:
    """Measure what the arguments ask for, a line a bucket, and write it down."""
    path = Path(args.output)
    if device.type != "cuda" and clock is None:
        raise ValueError(f"device: expected a GPU, whose steps are timed, got {device.type}; run it on one")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("triton: expected it for the engine's kernels, got none; install it")
    if path.is_dir():
        raise ValueError(f"output: expected a file, got the folder {path}; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)  # a path that cannot be is known before the work
    from runtime.measure.steps import measure_cost  # not before it is known that there is Triton

    ladder = open_ladder(args.adapter)
    model = load_model(args.model, dtype=args.dtype, device=device)
    cost = measure_cost(
        model, ladder, sorted(args.batch), context_tokens=args.context, adapters=args.adapters,
        clock=clock, say=lambda line: print(line, flush=True),
    )  # fmt: skip
    cost.save(path)
    print(f"written to {path}; python -m training.fit --adapter {args.adapter} --latency {path} goes by it")


if __name__ == "__main__":
    main()

"""Decoding with the engine: milliseconds a step beside the byte floor and beside what others take.

A step must read every weight, what its rows' rungs have of their adapters, and their KV:

    floor = (weights + adapters at their rungs + KV) / measured read bandwidth

Weights and adapters are random (`ladders`): speed depends on how many bytes are read and from where. Random weights
have no easy text, so where rungs vary a trace recorded on real text says which they are (`traces`): the controller
computes at every step, the trace decides. First comes a gate: the tokens of the engine and of the reference path are
the same, in float32, or nothing is timed.

    python -m benchmarks.decode --shape llama-7b               # one GPU with 80 GB
    python -m benchmarks.decode --shape llama-7b --peers       # and what plain PyTorch, transformers and PEFT take
    python -m benchmarks.decode --into R.json --compiled-peers # peers alone, into a record that there is
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from policy.limits import Whole
from runtime import build_ladder, generate, load_adapter
from runtime.command import one_line_errors

from .bench import STEPS, Bench
from .cases import Case, cases
from .correctness import random_tokens
from .net import COLUMNS, RETURNED, net, returned, rows_of
from .opponents import add_peers
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
    write,
)  # fmt: skip
from .records import load_record
from .shapes import SHAPES, build_model, write_adapter
from .traces import DEFAULT, load_traces


def gate(device: torch.device) -> str:
    """The engine's tokens are the reference path's, on a tiny model in float32. Raises ValueError otherwise."""
    model = build_model("tiny", torch.float32, device)
    with tempfile.TemporaryDirectory() as folder:
        ladder = build_ladder(load_adapter(write_adapter(model, 8, Path(folder))))
    for rows in (1, 3):
        prompt = random_tokens(model, rows, 40)
        for rung in (8, 2):
            ours, theirs = (
                generate(model, ladder, prompt, rung=rung, max_new_tokens=24, do_sample=False, fast=fast).sequences
                for fast in (True, False)
            )
            if not torch.equal(ours, theirs):
                raise ValueError(
                    f"gate: expected the reference path's tokens at rung {rung}, got others; mend that first"
                )
    return "tokens equal the reference path's in float32"


def table_row(record: dict[str, Any]) -> list[str]:
    """A case's line for people."""
    ms, peak = record["spread"], record["peak_bytes"]
    return [
        f"{record['batch']} x {record['context']}, {record['name']}", f"{record['ms_per_step']:.3f}",
        f"{ms['min']:.3f} - {ms['max']:.3f}", f"{record['floor_ms']:.3f}",
        f"{record['ms_per_step'] / record['floor_ms']:.2f}", "-" if peak is None else f"{peak / 1e9:.1f}",
    ]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description="Decode speed of the engine.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--context", type=int, default=512, help="of the single row, and of 64")
    parser.add_argument("--batch-context", type=int, default=2048, help="of 32 rows")
    parser.add_argument("--long-context", type=int, default=32768, help="of the row whose pages are in fewer bits")
    parser.add_argument("--adapters", type=int, default=32, help="resident with 32 rows")
    parser.add_argument("--trace", default=str(DEFAULT), help="rungs that were chosen on real text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="time plain PyTorch in a CUDA graph, transformers, PEFT")
    parser.add_argument("--compiled-peers", action="store_true", help="and the same compiled, a minute or more each")
    parser.add_argument("--into", help="a record: time no case, add to it the peers that it has not yet")
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/decode-SHAPE-DEVICE.json, or --into)")
    tokens = Whole(2 * STEPS, 10**6)
    return parse(
        parser,
        {
            "context": tokens,
            "batch-context": tokens,
            "long-context": tokens,
            "adapters": Whole(1, 4096),
            "repeats": Whole(1, 10**4),
        },
    )


def main() -> None:
    with one_line_errors():
        benchmark(arguments())


def benchmark(args: argparse.Namespace) -> None:
    """Check what is asked for, then time every case, and peers; print the tables and write the record."""
    device = default_device()
    path = result_path(args.output or args.into, f"decode-{args.shape}-{device_slug(device)}")
    traces = load_traces(Path(args.trace))
    wanted = list(cases(args.context, args.batch_context, args.long_context, args.adapters, traces))
    known = None if args.into is None else load_record(Path(args.into))
    require_gpu(device)
    if known is not None and (known["shape"], known["device"]) != (args.shape, device_name(device)):
        got = f"one of {known['shape']} on {known['device']}"
        raise ValueError(f"--into: expected a record of {args.shape} on {device_name(device)}, got {got}; time it anew")
    measure(args, device, path, wanted, known)


def measure(
    args: argparse.Namespace, device: torch.device, path: Path, wanted: Sequence[Case], known: dict[str, Any] | None
) -> None:
    """The work, once it is known what it is: `wanted` cases, or none but the peers of a `known` record."""
    passed = gate(device)
    bandwidth = read_bandwidth(device)
    print(f"{args.shape}, bfloat16, random weights, {device_name(device)}; gate: {passed}")
    print(f"limit: {bandwidth / 1e12:.3f} TB/s (read)", flush=True)
    bench = Bench(args.shape, torch.bfloat16, device, max(args.context, args.batch_context, args.long_context) + STEPS)
    if known is not None:
        record = known
    else:
        record = header("decode", device) | {
            "shape": args.shape, "read_tb_s": bandwidth / 1e12, "gate": passed, "trace": Path(args.trace).name,
            "cases": [], "controller": [], "commit": commit(),
        }  # fmt: skip
        for case in wanted:
            record["cases"].append(bench.time(case, args.repeats, bandwidth))
            print("  " + "  ".join(table_row(record["cases"][-1])), flush=True)
            write(record, path)
        record["controller"] = net(record["cases"], bandwidth)
    if args.peers or args.compiled_peers:
        add_peers(
            bench, record["cases"], args.repeats, plain=args.peers, compiled=args.compiled_peers,
            read_tb_s=bandwidth / 1e12, save=lambda: write(record, path),
        )  # fmt: skip
    print_table(("case", "ms/step", "range", "floor", "x floor", "peak GB"), list(map(table_row, record["cases"])))
    for own in record["cases"]:
        if "resident_rung" in own:
            held, exact = own["resident_bytes"] / 1e9, own["exact_bytes"] / 1e9
            print(f"{own['adapters']} adapters at rung {own['resident_rung']}: {held:.1f} GB; exact: {exact:.1f} GB")
    print_table(COLUMNS, rows_of(record.get("controller", [])))
    print_table(RETURNED, returned(record["cases"], 1e12 * record["read_tb_s"]))
    finish(record, path)


if __name__ == "__main__":
    main()

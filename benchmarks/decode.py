"""Decoding with the engine: milliseconds a step beside the byte floor and beside what others take.

A step must read every weight, what its rows' rungs have of their adapters, and their KV:

    floor = (weights + adapters at their rungs + KV) / measured read bandwidth

Weights and adapters are random (`ladders`): speed depends on how many bytes are read and from where. Random weights
have no easy text, so where rungs vary a trace says which they are: the controller computes at every step, the trace
decides. First comes a gate: the tokens of the engine and of the reference path are the same, in float32, or nothing is
timed.

    python -m benchmarks.decode --shape llama-7b               # one GPU with 80 GB
    python -m benchmarks.decode --shape llama-7b --peers       # and what plain PyTorch takes in a CUDA graph
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policy.fixed import FixedPolicy
from policy.learned import LearnedPolicy
from policy.limits import Whole
from policy.operating import Operating
from policy.settings import FULL_KV, Settings
from runtime import build_ladder, generate, load_adapter
from runtime.command import one_line_errors
from runtime.control.bucket import Offer
from runtime.control.stream import Stream
from runtime.engine.buffers import Pool
from runtime.engine.control import Ladders
from runtime.engine.decoder import Bucket, Decoder, pages_for
from runtime.engine.model import Model, model_of
from runtime.engine.store import AdapterStore, needed_bytes
from runtime.ladder import Ladder

from .correctness import random_tokens
from .ladders import MIX, RANK, random_ladder
from .peers import graphed, measure, ms_per_step, release
from .printing import (
    default_device,
    device_name,
    device_slug,
    finish,
    header,
    parse,
    print_table,
    read_bandwidth,
    result_path,
    spread,
)  # fmt: skip
from .shapes import SHAPES, build_model, kv_token_bytes, weight_bytes, write_adapter

STEPS = 64
"""Tokens that a row's log holds."""
TOP = RANK


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    batch: int
    context: int
    rungs: tuple[int, ...] = ()
    """Equivalent ranks that rows take in turn; none: no adapter."""
    controller: bool = False
    """Signals and policy at every step, the rungs from a trace."""

    @property
    def name(self) -> str:
        if not self.rungs:
            return "no adapter"
        which = "exact" if self.rungs == (TOP,) else f"rung {', '.join(map(str, self.rungs))}"
        return f"{min(self.batch, 32)} adapters, {which}{', deciding' if self.controller else ''}"


def cases(context: int, batch_context: int) -> Iterator[Case]:
    """Alone and in a batch: nothing, exact, with the controller, and lower rungs, alike and mixed."""
    for batch, tokens in ((1, context), (32, batch_context)):
        yield Case(batch, tokens)
        yield Case(batch, tokens, (TOP,))
        yield Case(batch, tokens, (TOP,), controller=True)
        for rung in (16, 8, 4):
            yield Case(batch, tokens, (rung,))
    yield Case(32, batch_context, (12, 16, 24), controller=True)
    yield Case(32, batch_context, (6, 8, 12), controller=True)


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


class Bench:
    """A model with its adapters and pages, on which cases are timed."""

    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device, adapters: int) -> None:
        self.hf = build_model(shape, dtype, device)
        self.model: Model = model_of(self.hf, self.hf.config.max_position_embeddings)
        modules = self.model.modules()
        self.ladder: Ladder = random_ladder(modules, dtype, device)
        one = needed_bytes([self.ladder], modules, RANK, dtype)
        self.store = AdapterStore(
            modules, slots=adapters, capacity_bytes=adapters * one, rungs=len(MIX), directions=RANK, dtype=dtype,
            device=device,
        )  # fmt: skip
        for _ in range(adapters):  # the same content, but memory of its own
            self.store.load(self.ladder)
        self.ladders = Ladders.of(adapters, self.model.shape.vocabulary, len(MIX), device)

    def time(self, case: Case, repeats: int) -> dict[str, Any]:
        """The case's record: milliseconds a step, bytes, peak memory."""
        device = self.model.device
        release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        decoder = self._decoder(case)
        steps = 8 if case.batch == 1 else 4

        def run() -> float:
            decoder.buffers.lengths.fill_(case.context)
            decoder.generated.count.zero_()
            return ms_per_step(decoder.run, steps, device)

        run()
        times = [run() for _ in range(repeats)]
        if not bool(decoder.buffers.logits.isfinite().all()):
            raise ValueError(f"{case.name}: expected finite logits, got others; the figures mean nothing")
        adapter_bytes = round(case.batch * sum(map(self._rung_bytes, case.rungs)) / max(len(case.rungs), 1))
        return {
            "shape": None, "batch": case.batch, "adapters": min(case.batch, 32) if case.rungs else 0,
            "context": case.context, "rung": list(case.rungs), "kv": "bf16", "controller": case.controller,
            "ms_per_step": spread(times), "adapter_bytes": adapter_bytes,
            "bytes": weight_bytes(self.hf) + adapter_bytes + case.batch * case.context * kv_token_bytes(self.hf),
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        }  # fmt: skip

    def _rung_bytes(self, rung: int) -> int:
        return int(self.ladder.rung_bytes()[list(MIX).index(rung)])

    def _decoder(self, case: Case) -> Decoder:
        device, rows = self.model.device, case.batch
        pages = pages_for(case.context + STEPS)
        settings = Settings(kv=FULL_KV)
        policy: Any = LearnedPolicy(tuple(MIX)) if case.controller else FixedPolicy(tuple(MIX))
        policy = policy.to(device)
        taken = case.rungs or (TOP,)
        rungs = torch.tensor([list(MIX).index(taken[row % len(taken)]) for row in range(rows)])
        trace = _trace(case).to(device) if case.controller else None
        store, ladders = (self.store, self.ladders) if case.rungs else (None, None)
        decoder = Decoder(
            self.model, Pool.of(self.model, rows * pages), store, ladders, policy, settings,
            Bucket(rows, pages, STEPS, 1, case.controller), trace=trace,
        )  # fmt: skip
        decoder.buffers.table.copy_(torch.arange(rows * pages, dtype=torch.int32).view(rows, pages))
        if decoder.controller is not None:
            cost = (self.ladder.rung_bytes() / self.ladder.rung_bytes()[-1]).expand(rows, -1)
            knob = 0.0 if case.controller else rungs.float()
            operating = Operating.at(knob, rungs)
            stream = Stream(settings, policy, operating, Offer.of(cost), device)
            slots = torch.arange(rows, dtype=torch.int32, device=device) % len(self.store.ladders)
            decoder.controller.load(torch.arange(rows, device=device), stream, slots)
        decoder.generated.ended.zero_()
        return decoder


def _trace(case: Case) -> Tensor:
    """[B, N] int16: every row goes through the case's rungs in turn, each from its own."""
    order = torch.tensor([list(MIX).index(rung) for rung in case.rungs])
    start = torch.arange(case.batch)[:, None] + torch.arange(STEPS)
    return order[start % len(order)].to(torch.int16)


def peer_records(bench: Bench, case_list: list[Case], repeats: int) -> dict[str, Any]:
    """What a plain-PyTorch CUDA graph takes for the cases without and with the exact adapter."""
    found = {}
    for case in case_list:
        if case.controller or case.rungs not in ((), (TOP,)):
            continue
        rank = TOP if case.rungs else None
        name = f"{case.batch} rows, context {case.context}, {'no adapter' if rank is None else f'r={TOP} each'}"
        found[name] = measure(graphed(bench.hf, case.batch, case.context, rank), 8, repeats, bench.model.device)
        print(f"  peer {name}: {found[name]['ms_per_step']['median']:.3f} ms", flush=True)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description="Decode speed of the engine.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--context", type=int, default=512, help="of the single row")
    parser.add_argument("--batch-context", type=int, default=2048, help="of 32 rows")
    parser.add_argument("--adapters", type=int, default=32, help="resident")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="time plain PyTorch in a CUDA graph too")
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/decode-SHAPE-DEVICE.json)")
    tokens = Whole(32, 10**6)
    return parse(
        parser,
        {"context": tokens, "batch-context": tokens, "adapters": Whole(1, 4096), "repeats": Whole(1, 10**4)},
    )


def main() -> None:
    with one_line_errors():
        benchmark(arguments())


def benchmark(args: argparse.Namespace) -> None:
    device = default_device()
    path = result_path(args.output, f"decode-{args.shape}-{device_slug(device)}")
    if device.type != "cuda":
        raise ValueError(f"device: expected a GPU, whose speed is measured, got {device.type}; run it on one")
    passed = gate(device)
    bandwidth = read_bandwidth(device)
    print(f"{args.shape}, bfloat16, random weights, {device_name(device)}; gate: {passed}")
    print(f"limit: {bandwidth / 1e12:.3f} TB/s (read)", flush=True)
    bench = Bench(args.shape, torch.bfloat16, device, args.adapters)
    records, rows = [], []
    chosen = list(cases(args.context, args.batch_context))
    for case in chosen:
        record = bench.time(case, args.repeats) | {"shape": args.shape}
        floor = 1000 * record["bytes"] / bandwidth
        record |= {"floor_ms": floor, "kv_share": 1.0, "peer": None}
        records.append(record)
        ms = record["ms_per_step"]
        rows.append(
            [
                f"{case.batch} x {case.context}, {case.name}", f"{ms['median']:.3f}",
                f"{ms['min']:.3f} - {ms['max']:.3f}", f"{floor:.3f}", f"{ms['median'] / floor:.2f}",
                f"{(record['peak_bytes'] or 0) / 1e9:.1f}",
            ]
        )  # fmt: skip
        print("  " + "  ".join(rows[-1]), flush=True)
    peers = peer_records(bench, chosen, args.repeats) if args.peers else {}
    print_table(("case", "ms/step", "range", "floor", "x floor", "peak GB"), rows)
    finish(
        header("decode", device)
        | {"shape": args.shape, "read_tb_s": bandwidth / 1e12, "gate": passed, "cases": records, "peers": peers,
           "commit": commit()},
        path,
    )  # fmt: skip


def commit() -> str | None:
    """The commit that is checked out, where there is one, and whether anything was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "HEAD")
    return (head + ("+changes" if git("status", "--porcelain") else "")) or None


if __name__ == "__main__":
    main()

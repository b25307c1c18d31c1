"""Prompts through the engine: milliseconds of a whole prompt, beside what its products take at the speed measured.

A prompt is bound by arithmetic, so the limit is

    floor = 2 * (tokens * (weights of linears + adapter) + head + attention) / measured speed of a large product

Four prompts follow each other, so that the host prepares one while the device is at the one before; the first begins on
a device that has nothing to do, and the adapter's matrices are there already. How long a prompt takes alone, from when
the host begins with it, is told too. Before prompts in a row some of the same go by untimed: a card at its power limit
runs at a clock that depends on what it did before.

A static rung takes the whole prompt in one pass. An adaptive one goes block by block: signals and complexity of every
token, a scale for each, and pages that leave the window get their format. Weights and adapters are random, as
everywhere here: speed depends on shapes. First comes a gate: tokens behind prompts of the engine and of the reference
path are the same, in float32, or nothing is timed. Its prompts are short and static; tests have blocks and coded pages.

    python -m benchmarks.prefill --shape llama-7b      # one GPU with 80 GB
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from policy.fixed import FixedPolicy
from policy.learned import LearnedPolicy
from policy.limits import Whole
from policy.operating import Operating
from policy.settings import FULL_KV, KVSettings, Settings
from runtime.command import one_line_errors
from runtime.control.bucket import Offer
from runtime.control.stream import Stream
from runtime.engine.control import Ladders
from runtime.engine.lanes import Lanes
from runtime.engine.model import Model, model_of
from runtime.engine.page_pool import Pool, units_needed, units_of
from runtime.engine.prompt_pass import Room
from runtime.engine.prompts import Prefill, Prompt, Workroom
from runtime.engine.store import AdapterStore, needed_bytes
from runtime.kv.units import pages_for
from runtime.ops.pages import leave

from .decode import gate
from .fused import fuse
from .ladders import MIX, RANK, random_ladder
from .peers import ms_per_step
from .printing import (
    commit,
    default_device,
    device_name,
    device_slug,
    finish,
    header,
    parse,
    print_table,
    require_gpu,
    result_path,
    spread,
)  # fmt: skip
from .shapes import SHAPES, build_model

WARM_UPS, IN_A_ROW = 2, 4
SIDE = 8192
"""Of the square product whose speed is the limit"""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    rung: int | None
    """Equivalent rank of the prompt; None: no adapter"""
    block: int | None = None
    """Tokens of a block, where signals are measured and pages get their formats; None: static, one pass"""

    @property
    def name(self) -> str:
        rung = "no adapter" if self.rung is None else "exact" if self.rung == RANK else f"rung {self.rung}"
        return rung if self.block is None else f"{rung}, adaptive in blocks of {self.block}"


class PromptBench:
    """A random model of a shape and an adapter of it, and one row whose prompt is processed again and again."""

    def __init__(self, shape: str, device: torch.device, tokens: int) -> None:
        self.hf = build_model(shape, torch.bfloat16, device)
        fuse(self.hf)
        self.model: Model = model_of(self.hf, tokens + 1)
        self.tokens = tokens
        modules, dtype = self.model.modules(), self.model.dtype
        ladder = random_ladder(modules, dtype, device)
        self.store = AdapterStore(
            modules, slots=1, capacity_bytes=needed_bytes([ladder], modules, RANK, dtype), rungs=len(MIX),
            directions=RANK, dtype=dtype, device=device,
        )  # fmt: skip
        self.store.load(ladder)
        self.ladders = Ladders.of(1, self.model.shape.vocabulary, len(MIX), device)
        spent = ladder.rung_bytes()
        self._offer = Offer.of((spent / spent[-1]).expand(1, -1))
        self.ids = torch.randint(3, self.model.shape.vocabulary, (tokens,)).tolist()

    def prepared(self, case: Case) -> Callable[[int], float]:
        """What processes so many prompts in a row and tells the milliseconds that each took; warmed up."""
        device, block = self.model.device, case.block
        kv = FULL_KV if block is None else KVSettings()
        settings = Settings(kv=kv)
        policy: Any = FixedPolicy(tuple(MIX)) if block is None else LearnedPolicy(tuple(MIX))
        policy = policy.to(device)
        index = 0 if case.rung is None else list(MIX).index(case.rung)
        operating = Operating.at(float(index) if block is None else 0.0, index, kv)
        units = units_of(self.model, coded=block is not None)
        count = units_needed(operating.kv, [self.tokens + 1], units, block or self.tokens)
        pool = Pool.of(self.model, count, units.coded)
        lanes = Lanes.of(self.model, units, 1, pages_for(self.tokens + 1), 1, 0)
        room = Room(block or self.tokens, 1, 1, block is not None)
        row = torch.zeros(1, dtype=torch.int32, device=device)
        store, ladders = (None, None) if case.rung is None else (self.store, self.ladders)
        workroom = Workroom.of(self.model, store, settings, room)
        prefill = Prefill(self.model, pool, workroom, ladders, lanes, settings)

        @torch.no_grad()
        def once() -> Prompt:
            stream = Stream(settings, policy, operating, self._offer, device)
            prompt = Prompt(0, [self.ids], stream, operating, self._offer, [0], blocks=block, device=device)
            leave(prefill.tables, pool.free, lanes.turned, row)
            prefill.begin(prompt)
            while not prompt.over:
                prefill.run([(prompt, prompt.upto(room.tokens))])
            return prompt

        def run(count: int) -> float:
            return ms_per_step(once, count, device)

        logits = once().logits
        if logits is None or not bool(logits.isfinite().all()) or int(pool.free.dry):
            raise ValueError(f"{case.name}: expected finite logits and pages for all, got others; mend that first")
        run(WARM_UPS)
        return run

    def records(self, cases: Sequence[Case], repeats: int) -> list[dict[str, Any]]:
        """Each case's record. Cases take turns: a card that is warm is slower for all of them."""
        runs = [self.prepared(case) for case in cases]
        alone: list[list[float]] = [[] for _ in runs]
        in_a_row: list[list[float]] = [[] for _ in runs]
        for _ in range(repeats):
            for one, many, run in zip(alone, in_a_row, runs, strict=True):
                run(IN_A_ROW)
                many.append(run(IN_A_ROW))
                one.append(run(1))
        return [
            {
                "name": case.name, "rung": case.rung, "block": case.block, "tokens": self.tokens,
                "ms": statistics.median(many), "spread": spread(many), "alone_ms": statistics.median(one),
                "alone_spread": spread(one), "flops": self.flops(case),
            }
            for case, one, many in zip(cases, alone, in_a_row, strict=True)
        ]  # fmt: skip

    def flops(self, case: Case) -> int:
        """Multiplications and additions of a prompt: linears, the adapter's directions, attention, and the head, of the
        last token alone where nothing is decided."""
        s = self.model.shape
        linears = sum(own.inputs * own.outputs for own in self.model.modules().values())
        directions = 0 if case.rung is None else sum(MIX[case.rung])
        adapter = directions * sum(own.inputs + own.outputs for own in self.model.modules().values())
        head = s.hidden * s.vocabulary * (1 if case.block is None else self.tokens)
        attention = 2 * s.layers * s.heads * s.head_dim * self.tokens**2 // 2
        return 2 * (self.tokens * (linears + adapter) + head + attention)


def product_speed(device: torch.device) -> float:
    """Operations a second of a large bfloat16 product, the best of several."""
    a, b = (torch.randn(SIDE, SIDE, device=device).bfloat16() for _ in range(2))
    best = min(ms_per_step(lambda: a @ b, 1, device) for _ in range(10))
    return 2 * SIDE**3 / best * 1000


@torch.no_grad()
def transformers_ms(bench: PromptBench, repeats: int) -> dict[str, float]:
    """What transformers takes for the same prompt, without an adapter: its own forward with SDPA and a cache."""
    ids = torch.tensor([bench.ids], device=bench.model.device)

    def once() -> None:
        bench.hf(ids, use_cache=True, logits_to_keep=1)

    once()
    return spread([ms_per_step(once, 1, bench.model.device) for _ in range(repeats)])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description="Speed of prompts in the engine.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--block", type=int, default=512, help="of an adaptive prompt")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/prefill-SHAPE-DEVICE.json)")
    tokens = Whole(16, 10**5)
    return parse(parser, {"tokens": tokens, "block": tokens, "repeats": Whole(1, 10**4)})


def main() -> None:
    with one_line_errors():
        benchmark(arguments())


def benchmark(args: argparse.Namespace) -> None:
    """Check what is asked for, then time every case; print the table and write the record."""
    device = default_device()
    path = result_path(args.output, f"prefill-{args.shape}-{device_slug(device)}")
    require_gpu(device)
    passed = gate(device)
    speed = product_speed(device)
    print(f"{args.shape}, bfloat16, random weights, {device_name(device)}; gate: {passed}")
    print(f"limit: {speed / 1e12:.0f} TFLOP/s (a product of {SIDE} x {SIDE})", flush=True)
    bench = PromptBench(args.shape, device, args.tokens)
    wanted = [Case(None), Case(RANK), Case(16), Case(8), *(Case(rung, args.block) for rung in (RANK, 16, 8))]
    record = header("prefill", device) | {
        "shape": args.shape, "tflops": speed / 1e12, "gate": passed, "cases": [], "commit": commit(),
    }  # fmt: skip
    record["cases"] = bench.records(wanted, args.repeats)
    record["transformers"] = transformers_ms(bench, args.repeats)
    print_table(
        ("prompt", "ms", "range", "floor", "x floor", "x no adapter", "alone"),
        [table_row(own, record) for own in record["cases"]],
    )
    print(f"transformers, no adapter: {record['transformers']['median']:.2f} ms")
    finish(record, path)


def table_row(own: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """A case's line for people."""
    floor = own["flops"] / record["tflops"] / 1e9
    bare = record["cases"][0]["ms"]
    return [
        f"{own['tokens']} tokens, {own['name']}", f"{own['ms']:.2f}",
        f"{own['spread']['min']:.2f} - {own['spread']['max']:.2f}", f"{floor:.2f}", f"{own['ms'] / floor:.2f}",
        f"{own['ms'] / bare:.3f}", f"{own['alone_ms']:.2f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()

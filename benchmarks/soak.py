"""Hours of requests on a tiny model: whether memory grows, and whether a page is ever lost.

Requests of random lengths, adapters, budgets, priorities and sampling come and go, some are cancelled on the way, and
the pool is so small that others give way. From time to time all are let run out, and the units that are free then are
counted: all of them, each once. Memory is read at the same points, when nothing is under way.

    python -m benchmarks.soak --steps 1000000      # one GPU
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from dataclasses import dataclass
from typing import Any

import torch

from policy.limits import Whole
from runtime.command import one_line_errors
from runtime.engine.request import CANCELLED, Answer, Request
from runtime.engine.serving import Engine
from runtime.ops.reference.sampling import Sampling

from .memory import resident_bytes
from .printing import (
    commit,
    default_device,
    device_name,
    device_slug,
    finish,
    header,
    parse,
    print_table,
    require_kernels,
    result_path,
    write,
)  # fmt: skip
from .request_trace import BUDGETS
from .serve import policy_for, random_ladder_of, tiny_engine
from .shapes import build_model

ROWS, CONTEXT, UNITS = 4, 1024, 500
"""Of the engine, of a row in tokens, and of the pool: for the longest request, and some of the others"""
WAITING = 2
"""Requests beside those that have rows"""
PROMPT, ANSWER = (1, 100), (1, 800)
"""Tokens, the fewest and the most"""
GIVEN_UP = 0.1
"""Of all requests, at a random step"""
SAMPLED = 0.5
"""Of all requests; the others are greedy"""
POINTS = 20
"""How often units are counted"""


@dataclass
class Done:
    """What has become of requests so far."""

    requests: int = 0
    tokens: int = 0
    cancelled: int = 0
    preempted: int = 0
    rows: int = 0
    """In use, of all steps together"""

    def count(self, answer: Answer) -> None:
        """One more is over."""
        self.requests += 1
        self.tokens += len(answer.tokens)
        self.cancelled += answer.finished == CANCELLED
        self.preempted += answer.preempted


def request(engine: Engine, drawn: random.Random) -> Request:
    """A random one."""
    vocabulary = engine.model.shape.vocabulary
    return Request(
        [drawn.randrange(3, vocabulary) for _ in range(drawn.randint(*PROMPT))],
        engine.operating(drawn.choice([*engine.names]), budget=drawn.choice(BUDGETS)),
        sampling=Sampling(temperature=0.8 if drawn.random() < SAMPLED else 0.0, seed=drawn.randrange(2**32)),
        max_new_tokens=drawn.randint(*ANSWER), priority=drawn.randint(0, 2),
    )  # fmt: skip


def run(engine: Engine, steps: int, drawn: random.Random, done: Done) -> None:
    """So many steps with requests coming, and as many more as those that are there take."""
    live: dict[Answer, int] = {}
    for step in range(steps):
        while len(live) < ROWS + WAITING:
            due = step + drawn.randint(1, ANSWER[1]) if drawn.random() < GIVEN_UP else -1
            live[engine.add(request(engine, drawn))] = due
        for news in engine.step():
            if news.finished is not None and news.answer in live:
                done.count(news.answer)
                del live[news.answer]
        for answer in [own for own, due in live.items() if due == step]:
            engine.cancel(answer)  # which nobody is told of but who did it
            done.count(answer)
            del live[answer]
        done.rows += engine.live
    while engine.busy:
        engine.step()
    for answer in live:
        assert answer.finished is not None, "nobody is forgotten"
        done.count(answer)


def lost(engine: Engine) -> int:
    """Units of a pool that nobody has and that are not free, or that are free twice. Nothing is under way."""
    free = engine.pool.free
    there = free.stack[: int(free.top)].tolist()
    return len(engine.pool) - len(set(there)) + len(there) - len(set(there))


def point(engine: Engine, steps: int, done: Done, begun: float) -> dict[str, Any]:
    """What there is at a point where nothing is under way."""
    gc.collect()
    device = engine.model.device
    cuda = device.type == "cuda"
    return {
        "steps": steps, "requests": done.requests, "tokens": done.tokens, "cancelled": done.cancelled,
        "preempted": done.preempted, "rows": done.rows / steps, "units": len(engine.pool),
        "lost": lost(engine), "dry": int(engine.pool.free.dry),
        "resident_bytes": resident_bytes(), "device_bytes": torch.cuda.memory_allocated(device) if cuda else 0,
        "reserved_bytes": torch.cuda.memory_reserved(device) if cuda else 0, "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/soak-DEVICE.json)")
    return parse(parser, {"steps": Whole(POINTS, 10**9)})


def main() -> None:
    with one_line_errors():
        benchmark(arguments())


def benchmark(args: argparse.Namespace) -> None:
    """Go through the steps; print what there was at every point, and write the record."""
    device = default_device()
    path = result_path(args.output, f"soak-{device_slug(device)}")
    require_kernels(device)
    model = build_model("tiny", torch.float32, device)
    ladder = random_ladder_of(model)
    engine = tiny_engine(model, ladder, policy_for(model, ladder, 32), ROWS, UNITS, CONTEXT)
    print(f"tiny, float32, {device_name(device)}: {ROWS} rows, {len(engine.pool)} units", flush=True)
    drawn, done, points = random.Random(0), Done(), []
    begun, steps = time.perf_counter(), 0
    record = header("soak", device) | {
        "rows": ROWS, "context": CONTEXT, "units": len(engine.pool), "commit": commit(), "points": points,
    }  # fmt: skip
    for number in range(POINTS):
        more = args.steps * (number + 1) // POINTS - args.steps * number // POINTS
        run(engine, more, drawn, done)
        steps += more
        points.append(point(engine, steps, done, begun))
        print("  ".join(f"{name} {value:,.10g}" for name, value in points[-1].items()), flush=True)
        write(record, path)
    first, last = points[0], points[-1]
    grown = {name: last[name] - first[name] for name in ("resident_bytes", "device_bytes", "reserved_bytes")}
    print_table(
        ("steps", "rows in use", "requests", "gave way", "units lost", "device grew by", "host grew by"),
        [[
            f"{steps:,}", f"{done.rows / steps:.2f}", f"{done.requests:,}", f"{done.preempted:,}",
            str(max(own["lost"] for own in points)), f"{grown['device_bytes']:,}", f"{grown['resident_bytes']:,}",
        ]],
    )  # fmt: skip
    finish(record | {"grown": grown}, path)
    if any(own["lost"] or own["dry"] for own in points):
        raise ValueError("units: expected all to be free when nobody has any, got fewer; see the record")


if __name__ == "__main__":
    main()

"""Requests that come and go: tokens a second, what each token waits for, and the same requests a batch at a time.

Prompts and answers, adapters, budgets and arrivals are those of a committed trace (`request_trace`), on random weights.
Every request has a learned policy's decisions at its own budget, and pages in few bits. Beside it stands what a server
does that has batches but no requests that join: it takes all that wait, answers them to the last token, and takes the
next ones then.

First comes a gate: on a tiny model in float32, in a pool so small that requests give way, each gets the tokens that it
gets alone.

    python -m benchmarks.serve --shape llama-7b      # one GPU with 80 GB
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from policy.checkpoint import Fingerprints, PolicyCheckpoint
from policy.curve import KnobCurve
from policy.learned import LearnedPolicy
from policy.limits import Whole
from policy.settings import KVSettings, Settings
from runtime.command import one_line_errors
from runtime.engine.model import model_of
from runtime.engine.request import Answer, Request
from runtime.engine.serving import Engine
from runtime.fingerprint import model_fingerprint
from runtime.ladder import Ladder

from .fused import fuse
from .ladders import random_ladder
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
)  # fmt: skip
from .request_trace import ADAPTERS, BUDGETS, Arrival, load
from .shapes import SHAPES, build_model

TINY_ROWS, TINY_POOL = 4, 60
"""Of the gate: rows, and units for what would fill several times as many"""


@dataclass
class Timed:
    """When a request came, and when its tokens did; seconds."""

    answer: Answer
    came: float
    tokens: list[float] = field(default_factory=list)


def policy_for(model: PreTrainedModel, ladder: Ladder, block: int) -> PolicyCheckpoint:
    """A learned policy of random weights, which any budget goes with: what it chooses follows from nothing."""
    cost = ladder.rung_bytes().float() / ladder.rung_bytes()[-1].float()
    torch.manual_seed(0)
    policy = LearnedPolicy(ladder.rungs, cost=cost)
    prints = Fingerprints(
        model=model_fingerprint(model), adapter=ladder.adapter, ladder=ladder.fingerprint, shared=True
    )
    curve = KnobCurve(tuple(BUDGETS), (-1.5, -2.5, -4.0, -6.0))
    settings = Settings(prompt_tokens=block, kv=KVSettings())
    return PolicyCheckpoint(policy, settings, curve, tuple(cost.tolist()), prints, 0.25)


def requests_of(engine: Engine, trace: Sequence[Arrival], seed: int = 0) -> list[Request]:
    """The trace's requests with random prompts, greedy."""
    random = torch.Generator().manual_seed(seed)
    vocabulary, names = engine.model.shape.vocabulary, list(engine.names)
    return [
        Request(
            torch.randint(3, vocabulary, (own.prompt,), generator=random).tolist(),
            engine.operating(names[own.adapter % len(names)], budget=own.budget), max_new_tokens=own.answer,
        )
        for own in trace
    ]  # fmt: skip


def serve(engine: Engine, trace: Sequence[Arrival], *, batches: bool = False) -> dict[str, Any]:
    """Answer the trace; with `batches` nobody joins while others are answered."""
    requests = requests_of(engine, trace)
    timed: dict[int, Timed] = {}
    waiting = list(zip(trace, requests, strict=True))
    came: list[tuple[Request, float]] = []
    steps, live = 0, []
    begin = time.perf_counter()
    while waiting or came or engine.busy:
        now = time.perf_counter() - begin
        while waiting and waiting[0][0].arrival <= steps:
            came.append((waiting.pop(0)[1], now))
        if not batches or not engine.busy:
            for request, at in came[: engine.rows if batches else None]:
                answer = engine.add(request)
                timed[answer.number] = Timed(answer, at)
            came = came[engine.rows :] if batches else []
        if not (engine.busy or came):
            steps = waiting[0][0].arrival
            continue
        news = engine.step()
        now = time.perf_counter() - begin
        for own in news:
            timed[own.answer.number].tokens += [now] * len(own.tokens)
        steps += 1
        live.append(engine.live)
    taken = time.perf_counter() - begin
    return summary(list(timed.values()), taken, live)


def summary(timed: Sequence[Timed], taken: float, live: Sequence[int]) -> dict[str, Any]:
    """Throughput, and milliseconds to the first token and between tokens."""
    first = [1000 * (own.tokens[0] - own.came) for own in timed]
    between = [1000 * (b - a) for own in timed for a, b in zip(own.tokens, own.tokens[1:], strict=False)]
    prompts = sum(len(own.answer.request.prompt) for own in timed)
    answers = sum(len(own.answer.tokens) for own in timed)
    return {
        "requests": len(timed), "seconds": taken, "prompt_tokens": prompts, "answer_tokens": answers,
        "answer_tokens_a_second": answers / taken, "first_token_ms": percentiles(first),
        "token_ms": percentiles(between),
        "live": {"least": min(live), "mean": statistics.mean(live), "most": max(live)},
        "preempted": sum(own.answer.preempted for own in timed),
    }  # fmt: skip


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th of 100 parts."""
    own = torch.tensor(values, dtype=torch.float64)
    return {f"p{share}": float(own.quantile(share / 100)) for share in (50, 95, 99)}


def gate(device: torch.device) -> str:
    """Requests get alone what they get in company, in float32, some of them having given way. Raises ValueError
    otherwise."""
    model = build_model("tiny", torch.float32, device)
    ladder = random_ladder_of(model)
    policy = policy_for(model, ladder, 32)
    trace = [Arrival(0, 10 + 7 * n, 40, n % 2, BUDGETS[n % 4]) for n in range(8)]
    company = tiny_engine(model, ladder, policy, TINY_ROWS, TINY_POOL)
    answers = company.run(requests_of(company, trace))
    if not any(own.preempted for own in answers):
        raise ValueError("gate: expected requests that give way, got none; the pool is too large")
    alone = tiny_engine(model, ladder, policy, 1, TINY_POOL)
    for request, answer in zip(requests_of(alone, trace), answers, strict=True):
        if alone.run([request])[0].tokens != answer.tokens:
            raise ValueError(f"gate: expected the tokens of request {answer.number} alone, got others; mend that first")
    return f"tokens equal those of each request alone in float32, {sum(a.preempted for a in answers)} having given way"


def random_ladder_of(model: PreTrainedModel) -> Ladder:
    """A random ladder of all linears of a model."""
    own = model_of(model, 1)
    return random_ladder(own.modules(), own.dtype, own.device)


def tiny_engine(
    model: PreTrainedModel, ladder: Ladder, policy: PolicyCheckpoint, rows: int, units: int, context: int = 160
) -> Engine:
    """Of so many rows, units of its pool, and tokens of a row."""
    config = model.config
    each = config.num_hidden_layers * config.num_key_value_heads * (16 * 32 + 96)
    return Engine(
        model, {"one": ladder, "two": ladder}, policy=policy, rows=rows, context=context, part_tokens=32,
        pool_bytes=units * each,
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description="Requests that come and go.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--adapters", type=int, default=ADAPTERS)
    parser.add_argument("--rows", type=int, default=64, help="answered at a time, at most")
    parser.add_argument("--block", type=int, default=512, help="tokens of a block of prompts")
    parser.add_argument("--requests", type=int, default=200, help="of the trace, the first ones")
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/serve-SHAPE-DEVICE.json)")
    return parse(
        parser,
        {
            "adapters": Whole(1, 4096),
            "rows": Whole(1, 128),
            "block": Whole(16, 10**5),
            "requests": Whole(1, 10**6),
        },
    )


def main() -> None:
    with one_line_errors():
        benchmark(arguments())


def benchmark(args: argparse.Namespace) -> None:
    """Check what is asked for, then answer the trace both ways; print the table and write the record."""
    device = default_device()
    path = result_path(args.output, f"serve-{args.shape}-{device_slug(device)}")
    trace = load()[: args.requests]
    require_gpu(device)
    passed = gate(device)
    print(f"{args.shape}, bfloat16, random weights, {device_name(device)}; gate: {passed}", flush=True)
    model = build_model(args.shape, torch.bfloat16, device)
    fuse(model)
    ladder = random_ladder_of(model)
    begin = time.perf_counter()
    engine = Engine(
        model, {f"adapter {n}": ladder for n in range(args.adapters)}, policy=policy_for(model, ladder, args.block),
        rows=args.rows, context=2048, part_tokens=args.block,
    )  # fmt: skip
    print(f"made in {time.perf_counter() - begin:.1f} s: {len(engine.pool)} units, {engine.pool.nbytes / 1e9:.1f} GB")
    serve(engine, trace[:8])  # graphs of prompts are captured when they are first needed
    record = header("serve", device) | {
        "shape": args.shape, "adapters": args.adapters, "rows": args.rows, "block": args.block, "gate": passed,
        "pool_bytes": engine.pool.nbytes, "commit": commit(),
        "joining": serve(engine, trace), "batches": serve(engine, trace, batches=True),
    }  # fmt: skip
    print_table(
        ("requests", "tokens/s", "first token p50/p95/p99 ms", "token p50/p95/p99 ms", "live", "s"),
        [table_row(name, record[name]) for name in ("joining", "batches")],
    )
    finish(record, path)


def table_row(name: str, own: dict[str, Any]) -> list[str]:
    """A line for people."""

    def shown(of: dict[str, float]) -> str:
        return " / ".join(f"{of[share]:.1f}" for share in ("p50", "p95", "p99"))

    live = own["live"]
    return [
        name, f"{own['answer_tokens_a_second']:.0f}", shown(own["first_token_ms"]), shown(own["token_ms"]),
        f"{live['least']} - {live['most']}", f"{own['seconds']:.1f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()

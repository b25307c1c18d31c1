"""Decoding with the plain-PyTorch reference path, beside PEFT, beside no adapter, and above the floor of bytes.

At batch 1 a token is bound by memory: every weight, the adapter's factors and the KV cache are read once per token, so

    floor = (weights + LoRA at the rung + KV of the mean context) / measured copy bandwidth

and a path's distance from it is launches, copies and Python. This reference is eager PyTorch and far above the floor:
it is the specification, and its figures are what the fast path will be judged against. Eager paths are bound by the
host, whose speed drifts on a shared machine: the paths take turns, one run of each per round, so that all of them see
the same drift.

    python -m benchmarks.reference --shape llama-7b     # one GPU with 60 GB
    python -m benchmarks.reference --shape tiny         # a smoke test for any CPU
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from policy.fixed import FixedPolicy
from policy.limits import Whole
from policy.operating import Operating
from policy.percentile import PercentilePolicy
from policy.settings import FULL_KV, MOST_TOKENS, KVSettings, Settings
from runtime import build_ladder, load_adapter
from runtime.command import one_line_errors
from runtime.control.record import RESPONSE, mean_rank
from runtime.kv import FORMATS
from runtime.ladder import Ladder
from runtime.plan import STATIC_BLOCK_TOKENS, RunPlan
from runtime.reference.adaptive import activate
from runtime.reference.run import AdaptiveCache

from .correctness import check, peft_missing, peft_model, random_tokens
from .printing import (
    copy_bandwidth,
    default_device,
    device_name,
    device_slug,
    finish,
    header,
    parse,
    print_table,
    result_path,
    spread,
    synchronise,
)
from .shapes import SHAPES, build_model, kv_token_bytes, lora_bytes, weight_bytes, write_adapter

RANK = 64
BLOCK_TOKENS = Settings().block_tokens
"""Of a prompt, where it is cut: small, so that what a block costs beside its tokens is seen."""
PEFT = "PEFT eager, r=64 unmerged"
PEFT_IN_BLOCKS = f"PEFT eager, prompt in forwards of {BLOCK_TOKENS}"
AGAINST_PEFT = {
    "prefill, static rung": ("prefill_ms", "reference, rung 64, full KV", PEFT),
    "prefill, deciding in blocks": ("prefill_ms", "reference, deciding, full KV", PEFT_IN_BLOCKS),
    "decode, static rung": ("decode_ms_per_token", "reference, rung 64, full KV", PEFT),
    "decode, deciding": ("decode_ms_per_token", "reference, deciding, full KV", PEFT),
}
"""What is held against PEFT: (which time, of which path, over that of which of PEFT's)."""
SECONDS = 300.0
"""No further round starts after this long; the number of runs is in the record."""

Generate = Callable[[BaseStreamer, int], Any]
"""(clock, new tokens) -> the KV cache that was filled."""


class Clock(BaseStreamer):
    """Remembers when transformers hands over the prompt and every new token (a hand-over waits for the device)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def prefill_ms(self) -> float:
        """From the hand-over of the prompt to the first new token."""
        return 1000 * (self.times[1] - self.times[0])

    def decode_ms(self) -> float:
        """Mean milliseconds per token after the first new one."""
        return 1000 * (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def fixed_plan(ladder: Ladder, rung: int, kv: KVSettings = FULL_KV) -> RunPlan:
    """One rung for all tokens. Compressed pages settle block by block, so they need small blocks."""
    index = ladder.rung_index(rung)
    block = STATIC_BLOCK_TOKENS if kv.is_full else BLOCK_TOKENS
    settings = Settings(block_tokens=block, prompt_tokens=block, fade_tokens=1, kv=kv)
    return RunPlan((ladder,), FixedPolicy(ladder.rungs), settings, Operating.at(float(index), index, kv))


def deciding_plan(ladder: Ladder, kv: KVSettings = FULL_KV) -> RunPlan:
    """All of the machinery at work: signals, chunks, a rung per chunk around the middle one, a budget, KV pages."""
    settings = Settings(block_tokens=BLOCK_TOKENS, prompt_tokens=BLOCK_TOKENS, kv=kv)
    start = ladder.rung_index(RANK // 2)
    operating = Operating.at(float(start), start, kv, budget=0.5)
    return RunPlan((ladder,), PercentilePolicy(ladder.rungs, "complexity"), settings, operating)


@contextmanager
def ours(model: PreTrainedModel, plan: RunPlan, prompt: Tensor) -> Iterator[Generate]:
    """The reference path under `plan`."""
    with activate(model, plan) as run:

        def generate(clock: BaseStreamer, new_tokens: int) -> Any:
            _generate(model, prompt, clock, new_tokens)
            return run.last

        yield generate


@contextmanager
def plain(model: PreTrainedModel, prompt: Tensor) -> Iterator[Generate]:
    """Transformers' eager loop, no adapter."""
    yield lambda clock, new_tokens: _with_dynamic_cache(model, prompt, clock, new_tokens)


@contextmanager
def peft(model: PreTrainedModel, prompt: Tensor, folder: Path, block: int | None = None) -> Iterator[Generate]:
    """PEFT's eager loop, adapter not merged; the prompt in one forward, or in forwards of `block` tokens."""
    with peft_model(model, folder) as wrapped:
        yield lambda clock, new_tokens: _with_dynamic_cache(
            wrapped, prompt, clock, new_tokens, prefill_chunk_size=block
        )


def _with_dynamic_cache(
    model: Any, prompt: Tensor, clock: BaseStreamer, new_tokens: int, **options: Any
) -> DynamicCache:
    cache = DynamicCache()
    _generate(model, prompt, clock, new_tokens, past_key_values=cache, **options)
    return cache


def _generate(model: Any, prompt: Tensor, clock: BaseStreamer, new_tokens: int, **options: Any) -> None:
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        streamer=clock,
        max_new_tokens=new_tokens,
        do_sample=False,
        **options,
    )


def one_run(path: AbstractContextManager[Generate], new_tokens: int, device: torch.device) -> dict[str, Any]:
    """Set a path up, warm it, and time one run of `new_tokens` tokens."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with path as generate:
        generate(Clock(), min(8, new_tokens))
        synchronise(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        clock = Clock()
        cache = generate(clock, new_tokens)
        return {
            "decode_ms_per_token": clock.decode_ms(),
            "prefill_ms": clock.prefill_ms(),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            **kv_report(cache),
        }


def measure(
    paths: dict[str, Callable[[], AbstractContextManager[Generate]]],
    rounds: int,
    new_tokens: int,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Time every path once per round: times over all rounds, bytes and ranks (the same in every round) of the last."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
    started = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - started > SECONDS:
            break
        for name, path in paths.items():
            runs[name].append(one_run(path(), new_tokens, device))
            print(f"  round {done + 1}, {name}: {runs[name][-1]['decode_ms_per_token']:.2f} ms/token", flush=True)
    return {
        name: own[-1] | {timed: spread([run[timed] for run in own]) for timed in ("decode_ms_per_token", "prefill_ms")}
        for name, own in runs.items()
    }


def kv_report(cache: Any) -> dict[str, Any]:
    """Bytes a filled cache holds and, for paged ones, the mean rank and the pages of every format."""
    if not isinstance(cache, AdaptiveCache):
        held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        return {"kv_bytes": held, "kv_bytes_full": held, "kv_bytes_allocated": held}
    # Every module of these ladders has the rung's own rank, so no weighting by bytes is needed.
    ranks = torch.tensor([float(rung) for rung in cache.stream.policy.rungs])
    names = Counter(FORMATS[code] for code in cache.page_formats().flatten().tolist())
    return {
        "kv_bytes": cache.kv_bytes(),
        "kv_bytes_full": cache.kv_bytes_full(),
        "kv_bytes_allocated": cache.kv_bytes_allocated(),
        "pages": {name: count for name, count in sorted(names.items()) if name != "none"},
        "mean_rank": mean_rank(cache.stream.sums.counts[:, RESPONSE].cpu(), ranks),
    }


def floor(model: PreTrainedModel, batch: int, context: float, rung: int, bandwidth: float) -> dict[str, Any]:
    """Bytes that decoding one token for every row must read, and how long that takes at `bandwidth`."""
    parts = {
        "weight_bytes": weight_bytes(model),
        "lora_bytes": lora_bytes(model, rung),
        "kv_bytes": round(batch * context * kv_token_bytes(model)),
    }
    return parts | {"ms_per_token": 1000 * sum(parts.values()) / bandwidth}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description="Decode speed, reference path.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="rounds: runs of each path, each after a warm-up")
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/reference-SHAPE-DEVICE.json)")
    parser.add_argument("--skip-peft", action="store_true", help="leave PEFT out, also of the gate")
    limits = {"batch": Whole(1, 2**16), "prompt-tokens": Whole(1, MOST_TOKENS), "repeats": Whole(1, 10**6)}
    # The first new token comes with the prompt: what is timed begins with the second.
    return parse(parser, limits | {"new-tokens": Whole(2, MOST_TOKENS)})


def main() -> None:
    with one_line_errors():
        benchmark(arguments())


def benchmark(args: argparse.Namespace) -> None:
    device = default_device()
    path = result_path(args.output, f"reference-{args.shape}-{device_slug(device)}")
    missing = "left out by --skip-peft" if args.skip_peft else peft_missing()
    bandwidth = copy_bandwidth(device)
    model = build_model(args.shape, getattr(torch, args.dtype), device)
    context = args.prompt_tokens + args.new_tokens / 2
    floors = {rung: floor(model, args.batch, context, rung, bandwidth) for rung in (RANK, 16, 8, 0)}
    print(f"{args.shape}, {args.dtype}, random weights, LoRA r={RANK} on all seven linears, {device_name(device)}")
    print(f"batch {args.batch}, prompt {args.prompt_tokens}, {args.new_tokens} new tokens")
    print(f"limit: {bandwidth / 1e12:.3f} TB/s (device copy, read + written)")
    for rung, f in floors.items():
        parts = " + ".join(f"{f[name] / 1e9:.3f}" for name in ("weight_bytes", "lora_bytes", "kv_bytes"))
        print(f"  rung {rung:2d}: {parts} GB (weights + LoRA + KV) = {f['ms_per_token']:.3f} ms/token", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = write_adapter(model, RANK, Path(temporary))
        ladder = build_ladder(load_adapter(folder))
        gate = check(model, fixed_plan(ladder, RANK), folder, device, missing)
        prompt = random_tokens(model, args.batch, args.prompt_tokens)
        fixed = {rung: fixed_plan(ladder, rung) for rung in (RANK, 16, 8)}
        compressed = fixed_plan(ladder, RANK, KVSettings())
        paths: dict[str, Callable[[], AbstractContextManager[Generate]]] = {
            "transformers eager, no adapter": lambda: plain(model, prompt),
            "reference, rung 64, full KV": lambda: ours(model, fixed[RANK], prompt),
            "reference, rung 16, full KV": lambda: ours(model, fixed[16], prompt),
            "reference, rung 8, full KV": lambda: ours(model, fixed[8], prompt),
            "reference, rung 64, adaptive KV": lambda: ours(model, compressed, prompt),
            "reference, deciding, full KV": lambda: ours(model, deciding_plan(ladder), prompt),
            "reference, deciding, adaptive KV": lambda: ours(model, deciding_plan(ladder, KVSettings()), prompt),
        }
        if missing is None:
            paths[PEFT] = lambda: peft(model, prompt, folder)
            paths[PEFT_IN_BLOCKS] = lambda: peft(model, prompt, folder, BLOCK_TOKENS)
        else:
            print(f"PEFT is not measured: {missing}")
        results = measure(paths, args.repeats, args.new_tokens, device)

    columns = ("path", "ms/token", "range", "runs", "x floor", "prefill ms", "peak GB", "KV MB")
    print_table(columns, rows(results, floors))
    ratios = {}
    if missing is None:
        for name, (timed, mine, theirs) in AGAINST_PEFT.items():
            ratios[name] = results[mine][timed]["median"] / results[theirs][timed]["median"]
            print(f"{name}: {ratios[name]:.2f} x {theirs}")
    record = header("reference", device) | {
        "shape": args.shape, "dtype": args.dtype, "batch": args.batch, "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens, "lora_rank": RANK, "copy_bytes_per_second": bandwidth,
        "floor": {str(rung): f for rung, f in floors.items()}, "gate": gate, "peft_missing": missing, "paths": results,
        "against_peft": ratios,
    }  # fmt: skip
    finish(record, path)


def rows(results: dict[str, Any], floors: dict[int, dict[str, Any]]) -> list[list[str]]:
    """The table's rows; every path is held against the floor of the rank it reads (the top one where it varies)."""
    table = []
    for name, result in results.items():
        rung = next((r for r in (16, 8) if f"rung {r}," in name), 0 if "no adapter" in name else RANK)
        ms, peak = result["decode_ms_per_token"], result["peak_memory_bytes"]
        table.append(
            [
                name, f"{ms['median']:.2f}", f"{ms['min']:.2f} - {ms['max']:.2f}", str(ms["runs"]),
                f"{ms['median'] / floors[rung]['ms_per_token']:.1f}", f"{result['prefill_ms']['median']:.0f}",
                "-" if peak is None else f"{peak / 1e9:.2f}", f"{result['kv_bytes'] / 1e6:.2f}",
            ]
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()

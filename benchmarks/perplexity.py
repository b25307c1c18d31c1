"""Perplexity of real text through the engine, its KV pages in few bits, beside the reference path's.

Both are fed the same windows: a prompt in one pass, and behind it the text itself, token by token, whatever they would
have gone on with. So each token is scored against pages as decoding finds them, and which get int8 and which int4 each
path decides by what it hears itself. In float32 the two must be the same but for the order in which sums are made; in
bfloat16 every rounding is another, and so are a few pages' formats.

    python -m benchmarks.perplexity                                             # the embedded model; one GPU
    python -m benchmarks.perplexity --model FOLDER --text wikitext2.test.txt --max-tokens 1000000
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from policy.limits import Whole
from policy.settings import FULL_KV, MOST_TOKENS, PAGE_TOKENS, KVSettings
from runtime import load_model
from runtime.command import one_line_errors
from runtime.generate.fast import FastPath
from runtime.generate.options import Options
from runtime.kv.formats import FORMATS, FULL, INT4, INT8
from runtime.loading import context_limit
from runtime.plan import RunPlan
from runtime.reference.adaptive import activate
from runtime.reference.run import AdaptiveCache

from .kv import EMBEDDED, name_of, no_adapter, plan, require_text, windows
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
)  # fmt: skip

ROWS = 128
"""Windows that the engine goes through side by side"""
CODES = (INT8, INT4)
"""Formats that pages are counted by"""
MOST_CHANGE = 2e-4
"""Of perplexity, between the two paths"""


@dataclass(frozen=True)
class Scored:
    """What a path has made of windows."""

    nll: Tensor
    """[N] float64: mean negative log-likelihood per scored token of every window, nats"""
    pages: dict[str, int]
    """How many pages have which of `CODES` in the end, of all windows together"""

    @property
    def perplexity(self) -> float:
        return float(self.nll.mean().exp())


def token_by_token(ladder_plan: RunPlan, prompt: int) -> RunPlan:
    """The plan with blocks as decode has them, behind a prompt in one block."""
    return replace(ladder_plan, settings=replace(ladder_plan.settings, block_tokens=1, prompt_tokens=prompt))


@torch.no_grad()
def reference_scores(model: PreTrainedModel, run_plan: RunPlan, ids: Tensor, prompt: int) -> Scored:
    """Windows [N, T] through the reference path, all of them side by side; what is behind `prompt` tokens is scored."""
    ids = ids.to(model.device)
    total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    with activate(model, run_plan) as run:
        cache = run.new_cache(len(ids))
        cache.next_call_is_prompt = True  # as `generate` has it
        tokens = ids[:, :prompt]
        for step in range(prompt, ids.shape[1]):
            logits = run.logits(tokens, None, cache, 1)[:, 0].float()
            total += cross_entropy(logits, ids[:, step], reduction="none")
            tokens = ids[:, step : step + 1]
        assert isinstance(cache, AdaptiveCache)
        formats = cache.page_formats()
    pages = {FORMATS[code]: int((formats == code).sum()) for code in CODES}
    return Scored((total / (ids.shape[1] - prompt)).cpu(), pages)


@torch.no_grad()
def engine_scores(model: PreTrainedModel, run_plan: RunPlan, ids: Tensor, prompt: int) -> Scored:
    """The same through the engine."""
    parts = []
    with activate(model, run_plan, checked=False) as run:
        path = FastPath(model, run)
        for rows in ids.split(ROWS):
            parts.append(_fed(path, rows.to(model.device), prompt))
    pages = {FORMATS[code]: sum(own.pages[FORMATS[code]] for own in parts) for code in CODES}
    return Scored(torch.cat([own.nll for own in parts]), pages)


def _fed(path: FastPath, ids: Tensor, prompt: int) -> Scored:
    count, length = ids.shape
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids[:, :prompt]), "do_sample": False, "pad_token_id": 0,
        "max_new_tokens": length - prompt,
    }  # fmt: skip
    targets = ids[:, prompt:]
    decoder, _ = path.begin(ids[:, :prompt], options, Options.of(path.hf, ids[:, :prompt], options), targets)
    total = torch.zeros(count, dtype=torch.float64, device=ids.device)
    for step in range(length - prompt):
        if step:
            decoder.run()
        total += cross_entropy(decoder.buffers.logits[:count], targets[:, step], reduction="none")
    assert torch.equal(decoder.generated.log[:count, : length - prompt], targets), "they went where they were led"
    counts = decoder.lanes.tables.counts[:count].sum(0)
    pages = {FORMATS[code]: int(counts[code - FULL]) for code in CODES}
    return Scored((total / (length - prompt)).cpu(), pages)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perplexity", description=__doc__.splitlines()[0])
    base, text = EMBEDDED / "base", EMBEDDED / "text" / "test.jsonl.xz"
    parser.add_argument("--model", default=str(base), help="folder or hub id of the base model (default: embedded)")
    parser.add_argument("--text", default=text, type=Path, help="text or .jsonl[.xz] file (default: embedded)")
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=1024, help="tokens fed in one go, the model's context at most")
    parser.add_argument("--prompt", type=int, default=1, help="of them, which go in one pass and are not scored")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["float32", "bfloat16"])
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/perplexity-MODEL-DEVICE.json)")
    tokens = Whole(PAGE_TOKENS, MOST_TOKENS)
    args = parse(parser, {"max-tokens": tokens, "window": tokens, "prompt": Whole(1, MOST_TOKENS)})
    Whole(1, args.window - 1).take("--prompt", args.prompt)
    return args


def main() -> None:
    with one_line_errors():
        benchmark(arguments())


def benchmark(args: argparse.Namespace) -> None:
    require_text(args.text)
    device, name = default_device(), name_of(args.model)
    path = result_path(args.output, f"perplexity-{name}-{device_slug(device)}")
    require_kernels(device)
    ids = windows(args.model, args.text, args.window, args.max_tokens)
    results: list[dict[str, Any]] = []
    for dtype in args.dtype:
        model = load_model(args.model, dtype=dtype, device=device)
        model.generation_config.eos_token_id = None  # no token of a text ends it
        Whole(PAGE_TOKENS, context_limit(model) or MOST_TOKENS).take("--window", args.window)
        print(f"{name}, {args.text.name}: {len(ids)} windows of {args.window}, {dtype}, {device_name(device)}")
        ladder = no_adapter(model)
        for pages, kv in (("full", FULL_KV), ("default", KVSettings())):
            own = token_by_token(plan(ladder, 0, kv), args.prompt)
            results.append({"dtype": dtype, "kv": pages} | compared(model, own, ids, args.prompt))
    print_table(COLUMNS, [table_row(own) for own in results])
    worst = max(abs(own["change"]) for own in results)
    kept = worst <= MOST_CHANGE
    print(f"largest change {worst:.4%}, at most {MOST_CHANGE:.2%} allowed: {'kept' if kept else 'MISSED'}")
    record = header("perplexity", device) | {
        "model": name, "text": args.text.name, "windows": len(ids), "window_tokens": args.window,
        "prompt_tokens": args.prompt, "most_change": MOST_CHANGE, "kept": kept, "commit": commit(), "results": results,
    }  # fmt: skip
    finish(record, path)
    if not kept:
        raise SystemExit(1)


def compared(model: PreTrainedModel, run_plan: RunPlan, ids: Tensor, prompt: int) -> dict[str, Any]:
    """Perplexity of both paths, how far the engine's is from the reference's, and the pages of each."""
    engine, reference = (scores(model, run_plan, ids, prompt) for scores in (engine_scores, reference_scores))
    apart = engine.nll - reference.nll
    return {
        "engine": engine.perplexity, "reference": reference.perplexity, "change": float(apart.mean().expm1()),
        "standard_error": float(apart.std() / len(apart) ** 0.5) if len(apart) > 1 else None,
        "engine_pages": engine.pages, "reference_pages": reference.pages,
    }  # fmt: skip


COLUMNS = ("pages", "engine", "reference", "change %", "+- (1 SE)", "int8 / int4", "reference's")


def table_row(own: dict[str, Any]) -> list[str]:
    """A line for people."""
    error = own["standard_error"]
    pages = (f"{own[of]['int8']} / {own[of]['int4']}" for of in ("engine_pages", "reference_pages"))
    return [
        f"{own['dtype']}, {own['kv']}", f"{own['engine']:.4f}", f"{own['reference']:.4f}",
        f"{100 * own['change']:+.4f}", "-" if error is None else f"{100 * error:.4f}", *pages,
    ]  # fmt: skip


if __name__ == "__main__":
    main()

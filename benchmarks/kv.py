"""What compressed KV pages save, and what they cost, on real text.

The limit is the format: with 16 tokens a page and 64 channels a head, int8 takes 9 bits a key and 8.25 bits a value,
int4 5 and 4.25, of 16 (scales included); the sink page and the window stay whole, so at 1,024 tokens with 16 + 128 of
them uncompressed, no policy of int4 alone can fall below 0.39 of full precision, nor one of int8 alone below 0.60.

Perplexity comes from the adaptive forward in blocks, so a token is scored against the pages as decoding would find
them. It is a blunt judge of a KV policy (exact copying from compressed spans is a sharper one): read it beside the
error of the pages themselves. All configurations score the same tokens, so the changes are paired and carry a standard
error. bf16 shows the bytes as served; its own rounding moves perplexity as much as int8 does, float32 tells them apart.

    python -m benchmarks.kv                                             # the embedded model and its test documents
    python -m benchmarks.kv --model FOLDER --text wikitext2.test.txt
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from data import load_documents
from policy.fixed import FixedPolicy
from policy.limits import Whole
from policy.operating import Operating
from policy.rungs import Rung
from policy.settings import FULL_KV, MOST_TOKENS, PAGE_TOKENS, KVSettings, Settings
from runtime import build_ladder, load_adapter, load_model, load_tokenizer
from runtime.command import one_line_errors
from runtime.kv import FORMATS, formats
from runtime.ladder import Ladder
from runtime.ladder.adapter import Adapter, LoraFactors
from runtime.loading import context_limit
from runtime.plan import RunPlan
from runtime.reference.adaptive import activate
from runtime.reference.run import AdaptiveCache

from .printing import default_device, device_slug, finish, header, parse, print_table, result_path

EMBEDDED = Path(__file__).resolve().parent.parent / "checkpoints"
DOCUMENTS = (".json", ".jsonl")
CONFIGURATIONS = {
    "full": FULL_KV,
    "int8": KVSettings("int8", "int8"),
    "int4": KVSettings("int4", "int4"),
    "mixed (default)": KVSettings(),
    "sparse": KVSettings("sparse", "sparse"),
    "dropped (window)": KVSettings("dropped", "dropped"),
}
ROWS = 8
"""Windows scored side by side."""


def name_of(model: str) -> str:
    """A model's in a record: the folder's, or that it is the embedded one."""
    return "embedded" if Path(model).resolve() == (EMBEDDED / "base").resolve() else Path(model).name


def require_text(path: Path) -> None:
    """Raise FileNotFoundError where there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"--text: expected a file, got {path}; check the path")


def running_text(path: Path) -> str:
    """A text file as it is, or the documents of a `.jsonl[.xz]` one after the other."""
    if not any(suffix in DOCUMENTS for suffix in path.suffixes):
        return path.read_text(encoding="utf-8")
    return "\n\n".join(row["prompt"] + row["completion"] for row in load_documents(str(path)))


def windows(model: str, text: Path, window: int, max_tokens: int) -> Tensor:
    """The text's first `max_tokens` tokens as whole windows [N, window]. Raises ValueError when there is not one."""
    tokenizer = load_tokenizer(model)
    # Ten characters a token is more than any text takes; no need to tokenise all of a large file.
    raw = running_text(text)[: 10 * max_tokens]
    ids = tokenizer(raw, add_special_tokens=False, verbose=False, return_tensors="pt").input_ids[0, :max_tokens]
    if len(ids) < window:
        raise ValueError(f"text: expected at least {window} tokens, got {len(ids)}; give a longer text or --window")
    return ids[: len(ids) // window * window].view(-1, window)


def no_adapter(model: PreTrainedModel) -> Ladder:
    """A ladder whose rung 0, the base model alone, can be served without an adapter at hand."""
    name, linear = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
    zeros = LoraFactors(torch.zeros(1, linear.in_features), torch.zeros(linear.out_features, 1), 1.0)
    return build_ladder(Adapter(Path(), None, {name: zeros}), [0])


def plan(ladder: Ladder, rung: Rung, kv: KVSettings) -> RunPlan:
    """One rung throughout; the default blocks, so that pages settle as they would in use."""
    index = ladder.rung_index(rung)
    settings = Settings(fade_tokens=1, kv=kv)
    return RunPlan((ladder,), FixedPolicy(ladder.rungs), settings, Operating.at(float(index), index, kv))


@torch.no_grad()
def window_nll(model: PreTrainedModel, run_plan: RunPlan, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood per token of every window [N, T] -> [N], nats, float64."""
    losses = []
    with activate(model, run_plan):
        for rows in ids.split(ROWS):
            rows = rows.to(model.device)
            logits = model(input_ids=rows).logits[:, :-1].float()
            losses.append(nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1))
    return torch.cat(losses).double().cpu()


def storage(model: PreTrainedModel, run_plan: RunPlan, row: Tensor) -> dict[str, Any]:
    """What one window's cache holds at its end: bytes of its text and of its storage, and pages by format."""
    with activate(model, run_plan) as run:
        model(input_ids=row[None].to(model.device))
        cache = run.last
    assert isinstance(cache, AdaptiveCache)
    pages = Counter(FORMATS[code] for code in cache.page_formats().flatten().tolist())
    held, full = cache.kv_bytes(), cache.kv_bytes_full()
    return {
        "kv_bytes": held, "kv_bytes_full": full, "kv_bytes_allocated": cache.kv_bytes_allocated(),
        "kv_ratio": held / full, "pages": dict(sorted(pages.items())),
    }  # fmt: skip


@torch.no_grad()
def page_errors(model: PreTrainedModel, row: Tensor) -> dict[str, dict[str, float]]:
    """Relative error ||page - decoded|| / ||page|| of real keys and values [T]: over all layers, and the worst layer.

    Decoded in float32, so that this is the format's error alone.
    """
    cache: Any = DynamicCache()
    model(input_ids=row[None].to(model.device), past_key_values=cache)
    found: dict[str, dict[str, float]] = {}
    for code in (formats.INT8, formats.INT4):
        errors = {"keys": Error(), "values": Error()}
        for layer in cache.layers:
            pages = [_pages(x) for x in (layer.keys, layer.values)]
            decoded = formats.decode(code, formats.encode(code, *pages), (torch.float32, torch.float32))
            for name, page, back in zip(errors, pages, decoded, strict=True):
                errors[name].add(page, back)
        found[FORMATS[code]] = {
            f"{name}_{kind}": value
            for name, error in errors.items()
            for kind, value in (("all", error.all), ("worst", error.worst))
        }
    return found


class Error:
    """Relative error over all layers together, and of the worst one."""

    def __init__(self) -> None:
        self.squares = [0.0, 0.0]
        self.worst = 0.0

    def add(self, page: Tensor, decoded: Tensor) -> None:
        difference, norm = (float(x.double().square().sum()) for x in (decoded.float() - page.float(), page))
        self.squares = [self.squares[0] + difference, self.squares[1] + norm]
        self.worst = max(self.worst, (difference / norm) ** 0.5)

    @property
    def all(self) -> float:
        return (self.squares[0] / self.squares[1]) ** 0.5


def _pages(states: Tensor) -> Tensor:
    """[1, H, T, D] -> [H, T / 16, 16, D]; what does not fill a page is left out."""
    heads, tokens, width = states.shape[1:]
    return states[0, :, : tokens // PAGE_TOKENS * PAGE_TOKENS].reshape(heads, -1, PAGE_TOKENS, width)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv", description="KV formats: bytes and perplexity.")
    base, text = EMBEDDED / "base", EMBEDDED / "text" / "test.jsonl.xz"
    parser.add_argument("--model", default=str(base), help="folder or hub id of the base model (default: embedded)")
    parser.add_argument(
        "--text", default=text, type=Path, help="text or .jsonl[.xz] file (default: embedded documents)"
    )
    parser.add_argument("--adapter", help="PEFT LoRA folder, served at its full rank (default: the base model alone)")
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=1024, help="tokens scored in one go, the model's context at most")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--model-name", help="name for the record (default: the folder's)")
    parser.add_argument("--text-name", help="name for the record (default: the file's)")
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/kv-MODEL-DTYPE-DEVICE.json)")
    # A window holds at least one page.
    return parse(parser, {"max-tokens": Whole(PAGE_TOKENS, MOST_TOKENS), "window": Whole(PAGE_TOKENS, MOST_TOKENS)})


def main() -> None:
    with one_line_errors():
        benchmark(arguments())


def benchmark(args: argparse.Namespace) -> None:
    require_text(args.text)
    device = default_device()
    model_name = args.model_name or name_of(args.model)
    path = result_path(args.output, f"kv-{model_name}-{args.dtype}-{device_slug(device)}")
    model = load_model(args.model, dtype=args.dtype, device=device)
    Whole(PAGE_TOKENS, context_limit(model) or MOST_TOKENS).take("--window", args.window)
    ids = windows(args.model, args.text, args.window, args.max_tokens)
    ladder = build_ladder(load_adapter(args.adapter)) if args.adapter else no_adapter(model)
    rung: Rung = ladder.rungs[-1] if args.adapter else 0
    text_name = args.text_name or args.text.name
    adapter_name = Path(args.adapter).name if args.adapter else None
    print(f"{model_name}, adapter {adapter_name}, {text_name}: {len(ids)} windows of {args.window}, {args.dtype}")
    whole = KVSettings()
    share = min(1.0, (whole.sink_pages * PAGE_TOKENS + whole.window_tokens) / args.window)
    for name, bits in (("int8", (9 + 8.25) / 2), ("int4", (5 + 4.25) / 2)):
        print(f"limit: {name} alone {share + (1 - share) * bits / (8 * model.dtype.itemsize):.3f} of full precision")

    errors = page_errors(model, ids[0])
    results: dict[str, dict[str, Any]] = {}
    baseline = torch.zeros(0)
    for name, kv in CONFIGURATIONS.items():
        run_plan = plan(ladder, rung, kv)
        nll = window_nll(model, run_plan, ids)
        baseline = nll if name == "full" else baseline
        change = nll - baseline
        standard_error = float(change.std() / len(change) ** 0.5) if len(change) > 1 else None
        results[name] = {
            "perplexity": float(nll.mean().exp()),
            "perplexity_change": float(change.mean().expm1()),
            "nll_change_standard_error": standard_error,
            **storage(model, run_plan, ids[0]),
        }
        print(f"  {name}: {results[name]['perplexity']:.4f}", flush=True)

    columns = ("pages", "perplexity", "change %", "+- (1 SE)", f"KV bytes at {args.window}", "of full", "allocated")
    print_table(columns, rows(results))
    for name, error in errors.items():
        print(f"{name} page error: keys {error['keys_all']:.2%}, values {error['values_all']:.2%} (all layers)")
    record = header("kv", device) | {
        "model": model_name, "adapter": adapter_name, "text": text_name, "dtype": args.dtype, "tokens": ids.numel(),
        "window_tokens": args.window, "block_tokens": Settings().block_tokens, "page_errors": errors,
        "configurations": results,
    }  # fmt: skip
    finish(record, path)


def rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [
        [
            name, f"{r['perplexity']:.4f}", f"{100 * r['perplexity_change']:+.3f}",
            "-" if r["nll_change_standard_error"] is None else f"{100 * r['nll_change_standard_error']:.3f}",
            f"{r['kv_bytes']:,}", f"{r['kv_ratio']:.3f}", f"{r['kv_bytes_allocated']:,}",
        ]
        for name, r in results.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()

"""How near the engine's logits are to the reference path's, on real text and with real adapters.

bf16 has many legitimate orders of evaluation, so two correct paths choose other tokens where two are nearly as likely.
What can be asked is that they do so nowhere else, and that the engine is no further from float32 than the reference
path. Both are fed the reference path's own greedy tokens, and of every step after the prompt's

- both choose the same token in 98 % of the steps;
- where they do not, float32 has its two best tokens within three times the reference's own error at that step (the
  root of the mean square over the vocabulary);
- the engine's error is at most 1.2 times the reference's, over all steps;
- in float32 the engine's own greedy tokens are those that the reference path finds likeliest.

How far both go together when each goes on from its own tokens is printed and judged by nothing. Rows of a batch belong
to the adapters in turn; the first prompt of every adapter is also decoded alone, which takes other kernels.

    python -m benchmarks.agreement
    python -m benchmarks.agreement --model MODEL --adapters ADAPTER... --prompts FILE...     # one GPU
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from policy.limits import Number, Whole
from policy.rungs import RUNG, Rung
from runtime.command import one_line_errors
from runtime.ladder import Ladder, open_ladder
from runtime.loading import check_context, load_model, load_tokenizer

from .printing import default_device, device_slug, finish, header, parse, print_table, require_kernels, result_path
from .teacher import Found, Text, both, compare

LEAST_AGREEMENT = 0.98
MOST_GAP = 3.0
"""In errors of the reference path"""
MOST_ERROR = 1.2
"""Times that of the reference path"""
EXACT = "exact"
FIRST_TOKENS = 32
"""Of a document without a prompt, so many tokens of its completion are one."""
CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"


def prompts_of(path: Path, tokenizer: PreTrainedTokenizerBase, count: int, most: int) -> list[list[int]]:
    """Token ids of the first `count` documents of a .jsonl or .jsonl.xz file, each at least two and at most `most`, the
    end of a longer one. Raises ValueError for a file of another kind, or with fewer of them."""
    found = []
    for document in _documents(path):
        ids = tokenizer(document["prompt"]).input_ids
        if len(ids) < 2:
            ids = tokenizer(document.get("completion", "")).input_ids[:FIRST_TOKENS]
        if len(ids) >= 2:
            found.append(ids[-most:])
        if len(found) == count:
            return found
    raise ValueError(f"--prompts: expected {count} prompts in {path}, got {len(found)}; lower --rows or add some")


def _documents(path: Path) -> Iterator[dict[str, str]]:
    opened = lzma.open if path.suffix == ".xz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)
                if not isinstance(document, dict) or not isinstance(document.get("prompt"), str):
                    raise ValueError('a line without "prompt"')
                yield document
    except (ValueError, EOFError, lzma.LZMAError) as error:
        raise ValueError(
            f'--prompts: expected a JSON object with "prompt" in every line of {path}, got {error}; correct the file'
        ) from None


def ladder_of(source: str, rungs: Sequence[str]) -> Ladder:
    """The adapter's ladder, with these rungs where it can have any."""
    ladder = open_ladder(source)
    asked = {_rung(ladder, name) for name in rungs}
    return ladder if asked <= {*ladder.rungs} else ladder.with_rungs(sorted(asked | {*ladder.rungs}))


def _rung(ladder: Ladder, name: str) -> Rung:
    rung: Rung = ladder.rungs[-1] if name == EXACT else RUNG.take("--rungs", float(name))
    return rung


def judged(found: Found, exactly: Sequence[int], steps: int) -> dict[str, Any]:
    """What rows come to, and which bars they do not keep; where the two are apart, how often each is right, which is to
    say goes on as float32 does."""
    error, own = (float(x.mean().sqrt()) for x in (found.reference, found.engine))
    ratio = own / error if error else None
    apart = ~found.agree
    gaps = (found.gap.double() / found.reference.sqrt().clamp_min(1e-30))[apart]
    record: dict[str, Any] = {
        "rows": len(found.agree), "steps": found.agree.numel(), "agreement": float(found.agree.double().mean()),
        "disagreements": int(apart.sum()), "largest_gap": float(gaps.max()) if len(gaps) else 0.0,
        "right_reference": int((found.right_reference & apart).sum()),
        "right_engine": int((found.right_engine & apart).sum()),
        "error_reference": error, "error_engine": own, "error_ratio": ratio,
        "float32_tokens_equal": all(count == steps + 1 for count in exactly),
    }  # fmt: skip
    kept = {
        "agreement": record["agreement"] >= LEAST_AGREEMENT,
        "gap": record["largest_gap"] <= MOST_GAP,
        "error": own <= MOST_ERROR * error,
        "float32": record["float32_tokens_equal"],
    }
    return record | {"missed": [name for name, good in kept.items() if not good]}


def batches(texts: Sequence[Text], adapters: int, rows: int) -> Iterator[tuple[str, list[Text]]]:
    """All texts, so many rows at a time and adapters in turn; then the first of every adapter alone."""
    mine = [[own for own in texts if own.ladder == number] for number in range(adapters)]
    turns = [own for together in zip(*mine, strict=True) for own in together]
    for first in range(0, len(turns), rows):
        yield "together", turns[first : first + rows]
    for own in mine:
        yield "alone", own[:1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agreement", description="How near the engine is to the reference path."
    )
    parser.add_argument("--model", default=str(CHECKPOINTS / "base"), help="folder or hub id (default: the embedded)")
    parser.add_argument("--adapters", nargs="+", default=[str(CHECKPOINTS / "adapter")], help="or saved ladders")
    parser.add_argument(
        "--prompts", nargs="+", default=[str(CHECKPOINTS / "text" / "test.jsonl.xz")],
        help='.jsonl[.xz] with "prompt" in every line: one file, or one for every adapter',
    )  # fmt: skip
    parser.add_argument("--rungs", nargs="+", default=[EXACT, "16", "4"], help="equivalent ranks, or exact")
    parser.add_argument("--rows", type=int, default=20, help="prompts of every adapter")
    parser.add_argument("--batch", type=int, default=20, help="rows at a time")
    parser.add_argument("--tokens", type=int, default=64, help="steps of every row")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="prompts are cut to their last so many")
    parser.add_argument("--output", help="JSON file (default: benchmarks/results/agreement-MODEL-DEVICE.json)")
    several = Whole(1, 1024)
    args = parse(
        parser, {"rows": several, "batch": Whole(1, 128), "tokens": Whole(1, 65_536), "prompt-tokens": Whole(2, 65_536)}
    )
    for name in args.rungs:
        if name != EXACT:
            Number(0, 2**20).take("--rungs", _number(name))
    if len(args.prompts) not in (1, len(args.adapters)):
        raise ValueError(
            f"--prompts: expected one file, or one for each of {len(args.adapters)} adapters, got {len(args.prompts)}; "
            "name as many"
        )
    for path in args.prompts:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--prompts: expected a file, got {path!r}; correct the path")
    return args


def _number(name: str) -> float | str:
    try:
        return float(name)
    except ValueError:
        return name


def main() -> None:
    with one_line_errors():
        benchmark(arguments())


def benchmark(args: argparse.Namespace) -> None:
    """Raises SystemExit with status 1 where a bar is not kept, after all was printed and written."""
    device = default_device()
    name = Path(args.model).name
    path = result_path(args.output, f"agreement-{name}-{device_slug(device)}")
    require_kernels(device)
    model = load_model(args.model, dtype="bfloat16", device=device)
    tokenizer = load_tokenizer(args.model)
    ladders = [ladder_of(own, args.rungs) for own in args.adapters]
    files = args.prompts if len(args.prompts) > 1 else args.prompts * len(ladders)
    read = [prompts_of(Path(own), tokenizer, args.rows, args.prompt_tokens) for own in files]
    texts = [Text(number, ids) for number, own in enumerate(read) for ids in own]
    check_context(model, max(len(own.ids) for own in texts), args.tokens + 1)
    names = [Path(own).name for own in args.adapters]
    print(f"{name}, bfloat16, {len(texts)} prompts of {', '.join(names)}, {args.tokens} steps each")
    results = []
    with both(model, ladders) as (own, exact):
        for asked in args.rungs:
            rungs = [_rung(ladder, asked) for ladder in ladders]
            results += measured(own, exact, texts, rungs, args, names, asked)
    show(results)
    missed = [f"{own['rung']} {own['rows_are']}: {', '.join(own['missed'])}" for own in results if own["missed"]]
    print("all bars are kept" if not missed else f"MISSED: {'; '.join(missed)}")
    record = header("agreement", device) | {
        "model": name, "adapters": names, "kinds": [own.kind for own in ladders], "dtype": "bfloat16",
        "tokens": args.tokens, "batch": args.batch, "passed": not missed, "results": results,
        "bars": {"agreement": LEAST_AGREEMENT, "gap": MOST_GAP, "error_ratio": MOST_ERROR},
    }  # fmt: skip
    finish(record, path)
    if missed:
        raise SystemExit(1)


def measured(
    own: Any, exact: Any, texts: Sequence[Text], rungs: Sequence[Rung], args: argparse.Namespace,
    names: Sequence[str], asked: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Records of one rung: of rows together and of rows alone, each with what its adapters come to."""
    parts: dict[str, list[tuple[list[Text], Found, list[int], list[int]]]] = {"together": [], "alone": []}
    for how, batch in batches(texts, len(names), args.batch):
        parts[how].append((batch, *compare(own, exact, batch, rungs, args.tokens)))
        print(".", end="", flush=True)
    print(f" rung {asked}", flush=True)
    return [_record(asked, how, found, names, args.tokens) for how, found in parts.items()]


def _record(
    asked: str, how: str, parts: Sequence[tuple[list[Text], Found, list[int], list[int]]], names: Sequence[str],
    steps: int,
) -> dict[str, Any]:  # fmt: skip
    found = Found.joined([own for _, own, _, _ in parts])
    numbers = [text.ladder for batch, _, _, _ in parts for text in batch]
    free, exactly = ([count for part in parts for count in part[at]] for at in (2, 3))
    by_adapter = {}
    for number, name in enumerate(names):
        rows = [row for row, own in enumerate(numbers) if own == number]
        by_adapter[name] = judged(found.rows(rows), [exactly[row] for row in rows], steps)
    return {
        "rung": asked, "rows_are": how, **judged(found, exactly, steps),
        "free_tokens": sum(free) / len(free), "free_rows_equal": sum(own == steps + 1 for own in free) / len(free),
        "by_adapter": by_adapter,
    }  # fmt: skip


def show(results: Sequence[dict[str, Any]]) -> None:
    columns = (
        "rung, rows",
        "steps",
        "agree %",
        "apart, right",
        "worst gap",
        "error",
        "reference's",
        "ratio",
        "fp32",
        "free tokens",
    )
    rows = [
        [
            f"{own['rung']}, {own['rows']} {own['rows_are']}", f"{own['steps']:,}", f"{100 * own['agreement']:.2f}",
            f"{own['disagreements']}, {own['right_engine']} : {own['right_reference']}", f"{own['largest_gap']:.2f}",
            f"{own['error_engine']:.5f}", f"{own['error_reference']:.5f}",
            "-" if own["error_ratio"] is None else f"{own['error_ratio']:.3f}",
            "equal" if own["float32_tokens_equal"] else "OTHERS", f"{own['free_tokens']:.1f}",
        ]
        for own in results
    ]  # fmt: skip
    print_table(columns, rows)


if __name__ == "__main__":
    main()

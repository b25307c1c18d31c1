"""`python -m training.evaluate`: perplexity through the adaptive forward, and what it cost.

Completion tokens of held-out documents are scored in runs that really decide, chunk by chunk: at `block_tokens` 1,
where a forward takes step-by-step decode's decisions, and at the policy's own block (DESIGN section 6), beside the two
static ends, no adapter and the full rank. Text without prompts is scored as running text, in consecutive blocks of
`max_tokens`, which is what perplexity on WikiText usually means. Milliseconds are those of the scoring forward, a batch
of rows at a time.
"""

from __future__ import annotations

if __name__ == "__main__":
    from .start import prepare, run

    prepare()

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from jsonargparse import ArgumentParser
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data import encode, pack
from policy.rungs import RUNG
from runtime.command import one_line_errors
from runtime.fingerprint import model_fingerprint
from runtime.ladder import open_ladder
from runtime.loading import load_model, load_tokenizer
from runtime.plan import RunPlan, plan_run
from runtime.reference.adaptive import require_servable

from .compare.scorer import Scorer
from .console import CommandParser, command_line, quiet_libraries
from .documents import Example, check_context, load_split
from .fit import EMBEDDED
from .threads import share_threads

ROWS = 8
"""Documents per forward, at most."""
WHOLE = 2**31 - 1
"""Tokens to which documents are cut that are packed: not at all."""


@dataclass(frozen=True)
class Evaluation:
    """One run over all documents."""

    name: str
    block_tokens: int
    documents: int
    """Rows scored: documents, or blocks of running text."""
    packed: bool
    """Whether the rows are blocks of running text."""
    scored_tokens: int
    """Completion tokens; the first token of a row without prompt is predicted by nothing and not scored."""
    perplexity: float
    mean_rank: float
    """Byte-weighted active rank over the positions that predict scored tokens."""
    prompt_mean_rank: float | None
    """Over prompt tokens; None where no document has a prompt."""
    adapter_bytes: float
    """What a scored token read of the adapter, on average."""
    adapter_share: float
    """The same over the exact adapter's."""
    kv_bytes: int
    """Keys and values of all documents, each at its end, in the formats of their pages."""
    kv_bytes_full: int
    """The same tokens in the model's own dtype."""
    kv_bytes_allocated: int
    """Storage of all documents' caches, room to spare included."""
    ms_per_token: float
    """Wall time of the forwards over their real tokens."""


def evaluate(
    model: str = str(EMBEDDED / "base"),
    adapter: str = str(EMBEDDED / "adapter"),
    policy: str | None = None,
    budget: float | None = None,
    rung: float | None = None,
    dataset: str = str(EMBEDDED / "text"),
    split: str = "test",
    seed: int = 0,
    limit: int | None = None,
    max_tokens: int = 512,
    block_tokens: int | None = None,
    dtype: str = "auto",
) -> list[Evaluation]:
    """Measure perplexity and cost of an adapter at the ranks a policy chooses, beside no adapter and the full rank.

    Args:
        model: Folder or hub id of the base model.
        adapter: PEFT LoRA folder, hub id or saved ladder.
        policy: Policy folder; without one every token gets the full adapter, or `rung`.
        budget: Mean adapter cost relative to the top rung, 0 to 1; default: the policy's own.
        rung: One fixed rung, by its equivalent rank, instead of a policy.
        dataset: Folder with train/validation/test .jsonl[.xz], a file, a built-in name or any `datasets` name.
        split: Split of the dataset, or `all`; of a single file, the part of this name that `training.fit` makes of it.
        seed: The seed of the fit, from which those parts follow.
        limit: First documents only.
        max_tokens: Documents are cut to this many tokens, prompt included; without any prompt, the length of a block.
        block_tokens: Tokens per forward of the second run; default: the policy's.
        dtype: float32, bfloat16, float16 or auto; what the model computes in.
    """
    ladder = open_ladder(adapter)
    fixed = None if rung is None else RUNG.take("rung", rung)
    network = load_model(model, dtype=dtype)
    require_servable(network, [ladder])
    fingerprint = None if policy is None else model_fingerprint(network)
    plan = plan_run(ladder, policy=policy, budget=budget, rung=fixed, model_fingerprint=fingerprint)
    blocks = {1, plan.settings.block_tokens if block_tokens is None else block_tokens}
    runs = {"no adapter": plan_run(ladder, rung=0), "full rank": plan_run(ladder)}
    runs |= {f"block {block}": with_block(plan, block) for block in sorted(blocks)}
    examples = load_examples(dataset, split, limit, max_tokens, network, load_tokenizer(model), seed)
    return [measure_perplexity(name, network, run, examples) for name, run in runs.items()]


def with_block(plan: RunPlan, block_tokens: int) -> RunPlan:
    """The same run with other prefill blocks."""
    return replace(plan, settings=replace(plan.settings, block_tokens=block_tokens))


def load_examples(
    dataset: str,
    split: str,
    limit: int | None,
    max_tokens: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
) -> Sequence[Example]:
    """Encoded documents of one split, or blocks of its running text when none has a prompt; rows stay on disk.

    Raises ValueError when they would not fit the model's context.
    """
    check_context(model, max_tokens)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 document, got {limit}; do leave it out for all of them")
    documents = load_split(dataset, split, seed)
    if limit is not None:
        documents = documents.select(range(min(limit, len(documents))))
    if any(prompt.strip() for prompt in documents["prompt"]):
        return encode(documents, tokenizer, max_tokens=max_tokens)
    return pack(encode(documents, tokenizer, max_tokens=WHOLE), max_tokens)


def measure_perplexity(name: str, model: PreTrainedModel, plan: RunPlan, examples: Sequence[Example]) -> Evaluation:
    """Score `plan` on the documents, a batch at a time."""
    (scores,) = Scorer(model, plan.ladder, examples, ["perplexity"], ROWS).score(plan, name)
    assert scores.kv is not None, "one point has its caches to itself"
    ranks, read = plan.rung_rank()[0].numpy(), plan.ladder.rung_bytes().numpy()
    return Evaluation(
        name, plan.settings.block_tokens, len(examples), "completion_mask" in examples[0], int(scores.tokens.sum()),
        scores.value("perplexity"), scores.mean(ranks), scores.prompt_mean(ranks),
        scores.mean(read), scores.mean(read / read[-1]), scores.kv.text, scores.kv.full, scores.kv.allocated,
        scores.ms_per_token,
    )  # fmt: skip


def _table(found: Sequence[Evaluation]) -> Table:
    columns: dict[str, Callable[[Evaluation], str]] = {
        "run": lambda e: e.name,
        "perplexity": lambda e: f"{e.perplexity:.4f}",
        "rank": lambda e: f"{e.mean_rank:.2f}",
        "adapter": lambda e: f"{e.adapter_share:.1%}",
        "prompt": lambda e: "-" if e.prompt_mean_rank is None else f"{e.prompt_mean_rank:.2f}",
        "KV MB": lambda e: f"{e.kv_bytes / 1e6:.1f}",
        "of full": lambda e: f"{e.kv_bytes / e.kv_bytes_full:.0%}",
        "held MB": lambda e: f"{e.kv_bytes_allocated / 1e6:.1f}",
        "ms/token": lambda e: f"{e.ms_per_token:.3f}",
    }
    rows = "blocks" if found[0].packed else "documents"
    title = f"perplexity over {found[0].scored_tokens} completion tokens of {found[0].documents} {rows}"
    table = Table(title=title, box=SIMPLE)
    for name in columns:
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for evaluation in found:
        table.add_row(*(show(evaluation) for show in columns.values()))
    return table


def make_parser() -> ArgumentParser:
    """Flags are `evaluate`'s arguments; `--config FILE` reads them from YAML, `--print_config` writes them."""
    parser = CommandParser(
        prog="python -m training.evaluate", description="Perplexity through the adaptive forward.", allow_abbrev=True
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")
    parser.add_function_arguments(evaluate)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors():
        parsed = make_parser().parse_args(command_line(arguments)).as_dict()
        parsed.pop("config", None)
        as_json = parsed.pop("json")
        quiet_libraries()
        share_threads(processes=1)
        found = evaluate(**parsed)
        Console().print(_table(found))
        if as_json:
            print(json.dumps({**parsed, "runs": {run.name: asdict(run) for run in found}}))


if __name__ == "__main__":
    run(main)

"""Which rungs a fitted policy chooses on held-out documents, token by token: what `benchmarks.decode` replays.

The policy is served as in use, at budgets that are the bytes of a rung and kept whatever the text, on documents that
its fit has not seen; decisions are those of decoding, one token after the other (prompts, too), with pages in full
precision as the engine keeps them. Written is what every token read, as equivalent rank.

    python -m benchmarks.record_trace             # what `python -m training.fit` without arguments has left in runs/
    python -m benchmarks.record_trace --fit runs/a --model M --dataset D
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from policy.checkpoint import PolicyCheckpoint
from policy.limits import Whole
from policy.operating import KVRows
from policy.rungs import RUNG, Rung
from policy.settings import FULL_KV
from runtime.command import one_line_errors
from runtime.control.record import Keep
from runtime.engine.control import why_not
from runtime.fingerprint import model_fingerprint
from runtime.ladder import load_ladder
from runtime.loading import load_model, load_tokenizer
from runtime.plan import RunPlan, ladder_for
from runtime.reference.adaptive import activate
from runtime.reference.whole import settled
from training.amounts import Amounts
from training.console import quiet_libraries
from training.documents import Example, check_context, load_corpus, make_batch
from training.fit import EMBEDDED

from .printing import commit, default_device, parse, print_table, result_path, versions
from .traces import FOLDER, MOST_ROWS, save_traces

AROUND = (16, 8, 4)


def held_out(dataset: str, model: str, rows: int, steps: int, most: int) -> list[Example]:
    """Test documents, as a fit with seed 0 divides them, that go on for `steps` tokens after their prompts.

    Raises ValueError where there are fewer than `rows`.
    """
    amounts = Amounts(test_documents=rows, max_tokens=most, min_completion_tokens=steps)
    found = load_corpus(dataset, load_tokenizer(model), amounts, seed=0).test
    if len(found) < rows:
        raise ValueError(
            f"--rows: expected at most the {len(found)} test documents with {steps} tokens behind the prompt, got "
            f"{rows}; lower it, or --steps"
        )
    return [{**own, "input_ids": own["input_ids"][: own["prompt_tokens"] + steps]} for own in found]


def open_plan(model: PreTrainedModel, ladder: Path, policy: Path) -> tuple[PolicyCheckpoint, RunPlan]:
    """The policy, and its run at its default budget, token by token with pages in full precision.

    Raises ValueError for a policy that the controller of the engine does not cover, and all that opening raises.
    """
    checkpoint = PolicyCheckpoint.load(policy)
    own = ladder_for(checkpoint, load_ladder(ladder), model_fingerprint(model))
    settings = replace(checkpoint.settings, block_tokens=1)
    reason = why_not(checkpoint.policy, settings)
    if reason is not None or checkpoint.curve is None:
        raise ValueError(
            "--fit: expected one of a learned policy that the engine covers, got one that it does not: "
            f"{reason or 'it decides nothing'}; fit another"
        )
    operating = checkpoint.operating([checkpoint.default_budget], [0])
    return checkpoint, RunPlan((own,), checkpoint.policy, settings, operating)


def chosen(
    model: PreTrainedModel, checkpoint: PolicyCheckpoint, plan: RunPlan, documents: Sequence[Example], budget: float
) -> list[list[Rung]]:
    """[B][N] equivalent ranks that every document's tokens behind its prompt read at `budget`."""
    rows = len(documents)
    operating = checkpoint.operating([budget] * rows, [0] * rows)
    plan = replace(plan, operating=replace(operating, kv=KVRows.of([FULL_KV] * rows)))
    batch = make_batch(documents).to(model.device)
    with activate(model, plan, keep=Keep.RUNGS) as run:
        active = settled(run, batch.tokens, batch.real, batch.prompt_tokens).stream.active_rungs().cpu()
    rungs = plan.ladder.rungs
    return [
        [rungs[j] for j in row[own["prompt_tokens"] : len(own["input_ids"])].tolist()]
        for row, own in zip(active, documents, strict=True)
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.record_trace", description="Rungs that a policy chooses on real text."
    )
    parser.add_argument("--fit", default="runs/embedded", help="output folder of the fit: its ladder and its policy")
    parser.add_argument("--model", default=str(EMBEDDED / "base"), help="the fit's base model, folder or hub id")
    parser.add_argument("--dataset", default=str(EMBEDDED / "text"), help="the fit's: its test documents are read")
    parser.add_argument("--around", nargs="+", type=float, default=list(AROUND), help="rungs whose bytes are budgets")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=64, help="tokens of each document")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a document, prompt included")
    parser.add_argument("--output", help="JSON file (default: benchmarks/traces/NAME-OF-FIT.json)")
    args = parse(parser, {"rows": Whole(1, MOST_ROWS), "steps": Whole(2, 4096), "max-tokens": Whole(4, 2**17)})
    args.around = [RUNG.take("--around", rung) for rung in args.around]
    return args


def main() -> None:
    with one_line_errors():
        record(arguments())


def record(args: argparse.Namespace) -> None:
    """Run the documents at every budget and write down what was chosen."""
    quiet_libraries()
    fit, name = Path(args.fit), Path(args.fit).resolve().name
    path = result_path(args.output or FOLDER / f"{name}.json", "")
    model = load_model(args.model, dtype="float32", device=default_device())
    check_context(model, args.max_tokens, "--max-tokens")
    checkpoint, plan = open_plan(model, fit / "ladder", fit / "learned")
    documents = held_out(args.dataset, args.model, args.rows, args.steps, args.max_tokens)
    ladder, traces = plan.ladder, []
    for rung in args.around:
        budget = float(plan.rung_cost()[0, ladder.rung_index(rung)])
        rungs = chosen(model, checkpoint, plan, documents, budget)
        traces.append({"around": rung, "budget": budget, "mean_rank": _mean(rungs), "rungs": rungs})
    # What decided and on what: whoever has the same gets the same trace.
    head: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": commit(), "versions": versions(),
        "model": Path(args.model).name, "adapter": name, "dataset": Path(args.dataset).name,
        "ladder": {"kind": ladder.kind, "rungs": list(ladder.rungs), "fingerprint": ladder.fingerprint},
        "policy": {"kind": checkpoint.policy.kind, **checkpoint.policy.config(), **checkpoint.fingerprints},
        "rows": args.rows, "steps": args.steps, "documents": [str(own["id"]) for own in documents],
    }  # fmt: skip
    save_traces(path, head, traces)
    rows = []
    for own in traces:
        flat = torch.tensor(own["rungs"], dtype=torch.float64)
        moves = float((flat.diff(dim=1) != 0).double().mean())
        rows.append([f"rung {own['around']}", f"{own['mean_rank']:.2f}", f"{float(flat.std()):.2f}", f"{moves:.2f}"])
    print_table(("budget of", "mean rank", "std", "changes a token"), rows)
    print(path)


def _mean(rungs: Sequence[Sequence[Rung]]) -> float:
    return float(torch.tensor([list(row) for row in rungs], dtype=torch.float64).mean())


if __name__ == "__main__":
    main()

"""What each signal, and each way to learn, is worth: bytes saved at equal KL against fixed rungs of the same ladder.

One fit's targets, many policies: every set of signals alone and left out, the four of the paper, the model's states,
chunks of several tokens, the direct objective, targets of uniform runs against those measured in the policy's own
context. Each policy's knob is set on validation documents, and it is measured once on test documents, token by token as
decode goes; intervals are over documents and seeds, as in a fit.

    python -m benchmarks.controller         # the embedded model: 21 policies, about half an hour on two cores
    python -m benchmarks.controller --model M --adapter A --dataset D --only default four hidden
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from policy.cost import LatencyTable
from policy.fixed import FixedPolicy
from policy.limits import Whole
from policy.settings import AGE, LOOKS, PAPER_SIGNALS, SIGNALS, ChunkSettings, Settings
from runtime.command import one_line_errors
from runtime.fingerprint import model_fingerprint
from runtime.loading import load_model, load_tokenizer
from runtime.reference.placing import keep_decoded
from training.amounts import Amounts
from training.compare.curves import Curve, fixed_curve, policy_curve
from training.compare.equal_rank import at_equal_rank, interval
from training.compare.scorer import HeldOut, Scorer
from training.compare.verdict import verdict_rungs
from training.console import quiet_libraries
from training.fit import EMBEDDED, make_trainer
from training.learn.module import DAMAGE, LATENCY
from training.learn.train import Learning, quiet_lightning
from training.pipeline import build_ladders, collect_targets, open_source, open_tasks, train_policies
from training.task import AdapterTask, FitContext, rung_rank, task_cost

from .printing import default_device, device_slug, finish, header, parse, print_table, result_path

DEFAULT = (*SIGNALS, AGE)
COLUMNS = ("bytes_saved", "mean", "mean_interval_95")


@dataclass(frozen=True)
class Variant:
    """One way to learn a policy."""

    signals: tuple[str, ...] = DEFAULT
    objective: str = DAMAGE
    chunk_tokens: int = 1
    rounds: int | None = None
    """Of own trajectories; None: as many as the amounts say."""


def variants() -> dict[str, Variant]:
    """All that is tried, by name; what is compared signal by signal learns from the targets of uniform runs."""
    found = {
        "default": Variant(),
        "default, targets of uniform runs": Variant(rounds=0),
        "four signals": Variant(PAPER_SIGNALS),
        "hidden": Variant(LOOKS),
        "latency objective": Variant(objective=LATENCY),
        "chunks of 4": Variant(chunk_tokens=4, rounds=0),
        "chunks of 16": Variant(chunk_tokens=16, rounds=0),
    }
    for signal in SIGNALS:
        found[f"without {signal}"] = Variant(tuple(own for own in DEFAULT if own != signal), rounds=0)
    for signal in SIGNALS:
        found[f"{signal} alone"] = Variant((signal,), rounds=0)
    return found


def measure(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what it saves) of every variant that is asked for."""
    network = load_model(args.model, dtype="float32", device=default_device())
    amounts = Amounts(seeds=args.seeds)
    with tempfile.TemporaryDirectory() as folder:
        context = FitContext(
            model=network, model_fingerprint=model_fingerprint(network), amounts=amounts, seed=0, root=Path(folder),
            make_trainer=functools.partial(make_trainer, Path(folder), {}), say=functools.partial(print, flush=True),
            hidden=True,
        )  # fmt: skip
        opened = open_tasks(
            [args.adapter], [open_source(args.adapter)], [args.dataset], load_tokenizer(args.model), amounts, 0
        )
        ladders = build_ladders(context, opened, "mixed", None)
        for name, variant in variants().items():
            if not args.only or name in args.only:
                yield name, _saved(context, ladders, variant)


def _saved(context: FitContext, ladders: list[AdapterTask], variant: Variant) -> dict[str, Any]:
    rounds = context.amounts.rounds if variant.rounds is None else variant.rounds
    context = replace(context, amounts=replace(context.amounts, rounds=rounds))
    chunk = ChunkSettings(variant.chunk_tokens, variant.chunk_tokens)
    tasks, calibrated = collect_targets(context, ladders, Settings(chunk=chunk))
    rungs, ranks = tasks[0].ladder.rungs, rung_rank(tasks)
    untimed = LatencyTable("none", tuple(0.0 for _ in rungs), 0.0, 1.0)
    policies = train_policies(context, tasks, calibrated, untimed, Learning(variant.signals, variant.objective))
    settings, cost = replace(calibrated.settings, block_tokens=1), task_cost(tasks).double().numpy()
    validation, test = (
        HeldOut(tuple(Scorer(context.model, task.ladder, getattr(task.corpus, part), whole=True) for task in tasks))
        for part in ("validation", "test")
    )
    read = [rungs.index(rung) for rung in verdict_rungs(rungs)]
    found = [policy_curve("learned", own, settings, validation, test, cost, read) for own in policies]
    curves = {
        "fixed": fixed_curve(FixedPolicy(rungs, calibrated.scales), settings, test),
        "learned": replace(found[0], others=tuple(found[1:])),
    }
    return _read(curves, ranks, read)


def _read(curves: dict[str, Curve], ranks: np.ndarray, read: list[int]) -> dict[str, Any]:
    """Bytes saved at the rungs `read`, and their mean with its interval."""
    found = at_equal_rank(curves, ranks, resamples=1000, seed=0)
    saved, drawn = found.saved["learned"][read], found.saved_drawn["learned"][:, read]
    reached = ~np.isnan(saved)
    return {
        "rungs": [float(ranks[rung]) for rung in read],
        "bytes_saved": [None if np.isnan(own) else round(float(own), 4) for own in saved],
        "mean": round(float(saved[reached].mean()), 4) if reached.any() else None,
        "mean_interval_95": [round(end, 4) for end in interval(drawn[:, reached].mean(1))] if reached.any() else None,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.controller", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(EMBEDDED / "base"), help="base model, folder or hub id")
    parser.add_argument("--adapter", default=str(EMBEDDED / "adapter"), help="PEFT adapter, or a saved ladder")
    parser.add_argument("--dataset", default=str(EMBEDDED / "text"), help="as in training.fit")
    parser.add_argument("--seeds", type=int, default=1, help="policies of each kind")
    parser.add_argument("--only", nargs="*", default=[], choices=[*variants()], help="these alone")
    parser.add_argument("--output", help="where the record goes")
    return parse(parser, {"seeds": Whole(1, 100)})


def main() -> None:
    args = arguments()
    quiet_libraries()
    device = default_device()
    path = result_path(args.output, f"controller-{Path(args.adapter).name}-{device_slug(device)}")
    results: dict[str, Any] = {}
    with keep_decoded(), quiet_lightning():
        for name, found in measure(args):
            results[name] = found
            print(f"{name}: {found['bytes_saved']}, mean {found['mean']} {found['mean_interval_95']}", flush=True)
    rows = [[name, *(str(own[key]) for key in COLUMNS)] for name, own in results.items()]
    print_table(["policy", "bytes saved", "mean", "95 % interval"], rows)
    named = {name: Path(getattr(args, name)).name for name in ("model", "adapter", "dataset")}
    settings = {**named, "seeds": args.seeds}
    finish({**header("controller", device), **settings, "variants": results}, path)


if __name__ == "__main__":
    with one_line_errors():
        main()

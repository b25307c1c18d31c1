"""The stages of a fit over its tasks, in the order in which `fit` walks through them.

    open_tasks -> build_ladders -> collect_targets -> train_policy -> compare_policies -> (judge)

Every stage takes all tasks, one adapter being the special case. Everything collected lies in resumable shards under the
output folder, the ladders beside them; everything drawn is drawn from the seed, so a run that was killed ends where the
uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from policy.contract import Summary
from policy.fixed import FixedPolicy
from policy.learned import LearnedPolicy
from policy.operating import Operating
from policy.percentile import COMPLEXITY, PercentilePolicy
from policy.random import RandomPolicy
from policy.reading import read_json
from policy.rungs import RUNGS, Rung, checked_rungs, rungs_at_shares
from policy.settings import SIGNALS
from runtime.fingerprint import adapter_fingerprint
from runtime.ladder import Adapter, Ladder, build_ladder, load_adapter, load_ladder, save_ladder
from runtime.ladder.store import RECORD
from runtime.reference.adaptive import require_servable

from .amounts import Amounts
from .compare.curves import Bench, Curve, capped_curve, fixed_curve, oracle_curve, policy_curve
from .compare.hindsight import Hindsight, Oracle
from .compare.scorer import HeldOut, Scorer
from .compare.worth import SvdCurve, measure_svd
from .console import is_first_process
from .documents import Example, load_corpus
from .ladders.build import build
from .learn.train import train_policy
from .progress import with_progress
from .targets.paths import Calibrated, collect_tables, collect_targets, full_rank_paths
from .targets.samples import document_samples
from .task import (
    AdapterTask,
    FitContext,
    OpenTask,
    choosable,
    common_rungs,
    documents_digest,
    ladder_folder,
    rung_rank,
    task_cost,
    task_rank,
)

__all__ = ["Comparison", "build_ladders", "collect_targets", "compare_policies", "open_tasks", "train_policy"]

PERCENTILE_SPREADS = (1.0, 2.0)
"""Half-widths, in rungs, of the band that percentile thresholds move in; the better one is the baseline."""
LEAST_NATS = 1e-9
"""What an exact rung is taken to lose where the logarithm is needed."""


@dataclass(frozen=True)
class Comparison:
    """Every policy's curve, and the policies that may be exported."""

    curves: dict[str, Curve]
    candidates: dict[str, LearnedPolicy | FixedPolicy]
    svd: SvdCurve | None
    """Fixed rungs of the `svd` ladder of the same adapters; None where that is the ladder in use."""


def open_source(name: str) -> Adapter | Ladder:
    """A saved ladder, or an adapter that one is still to be built of. Raises what reading either raises."""
    return load_ladder(name) if (Path(name) / RECORD).is_file() else load_adapter(name)


def open_tasks(
    names: Sequence[str],
    sources: Sequence[Adapter | Ladder],
    datasets: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    amounts: Amounts,
    seed: int,
) -> list[OpenTask]:
    """A task per adapter: what was read of it, and its documents, split and encoded."""
    pairs = zip(names, sources, datasets, strict=True)
    return [OpenTask(name, source, load_corpus(text, tokenizer, amounts, seed)) for name, source, text in pairs]


def build_ladders(
    context: FitContext, opened: Sequence[OpenTask], kind: str, rungs: Sequence[Rung] | None
) -> list[AdapterTask]:
    """The tasks with their ladders: of the first at `rungs`, of the others at the same shares of their ranks.

    A saved ladder stays the kind it is. Of an adapter the one of `kind` is built, from its train documents, and lies in
    the output folder from then on: a run that is resumed goes on with it. Raises ValueError, before that, for an
    adapter of another model and for rungs that there are not.
    """
    for task in opened:
        require_servable(context.model, [task.source if isinstance(task.source, Ladder) else build_ladder(task.source)])
    tasks: list[AdapterTask] = []
    for number, task in enumerate(opened):
        rank = task.source.rungs[-1] if isinstance(task.source, Ladder) else task.source.rank
        wanted = rungs_at_shares(tasks[0].ladder.rungs, rank) if tasks else _wanted(rungs, rank)
        ladder = _ladder(context, task, kind, wanted, ladder_folder(context.root, number, len(opened)))
        tasks.append(AdapterTask(task.name, ladder, task.corpus))
        context.say(f"{ladder.kind} ladder of {task.name}: rungs {ladder.rungs}")
    return tasks


def _wanted(rungs: Sequence[Rung] | None, rank: Rung) -> tuple[Rung, ...] | None:
    """`rungs` and the top one. Raises ValueError where they are not ranks of the adapter, or leave no choice."""
    if rungs is None:
        return None
    given = RUNGS.take("rungs", sorted(rungs))
    if given[-1] > rank:
        raise ValueError(f"rungs: expected ranks up to the adapter's {rank}, got {given[-1]}; leave it out")
    return choosable(checked_rungs(sorted({*given, rank})))


def _ladder(context: FitContext, task: OpenTask, kind: str, rungs: tuple[Rung, ...] | None, folder: Path) -> Ladder:
    source = task.source
    if isinstance(source, Ladder):
        ladder = source if rungs is None else source.with_rungs(rungs)
        choosable(ladder.rungs)
        if is_first_process() and Path(task.name).resolve() != folder.resolve():
            save_ladder(ladder, folder)
        return ladder
    origin: dict[str, Any] = {
        "adapter": adapter_fingerprint(source), "kind": kind, "rungs": None if rungs is None else list(rungs),
        "documents": documents_digest(task.corpus.train), "seed": context.seed, "model": context.model_fingerprint,
        "dtype": str(context.model.dtype),
    }  # fmt: skip
    record = folder / RECORD
    if record.is_file() and read_json(record, "delete the folder").get("origin") == origin:
        return load_ladder(folder)
    ladder = build(kind, source, context.model, task.corpus.train, rungs, seed=context.seed, say=context.say)
    if is_first_process():
        save_ladder(ladder, folder, extra={"origin": origin})
    return ladder


def compare_policies(
    context: FitContext, tasks: Sequence[AdapterTask], calibrated: Calibrated, learned: LearnedPolicy
) -> Comparison:
    """Measure every policy on the test documents of all tasks; see `compare` for the rules."""
    rungs, settings, scales = common_rungs(tasks), calibrated.settings, calibrated.scales
    validation = _held_out(context, tasks, [task.corpus.validation for task in tasks])
    test = _held_out(context, tasks, [task.corpus.test for task in tasks])
    fixed = FixedPolicy(rungs, scales)
    movers = {
        "percentile": percentile_policy(context, tasks, calibrated, validation),
        "learned": learned,
        "random": RandomPolicy(rungs, seed=context.seed, scales=scales),
    }
    aims, cost = range(len(rungs) - 1), task_cost(tasks).double().numpy()
    curves = {"fixed": fixed_curve(fixed, settings, test)}
    context.say("measured fixed")
    for name, policy in movers.items():
        curves[name] = policy_curve(name, policy, settings, validation, test, cost, aims)
        context.say(f"measured {name}")
    curves["capped"] = capped_curve(curves["learned"], learned, settings, test, cost, aims)
    context.say("measured learned as served, its budget kept")
    known = tuple(tuple(_hindsight(context, task, calibrated)) for task in tasks)
    oracle = Oracle(test, known, scales, task_rank(tasks))
    curves["oracle"] = oracle_curve(settings, oracle, rung_rank(tasks), aims)
    context.say("measured oracle")
    svd = measure_svd(test, settings)
    if svd is not None:
        context.say("measured fixed rungs of the svd ladder")
    return Comparison(curves, {"learned": learned, "fixed": fixed}, svd)


def _held_out(context: FitContext, tasks: Sequence[AdapterTask], documents: Sequence[Sequence[Example]]) -> HeldOut:
    pairs = zip(tasks, documents, strict=True)
    return HeldOut(tuple(Scorer(context.model, task.ladder, examples) for task, examples in pairs))


def _hindsight(context: FitContext, task: AdapterTask, calibrated: Calibrated) -> list[Hindsight]:
    """What the oracle knows of the test documents: every rung's damage, at its best scale, of full-rank chunks."""
    documents = task.corpus.test
    tables = collect_tables(context, task, "tables-test", documents, calibrated.scales[:, None])
    paths = full_rank_paths(context, task, "trajectory-test", documents, calibrated.settings)
    samples = document_samples(documents, paths, tables, calibrated.later)
    pairs = zip(paths, samples, strict=True)
    return [Hindsight(path.starts, chunks.damage[..., 0], chunks.scored) for path, chunks in pairs]


def percentile_policy(
    context: FitContext, tasks: Sequence[AdapterTask], calibrated: Calibrated, validation: Bench
) -> PercentilePolicy:
    """The best signal (or all together) and band, by KL on validation documents with the knob at the middle rung."""
    rungs, weights = common_rungs(tasks), calibrated.settings.chunk.weights
    paths = [path for task in tasks for path in task.found().paths[: len(task.corpus.train)]]
    summary = Summary.from_features(torch.cat([path.features for path in paths]))
    candidates = []
    for signal in (*SIGNALS, COMPLEXITY):
        value, known = PercentilePolicy(rungs, signal, weights=weights).value(summary)
        for spread in PERCENTILE_SPREADS:
            seen = value[known]
            candidates.append(PercentilePolicy.calibrate(seen, rungs, signal, calibrated.scales, spread, weights))
    middle = (len(rungs) - 1) // 2
    operating = Operating.at(float(middle), middle)
    ranks, log_kl = rung_rank(tasks), np.log(np.maximum(validation_kl(tasks), LEAST_NATS))
    over = []
    for candidate in with_progress(candidates, "percentile signals", len(candidates)):
        (scores,) = validation.measure(candidate, calibrated.settings, operating)
        # Candidates land at different mean ranks: each is held against what a fixed rung of its bytes loses.
        over.append(scores.value("kl") / np.exp(np.interp(scores.mean(ranks), ranks, log_kl)))
    best = candidates[int(np.argmin(over))]
    context.say(f"percentile: {best.signal} with a band of {best.spread:g} rungs is the best of {len(over)}")
    return best


def validation_kl(tasks: Sequence[AdapterTask]) -> np.ndarray:
    """[J] KL of every rung per scored token of the validation documents, at its best scale, from their tables."""
    scored = []
    for task in tasks:
        tables = task.found().tables[len(task.corpus.train) :]
        for example, table in zip(task.corpus.validation, tables, strict=True):
            scored.append(table[max(0, example["prompt_tokens"] - 1) : -1])
    return torch.cat(scored).double().mean(0).amin(1).numpy()

"""The stages of a fit over its tasks, in the order in which `fit` walks through them.

    open_tasks -> collect_targets -> train_policy -> compare_policies -> (judge)

Every stage takes all tasks, one adapter being the special case. Everything collected lies in resumable shards under the
output folder; everything drawn is drawn from the seed, so a run that was killed ends where the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from policy.contract import Summary
from policy.fixed import FixedPolicy
from policy.learned import LearnedPolicy
from policy.operating import Operating
from policy.percentile import COMPLEXITY, PercentilePolicy
from policy.random import RandomPolicy
from policy.settings import SIGNALS
from runtime.ladder import Ladder

from .amounts import Amounts
from .compare.curves import Bench, Curve, capped_curve, fixed_curve, oracle_curve, policy_curve
from .compare.hindsight import Hindsight, Oracle
from .compare.scorer import HeldOut, Scorer
from .documents import Example, load_corpus
from .learn.train import train_policy
from .progress import with_progress
from .targets.paths import Calibrated, collect_tables, collect_targets, full_rank_paths
from .targets.samples import document_samples
from .task import AdapterTask, FitContext, common_rungs, rung_rank, task_cost, task_rank

__all__ = ["Comparison", "collect_targets", "compare_policies", "open_tasks", "train_policy"]

PERCENTILE_SPREADS = (1.0, 2.0)
"""Half-widths, in rungs, of the band that percentile thresholds move in; the better one is the baseline."""


@dataclass(frozen=True)
class Comparison:
    """Every policy's curve, and the policies that may be exported."""

    curves: dict[str, Curve]
    candidates: dict[str, LearnedPolicy | FixedPolicy]


def open_tasks(
    names: Sequence[str],
    ladders: Sequence[Ladder],
    datasets: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    amounts: Amounts,
    seed: int,
) -> list[AdapterTask]:
    """A task per adapter: its ladder, and its documents, split and encoded."""
    pairs = zip(names, ladders, datasets, strict=True)
    return [AdapterTask(name, ladder, load_corpus(text, tokenizer, amounts, seed)) for name, ladder, text in pairs]


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
    return Comparison(curves, {"learned": learned, "fixed": fixed})


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
    kls = []
    for candidate in with_progress(candidates, "percentile signals", len(candidates)):
        (scores,) = validation.measure(candidate, calibrated.settings, operating)
        # Candidates land at slightly different mean ranks; a KL that falls like 1/rank makes them comparable.
        kls.append(scores.value("kl") * scores.mean(rung_rank(tasks)))
    best = candidates[int(np.argmin(kls))]
    context.say(f"percentile: {best.signal} with a band of {best.spread:g} rungs is the best of {len(kls)}")
    return best

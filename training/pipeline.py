"""The stages of a fit over its tasks, in the order in which `fit` walks through them.

    open_tasks -> build_ladders -> collect_targets -> train_policies -> compare_policies -> (judge)

Every stage takes all tasks, one adapter being the special case. Everything collected lies in resumable shards under the
output folder, the ladders beside them; everything drawn is drawn from the seed, so a run that was killed ends where the
uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policy.fixed import FixedPolicy
from policy.learned import LearnedPolicy
from policy.percentile import COMPLEXITY, PercentilePolicy
from policy.random import RandomPolicy
from policy.reading import read_json
from policy.rungs import RUNGS, Rung, checked_rungs, rungs_at_shares
from runtime.fingerprint import adapter_fingerprint
from runtime.ladder import Adapter, Ladder, build_ladder, load_adapter, load_ladder, save_ladder
from runtime.ladder.store import RECORD
from runtime.reference.adaptive import require_servable

from .amounts import Amounts
from .compare.curves import Bench, Curve, capped_curve, fixed_curve, oracle_curve, policy_curve, same_knobs
from .compare.hindsight import Hindsight, Oracle, table_oracle
from .compare.scorer import HeldOut, Scorer
from .compare.thresholds import Seen, best_thresholds, candidates
from .compare.verdict import verdict_columns
from .compare.worth import SvdCurve, measure_svd
from .console import is_first_process
from .documents import Example, load_corpus, scored_tokens
from .ladders.build import build
from .learn.module import interpolate_scale
from .learn.train import Learning, train_policies
from .targets.paths import Calibrated, collect_tables, collect_targets, full_rank_paths
from .targets.samples import Samples, document_samples, scored_chunks
from .task import (
    AdapterTask,
    FitContext,
    OpenTask,
    choosable,
    common_rungs,
    documents_digest,
    ladder_folder,
    rung_rank,
    scale_grid,
    task_cost,
    task_rank,
)

__all__ = [
    "Comparison",
    "Learning",
    "build_ladders",
    "collect_targets",
    "compare_policies",
    "open_tasks",
    "store_difficulty",
    "train_policies",
]


CHUNKS = (1, 4, 16)
"""Tokens of one choice of the oracles that are read off tables."""


@dataclass(frozen=True)
class Comparison:
    """Every policy's curve, and the policies that may be exported."""

    curves: dict[str, Curve]
    candidates: dict[str, LearnedPolicy | FixedPolicy]
    svd: SvdCurve | None
    """Fixed rungs of the `svd` ladder of the same adapters; None where that is the ladder in use."""
    by_table: dict[str, list[float]]
    """KL of the best choices at the bytes of the verdict's rungs, by tables of uniform runs, which flatter."""
    in_blocks: dict[str, Curve]
    """Fixed rungs and the learned policy in the blocks of prefill, at the served KV setting."""
    in_steps: dict[str, Curve]
    """The same token by token, at the knobs of the comparison."""


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
    context: FitContext, tasks: Sequence[AdapterTask], calibrated: Calibrated, learned: Sequence[LearnedPolicy]
) -> Comparison:
    """Measure every policy on the test documents of all tasks, token by token as decode goes; see `compare` for the
    rules. The first of the `learned` policies is the one that may be exported."""
    rungs, scales = common_rungs(tasks), calibrated.scales
    decode = replace(calibrated.settings, block_tokens=1)
    validation = _held_out(context, tasks, [task.corpus.validation for task in tasks])
    test = _held_out(context, tasks, [task.corpus.test for task in tasks])
    aims, cost = range(len(rungs) - 1), task_cost(tasks).double().numpy()
    read = verdict_columns(rungs)
    fixed = FixedPolicy(rungs, scales)
    curves = {"fixed": fixed_curve(fixed, decode, test)}
    context.say("measured fixed")
    found = percentile_policy(context, tasks, calibrated, read[len(read) // 2])
    curves["percentile"] = policy_curve("percentile", found, decode, validation, test, cost, read)
    context.say("measured percentile")
    members = [
        policy_curve("learned", own, decode, validation, test, cost, aims if number == 0 else read)
        for number, own in enumerate(learned)
    ]
    curves["learned"] = replace(members[0], others=tuple(members[1:]))
    context.say("measured learned")
    random = RandomPolicy(rungs, seed=context.seed, scales=scales)
    curves["random"] = policy_curve("random", random, decode, validation, test, cost, read)
    context.say("measured random")
    curves["capped"] = capped_curve(curves["learned"], learned[0], decode, test, cost)
    context.say("measured learned as served, its budget kept")
    tables, known = zip(*(_hindsight(context, task, calibrated) for task in tasks), strict=True)
    oracle = Oracle(test, known, scales, task_rank(tasks))
    curves["oracle"] = oracle_curve(decode, oracle, rung_rank(tasks), read)
    context.say("measured oracle")
    by_table = _by_table([table for own in tables for table in own], task_rank(tasks), read)
    blocks = _in_blocks(context, calibrated, fixed, learned[0], validation, test, cost, read)
    steps = _in_steps(context, calibrated, fixed, learned[0], curves["learned"], test, read)
    svd = measure_svd(test, decode)
    if svd is not None:
        context.say("measured fixed rungs of the svd ladder")
    return Comparison(curves, {"learned": learned[0], "fixed": fixed}, svd, by_table, blocks, steps)


def _held_out(context: FitContext, tasks: Sequence[AdapterTask], documents: Sequence[Sequence[Example]]) -> HeldOut:
    pairs = zip(tasks, documents, strict=True)
    return HeldOut(tuple(Scorer(context.model, task.ladder, examples, whole=True) for task, examples in pairs))


def _in_blocks(
    context: FitContext, calibrated: Calibrated, fixed: FixedPolicy, learned: LearnedPolicy, validation: Bench,
    test: Bench, cost: np.ndarray, read: Sequence[int],
) -> dict[str, Curve]:  # fmt: skip
    """Fixed rungs and the learned policy as a forward over whole texts serves them: in the blocks of prefill, at the
    served KV setting."""
    settings, kv = calibrated.settings, calibrated.settings.kv
    curves = {
        "fixed": fixed_curve(fixed, settings, test, "fixed in blocks", targets=_around(fixed, read), kv=kv),
        "learned": policy_curve("learned in blocks", learned, settings, validation, test, cost, read, kv=kv),
    }
    context.say(f"measured fixed and learned in blocks of {settings.block_tokens}, KV as served")
    return curves


def _in_steps(
    context: FitContext, calibrated: Calibrated, fixed: FixedPolicy, learned: LearnedPolicy, curve: Curve, test: Bench,
    read: Sequence[int],
) -> dict[str, Curve]:  # fmt: skip
    """The same token by token, as decode goes. Pages change what is lost, not what is spent: knobs stay."""
    decode, kv = replace(calibrated.settings, block_tokens=1), calibrated.settings.kv
    curves = {
        "fixed": fixed_curve(fixed, decode, test, "fixed in steps", targets=_around(fixed, read), kv=kv),
        "learned": same_knobs("in steps", curve, learned, decode, test, targets=read, kv=kv),
    }
    context.say("measured fixed and learned token by token, KV as served")
    return curves


def _around(fixed: FixedPolicy, read: Sequence[int]) -> list[int]:
    """The rungs `read` and their neighbours below the top, between which bytes at equal KL are read off."""
    return sorted({rung for own in read for rung in (own - 1, own, own + 1) if 0 <= rung < len(fixed.rungs) - 1})


def _hindsight(
    context: FitContext, task: AdapterTask, calibrated: Calibrated
) -> tuple[list[Tensor], tuple[Hindsight, ...]]:
    """What the oracle knows of the test documents: tables [T, J] of scored tokens, every rung at its best scale, and
    the damage of the chunks of full-rank runs."""
    documents, settings = task.corpus.test, replace(calibrated.settings, block_tokens=1)
    tables = collect_tables(context, task, "tables-test", documents, calibrated.scales[:, None])
    paths = full_rank_paths(context, task, "trajectory-test", documents, settings)
    samples = document_samples(documents, paths, tables, calibrated.later)
    known = []
    for document, path, chunks in zip(documents, paths, samples, strict=True):
        starts = path.starts[scored_chunks(document, path)]
        known.append(Hindsight(starts, chunks.damage[..., 0], chunks.scored))
    scored = [table[scored_tokens(own)][..., 0] for table, own in zip(tables, documents, strict=True)]
    return scored, tuple(known)


def _by_table(tables: Sequence[Tensor], rung_rank: Tensor, read: Sequence[int]) -> dict[str, list[float]]:
    """KL at the ranks of the rungs `read` of the best choices per token and per chunk, by tables of uniform runs."""
    ranks = [float(rung_rank[rung]) for rung in read]
    return {f"chunks of {tokens}": table_oracle(tables, rung_rank, ranks, tokens) for tokens in CHUNKS}


def percentile_policy(
    context: FitContext, tasks: Sequence[AdapterTask], calibrated: Calibrated, rung: int
) -> PercentilePolicy:
    """The best thresholds of all by tables of validation documents, at the bytes of `rung`."""
    weights = calibrated.settings.chunk.weights
    base = PercentilePolicy(common_rungs(tasks), COMPLEXITY, scales=calibrated.scales, weights=weights)
    train, held_out = [], []
    for task in tasks:
        split = len(task.corpus.train)
        found = task.found()
        samples = document_samples(task.labelled, found.paths[1], found.tables, calibrated.later)
        train += samples[:split]
        held_out += samples[split:]
    unseen = Samples.concatenate(held_out)
    damage = interpolate_scale(unseen.damage, calibrated.scales.expand(len(unseen), -1), _grid(context, tasks))
    among = candidates(Samples.concatenate(train).features, base)
    best = best_thresholds(among, Seen(unseen.features, damage, unseen.scored), task_cost(tasks), rung)
    how = f"{best.signal} of the {best.of}, sign {best.sign:+d}, a band of {best.spread:g} rungs"
    context.say(f"percentile: {how} is the best of {len(among)}")
    return best


def _grid(context: FitContext, tasks: Sequence[AdapterTask]) -> Tensor:
    return torch.tensor(scale_grid(context.amounts, tasks))


def store_difficulty(context: FitContext, tasks: Sequence[AdapterTask]) -> None:
    """Write the ladders in the output folder once more, with the token difficulty that was learned."""
    for number, task in enumerate(tasks):
        folder = ladder_folder(context.root, number, len(tasks))
        if is_first_process():
            origin = read_json(folder / RECORD, "delete the folder").get("origin")
            save_ladder(task.ladder, folder, extra={} if origin is None else {"origin": origin})

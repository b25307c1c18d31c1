"""What a fit found, put into records: the checkpoints to choose from, the summary, and the few lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.checkpoint import Fingerprints, PolicyCheckpoint
from policy.cost import LatencyTable, LatencyTables
from policy.operating import Operating
from runtime.ladder.factors import SVD
from runtime.plan import RunPlan

from .compare.curves import Curve
from .compare.equal_rank import at_equal_rank, interval
from .compare.latency import measure_controller
from .compare.tradeoff import table
from .compare.verdict import Timing, Verdict, areas
from .compare.worth import compare_with_svd, describe
from .pipeline import Comparison
from .targets.paths import Calibrated
from .task import AdapterTask, FitContext, rung_rank, task_cost


def summarise(
    tasks: Sequence[AdapterTask], comparison: Comparison, verdict: Verdict, exported: PolicyCheckpoint,
    ranks: np.ndarray, latency: LatencyTable, resamples: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """All numbers of the comparison, as JSON has them."""
    return {
        **_describe(tasks, comparison, ranks),
        "latency": {**asdict(latency), "resolved": latency.resolved},
        "curves": _curves(comparison, ranks, latency),
        "area": areas(comparison.curves, ranks),
        **verdict.describe(),
        "oracle_by_table": comparison.by_table,
        "in_blocks": _as_served(comparison.in_blocks, ranks, resamples, seed),
        "in_steps": _as_served(comparison.in_steps, ranks, resamples, seed),
        "seeds": _seeds(comparison, ranks),
        "operating_point": _operating_point(comparison, exported, ranks, latency),
    }


def timing_of(
    context: FitContext, tasks: Sequence[AdapterTask], calibrated: Calibrated, comparison: Comparison,
    latency: LatencyTable,
) -> Timing | None:  # fmt: skip
    """What a step takes; None where the table does not tell rungs apart. What deciding adds the table says, or it is
    measured here, on the reference path, which the table then is of."""
    points = comparison.curves["learned"].points
    if not latency.resolved or not points:
        return None
    controller_ms = latency.controller_ms
    if controller_ms is None:
        middle = points[len(points) // 2]
        operating = Operating.at(float(middle.knob or 0.0), middle.rung)
        plan = RunPlan((tasks[0].ladder,), comparison.candidates["learned"], calibrated.settings, operating)
        controller_ms = measure_controller(context.model, plan)
    return Timing(np.array(latency.ms), rung_rank(tasks), controller_ms)


def candidates(
    context: FitContext, tasks: Sequence[AdapterTask], calibrated: Calibrated, comparison: Comparison,
    verdict: Verdict, latency: LatencyTables,
) -> dict[str, PolicyCheckpoint]:  # fmt: skip
    """The policies to choose from, each with its own knob curve, at the budget nearest to half of the top's bytes."""
    cost = task_cost(tasks)
    ladder = tasks[0].ladder
    prints = Fingerprints(
        model=context.model_fingerprint, adapter=ladder.adapter, ladder=ladder.fingerprint, shared=len(tasks) > 1
    )
    return {
        name: PolicyCheckpoint(
            policy=policy,
            settings=calibrated.settings,
            curve=comparison.curves[name].knob_curve,
            cost=tuple(cost.tolist()),
            fingerprints=prints,
            default_budget=float(cost[_middle(cost)]),
            latency=latency,
            metrics=verdict.metrics(),
        )
        for name, policy in comparison.candidates.items()
    }


def _middle(cost: Tensor) -> int:
    """Index of the rung that costs about half of the top one."""
    return int((cost - 0.5).abs().argmin())


def _describe(tasks: Sequence[AdapterTask], comparison: Comparison, ranks: np.ndarray) -> dict[str, Any]:
    """Ladder, documents and policies, for the summary."""
    ladder, curves, svd = tasks[0].ladder, comparison.curves, comparison.svd
    worth = {}
    if svd is not None:
        worth = describe(compare_with_svd(curves["fixed"], ranks, svd), ladder.kind, float(ranks[-1]))
    parts = ("train", "validation", "test")
    return {
        "ladder": {
            "kind": ladder.kind,
            "bytes": ladder.rung_bytes().tolist(),
            "lost_energy": [round(energy, 6) for energy in ladder.lost_energy().tolist()],
            **worth,
        },
        "rungs": list(ladder.rungs),
        "documents": {name: sum(len(getattr(task.corpus, name)) for task in tasks) for name in parts},
        "scored_test_tokens": int(curves["fixed"].points[0].scores.tokens.sum()),
        "policies": {name: curve.config for name, curve in curves.items() if curve.config},
    }


def _curves(comparison: Comparison, ranks: np.ndarray, latency: LatencyTable) -> dict[str, list[dict[str, Any]]]:
    """The measured points of every policy, and of the fixed rungs of the svd ladder, which were not timed."""
    own = table(comparison.curves, ranks, np.array(latency.ms) if latency.resolved else None)
    svd = comparison.svd
    return own if svd is None else {**own, **table({SVD: svd.curve}, svd.rung_rank, None)}


def _as_served(curves: dict[str, Curve], ranks: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """The learned policy against fixed rungs at the served KV setting, for the summary."""
    fixed = curves["fixed"]
    read = at_equal_rank(curves, ranks, resamples=resamples, seed=seed)
    found = {}
    for point in curves["learned"].points:
        low, high = interval(read.saved_drawn["learned"][:, point.rung])
        found[f"{ranks[point.rung]:g}"] = {
            "kl": float(read.kl["learned"][point.rung]),
            "kl_fixed": next(own.scores.value("kl") for own in fixed.points if own.rung == point.rung),
            "bytes_saved": float(read.saved["learned"][point.rung]),
            "interval_95": [low, high],
        }
    return found


def _seeds(comparison: Comparison, ranks: np.ndarray) -> list[list[dict[str, float]]]:
    """Mean rank and KL of every seed's policy at every rung it was aimed at."""
    return [
        [
            {"rung": point.rung, "mean_rank": point.scores.mean(ranks), "kl": point.scores.value("kl")}
            for point in own.points
        ]
        for own in comparison.curves["learned"].members
    ]


def _operating_point(
    comparison: Comparison, checkpoint: PolicyCheckpoint, ranks: np.ndarray, latency: LatencyTable
) -> dict[str, float | None]:
    """KL and milliseconds of the exported policy at its default budget."""
    middle = _middle(torch.tensor(checkpoint.cost))
    points = comparison.curves[checkpoint.policy.kind].points
    scores = min(points, key=lambda point: abs(point.rung - middle)).scores
    return {
        "budget": checkpoint.default_budget,
        "mean_rank": scores.mean(ranks),
        "kl": scores.value("kl"),
        "latency_ms": scores.mean(np.array(latency.ms)) if latency.resolved else None,
    }


def print_verdict(summary: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = Table(title="KL to full rank at equal mean rank, nats per completion token, held-out documents")
    shown.add_column("mean rank", justify="right")
    for name in summary["kl_at"]:
        shown.add_column(name, justify="right")
    for i, rank in enumerate(summary["compared_at"]):
        shown.add_row(str(rank), *(_shown(values[i]) for values in summary["kl_at"].values()))
    console.print(shown)
    captured = summary["captured"]
    share = "which cannot be told from zero"
    if captured["share"] is not None:
        low, high = captured["interval_95"]
        share = f"captured {captured['share']:.0%} (95 % interval {low:.0%} to {high:.0%})"
    worth = summary["ladder"].get("worth")
    if worth is not None:
        console.print(f"{worth}.")
    console.print(f"{summary['verdict']}.")
    console.print(f"Headroom {summary['headroom']['nats']:.4f} nats, {share}.")
    console.print(f"{folder}/policy written in {summary['seconds']:.0f} s; tensorboard --logdir {folder.parent}")


def _shown(kl: float | None) -> str:
    return "-" if kl is None else f"{kl:.4f}"

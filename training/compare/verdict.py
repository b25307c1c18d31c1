"""The verdict: what the learned policy gains over the fixed rungs, of what there is to gain, and what is exported.

It is read at the fixed rungs 8, 16 and 24 themselves (of those there are): there a policy's KL is interpolated linearly
between its own measured points, which for a convex curve can only overstate it, and the fixed rung's KL is as measured.

    headroom = KL(fixed) - KL(oracle),   captured = (KL(fixed) - KL(learned)) / headroom,   averaged over those rungs

with 95 % intervals from resampling test documents. The oracle knows every rung's damage on the test documents ahead and
may also stay at the fixed rung, so its headroom is never negative; where it cannot be told from zero, nothing can be
captured and the share is not given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import auc

from ..progress import with_progress
from .curves import Curve, rank_and_kl

VERDICT_RANKS = (8, 16, 24)
MEASURABLE_NATS = 1e-6
"""A headroom whose interval reaches below this is none."""


@dataclass(frozen=True)
class Verdict:
    """What the comparison says. Numbers are nan-free: where a curve does not reach a rung, the rung is left out."""

    ranks: tuple[int, ...]
    """The fixed rungs compared at."""
    kl: dict[str, list[float]]
    """KL of each policy at those mean ranks."""
    headroom: float
    """Mean over them of KL(fixed) - KL(oracle), nats per completion token."""
    headroom_interval: tuple[float, float]
    captured: float | None
    """Share of the headroom the learned policy captures; None where the headroom cannot be told from zero."""
    captured_interval: tuple[float, float] | None
    gain: float
    """Mean of KL(fixed) - KL(learned), nats; negative: the fixed rungs are better."""
    gain_interval: tuple[float, float]
    exported: str
    """`learned` when it beats the fixed rungs beyond chance and percentile at no rung does better, else `fixed`."""
    reason: str

    def metrics(self) -> dict[str, Any]:
        """What a checkpoint carries of it."""
        return {
            "headroom": self.headroom,
            "captured": self.captured,
            "captured_interval_95": self.captured_interval,
            "compared_at": list(self.ranks),
            "kl_at": self.kl,
            "exported": self.exported,
        }

    def describe(self) -> dict[str, Any]:
        """For the summary."""
        captured = self.captured_interval
        return {
            "compared_at": list(self.ranks),
            "kl_at": self.kl,
            "headroom": {"nats": self.headroom, "interval_95": list(self.headroom_interval)},
            "captured": {"share": self.captured, "interval_95": None if captured is None else list(captured)},
            "gain_over_fixed": {"nats": self.gain, "interval_95": list(self.gain_interval)},
            "exported": self.exported,
            "reason": self.reason,
        }


def judge(
    curves: dict[str, Curve], rungs: Sequence[int], rung_rank: np.ndarray, *, resamples: int, seed: int
) -> Verdict:
    """Judge `curves` (fixed, percentile, learned, random, oracle). See the module's docstring."""
    wanted = [rung for rung in VERDICT_RANKS if rung in rungs[:-1]] or list(rungs[len(rungs) // 2 - 1 : -1][:1])
    columns = {rung: rungs.index(rung) for rung in wanted}
    kl = {name: [_at(curve, columns[r], rung_rank) for r in wanted] for name, curve in curves.items()}
    reached = [i for i in range(len(wanted)) if not any(np.isnan(values[i]) for values in kl.values())]
    ranks = tuple(wanted[i] for i in reached)
    kl = {name: [values[i] for i in reached] for name, values in kl.items()}
    if not ranks:
        none = (0.0, 0.0)
        return Verdict((), kl, 0.0, none, None, None, 0.0, none, "fixed", "no policy's curve reaches a fixed rung")
    indices = [columns[rank] for rank in ranks]
    gain, headroom = _gain_and_headroom(curves, indices, rung_rank, None)
    drawn = with_progress(_resamples(curves, resamples, seed), "resampled documents", resamples)
    draws = [_gain_and_headroom(curves, indices, rung_rank, documents) for documents in drawn]
    gains, rooms = (np.array(column) for column in zip(*draws, strict=True))
    headroom_interval, gain_interval = _interval(rooms), _interval(gains)
    captured, captured_interval = None, None
    if headroom_interval[0] > MEASURABLE_NATS:
        captured, captured_interval = gain / headroom, _interval(gains / rooms)
    worse = [r for r, mine, other in zip(ranks, kl["learned"], kl["percentile"], strict=True) if mine > other]
    low, high = gain_interval
    if high < 0:
        reason = f"worse than the fixed rungs: gain [{low:.5f}, {high:.5f}] nats"
    elif low <= 0:
        reason = f"gain over the fixed rungs is within chance: [{low:.5f}, {high:.5f}] nats"
    elif worse:
        reason = f"percentile thresholds do better at mean rank {', '.join(map(str, worse))}"
    else:
        reason = "beats the fixed rungs beyond chance and percentile thresholds everywhere"
    exported = "learned" if low > 0 and not worse else "fixed"
    return Verdict(
        ranks, kl, headroom, headroom_interval, captured, captured_interval, gain, gain_interval, exported, reason
    )


def _at(curve: Curve, index: int, rung_rank: np.ndarray, draws: np.ndarray | None = None) -> float:
    if curve.name == "fixed":  # as measured, never interpolated
        return rank_and_kl(curve.points[index].scores, rung_rank, draws)[1]
    return curve.at(float(rung_rank[index]), rung_rank, draws)


def _gain_and_headroom(
    curves: dict[str, Curve], indices: Sequence[int], rung_rank: np.ndarray, draws: np.ndarray | None
) -> tuple[float, float]:
    fixed, learned, oracle = (
        np.array([_at(curves[name], index, rung_rank, draws) for index in indices])
        for name in ("fixed", "learned", "oracle")
    )
    return float(np.nanmean(fixed - learned)), float(np.nanmean(fixed - np.fmin(oracle, fixed)))


def _resamples(curves: dict[str, Curve], count: int, seed: int) -> Iterator[np.ndarray]:
    documents = len(curves["fixed"].points[0].scores.tokens)
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield np.bincount(generator.integers(documents, size=documents), minlength=documents).astype(float)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def areas(curves: dict[str, Curve], rung_rank: np.ndarray) -> dict[str, float]:
    """Area under KL over mean rank, on the range of ranks that all curves cover (scikit-learn's trapezoids)."""
    ranks = {
        name: [p.scores.mean(rung_rank) for p in curve.points] + [float(rung_rank[-1])]
        for name, curve in curves.items()
    }
    low = max(min(values) for values in ranks.values())
    grid = np.linspace(low, float(rung_rank[-1]), 101)
    return {name: float(auc(grid, [curve.at(r, rung_rank) for r in grid])) for name, curve in curves.items()}


def table(curves: dict[str, Curve], rung_rank: np.ndarray, rung_ms: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """The curves as plain numbers: per point its knob, mean rank, KL, prompt's mean rank, perplexity, latency.

    `latency_ms` is the measured decode time of every rung, averaged over the rungs that were active.
    """
    knob_name = {"fixed": "rung", "learned": "log_lambda", "percentile": "centre", "random": "centre"}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, curve in curves.items():
        rows[name] = []
        for point in curve.points:
            scores = point.scores
            row: dict[str, Any] = {} if point.knob is None else {knob_name[name]: point.knob}
            row |= {
                "mean_rank": scores.mean(rung_rank),
                "kl": scores.value("kl"),
                "latency_ms": scores.mean(rung_ms),
                "prompt_mean_rank": scores.prompt_mean(rung_rank),
                "perplexity": scores.value("perplexity"),
            }
            rows[name].append(row)
    return rows

"""Measure the learned policy and every baseline, by rules that favour none of them.

Every policy's knob is set on validation documents and measured once on test documents, aimed at the mean rank of every
fixed rung. Every run starts at that rung and keeps its prompt at or below it, so no prompt costs more than the
baseline's. Pages stay in full precision: the comparison judges rank alone. Nobody is held to a budget, for means are to
be equal; what the token bucket of serving makes of the learned policy is a curve of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike

from policy.contract import RankPolicy
from policy.curve import KnobCurve
from policy.fixed import FixedPolicy
from policy.operating import Operating
from policy.settings import Settings

from ..learn.calibrate import calibrate_knob, knob_grid
from .scorer import Scores

KNOB_POINTS = 5


class Bench(Protocol):
    """Measures policies on a fixed set of documents."""

    def measure(
        self, policy: RankPolicy, settings: Settings, operating: Operating, name: str | None = None
    ) -> list[Scores]:
        """Scores of a policy at every row of `operating`; `name` shows a progress bar."""


class OracleBench(Protocol):
    """Measures the oracle on a fixed set of documents."""

    def measure(self, settings: Settings, mean_ranks: Sequence[float], start_rungs: Sequence[int]) -> list[Scores]:
        """Scores of the oracle at about each of `mean_ranks`."""


@dataclass(frozen=True)
class Point:
    """One measured operating point."""

    knob: float | None
    scores: Scores


@dataclass(frozen=True)
class Curve:
    """A policy's measured points, cheapest first, and the calibration of its knob (None without a knob)."""

    name: str
    points: tuple[Point, ...]
    knob_curve: KnobCurve | None = None
    config: dict[str, Any] = field(default_factory=dict)
    """How the policy was set up."""

    def at(
        self,
        ranks: ArrayLike,
        rung_rank: np.ndarray,
        documents: np.ndarray | None = None,
        floor: float | None = None,
    ) -> np.ndarray:
        """KL at mean ranks [K]: linear between measured points and the exact top rung; nan below the cheapest point.

        `documents` [D] counts how often each document is drawn (default: each once). With `floor`, the KL of the
        cheapest rung, the line goes on to that rung below the cheapest point.
        """
        pairs = [rank_and_kl(point.scores, rung_rank, documents) for point in self.points]
        measured, kls = zip(*sorted([*pairs, (float(rung_rank[-1]), 0.0)]), strict=True)
        if floor is not None and measured[0] > rung_rank[0]:
            measured, kls = (float(rung_rank[0]), *measured), (floor, *kls)
        # A mean of equal ranks may differ from them in its last bits.
        wanted = np.where(np.isclose(ranks, measured[0], rtol=1e-9, atol=0), measured[0], ranks)
        return np.interp(wanted, measured, kls, left=np.nan)


def rank_and_kl(scores: Scores, rung_rank: np.ndarray, documents: np.ndarray | None) -> tuple[float, float]:
    """Mean rank and KL per scored token, each document counted `documents` [D] times (default: once)."""
    draws = np.ones_like(scores.tokens) if documents is None else documents
    tokens = draws @ scores.tokens
    return float(draws @ (scores.rungs @ rung_rank) / tokens), float(draws @ scores.sums["kl"] / tokens)


def fixed_curve(policy: FixedPolicy, settings: Settings, test: Bench, name: str = "fixed") -> Curve:
    """Every rung but the top, which is exact."""
    aims = torch.arange(len(policy.rungs) - 1)
    found = test.measure(policy, settings, Operating.at(aims.float(), aims), f"{name} on test")
    return Curve(name, _points(aims.float().tolist(), found))


def policy_curve(
    name: str,
    policy: RankPolicy,
    settings: Settings,
    validation: Bench,
    test: Bench,
    cost: np.ndarray,
    targets: Sequence[int],
) -> Curve:
    """Calibrate the knob on validation, then measure on test at the cost of every rung index in `targets`."""
    costs: dict[float, float] = {}

    def sweep(knobs: Sequence[float], starts: Sequence[int]) -> KnobCurve:
        operating = Operating.at(torch.tensor(knobs), torch.tensor(starts))
        found = validation.measure(policy, settings, operating, f"{name} on validation")
        costs.update({knob: scores.mean(cost) for knob, scores in zip(knobs, found, strict=True)})
        cheap, dear = policy.knob_range()
        ordered = sorted(costs, reverse=cheap > dear)
        return calibrate_knob(ordered, [costs[knob] for knob in ordered])

    # First evenly over the knob, each run starting where one of its cost would; then where the aims fall.
    knobs = knob_grid(policy, KNOB_POINTS)
    curve = sweep(knobs, np.linspace(0, len(policy.rungs) - 1, KNOB_POINTS).round().astype(int).tolist())
    curve = sweep([curve.knob(float(cost[rung])) for rung in targets], list(targets))
    knobs = [curve.knob(float(cost[rung])) for rung in targets]
    operating = Operating.at(torch.tensor(knobs), torch.tensor(targets))
    return Curve(
        name, _points(knobs, test.measure(policy, settings, operating, f"{name} on test")), curve, policy.config()
    )


def capped_curve(
    curve: Curve, policy: RankPolicy, settings: Settings, test: Bench, cost: np.ndarray, targets: Sequence[int]
) -> Curve:
    """What serving makes of a policy's curve: the same knobs and starts, held to the cost of every rung in `targets`.

    The comparison itself lets every policy spend as it likes, so that equal means are equal; a served row has to keep
    its budget on every text.
    """
    knobs = [point.knob for point in curve.points if point.knob is not None]
    budgets = torch.tensor([cost[rung] for rung in targets], dtype=torch.float64)
    operating = Operating.at(torch.tensor(knobs), torch.tensor(targets), budget=budgets)
    found = test.measure(policy, settings, operating, f"{curve.name}, capped, on test")
    return Curve("capped", _points(knobs, found), config=curve.config)


def oracle_curve(settings: Settings, oracle: OracleBench, rung_rank: np.ndarray, targets: Sequence[int]) -> Curve:
    """The oracle at the mean rank of every rung index in `targets`."""
    found = oracle.measure(settings, [float(rung_rank[rung]) for rung in targets], targets)
    return Curve("oracle", _points([None] * len(found), found))


def _points(knobs: Sequence[float | None], found: Sequence[Scores]) -> tuple[Point, ...]:
    return tuple(Point(knob, scores) for knob, scores in zip(knobs, found, strict=True))

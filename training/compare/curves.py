"""Measure the learned policy and every baseline, by rules that favour none of them.

Every policy's knob is set on validation documents, again and again until what it spends there is within 1 % of a fixed
rung's bytes, and measured once on test documents; nothing is interpolated between knobs. Every run starts at that rung
and holds its prompt at it, so no prompt costs more or less than the baseline's. Pages stay in full precision unless
said: the comparison judges rank alone. Nobody is held to a budget, for means are to be equal; what the token bucket of
serving makes of the learned policy, and what the pages of serving do, are curves of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from policy.contract import RankPolicy
from policy.curve import KnobCurve
from policy.fixed import FixedPolicy
from policy.operating import UNLIMITED, Operating
from policy.settings import FULL_KV, KVSettings, Settings

from ..learn.calibrate import calibrate_knob, knob_grid
from .scorer import Scores

KNOB_POINTS = 5
LEAST_COST = 1e-9
CLOSE = 0.01
"""A knob is set where what it spends on validation documents is within this share of what it is aimed at."""
ROUNDS = 9
"""How often a knob is set anew, at most; a rung that is not met then is none that this policy reaches."""


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
    rung: int
    """Index of the rung whose bytes it was aimed at."""


@dataclass(frozen=True)
class Curve:
    """A policy's measured points, cheapest first, and the calibration of its knob (None without a knob)."""

    name: str
    points: tuple[Point, ...]
    """One for every rung that it was aimed at and reaches."""
    knob_curve: KnobCurve | None = None
    config: dict[str, Any] = field(default_factory=dict)
    """How the policy was set up."""
    others: tuple[Curve, ...] = ()
    """The same of policies that were trained as it was, from other seeds."""

    @property
    def members(self) -> tuple[Curve, ...]:
        """It and the others."""
        return (self, *self.others)


def rank_and_kl(scores: Scores, rung_rank: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[R] mean rank and KL per scored token, each document counted as often as `draws` [R, D] say."""
    tokens = draws @ scores.tokens
    return draws @ (scores.rungs @ rung_rank) / tokens, draws @ scores.sums["kl"] / tokens


def fixed_curve(
    policy: FixedPolicy, settings: Settings, test: Bench, name: str = "fixed", *,
    targets: Sequence[int] | None = None, kv: KVSettings = FULL_KV,
) -> Curve:  # fmt: skip
    """Every rung but the top, which is exact, or those of `targets`."""
    aims = torch.arange(len(policy.rungs) - 1) if targets is None else torch.tensor(targets)
    found = test.measure(policy, settings, Operating.at(aims.float(), aims, kv), f"{name} on test")
    return Curve(name, _points(aims.float().tolist(), found, aims.tolist()))


def policy_curve(
    name: str, policy: RankPolicy, settings: Settings, validation: Bench, test: Bench, cost: np.ndarray,
    targets: Sequence[int], *, kv: KVSettings = FULL_KV,
) -> Curve:  # fmt: skip
    """Set the knob on validation, then measure on test at the cost of every rung index in `targets` that is reached."""
    knobs, curve = set_knobs(name, policy, settings, validation, cost, targets, kv)
    reached = sorted(knobs)
    found: list[Scores] = []
    if reached:
        operating = Operating.at(torch.tensor([knobs[rung] for rung in reached]), torch.tensor(reached), kv)
        found = test.measure(policy, settings, operating, f"{name} on test")
    points = _points([knobs[rung] for rung in reached], found, reached)
    return Curve(name, points, curve, policy.config())


def set_knobs(
    name: str, policy: RankPolicy, settings: Settings, validation: Bench, cost: np.ndarray, targets: Sequence[int],
    kv: KVSettings = FULL_KV,
) -> tuple[dict[int, float], KnobCurve]:  # fmt: skip
    """The knob of every rung index in `targets` whose cost is met on validation documents, and the map between them."""

    def spent(knobs: Sequence[float], starts: Sequence[int]) -> list[float]:
        operating = Operating.at(torch.tensor(knobs), torch.tensor(starts), kv)
        found = validation.measure(policy, settings, operating, f"{name} on validation")
        return [scores.mean(cost) for scores in found]

    # First evenly over the knob, each run starting where one of its cost would; then every rung by itself.
    grid = knob_grid(policy, KNOB_POINTS)
    starts = np.linspace(0, len(policy.rungs) - 1, KNOB_POINTS).round().astype(int).tolist()
    coarse = list(zip(grid, spent(grid, starts), strict=True))
    own: dict[int, list[tuple[float, float]]] = {rung: [] for rung in targets}
    found: dict[int, float] = {}
    for _ in range(ROUNDS):
        missing = [rung for rung in targets if rung not in found]
        if not missing:
            break
        knobs = [next_knob(own[rung], coarse, float(cost[rung])) for rung in missing]
        for rung, knob, got in zip(missing, knobs, spent(knobs, missing), strict=True):
            own[rung].append((knob, got))
            if abs(got - cost[rung]) <= CLOSE * cost[rung]:
                found[rung] = knob
    met = [(found[rung], own[rung][-1][1]) for rung in sorted(found)]
    points = sorted({*met, coarse[0], coarse[-1]}, key=lambda point: point[0], reverse=grid[0] > grid[-1])
    return found, calibrate_knob([knob for knob, _ in points], [got for _, got in points])


def next_knob(own: Sequence[tuple[float, float]], coarse: Sequence[tuple[float, float]], wanted: float) -> float:
    """Where a knob may spend `wanted`, from pairs of knob and what it spent: `own` in like runs, the latest last, and
    `coarse` from the cheapest knob to the dearest in others, which are taken where the like ones leave a side open.

    Linear in the logarithm of what is spent. Between two like runs an end that does not move counts half as far off
    each time (the Illinois rule). With one side open the others are moved to where the latest like run was, which
    counts twice as far off each time: so either way `wanted` is soon between two.
    """
    sign = 1.0 if coarse[-1][0] > coarse[0][0] else -1.0

    def along(point: tuple[float, float]) -> float:
        return sign * point[0]

    def over(point: tuple[float, float]) -> float:
        return float(np.log(max(point[1], LEAST_COST)) - np.log(max(wanted, LEAST_COST)))

    low = max((point for point in own if point[1] <= wanted), key=along, default=None)
    high = min((point for point in own if point[1] > wanted), key=along, default=None)
    if low is not None and high is not None:
        below = [cost <= wanted for _, cost in own]
        repeated = next((n for n, side in enumerate(reversed(below)) if side != below[-1]), len(below)) - 1
        ends = [over(low), over(high)]
        ends[below[-1]] *= 0.5**repeated
        share = min(max(ends[0] / (ends[0] - ends[1]), 0.02), 0.98)
        return low[0] + share * (high[0] - low[0])
    places, levels = [along(point) for point in coarse], np.array([over(point) for point in coarse])
    if own:
        # Other starts spend other bytes at the same knob.
        levels += over(own[-1]) * 2 ** (len(own) - 1) - np.interp(along(own[-1]), places, levels)
    levels = np.maximum.accumulate(levels)
    at = float(np.interp(0.0, levels, places)) if levels[0] < levels[-1] else (places[0] + places[-1]) / 2
    return sign * at


def capped_curve(curve: Curve, policy: RankPolicy, settings: Settings, test: Bench, cost: np.ndarray) -> Curve:
    """What serving makes of a policy's curve: the same knobs and starts, held to the cost of the rungs aimed at.

    The comparison itself lets every policy spend as it likes, so that equal means are equal; a served row has to keep
    its budget on every text.
    """
    return same_knobs("capped", curve, policy, settings, test, cost=cost)


def same_knobs(
    name: str, curve: Curve, policy: RankPolicy, settings: Settings, test: Bench, *,
    targets: Sequence[int] | None = None, kv: KVSettings = FULL_KV, cost: np.ndarray | None = None,
) -> Curve:  # fmt: skip
    """A policy's curve at the knobs and starts that it has, or those of `targets`, run in another way: on other
    documents, at another KV setting, or held to the `cost` of the rungs aimed at."""
    points = [point for point in curve.points if targets is None or point.rung in targets]
    if not points:
        return Curve(name, (), config=curve.config)
    knobs, rungs = [point.knob for point in points], [point.rung for point in points]
    budget = UNLIMITED if cost is None else torch.tensor([cost[rung] for rung in rungs], dtype=torch.float64)
    operating = Operating.at(torch.tensor(knobs), torch.tensor(rungs), kv, budget=budget)
    found = test.measure(policy, settings, operating, f"{curve.name}, {name}, on test")
    return Curve(name, _points(knobs, found, rungs), config=curve.config)


def oracle_curve(settings: Settings, oracle: OracleBench, rung_rank: np.ndarray, targets: Sequence[int]) -> Curve:
    """The oracle at the mean rank of every rung index in `targets`."""
    found = oracle.measure(settings, [float(rung_rank[rung]) for rung in targets], targets)
    return Curve("oracle", _points([None] * len(found), found, targets))


def _points(knobs: Sequence[float | None], found: Sequence[Scores], rungs: Sequence[int]) -> tuple[Point, ...]:
    return tuple(Point(*own) for own in zip(knobs, found, rungs, strict=True))

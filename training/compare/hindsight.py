"""Oracles: what choosing could gain at most, with every rung's damage on these very documents known from tables.

Of uniform runs, by which a choice looks better than it is: `table_oracle` reads them off, for choices per token and per
chunk, and `Oracle` measures the per-chunk choice of the settings in runs that really mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.operating import Operating
from policy.oracle import OraclePolicy
from policy.settings import Settings
from runtime.plan import RunPlan

from .scorer import HeldOut, Scorer, Scores

CLOSE = 0.01
"""A mean rank within this share of its aim is met."""


@dataclass(frozen=True)
class Hindsight:
    """What the oracle knows of one document's C chunks that have scored tokens."""

    starts: Tensor
    """[C] long"""
    damage: Tensor
    """[C, J] nats per token"""
    scored: Tensor
    """[C] scored tokens"""


@dataclass(frozen=True)
class Oracle:
    """Measures the policy that knows the damage of every chunk of the documents of `held_out` ahead."""

    held_out: HeldOut
    known: tuple[tuple[Hindsight, ...], ...]
    """Per task, per document; measured at the rungs' `scales`."""
    scales: Tensor
    """[J]"""
    rung_rank: Tensor
    """[J] equivalent rank of every rung."""

    def measure(self, settings: Settings, mean_ranks: Sequence[float], start_rungs: Sequence[int]) -> list[Scores]:
        """Scores aimed at mean ranks [K] over scored tokens, from start rungs [K].

        Its chunks are those of the full-rank run; the mixed run's own may open elsewhere, so the mean rank is
        corrected once by what the first run showed, where that was off by more than `CLOSE`.
        """
        ranks = self.rung_rank.double().numpy()
        found = self._measure(settings, mean_ranks, start_rungs)
        off = [k for k, aim in enumerate(mean_ranks) if abs(found[k].mean(ranks) - aim) > CLOSE * aim]
        if off:
            aims = [2 * mean_ranks[k] - found[k].mean(ranks) for k in off]
            for k, again in zip(off, self._measure(settings, aims, [start_rungs[k] for k in off]), strict=True):
                found[k] = min((found[k], again), key=lambda scores: abs(scores.mean(ranks) - mean_ranks[k]))
        return found

    def _measure(self, settings: Settings, mean_ranks: Sequence[float], start_rungs: Sequence[int]) -> list[Scores]:
        chunks = [known for task in self.known for known in task]
        damage, scored = torch.cat([c.damage for c in chunks]), torch.cat([c.scored for c in chunks])
        counts = [len(known.starts) for known in chunks]
        rungs = [oracle_rungs(damage, scored, self.rung_rank, mean_rank).split(counts) for mean_rank in mean_ranks]
        found, first = [], 0
        for scorer, task in zip(self.held_out.scorers, self.known, strict=True):
            schedule = [
                [
                    by_position(known.starts, of_point[first + d], len(scorer.examples[d]["input_ids"]))
                    for d, known in enumerate(task)
                ]
                for of_point in rungs
            ]
            first += len(task)
            found.append(self._replay(scorer, schedule, settings, start_rungs))
        return [Scores.concatenate(parts) for parts in zip(*found, strict=True)]

    def _replay(
        self, scorer: Scorer, schedule: Sequence[Sequence[Tensor]], settings: Settings, start_rungs: Sequence[int]
    ) -> list[Scores]:
        """`schedule` is by point, by document."""

        def plan(documents: list[int], points: list[int]) -> RunPlan:
            rows = [schedule[point][document] for document, point in zip(documents, points, strict=True)]
            policy = OraclePolicy(
                scorer.ladder.rungs, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), self.scales
            )
            starts = torch.tensor([start_rungs[point] for point in points])
            return RunPlan((scorer.ladder,), policy, settings, Operating.at(0.0, starts))

        return scorer.score_with(plan, len(schedule), "oracle on test")


def oracle_rungs(damage: Tensor, tokens: Tensor, rung_rank: Tensor, mean_rank: float) -> Tensor:
    """[N] rungs of least damage at a byte-weighted mean rank of at most about `mean_rank`.

    damage [N, J] nats per token, tokens [N] (those that count for the mean). The price of rank is found by bisection;
    the mean rank falls with it.
    """

    def at(price: float) -> Tensor:
        return (damage + price * rung_rank).argmin(1)

    low, high = 0.0, float(damage.max()) / float((rung_rank[1:] - rung_rank[:-1]).min()) + 1e-9
    for _ in range(50):
        middle = (low + high) / 2
        mean = float((rung_rank[at(middle)] * tokens).sum() / tokens.sum())
        low, high = (middle, high) if mean > mean_rank else (low, middle)
    return at(high)


def by_position(starts: Tensor, values: Tensor, length: int) -> Tensor:
    """Spread one value per chunk over the chunk's positions: starts [C], values [C] -> [length]. What comes before the
    first start has its value."""
    positions = torch.arange(length)
    return values[(torch.searchsorted(starts, positions, right=True) - 1).clamp(min=0)]


def table_oracle(tables: Sequence[Tensor], rung_rank: Tensor, mean_ranks: Sequence[float], tokens: int) -> list[float]:
    """KL per scored token at each of `mean_ranks` of the best choice per `tokens` tokens, by tables [T, J] of scored
    tokens: what a choice would gain if uniform runs told what a mixed one does."""
    parts = [part for table in tables for part in table.split(tokens)]
    damage = torch.stack([part.mean(0) for part in parts])
    count = torch.tensor([float(len(part)) for part in parts])
    found = []
    for mean_rank in mean_ranks:
        rung = oracle_rungs(damage, count, rung_rank, mean_rank)
        found.append(float((damage.gather(1, rung[:, None])[:, 0] * count).sum() / count.sum()))
    return found

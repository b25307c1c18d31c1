"""The oracle: what any policy could gain at most, knowing every rung's damage on these very documents."""

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


@dataclass(frozen=True)
class Hindsight:
    """What the oracle knows of one document's C chunks."""

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

    def measure(self, settings: Settings, mean_rank: float, start_rung: int) -> Scores:
        """Scores aimed at a mean rank over scored tokens.

        Its chunks are those of the full-rank run; the mixed run's own may open elsewhere, so the mean rank is
        corrected once by what the first run showed.
        """
        ranks = self.rung_rank.double().numpy()
        first = self._measure(settings, mean_rank, start_rung)
        second = self._measure(settings, 2 * mean_rank - first.mean(ranks), start_rung)
        return min((first, second), key=lambda scores: abs(scores.mean(ranks) - mean_rank))

    def _measure(self, settings: Settings, mean_rank: float, start_rung: int) -> Scores:
        chunks = [known for task in self.known for known in task]
        damage, scored = torch.cat([c.damage for c in chunks]), torch.cat([c.scored for c in chunks])
        rungs = oracle_rungs(damage, scored, self.rung_rank, mean_rank)
        per_document = iter(rungs.split([len(known.starts) for known in chunks]))
        found = []
        for scorer, task in zip(self.held_out.scorers, self.known, strict=True):
            schedule = [
                by_position(known.starts, next(per_document), len(example["input_ids"]))
                for known, example in zip(task, scorer.examples, strict=True)
            ]
            found.append(self._replay(scorer, schedule, settings, start_rung))
        return Scores.concatenate(found)

    def _replay(self, scorer: Scorer, schedule: Sequence[Tensor], settings: Settings, start_rung: int) -> Scores:
        def plan(index: Sequence[int]) -> RunPlan:
            rung = torch.nn.utils.rnn.pad_sequence([schedule[i] for i in index], batch_first=True)
            policy = OraclePolicy(scorer.ladder.rungs, rung, self.scales)
            return RunPlan((scorer.ladder,), policy, settings, Operating.at(0.0, start_rung))

        return scorer.score(plan)


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
    """Spread one value per chunk over the chunk's positions: starts [C] from 0, values [C] -> [length]."""
    positions = torch.arange(length)
    return values[torch.searchsorted(starts, positions, right=True) - 1]

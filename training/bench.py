"""Two places where a policy can be measured: the model itself, and a table of targets.

`HeldOut` (in `measure`) runs the model. `TableBench` replays decisions on chunk samples whose damage is known, which is
what synthetic targets with planted headroom need; it makes no claim about a real mixed run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from policy.contract import RankPolicy, Summary
from policy.settings import SIGNALS, STATS, Settings

from .measure import Scores
from .module import interpolate_scale
from .oracle import oracle_rungs
from .samples import Samples


class Bench(Protocol):
    """Measures policies on a fixed set of documents."""

    def measure(self, policy: RankPolicy, settings: Settings, knob: float) -> Scores:
        """Scores of a policy at a knob."""

    def measure_oracle(self, settings: Settings, mean_rank: float) -> Scores:
        """Scores of the oracle whose mean rank is about `mean_rank`."""


def summary_of(features: Tensor) -> Summary:
    """The summary whose `features()` these are: [N, 18]."""
    split = len(SIGNALS) * len(STATS)
    stats = features[:, :split].view(-1, len(SIGNALS), len(STATS))
    valid, first = features[:, split : split + len(SIGNALS)].bool(), features[:, -2:]
    return Summary(stats, valid, first, torch.arange(len(features)))


@dataclass(frozen=True)
class TableBench:
    """Chunk samples grouped into documents: `document` [N] long from 0."""

    samples: Samples
    document: Tensor
    grid: tuple[float, ...]
    rung_rank: Tensor

    def measure(self, policy: RankPolicy, settings: Settings, knob: float) -> Scores:
        """Scores from the table; `settings` do not matter, the chunks are given."""
        knobs = torch.full((len(self.samples),), knob)
        decision = policy.decide(summary_of(self.samples.features), knobs)
        return self._scores(decision.rung, decision.scale)

    def measure_oracle(self, settings: Settings, mean_rank: float) -> Scores:
        """The rungs of least `damage + lambda * rank`, lambda set by bisection for the mean rank wanted."""
        rung = oracle_rungs(self.samples.damage.amin(2), self.samples.tokens, self.rung_rank, mean_rank)
        best = self.samples.damage[torch.arange(len(rung)), rung].argmin(1)
        return self._scores(rung, torch.tensor(self.grid)[best])

    def _scores(self, rung: Tensor, scale: Tensor) -> Scores:
        samples, grid = self.samples, torch.tensor(self.grid)
        picked = samples.damage.gather(1, rung[:, None, None].expand(-1, 1, len(grid)))
        damage = interpolate_scale(picked, scale[:, None], grid)[:, 0] * samples.tokens
        documents = int(self.document.max()) + 1
        counts = torch.nn.functional.one_hot(rung, len(self.rung_rank)) * samples.tokens[:, None]

        def per_document(values: Tensor) -> np.ndarray:
            out = torch.zeros(documents, *values.shape[1:], dtype=torch.float64)
            return out.index_add_(0, self.document, values.double()).numpy()

        nothing = np.zeros(documents)
        return Scores(
            per_document(damage), per_document(samples.tokens), per_document(counts), nothing, nothing, nothing
        )

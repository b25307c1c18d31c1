"""A place to measure policies that is a table of targets: decisions replayed on chunk samples whose damage is known.

It is what synthetic targets with planted headroom need; it makes no claim about a real mixed run, so no product has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policy.contract import RankPolicy, Summary
from policy.operating import Operating
from policy.settings import Settings
from training.compare.hindsight import oracle_rungs
from training.compare.scorer import Scores
from training.learn.module import interpolate_scale
from training.targets.samples import Samples


@dataclass(frozen=True)
class TableBench:
    """Chunk samples grouped into documents: `document` [N] long from 0."""

    samples: Samples
    document: Tensor
    grid: tuple[float, ...]
    rung_rank: Tensor

    def measure(
        self, policy: RankPolicy, settings: Settings, operating: Operating, name: str | None = None
    ) -> list[Scores]:
        """Scores from the table; settings and start rung do not matter, the chunks are given."""
        summary = Summary.from_features(self.samples.features)
        decisions = [policy.decide(summary, knob.expand(len(self.samples))) for knob in operating.knob]
        return [self.scores(decision.rung, decision.scale) for decision in decisions]

    def scores(self, rung: Tensor, scale: Tensor) -> Scores:
        samples, grid = self.samples, torch.tensor(self.grid)
        picked = samples.damage.gather(1, rung[:, None, None].expand(-1, 1, len(grid)))
        damage = interpolate_scale(picked, scale[:, None], grid)[:, 0] * samples.tokens
        documents = int(self.document.max()) + 1
        counts = torch.nn.functional.one_hot(rung, len(self.rung_rank)) * samples.tokens[:, None]

        def per_document(values: Tensor) -> np.ndarray:
            out = torch.zeros(documents, *values.shape[1:], dtype=torch.float64)
            return out.index_add_(0, self.document, values.double()).numpy()

        sums = {"kl": per_document(damage), "perplexity": np.zeros(documents)}
        none = np.zeros((documents, len(self.rung_rank)))
        return Scores(sums, per_document(samples.tokens), per_document(counts), none)


@dataclass(frozen=True)
class TableOracle:
    """The oracle of a table: the rungs of least `damage + lambda * rank`, lambda set for the mean rank wanted."""

    bench: TableBench

    def measure(self, settings: Settings, mean_ranks: Sequence[float], start_rungs: Sequence[int]) -> list[Scores]:
        return [self._at(mean_rank) for mean_rank in mean_ranks]

    def _at(self, mean_rank: float) -> Scores:
        samples = self.bench.samples
        rung = oracle_rungs(samples.damage.amin(2), samples.tokens, self.bench.rung_rank, mean_rank)
        best = samples.damage[torch.arange(len(rung)), rung].argmin(1)
        return self.bench.scores(rung, torch.tensor(self.bench.grid)[best])

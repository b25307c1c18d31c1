"""Chunks as training samples: what the policy saw, and what every rung would have cost there.

The damage of a chunk is the KL of its own scored tokens plus an estimate of what it does to later ones: the measured
ratio of later to immediate damage, times the KL of all its tokens. Prompt chunks score no token themselves; for them
the second part is all there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.reference.adaptive import AdaptiveRun

from ..amounts import Amounts
from ..documents import Example
from ..progress import with_progress
from .damage import Trajectory, later_damage


@dataclass(frozen=True)
class LaterDamage:
    """Later KL per nat of immediate KL, from a random sample of chunks (all rungs below the top together)."""

    ratio: float
    chunks: int
    tokens: int
    """Later tokens followed, over all sampled chunks."""

    @staticmethod
    def mean(parts: Sequence[LaterDamage]) -> LaterDamage:
        """Of several tasks, each with the same weight."""
        ratio = sum(part.ratio for part in parts) / len(parts)
        return LaterDamage(ratio, sum(part.chunks for part in parts), sum(part.tokens for part in parts))


@dataclass(frozen=True)
class Samples:
    """N chunks."""

    features: Tensor
    """[N, 18]"""
    damage: Tensor
    """[N, J, G] nats per token of the chunk"""
    tokens: Tensor
    """[N] float32 tokens of the chunk"""
    scored: Tensor
    """[N] float32 how many of them are scored"""

    def __len__(self) -> int:
        return self.features.shape[0]

    @staticmethod
    def concatenate(parts: Sequence[Samples]) -> Samples:
        return Samples(
            *(torch.cat([getattr(p, name) for p in parts]) for name in ("features", "damage", "tokens", "scored"))
        )


def measure_later_damage(
    run: AdaptiveRun,
    examples: Sequence[Example],
    paths: Sequence[Trajectory],
    amounts: Amounts,
    seed: int,
) -> LaterDamage:
    """Sample chunks of the given trajectories without replacement and measure what they do to later tokens."""
    generator = torch.Generator().manual_seed(seed)
    every = [(doc, i) for doc, path in enumerate(paths) for i in range(len(path.starts) - 1)]
    if not every:
        return LaterDamage(0.0, 0, 0)
    chosen = torch.randperm(len(every), generator=generator)[: amounts.later_chunks].tolist()
    immediate_sum = later_sum = 0.0
    tokens = 0
    for number in with_progress(chosen, "later damage", len(chosen)):
        doc, i = every[number]
        start, end = (int(p) for p in paths[doc].starts[i : i + 2])
        immediate, later = later_damage(run, examples[doc], start, end, amounts.later_tokens)
        immediate_sum += float(immediate[:-1].sum())
        later_sum += float(later[:-1].sum())
        tokens += min(amounts.later_tokens, len(examples[doc]["input_ids"]) - end)
    ratio = later_sum / immediate_sum if immediate_sum > 0 else 0.0
    return LaterDamage(ratio, len(chosen), tokens)


def chunk_samples(example: Example, path: Trajectory, table: Tensor, later: LaterDamage) -> Samples:
    """One document's chunks; table [T, J, G] is its `damage_table`."""
    length = len(example["input_ids"])
    positions = torch.arange(length)
    scored = (positions + 1 >= example["prompt_tokens"]) & (positions + 1 < length)
    # The last token predicts nothing that is there to be scored.
    cost = table * (scored[:, None, None] + later.ratio * (positions + 1 < length)[:, None, None])
    ends = torch.cat([path.starts[1:], torch.tensor([length])])
    tokens = (ends - path.starts).float()
    summed = torch.zeros(length + 1, *table.shape[1:], dtype=torch.float64)
    summed[1:] = cost.double().cumsum(0)
    damage = (summed[ends] - summed[path.starts]).float() / tokens[:, None, None]
    count = torch.cat([torch.zeros(1), scored.float().cumsum(0)])
    return Samples(path.features, damage, tokens, count[ends] - count[path.starts])


def document_samples(
    examples: Sequence[Example], paths: Sequence[Trajectory], tables: Sequence[Tensor], later: LaterDamage
) -> list[Samples]:
    """The chunks of every document, each with its own trajectory and table."""
    rows = zip(examples, paths, tables, strict=True)
    return [chunk_samples(example, path, table, later) for example, path, table in rows]

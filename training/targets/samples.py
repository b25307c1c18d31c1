"""Chunks as training samples: what the policy saw, and what every rung would have cost there.

The damage of a chunk is the KL of its own scored tokens, where it was measured, and what its rung does to later tokens
through the cache: a number per rung, the mean over a random sample of chunks, for it is too dear to measure at each.
Chunks without a scored token, those of a prompt, are left out: a prompt runs at the start rung.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from runtime.reference.adaptive import AdaptiveRun

from ..amounts import Amounts
from ..documents import Example, scored_tokens
from ..progress import with_progress
from .damage import Trajectory, later_damage


@dataclass(frozen=True)
class LaterDamage:
    """What one token at a rung costs later ones, the rest at full rank: from a random sample of chunks."""

    nats: tuple[float, ...]
    """[J] KL of the tokens behind a chunk, per token of the chunk."""
    chunks: int
    tokens: int
    """Later tokens followed, over all sampled chunks."""

    @staticmethod
    def mean(parts: Sequence[LaterDamage]) -> LaterDamage:
        """Of several tasks, each with the same weight."""
        nats = tuple(sum(values) / len(parts) for values in zip(*(part.nats for part in parts), strict=True))
        return LaterDamage(nats, sum(part.chunks for part in parts), sum(part.tokens for part in parts))


@dataclass(frozen=True)
class Samples:
    """N chunks."""

    features: Tensor
    """[N, F]"""
    damage: Tensor
    """[N, J, G] nats per token of the chunk, nan where it was not measured"""
    tokens: Tensor
    """[N] float32 tokens of the chunk"""
    scored: Tensor
    """[N] float32 how many of them are scored"""
    log_lambda: Tensor
    """[N] the knob that the chunk's run was at, nan where that was no learned policy's"""

    def __len__(self) -> int:
        return self.features.shape[0]

    @staticmethod
    def concatenate(parts: Sequence[Samples]) -> Samples:
        return Samples(*(torch.cat([getattr(p, own.name) for p in parts]) for own in fields(Samples)))


def measure_later_damage(
    run: AdaptiveRun,
    examples: Sequence[Example],
    paths: Sequence[Trajectory],
    amounts: Amounts,
    seed: int,
) -> LaterDamage:
    """Sample chunks of responses without replacement and measure what each of their rungs does to later tokens."""
    generator = torch.Generator().manual_seed(seed)
    every = [
        (doc, i)
        for doc, path in enumerate(paths)
        for i, start in enumerate(path.starts[:-1].tolist())
        if start + 1 >= examples[doc]["prompt_tokens"]
    ]
    rungs = len(run.plan.ladder.rungs)
    chosen = torch.randperm(len(every), generator=generator)[: amounts.later_chunks].tolist()
    later_sum, own_tokens, tokens = torch.zeros(rungs, dtype=torch.float64), 0, 0
    for number in with_progress(chosen, "later damage", len(chosen)):
        doc, i = every[number]
        start, end = (int(p) for p in paths[doc].starts[i : i + 2])
        _, later = later_damage(run, examples[doc], start, end, amounts.later_tokens)
        later_sum += later.double()
        own_tokens += end - start
        tokens += min(amounts.later_tokens, len(examples[doc]["input_ids"]) - end)
    return LaterDamage(tuple((later_sum / max(1, own_tokens)).tolist()), len(chosen), tokens)


def chunk_samples(example: Example, path: Trajectory, table: Tensor, later: LaterDamage) -> Samples:
    """One document's chunks that have scored tokens; table [T, J, G] is its `damage_table`, or what was measured of it,
    nan elsewhere."""
    length = len(example["input_ids"])
    scored = scored_tokens(example)
    ends = torch.cat([path.starts[1:], torch.tensor([length])])
    tokens, count = (ends - path.starts).float(), _between(scored.double(), path.starts, ends)
    known = (table.isfinite() & scored[:, None, None]).double()
    measured = _between(known, path.starts, ends)
    total = _between(torch.where(known > 0, table, 0.0).double(), path.starts, ends)
    # Of a chunk's scored tokens those that were measured stand for all of them.
    own = total / measured * (count / tokens)[:, None, None]
    damage = (own + torch.tensor(later.nats, dtype=torch.float64)[:, None]).float()
    kept = count > 0
    knob = torch.full((int(kept.sum()),), path.log_lambda)
    return Samples(path.features[kept], damage[kept], tokens[kept], count[kept].float(), knob)


def scored_chunks(example: Example, path: Trajectory) -> Tensor:
    """[C] bool: the chunks of a trajectory that have scored tokens, those that are samples."""
    ends = torch.cat([path.starts[1:], torch.tensor([len(example["input_ids"])])])
    return _between(scored_tokens(example).double(), path.starts, ends) > 0


def _between(values: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Sums of values [T, ...] from each start to each end [C] -> [C, ...]."""
    summed = torch.zeros(len(values) + 1, *values.shape[1:], dtype=torch.float64)
    summed[1:] = values.cumsum(0)
    return summed[ends] - summed[starts]


def document_samples(
    examples: Sequence[Example], paths: Sequence[Trajectory], tables: Sequence[Tensor], later: LaterDamage
) -> list[Samples]:
    """The chunks of every document, each with its own trajectory and with what was measured in that, else its table."""
    rows = zip(examples, paths, tables, strict=True)
    return [
        chunk_samples(example, path, table if path.damage is None else path.damage, later)
        for example, path, table in rows
    ]

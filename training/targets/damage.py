"""What a rung costs in quality: KL of every rung and scale against the full rank, token by token.

Two measurements per document, each one pass over real text on the real model:

    damage_table   every rung and scale as a row of one batch, uniform over the document      [T, J, G]
    trajectory     the run under some policy: where chunks opened and what the policy saw     [C], [C, 18]

plus, on a random sample of chunks, `later_damage`: one chunk at a rung, everything else at full rank, and the KL of the
tokens behind it, which is damage that reaches them through the KV cache alone.

Shape legend: T tokens of a document, C its chunks, J rungs, G scales, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.contract import Summary
from policy.operating import Operating
from runtime.reference.adaptive import AdaptiveRun

from ..documents import Batch, Example, positions_within

LOGITS_BYTES = 2**29
"""Float32 logits of one slice of a damage table's rungs and scales take no more, unless one row alone does."""


@dataclass(frozen=True)
class Exact:
    """The exact adapter's next-token distribution, which every other is held against; exponentiated once."""

    log_p: Tensor
    """[..., V] float32"""
    p: Tensor
    """[..., V] float32"""

    @classmethod
    def of(cls, logits: Tensor) -> Exact:
        """From logits [..., V] of any float dtype."""
        log_p = logits.float().log_softmax(-1)
        return cls(log_p, log_p.exp())

    @property
    def nbytes(self) -> int:
        return self.log_p.nbytes + self.p.nbytes


def token_kl(exact: Exact, log_q: Tensor) -> Tensor:
    """KL(exact || this) in nats, log-probabilities [..., V] float32 -> [...], never below 0.

    Term by term, p (log p - log q): a difference of two large sums would lose what small divergences consist of.
    """
    return torch.linalg.vecdot(exact.p, torch.sub(exact.log_p, log_q)).clamp_(min=0.0)


def rows_kl(exact: Exact, logits: Tensor) -> Tensor:
    """KL of every row against one exact distribution per token: logits [B, T, V] -> [B, T].

    Row by row: on a CPU, memory that is fresh each time costs more than the arithmetic in it.
    """
    found = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    for row, kl in zip(logits, found, strict=True):
        kl.copy_(token_kl(exact, row.float().log_softmax(-1)))
    return found


@torch.no_grad()
def damage_table(run: AdaptiveRun, examples: Sequence[Example], scales: Tensor) -> list[Tensor]:
    """[T, J, G] float32 KL at every token of each document, from runs uniform at every rung and scale [J, G].

    Rungs and scales are rows of one batch, or of as many as `LOGITS_BYTES` asks for.
    """
    rungs, grid = scales.shape
    # The top rung is exact: its KL is 0 at scale 1, so it runs once, as the reference in row 0.
    weights = torch.zeros(1 + (rungs - 1) * grid, rungs)
    weights[0, -1] = 1.0
    weights[1:, :-1] = (torch.eye(rungs - 1)[:, None] * scales[:-1, :, None]).flatten(0, 1)
    weights = weights.to(run.model.device)
    tables = []
    for example in examples:
        tokens = torch.tensor(example["input_ids"], device=run.model.device)
        length = len(tokens)
        rows = max(1, positions_within(run.model, LOGITS_BYTES) // length)
        exact: Exact | None = None
        kls: list[Tensor] = []
        for part in weights.split(rows):
            ids = tokens.expand(len(part), -1)
            logits = run.gated(ids, torch.ones_like(ids, dtype=torch.bool), part[:, None])
            if exact is None:
                exact, logits = Exact.of(logits[0]), logits[1:]
            kls.append(rows_kl(exact, logits))
        table = torch.zeros(length, rungs, grid)
        table[:, :-1] = torch.cat(kls).cpu().view(rungs - 1, grid, length).permute(2, 0, 1)
        tables.append(table)
    return tables


@dataclass(frozen=True)
class Trajectory:
    """Where one document's chunks opened and what their decisions saw."""

    starts: Tensor
    """[C] long"""
    features: Tensor
    """[C, 18] float32, `Summary.features()`"""
    complexity: Tensor
    """[T] float32"""


@torch.no_grad()
def trajectories(run: AdaptiveRun, batch: Batch, operating: Operating) -> list[Trajectory]:
    """Run a batch under the run's own policy at what its rows may spend and read off what it decided on.

    The run must keep its record.
    """
    batch = batch.to(run.model.device)
    cache = run.new_cache(batch.tokens.shape[0], prompt_tokens=batch.prompt_tokens, operating=operating)
    run.logits(batch.tokens, batch.real, cache, keep=1)
    record = {name: value.cpu() for name, value in cache.stream.columns().items()}
    found = []
    for row in range(batch.tokens.shape[0]):
        opened = (record["opens"][row] & record["real"][row]).nonzero()[:, 0]
        seen = (record[name][row, opened] for name in ("held", "held_valid", "first", "positions"))
        length = int(batch.real[row].sum())
        features = Summary(*seen).features()
        found.append(Trajectory(record["positions"][row, opened], features, record["complexity"][row, :length]))
    return found


@torch.no_grad()
def later_damage(run: AdaptiveRun, example: Example, start: int, end: int, horizon: int) -> tuple[Tensor, Tensor]:
    """(immediate, later) KL sums [J] of one chunk [start, end) at every rung, all other tokens at full rank.

    Immediate is over the chunk's own tokens, later over the `horizon` tokens behind it. Every rung is a row of one
    pass; the prefix is the same in all of them.
    """
    rungs = len(run.plan.ladder.rungs)
    stop = min(len(example["input_ids"]), end + horizon)
    tokens = torch.tensor(example["input_ids"][:stop], device=run.model.device).expand(rungs, -1)
    weights = torch.zeros(rungs, stop, rungs, device=run.model.device)
    weights[:, :, -1] = 1.0
    weights[:, start:end] = torch.eye(rungs, device=run.model.device)[:, None]
    logits = run.gated(tokens, torch.ones_like(tokens, dtype=torch.bool), weights)
    kl = rows_kl(Exact.of(logits[-1]), logits).cpu()
    return kl[:, start:end].sum(1), kl[:, end:].sum(1)

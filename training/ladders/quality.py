"""What a compressed adapter loses: KL to the exact one and perplexity on held-out documents, nats per completion token.

Every candidate, ours or another's, is the low-rank update that it decodes to, run through the same model over the same
documents, so that nothing but the update differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..documents import Batch, Example, batches, positions_within
from ..progress import progress_bar
from ..targets.damage import Exact, token_kl
from .updates import Pair, low_rank, updated

TOKENS_PER_STEP = 2048
LOGITS_BYTES = 2**28


@dataclass(frozen=True)
class Candidate:
    """An adapter in fewer bytes."""

    name: str
    pairs: Callable[[], Mapping[str, Pair]]
    """Decodes it: a [n, d_in], b [n, d_out] by module."""
    bytes: float = math.nan


@dataclass(frozen=True)
class Quality:
    """What a candidate loses."""

    name: str
    bytes: float
    kl: float
    """Nats per completion token."""
    kl_se: float | None
    """Its standard error over documents; None with a single one."""
    perplexity: float
    """Of completion tokens."""


@torch.no_grad()
def measure(
    model: PreTrainedModel, exact: Mapping[str, Pair], candidates: Sequence[Candidate], documents: Sequence[Example], *,
    name: str = "quality",
) -> list[Quality]:  # fmt: skip
    """Measure every candidate against the exact adapter on `documents`.

    The exact distributions of some batches are kept while all candidates pass, so each is decoded once per such group.
    """
    positions = min(TOKENS_PER_STEP, positions_within(model, LOGITS_BYTES))
    work = list(batches(documents, len(documents), positions))
    kls = torch.zeros(len(candidates), len(documents), dtype=torch.float64)
    nlls = torch.zeros_like(kls)
    tokens = torch.zeros(len(documents), dtype=torch.float64)
    model.eval()
    with progress_bar(name, len(candidates) * len(work)) as advance:
        for index, batch in work:
            tokens[index] = batch.scored.sum(1).double()
        for group in _groups(work):
            with updated(model, low_rank(exact, model)):
                references = [Exact.of(_logits(model, batch)) for _, batch in group]
            for number, candidate in enumerate(candidates):
                with updated(model, low_rank(candidate.pairs(), model)):
                    for (index, batch), reference in zip(group, references, strict=True):
                        log_q = _logits(model, batch).float().log_softmax(-1)
                        found = token_kl(reference, log_q), -log_q.gather(1, _next(batch).to(log_q.device))[:, 0]
                        for sums, values in zip((kls, nlls), found, strict=True):
                            sums[number, index] = _by_document(values, batch)
                        advance(1)
    return [
        Quality(own.name, own.bytes, *_mean(kl, tokens), math.exp(min(float(nll.sum() / tokens.sum()), 700.0)))
        for own, kl, nll in zip(candidates, kls, nlls, strict=True)
    ]


def _groups(work: Sequence[tuple[list[int], Batch]]) -> list[list[tuple[list[int], Batch]]]:
    """Batches that are kept together: as many as have about four steps' scored tokens."""
    groups: list[list[tuple[list[int], Batch]]] = [[]]
    held = 0
    for own in work:
        scored = int(own[1].scored.sum())
        if groups[-1] and held + scored > 4 * TOKENS_PER_STEP:
            groups.append([])
            held = 0
        groups[-1].append(own)
        held += scored
    return groups


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[N, V] where a completion token is predicted, document after document."""
    tokens, real = batch.tokens.to(model.device), batch.real.to(model.device).long()
    logits: Tensor = model(input_ids=tokens, attention_mask=real, use_cache=False).logits
    return logits[batch.scored.to(logits.device)]


def _next(batch: Batch) -> Tensor:
    """[N, 1] the completion tokens."""
    return batch.tokens.roll(-1, 1)[batch.scored][:, None]


def _by_document(values: Tensor, batch: Batch) -> Tensor:
    """[B] float64 sums of values [N] over each document's scored positions."""
    rows = batch.scored.nonzero()[:, 0]
    return torch.zeros(len(batch.tokens), dtype=torch.float64).index_add_(0, rows, values.double().cpu())


def _mean(kl: Tensor, tokens: Tensor) -> tuple[float, float | None]:
    """Mean of a token, and its standard error as a ratio of sums over documents: kl, tokens [documents]."""
    count, total = len(tokens), float(tokens.sum())
    mean = float(kl.sum()) / total
    if count < 2:
        return mean, None
    residual = kl - mean * tokens
    return mean, float(torch.sqrt(count / (count - 1) * residual.square().sum())) / total

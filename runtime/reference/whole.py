"""Whole texts in few passes, with the decisions that step-by-step decode takes.

A decision depends on what the model put out before it, and that on the decisions before. So a text goes through the
model as a whole, again and again, each time at the rungs that follow from the pass before: the first k tokens are right
after k passes, and since most decisions do not hang on one rung more or less, all of them are after a few. What is
settled is what stepping gives (a test holds it), at the price of a few forwards instead of one for every token. Needs
pages in full precision: what becomes of a page changes what later tokens see, and a whole text has no later.

Shape legend: B rows, T tokens, V vocabulary, J rungs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from policy.difficulty import Difficulty
from policy.operating import Operating

from ..control.signals import log_probabilities, next_token_entropy, surprisal
from ..control.stream import Stream
from .run import AdaptiveRun

ROWS_AT_A_TIME = 8
"""Rows whose distributions are in memory at the same time."""


@dataclass(frozen=True)
class Settled:
    """Texts whose decisions no longer change."""

    logits: Tensor
    """[B, T, V]"""
    weights: Tensor
    """[B, T, J] over rungs"""
    outputs: Tensor
    """[B, T, 3] entropy and attention of every token, surprisal of the one behind it: where another run may start."""
    stream: Stream
    """That decided so."""
    passes: int
    """Forwards it took, the longest row's."""


@torch.no_grad()
def settled(
    run: AdaptiveRun, tokens: Tensor, real: Tensor, prompt_tokens: Tensor, operating: Operating | None = None,
    outputs: Tensor | None = None, difficulty: Difficulty | None = None,
) -> Settled:  # fmt: skip
    """Run texts [B, T], padding trailing, as the run's policy would decode them token by token.

    `outputs` [B, T, 3] are those of a similar run, to start from; `difficulty` as in `new_cache`. The run has one
    ladder and pages in full precision.
    """
    operating = (run.plan.operating if operating is None else operating).for_rows(len(tokens))
    found = _Found(outputs, run.embeddings(tokens) if run.hidden else None)
    open_rows, passes = torch.arange(len(tokens), device=tokens.device), 0
    while len(open_rows):
        assert passes <= tokens.shape[1] + 1, "after T passes every decision rests on what is right"
        own_tokens, own_real = tokens[open_rows], real[open_rows]
        stream = run.new_stream(
            len(open_rows), prompt_tokens=prompt_tokens[open_rows], operating=operating.select(open_rows),
            difficulty=None if difficulty is None else difficulty.select(open_rows), numbers=open_rows,
        )  # fmt: skip
        weights = found.replayed(stream, own_tokens, own_real, open_rows)
        moved = found.moved(open_rows, weights, own_real)
        open_rows, weights = open_rows[moved], weights[moved]
        if len(open_rows):
            logits = run.gated(own_tokens[moved], own_real[moved], weights, listen=True)
            own = heard(logits, run.probe.attention(), own_tokens[moved])
            found.take(open_rows, len(tokens), logits, weights, own, run.states if run.hidden else None)
            passes += 1
    assert found.logits is not None
    assert found.weights is not None
    assert found.outputs is not None
    stream = run.new_stream(len(tokens), prompt_tokens=prompt_tokens, operating=operating, difficulty=difficulty)
    found.replayed(stream, tokens, real, torch.arange(len(tokens), device=tokens.device))
    return Settled(found.logits, found.weights, found.outputs, stream, passes)


class _Found:
    """What is known of every row so far."""

    def __init__(self, outputs: Tensor | None, embeddings: Tensor | None) -> None:
        self.embeddings, self.states = embeddings, None if embeddings is None else torch.zeros_like(embeddings)
        self.outputs = None if outputs is None else outputs.clone()
        self.logits: Tensor | None = None
        self.weights: Tensor | None = None

    def replayed(self, stream: Stream, tokens: Tensor, real: Tensor, rows: Tensor) -> Tensor:
        """The weights [n, T, J] that `stream` decides on for these rows."""
        parts = (self.outputs, self.states, self.embeddings)
        outputs, states, embeddings = (None if part is None else part[rows] for part in parts)
        return stream.replay(tokens, real, outputs, states, embeddings)

    def moved(self, rows: Tensor, weights: Tensor, real: Tensor) -> Tensor:
        """[n] bool: the rows for which other weights are decided on than they ran at."""
        if self.weights is None:
            return torch.ones_like(rows, dtype=torch.bool)
        return ((weights != self.weights[rows]) & real[..., None]).flatten(1).any(1)

    def take(
        self, rows: Tensor, count: int, logits: Tensor, weights: Tensor, outputs: Tensor, states: Tensor | None
    ) -> None:
        """Keep what a pass of these rows, of `count`, came to."""
        if states is not None:
            assert self.states is not None, "who hears states has a place for them"
            self.states[rows] = states
        if self.logits is None or self.weights is None:
            self.logits, self.weights = logits, weights
        else:
            self.logits[rows], self.weights[rows] = logits, weights
        if self.outputs is None or len(rows) == count:
            self.outputs = outputs
        else:
            self.outputs[rows] = outputs


def heard(logits: Tensor, attention: Tensor, tokens: Tensor) -> Tensor:
    """[B, T, 3] entropy and attention at every token and surprisal of the one behind it: logits [B, T, V], attention
    and tokens [B, T]."""
    following = tokens.roll(-1, 1)
    parts = []
    for rows in torch.arange(len(tokens), device=tokens.device).split(ROWS_AT_A_TIME):
        log_p = log_probabilities(logits[rows])
        parts.append(torch.stack([next_token_entropy(log_p), surprisal(log_p, following[rows])], -1))
    entropy, surprise = torch.cat(parts).unbind(-1)
    return torch.stack([entropy, attention, surprise], -1)

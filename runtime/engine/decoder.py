"""Rows of a batch bucket, decoded token by token: one graph, whatever adapters, rungs and budgets they have.

A row whose pages are in place is begun with what a prefill left of it (`begin`: what its stream remembers, the logits
behind its last token) and goes on by itself: controller, model and sampler hand device tensors to each other, and the
host only says how often. What comes out is read from `generated` and `rungs`.

Shape legend: B rows of the bucket, n of them, N steps at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy.contract import RankPolicy
from policy.settings import Settings

from ..control.stream import Stream
from ..kv.formats import FULL, NONE
from ..kv.units import pages_for
from ..ops.pages import turn
from ..ops.quantise import quantise_turned
from ..ops.reference.sampling import Generated, Sampling, SamplingRows
from ..ops.resolve import reads_for
from ..ops.sampling import SamplingScratch, sample
from .buffers import Buffers
from .control import Controller, Ladders
from .graph import Graph
from .model import Model
from .page_pool import Pool, place, set_policy
from .step import Forward
from .store import AdapterStore


@dataclass(frozen=True)
class Bucket:
    """What a graph is captured for."""

    rows: int
    pages: int
    """Of a row, at most"""
    steps: int
    """Tokens of a row that are kept, at most"""
    ends: int
    """How many tokens end a row"""
    decides: bool
    """Whether any row's rung may change; else no controller runs"""


@dataclass(frozen=True)
class Begin:
    """What a prefill leaves of n rows, beside their pages."""

    stream: Stream
    slots: Tensor
    """[n] int32: where the rows' ladders lie"""
    complexity: Tensor | None
    """[n, pages] float64: sums over the tokens of their pages, where pages are judged by that"""
    logits: Tensor
    """[n, V] of the row's last token"""
    tokens: Tensor
    """[n, columns] long: what the repetition penalty knows of a row"""
    sampling: Sequence[Sampling]
    ends: Tensor
    pad: int


LONG_PAGES = 256
"""From here on a row's attention has twice as many parts: at 32,768 tokens a single row takes 127 us a layer with them
and 156 without (docs/log.md). Where between 512 and that they begin to pay has not been measured."""


def splits_for(rows: int, kv_heads: int, pages: int, coded: bool) -> int:
    """Parts of a row's attention: enough programs for every multiprocessor, and none more, as they must be joined.

    Programs of one warp, as where pages may be coded, are four times as many.
    """
    if coded:
        return max(1, min(32, 1024 // (rows * kv_heads)))
    return max(1, min(16, (512 if pages >= LONG_PAGES else 256) // (rows * kv_heads)))


def probed_layers(layers: int, wanted: int) -> tuple[int, ...]:
    """The layers whose attention is listened to: evenly spaced, the last one included."""
    wanted = min(layers, wanted)
    return tuple(round((i + 1) * layers / wanted) - 1 for i in range(wanted))


class Decoder:
    """A bucket's buffers and its graph. `trace` [B, N] int16 replaces decisions, see `Controller`."""

    def __init__(
        self, model: Model, pool: Pool, store: AdapterStore | None, ladders: Ladders | None, policy: RankPolicy,
        settings: Settings, bucket: Bucket, *, trace: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.bucket, self.model, self.pool = bucket, model, pool
        rows, device, signals = bucket.rows, model.device, settings.signals
        probes = probed_layers(model.shape.layers, signals.attention_layers) if bucket.decides else ()
        splits = splits_for(rows, model.shape.kv_heads, bucket.pages, pool.units.coded)
        directions = 1 if store is None else store.directions
        self.buffers = Buffers.of(model, pool.units, rows, bucket.pages, directions, len(probes), splits)
        ends = torch.zeros(bucket.ends, dtype=torch.long, device=device)
        made = Generated.of(rows, model.shape.vocabulary, bucket.steps, ends)
        self.generated = replace(made, tokens=self.buffers.tokens)
        self.sampling = SamplingRows.of(rows, device)
        self.rungs = torch.zeros(rows, bucket.steps, dtype=torch.int16, device=device)
        """[B, N] the rung of every step, where a controller runs"""
        self.controller: Controller | None = None
        if store is not None and ladders is not None:
            judged = self.buffers.kept.complexity if pool.units.coded else None
            self.controller = Controller(
                policy, settings, self.buffers.rows, ladders, trace=trace, log=self.rungs, complexity=judged
            )  # fmt: skip
        self._entropy, self._surprisal = (torch.zeros(rows, device=device) for _ in range(2))
        self._scratch = SamplingScratch.of(rows, model.shape.vocabulary, device)
        reads = None if store is None else reads_for(rows, len(store.modules), store.arena, model.dtype)
        tables = None if store is None else store.tables
        self._forward = Forward(model, tables, reads, pool, self.buffers, splits, probes, signals.recent_pages)
        self._graph = Graph(self.step, device)
        self.clear()

    def step(self) -> None:
        """Decide for the newest token of every row, and for the page that has left its window; process it, choose the
        next."""
        b = self.buffers
        if self.controller is not None and self.bucket.decides:
            self.controller.step(b.tokens, self._entropy, self._surprisal, b.distant)
        self.turn()
        self._forward()
        self._sample()

    def turn(self) -> None:
        """Open a step: pages that have left the window get their format, and others begin."""
        b, pool = self.buffers, self.pool
        turn(b.tables, pool.free, b.turned, b.kept)
        if pool.units.coded:
            quantise_turned(pool.memory, b.turned, pool.units, self.model.dtype)

    def run(self) -> None:
        """One step, as a replay of the graph; the host does not wait."""
        self._graph.replay()

    def clear(self) -> None:
        """No row is in use."""
        self.buffers.tables.lengths.zero_()
        self.buffers.turned.code.zero_()
        self._idle()

    def _idle(self) -> None:
        """No row has an adapter, and none is to be told anything."""
        self.buffers.rows.slot.fill_(-1)
        self.buffers.rows.weight.zero_()
        self.generated.ended.fill_(1)

    def hold(self, lengths: Sequence[int]) -> None:
        """Rows of so many tokens in the model's dtype, whatever they are, and no others: for who times steps."""
        pages = torch.tensor([pages_for(own) for own in lengths])
        formats = torch.where(torch.arange(self.bucket.pages) < pages[:, None], FULL, NONE)
        place(self.pool, self.buffers.tables, self.buffers.turned, formats, lengths, [0] * len(lengths))

    def begin(self, begin: Begin) -> None:
        """Let n rows go on whose pages are in place in the first n of the bucket, and choose their first tokens."""
        b, g = self.buffers, self.generated
        count = len(begin.slots)
        index = torch.arange(count, device=self.model.device)
        kv = begin.stream.state.operating.kv
        assert kv.is_full or self.pool.units.coded, "attention finds no dropped page where none may be coded"
        self._idle()
        set_policy(b.kept, kv)
        if self.controller is not None:
            self.controller.load(index, begin.stream, begin.slots, begin.complexity)
        g.seen.zero_()
        g.seen[:count].scatter_(1, begin.tokens, 1)
        g.ended[:count] = 0
        g.count.zero_()
        g.pad.fill_(begin.pad)
        g.ends.copy_(begin.ends)
        for row, sampling in enumerate(begin.sampling):
            self.sampling.set(row, sampling)
        b.logits[:count] = begin.logits
        self._sample()

    def _sample(self) -> None:
        sample(self.buffers.logits, self.sampling, self.generated, self._entropy, self._surprisal, self._scratch)

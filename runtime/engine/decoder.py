"""Rows of a batch bucket, decoded token by token: one graph, whatever adapters, rungs and budgets they have.

A row whose pages are in place is begun with what a prefill left of it (`begin`: what its stream remembers, the logits
behind its last token) and goes on by itself: controller, model and sampler hand device tensors to each other, and the
host only says how often. What comes out is read from `generated` and `rungs`.

Shape legend: B rows of the bucket, n of them, N steps at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.contract import RankPolicy
from policy.settings import Settings

from ..control.stream import Stream
from ..kv.formats import FULL, NONE
from ..kv.units import pages_for
from ..ops.pages import leave, turn
from ..ops.quantise import quantise_turned
from ..ops.reference.sampling import Sampling
from ..ops.resolve import reads_for
from ..ops.sampling import SamplingScratch, sample
from .buffers import Buffers
from .control import Controller, Ladders
from .graph import Graph
from .lanes import Lanes, over_rows
from .model import Model
from .page_pool import Pool, place
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
    """What a prefill leaves of n rows that follow each other, beside their pages and what those are judged by."""

    first: int
    """Number of the first of them in the bucket"""
    stream: Stream
    slots: Tensor
    """[n] int32: where the rows' ladders lie"""
    lengths: Tensor
    """[n] int32: tokens whose keys and values are there"""
    logits: Tensor
    """[n, V] of the row's last token"""
    tokens: Tensor
    """[n, columns] long: what the repetition penalty knows of a row"""
    sampling: Sequence[Sampling]
    ends: Tensor
    pad: int
    given: Tensor | None = None
    """[n, g] long: tokens that rows have already answered with, which are gone through again"""


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
    """A bucket's buffers and its graph.

    `trace` [B, N] int16 replaces decisions, see `Controller`. `within` is a decoder of more rows, of which this one
    works on the first: made before any of them is in use, as a graph is captured by running it.
    """

    def __init__(
        self, model: Model, pool: Pool, store: AdapterStore | None, ladders: Ladders | None, policy: RankPolicy,
        settings: Settings, bucket: Bucket, *, trace: Tensor | None = None, within: Decoder | None = None,
    ) -> None:  # fmt: skip
        self.bucket, self.model, self.pool = bucket, model, pool
        rows, device, signals = bucket.rows, model.device, settings.signals
        probes = probed_layers(model.shape.layers, signals.attention_layers) if bucket.decides else ()
        splits = splits_for(rows, model.shape.kv_heads, bucket.pages, pool.units.coded)
        directions = 1 if store is None else store.directions
        if within is None:
            lanes = Lanes.of(model, pool.units, rows, bucket.pages, bucket.steps, bucket.ends, len(probes))
        else:
            lanes = within.lanes.part(0, rows)
        self.lanes: Lanes = lanes
        self.buffers = Buffers.of(model, lanes, directions, splits)
        self.generated, self.sampling, self.rungs = lanes.generated, lanes.sampling, lanes.rungs
        self.controller: Controller | None = None
        if store is not None and ladders is not None:
            judged = lanes.kept.complexity if pool.units.coded else None
            state = None if within is None or within.controller is None else within.controller.state
            self.controller = Controller(
                policy, settings, lanes.rows, ladders, trace=trace, log=self.rungs, complexity=judged,
                state=None if state is None else over_rows(lambda own: own[:rows], state),
            )  # fmt: skip
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
            self.controller.step(b.tokens, self.lanes.entropy, self.lanes.surprisal, b.distant)
        self.turn()
        self._forward()
        self._sample(self.lanes, b.logits)

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
        """No row is in use, has an adapter, or is to be told anything; what its pages were is forgotten."""
        lanes = self.lanes
        made, tables = lanes.generated, lanes.tables
        for own in (tables.lengths, tables.settled, tables.counts, lanes.turned.code, made.tokens, made.pad):
            own.zero_()
        lanes.rows.slot.fill_(-1)
        lanes.rows.weight.zero_()
        made.ended.fill_(1)

    def leave(self, row: int) -> None:
        """A row is not in use any more; all that it has can be used by others from the next step on. Between steps."""
        lanes = self.lanes
        leave(lanes.tables, self.pool.free, lanes.turned, torch.full_like(lanes.rows.slot[:1], row))
        lanes.rows.slot[row].fill_(-1)
        lanes.rows.weight[row].fill_(0)
        lanes.generated.ended[row].fill_(1)

    def hold(self, lengths: Sequence[int]) -> None:
        """Rows of so many tokens in the model's dtype, whatever they are, and no others: for who times steps."""
        pages = torch.tensor([pages_for(own) for own in lengths])
        formats = torch.where(torch.arange(self.bucket.pages) < pages[:, None], FULL, NONE)
        place(self.pool, self.buffers.tables, self.buffers.turned, formats, lengths, [0] * len(lengths))

    def begin(self, begin: Begin) -> None:
        """Let n rows go on whose pages are in place, and choose their first tokens; all others are left alone."""
        count, first = len(begin.slots), begin.first
        own = self.lanes.part(first, count)
        g = own.generated
        own.tables.lengths.copy_(begin.lengths)
        if self.controller is not None:
            index = torch.arange(first, first + count, device=self.model.device)
            judged = own.kept.complexity if self.pool.units.coded else None
            self.controller.load(index, begin.stream, begin.slots, judged)
        g.seen.zero_()
        g.seen.scatter_(1, begin.tokens, 1)
        g.ended.zero_()
        g.count.zero_()
        g.given.zero_()
        if begin.given is not None:
            given = begin.given.shape[1]
            g.log[:, :given] = begin.given
            g.given.fill_(given)
        g.pad.fill_(begin.pad)
        g.ends.copy_(begin.ends)
        for row, sampling in enumerate(begin.sampling):
            own.sampling.set(row, sampling)
        logits = self.buffers.logits[first : first + count]
        logits.copy_(begin.logits)
        self._sample(own, logits)

    def _sample(self, lanes: Lanes, logits: Tensor) -> None:
        sample(logits, lanes.sampling, lanes.generated, lanes.entropy, lanes.surprisal, self._scratch)

"""Rows of a batch bucket, decoded token by token: one graph, whatever adapters, rungs and budgets they have.

A row is begun with what a prefill left of it (`begin`: its keys and values, what its stream remembers, the logits
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
from policy.settings import PAGE_TOKENS, Settings

from ..control.stream import Stream
from ..ops.reference.sampling import Generated, Sampling, SamplingRows
from ..ops.resolve import reads_for
from ..ops.sampling import SamplingScratch, sample
from .buffers import Buffers, Pool
from .control import Controller, Ladders
from .graph import Graph
from .model import Model
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
    """What a prefill leaves of n rows."""

    stream: Stream
    slots: Tensor
    """[n] int32: where the rows' ladders lie"""
    keys: Sequence[Tensor]
    """By layer the rows' pages, [Hkv, n, pages, 16, head_dim], what lies behind a row's last token included"""
    values: Sequence[Tensor]
    lengths: Tensor
    """[n] int32 tokens of every row"""
    logits: Tensor
    """[n, V] of the row's last token"""
    tokens: Tensor
    """[n, columns] long: what the repetition penalty knows of a row"""
    sampling: Sequence[Sampling]
    ends: Tensor
    pad: int


def splits_for(rows: int, kv_heads: int) -> int:
    """Parts of a row's attention: enough programs for every multiprocessor, and none more, as they must be joined."""
    return max(1, min(16, 256 // (rows * kv_heads)))


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
        splits = splits_for(rows, model.shape.kv_heads)
        directions = 1 if store is None else store.directions
        self.buffers = Buffers.of(model, rows, bucket.pages, directions, len(probes), splits)
        ends = torch.zeros(bucket.ends, dtype=torch.long, device=device)
        made = Generated.of(rows, model.shape.vocabulary, bucket.steps, ends)
        self.generated = replace(made, tokens=self.buffers.tokens)
        self.sampling = SamplingRows.of(rows, device)
        self.rungs = torch.zeros(rows, bucket.steps, dtype=torch.int16, device=device)
        """[B, N] the rung of every step, where a controller runs"""
        self.controller: Controller | None = None
        if store is not None and ladders is not None:
            self.controller = Controller(policy, settings, self.buffers.rows, ladders, trace=trace, log=self.rungs)
        self._entropy, self._surprisal = (torch.zeros(rows, device=device) for _ in range(2))
        self._scratch = SamplingScratch.of(rows, model.shape.vocabulary, device)
        reads = None if store is None else reads_for(rows, len(store.modules), store.arena, model.dtype)
        tables = None if store is None else store.tables
        self._forward = Forward(model, tables, reads, pool, self.buffers, splits, probes, signals.recent_pages)
        self._graph = Graph(self.step, device)
        self.clear()

    def step(self) -> None:
        """Decide for the newest token of every row, process it, choose the next."""
        b = self.buffers
        if self.controller is not None and self.bucket.decides:
            self.controller.step(b.tokens, self._entropy, self._surprisal, b.distant)
        self._forward()
        self._sample()

    def run(self) -> None:
        """One step, as a replay of the graph; the host does not wait."""
        self._graph.replay()

    def clear(self) -> None:
        """No row is in use."""
        self.buffers.lengths.zero_()
        self.buffers.rows.slot.fill_(-1)
        self.buffers.rows.weight.zero_()
        self.generated.ended.fill_(1)

    def begin(self, begin: Begin) -> None:
        """Put n rows into the first n of the bucket, each into pages of its own, and choose their first tokens."""
        self.clear()
        b, g = self.buffers, self.generated
        count, pages = len(begin.lengths), self.bucket.pages
        index = torch.arange(count, device=self.model.device)
        b.table.copy_(torch.arange(self.bucket.rows * pages, dtype=torch.int32).view(-1, pages))
        for kept, new in zip((*self.pool.keys, *self.pool.values), (*begin.keys, *begin.values), strict=True):
            # [Hkv, n, filled, 16, D] -> page by page
            filled = new.shape[2]
            own = kept[: count * pages].view(count, pages, *kept.shape[1:])
            own[:, :filled] = new.permute(1, 2, 0, 3, 4)
        if self.controller is not None:
            self.controller.load(index, begin.stream, begin.slots)
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
        b.lengths[:count] = begin.lengths

    def _sample(self) -> None:
        sample(self.buffers.logits, self.sampling, self.generated, self._entropy, self._surprisal, self._scratch)


def pages_for(tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // PAGE_TOKENS)

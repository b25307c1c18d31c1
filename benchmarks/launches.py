"""The kernels of a decode step, each as many launches over memory that no other launch of the same kernel touches.

What a kernel costs depends on where its bytes are: in a step every layer's weights, directions and pages come from
device memory, because the layers before have filled the cache with theirs. So a kernel is launched for one layer after
the other, and where a single row's adapter is small for one adapter after the other. What was written a moment ago,
activations, lies in the cache here as it does in a step.

What rows' adapters add is made beside a linear: by programs of its launch for one row, by a launch right behind it for
several, which goes on when the linear says that x is there. Alone that launch would have the whole device to itself,
and nothing to keep it from the one before it, so linear and adapters are timed together; without adapters the linear is
there as well.

Shape legend: B rows, D hidden, F inner, V vocabulary, L layers, R directions at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policy.learned import LearnedPolicy
from policy.operating import Operating
from policy.settings import FULL_KV, Settings
from runtime.control.bucket import Offer
from runtime.control.stream import Stream
from runtime.engine.control import Controller, Ladders
from runtime.engine.decoder import probed_layers, splits_for
from runtime.engine.model import DOWN, GATE_UP, MEMBERS, OUT, QKV, Layer, Linears, Model
from runtime.engine.page_pool import units_of
from runtime.engine.store import AdapterStore, Module
from runtime.kv.units import pages_for
from runtime.ladder import Ladder
from runtime.ops.adapters import Update
from runtime.ops.attention import AttentionScratch, decode_attention
from runtime.ops.gated import gate_up
from runtime.ops.linear import linear
from runtime.ops.norm import Norm
from runtime.ops.packed import Reads
from runtime.ops.pages import Pages, PageTables
from runtime.ops.ready import nothing_ready
from runtime.ops.reference.sampling import Generated, Sampling, SamplingRows
from runtime.ops.residual import add_residual, squares_of
from runtime.ops.resolve import Rows, reads_for, resolve
from runtime.ops.rotary import Heads, rotate
from runtime.ops.sampling import SamplingScratch, sample

from .ladders import MIX, RANK, read_bytes

POOL_BYTES = 9 * 10**9
"""Pages are made for as many layers as this holds."""
AT_LEAST = 128
"""Launches of a kernel that is short, so that the ends of a graph weigh nothing."""
NO_ADAPTER = "none"
RUNGS = (RANK, 16, 8, 4, NO_ADAPTER)
SITES = {"qkv": QKV, "o": OUT, "gate_up": GATE_UP, "down": DOWN}


@dataclass(frozen=True)
class Kernel:
    """One line of the table: a kernel at a batch and, where it reads adapters, at a rung."""

    name: str
    batch: int
    rung: int | str | None
    """Equivalent rank; `none`: launched without adapters; None: it knows of none"""
    read_bytes: int
    """Of one launch: weights, directions, keys and values, and what activations it takes, each once."""
    launches: list[Callable[[], None]]
    outputs: tuple[Tensor, ...]
    """What it writes, to be looked at."""


@dataclass(frozen=True)
class Kernels:
    """Makes them for B rows at `context` tokens; `store` holds at least B adapters with the rungs of `MIX`."""

    model: Model
    store: AdapterStore
    ladder: Ladder
    batch: int
    context: int

    def all(self) -> Iterator[Kernel]:
        """Every kernel, in the order of a step."""
        yield self._controller()
        yield self._resolve()
        for name in SITES:
            yield from (self._linear(name, rung) for rung in RUNGS)
        # What is added was made before: at every rung it is as much.
        for make in (self._rotary, self._gated, self._residual):
            yield from (make(rung) for rung in (RANK, NO_ADAPTER))
        yield self._attention()
        yield self._head()
        yield self._sampling("sampling, greedy", Sampling())
        yield self._sampling("sampling, top-p", Sampling(temperature=0.8, top_p=0.9))

    def _linears(self, layer: Layer, name: str) -> Linears:
        found: Linears = getattr(layer, name)
        return found

    def _random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Small numbers, so that a residual that is added to over and over stays finite."""
        return (0.01 * torch.randn(shape, device=self.model.device)).to(dtype)

    def _norm(self) -> Norm:
        hidden = self.model.shape.hidden
        squares = torch.ones(self.batch, squares_of(self.batch, hidden), device=self.model.device)
        return Norm(squares, self.model.shape.eps, hidden)

    def _input(self, name: str) -> Tensor:
        """x of the linears of a site."""
        width = self._linears(self.model.layers[0], name).weights[0].shape[1]
        return self._random(self.batch, width, dtype=self.model.dtype)

    def _linear(self, name: str, rung: int | str) -> Kernel:
        """A site's linears, and what makes B'u of its rows' adapters."""
        x = self._input(name)
        own = [self._linears(layer, name).weights for layer in self.model.layers]
        y = torch.empty(self.batch, sum(map(len, own[0])), device=x.device)
        updates = self._updates(name, rung)
        launches = [partial(linear, x, own[layer], y, update=update) for layer, update in updates]
        read, update = _nbytes(x, *own[0]), updates[0][1]
        if isinstance(rung, str) or update is None:
            return Kernel(f"linear {name}", self.batch, rung, read, launches, (y,))
        read += self.batch * self._direction_bytes(name, rung)
        return Kernel(f"linear {name}", self.batch, rung, read, launches, (y, update.added))

    def _head(self) -> Kernel:
        x, head = self._input("qkv"), self.model.head
        y = torch.empty(self.batch, len(head), device=x.device)
        # There is one, and it is larger than any cache.
        launches = [partial(linear, x, (head,), y, norm=self._norm())] * 8
        return Kernel("linear head", self.batch, None, _nbytes(x, head), launches, (y,))

    def _rows(self, rung: int, first: int) -> Rows:
        """Every row at a rung, of an adapter of its own from slot `first` on."""
        device, count = self.model.device, len(self.store.ladders)
        slots = (first + torch.arange(self.batch, dtype=torch.int32)) % count
        index = torch.full((self.batch,), list(MIX).index(rung), dtype=torch.int32)
        return Rows(slots.to(device), index.to(device), torch.ones(self.batch, device=device))

    def _records(self) -> Reads:
        return reads_for(self.batch, len(self.store.modules), self.store.arena, self.model.dtype)

    def _reads(self, rung: int) -> list[Reads]:
        """What the rows read, as often with other adapters as it takes for `AT_LEAST` launches."""
        found = []
        times = max(1, min(AT_LEAST // self.model.shape.layers, len(self.store.ladders) // self.batch))
        for number in range(times):
            reads = self._records()
            resolve(reads, self._rows(rung, number * self.batch), self.store.tables)
            found.append(reads)
        return found

    def _updates(self, name: str, rung: int | str) -> list[tuple[int, Update | None]]:
        """(layer, what is read of the adapters there) of every launch of a site, to be launched in this order, over and
        over: each puts back what the one before it has counted."""
        layers = range(self.model.shape.layers)
        if isinstance(rung, str):
            return [(layer, None) for layer in layers] * max(1, AT_LEAST // len(layers))
        device, own = self.model.device, self._modules(name)
        u = self._random(self.batch, len(own), self.store.directions)
        added = self._random(self.batch, sum(module.outputs for module in own))
        ready = nothing_ready(len(self.store.modules), self.batch, device)
        sites = [layer * len(MEMBERS) + SITES[name] for layer in layers]
        assert len(sites) > 1, "no launch puts back what it counts itself"
        return [
            (layer, Update(u, added, reads, sites[layer], own[0].columns, ready, sites[layer - 1]))
            for reads in self._reads(rung)
            for layer in layers
        ]

    def _rotary(self, rung: int | str) -> Kernel:
        model, s = self.model, self.model.shape
        y = self._random(self.batch, (s.heads + 2 * s.kv_heads) * s.head_dim)
        query = torch.empty(self.batch, s.heads, s.head_dim, dtype=model.dtype, device=model.device)
        pages, norm = self._pages(layers=1)[0], self._norm()
        launches = []
        for layer, update in self._updates("qkv", rung):
            own = model.layers[layer]
            heads = Heads(model.cosine, model.sine, own.q_norm, own.k_norm, s.eps)
            launches.append(
                partial(rotate, y, query, pages, heads, update=update, norm=norm, biases=own.qkv.biases)
            )  # fmt: skip
        return Kernel("rotary", self.batch, rung, self._consumed(rung, y), launches, (query,))

    def _gated(self, rung: int | str) -> Kernel:
        inner = self.model.shape.inner
        y = self._random(self.batch, 2 * inner)
        h = torch.empty(self.batch, inner, dtype=self.model.dtype, device=y.device)
        norm = self._norm()
        launches = [
            partial(gate_up, y, h, update=update, norm=norm, biases=self.model.layers[layer].gate_up.biases)
            for layer, update in self._updates("gate_up", rung)
        ]
        return Kernel("gated", self.batch, rung, self._consumed(rung, y), launches, (h,))

    def _residual(self, rung: int | str) -> Kernel:
        hidden, norm = self.model.shape.hidden, self._norm()
        y, r = self._random(self.batch, hidden), self._random(self.batch, hidden)
        normed = torch.empty(self.batch, hidden, dtype=self.model.dtype, device=y.device)
        launches = [
            partial(add_residual, y, r, normed, norm.squares, self.model.layers[layer].inner_norm, update=update)
            for layer, update in self._updates("o", rung)
        ]
        return Kernel("residual", self.batch, rung, r.nbytes + self._consumed(rung, y), launches, (r, normed))

    def _attention(self) -> Kernel:
        model, s = self.model, self.model.shape
        query = self._random(self.batch, s.heads, s.head_dim, dtype=model.dtype)
        out = torch.empty(self.batch, s.heads * s.head_dim, dtype=model.dtype, device=model.device)
        splits = splits_for(self.batch, s.kv_heads, pages_for(self.context), coded=False)
        scratch = AttentionScratch.of(self.batch, s.heads, s.head_dim, splits, model.device) if splits > 1 else None
        launches = [
            partial(
                decode_attention, query, pages, out, scratch, splits=splits, scale=s.head_dim**-0.5,
                window=layer.window,
            )
            for pages, layer in zip(self._pages(s.layers), model.layers, strict=False)
        ]  # fmt: skip
        read = 2 * self.batch * self.context * s.kv_heads * s.head_dim * model.dtype.itemsize
        return Kernel("attention", self.batch, None, read, launches, (out,))

    def _pages(self, layers: int) -> list[Pages]:
        """Full pages of so many layers, of fewer where they take more than `POOL_BYTES`."""
        s, device, pages = self.model.shape, self.model.device, pages_for(self.context)
        units = units_of(self.model, coded=False)
        tables = PageTables.of(self.batch, pages, units, device)
        tables.full.copy_(torch.arange(self.batch * pages).view(self.batch, pages, 1))
        tables.lengths.fill_(self.context)
        found = []
        for _ in range(min(layers, max(1, POOL_BYTES // (self.batch * pages * units.bytes)))):
            numbers = units.head_bytes // units.itemsize
            memory = self._random(self.batch * pages, s.kv_heads, numbers, dtype=self.model.dtype)
            found.append(Pages(memory.view(torch.uint8), tables, units))
        return found

    def _controller(self) -> Kernel:
        device, settings, s = self.model.device, Settings(kv=FULL_KV), self.model.shape
        policy: Any = LearnedPolicy(tuple(MIX)).to(device)
        rows = self._rows(RANK, 0)
        ladders = Ladders.of(len(self.store.ladders), s.vocabulary, len(MIX), device)
        controller = Controller(policy, settings, rows, ladders)
        cost = (self.ladder.rung_bytes() / self.ladder.rung_bytes()[-1]).expand(self.batch, -1)
        stream = Stream(settings, policy, Operating.at(0.0, torch.zeros(self.batch).long()), Offer.of(cost), device)
        controller.load(torch.arange(self.batch, device=device), stream, rows.slot.clone())
        tokens = torch.full((self.batch,), 3, device=device)
        signals = torch.full((2, self.batch), 0.5, device=device)
        probes = len(probed_layers(s.layers, settings.signals.attention_layers))
        distant = torch.full((probes, self.batch, s.heads), 0.5, device=device)
        network = sum(own.nbytes for own in policy.parameters())
        # The network once, and of every row what it remembers.
        state = sum(getattr(controller.state, name).nbytes for name in ("history", "gathered", "cost"))
        launches = [partial(controller.step, tokens, signals[0], signals[1], distant)] * AT_LEAST
        return Kernel("controller", self.batch, None, network + state + distant.nbytes, launches, (rows.weight,))

    def _resolve(self) -> Kernel:
        modules = len(self.store.modules)
        reads = self._records()
        launches = [partial(resolve, reads, self._rows(rung, 0), self.store.tables) for rung in MIX]
        launches *= max(1, AT_LEAST // len(launches))
        # Of every module four ends and sixteen numbers.
        return Kernel("resolve", self.batch, None, self.batch * modules * 80, launches, (reads.records,))

    def _sampling(self, name: str, sampling: Sampling) -> Kernel:
        device, vocabulary = self.model.device, self.model.shape.vocabulary
        logits = torch.randn(self.batch, vocabulary, device=device)
        rows = SamplingRows.of(self.batch, device)
        for row in range(self.batch):
            rows.set(row, sampling)
        generated = Generated.of(self.batch, vocabulary, 64, torch.full((1,), -1, device=device))
        scratch = SamplingScratch.of(self.batch, vocabulary, device)
        found = torch.zeros(2, self.batch, device=device)
        launches = [partial(sample, logits, rows, generated, found[0], found[1], scratch)] * AT_LEAST
        return Kernel(name, self.batch, None, logits.nbytes, launches, (found, generated.tokens))

    def _consumed(self, rung: int | str, y: Tensor) -> int:
        """Bytes of what a linear puts out, and of what adapters add to it, which is as much."""
        return y.nbytes if isinstance(rung, str) else 2 * y.nbytes

    def _direction_bytes(self, name: str, rung: int) -> int:
        """What a row's rung reads of one layer's site."""
        return read_bytes(self._modules(name), self.model.dtype)[rung]

    def _modules(self, name: str) -> list[Module]:
        """The linears of a site, of any layer, as the store knows them."""
        first = SITES[name]
        members = len(self._linears(self.model.layers[0], name).weights)
        return list(self.store.modules.values())[first : first + members]


def _nbytes(*tensors: Tensor) -> int:
    return sum(own.nbytes for own in tensors)

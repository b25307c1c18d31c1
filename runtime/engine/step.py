"""One token of every row through the model.

    resolve -> embed -> layers x (attend, feed forward) -> head

Several rows take nine launches a layer: linear, beside it shrink, and what consumes both; one row takes five, in which
those three are one (`ops.alone`). Nothing here looks at a value: which adapter, rung and page a row uses is in device
tensors, so the launches are the same for every step, and a graph can hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.alone import Source, linear_gated, linear_residual, linear_rotary
from ..ops.attention import decode_attention
from ..ops.gated import gate_up
from ..ops.linear import linear
from ..ops.packed import Reads
from ..ops.residual import add_residual, embed
from ..ops.resolve import Tables, resolve
from ..ops.rotary import Heads, rotate
from ..ops.shrink import Shrink, shrink
from .branch import Branch
from .buffers import Buffers, Pool
from .model import DOWN, GATE_UP, MEMBERS, OUT, QKV, Linears, Model, block_columns


@dataclass(frozen=True)
class Forward:
    """A model, the adapters and pages of its rows, and the buffers between its kernels."""

    model: Model
    tables: Tables | None
    """Where the adapters lie; None: the model alone, and nothing is spent on looking for any"""
    reads: Reads | None
    pool: Pool
    buffers: Buffers
    splits: int
    """Parts that a row's attention is split into"""
    probes: tuple[int, ...]
    """The layers whose attention is listened to"""
    recent_pages: int
    branch: Branch

    def __call__(self) -> None:
        """Process `tokens`, leave `logits` and, of probed layers, `distant`."""
        model, b = self.model, self.buffers
        norms = [own.attention_norm for own in model.layers] + [model.norm]
        if self.reads is not None and self.tables is not None:
            resolve(self.reads, b.rows, self.tables)
        embed(b.tokens, model.embedding, b.r, b.normed, b.squares, norms[0], b.lengths, b.counts)
        for layer in range(model.shape.layers):
            self._attend(layer)
            self._feed_forward(layer, norms[layer + 1])
        linear(b.normed, (model.head,), b.logits, norm=b.norm(model.shape.eps))

    def _attend(self, number: int) -> None:
        model, b = self.model, self.buffers
        layer, s = model.layers[number], model.shape
        pages = b.pages(self.pool, number)
        heads = Heads(model.cosine, model.sine, layer.q_norm, layer.k_norm, s.eps)
        if b.alone and layer.q_norm is None:
            linear_rotary(self._source(b.normed, layer.qkv, number, QKV, normed=True), b.query, pages, heads)
        else:
            y, update = self._linears(b.normed, layer.qkv, number, QKV, normed=True)
            rotate(y, b.query, pages, heads, update=update)
        distant = b.distant[self.probes.index(number)] if number in self.probes else None
        decode_attention(
            b.query, pages.keys, pages.values, pages.table, pages.lengths, b.attended, b.scratch, splits=self.splits,
            scale=s.head_dim**-0.5, distant=distant, recent_pages=self.recent_pages, window=layer.window,
        )  # fmt: skip
        self._add(b.attended, layer.o, number, OUT, layer.inner_norm)

    def _feed_forward(self, number: int, next_norm: Tensor) -> None:
        layer, b = self.model.layers[number], self.buffers
        columns = block_columns(self.model.shape.inner)
        if b.alone:
            linear_gated(self._source(b.normed, layer.gate_up, number, GATE_UP, normed=True), b.inner, columns=columns)
        else:
            y, update = self._linears(b.normed, layer.gate_up, number, GATE_UP, normed=True)
            gate_up(y, b.inner, columns=columns, update=update)
        self._add(b.inner, layer.down, number, DOWN, next_norm)

    def _add(self, x: Tensor, own: Linears, number: int, first: int, norm_weight: Tensor) -> None:
        """What a projection adds to the residual, and the next norm's input."""
        b, columns = self.buffers, block_columns(self.model.shape.hidden)
        if b.alone:
            source = self._source(x, own, number, first)
            linear_residual(source, b.r, b.normed, b.squares, norm_weight, columns=columns)
        else:
            y, update = self._linears(x, own, number, first)
            add_residual(y, b.r, b.normed, b.squares, norm_weight, columns=columns, update=update)

    def _source(self, x: Tensor, own: Linears, layer: int, first: int, normed: bool = False) -> Source:
        b, site = self.buffers, layer * len(MEMBERS) + first
        norm = b.norm(self.model.shape.eps) if normed else None
        update = None if self.reads is None else Shrink(b.shrunk(len(own.weights)), self.reads, site)
        return Source(x, own.weights, own.biases, norm, update, b.counts[site:])

    def _linears(
        self, x: Tensor, own: Linears, layer: int, first: int, normed: bool = False
    ) -> tuple[Tensor, Shrink | None]:
        """What linears that share x put out, and what is to be added to it."""
        b, source = self.buffers, self._source(x, own, layer, first, normed)
        y, update, norm = b.outputs(sum(len(w) for w in own.weights)), source.update, source.norm
        if update is None:
            linear(x, own.weights, y, biases=own.biases, norm=norm)
            return y, None
        with self.branch.beside(lambda: shrink(x, update.u, update.reads, update.site, norm)):
            linear(x, own.weights, y, biases=own.biases, norm=norm)
        return y, update

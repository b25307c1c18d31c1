"""One token of every row through the model.

    resolve -> embed -> layers x (attend, feed forward) -> head

A layer is four linears, with them what the rows' own adapters make of the same input (`adapters`), and behind each what
consumes both, bias and norm included: rotary, the residual twice, the product of gate and up; and attention. Nothing
here looks at a value: which adapter, rung and page a row uses is in device tensors, so the launches are the same for
every step, and a graph can hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.adapters import Update
from ..ops.attention import decode_attention
from ..ops.gated import gate_up
from ..ops.linear import linear
from ..ops.packed import Reads
from ..ops.residual import add_residual, embed
from ..ops.resolve import Tables, resolve
from ..ops.rotary import Heads, rotate
from .buffers import Buffers
from .model import DOWN, GATE_UP, MEMBERS, OUT, QKV, SITES, Linears, Model, block_columns
from .page_pool import Pool


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

    def __call__(self) -> None:
        """Process `tokens`, leave `logits` and, of probed layers, `distant`."""
        model, b = self.model, self.buffers
        norms = [own.attention_norm for own in model.layers] + [model.norm]
        if self.reads is not None and self.tables is not None:
            resolve(self.reads, b.rows, self.tables)
        embed(b.tokens, model.embedding, b.r, b.normed, b.squares, norms[0], b.tables.lengths)
        for layer in range(model.shape.layers):
            self._attend(layer)
            self._feed_forward(layer, norms[layer + 1])
        linear(b.normed, (model.head,), b.logits, norm=b.norm(model.shape.eps))

    def _attend(self, number: int) -> None:
        model, b = self.model, self.buffers
        layer, s = model.layers[number], model.shape
        pages = b.pages(self.pool, number)
        heads = Heads(model.cosine, model.sine, layer.q_norm, layer.k_norm, s.eps)
        y, update = self._linears(b.normed, layer.qkv, number, QKV)
        rotate(y, b.query, pages, heads, update=update, norm=b.norm(s.eps), biases=layer.qkv.biases)
        distant = b.distant[self.probes.index(number)] if number in self.probes else None
        decode_attention(
            b.query, pages, b.attended, b.scratch, splits=self.splits, scale=s.head_dim**-0.5, distant=distant,
            recent_pages=self.recent_pages, window=layer.window,
        )  # fmt: skip
        self._add(b.attended, layer.o, number, OUT, layer.inner_norm)

    def _feed_forward(self, number: int, next_norm: Tensor) -> None:
        layer, b, s = self.model.layers[number], self.buffers, self.model.shape
        y, update = self._linears(b.normed, layer.gate_up, number, GATE_UP)
        gate_up(y, b.inner, update=update, norm=b.norm(s.eps), biases=layer.gate_up.biases)
        self._add(b.inner, layer.down, number, DOWN, next_norm)

    def _add(self, x: Tensor, own: Linears, number: int, first: int, norm_weight: Tensor) -> None:
        """What a projection adds to the residual, and the next norm's input."""
        b = self.buffers
        y, update = self._linears(x, own, number, first)
        bias = None if own.biases is None else own.biases[0]
        add_residual(y, b.r, b.normed, b.squares, norm_weight, update=update, bias=bias)

    def _linears(self, x: Tensor, own: Linears, layer: int, first: int) -> tuple[Tensor, Update | None]:
        """What linears that share x put out, and what is to be added to it."""
        b, update = self.buffers, None
        width = sum(len(w) for w in own.weights)
        if self.reads is not None:
            site = layer * len(MEMBERS) + first
            columns = self.model.shape.head_dim if first == QKV else block_columns(len(own.weights[0]))
            update = Update(
                b.shrunk(len(own.weights)), b.updates(width), self.reads, site, columns, b.ready, self._before(site)
            )
        y = b.outputs(width)
        linear(x, own.weights, y, update=update)
        return y, update

    def _before(self, site: int) -> int:
        """The site that comes before this one in a step; before the first, the last of the step before."""
        layers = range(self.model.shape.layers)
        sites = [layer * len(MEMBERS) + first for layer in layers for first in SITES]
        return sites[sites.index(site) - 1]

"""Many tokens of prompts through the model at once: one pass, of several rows side by side.

    embed -> layers x (attend, feed forward) -> head

Every linear is a product of PyTorch's; who consumes it adds what the rows' own adapters make of the same input. Which
tokens are whose, where they go and which factors they read is in device tensors (`ops.prompt.tiles`), so a pass of so
many tokens is always the same launches, and a graph holds them. Tokens behind the last tile are nobody's.

Shape legend: T tokens of a pass, N tiles, S sets of factors, D hidden, F inner, V vocabulary, R directions at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from ..ops.norm import Norm
from ..ops.pages import Pages, PageTables
from ..ops.prompt.flash import attend_prompt
from ..ops.prompt.matrices import Added
from ..ops.prompt.outlook import outlook
from ..ops.prompt.tiles import FIELDS, tiles_for
from ..ops.prompt.token_gated import gate_up_tokens
from ..ops.prompt.token_heads import rotate_tokens
from ..ops.prompt.token_residual import add_residual_tokens, squares_of_tokens
from ..ops.prompt.token_shrink import ShrinkScratch, shrink_tokens
from ..ops.rotary import Heads
from .decoder import probed_layers
from .graph import Branches
from .loaded import Loaded, sites_of
from .model import DOWN, GATE_UP, OUT, QKV, Linears, Model
from .page_pool import Pool

SMALLEST, STEP = 16, 256
"""Passes are of a power of two of tokens, from the smallest on, and from the step on of multiples of that."""


@dataclass(frozen=True)
class Room:
    """What passes are made for."""

    tokens: int
    """T, at most"""
    parts: int
    """Rows side by side at most"""
    sets: int
    """Sets of factors that these read, at most"""
    listens: bool
    """Whether signals are made of what the model puts out: then attention is listened to, and every token has logits"""
    moves: bool = False
    """Whether a row's rung may change within its prompt: from token to token, at worst"""

    def size(self, tokens: int) -> int:
        """T of the smallest pass that has room for so many tokens."""
        whole = triton.cdiv(tokens, STEP) * STEP if tokens > STEP else max(SMALLEST, triton.next_power_of_2(tokens))
        return min(self.tokens, whole)

    def sizes(self) -> list[int]:
        """T of all passes."""
        return sorted({self.size(tokens) for tokens in range(1, self.tokens + 1)})

    def rows(self, parts: int) -> int:
        """What passes of so many rows have tiles for: a power of two, so that they are few."""
        return min(self.parts, triton.next_power_of_2(parts))

    def tiles(self, tokens: int, parts: int) -> int:
        """Tiles that a pass of T = `tokens` of so many rows has at most."""
        return tokens if self.moves else tiles_for(tokens, min(parts, tokens))


@dataclass(frozen=True)
class PassBuffers:
    """What passes of up to T tokens read and write beside weights, adapters and pages."""

    tokens: Tensor
    """[T] long"""
    tiles: Tensor
    """[N, FIELDS] int32"""
    weights: Tensor
    """[T] float32: what multiplies each token's update"""
    last: Tensor
    """[parts] long: where each row's last token is among the T"""
    r: Tensor
    """[T, D] float32, the residual"""
    normed: Tensor
    """[T, D] in the model's dtype: residual times the next norm's weight"""
    squares: Tensor
    """[T, blocks] float32: sums of squares of the residual"""
    y: Tensor
    """[T * widest] in the model's dtype: what linears put out, one behind the other"""
    u: Tensor
    """[T * 3 * R] in the model's dtype"""
    query: Tensor
    """[T, H, head_dim]"""
    attended: Tensor
    """[T, H * head_dim]"""
    inner: Tensor
    """[T, F]"""
    distant: Tensor
    """[probes, T, H] float32: attention mass beyond the recent pages in the layers that are listened to"""
    logits: Tensor
    """[parts, V] float32: of each row's last token"""
    every: Tensor
    """[T, V] in the model's dtype: what the head puts out of every token, yet to be normed, where the pass listens;
    else [0, V]"""
    entropy: Tensor
    """[T] float32, at every token, where the pass listens"""
    following: Tensor
    """[T] float32: surprisal of the token behind each"""
    scratch: ShrinkScratch

    @classmethod
    def of(cls, model: Model, room: Room, directions: int, probes: int) -> PassBuffers:
        """Adapters have up to `directions` directions, `probes` layers are listened to."""
        s, device, dtype, count = model.shape, model.device, model.dtype, room.tokens
        attended, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        shrinks = [(len(own.outputs), own.inputs) for own in sites_of(model).values()]
        scratches = [
            ShrinkScratch.of(size, room.tiles(size, room.parts), shrinks, directions, dtype, device)
            for size in room.sizes()
        ]

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tokens=zeros(count, dtype=torch.long),
            tiles=zeros(room.tiles(count, room.parts), FIELDS, dtype=torch.int32),
            weights=zeros(count),
            last=zeros(room.parts, dtype=torch.long),
            r=zeros(count, s.hidden),
            normed=zeros(count, s.hidden, dtype=dtype),
            squares=zeros(count, squares_of_tokens(s.hidden)),
            y=zeros(count * max(attended + 2 * kv, 2 * s.inner, s.hidden), dtype=dtype),
            u=zeros(count * 3 * directions, dtype=dtype),
            query=zeros(count, s.heads, s.head_dim, dtype=dtype),
            attended=zeros(count, attended, dtype=dtype),
            inner=zeros(count, s.inner, dtype=dtype),
            distant=zeros(probes, count, s.heads),
            logits=zeros(room.parts, s.vocabulary),
            every=zeros(count if room.listens else 0, s.vocabulary, dtype=dtype),
            entropy=zeros(count),
            following=zeros(count),
            scratch=max(scratches, key=lambda own: own.sums.numel()),
        )  # fmt: skip

    def taken(self, name: str, *shape: int) -> Tensor:
        """The beginning of a flat buffer in a shape."""
        flat: Tensor = getattr(self, name)
        return flat[: torch.Size(shape).numel()].view(shape)


@dataclass(frozen=True)
class PromptPass:
    """A pass of T tokens, captured or run as it is: process `tokens`, leave `logits`."""

    model: Model
    loaded: Loaded | None
    """What rows read of adapters; None: they have none"""
    pool: Pool
    tables: PageTables
    """Of the rows whose tokens these are, with their own lengths"""
    buffers: PassBuffers
    beside: Branches
    tokens: int
    """T of this one"""
    tiles: Tensor
    """[N, FIELDS] int32, as many as it may have"""
    probes: tuple[int, ...]
    recent_pages: int
    listens: bool

    @classmethod
    def of(
        cls, model: Model, loaded: Loaded | None, pool: Pool, tables: PageTables, buffers: PassBuffers, room: Room,
        tokens: int, parts: int, layers_heard: int, recent_pages: int,
    ) -> PromptPass:  # fmt: skip
        """A pass of `tokens` tokens of up to `parts` rows, no more than `buffers` are for."""
        probes = probed_layers(model.shape.layers, layers_heard) if room.listens else ()
        tiles, beside = buffers.tiles[: room.tiles(tokens, parts)], Branches(model.device, 2)
        return cls(
            model, loaded, pool, tables, buffers, beside, tokens, tiles, probes, recent_pages, room.listens
        )  # fmt: skip

    def __call__(self) -> None:
        model, b, count = self.model, self.buffers, self.tokens
        norms = [own.attention_norm for own in model.layers] + [model.norm]
        embedded = b.taken("y", count, model.shape.hidden)
        torch.index_select(model.embedding, 0, b.tokens[:count], out=embedded)
        b.r[:count].zero_()
        self._add(embedded, None, None, norms[0])
        for layer in range(model.shape.layers):
            self._attend(layer)
            self._feed_forward(layer, norms[layer + 1])
        self._head()

    def _attend(self, number: int) -> None:
        model, b, count = self.model, self.buffers, self.tokens
        layer, s = model.layers[number], model.shape
        pages = Pages(self.pool.memory[number], self.tables, self.pool.units)
        heads = Heads(model.cosine, model.sine, layer.q_norm, layer.k_norm, s.eps)
        y, update = self._linears(b.normed[:count], layer.qkv, number, QKV)
        rotate_tokens(
            (y[0], y[1], y[2]), b.query[:count], pages, heads, self.tiles, update=update, norm=self._norm(),
            biases=layer.qkv.biases,
        )  # fmt: skip
        distant = b.distant[self.probes.index(number), :count] if number in self.probes else None
        attend_prompt(
            b.query[:count], pages, b.attended[:count], self.tiles, scale=s.head_dim**-0.5, distant=distant,
            recent_pages=self.recent_pages, window=layer.window,
        )  # fmt: skip
        self._project(b.attended[:count], layer.o, number, OUT, layer.inner_norm)

    def _feed_forward(self, number: int, next_norm: Tensor) -> None:
        layer, b, count = self.model.layers[number], self.buffers, self.tokens
        y, update = self._linears(b.normed[:count], layer.gate_up, number, GATE_UP)
        gate_up_tokens(
            y[0], y[1], b.inner[:count], self.tiles, update=update, norm=self._norm(), biases=layer.gate_up.biases
        )  # fmt: skip
        self._project(b.inner[:count], layer.down, number, DOWN, next_norm)

    def _project(self, x: Tensor, own: Linears, number: int, first: int, norm_weight: Tensor) -> None:
        """What a projection adds to the residual, and the next norm's input."""
        y, update = self._linears(x, own, number, first)
        self._add(y[0], update, None if own.biases is None else own.biases[0], norm_weight)

    def _add(self, y: Tensor, update: Added | None, bias: Tensor | None, norm_weight: Tensor) -> None:
        b, count = self.buffers, self.tokens
        add_residual_tokens(
            y, b.r[:count], b.normed[:count], b.squares[:count], norm_weight, self.tiles, update=update, bias=bias
        )  # fmt: skip

    def _linears(self, x: Tensor, own: Linears, layer: int, first: int) -> tuple[list[Tensor], Added | None]:
        """What linears that share x put out, and what is to be added to it."""
        b, count = self.buffers, self.tokens
        sizes = [len(weight) for weight in own.weights]
        y = list(b.taken("y", count * sum(sizes)).split([count * size for size in sizes]))
        y = [own_y.view(count, size) for own_y, size in zip(y, sizes, strict=True)]

        def multiply() -> None:
            for weight, out in zip(own.weights, y, strict=True):
                torch.mm(x, weight.T, out=out)

        if self.loaded is None:
            multiply()
            return y, None
        factors = self.loaded.factors(layer, first)
        u = b.taken("u", count, len(sizes), factors.a.shape[2])
        shrink = partial(shrink_tokens, x, factors, b.weights[:count], self.tiles, u, b.scratch)
        self.beside.run(shrink, multiply)
        return y, Added(u, factors)

    def _norm(self) -> Norm:
        return Norm(self.buffers.squares[: self.tokens], self.model.shape.eps, self.model.shape.hidden)

    def _head(self) -> None:
        """Logits of each row's last token; where the pass listens, entropy at every token too, and how surprising the
        one behind it is."""
        model, b, count = self.model, self.buffers, self.tokens
        if self.listens:
            rstd = self._rstd(b.squares[:count])
            torch.mm(b.normed[:count], model.head.T, out=b.every[:count])
            outlook(b.every[:count], rstd[:, 0], b.tokens[:count], self.tiles, b.entropy[:count], b.following[:count])
            heads, rstd = b.every.index_select(0, b.last), rstd.index_select(0, b.last)
        else:
            heads = torch.mm(b.normed.index_select(0, b.last), model.head.T)
            rstd = self._rstd(b.squares.index_select(0, b.last))
        torch.mul(heads, rstd, out=b.logits)

    def _rstd(self, squares: Tensor) -> Tensor:
        """[tokens, 1]: 1 over the root mean square of each."""
        shape = self.model.shape
        return (squares.sum(1, keepdim=True) / shape.hidden + shape.eps).rsqrt()

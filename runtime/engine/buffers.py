"""The tensors whose addresses a captured graph holds: made once for a batch bucket, written in place ever after. What
rows keep between steps may be shared with other buckets (`lanes`).

Shape legend: B rows, D hidden, F inner, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.attention import AttentionScratch
from ..ops.norm import Norm
from ..ops.pages import PagePolicy, Pages, PageTables, Turned
from ..ops.ready import nothing_ready
from ..ops.residual import squares_of
from ..ops.resolve import Rows
from .lanes import Lanes
from .model import MEMBERS, Model
from .page_pool import Pool


@dataclass(frozen=True)
class Buffers:
    """Everything that a decode step of B rows reads and writes beside weights, adapters and pages."""

    rows: Rows
    tokens: Tensor
    """[B] long: the tokens about to be processed"""
    tables: PageTables
    """Which pages every row has, and how many tokens"""
    turned: Turned
    """What has become of pages at this step"""
    kept: PagePolicy
    """What becomes of them"""
    r: Tensor
    """[B, D] float32, the residual"""
    normed: Tensor
    """[B, D] in the model's dtype: residual times the next norm's weight"""
    squares: Tensor
    """[B, blocks] float32: sums of squares of the residual"""
    ready: Tensor
    """[modules, B, LINE] int32: how far the rows of the latest site are (`ops.ready`)"""
    y: Tensor
    """[B * widest] float32: what a linear puts out"""
    added: Tensor
    """[B * widest] float32: what adapters add to that"""
    u: Tensor
    """[B * 3 * directions] float32: of adapters A'x"""
    query: Tensor
    """[B, H, head_dim]"""
    attended: Tensor
    """[B, H * head_dim]"""
    inner: Tensor
    """[B, F]"""
    logits: Tensor
    """[B, V] float32"""
    scratch: AttentionScratch | None
    distant: Tensor
    """[probes, B, H] float32: attention mass beyond the recent pages in the layers that are listened to"""

    @classmethod
    def of(cls, model: Model, lanes: Lanes, directions: int, splits: int) -> Buffers:
        """For the rows of `lanes`, adapters of up to `directions` directions."""
        s, device, dtype, rows = model.shape, model.device, model.dtype, len(lanes)
        attended = s.heads * s.head_dim
        widest = max(attended + 2 * s.kv_heads * s.head_dim, 2 * s.inner, s.hidden)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            rows=lanes.rows,
            tokens=lanes.generated.tokens,
            tables=lanes.tables,
            turned=lanes.turned,
            kept=lanes.kept,
            r=zeros(rows, s.hidden),
            normed=zeros(rows, s.hidden, dtype=dtype),
            squares=zeros(rows, squares_of(rows, s.hidden)),
            ready=nothing_ready(len(MEMBERS) * s.layers, rows, device),
            y=zeros(rows * widest),
            added=zeros(rows * widest),
            u=zeros(rows * 3 * directions),
            query=zeros(rows, s.heads, s.head_dim, dtype=dtype),
            attended=zeros(rows, attended, dtype=dtype),
            inner=zeros(rows, s.inner, dtype=dtype),
            logits=zeros(rows, s.vocabulary),
            scratch=AttentionScratch.of(rows, s.heads, s.head_dim, splits, device) if splits > 1 else None,
            distant=lanes.distant,
        )  # fmt: skip

    def norm(self, eps: float) -> Norm:
        return Norm(self.squares, eps, self.r.shape[1])

    def outputs(self, width: int) -> Tensor:
        """[B, width] of y."""
        return self.y[: len(self.tokens) * width].view(len(self.tokens), width)

    def updates(self, width: int) -> Tensor:
        """[B, width] of what adapters add."""
        return self.added[: len(self.tokens) * width].view(len(self.tokens), width)

    def shrunk(self, members: int) -> Tensor:
        """[B, members, directions] of u."""
        rows = len(self.tokens)
        directions = len(self.u) // (3 * rows)
        return self.u[: rows * members * directions].view(rows, members, directions)

    def pages(self, pool: Pool, layer: int) -> Pages:
        return Pages(pool.memory[layer], self.tables, pool.units)

"""What all layers do in one pass, as index tensors: where the new tokens go and which pages are read from where.

`PageTable.begin` makes a `Pass` once, so that a layer's `update` is a handful of tensor operations without Python work
that grows with the length of the text, and without a sync.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .pool import device_ids


@dataclass(frozen=True)
class Read:
    """Pages of one format: `target` int64 [N] = row * pages + page in the output, `source` int64 [N] in the pool."""

    code: int
    target: Tensor
    source: Tensor
    first: int | None = None
    """Where `source` is this page and those behind it in order: they can be read where they lie."""


@dataclass(frozen=True)
class Pass:
    """What every layer does in one pass; made once on the host and copied to each device that holds layers."""

    batch: int
    pages: int
    query_tokens: int
    columns: Tensor | None
    """int64 [n] = row * query_tokens + column of the tokens that are no padding; None when none is."""
    slots: Tensor
    """int64 [n]: 16 * page + slot of these tokens in the pool of full pages."""
    fresh: Tensor | None
    """Claimed pages that this pass leaves partly unwritten and that therefore must be zeroed first."""
    reads: tuple[Read, ...]
    dense: bool
    """Every page of every row is full precision: one gather, or none, is the whole result."""

    def to(self, device: torch.device) -> Pass:
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else device_ids(x, device)

        reads = tuple(
            replace(r, target=device_ids(r.target, device), source=device_ids(r.source, device)) for r in self.reads
        )
        slots = device_ids(self.slots, device)
        return replace(self, columns=move(self.columns), slots=slots, fresh=move(self.fresh), reads=reads)

    def tensors(self) -> Iterator[Tensor]:
        yield from (x for x in (self.columns, self.slots, self.fresh) if x is not None)
        for read in self.reads:
            yield from (read.target, read.source)

"""Which logits of a blockwise forward are kept: nothing else of a block's [B, T, V] outlives the block.

Shape legend: B rows, T columns of a block, C input columns, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Columns


class LastColumns:
    """The last `keep` of C input columns, [B, keep, V]; zeros where a column is padding."""

    def __init__(self, columns: int, keep: int) -> None:
        self.keep, self.first = keep, columns - keep
        self._parts: list[Tensor] = []
        self._all: Tensor | None = None

    def add(self, columns: Columns, logits: Tensor, start: int | None) -> None:
        """Take in a block's logits [B, T, V]; `start` is its first column where none at all is padding."""
        if start is not None:
            self._parts.append(logits[:, max(0, self.first - start) :])
            return
        rows = len(logits)
        if self._all is None:
            self._all = logits.new_zeros(rows * self.keep + 1, logits.shape[-1])
        row = torch.arange(rows, device=logits.device)[:, None]
        wanted = columns.real & (columns.order >= self.first)
        # What is not kept, and padding, goes to one spare line behind the rest, which so stays contiguous.
        target = torch.where(wanted, row * self.keep + columns.order - self.first, rows * self.keep)
        self._all.index_copy_(0, target.flatten(), logits.flatten(0, 1))

    def logits(self) -> Tensor:
        """All that was kept."""
        if self._all is not None:
            return self._all[:-1].view(-1, self.keep, self._all.shape[-1])
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, 1)


class Chosen:
    """The N columns where wanted [B, C] bool holds, [N, V], row after row."""

    def __init__(self, wanted: Tensor) -> None:
        self.wanted = wanted
        self._line = (wanted.flatten().cumsum(0) - 1).view_as(wanted)
        self._all: Tensor | None = None

    def add(self, columns: Columns, logits: Tensor, start: int | None) -> None:
        """Take in a block's logits [B, T, V]."""
        if self._all is None:
            self._all = logits.new_empty(int(self.wanted.sum()), logits.shape[-1])
        here = self.wanted.gather(1, columns.order) & columns.real
        self._all[self._line.gather(1, columns.order)[here]] = logits[here]

    def logits(self) -> Tensor:
        """All that was kept."""
        assert self._all is not None, "a forward has at least one block"
        return self._all

"""The attention mask of one block over a row-relative cache: the model's own rule, at our positions.

transformers' models state which keys a query may see as a function of two indices (causal, sliding window, chunk, ...)
and leave it to the attention implementation to turn that into a mask. Ours evaluates it where slot s of a row is its
token s and every row has its own positions; a slot whose token is not kept (dropped, sparsified, never written) is
hidden. So no kind of mask is guessed from a configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """Several copies of the same texts side by side in one pass: what each slot may be seen by."""

    slots: Tensor
    """[N] long: position of the token in every slot."""
    sees: Tensor
    """[N, N] bool: whether the query of one slot may see another; itself included."""


class RowMask:
    """Makes the masks of the pass under way; transformers calls it for every kind that the model's layers use."""

    def __init__(self) -> None:
        self._pass: tuple[Tensor, Tensor, Streams | None] | None = None

    def begin(self, positions: Tensor, visible: Tensor, streams: Streams | None = None) -> None:
        """Start a pass: queries at positions [B, T] (-1: padding) over visible [B, N] slots, which are the tokens in
        order, or those of `streams`."""
        self._pass = positions, visible, streams

    def __call__(self, *args: Any, mask_function: Callable[..., Tensor], dtype: torch.dtype, **kwargs: Any) -> Tensor:
        """Additive mask [B, 1, T, N] of `dtype` for one rule `mask_function(row, head, query, slot)`, elementwise."""
        assert self._pass is not None, "begin() opens every pass"
        positions, visible, streams = self._pass
        rows = torch.arange(len(visible), device=visible.device)[:, None, None, None]
        slots = torch.arange(visible.shape[1], device=visible.device)
        # padding looks at the first token: finite, and never read
        query = positions.clamp(min=0)[:, None, :, None]
        at = slots if streams is None else streams.slots
        allowed = mask_function(rows, torch.zeros_like(rows), query, at) & visible[:, None, None]
        # Every query keeps at least itself; a fully hidden row would turn its softmax into NaN.
        itself = slots == query if streams is None else slots[:, None] == slots
        if streams is not None:
            allowed = allowed & streams.sees
        allowed = allowed | itself
        mask = torch.zeros(allowed.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)

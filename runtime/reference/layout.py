"""Input columns to positions: padding never reaches the model.

Every row's real tokens come first, in order, with padding behind them; position p of a row is slot p of its cache, so a
row in a padded batch takes the decisions it would take alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """Some columns of a layout, T of them."""

    tokens: Tensor
    """[B, T] long"""
    real: Tensor
    """[B, T] bool, padding trailing"""
    order: Tensor
    """[B, T] long: which input column each is."""
    positions: Tensor
    """[B, T] long on the host: position in the row, -1 for padding."""
    full: bool
    """None is padding."""


class Layout:
    """Input columns as positions: every row's real tokens first, padding behind them."""

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None, cached: list[int]) -> None:
        """`cached` tokens are held of every row; a mask that covers them must agree.

        Raises ValueError for a mask of another shape, or that hides everything or contradicts the cache.
        """
        rows, self.columns = input_ids.shape
        if not input_ids.numel():
            raise ValueError(
                f"input_ids: expected at least one token, got shape {list(input_ids.shape)}; pass a prompt"
            )
        self.cached, self.counts = cached, [self.columns] * rows
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = self._real(input_ids, attention_mask)
        self.dense = min(self.counts) == self.columns
        """No column is padding."""
        self.tokens, self.real = input_ids, real
        self.order = torch.arange(self.columns, device=input_ids.device).expand(rows, -1)
        if not self.dense:
            # A stable sort keeps the real tokens in order.
            self.order = (~real).long().argsort(dim=1, stable=True)
            self.tokens, self.real = input_ids.gather(1, self.order), real.gather(1, self.order)
        self.steps = max(self.counts)
        if self.steps == 0:
            raise ValueError("attention_mask: expected at least one real token, got padding alone; pass a prompt")

    def _real(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        rows = len(input_ids)
        if attention_mask.dim() != 2 or attention_mask.shape[1] < self.columns or attention_mask.shape[0] != rows:
            raise ValueError(
                f"attention_mask: expected [{rows}, at least {self.columns}], got {list(attention_mask.shape)}; "
                "pass the tokenizer's own mask"
            )
        real = attention_mask[:, -self.columns :].bool()
        behind = attention_mask[:, : -self.columns]
        # Deliberate wait, once per call: page allocation and the number of blocks are host decisions.
        self.counts, held = torch.stack([real.sum(1), behind.sum(1)]).tolist()
        if behind.shape[1] and held != self.cached:
            raise ValueError(
                "attention_mask: expected the tokens that the cache holds, got another number of them (rows that "
                "ended early were fed padding); start a new cache for the next turn"
            )
        return real

    def block(self, start: int, end: int) -> Columns:
        """The columns [start, end)."""
        steps = torch.arange(start, end)
        held, counts = torch.tensor(self.cached)[:, None], torch.tensor(self.counts)[:, None]
        positions = torch.where(steps < counts, held + steps, -1)
        part = slice(start, end)
        full = end <= min(self.counts)
        return Columns(self.tokens[:, part], self.real[:, part], self.order[:, part], positions, full)

"""Input columns to positions: padding never reaches the model.

Every row's real tokens come first, in order, with padding behind them; position p of a row is slot p of its cache, so a
row in a padded batch takes the decisions it would take alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Layout:
    """Input columns as positions: every row's real tokens first, padding behind them."""

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None, cached: Tensor) -> None:
        """`cached` [B] tokens that the cache holds of every row; a mask that covers them must agree."""
        rows, self.columns = input_ids.shape
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < self.columns or attention_mask.shape[0] != rows:
                raise ValueError(
                    f"attention_mask: expected [{rows}, at least {self.columns}], got {list(attention_mask.shape)}; "
                    "pass the tokenizer's own mask"
                )
            real = attention_mask[:, -self.columns :].bool()
        # A stable sort keeps the real tokens in order; where nothing is padded it is the identity.
        self.order = (~real).long().argsort(dim=1, stable=True)
        self.tokens, self.real = input_ids.gather(1, self.order), real.gather(1, self.order)
        # Deliberate wait, once per call: page allocation and the number of blocks are host decisions.
        counts = real.sum(1)
        wrong = torch.zeros((), dtype=torch.bool, device=counts.device)
        if attention_mask is not None and attention_mask.shape[1] > self.columns:
            wrong = (attention_mask[:, : -self.columns].sum(1) != cached).any()
        if not real.numel():
            raise ValueError(
                f"input_ids: expected at least one token, got shape {list(input_ids.shape)}; pass a prompt"
            )
        self.shortest, self.steps, mismatch = (int(n) for n in torch.stack([counts.min(), counts.max(), wrong.long()]))
        if mismatch:
            raise ValueError(
                "attention_mask: expected the tokens that the cache holds, got another number of them (rows that "
                "ended early were fed padding); start a new cache for the next turn"
            )
        if self.steps == 0:
            raise ValueError("attention_mask: expected at least one real token, got padding alone; pass a prompt")

    def block(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Tokens, real, input columns [B, end - start] each, and whether any of it is padding."""
        part = slice(start, end)
        return self.tokens[:, part], self.real[:, part], self.order[:, part], end > self.shortest

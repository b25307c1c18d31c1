"""Attention of one new token per row over its pages in plain PyTorch: what the kernel must equal.

Shape legend: B rows, H query heads, Hkv KV heads, D channels of a head, P pages of the pool, S slots a table can hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ...control.signals import distant_attention


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    recent_pages: int = 0,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k) v of every row over the tokens that it sees, computed in float32 and rounded once.

    query [B, H, D], keys and values [P, Hkv, 16, D] of one dtype, H a multiple of Hkv: query heads h * H / Hkv and on
    share KV head h; table [B, S / 16] int32 page numbers, oldest first; lengths [B] int32: tokens seen, the row's own
    included. Of them a `window` above 0 leaves the last `window`. Nothing else counts, whatever the table and the pool
    hold there; a row of length 0 sees nothing, and its output is 0.

    -> out [B, H * D] in the query's dtype; distant [B, H] float32: what of each head's softmax falls before the last
    `recent_pages` pages, that of the row's own token the last of them.
    """
    rows, heads, channels = query.shape
    shared = keys.shape[1]
    slots = torch.arange(table.shape[1] * PAGE_TOKENS, device=table.device)
    seen = slots < lengths[:, None]
    if window:
        seen &= slots >= lengths[:, None] - window
    pages = table.masked_fill(~seen.view(rows, -1, PAGE_TOKENS).any(-1), 0)
    unseen = ~seen[:, None, :, None]

    def gathered(pool: Tensor) -> Tensor:
        """[B, Hkv, S, D] float32, zeros where nothing is seen: 0 times what lies there need not be 0."""
        own = pool[pages].transpose(1, 2).reshape(rows, shared, -1, channels)
        return own.float().masked_fill(unseen, 0.0)

    scores = scale * query.view(rows, shared, -1, channels).float() @ gathered(keys).mT
    weights = scores.masked_fill(unseen.mT, -torch.inf).softmax(-1).masked_fill(unseen.mT, 0.0)
    out = (weights @ gathered(values)).to(query.dtype).view(rows, heads * channels)
    return out, distant_attention(weights.flatten(1, 2), lengths[:, None] - 1, recent_pages)

"""Attention of one new token per row over its pages in plain PyTorch, row by row: what the kernel must equal.

Shape legend: B rows, H query heads, Hkv KV heads, D channels of a head, T tokens of a row, P pages of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ...kv.formats import FULL
from ...kv.units import pages_for
from ..pages import Pages
from .pages import read_row, unpack_page


def decode_attention(
    query: Tensor, pages: Pages, *, scale: float, recent_pages: int = 0, window: int = 0
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k) v of every row over the tokens that it sees, computed in float32 and rounded once.

    query [B, H, D], H a multiple of Hkv: query heads h * H / Hkv and on share KV head h. A row sees its settled pages,
    but those that were dropped, and its live ones up to its length, its own token the last; of them a `window` above 0
    leaves the last `window` tokens. Pages in the model's dtype are in the query's, coded ones are read back into it as
    `kv.formats.decode` does. Nothing else counts, whatever the tables and the memory hold there; a row of length 0 sees
    nothing, and its output is 0.

    -> out [B, H * D] in the query's dtype; distant [B, H] float32: what of each head's softmax falls before the last
    `recent_pages` pages, that of the row's own token the last of them.

    Where pages may be coded there is no window, and no recent page is settled.
    """
    assert not (window and pages.units.coded), "which token a coded page begins with is not known"
    rows, heads, channels = query.shape
    out = torch.zeros_like(query)
    distant = torch.zeros(rows, heads, device=query.device)
    for row, length in enumerate(pages.tables.lengths.tolist()):
        if length == 0:
            continue
        keys, values = (own.float().transpose(0, 1) for own in _seen(pages, row, window, query.dtype))
        own = query[row].view(pages.units.heads, -1, channels).float()
        weights = (scale * own @ keys.mT).softmax(-1)
        out[row] = (weights @ values).flatten(0, 1).to(query.dtype)
        # What comes last is the row's last tokens, whatever has become of the pages before them.
        recent = max(0, length - PAGE_TOKENS * (pages_for(length) - recent_pages))
        distant[row] = weights[..., : max(0, keys.shape[1] - recent)].sum(-1).flatten()
    return out.flatten(1), distant


def _seen(pages: Pages, row: int, window: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [T, Hkv, D] of what a row sees, its last tokens last."""
    if not window:
        return read_row(pages.memory, pages.tables, row, pages.units, dtype)
    # Nobody keeps the pages before a window: their entries need not name units.
    length = int(pages.tables.lengths[row])
    begin = max(0, length - window)
    first = begin // PAGE_TOKENS
    numbers = pages.tables.full[row, first : pages_for(length)].long().T
    parts = unpack_page(FULL, pages.memory[numbers], pages.units, dtype)
    seen = slice(begin - PAGE_TOKENS * first, length - PAGE_TOKENS * first)
    keys, values = (parts[name].flatten(1, 2).transpose(0, 1)[seen] for name in ("keys", "values"))
    return keys, values

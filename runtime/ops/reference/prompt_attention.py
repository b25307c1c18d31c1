"""Attention of a prompt's tokens over the pages of their rows in plain PyTorch, tile by tile: what the kernel must
equal.

Shape legend: T tokens of a pass, N tiles, n tokens of one, H query heads, Hkv KV heads, D channels of a head, S tokens
that a row has keys and values of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ...kv.formats import FULL
from ...kv.units import pages_for
from ..pages import Pages
from .pages import read_row, unpack_page


def attend_prompt(
    query: Tensor, pages: Pages, tiles: Tensor, *, scale: float, recent_pages: int = 0, window: int = 0
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k) v of every token of `tiles` [N, 8] over what it sees, computed in float32 and rounded once.

    query [T, H, D], H a multiple of Hkv: query heads h * H / Hkv and on share KV head h. The token at position p of its
    row sees the row's settled pages, which all lie before the tile, but those that were dropped, and live tokens up to
    its own; a `window` above 0 leaves it the last `window` of these. Pages in the model's dtype are in the query's,
    coded ones are read back into it as `kv.formats.decode` does. Nothing else counts, whatever tables and memory hold.

    -> out [T, H * D] in the query's dtype; distant [T, H] float32: what of each head's softmax falls before the last
    `recent_pages` pages, that of the token itself the last of them. Both are 0 for tokens of no tile.

    Where pages may be coded there is no window, and no page that is recent for any token is coded or dropped.
    """
    assert not (window and pages.units.coded), "which token a coded page begins with is not known"
    out = torch.zeros_like(query)
    distant = torch.zeros(query.shape[:2], device=query.device)
    for first, count, row, position, *_ in tiles.tolist():
        if count == 0:
            continue
        own = slice(first, first + count)
        keys, values = _seen(pages, row, position, position + count, window, query.dtype)
        asked = query[own].float().unflatten(1, (pages.units.heads, -1))
        scores = scale * torch.einsum("nhgd,shd->hgns", asked, keys.float())
        # Positions of queries, and of keys as if none before them were missing: the last is that of the tile's last.
        at = torch.arange(position, position + count, device=query.device)[:, None]
        there = position + count - len(keys) + torch.arange(len(keys), device=query.device)
        sees = (there <= at) & (there > at - window) if window else there <= at
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        out[own] = torch.einsum("hgns,shd->nhgd", weights, values.float()).flatten(1, 2).to(query.dtype)
        boundary = PAGE_TOKENS * (at // PAGE_TOKENS + 1 - recent_pages)
        distant[own] = weights.masked_fill(there >= boundary, 0.0).sum(-1).flatten(0, 1).T
    return out.flatten(1), distant


def _seen(pages: Pages, row: int, position: int, end: int, window: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [S, Hkv, D] of what tokens `position` to `end` of a row see, those of the last of them last."""
    if not window:
        keys, values = read_row(pages.memory, pages.tables, row, pages.units, dtype)
        stop = len(keys) - (int(pages.tables.lengths[row]) - end)
        return keys[:stop], values[:stop]
    # Nobody keeps the pages before a window: their entries need not name units.
    begin = max(0, position + 1 - window)
    first = begin // PAGE_TOKENS
    numbers = pages.tables.full[row, first : pages_for(end)].long().T
    parts = unpack_page(FULL, pages.memory[numbers], pages.units, dtype)
    seen = slice(begin - PAGE_TOKENS * first, end - PAGE_TOKENS * first)
    keys, values = (parts[name].flatten(1, 2).transpose(0, 1)[seen] for name in ("keys", "values"))
    return keys, values

"""Parts of prompts over rows of `tests.ops.paged`, and what attention of their tokens is in fp64.

Tokens of no tile are NaN, and what is there of a row behind its part is too, as are tokens before every window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS
from runtime.ops.launch import INTERPRETED
from runtime.ops.pages import Pages
from runtime.ops.prompt.flash import Steps, attend_prompt
from runtime.ops.prompt.tiles import Part, tiles_for, tiles_of
from runtime.ops.reference import prompt_attention as reference
from tests.ops.near import check_guards, check_near, guarded, poisoned
from tests.ops.paged import Batch, Row, Seen
from tests.ops.prompt.tables import written

SPARE = 3
"""Tokens of no tile before those of the parts, and as many behind."""

Asked = tuple[str, int, int]
"""Of a part: formats of its row's settled pages, the oldest first; how many tokens there are between these and the
part; and of how many it is."""


@dataclass(frozen=True)
class Prompts:
    """A pass of parts, each of another row."""

    query: Tensor
    pages: Pages
    seen: list[Seen]
    parts: list[Part]
    tiles: Tensor
    window: int
    scale: float

    @classmethod
    def of(
        cls, asked: Sequence[Asked], group: int, channels: int, dtype: torch.dtype, device: torch.device, *,
        coded: bool, kv_heads: int = 1, window: int = 0, more_tiles: int = 2,
    ) -> Prompts:  # fmt: skip
        """Parts in the order of `asked`, their rows the other way round, and some rows between that have no part. With
        a window all parts are equally long: then nothing is there that no token sees."""
        rows: list[Row] = [(settled, between + tokens) for settled, between, tokens in asked]
        rows = [row for own in reversed(rows) for row in (own, ("", 0))]
        wide = window + asked[0][2] - 1 if window else 0
        batch = Batch.of(tuple(rows), group, channels, dtype, device, coded=coded, kv_heads=kv_heads, window=wide)
        parts = []
        for index, (settled, between, tokens) in enumerate(asked):
            row = 2 * (len(asked) - 1 - index)
            parts.append(Part(row, PAGE_TOKENS * len(settled) + between, tokens))
        # The first tokens are of nobody: as if a part without tiles came first.
        tiles = [[first + SPARE, *rest] for first, *rest in tiles_of(parts)]
        total = sum(part.tokens for part in parts) + 2 * SPARE
        random = torch.Generator().manual_seed(1)
        query = torch.full((total, kv_heads * group, channels), torch.nan)
        # wide scores: a softmax of many equal weights would hide which token is which
        query[SPARE:-SPARE] = 3 * torch.randn(total - 2 * SPARE, *query.shape[1:], generator=random)
        table = written(tiles, tiles_for(total, len(parts)) + more_tiles, device)
        return cls(guarded(query.to(device, dtype)), batch.pages, batch.seen, parts, table, window, batch.scale)

    def eager(self, dtype: torch.dtype, recent_pages: int = 0) -> tuple[Tensor, Tensor]:
        """out [T, H * D] of the tokens of all parts as PyTorch computes it in `dtype`, over pages that are read back in
        the query's, or in fp64; and distant [T, H], from a softmax in float32 or better."""
        wide = torch.promote_types(dtype, torch.float32)
        group = self.query.shape[1] // self.pages.units.heads
        outs, masses, first = [], [], SPARE
        for part in self.parts:
            own = self.seen[part.row]
            keys, values = (x.to(dtype).repeat_interleave(group, 0) for x in (own.keys, own.values))
            q = self.query[first : first + part.tokens].to(dtype).transpose(0, 1)
            at = torch.arange(part.position, part.position + part.tokens, device=q.device)[:, None]
            sees = own.positions <= at
            if self.window:
                sees &= own.positions > at - self.window
            scores = (self.scale * (q @ keys.mT)).masked_fill(~sees, float("-inf"))
            weights = scores.softmax(-1, dtype=wide)
            outs.append((weights.to(dtype) @ values).transpose(0, 1).flatten(1))
            far = own.positions < PAGE_TOKENS * (at // PAGE_TOKENS + 1 - recent_pages)
            masses.append((weights * far).sum(-1).T)
            first += part.tokens
        return torch.cat(outs), torch.cat(masses)

    def kernel(self, *, recent_pages: int | None = None, steps: Steps | None = None) -> tuple[Tensor, Tensor | None]:
        """Of the tokens of all parts; nothing of the others was written."""
        tokens, heads, channels = self.query.shape
        # Triton's interpreter cuts off what a GPU rounds, and that alone is twice PyTorch's error: round behind it.
        kind = torch.float32 if INTERPRETED else self.query.dtype
        out = poisoned(tokens, heads * channels, device=self.query.device, dtype=kind)
        distant = None if recent_pages is None else poisoned(tokens, heads, device=self.query.device)
        attend_prompt(
            self.query, self.pages, out, self.tiles, scale=self.scale, distant=distant,
            recent_pages=recent_pages or 0, window=self.window, steps=steps,
        )  # fmt: skip
        for own in (out, distant):
            if own is not None:
                check_guards(own)
                assert bool(own[:SPARE].isnan().all() & own[-SPARE:].isnan().all())
        inside = slice(SPARE, -SPARE)
        return out[inside].to(self.query.dtype), None if distant is None else distant[inside]

    def reference(self, recent_pages: int = 0) -> tuple[Tensor, Tensor]:
        out, distant = reference.attend_prompt(
            self.query, self.pages, self.tiles, scale=self.scale, recent_pages=recent_pages, window=self.window
        )
        for own in (out, distant):
            assert not own[:SPARE].any()
            assert not own[-SPARE:].any()
        return out[SPARE:-SPARE], distant[SPARE:-SPARE]

    def check(self, *outs: Tensor) -> None:
        """Every one of `outs` is as near to the truth as PyTorch, part by part: of one token PyTorch may be right by
        luck, as a score near 16 is rounded by 2^-20, and so is its weight."""
        eager, truth = self.eager(self.query.dtype)[0], self.eager(torch.float64)[0]
        tokens = [part.tokens for part in self.parts]
        for out in outs:
            for own in zip(*(x.split(tokens) for x in (out, eager, truth)), strict=True):
                check_near(*(x.reshape(1, -1) for x in own))

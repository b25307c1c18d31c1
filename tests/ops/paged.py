"""Rows whose pages lie in units dealt out at random, in all formats, and what attention over them is in fp64.

Nothing else is a number, nor a unit: all bytes that no page of a row has are 255, NaN in every dtype, and so are tokens
that no row sees; entries that nobody has written name no unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS
from runtime.kv.formats import DROPPED, FULL, INT4, INT8, decode, encode
from runtime.kv.units import Units
from runtime.ops.attention import AttentionScratch, Tiles, decode_attention
from runtime.ops.launch import INTERPRETED
from runtime.ops.pages import Pages, PageTables
from runtime.ops.reference import attention as reference
from runtime.ops.reference.pages import pack_page

from .near import check_guards, poisoned

NO_UNIT = 2**31 - 1
TINY = 2.0**-20
"""Relative to the result: scores near 16 are rounded by that in float32, and PyTorch may be lucky."""
FORMATS = {"f": FULL, "8": INT8, "4": INT4, "-": DROPPED}

Row = tuple[str, int]
"""Formats of settled pages, the oldest first, and how many tokens there are behind them; ("", 0): not in use."""


@dataclass(frozen=True)
class Seen:
    """What a row sees, in the order of its tokens, in float64: codes times scales as they are."""

    positions: Tensor
    """[T]"""
    keys: Tensor
    """[Hkv, T, D]"""
    values: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of which each sees the last `window` of its own tokens, or all of them that were not dropped."""

    query: Tensor
    pages: Pages
    seen: list[Seen]
    window: int
    scale: float

    @classmethod
    def of(
        cls, rows: tuple[Row, ...], group: int, channels: int, dtype: torch.dtype, device: torch.device, *,
        coded: bool, kv_heads: int = 1, window: int = 0,
    ) -> Batch:  # fmt: skip
        random = torch.Generator().manual_seed(0)
        units = Units(kv_heads, channels, dtype.itemsize, coded)
        most = max(len(settled) + live // PAGE_TOKENS for settled, live in rows) + 2
        tables = PageTables.of(len(rows), most, units, torch.device("cpu"))
        stored = {FULL: tables.full, INT8: tables.int8, INT4: tables.int4}
        for table in stored.values():
            table.fill_(NO_UNIT)
        order = torch.randperm(len(rows) * most * units.of(FULL), generator=random)
        memory = torch.full((len(order), kv_heads, units.head_bytes), 255, dtype=torch.uint8)
        taken, seen = 0, []
        for row, (settled, live) in enumerate(rows):
            length = PAGE_TOKENS * len(settled) + live
            begin = max(0, length - window) if window else 0
            tables.lengths[row], tables.settled[row] = length, len(settled)
            found = [(torch.empty(0, dtype=torch.long), *torch.empty(2, kv_heads, 0, channels, dtype=torch.float64))]
            for page in range(begin // PAGE_TOKENS, -(-length // PAGE_TOKENS)):
                code = FORMATS[settled[page]] if page < len(settled) else FULL
                if code == DROPPED:
                    continue
                entry = page
                if page < len(settled):
                    kind = (FULL, INT8, INT4).index(code)
                    entry = int(tables.counts[row, kind])
                    tables.counts[row, kind] += 1
                token = PAGE_TOKENS * page + torch.arange(PAGE_TOKENS)
                there = (begin <= token) & (token < length)
                keys, values = numbers(2, kv_heads, 1, PAGE_TOKENS, channels, random=random).to(dtype)
                keys[:, :, ~there] = values[:, :, ~there] = torch.nan
                parts = encode(code, keys, values)
                own = order[taken : taken + units.of(code)]
                taken += len(own)
                unowned = ~owned(code, units)[:, None, None]
                memory[own[:, None]] = pack_page(code, parts, units).masked_fill(unowned, 255)
                stored[code][row, entry] = own.int()
                read = decode(code, parts, (torch.float64, torch.float64))
                found.append((token[there], *(x.double()[:, 0, there] for x in read)))
            positions, keys, values = zip(*found, strict=True)
            cat = torch.cat(positions), torch.cat(keys, 1), torch.cat(values, 1)
            seen.append(Seen(*(x.to(device) for x in cat)))
        # wide scores: a softmax of many equal weights would hide which token is which
        query = 3 * torch.randn(len(rows), kv_heads * group, channels, generator=random)
        there = PageTables(*(own.to(device) for own in vars(tables).values()))
        pages = Pages(memory.to(device), there, units)
        return cls(query.to(device, dtype), pages, seen, window, 0.9 / math.sqrt(channels))

    def moved(self, units: int) -> Batch:
        """The same with so many units before its own, of which none is touched."""
        own, tables = self.pages.memory, self.pages.tables
        memory = torch.empty(units + len(own), *own.shape[1:], dtype=torch.uint8, device=own.device)
        memory[units:] = own
        full, int8, int4 = (torch.where(x == NO_UNIT, x, x + units) for x in (tables.full, tables.int8, tables.int4))
        tables = replace(tables, full=full, int8=int8, int4=int4)
        return replace(self, pages=replace(self.pages, memory=memory, tables=tables))

    def eager(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out [B, H * D] as PyTorch computes it in `dtype` over pages that are read back in the query's, or in fp64;
        the softmax [B, H, S] by tokens in float32 or better."""
        rows, heads, _ = self.query.shape
        out = torch.zeros_like(self.query, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        softmax = torch.zeros(rows, heads, int(self.pages.tables.lengths.max()), dtype=wide, device=out.device)
        for row, own in enumerate(self.seen):
            if len(own.positions) == 0:
                continue
            group = heads // self.pages.units.heads
            keys, values = (x.to(dtype).repeat_interleave(group, 0) for x in (own.keys, own.values))
            scores = self.scale * (self.query[row, :, None].to(dtype) @ keys.mT)
            weights = scores.softmax(-1, dtype=wide)
            out[row] = (weights.to(dtype) @ values)[:, 0]
            softmax[row][:, own.positions] = weights[:, 0]
        return out.flatten(1), softmax

    def kernel(
        self, splits: int, *, tiles: Tiles | None = None, recent_pages: int | None = None,
        scratch: AttentionScratch | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        rows, heads, channels = self.query.shape
        device = self.query.device
        # Triton's interpreter cuts off what a GPU rounds, and that alone is twice PyTorch's error: round behind it.
        kind = torch.float32 if INTERPRETED else self.query.dtype
        out = poisoned(rows, heads * channels, device=device, dtype=kind)
        distant = None if recent_pages is None else poisoned(rows, heads, device=device)
        decode_attention(
            self.query, self.pages, out, scratch or scratch_of(rows, heads, channels, splits, device), splits=splits,
            scale=self.scale, distant=distant, recent_pages=recent_pages or 0, window=self.window, tiles=tiles,
        )  # fmt: skip
        check_guards(*(own for own in (out, distant) if own is not None))
        return out.to(self.query.dtype), distant

    def reference(self, recent_pages: int = 0) -> tuple[Tensor, Tensor]:
        return reference.decode_attention(
            self.query, self.pages, scale=self.scale, recent_pages=recent_pages, window=self.window
        )

    def check(self, out: Tensor) -> None:
        """`out` is as near to the truth as what PyTorch computes in the same dtype."""
        truth, _ = self.eager(torch.float64)
        allowed = 2 * (self.eager(out.dtype)[0] - truth).norm(dim=1) + TINY * truth.norm(dim=1)
        error = (out - truth).norm(dim=1)
        assert bool((error <= allowed).all()), (error / truth.norm(dim=1), allowed / truth.norm(dim=1))


def numbers(*shape: int, random: torch.Generator) -> Tensor:
    """Keys or values [..., 16, D] that differ in size from token to token and channel to channel; some scales are 0."""
    x = torch.randn(shape, generator=random)
    x *= torch.empty(*shape[:-1], 1).uniform_(0.5, 1.5, generator=random)
    x *= torch.empty(*shape[:-2], 1, shape[-1]).uniform_(0.5, 1.5, generator=random)
    x[..., 3, :] = x[..., :, 1] = 0.0
    return x


def owned(code: int, units: Units) -> Tensor:
    """Bytes of a head that a page in some format has, of each of its units [k, head_bytes]: the table of `kv.units`."""
    there = torch.zeros(units.of(code), units.head_bytes, dtype=torch.bool)
    if code == FULL:
        there[:, : 2 * units.part_tokens * units.channels * units.itemsize] = True
        return there
    there[:, : 16 * units.channels] = True
    there[0, 16 * units.channels : 18 * units.channels] = True
    there[-1, 18 * units.channels : 18 * units.channels + 32] = True
    return there


def scratch_of(rows: int, heads: int, channels: int, splits: int, device: torch.device) -> AttentionScratch:
    return spoiled(AttentionScratch.of(rows, heads, channels, splits, device))


def spoiled(scratch: AttentionScratch) -> AttentionScratch:
    scratch.sums.fill_(torch.nan)
    scratch.softmax.fill_(torch.nan)
    return scratch

"""Decode attention, kernel and reference against loops over tokens in fp64. What must not be read is NaN or no page."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS
from runtime.control.signals import distant_attention
from runtime.ops.attention import AttentionScratch, Tiles, decode_attention
from runtime.ops.reference import attention as reference

LENGTHS = (100, 0, 1, 15, 16, 17, 63)
NO_PAGE = 2**31 - 1
TINY = 2.0**-20
"""Relative to the result: scores near 16 are rounded by that in float32, and PyTorch may be lucky."""
TILES = {16: Tiles(16, warps=4, stages=3), 64: Tiles(64, warps=4, stages=5)}


@dataclass(frozen=True)
class Batch:
    """Rows of which each sees the last `window` of its own tokens, or all of them, in pages dealt out at random."""

    query: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor
    window: int
    scale: float

    @classmethod
    def of(
        cls, group: int, channels: int, dtype: torch.dtype, device: torch.device, *, lengths: tuple[int, ...] = LENGTHS,
        kv_heads: int = 1, window: int = 0,
    ) -> Batch:  # fmt: skip
        random = torch.Generator().manual_seed(0)
        most = max(lengths) // PAGE_TOKENS + 2
        order = torch.randperm(len(lengths) * most, generator=random).tolist()
        table = torch.full((len(lengths), most), NO_PAGE, dtype=torch.int32)
        keys, values = torch.full((2, len(order), kv_heads, PAGE_TOKENS, channels), torch.nan)
        for row, length in enumerate(lengths):
            for token in range(max(0, length - window) if window else 0, length):
                page, slot = divmod(token, PAGE_TOKENS)
                if table[row, page] == NO_PAGE:
                    table[row, page] = order.pop()
                for pool in (keys, values):
                    pool[table[row, page], :, slot] = torch.randn(kv_heads, channels, generator=random)
        # wide scores: a softmax of many equal weights would hide which token is which
        query = 3 * torch.randn(len(lengths), kv_heads * group, channels, generator=random)
        query, keys, values = (x.to(device, dtype) for x in (query, keys, values))
        counts = torch.tensor(lengths, dtype=torch.int32, device=device)
        return cls(query, keys, values, table.to(device), counts, window, 0.9 / math.sqrt(channels))

    def tokens(self, row: int) -> tuple[int, Tensor, Tensor]:
        """The first token that the row sees, and keys and values [H, T, D] of all that it sees, query head by head."""
        length = int(self.lengths[row])
        first = max(0, length - self.window) if self.window else 0
        places = [divmod(token, PAGE_TOKENS) for token in range(first, length)]
        group = self.query.shape[1] // self.keys.shape[1]
        keys, values = (
            torch.stack([pool[self.table[row, page], :, slot] for page, slot in places], 1).repeat_interleave(group, 0)
            for pool in (self.keys, self.values)
        )
        return first, keys, values

    def eager(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out [B, H * D] as PyTorch computes it in `dtype`, row by row; the softmax [B, H, S] in float32 or better."""
        rows, heads, _ = self.query.shape
        out = torch.zeros_like(self.query, dtype=dtype)
        slots = self.table.shape[1] * PAGE_TOKENS
        softmax = torch.zeros(rows, heads, slots, dtype=torch.promote_types(dtype, torch.float32), device=out.device)
        for row in self.lengths.nonzero()[:, 0].tolist():
            first, keys, values = self.tokens(row)
            scores = self.scale * (self.query[row, :, None].to(dtype) @ keys.to(dtype).mT)
            weights = scores.softmax(-1, dtype=softmax.dtype)
            out[row] = (weights.to(dtype) @ values.to(dtype))[:, 0]
            softmax[row, :, first : first + keys.shape[1]] = weights[:, 0]
        return out.flatten(1), softmax

    def kernel(
        self, splits: int, *, tokens: int = 0, recent_pages: int | None = None, scratch: AttentionScratch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        rows, heads, channels = self.query.shape
        device = self.query.device
        out = torch.full((rows, heads * channels), torch.nan, dtype=self.query.dtype, device=device)
        distant = None if recent_pages is None else torch.full((rows, heads), torch.nan, device=device)
        decode_attention(
            self.query, self.keys, self.values, self.table, self.lengths, out,
            scratch or poisoned(AttentionScratch.of(rows, heads, channels, splits, device)),
            splits=splits, scale=self.scale, distant=distant, recent_pages=recent_pages or 0, window=self.window,
            tiles=TILES.get(tokens),
        )  # fmt: skip
        return out, distant

    def reference(self, recent_pages: int = 0) -> tuple[Tensor, Tensor]:
        return reference.decode_attention(
            self.query, self.keys, self.values, self.table, self.lengths, scale=self.scale, recent_pages=recent_pages,
            window=self.window,
        )  # fmt: skip

    def check(self, out: Tensor) -> None:
        """`out` is as near to the truth as what PyTorch computes in the same dtype."""
        truth, _ = self.eager(torch.float64)
        allowed = 2 * (self.eager(out.dtype)[0] - truth).norm(dim=1) + TINY * truth.norm(dim=1)
        error = (out - truth).norm(dim=1)
        assert bool((error <= allowed).all()), (error / truth.norm(dim=1), allowed / truth.norm(dim=1))


def poisoned(scratch: AttentionScratch) -> AttentionScratch:
    scratch.sums.fill_(torch.nan)
    scratch.softmax.fill_(torch.nan)
    return scratch


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize(("group", "channels"), [(1, 32), (1, 80), (2, 64), (7, 96)])
def test_rows_of_all_lengths(group, channels, splits, dtype, device):
    batch = Batch.of(group, channels, dtype, device)
    batch.check(batch.kernel(splits)[0])
    batch.check(batch.reference()[0])


@pytest.mark.parametrize(("group", "channels"), [(1, 128), (1, 256), (4, 128), (8, 256), (24, 64)])
def test_heads_of_all_shapes(group, channels, device):
    batch = Batch.of(group, channels, torch.bfloat16, device, lengths=(65, 17), kv_heads=3)
    batch.check(batch.kernel(3)[0])
    batch.check(batch.reference()[0])


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("tokens", TILES)
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_shares_of_many_steps_and_of_part_of_one(splits, tokens, group, device):
    batch = Batch.of(group, 32, torch.float32, device, lengths=(207, 97, 33), kv_heads=2)
    batch.check(batch.kernel(splits, tokens=tokens)[0])


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("window", [1, 16, 23, 50])
@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_before_the_window_is_read(splits, window, group, device):
    batch = Batch.of(group, 32, torch.float32, device, window=window)
    batch.check(batch.kernel(splits, tokens=16)[0])
    batch.check(batch.reference()[0])


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("splits", "recent_pages", "window"), [(1, 1, 0), (3, 2, 0), (8, 3, 0), (3, 0, 0), (3, 2, 50)])
def test_distant_mass_is_that_of_the_signal(splits, recent_pages, window, group, device):
    batch = Batch.of(group, 32, torch.float32, device, window=window)
    softmax = batch.eager(torch.float64)[1]
    # The signal takes the mean over heads first; of each head alone it is the same sum.
    wanted = distant_attention(softmax, batch.lengths[:, None] - 1, recent_pages)
    assert wanted.max() > 0.1
    out, distant = batch.kernel(splits, tokens=16, recent_pages=recent_pages)
    batch.check(out)
    for found in (distant, batch.reference(recent_pages)[1]):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [1, 4])
def test_launches_share_a_scratch(group, device):
    batch = Batch.of(group, 32, torch.float32, device, lengths=(100, 48), kv_heads=2)
    rows, heads, channels = batch.query.shape
    scratch = AttentionScratch.of(rows, heads, channels, 3, device)
    found = []
    for _ in range(2):
        found.append(batch.kernel(3, recent_pages=1, scratch=poisoned(scratch)))
        assert not scratch.arrived.any()
        # All three shares of all heads are at work, each in a place of its own.
        assert not scratch.sums.isnan().any()
        assert not scratch.softmax.isnan().any()
    for first, again in zip(*found, strict=True):
        torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_a_batch_that_is_not_in_use(device):
    batch = Batch.of(2, 32, torch.float32, device, lengths=(0, 0))
    for out, distant in (batch.kernel(3, recent_pages=1), batch.reference(1)):
        assert not out.any()
        assert not distant.any()


@pytest.mark.parametrize("group", [1, 4])
def test_scores_far_from_zero(group, device):
    batch = Batch.of(group, 32, torch.float32, device)
    batch.query.mul_(100)
    # Near 1000 scores are rounded by 1e-4, and weights by as much of themselves.
    torch.testing.assert_close(batch.kernel(3)[0].double(), batch.eager(torch.float64)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_pool_of_more_than_31_bits(device):
    pages, channels = 2**20 + 1, 128
    pool = torch.empty(pages, 1, PAGE_TOKENS, channels, dtype=torch.bfloat16, device=device)
    pool[-1] = torch.randn(PAGE_TOKENS, channels, device=device)
    table = torch.tensor([[pages - 1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([PAGE_TOKENS], dtype=torch.int32, device=device)
    query = torch.randn(1, 1, channels, dtype=torch.bfloat16, device=device)
    batch = Batch(query, pool, pool, table, lengths, window=0, scale=0.1)
    batch.check(batch.kernel(1)[0])

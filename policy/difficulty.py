"""Token difficulty: how much more than an average token one needs of an adapter, by its id and by the pair it ends.

Two tables of one byte an entry: the damage that low rungs do at a token, over what they do on average, as learned from
text (`training.targets.token_difficulty`). They belong to one adapter and are stored with its ladder; a policy carries
their mean over the adapters that it was trained on, for one that has none. Looking up depends on the tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEUTRAL = 127
"""The code of an average token: the value 0.5."""
MOST_CODE = 254
SPAN_NATS = 8.0
"""Values 0 to 1 are this many nats of the ratio's logarithm: 0.5 is 1, the ends are exp(-4) and exp(4)."""
PAIRS = 2**16
"""Entries of the table of pairs, into which pairs are hashed."""
HASH_BEFORE = 1_000_003
"""What `hashed_pairs` multiplies a pair's first id by."""
HASH_TOKEN = 8_191
"""And its second."""
HASH_MODULUS = 2**31 - 1
"""A prime, by which the hash is taken before the number of entries."""


@dataclass(frozen=True)
class Difficulty:
    """Both tables of one adapter, or side by side those of several."""

    token: Tensor
    """[..., V] uint8 codes, by token id"""
    pair: Tensor
    """[..., P] uint8 codes, by `hashed_pairs`: what the pair adds to its second token"""

    @classmethod
    def neutral(cls, vocabulary: int = 1, pairs: int = 1, device: torch.device | None = None) -> Difficulty:
        """Tables in which every token is average, made where they are wanted (default: on the host)."""
        sizes = (vocabulary, pairs)
        return cls(*(torch.full((size,), NEUTRAL, dtype=torch.uint8, device=device) for size in sizes))

    @classmethod
    def of(cls, token: Tensor, pair: Tensor) -> Difficulty:
        """From ratios to the average, [V] and [P], above 0."""
        return cls(_codes(token), _codes(pair))

    @classmethod
    def mean(cls, parts: Sequence[Difficulty]) -> Difficulty:
        """The mean tables of several adapters."""
        token, pair = (torch.stack([getattr(own, name) for own in parts]).float() for name in ("token", "pair"))
        return cls(*(table.mean(0).round().to(torch.uint8) for table in (token, pair)))

    @classmethod
    def stack(cls, parts: Sequence[Difficulty]) -> Difficulty:
        """[A, V] and [A, P] of A adapters; where one has fewer entries than others it is all neutral there."""
        return cls(*(_stacked([getattr(own, name) for own in parts]) for name in ("token", "pair")))

    def to(self, device: torch.device) -> Difficulty:
        return Difficulty(self.token.to(device), self.pair.to(device))

    def select(self, adapter: Tensor) -> Difficulty:
        """The tables of every row: adapter [B] long -> [B, V] and [B, P]."""
        index = adapter.to(self.token.device)
        return Difficulty(self.token[index], self.pair[index])

    def values(self, before: Tensor, tokens: Tensor) -> Tensor:
        """[B, T, 2] float32 in [0, 1] of tokens [B, T] that follow `before` [B, T], ids below 0 where there is none.

        Every row reads its own tables, [B, V] and [B, P]. An id beyond the table is average, and so is the pair of a
        token that nothing comes before.
        """
        return torch.stack([_read(self.token, tokens), self._pairs(before, tokens)], -1)

    def _pairs(self, before: Tensor, tokens: Tensor) -> Tensor:
        # Not by the table's own size: beside a larger one it is padded, and its entries stay where they are.
        index = hashed_pairs(before, tokens, PAIRS)
        return _read(self.pair, torch.where((before < 0) | (tokens < 0), -1, index))


def hashed_pairs(before: Tensor, tokens: Tensor, entries: int) -> Tensor:
    """Entry of every pair of ids in a table of `entries`: tensors long of one shape."""
    return ((before * HASH_BEFORE + tokens * HASH_TOKEN + 1) % HASH_MODULUS) % entries


def _codes(ratio: Tensor) -> Tensor:
    value = 0.5 + ratio.double().log() / SPAN_NATS
    return (value.clamp(0, 1) * MOST_CODE).round().to(torch.uint8)


def _read(table: Tensor, index: Tensor) -> Tensor:
    """Values of table [B, N] at index [B, T]; outside of it that of an average token."""
    there = (index >= 0) & (index < table.shape[1])
    codes = table.gather(1, index.clamp(0, table.shape[1] - 1))
    return torch.where(there, codes, NEUTRAL).float() / MOST_CODE


def _stacked(tables: Sequence[Tensor]) -> Tensor:
    size = max(len(table) for table in tables)
    return torch.stack([torch.nn.functional.pad(table, (0, size - len(table)), value=NEUTRAL) for table in tables])

"""How pages of every format lie in units of memory, all of one size: what one page gives back any other can use.

A page in the model's dtype takes several units, one in int8 two, one in int4 one, and they may lie anywhere. So nothing
fragments, and how many units are free is all that there is to know about room. The price is an eighth of the room of a
page in the model's dtype, as scales have to fit into a unit. Where no page is ever coded a unit is a page.

A unit is [Hkv, head_bytes] of a layer. Of a head:

    bytes              in the model's dtype          int8                    int4
    [0, 16 D)          some tokens' keys, then       16 tokens               8 rows of keys, 8 of values
                       their values
    [16 D, 18 D)                                     bf16 scales of keys     bf16 scales of keys
    [18 D, 18 D + 32)                                bf16 scales of values   bf16 scales of values

Of the two units in int8 the first has keys, the second values; int4 has both in its one, token t in the low half of
byte row t and token t + 8 in the high half. Codes and scales are those of `kv.formats`, but no code is negative: int8
is stored as code + 128, int4 as code + 8, and scales of values lie in the order of tokens 0, 8, 1, 9 and on, so that
one word has those of one byte row of int4.

Shape legend: Hkv KV heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from policy.settings import PAGE_TOKENS

from .formats import DROPPED, FULL, INT4, INT8

CODED = (INT8, INT4)
"""Formats with scales."""


@dataclass(frozen=True)
class Units:
    """Units of a model's pages."""

    heads: int
    """Hkv"""
    channels: int
    """D, a multiple of 4"""
    itemsize: int
    """Bytes of a number of the model's dtype: 2 or 4"""
    coded: bool = True
    """Whether any page may be coded: scales need room"""

    @property
    def part_tokens(self) -> int:
        """Tokens of which one unit of a page in the model's dtype has keys and values."""
        return PAGE_TOKENS // self.of(FULL)

    @property
    def head_bytes(self) -> int:
        """A multiple of 16."""
        if not self.coded:
            return 2 * PAGE_TOKENS * self.channels * self.itemsize
        scales = 2 * self.channels + 2 * PAGE_TOKENS
        return PAGE_TOKENS * self.channels + -(-scales // 16) * 16

    @property
    def bytes(self) -> int:
        """Of one unit, in one layer."""
        return self.heads * self.head_bytes

    def of(self, code: int) -> int:
        """Units of a page in a format. Raises KeyError for one that has none."""
        coded = {INT8: 2, INT4: 1} if self.coded else {}
        return ({FULL: 2 * self.itemsize if self.coded else 1, DROPPED: 0} | coded)[code]

    def page_bytes(self, code: int) -> int:
        """What a page has in a format, scales included, without the room around it."""
        numbers = PAGE_TOKENS * self.heads * self.channels
        if code == FULL:
            return 2 * numbers * self.itemsize
        scales = 2 * self.heads * (self.channels + PAGE_TOKENS)
        return {INT8: 2 * numbers + scales, INT4: numbers + scales, DROPPED: 0}[code]


def pages_for(tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // PAGE_TOKENS)

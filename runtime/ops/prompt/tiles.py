"""Parts of prompts that go through the model together: tokens of several rows, one row's behind another's.

Kernels cut them into tiles, each of one row. What they must know of a tile is in device tensors, so the launches of a
pass are the same whatever is in it, and a graph can hold them.

Shape legend: T tokens of a pass, N tiles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import triton
import triton.language as tl

TILE = 128
"""Tokens of a tile, at most"""
FIELDS = 8
"""Numbers of a tile: where its first token is among the T, how many tokens it has (0: it is not in use), the row that
they are of, the position there of the first, and the factors that its row reads (`dense`), -1 for none."""
FIRST, COUNT, ROW, POSITION, FACTORS = range(5)

_TILE: tl.constexpr = tl.constexpr(TILE)
_FIELDS: tl.constexpr = tl.constexpr(FIELDS)


@dataclass(frozen=True)
class Part:
    """Tokens of one row that follow each other."""

    row: int
    position: int
    """Of the first of them in the row"""
    tokens: int
    factors: int = -1
    """Number of the factors that the row reads; -1: no adapter"""


def tiles_of(parts: Iterable[Part]) -> list[list[int]]:
    """Of every tile its numbers; the parts' tokens lie one behind the other."""
    found, first = [], 0
    for part in parts:
        for start in range(0, part.tokens, TILE):
            count = min(TILE, part.tokens - start)
            found.append([first + start, count, part.row, part.position + start, part.factors, 0, 0, 0])
        first += part.tokens
    return found


def tiles_for(tokens: int, parts: int) -> int:
    """Tiles that so many tokens of so many parts take at most."""
    return triton.cdiv(tokens, TILE) + parts - 1


@triton.jit
def tile_of(tiles, tile):
    """A tile's numbers: first, count, row, position and factors."""
    own = tiles + tile * _FIELDS
    return tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3), tl.load(own + 4)

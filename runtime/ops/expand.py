"""rstd * (y + B'u) + bias: what a linear puts out, and a row's own adapter adds. Part of the kernel that consumes it.

So no expand has a launch of its own: `residual`, `gated` and `rotary` do it, each in the same four steps:

    tiles = fetched(...)      the first directions of every format, on their way before the kernel before has ended
    wait
    factors(...), settled(...)      u and y, which that kernel writes
    added(...)                and whatever directions have not been fetched

One program handles a row and a few blocks of columns, of each of which all directions lie in one stretch of the arena,
the active ones first. The four quarters of a block are four vectors, which is how packed codes come (`packed`).

Shape legend: B rows, R directions at most, K directions of a tile, L columns of one quarter of its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .packed import ROWS, block_rows, eight_bits, ends_of, four_bits, number, two_bits
from .shrink import Shrink

_ROWS: tl.constexpr = tl.constexpr(ROWS)


@triton.jit
def _whole_tile(base, at, direction, end, real, QUARTER: tl.constexpr):
    """Four quarters [K, L] of directions below `end`, values at 16 bits or bytes at 8; base points to direction 0 and
    at [L] says where in it."""
    mask = (direction < end)[:, None] & real[None, :]
    place = base + (direction[:, None] * (4 * QUARTER) + at[None, :])
    v0 = tl.load(place, mask=mask, other=0)
    v1 = tl.load(place + QUARTER, mask=mask, other=0)
    v2 = tl.load(place + 2 * QUARTER, mask=mask, other=0)
    return v0, v1, v2, tl.load(place + 3 * QUARTER, mask=mask, other=0)


@triton.jit
def _four_tile(base, at, direction, end, real, QUARTER: tl.constexpr):
    """Bytes at 4 bits: of the first and third quarter, and of the second and last."""
    mask = (direction < end)[:, None] & real[None, :]
    place = base + (direction[:, None] * (2 * QUARTER) + at[None, :])
    return tl.load(place, mask=mask, other=0), tl.load(place + QUARTER, mask=mask, other=0)


@triton.jit
def _two_tile(base, at, direction, end, real, QUARTER: tl.constexpr):
    """Bytes at 2 bits, of all quarters."""
    mask = (direction < end)[:, None] & real[None, :]
    return tl.load(base + (direction[:, None] * QUARTER + at[None, :]), mask=mask, other=0)


@triton.jit
def _factor(u, direction, end):
    """u [K] of directions below `end`; of others 0, whatever their codes seem to be."""
    return tl.load(u + direction, mask=direction < end, other=0.0)


@triton.jit
def _sums(a0, a1, a2, a3, factor, v0, v1, v2, v3):
    """The four accumulators and a tile of values by their factor."""
    return a0 + factor[:, None] * v0, a1 + factor[:, None] * v1, a2 + factor[:, None] * v2, a3 + factor[:, None] * v3


@triton.jit
def _add_four(a0, a1, a2, a3, factor, low, high, levels, KIND: tl.constexpr):
    v0, v1, v2, v3 = four_bits(low, high, levels, KIND)
    return _sums(a0, a1, a2, a3, factor, v0, v1, v2, v3)


@triton.jit
def _add_two(a0, a1, a2, a3, factor, byte, levels, KIND: tl.constexpr):
    v0, v1, v2, v3 = two_bits(byte, levels, KIND)
    return _sums(a0, a1, a2, a3, factor, v0, v1, v2, v3)


@triton.jit
def _add_wide(a0, a1, a2, a3, factor, v0, v1, v2, v3):
    return _sums(
        a0, a1, a2, a3, factor, v0.to(tl.float32), v1.to(tl.float32), v2.to(tl.float32), v3.to(tl.float32)
    )  # fmt: skip


@triton.jit
def _add_eight(a0, a1, a2, a3, factor, b0, b1, b2, b3, levels):
    v0, v1, v2, v3 = eight_bits(b0, b1, b2, b3, levels)
    return _sums(a0, a1, a2, a3, factor, v0, v1, v2, v3)


@triton.jit
def _zeros(K: tl.constexpr, L: tl.constexpr):
    zeros = tl.zeros([K, L], tl.float32)
    return zeros, zeros, zeros, zeros


@triton.jit
def _with(y0, y1, y2, y3, a0, a1, a2, a3):
    return y0 + tl.sum(a0, axis=0), y1 + tl.sum(a1, axis=0), y2 + tl.sum(a2, axis=0), y3 + tl.sum(a3, axis=0)


@triton.jit
def _start(arena, record, block, FORMAT: tl.constexpr, BYTES: tl.constexpr):
    """Pointer to direction 0 of block 0 of B' at a format, a row of which is BYTES long in a block, and where blocks
    [L] begin from there, in bytes."""
    return block_rows(arena, record, 0, FORMAT, BYTES), block * (number(record, _ROWS + FORMAT) * BYTES)


@triton.jit
def lanes(four, QUARTER: tl.constexpr, L: tl.constexpr):
    """Of L lanes the number of their block among a program's, and their place in a quarter of it.

    `four` is 4: a number that the compiler does not know, so that a thread takes four columns of several directions,
    and not sixteen of one, and has less to share with others when directions are summed.
    """
    lane = tl.arange(0, L)
    if QUARTER % 4 == 0:
        group = lane // 4
        inner = tl.multiple_of(group % (QUARTER // 4) * four + lane % 4, 4)
        return group // (QUARTER // 4), inner
    else:
        return lane // QUARTER, lane % QUARTER


@triton.jit
def fetched(
    record, arena, block, inner, real, KIND: tl.constexpr, QUARTER: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    FINE: tl.constexpr,
):  # fmt: skip
    """Tiles of the first directions of every format, at places `inner` of blocks number `block` [L]."""
    WIDTH: tl.constexpr = 4 * QUARTER
    end16, end8, end4, end2 = ends_of(record)
    k = tl.arange(0, K)
    base, at = _start(arena, record, block, 2, WIDTH // 2)
    low, high = _four_tile(base, at + inner, end8 + k, end4, real, QUARTER)
    base, at = _start(arena, record, block, 3, WIDTH // 4)
    byte = _two_tile(base, at + inner, end4 + k, end2, real, QUARTER)
    base, at = _start(arena, record, block, 1, WIDTH)
    b0, b1, b2, b3 = _whole_tile(base, at + inner, end16 + tl.arange(0, FINE), end8, real, QUARTER)
    SIZE: tl.constexpr = KIND.primitive_bitwidth // 8
    base, at = _start(arena, record, block, 0, WIDTH * SIZE)
    wide = base.to(tl.pointer_type(KIND))
    w0, w1, w2, w3 = _whole_tile(wide, at // SIZE + inner, tl.arange(0, WIDE), end16, real, QUARTER)
    return w0, w1, w2, w3, b0, b1, b2, b3, low, high, byte


@triton.jit
def factors(u, record, K: tl.constexpr, WIDE: tl.constexpr, FINE: tl.constexpr):
    """u of the directions that have been fetched; after the wait."""
    end16, end8, end4, end2 = ends_of(record)
    k = tl.arange(0, K)
    return (
        _factor(u, tl.arange(0, WIDE), end16), _factor(u, end16 + tl.arange(0, FINE), end8),
        _factor(u, end8 + k, end4), _factor(u, end4 + k, end2),
    )  # fmt: skip


@triton.jit
def quarters(pointer, column, width, real, QUARTER: tl.constexpr):
    """Four vectors [L] from `column` on, float32; 0 beyond `width`."""
    at = pointer + column
    y0 = tl.load(at, mask=real, other=0.0).to(tl.float32)
    y1 = tl.load(at + QUARTER, mask=real & (column + QUARTER < width), other=0.0).to(tl.float32)
    y2 = tl.load(at + 2 * QUARTER, mask=real & (column + 2 * QUARTER < width), other=0.0).to(tl.float32)
    y3 = tl.load(at + 3 * QUARTER, mask=real & (column + 3 * QUARTER < width), other=0.0).to(tl.float32)
    return y0, y1, y2, y3


@triton.jit
def settled(y, rstd, bias, column, width, real, BIAS: tl.constexpr, QUARTER: tl.constexpr):
    """rstd * y + bias, four quarters [L] from `column` on; 0 beyond `width`."""
    y0, y1, y2, y3 = quarters(y, column, width, real, QUARTER)
    y0 *= rstd
    y1 *= rstd
    y2 *= rstd
    y3 *= rstd
    if BIAS:
        b0, b1, b2, b3 = quarters(bias, column, width, real, QUARTER)
        y0 += b0
        y1 += b1
        y2 += b2
        y3 += b3
    return y0, y1, y2, y3


@triton.jit
def added(
    y0, y1, y2, y3, tiles, factor, rstd, u, record, arena, levels, block, inner, real, KIND: tl.constexpr,
    QUARTER: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, FINE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """y + rstd * B'u: of what has been fetched, and of what has not."""
    WIDTH: tl.constexpr = 4 * QUARTER
    end16, end8, end4, end2 = ends_of(record)
    k = tl.arange(0, K)
    if end16 > 0:
        a0, a1, a2, a3 = _zeros(WIDE, L)
        SIZE: tl.constexpr = KIND.primitive_bitwidth // 8
        base, at = _start(arena, record, block, 0, WIDTH * SIZE)
        wide = base.to(tl.pointer_type(KIND))
        w0, w1, w2, w3 = tiles[0], tiles[1], tiles[2], tiles[3]
        own = factor[0]
        for start in range(WIDE, end16 + WIDE, WIDE):
            direction = start + tl.arange(0, WIDE)
            n0, n1, n2, n3 = _whole_tile(wide, at // SIZE + inner, direction, end16, real, QUARTER)
            following = _factor(u, direction, end16)
            a0, a1, a2, a3 = _add_wide(a0, a1, a2, a3, rstd * own, w0, w1, w2, w3)
            w0, w1, w2, w3 = n0, n1, n2, n3
            own = following
        y0, y1, y2, y3 = _with(y0, y1, y2, y3, a0, a1, a2, a3)
    if end8 > end16:
        a0, a1, a2, a3 = _zeros(FINE, L)
        base, at = _start(arena, record, block, 1, WIDTH)
        b0, b1, b2, b3 = tiles[4], tiles[5], tiles[6], tiles[7]
        own = factor[1]
        for start in range(end16 + FINE, end8 + FINE, FINE):
            direction = start + tl.arange(0, FINE)
            n0, n1, n2, n3 = _whole_tile(base, at + inner, direction, end8, real, QUARTER)
            following = _factor(u, direction, end8)
            a0, a1, a2, a3 = _add_eight(a0, a1, a2, a3, rstd * own, b0, b1, b2, b3, levels)
            b0, b1, b2, b3 = n0, n1, n2, n3
            own = following
        y0, y1, y2, y3 = _with(y0, y1, y2, y3, a0, a1, a2, a3)
    if end2 > end8:
        a0, a1, a2, a3 = _zeros(K, L)
        base, at = _start(arena, record, block, 2, WIDTH // 2)
        low, high = tiles[8], tiles[9]
        own = factor[2]
        for start in range(end8 + K, end4 + K, K):
            low_ahead, high_ahead = _four_tile(base, at + inner, start + k, end4, real, QUARTER)
            following = _factor(u, start + k, end4)
            a0, a1, a2, a3 = _add_four(a0, a1, a2, a3, rstd * own, low, high, levels, KIND)
            low, high = low_ahead, high_ahead
            own = following
        base, at = _start(arena, record, block, 3, WIDTH // 4)
        byte = tiles[10]
        own = factor[3]
        for start in range(end4 + K, end2 + K, K):
            ahead = _two_tile(base, at + inner, start + k, end2, real, QUARTER)
            following = _factor(u, start + k, end2)
            a0, a1, a2, a3 = _add_two(a0, a1, a2, a3, rstd * own, byte, levels, KIND)
            byte = ahead
            own = following
        y0, y1, y2, y3 = _with(y0, y1, y2, y3, a0, a1, a2, a3)
    return y0, y1, y2, y3


def arguments(update: Shrink | None, like: Tensor) -> tuple[tuple[Any, ...], dict[str, int]]:
    """A kernel's arguments u, records, arena, levels, site and `four`, and its constants, of what a shrink has
    left; without one nothing is added."""
    if update is None:
        return (*(like,) * 4, 0, 4), {"M": 1, "R": 1, "LORA": False}
    return (
        (update.u, *update.reads.tensors, update.site, 4),
        {"M": update.reads.records.shape[1], "R": update.u.shape[2], "LORA": True},
    )


@dataclass(frozen=True)
class Cut:
    """How the work of a kernel that expands is cut; measured, not derived (docs/log.md)."""

    blocks: int
    """Blocks of columns per program."""
    directions: int
    """Directions per tile at 4 and 2 bits."""
    wide: int
    """At 16 bits."""
    fine: int
    """At 8 bits, of which there are few where they are not all."""
    warps: int

    @classmethod
    def of(cls, batch: int, most: int) -> Cut:
        """The best found: a few rows' directions are read all at once; `most` blocks may a program have."""
        return cls(1, 16, 64, 8, 4) if batch <= 4 else cls(min(2, most), 8, 8, 2, 1)

    def constants(self, columns: int) -> dict[str, int]:
        """A kernel's, for blocks of `columns`."""
        lanes = self.blocks * columns // 4
        return {
            "QUARTER": columns // 4, "LANES": lanes, "L": triton.next_power_of_2(lanes), "K": self.directions,
            "WIDE": self.wide, "FINE": self.fine, "num_warps": self.warps,
        }  # fmt: skip

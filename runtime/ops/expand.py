"""B'u: what a row's own adapter adds to a block of a linear's outputs. Part of the kernel that consumes them.

So no expand has a launch of its own: `residual`, `gated` and `rotary` call `expanded`. One program handles a row and a
few blocks of columns, of each of which all directions lie in one stretch of the arena, the active ones first. The four
quarters of a block are four vectors, which is how packed codes come (`packed`).

Adapters are fetched before the kernel before has ended; u and y, which that one writes, after it.

Shape legend: B rows, R directions at most, K directions of a tile, L columns of one quarter of its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import wait
from .packed import ENDS, block_rows, eight_bits, four_bits, number, record_of, two_bits
from .shrink import Shrink

_ENDS: tl.constexpr = tl.constexpr(ENDS)


@triton.jit
def _wide(
    a0, a1, a2, a3, u, rows, end16, QUARTER: tl.constexpr, K: tl.constexpr, real, PDL: tl.constexpr,
):  # fmt: skip
    """The four accumulators [K, L] and what 16-bit directions add to them; rows points [1, L] to the first one's."""
    direction = tl.arange(0, K)
    mask = (direction < end16)[:, None] & real
    at = rows + direction[:, None] * (4 * QUARTER)
    v0 = tl.load(at, mask=mask, other=0.0)
    v1 = tl.load(at + QUARTER, mask=mask, other=0.0)
    v2 = tl.load(at + 2 * QUARTER, mask=mask, other=0.0)
    v3 = tl.load(at + 3 * QUARTER, mask=mask, other=0.0)
    wait(PDL)
    for start in range(0, end16, K):
        factor = tl.load(u + start + direction, mask=start + direction < end16, other=0.0)[:, None]
        a0 += factor * v0.to(tl.float32)
        a1 += factor * v1.to(tl.float32)
        a2 += factor * v2.to(tl.float32)
        a3 += factor * v3.to(tl.float32)
        mask = (start + K + direction < end16)[:, None] & real
        at += K * (4 * QUARTER)
        v0 = tl.load(at, mask=mask, other=0.0)
        v1 = tl.load(at + QUARTER, mask=mask, other=0.0)
        v2 = tl.load(at + 2 * QUARTER, mask=mask, other=0.0)
        v3 = tl.load(at + 3 * QUARTER, mask=mask, other=0.0)
    return a0, a1, a2, a3


@triton.jit
def _four_bits(a0, a1, a2, a3, u, rows, levels, first, stop, QUARTER: tl.constexpr, K: tl.constexpr, real,
               PDL: tl.constexpr):  # fmt: skip
    """The same for directions `first` to `stop` at 4 bits."""
    direction = first + tl.arange(0, K)
    mask = (direction < stop)[:, None] & real
    at = rows + direction[:, None] * (2 * QUARTER)
    low = tl.load(at, mask=mask, other=0)
    high = tl.load(at + QUARTER, mask=mask, other=0)
    wait(PDL)
    for _ in range(first, stop, K):
        # A direction beyond the last one has no u, whatever its codes seem to be.
        factor = tl.load(u + direction, mask=direction < stop, other=0.0)[:, None]
        v0, v1, v2, v3 = four_bits(low.to(tl.int32), high.to(tl.int32), levels)
        a0 += factor * v0
        a1 += factor * v1
        a2 += factor * v2
        a3 += factor * v3
        direction += K
        at += K * (2 * QUARTER)
        mask = (direction < stop)[:, None] & real
        low = tl.load(at, mask=mask, other=0)
        high = tl.load(at + QUARTER, mask=mask, other=0)
    return a0, a1, a2, a3


@triton.jit
def _two_bits(a0, a1, a2, a3, u, rows, pairs, first, stop, QUARTER: tl.constexpr, K: tl.constexpr, real,
              PDL: tl.constexpr):  # fmt: skip
    """The same at 2 bits."""
    direction = first + tl.arange(0, K)
    at = rows + direction[:, None] * QUARTER
    byte = tl.load(at, mask=(direction < stop)[:, None] & real, other=0)
    wait(PDL)
    for _ in range(first, stop, K):
        factor = tl.load(u + direction, mask=direction < stop, other=0.0)[:, None]
        v0, v1, v2, v3 = two_bits(byte.to(tl.int32), pairs)
        a0 += factor * v0
        a1 += factor * v1
        a2 += factor * v2
        a3 += factor * v3
        direction += K
        at += K * QUARTER
        byte = tl.load(at, mask=(direction < stop)[:, None] & real, other=0)
    return a0, a1, a2, a3


@triton.jit
def _eight_bits(a0, a1, a2, a3, u, rows, levels, first, stop, QUARTER: tl.constexpr, K: tl.constexpr, real,
                PDL: tl.constexpr):  # fmt: skip
    """The same at 8 bits, K of them at a time."""
    wait(PDL)
    for start in range(first, stop, K):
        direction = start + tl.arange(0, K)
        mask = (direction < stop)[:, None] & real
        at = rows + direction[:, None] * (4 * QUARTER)
        b0 = tl.load(at, mask=mask, other=0).to(tl.int32)
        b1 = tl.load(at + QUARTER, mask=mask, other=0).to(tl.int32)
        b2 = tl.load(at + 2 * QUARTER, mask=mask, other=0).to(tl.int32)
        b3 = tl.load(at + 3 * QUARTER, mask=mask, other=0).to(tl.int32)
        factor = tl.load(u + direction, mask=direction < stop, other=0.0)[:, None]
        v0, v1, v2, v3 = eight_bits(b0, b1, b2, b3, levels)
        a0 += factor * v0
        a1 += factor * v1
        a2 += factor * v2
        a3 += factor * v3
    return a0, a1, a2, a3


@triton.jit
def expanded(
    y, u, records, arena, levels, pairs, row, module, first, width, KIND: tl.constexpr, QUARTER: tl.constexpr,
    M: tl.constexpr, LORA: tl.constexpr, K: tl.constexpr, FINE: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The four quarters [L] float32 of a few blocks of columns of y, with what the row's adapter adds to them.

    y points to the row's first column and u to its directions of module number `module`; the blocks, LANES / QUARTER of
    them, begin with number `first`. Columns beyond `width` are 0. KIND is the model's dtype. Waits.
    """
    lane = tl.arange(0, L)
    column = columns_of(first, QUARTER, L)
    block = first + lane // QUARTER
    real = (lane < LANES) & (column < width)
    a0 = tl.zeros([K, L], tl.float32)
    a1 = tl.zeros([K, L], tl.float32)
    a2 = tl.zeros([K, L], tl.float32)
    a3 = tl.zeros([K, L], tl.float32)
    f0 = tl.zeros([FINE, L], tl.float32)
    f1 = tl.zeros([FINE, L], tl.float32)
    f2 = tl.zeros([FINE, L], tl.float32)
    f3 = tl.zeros([FINE, L], tl.float32)
    if LORA:
        record = record_of(records, row, module, M)
        end16 = number(record, _ENDS)
        end8 = number(record, _ENDS + 1)
        end4 = number(record, _ENDS + 2)
        end2 = number(record, _ENDS + 3)
        inner = (lane % QUARTER)[None, :]
        block = block[None, :]
        seen = real[None, :]
        WIDTH: tl.constexpr = 4 * QUARTER
        rows = block_rows(arena, record, block, 0, WIDTH * KIND.primitive_bitwidth // 8).to(tl.pointer_type(KIND))
        eight = block_rows(arena, record, block, 1, WIDTH) + inner
        four = block_rows(arena, record, block, 2, WIDTH // 2) + inner
        two = block_rows(arena, record, block, 3, WIDTH // 4) + inner
        if end16 > 0:
            a0, a1, a2, a3 = _wide(a0, a1, a2, a3, u, rows + inner, end16, QUARTER, K, seen, PDL)
        if end4 > end8:
            a0, a1, a2, a3 = _four_bits(a0, a1, a2, a3, u, four, levels, end8, end4, QUARTER, K, seen, PDL)
        if end2 > end4:
            a0, a1, a2, a3 = _two_bits(a0, a1, a2, a3, u, two, pairs, end4, end2, QUARTER, K, seen, PDL)
        if end8 > end16:
            f0, f1, f2, f3 = _eight_bits(f0, f1, f2, f3, u, eight, levels, end16, end8, QUARTER, FINE, seen, PDL)
    wait(PDL)
    y += column
    y0 = tl.load(y, mask=real, other=0.0)
    y1 = tl.load(y + QUARTER, mask=real & (column + QUARTER < width), other=0.0)
    y2 = tl.load(y + 2 * QUARTER, mask=real & (column + 2 * QUARTER < width), other=0.0)
    y3 = tl.load(y + 3 * QUARTER, mask=real & (column + 3 * QUARTER < width), other=0.0)
    if LORA:
        y0 += tl.sum(a0, axis=0) + tl.sum(f0, axis=0)
        y1 += tl.sum(a1, axis=0) + tl.sum(f1, axis=0)
        y2 += tl.sum(a2, axis=0) + tl.sum(f2, axis=0)
        y3 += tl.sum(a3, axis=0) + tl.sum(f3, axis=0)
    return y0, y1, y2, y3


@triton.jit
def columns_of(first, QUARTER: tl.constexpr, L: tl.constexpr):
    """[L] the first quarter's columns of the blocks from number `first` on."""
    lane = tl.arange(0, L)
    return (first + lane // QUARTER) * (4 * QUARTER) + lane % QUARTER


def arguments(update: Shrink | None, like: Tensor) -> tuple[tuple[Any, ...], dict[str, int]]:
    """A kernel's arguments u, records, arena, levels, pairs and site, and its constants, of what a shrink has left;
    without one nothing is added."""
    if update is None:
        return (like,) * 5 + (0,), {"M": 1, "R": 1, "LORA": False}
    return (
        (update.u, *update.reads.tensors, update.site),
        {"M": update.reads.records.shape[1], "R": update.u.shape[2], "LORA": True},
    )


@dataclass(frozen=True)
class Cut:
    """How the work of a kernel that expands is cut; measured, not derived (docs/log.md)."""

    blocks: int
    """Blocks of columns per program."""
    directions: int
    """Directions per step, at 16, 4 and 2 bits."""
    fine: int
    """At 8 bits, of which there are few where they are not all."""
    warps: int

    @classmethod
    def of(cls, batch: int, most: int) -> Cut:
        """The best found: a few rows' directions are read all at once; `most` blocks may a program have."""
        return cls(1, 64, 4, 4) if batch <= 4 else cls(min(2, most), 8, 2, 1)

    def constants(self, columns: int) -> dict[str, int]:
        """A kernel's, for blocks of `columns`."""
        lanes = self.blocks * columns // 4
        return {
            "QUARTER": columns // 4, "LANES": lanes, "L": triton.next_power_of_2(lanes), "K": self.directions,
            "FINE": self.fine, "num_warps": self.warps,
        }  # fmt: skip

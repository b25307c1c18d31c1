"""How kernels read the directions of a ladder: from where, how many, at how many bits.

The store (`runtime.engine.store`) keeps every ladder in one arena of bytes. `resolve` writes down once a step what
every row reads of every module: one record of 32 numbers, on one cache line, instead of a chain of lookups in each of
the two hundred kernels that need it. By format, 16, 8, 4 and 2 bits in this order:

    0 - 3     directions that are read at it end here
    4         what multiplies the update, float32
    5 - 8     where its rows of A' begin, in units of 128 bytes
    9 - 12    where its rows of B' begin
    13        where the scales of both lie, in one number: float32 [3, R], by format from 8 bits on
    14 - 17   how many rows there are
    18 - 20   the direction of the first of them, from 8 bits on; at 16 bits it is direction 0

A quarter of a row is the unit of its codes: at 4 bits byte i holds columns i and 2 L + i, at 2 bits columns i, L + i,
2 L + i and 3 L + i, L being a quarter of the width; so no code crosses a lane. Rows of A' are quartered whole; those of
B' within blocks of columns, block after block, so that a program that adds to one block reads a prefix of directions as
one stretch of memory.

Levels: `ladder.formats`; a value is level[code] times one scale a row, which is applied to the sum instead. Looking up
is what reading few bits costs: of 4 bits the sixteen values share one cache line, of 2 bits two columns are one lookup.

Shape legend: K directions of a tile, L columns of one quarter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ladder.formats import LEVELS

ALIGNMENT = 128
"""Bytes; of a cache line, and what every part of a ladder begins at a multiple of."""
RECORD = 32
"""Numbers of a record, the last ones unused."""
ENDS, WEIGHT, STARTS_A, STARTS_B, SCALES, ROWS, FIRSTS = 0, 4, 5, 9, 13, 14, 18
"""Where they are in a record."""
PARTS = 16
"""Numbers of a record that do not depend on the rung: from STARTS_A on."""

_ALIGNMENT: tl.constexpr = tl.constexpr(ALIGNMENT)
_RECORD: tl.constexpr = tl.constexpr(RECORD)
_ENDS: tl.constexpr = tl.constexpr(ENDS)
_STARTS_B: tl.constexpr = tl.constexpr(STARTS_B)
_SCALES: tl.constexpr = tl.constexpr(SCALES)
_ROWS: tl.constexpr = tl.constexpr(ROWS)
_FIRSTS: tl.constexpr = tl.constexpr(FIRSTS)
_FOUR: tl.constexpr = tl.constexpr(256)
_TWO: tl.constexpr = tl.constexpr(272)


@dataclass(frozen=True)
class Reads:
    """What the rows of a batch read of their ladders in this step, see above."""

    records: Tensor
    """[B, M, 32] int32"""
    arena: Tensor
    """[bytes] uint8"""
    levels: Tensor
    """[276] float32"""
    pairs: Tensor
    """[16] int32 or int64"""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of a kernel's arguments."""
        return self.records, self.arena, self.levels, self.pairs


@lru_cache(maxsize=16)
def level_tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What codes are read as: one at a time, [256 + 16 + 4] float32 by 8, 4 and 2 bits; two 2-bit codes at once, [16].

    An entry of the latter is both values, the lower code's lower: two bfloat16 in an int32, or two float32 in an int64,
    as the model's dtype is.
    """
    code = torch.arange(16)
    values = torch.stack([LEVELS[2][code & 3], LEVELS[2][code >> 2]], -1)
    pairs = values.to(torch.bfloat16).view(torch.int32) if dtype == torch.bfloat16 else values.view(torch.int64)
    return torch.cat([LEVELS[8], LEVELS[4], LEVELS[2]]).to(device), pairs[:, 0].to(device)


@triton.jit
def record_of(records, row, module, M: tl.constexpr):
    """Pointer to the record of a row and module."""
    return records + (row * M + module) * _RECORD


@triton.jit
def number(record, FIELD: tl.constexpr):
    """One of its numbers."""
    return tl.load(record + FIELD)


@triton.jit
def part(arena, record, FIELD: tl.constexpr):
    """Pointer to bytes of the arena."""
    return arena + number(record, FIELD).to(tl.int64) * _ALIGNMENT


@triton.jit
def halves(pair):
    """Both values of entries of the table of pairs, float32."""
    if pair.dtype == tl.int32:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def eight_bits(b0, b1, b2, b3, levels):
    """Values of the four quarters from their bytes, int32."""
    return tl.load(levels + b0), tl.load(levels + b1), tl.load(levels + b2), tl.load(levels + b3)


@triton.jit
def four_bits(low, high, levels):
    """Values of the four quarters: `low` are the bytes of the first and third, `high` those of the second and last."""
    levels += _FOUR
    v0 = tl.load(levels + (low & 15))
    v1 = tl.load(levels + (high & 15))
    return v0, v1, tl.load(levels + (low >> 4)), tl.load(levels + (high >> 4))


@triton.jit
def two_bits(byte, pairs):
    """Values of the four quarters."""
    v0, v1 = halves(tl.load(pairs + (byte & 15)))
    v2, v3 = halves(tl.load(pairs + (byte >> 4)))
    return v0, v1, v2, v3


@triton.jit
def row_scales(arena, record, direction, mask, FORMAT: tl.constexpr, R: tl.constexpr):
    """[K] float32 scales of A' and B' in one number; FORMAT 1, 2, 3: at 8, 4, 2 bits."""
    scales = part(arena, record, _SCALES).to(tl.pointer_type(tl.float32))
    return tl.load(scales + (FORMAT - 1) * R + direction, mask=mask, other=0.0)


@triton.jit
def block_rows(arena, record, block, FORMAT: tl.constexpr, BYTES: tl.constexpr):
    """Pointers to direction 0 of blocks of B' at a format, a row of which is BYTES long in a block."""
    start = part(arena, record, _STARTS_B + FORMAT) + block * number(record, _ROWS + FORMAT) * BYTES
    if FORMAT > 0:
        start -= number(record, _FIRSTS + FORMAT - 1) * BYTES
    return start


@triton.jit
def column_values(arena, record, levels, column, KIND: tl.constexpr, Q: tl.constexpr, K: tl.constexpr):
    """[K, N] float32: B' at outputs `column` [N], scales left out; 0 where the row does not read a direction.

    record points to the row's record of each output's module, [1, N]; Q are the columns of a block, KIND the dtype of
    the exact factors.
    """
    direction = tl.arange(0, K)[:, None]
    end16 = number(record, _ENDS)
    end8 = number(record, _ENDS + 1)
    end4 = number(record, _ENDS + 2)
    end2 = number(record, _ENDS + 3)
    block = (column // Q)[None, :]
    within = (column % Q)[None, :]
    wide = block_rows(arena, record, block, 0, Q * KIND.primitive_bitwidth // 8).to(tl.pointer_type(KIND))
    value = tl.load(wide + direction * Q + within, mask=direction < end16, other=0.0).to(tl.float32)
    eight = block_rows(arena, record, block, 1, Q) + direction * Q + within
    read8 = (direction >= end16) & (direction < end8)
    code8 = tl.load(eight, mask=read8, other=0).to(tl.int32)
    four = block_rows(arena, record, block, 2, Q // 2) + direction * (Q // 2) + within % (Q // 2)
    read4 = (direction >= end8) & (direction < end4)
    code4 = (tl.load(four, mask=read4, other=0).to(tl.int32) >> (4 * (within // (Q // 2)))) & 15
    two = block_rows(arena, record, block, 3, Q // 4) + direction * (Q // 4) + within % (Q // 4)
    read2 = (direction >= end4) & (direction < end2)
    code2 = (tl.load(two, mask=read2, other=0).to(tl.int32) >> (2 * (within // (Q // 4)))) & 3
    code = tl.where(read8, code8, tl.where(read4, _FOUR + code4, _TWO + code2))
    coded = (direction >= end16) & (direction < end2)
    return value + tl.where(coded, tl.load(levels + code), 0.0)

"""How kernels read the directions of a ladder: from where, how many, at how many bits.

The store (`runtime.engine.store`) keeps every ladder in one arena of bytes. `resolve` writes down once a step what
every row reads of every module: one record of 32 numbers, on one cache line, instead of a chain of lookups in each of
the two hundred kernels that need it. By format, 16, 8, 4 and 2 bits in this order:

    0 - 3     directions that are read at it end here
    4         what multiplies the update, float32
    5 - 8     where its rows of A' begin, in units of 128 bytes
    9 - 12    where its rows of B' begin
    13        where the scales of both lie, in one number: float32 [2, R], at 4 and at 2 bits
    14 - 17   how many rows there are
    18 - 20   the direction of the first of them, from 8 bits on; at 16 bits it is direction 0

Directions at 8 bits lie there in the model's own dtype, as those at 16 bits do, scales and all: looking up 256 levels
costs more than the bytes it saves (docs/log.md).

A quarter of a row is the unit of its codes: at 4 bits byte i holds columns i and 2 L + i, at 2 bits columns i, L + i,
2 L + i and 3 L + i, L being a quarter of the width; so no code crosses a lane. Rows of A' are quartered whole; those of
B' within blocks of columns, block after block, so that a program that adds to one block reads a prefix of directions as
one stretch of memory.

Levels: `ladder.formats`; a value is level[code] times one scale a row, which is applied to the sum instead. Turning
codes into levels is what reading few bits costs: a load from a table takes twelve cycles (docs/log.md). So for models
in bfloat16 levels are selected byte by byte from a few registers, where codes come in words: where quarters are whole
pairs of them. Levels are bfloat16 themselves, stretched first so that all of them are nearly numbers of that kind: by
1.96 those of 4 bits are at most 0.0011 of themselves off, by 1.69 those of 2 bits 0.00003. Scales are as much smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ladder.formats import LEVELS
from .launch import INTERPRETED, fetch

ALIGNMENT = 128
"""Bytes; of a cache line, and what every part of a ladder begins at a multiple of."""
RECORD = 32
"""Numbers of a record, the last ones unused."""
ENDS, WEIGHT, STARTS_A, STARTS_B, SCALES, ROWS, FIRSTS = 0, 4, 5, 9, 13, 14, 18
"""Where they are in a record."""
NUMBERS = (16, 8)
"""Bits of the formats, the first ones, whose values lie as numbers of the model's dtype; codes of the others have
scales."""
PARTS = 16
"""Numbers of a record that do not depend on the rung: from STARTS_A on."""

_ALIGNMENT: tl.constexpr = tl.constexpr(ALIGNMENT)
_RECORD: tl.constexpr = tl.constexpr(RECORD)
_ENDS: tl.constexpr = tl.constexpr(ENDS)
_STARTS_B: tl.constexpr = tl.constexpr(STARTS_B)
_SCALES: tl.constexpr = tl.constexpr(SCALES)
_ROWS: tl.constexpr = tl.constexpr(ROWS)
_FIRSTS: tl.constexpr = tl.constexpr(FIRSTS)
_TWO: tl.constexpr = tl.constexpr(16)


STRETCH = {4: 1.9619140625, 2: 1.6904296875}
"""What levels in bfloat16 are multiplied by: of the 1,024 factors from 1 to 2 that with the smallest largest error."""
_AGAIN_FOUR: tl.constexpr = tl.constexpr(STRETCH[4] ** -2)
_AGAIN_TWO: tl.constexpr = tl.constexpr(STRETCH[2] ** -2)
_UPPER: tl.constexpr = tl.constexpr(-65536)
_WORDS_FOUR: tl.constexpr = tl.constexpr(20)
_WORDS_TWO: tl.constexpr = tl.constexpr(24)

# prmt takes four bytes of eight, as the four nibbles in the low half of its last operand say. Of a nibble the lowest
# three bits choose; the highest repeats the sign of that byte, and is kept out of where levels are chosen.
_INTERLEAVED = "prmt.b32 ${first}, l, h, 0x6240; prmt.b32 ${second}, l, h, 0x7351;"
"""Low and high bytes of four values -> two registers of two values, of the even nibbles and of the odd ones."""


def _assembly(*body: str) -> str:
    return " ".join(("{ .reg .b32 h, l, m, s, t, v, w;", *body, "}"))


def _four_bits() -> str:
    """PTX: four bytes in $4, and the high bytes ($5, $6) and low bytes ($7, $8) of eight levels -> two registers of
    what low nibbles are read as, and two of the high ones. A nibble's highest bit is the sign."""
    lines = ["and.b32 w, $4, 0x77777777;"]
    for half, (chosen, signs) in enumerate((("w", "$4"), ("m", "t"))):
        if half:
            lines.append("shr.u32 m, w, 16; shr.u32 t, $4, 16;")
        lines += [
            f"prmt.b32 h, $5, $6, {chosen}; prmt.b32 l, $7, $8, {chosen};",
            # 0xff where the sign is repeated, else 0x80; of that the highest bit but one.
            f"prmt.b32 s, 0x80808080, 0x80808080, {signs}; shl.b32 s, s, 1;",
            "lop3.b32 h, h, s, 0x80808080, 0x78;",  # h ^ (s & 0x80...)
            _INTERLEAVED.format(first=half, second=2 + half),
        ]
    return _assembly(*lines)


def _two_bits() -> str:
    """PTX: four bytes in $8, and the high ($9) and low ($10) bytes of four levels -> two registers each of what the
    lowest two bits are read as, the next, and so on."""
    lines = ["and.b32 w, $8, 0x33333333; shr.u32 v, $8, 2; and.b32 v, v, 0x33333333;"]
    for half in (0, 1):
        for place, word in enumerate("wv"):
            if half:
                lines.append(f"shr.u32 m, {word}, 16;")
            chosen = "m" if half else word
            lines += [
                f"prmt.b32 h, $9, $9, {chosen}; prmt.b32 l, $10, $10, {chosen};",
                _INTERLEAVED.format(first=2 * place + half, second=2 * (place + 2) + half),
            ]
    return _assembly(*lines)


_FOUR_BITS: tl.constexpr = tl.constexpr(_four_bits())
_TWO_BITS: tl.constexpr = tl.constexpr(_two_bits())
_FOUR_OPERANDS: tl.constexpr = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 5))
_TWO_OPERANDS: tl.constexpr = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 3))


@dataclass(frozen=True)
class Reads:
    """What the rows of a batch read of their ladders in this step, see above."""

    records: Tensor
    """[B, M, 32] int32"""
    arena: Tensor
    """[bytes] uint8"""
    levels: Tensor
    """[26] float32, `level_table`"""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of a kernel's arguments."""
        return self.records, self.arena, self.levels


@lru_cache(maxsize=16)
def level_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[16 + 4 + 6] float32: what codes of 4 and 2 bits are read as in `dtype`, stretched; and for bfloat16 the
    bytes that levels are selected from, as they are in memory: of the first eight of 4 bits the high ones (two numbers)
    and the low ones, of those of 2 bits the high ones and the low ones."""
    if dtype != torch.bfloat16:
        return torch.cat([LEVELS[4], LEVELS[2], torch.zeros(6)]).to(device)
    levels = {bits: (LEVELS[bits] * STRETCH[bits]).to(dtype) for bits in (4, 2)}
    low_high = [levels[bits][:8].view(torch.uint8).view(-1, 2).T.flip(0) for bits in (4, 2)]
    words = torch.cat([own.flatten() for own in low_high]).view(torch.float32)
    return torch.cat([*(own.float() for own in levels.values()), words]).to(device)


@triton.jit
def record_of(records, row, module, M: tl.constexpr):
    """Pointer to the record of a row and module."""
    return records + (row * M + module) * _RECORD


@triton.jit
def number(record, FIELD: tl.constexpr):
    """One of its numbers."""
    return tl.load(record + FIELD)


@triton.jit
def ends_of(record):
    """Where directions end that are read at 16, 8, 4 and 2 bits."""
    return number(record, _ENDS), number(record, _ENDS + 1), number(record, _ENDS + 2), number(record, _ENDS + 3)


@triton.jit
def part(arena, record, FIELD: tl.constexpr):
    """Pointer to bytes of the arena."""
    return arena + number(record, FIELD).to(tl.int64) * _ALIGNMENT


@triton.jit
def _word(levels, AT: tl.constexpr):
    return tl.load(levels + AT).to(tl.int32, bitcast=True)


@triton.jit
def _columns(a, b, c, d):
    """[K, W] of every fourth column, from the first, second, third and last on -> [K, 4 W]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4 * a.shape[1]])


@triton.jit
def _pairs(first, second):
    """Two words [K, W] of two bfloat16 each, of columns one and two and of three and four -> [K, 4 W] float32."""
    return _columns(
        (first << 16).to(tl.float32, bitcast=True), (first & _UPPER).to(tl.float32, bitcast=True),
        (second << 16).to(tl.float32, bitcast=True), (second & _UPPER).to(tl.float32, bitcast=True),
    )  # fmt: skip


@triton.jit
def _bytes_of(codes):
    """What is in words, byte by byte; else codes are bytes."""
    if codes.dtype == tl.int32:
        return _columns(codes & 255, (codes >> 8) & 255, (codes >> 16) & 255, (codes >> 24) & 255)
    else:
        return codes.to(tl.int32)


@triton.jit
def four_bits(low, high, levels, KIND: tl.constexpr):
    """Values [K, L] float32 of the four quarters, from bytes [K, L] or from words [K, L / 4] of four: `low` are those
    of the first and third, `high` those of the second and last."""
    if not INTERPRETED and KIND.is_bf16() and low.dtype == tl.int32:
        h0 = _word(levels, _WORDS_FOUR)
        h1 = _word(levels, _WORDS_FOUR + 1)
        l0 = _word(levels, _WORDS_FOUR + 2)
        l1 = _word(levels, _WORDS_FOUR + 3)
        a0, a1, a2, a3 = tl.inline_asm_elementwise(
            _FOUR_BITS, _FOUR_OPERANDS, [low, h0, h1, l0, l1], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        b0, b1, b2, b3 = tl.inline_asm_elementwise(
            _FOUR_BITS, _FOUR_OPERANDS, [high, h0, h1, l0, l1], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        v0 = _pairs(a0, a1)
        v1 = _pairs(b0, b1)
        v2 = _pairs(a2, a3)
        v3 = _pairs(b2, b3)
    else:
        low = _bytes_of(low)
        high = _bytes_of(high)
        v0 = tl.load(levels + (low & 15))
        v1 = tl.load(levels + (high & 15))
        v2 = tl.load(levels + (low >> 4))
        v3 = tl.load(levels + (high >> 4))
    return v0, v1, v2, v3


@triton.jit
def two_bits(codes, levels, KIND: tl.constexpr):
    """The same from bytes or words of all four quarters."""
    if not INTERPRETED and KIND.is_bf16() and codes.dtype == tl.int32:
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
            _TWO_BITS, _TWO_OPERANDS, [codes, _word(levels, _WORDS_TWO), _word(levels, _WORDS_TWO + 1)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True,
            pack=1,
        )  # fmt: skip
        v0 = _pairs(a0, a1)
        v1 = _pairs(b0, b1)
        v2 = _pairs(c0, c1)
        v3 = _pairs(d0, d1)
    else:
        levels += _TWO
        codes = _bytes_of(codes)
        v0 = tl.load(levels + (codes & 3))
        v1 = tl.load(levels + ((codes >> 2) & 3))
        v2 = tl.load(levels + ((codes >> 4) & 3))
        v3 = tl.load(levels + (codes >> 6))
    return v0, v1, v2, v3


@triton.jit
def codes_at(place, mask, QUARTER: tl.constexpr, QUARTERS: tl.constexpr):
    """Bytes or words of codes at `place`; of two QUARTERS those of the second as well, else the same again."""
    first = tl.load(place, mask=mask, other=0)
    last = first
    if QUARTERS > 1:
        last = tl.load(place + QUARTER, mask=mask, other=0)
    return first, last


@triton.jit
def row_scales(arena, record, direction, mask, FORMAT: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr):
    """float32 scales of A' and B' in one number, for levels as KIND has them; FORMAT 2, 3: at 4, 2 bits."""
    scales = part(arena, record, _SCALES).to(tl.pointer_type(tl.float32))
    scale = tl.load(scales + (FORMAT - 2) * R + direction, mask=mask, other=0.0)
    if KIND.is_bf16():
        scale *= _AGAIN_FOUR if FORMAT == 2 else _AGAIN_TWO
    return scale


@triton.jit
def units_of(record, K: tl.constexpr):
    """Where units of K directions of one format end, those at 16, 8, 4 and 2 bits."""
    end16, end8, end4, end2 = ends_of(record)
    last16 = tl.cdiv(end16, K)
    last8 = last16 + tl.cdiv(end8 - end16, K)
    last4 = last8 + tl.cdiv(end4 - end8, K)
    return last16, last8, last4, last4 + tl.cdiv(end2 - end4, K)


@triton.jit
def rows_of_b(arena, record, FORMAT: tl.constexpr, BYTES: tl.constexpr):
    """Pointer to direction 0 of block 0 of B' at a format, a row of which is BYTES long in a block, and how many bytes
    on the next block begins."""
    start = part(arena, record, _STARTS_B + FORMAT)
    if FORMAT > 0:
        start -= number(record, _FIRSTS + FORMAT - 1) * BYTES
    return start, number(record, _ROWS + FORMAT) * BYTES


@triton.jit
def fetch_rows(arena, record, block, first, stop, FORMAT: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr):
    """Have directions `first` to `stop` of a block of B', SIZE bytes each, brought to the L2 cache."""
    if stop > first and SIZE % 16 == 0:
        start, stride = rows_of_b(arena, record, FORMAT, SIZE)
        fetch(start + block * stride + first * SIZE, (stop - first) * SIZE, PDL)

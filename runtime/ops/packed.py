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

Levels: `ladder.formats`; a value is level[code] times one scale a row, which is applied to the sum instead. Turning
codes into levels is what reading few bits costs: a load from a table takes twelve cycles (docs/log.md). So for models
in bfloat16 levels of 4 and 2 bits are selected from constants, to 24 bits; else they are loaded.

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
from .launch import INTERPRETED

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


def _selected(bits: int) -> list[tuple[str, str]]:
    """The bytes of levels in float32, highest first and without the lowest: of each those of the first four codes and
    of the next four. 2 bits have no more than four, which are then there twice."""
    words = LEVELS[bits].view(torch.int32).repeat(8 // min(8, len(LEVELS[bits]))).tolist()[:8]

    def together(codes: list[int], shift: int) -> str:
        return hex(sum((word >> shift & 255) << 8 * place for place, word in enumerate(codes)))

    return [(together(words[:4], shift), together(words[4:], shift)) for shift in (24, 16, 8)]


def _select(bits: int, word: str, outputs: tuple[int, int, int, int]) -> str:
    """PTX: what the four nibbles in the low half of `word` stand for, into `outputs`, float32, of which the last 8 bits
    repeat the 8 before. A nibble's lowest three bits select a byte of eight, which `prmt` does four at a time; at 4
    bits the highest is the sign."""
    lines = [f"and.b32 m, {word}, 0x7777;"]
    lines += [
        f"prmt.b32 {byte}, {first}, {last}, m;" for byte, (first, last) in zip("hkl", _selected(bits), strict=True)
    ]
    if bits == 4:
        # A nibble's highest bit makes `prmt` repeat a byte's sign: 0xff, and else 0x80.
        lines += [
            f"prmt.b32 s, 0x80808080, 0x80808080, {word}; shl.b32 s, s, 1;",
            "lop3.b32 h, h, s, 0x80808080, 0x78;",  # h ^ (s & 0x80...)
        ]
    for pair in (0, 1):
        lines.append(f"prmt.b32 p, k, h, {(0x5140, 0x7362)[pair]:#x};")
        for half in (0, 1):
            place = 2 * pair + half
            # Bytes l, l, k and h of a value.
            lines.append(f"prmt.b32 ${outputs[place]}, l, p, {(0x5400, 0x7600)[half] + 0x11 * place:#x};")
    return " ".join(lines)


def _assembly(*body: str) -> str:
    return " ".join(("{ .reg .b32 m, h, k, l, s, p, w, t;", *body, "}"))


_FOUR_BITS: tl.constexpr = tl.constexpr(
    _assembly(
        _select(4, "$8", (0, 4, 1, 5)),
        "shr.u32 t, $8, 16;",
        _select(4, "t", (2, 6, 3, 7)),
    )
)
"""Of four bytes the values of their low nibbles, then of their high ones."""
_TWO_BITS: tl.constexpr = tl.constexpr(
    _assembly(
        "and.b32 w, $16, 0x33333333;",
        _select(2, "w", (0, 8, 1, 9)),
        "shr.u32 t, w, 16;",
        _select(2, "t", (2, 10, 3, 11)),
        "shr.u32 w, $16, 2; and.b32 w, w, 0x33333333;",
        _select(2, "w", (4, 12, 5, 13)),
        "shr.u32 t, w, 16;",
        _select(2, "t", (6, 14, 7, 15)),
    )
)
"""Of four bytes the values of their lowest two bits, of the next, and so on."""


@dataclass(frozen=True)
class Reads:
    """What the rows of a batch read of their ladders in this step, see above."""

    records: Tensor
    """[B, M, 32] int32"""
    arena: Tensor
    """[bytes] uint8"""
    levels: Tensor
    """[276] float32"""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of a kernel's arguments."""
        return self.records, self.arena, self.levels


@lru_cache(maxsize=16)
def level_table(device: torch.device) -> Tensor:
    """[256 + 16 + 4] float32: what codes of 8, 4 and 2 bits are read as."""
    return torch.cat([LEVELS[8], LEVELS[4], LEVELS[2]]).to(device)


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
def eight_bits(b0, b1, b2, b3, levels):
    """Values of the four quarters from their bytes."""
    v0 = tl.load(levels + b0.to(tl.int32))
    v1 = tl.load(levels + b1.to(tl.int32))
    v2 = tl.load(levels + b2.to(tl.int32))
    return v0, v1, v2, tl.load(levels + b3.to(tl.int32))


@triton.jit
def four_bits(low, high, levels, KIND: tl.constexpr):
    """Values of the four quarters: `low` are the bytes of the first and third, `high` those of the second and last."""
    if not INTERPRETED and KIND.is_bf16():
        v0, v2 = tl.inline_asm_elementwise(
            _FOUR_BITS, "=r,=r,=r,=r,=r,=r,=r,=r,r", [low], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )  # fmt: skip
        v1, v3 = tl.inline_asm_elementwise(
            _FOUR_BITS, "=r,=r,=r,=r,=r,=r,=r,=r,r", [high], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )  # fmt: skip
    else:
        levels += _FOUR
        low = low.to(tl.int32)
        high = high.to(tl.int32)
        v0 = tl.load(levels + (low & 15))
        v1 = tl.load(levels + (high & 15))
        v2 = tl.load(levels + (low >> 4))
        v3 = tl.load(levels + (high >> 4))
    return v0, v1, v2, v3


@triton.jit
def two_bits(byte, levels, KIND: tl.constexpr):
    """Values of the four quarters."""
    if not INTERPRETED and KIND.is_bf16():
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            _TWO_BITS, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r", [byte],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        levels += _TWO
        byte = byte.to(tl.int32)
        v0 = tl.load(levels + (byte & 3))
        v1 = tl.load(levels + ((byte >> 2) & 3))
        v2 = tl.load(levels + ((byte >> 4) & 3))
        v3 = tl.load(levels + (byte >> 6))
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

"""Directions out of the store, as matrices that tensor cores multiply, for all tokens of a pass and of those behind it.

Of every set and member the directions that the rung reads are written to `Factors`: numbers of the model's dtype as
they are, codes as the levels that they stand for. Scales are one number a direction for both halves (`packed`), and go
into B'; so A' is exact, and B' is rounded once.

A half is the same to a program whichever it is: A' is one block as wide as the input, B' has many blocks of Q columns,
and codes lie in quarters of a block. A program has K directions and CHUNK places of a quarter, of all four quarters,
and reads each direction at the format that it has.

Shape legend: L layers, S sets, R directions at most, D inputs, N_i outputs of a member, M modules.
In kernels: W columns of a block, QUARTER a quarter of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..launch import dependent, release, wait
from ..packed import ENDS, FIRSTS, ROWS, STARTS_A, STARTS_B, Reads, ends_of, number, part, record_of, row_scales

_ENDS: tl.constexpr = tl.constexpr(ENDS)
_STARTS_A: tl.constexpr = tl.constexpr(STARTS_A)
_STARTS_B: tl.constexpr = tl.constexpr(STARTS_B)
_FIRSTS: tl.constexpr = tl.constexpr(FIRSTS)
_ROWS: tl.constexpr = tl.constexpr(ROWS)
_TWO: tl.constexpr = tl.constexpr(16)
"""Where levels of 2 bits begin, behind those of 4."""


@triton.jit
def _rows(arena, record, direction, STARTS: tl.constexpr, FORMAT: tl.constexpr, BYTES: tl.constexpr):
    """Pointers to directions [K] of the first block at a format, of which each has BYTES bytes there, and how many
    bytes on the next block begins."""
    start = part(arena, record, STARTS + FORMAT)
    if FORMAT > 0:
        direction -= number(record, _FIRSTS + FORMAT - 1)
    return start + direction * BYTES, number(record, _ROWS + FORMAT) * BYTES


@triton.jit
def _unpack_half(
    out, arena, record, levels, first, chunk, columns, STARTS: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    SCALED: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Directions [K] from `first` on, those that are read, at CHUNK places of each quarter, to `out` [blocks, R, W]:
    one member's half, of which the first `columns` columns are real; others become 0."""
    KIND: tl.constexpr = out.dtype.element_ty
    SIZE: tl.constexpr = KIND.primitive_bitwidth // 8
    QUARTER: tl.constexpr = W // 4
    end16, end8, end4, end2 = ends_of(record)
    direction = first + tl.arange(0, K)
    read = direction < end2
    wide = direction < end8
    four = (direction >= end8) & (direction < end4)
    # Of every direction where it lies at its own format.
    rows, stride = _rows(arena, record, direction, STARTS, 0, SIZE * W)
    rows8, stride8 = _rows(arena, record, direction, STARTS, 1, SIZE * W)
    rows4, stride4 = _rows(arena, record, direction, STARTS, 2, W // 2)
    rows2, stride2 = _rows(arena, record, direction, STARTS, 3, W // 4)
    rows = tl.where(direction < end16, rows, tl.where(wide, rows8, tl.where(four, rows4, rows2)))
    stride = tl.where(direction < end16, stride, tl.where(wide, stride8, tl.where(four, stride4, stride2)))
    scale = tl.full([K], 1.0, tl.float32)
    if SCALED:
        scale4 = row_scales(arena, record, direction, four, 2, R, KIND)
        scale2 = row_scales(arena, record, direction, read & (direction >= end4), 3, R, KIND)
        scale = tl.where(four, scale4, scale2)

    lane = chunk * CHUNK + tl.arange(0, CHUNK)
    block = (lane // QUARTER)[None, :]
    inner = (lane % QUARTER)[None, :]
    inside = block * W < columns
    rows = rows[:, None] + block * stride[:, None]
    coded = (read & (direction >= end8))[:, None]
    four = four[:, None]
    wide = (read & wide)[:, None]
    # At 4 bits a byte has the codes of the first and third quarter, or of the second and last; at 2 bits of all.
    low = tl.load(rows + inner, mask=coded & inside, other=0).to(tl.int32)
    high = tl.load(rows + QUARTER + inner, mask=four & inside, other=0).to(tl.int32)
    numbers = rows.to(tl.pointer_type(KIND))
    place = out + (block * R + direction[:, None]) * W
    for quarter in tl.static_range(4):
        column = quarter * QUARTER + inner
        real = inside & (block * W + column < columns)
        byte = high if quarter % 2 == 1 else low
        code = tl.where(four, (byte >> (quarter // 2 * 4)) & 15, _TWO + ((low >> (2 * quarter)) & 3))
        value = tl.load(levels + code, mask=coded & real, other=0.0) * scale[:, None]
        value = tl.where(wide, tl.load(numbers + column, mask=wide & real, other=0.0).to(tl.float32), value)
        tl.store(place + column, value.to(KIND), mask=read[:, None] & inside)


@triton.jit(do_not_specialize=["site"])
def _unpack(
    a, b, records, arena, levels, site, D: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, MEMBERS: tl.constexpr, M: tl.constexpr, SETS: tl.constexpr, APART: tl.constexpr,
    K: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    CHUNKS_A: tl.constexpr = (D // 4 + CHUNK - 1) // CHUNK
    # Where blocks of B' end of the first member, of the second and of the last; and chunks of the first two.
    SECOND: tl.constexpr = (N0 + Q - 1) // Q
    THIRD: tl.constexpr = SECOND + (N1 + Q - 1) // Q
    BLOCKS: tl.constexpr = THIRD + (N2 + Q - 1) // Q
    CHUNKS0: tl.constexpr = (SECOND * (Q // 4) + CHUNK - 1) // CHUNK
    CHUNKS1: tl.constexpr = CHUNKS0 + ((THIRD - SECOND) * (Q // 4) + CHUNK - 1) // CHUNK
    release(PDL)
    wait(PDL)
    program, first, own = tl.program_id(0), tl.program_id(1) * K, tl.program_id(2)
    of_a = program < MEMBERS * CHUNKS_A
    chunk = program - MEMBERS * CHUNKS_A
    member = tl.where(chunk >= CHUNKS1, 2, tl.where(chunk >= CHUNKS0, 1, 0))
    member = tl.where(of_a, program // CHUNKS_A, member)
    record = record_of(records, own % SETS, site + own // SETS * APART + member, M)
    if first < number(record, _ENDS + 3):
        if of_a:
            a += (own.to(tl.int64) * MEMBERS + member) * (R * D)
            _unpack_half(a, arena, record, levels, first, program % CHUNKS_A, D, _STARTS_A, D, R, False, K, CHUNK)
        else:
            chunk -= tl.where(member == 2, CHUNKS1, tl.where(member == 1, CHUNKS0, 0))
            before = tl.where(member == 2, THIRD, tl.where(member == 1, SECOND, 0))
            columns = tl.where(member == 2, N2, tl.where(member == 1, N1, N0))
            b += (own.to(tl.int64) * BLOCKS + before) * (R * Q)
            _unpack_half(b, arena, record, levels, first, chunk, columns, _STARTS_B, Q, R, True, K, CHUNK)


_DIRECTIONS, _PLACES = 8, 256
"""Of a program: 16 KiB of bfloat16 that it writes, in pieces of 2 KiB."""


def unpack_layers(reads: Reads, site: int, apart: int, a: Tensor, b: Tensor, sizes: Sequence[int]) -> None:
    """Write a [L, S, members, R, D] and b [L, S, blocks, R, Q], each layer's `Factors`, as the sets' records say, for
    members with `sizes` outputs, at most three. A site begins at module `site`, in each next layer `apart` further on.

    Directions that a set does not read are left as they are. Columns that fill up a member's last block become 0. What
    a set's update weighs is not in them. R is that of the store: its scales lie so far apart. All tensors are
    contiguous, D and Q multiples of 4, the model's dtype bfloat16 or float32.
    """
    layers, sets, members, most, inputs = a.shape
    columns = b.shape[4]
    assert len(sizes) == members <= 3, "a site has up to three members"
    blocks = [triton.cdiv(size, columns) for size in sizes]
    assert b.shape == (layers, sets, sum(blocks), most, columns), "B' lies in blocks of its members"
    assert inputs % 4 == columns % 4 == 0, "codes lie in quarters"
    quarters = [inputs // 4] * members + [own * columns // 4 for own in blocks]
    programs = sum(triton.cdiv(quarter, _PLACES) for quarter in quarters)
    outputs = [*sizes, 0, 0]
    _unpack[(programs, triton.cdiv(most, _DIRECTIONS), layers * sets)](
        a, b, *reads.tensors, site, D=inputs, N0=outputs[0], N1=outputs[1], N2=outputs[2], Q=columns, R=most,
        MEMBERS=members, M=reads.records.shape[1], SETS=sets, APART=apart, K=_DIRECTIONS, CHUNK=_PLACES, num_warps=4,
        **dependent(a.device),
    )  # fmt: skip

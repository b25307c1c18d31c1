"""u = rstd * weight * scale * (A' x): of every row and member of a site the directions that the row's rung reads.

A member is one of the linears that share an input: q, k and v; gate and up. One program takes of a row and member
every SHARES-th block of K directions. Codes are unpacked in registers, two columns by one lookup, and summed in
float32; a direction's scales are applied to its sum.

For one row these programs are part of the linear's launch (`alone`); for more they are a launch beside it.

Shape legend: B rows, D inputs, R directions at most, K directions of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import dependent, release, wait
from .norm import Norm, rstd_of
from .packed import (
    ENDS,
    FIRSTS,
    STARTS_A,
    WEIGHT,
    Reads,
    eight_bits,
    four_bits,
    number,
    part,
    record_of,
    row_scales,
    two_bits,
)

_ENDS: tl.constexpr = tl.constexpr(ENDS)
_WEIGHT: tl.constexpr = tl.constexpr(WEIGHT)
_STARTS: tl.constexpr = tl.constexpr(STARTS_A)
_FIRSTS: tl.constexpr = tl.constexpr(FIRSTS)


@dataclass(frozen=True)
class Shrink:
    """What a shrink writes and an expand reads: the directions of all rows at one site."""

    u: Tensor
    """[B, members, R] float32, written"""
    reads: Reads
    site: int
    """Number of the first member's module."""


@triton.jit
def _wide_sum(x, rows, direction, stop, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """[K] float32: 16-bit rows [., D] at `direction` [K], those below `stop`, times x [D]."""
    column = tl.arange(0, BLOCK)
    row = rows + direction[:, None] * D
    there = (direction < stop)[:, None]
    own = tl.load(row + column[None, :], mask=there & (column < D)[None, :], other=0.0)
    wait(PDL)
    total = tl.zeros([K, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + column
        ahead = at + BLOCK
        following = tl.load(row + ahead[None, :], mask=there & (ahead < D)[None, :], other=0.0)
        total += own.to(tl.float32) * tl.load(x + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
        own = following
    return tl.sum(total, axis=1)


@triton.jit
def _coded_sum(
    x, rows, table, direction, stop, FORMAT: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """[K] float32: packed rows at `direction` [K], those below `stop`, times x [D]; scales are left out.

    rows points to direction 0 and table to what codes are read as: of pairs at 2 bits, FORMAT 3, else of single ones.
    """
    QUARTER: tl.constexpr = D // 4
    BYTES: tl.constexpr = D >> (FORMAT - 1)
    column = tl.arange(0, BLOCK)
    there = (direction < stop)[:, None]
    at = rows + direction[:, None] * BYTES + column[None, :]
    mask = there & (column < QUARTER)[None, :]
    b0 = tl.load(at, mask=mask, other=0)
    b1 = b0
    b2 = b0
    b3 = b0
    if FORMAT <= 2:
        b1 = tl.load(at + QUARTER, mask=mask, other=0)
    if FORMAT == 1:
        b2 = tl.load(at + 2 * QUARTER, mask=mask, other=0)
        b3 = tl.load(at + 3 * QUARTER, mask=mask, other=0)
    wait(PDL)
    total = tl.zeros([K, BLOCK], tl.float32)
    for start in range(0, QUARTER, BLOCK):
        place = start + column
        real = place < QUARTER
        # Bytes of the next step are on their way while these are looked up.
        at += BLOCK
        mask = there & (place + BLOCK < QUARTER)[None, :]
        n0 = tl.load(at, mask=mask, other=0)
        n1 = n0
        n2 = n0
        n3 = n0
        if FORMAT <= 2:
            n1 = tl.load(at + QUARTER, mask=mask, other=0)
        if FORMAT == 1:
            n2 = tl.load(at + 2 * QUARTER, mask=mask, other=0)
            n3 = tl.load(at + 3 * QUARTER, mask=mask, other=0)
        if FORMAT == 1:
            v0, v1, v2, v3 = eight_bits(
                b0.to(tl.int32), b1.to(tl.int32), b2.to(tl.int32), b3.to(tl.int32), table
            )  # fmt: skip
        elif FORMAT == 2:
            v0, v1, v2, v3 = four_bits(b0.to(tl.int32), b1.to(tl.int32), table)
        else:
            v0, v1, v2, v3 = two_bits(b0.to(tl.int32), table)
        # Where a mask cut bytes off x is 0 too, or nothing is stored.
        x0 = tl.load(x + place, mask=real, other=0.0).to(tl.float32)[None, :]
        x1 = tl.load(x + QUARTER + place, mask=real, other=0.0).to(tl.float32)[None, :]
        x2 = tl.load(x + 2 * QUARTER + place, mask=real, other=0.0).to(tl.float32)[None, :]
        x3 = tl.load(x + 3 * QUARTER + place, mask=real, other=0.0).to(tl.float32)[None, :]
        total += v0 * x0 + v1 * x1 + v2 * x2 + v3 * x3
        b0 = n0
        b1 = n1
        b2 = n2
        b3 = n3
    return tl.sum(total, axis=1)


@triton.jit
def _coded_share(
    x, squares, out, arena, record, table, row, first, stop, stride, FORMAT: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, NORM: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program's share of the directions at a format: K from `first` on, every `stride`, below `stop`."""
    rows = part(arena, record, _STARTS + FORMAT)
    rows -= number(record, _FIRSTS + FORMAT - 1) * (D >> (FORMAT - 1))
    for start in range(first, stop, stride):
        direction = start + tl.arange(0, K)
        inside = direction < stop
        total = _coded_sum(x, rows, table, direction, stop, FORMAT, D, K, BLOCK, PDL)
        total *= row_scales(arena, record, direction, inside, FORMAT, R)
        _store(total, squares, out, record, row, direction, inside, D, NORM, BLOCKS, PADDED, EPS)


@triton.jit
def _store(
    total, squares, out, record, row, direction, inside, D: tl.constexpr, NORM: tl.constexpr, BLOCKS: tl.constexpr,
    PADDED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Directions times what multiplies the row's update, and the norm."""
    total *= number(record, _WEIGHT).to(tl.float32, bitcast=True)
    if NORM:
        total *= rstd_of(squares, row, BLOCKS, PADDED, D, EPS)
    tl.store(out + direction, total, mask=inside)


@triton.jit
def shrink_share(
    x, squares, u, records, arena, levels, pairs, site, program,
    D: tl.constexpr, R: tl.constexpr, MEMBERS: tl.constexpr, SHARES: tl.constexpr, M: tl.constexpr,
    NORM: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program number `program` of B * MEMBERS * SHARES: its part of the directions of one row and member.

    Waits where it reads anything of the kernel before; a program without directions just ends.
    """
    row = program // (MEMBERS * SHARES)
    member = program // SHARES % MEMBERS
    record = record_of(records, row, site + member, M)
    end16 = number(record, _ENDS)
    end8 = number(record, _ENDS + 1)
    end4 = number(record, _ENDS + 2)
    end2 = number(record, _ENDS + 3)
    mine = x + row * D
    out = u + (row * MEMBERS + member) * R
    share = program % SHARES
    for start in range(share * K, end16, SHARES * K):
        direction = start + tl.arange(0, K)
        rows = part(arena, record, _STARTS).to(tl.pointer_type(x.dtype.element_ty))
        total = _wide_sum(mine, rows, direction, end16, D, K, BLOCK, PDL)
        _store(total, squares, out, record, row, direction, direction < end16, D, NORM, BLOCKS, PADDED, EPS)
    if end4 > end8:
        _coded_share(
            mine, squares, out, arena, record, levels, row, end8 + share * K, end4, SHARES * K, 2, D, R, NORM, BLOCKS,
            PADDED, EPS, K, BLOCK // 4, PDL,
        )  # fmt: skip
    if end2 > end4:
        # The last share begins, so that who has more at 4 bits has fewer here.
        _coded_share(
            mine, squares, out, arena, record, pairs, row, end4 + (SHARES - 1 - share) * K, end2, SHARES * K, 3, D, R,
            NORM, BLOCKS, PADDED, EPS, K, BLOCK // 4, PDL,
        )  # fmt: skip
    if end8 > end16:
        # Few directions are read at 8 bits: one at a time, or most of a tile would be for nothing.
        _coded_share(
            mine, squares, out, arena, record, levels, row, end16 + share, end8, SHARES, 1, D, R, NORM, BLOCKS, PADDED,
            EPS, 1, BLOCK // 4, PDL,
        )  # fmt: skip


@triton.jit
def _shrink(
    x, squares, u, records, arena, levels, pairs, site,
    D: tl.constexpr, R: tl.constexpr, MEMBERS: tl.constexpr, SHARES: tl.constexpr, M: tl.constexpr,
    NORM: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    shrink_share(
        x, squares, u, records, arena, levels, pairs, site, tl.program_id(0), D, R, MEMBERS, SHARES, M, NORM, BLOCKS,
        PADDED, EPS, K, BLOCK, PDL,
    )  # fmt: skip


def shrink(
    x: Tensor, u: Tensor, reads: Reads, site: int, norm: Norm | None, *, directions: int = 4, shares: int = 8,
    inputs: int = 2048, warps: int = 4,
) -> None:  # fmt: skip
    """x [B, D] in the model's dtype -> u [B, members, R] float32 of module numbers `site` and those behind it; of each
    row as many directions as its rung reads, the rest of u is left as it is."""
    batch, width = x.shape
    members, most = u.shape[1:]
    norms, constants = Norm.arguments(norm, x)
    _shrink[(batch * members * shares,)](
        x, norms, u, *reads.tensors, site, D=width, R=most, MEMBERS=members, SHARES=shares, M=reads.records.shape[1],
        K=directions, BLOCK=min(inputs, triton.next_power_of_2(width)), num_warps=warps, **constants,
        **dependent(x.device),
    )  # fmt: skip

"""u = weight * scale * (A' x): of every row and member of a site the directions that the row's rung reads.

A member is one of the linears that share an input: q, k and v; gate and up. What a row and member read is cut into
units of K directions of one format, which programs take in turn. Codes are turned into levels in registers and summed
in float32; a direction's scales are applied to its sum. Where x has yet to be normed, so
has u (`norm`).

Of one row, programs of the linear that reads the same x do this (`linear`). Of more it is a launch of its own behind
that, which does not wait for it to end, and so runs beside it: one computes while the other waits for memory.

Shape legend: B rows, D inputs, R directions at most, K directions of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import dependent, fetch, release, wait
from .packed import (
    FIRSTS,
    STARTS_A,
    WEIGHT,
    Reads,
    block_rows,
    eight_bits,
    ends_of,
    four_bits,
    number,
    part,
    record_of,
    row_scales,
    two_bits,
)

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
    """Number of the first member's module"""
    columns: int
    """Of a block of B'"""
    ready: Tensor
    """[M] int32: 1 at the latest site whose x is there, 0 at all others"""
    before: int
    """The site before this one, of which `ready` is put back"""


@triton.jit
def _wide_sum(x, rows, direction, stop, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """[K] float32: 16-bit rows [., D] at `direction` [K], those below `stop`, times x [D]."""
    column = tl.arange(0, BLOCK)
    row = rows + direction[:, None] * D
    there = (direction < stop)[:, None]
    own = tl.load(row + column[None, :], mask=there & (column < D)[None, :], other=0.0)
    total = tl.zeros([K, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + column
        ahead = at + BLOCK
        following = tl.load(row + ahead[None, :], mask=there & (ahead < D)[None, :], other=0.0)
        total += own.to(tl.float32) * tl.load(x + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
        own = following
    return tl.sum(total, axis=1)


@triton.jit
def _input(x, at, mask):
    """x [1, .] as float32."""
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _coded_sum(
    x, four, rows, levels, direction, stop, FORMAT: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """[K] float32: packed rows at `direction` [K], those below `stop`, times x [D]; scales are left out.

    rows points to direction 0.
    `four` is 4: a number that the compiler does not know, so that a thread reads four bytes of several directions, for
    which it needs the same of x, and not sixteen of one.
    """
    QUARTER: tl.constexpr = D // 4
    lane = tl.arange(0, BLOCK)
    column = tl.multiple_of(lane // 4 * four + lane % 4, 4)
    there = (direction < stop)[:, None]
    at = rows + direction[:, None] * (D >> (FORMAT - 1)) + column[None, :]
    b0, b1, b2, b3 = _bytes(at, there & (column < QUARTER)[None, :], FORMAT, QUARTER)
    total = tl.zeros([K, BLOCK], tl.float32)
    for start in range(0, QUARTER, BLOCK):
        place = start + column
        real = place < QUARTER
        # Bytes of the next step are on their way while these are looked up.
        at += BLOCK
        n0, n1, n2, n3 = _bytes(at, there & (place + BLOCK < QUARTER)[None, :], FORMAT, QUARTER)
        # Where a mask cut bytes off x is 0 too, or nothing is stored.
        x0 = _input(x, place, real)
        x1 = _input(x, QUARTER + place, real)
        x2 = _input(x, 2 * QUARTER + place, real)
        x3 = _input(x, 3 * QUARTER + place, real)
        if FORMAT == 1:
            v0, v1, v2, v3 = eight_bits(b0, b1, b2, b3, levels)
        elif FORMAT == 2:
            v0, v1, v2, v3 = four_bits(b0, b1, levels, x.dtype.element_ty)
        else:
            v0, v1, v2, v3 = two_bits(b0, levels, x.dtype.element_ty)
        total += v0 * x0 + v1 * x1 + v2 * x2 + v3 * x3
        b0 = n0
        b1 = n1
        b2 = n2
        b3 = n3
    return tl.sum(total, axis=1)


@triton.jit
def _bytes(at, mask, FORMAT: tl.constexpr, QUARTER: tl.constexpr):
    """What lies at `at` of each quarter that has bytes of its own: one at 2 bits, two at 4, all four at 8."""
    b0 = tl.load(at, mask=mask, other=0)
    b1 = b0
    b2 = b0
    b3 = b0
    if FORMAT <= 2:
        b1 = tl.load(at + QUARTER, mask=mask, other=0)
    if FORMAT == 1:
        b2 = tl.load(at + 2 * QUARTER, mask=mask, other=0)
        b3 = tl.load(at + 3 * QUARTER, mask=mask, other=0)
    return b0, b1, b2, b3


@triton.jit
def _coded_unit(
    x, u, four, arena, record, levels, first, stop, weight, FORMAT: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """K directions from `first` on, those below `stop`; FORMAT 1, 2, 3: at 8, 4, 2 bits."""
    rows = part(arena, record, _STARTS + FORMAT) - number(record, _FIRSTS + FORMAT - 1) * (D >> (FORMAT - 1))
    direction = first + tl.arange(0, K)
    inside = direction < stop
    scale = row_scales(arena, record, direction, inside, FORMAT, R)
    total = _coded_sum(x, four, rows, levels, direction, stop, FORMAT, D, K, BLOCK)
    tl.store(u + direction, total * weight * scale, mask=inside)


@triton.jit
def _fetch_rows(arena, record, block, first, stop, FORMAT: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr):
    """Directions `first` to `stop` of a block of B', SIZE bytes each."""
    if stop > first and SIZE % 16 == 0:
        fetch(block_rows(arena, record, block, FORMAT, SIZE) + first * SIZE, (stop - first) * SIZE, PDL)


@triton.jit
def shrink_share(
    x, u, four, records, arena, levels, site, program, D: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    N2: tl.constexpr, Q: tl.constexpr, ALL: tl.constexpr, R: tl.constexpr, MEMBERS: tl.constexpr, SHARES: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program number `program` of B * MEMBERS * SHARES: its units of one row and member.

    It also has its share of B' fetched, which the next kernel reads: of N_i outputs in blocks of Q; 16-bit rows only
    with ALL.
    """
    row = program // (MEMBERS * SHARES)
    member = program // SHARES % MEMBERS
    record = record_of(records, row, site + member, M)
    end16, end8, end4, end2 = ends_of(record)
    weight = number(record, _WEIGHT).to(tl.float32, bitcast=True)
    x += row * D
    u += (row * MEMBERS + member) * R
    outputs = tl.where(member == 0, N0, tl.where(member == 1, N1, N2))
    size16: tl.constexpr = Q * x.dtype.element_ty.primitive_bitwidth // 8
    for block in range(program % SHARES, tl.cdiv(outputs, Q), SHARES):
        if ALL:
            _fetch_rows(arena, record, block, 0, end16, 0, size16, PDL)
        _fetch_rows(arena, record, block, end16, end8, 1, Q, PDL)
        _fetch_rows(arena, record, block, end8, end4, 2, Q // 2, PDL)
        _fetch_rows(arena, record, block, end4, end2, 3, Q // 4, PDL)
    # Units at 16, 4 and 2 bits end here, one format after the other. At 8 bits, of which there are few, a direction is
    # a unit.
    last16 = tl.cdiv(end16, K)
    last4 = last16 + tl.cdiv(end4 - end8, K)
    last2 = last4 + tl.cdiv(end2 - end4, K)
    for unit in range(program % SHARES, last2 + end8 - end16, SHARES):
        if unit < last16:
            direction = unit * K + tl.arange(0, K)
            rows = part(arena, record, _STARTS).to(tl.pointer_type(x.dtype.element_ty))
            total = _wide_sum(x, rows, direction, end16, D, K, WIDE)
            tl.store(u + direction, total * weight, mask=direction < end16)
        elif unit < last4:
            first = end8 + (unit - last16) * K
            _coded_unit(x, u, four, arena, record, levels, first, end4, weight, 2, D, R, K, BLOCK // 4)
        elif unit < last2:
            first = end4 + (unit - last4) * K
            _coded_unit(x, u, four, arena, record, levels, first, end2, weight, 3, D, R, K, BLOCK // 4)
        else:
            first = end16 + unit - last2
            _coded_unit(x, u, four, arena, record, levels, first, end8, weight, 1, D, R, 1, BLOCK // 4)


@triton.jit
def _shrink(
    x, u, four, ready, records, arena, levels, site, D: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    N2: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, MEMBERS: tl.constexpr, SHARES: tl.constexpr, M: tl.constexpr,
    K: tl.constexpr, SHRINK_BLOCK: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    # The linear before this says when x is there, and goes on beside it. One thread looks for all.
    while tl.atomic_add(ready + site, 0, sem="acquire") == 0:
        pass
    shrink_share(
        x, u, four, records, arena, levels, site, tl.program_id(0), D, N0, N1, N2, Q, False, R, MEMBERS, SHARES,
        M, K, SHRINK_BLOCK, WIDE, PDL,
    )  # fmt: skip
    wait(PDL)


@dataclass(frozen=True)
class Shares:
    """How the work of a row and member is cut; measured, not derived (docs/log.md)."""

    programs: int
    directions: int
    """Of a program at a time at 16, 4 and 2 bits; at 8 bits it is one."""
    inputs: int
    """Columns of a step, all quarters together"""
    wide: int
    """At 16 bits"""
    warps: int

    @classmethod
    def of(cls, batch: int, width: int, directions: int) -> Shares:
        """The best found for rows of `width`, of up to so many directions."""
        inputs, wide = min(2048, triton.next_power_of_2(width)), min(1024, triton.next_power_of_2(width))
        return cls(directions, 1, inputs, wide, 8) if batch == 1 else cls(8, 4, inputs, inputs, 4)

    def constants(self) -> dict[str, int]:
        """A kernel's."""
        return {"SHARES": self.programs, "K": self.directions, "SHRINK_BLOCK": self.inputs, "WIDE": self.wide}


def shrink(x: Tensor, update: Shrink, sizes: list[int], *, shares: Shares | None = None) -> None:
    """x [B, D] in the model's dtype -> u [B, members, R] float32 of module numbers `site` and those behind it; of each
    row as many directions as its rung reads, the rest of u is left as it is.

    Launched right behind a `linear` of outputs `sizes` that reads the same x, and writes `ready`.
    """
    (batch, width), (members, most) = x.shape, update.u.shape[1:]
    shares = shares or Shares.of(batch, width, most)
    _shrink[(batch * members * shares.programs,)](
        x, update.u, 4, update.ready, *update.reads.tensors, update.site, D=width, N0=sizes[0], N1=sizes[1],
        N2=sizes[2], Q=update.columns, R=most, MEMBERS=members, M=update.reads.records.shape[1], **shares.constants(),
        num_warps=shares.warps, **dependent(x.device),
    )  # fmt: skip

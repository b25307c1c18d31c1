"""u = weight * scale * (A' x): of every row and member of a site the directions that the row's rung reads.

A member is one of the linears that share an input: q, k and v; gate and up. What a row and member read is cut into
units of K directions of one format, which programs take in turn. Codes are turned into levels in registers and summed
in float32; a direction's scales are applied to its sum. Where x has yet to be normed, so has u (`norm`).

Whose programs these are: `adapters`.

Shape legend: B rows, D inputs, R directions at most, K directions of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .launch import wait
from .packed import (
    FIRSTS,
    STARTS_A,
    WEIGHT,
    codes_at,
    ends_of,
    fetch_rows,
    four_bits,
    number,
    part,
    record_of,
    row_scales,
    two_bits,
    units_of,
)
from .ready import await_x, line_of, tell_u

_WEIGHT: tl.constexpr = tl.constexpr(WEIGHT)
_STARTS: tl.constexpr = tl.constexpr(STARTS_A)
_FIRSTS: tl.constexpr = tl.constexpr(FIRSTS)


@triton.jit
def _await_x(ready, first, WAIT: tl.constexpr, PDL: tl.constexpr):
    """x is there when the kernel before has ended, or when the linear beside counts the row, which is asked once."""
    if WAIT:
        wait(PDL)
    elif first:
        await_x(ready)


@triton.jit
def _wide_sum(
    x, ready, rows, direction, stop, early, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WAIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """[K] float32: rows of numbers [., D] at `direction` [K], those below `stop`, times x [D]."""
    column = tl.arange(0, BLOCK)
    row = rows + direction[:, None] * D
    there = (direction < stop)[:, None]
    own = tl.load(row + column[None, :], mask=there & (column < D)[None, :], other=0.0)
    _await_x(ready, early, WAIT, PDL)
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
    x, two, ready, rows, levels, direction, stop, early, FORMAT: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """[K] float32: packed rows at `direction` [K], those below `stop`, times x [D]; scales are left out.

    rows points to direction 0. Codes come four bytes at a time where quarters are whole pairs of words. `two` is 2: a
    number that the compiler does not know, so that a thread reads two words of several directions, for which it needs
    the same of x, and not four of one.
    """
    QUARTER: tl.constexpr = D // 4
    UNIT: tl.constexpr = 4 if QUARTER % 8 == 0 and BLOCK >= 8 else 1
    SIZE: tl.constexpr = QUARTER // UNIT
    QUARTERS: tl.constexpr = 2 if FORMAT == 2 else 1
    if UNIT == 4:
        rows = rows.to(tl.pointer_type(tl.int32))
    lane = tl.arange(0, BLOCK // UNIT)
    column = tl.arange(0, BLOCK)
    if UNIT == 4:
        lane = tl.multiple_of(lane // 2 * two + lane % 2, 2)
        column = tl.multiple_of(column // 8 * (4 * two) + column % 8, 8)
    there = (direction < stop)[:, None]
    at = direction[:, None] * (QUARTERS * SIZE) + lane[None, :]
    low, high = codes_at(rows + at, there & (lane < SIZE)[None, :], SIZE, QUARTERS)
    _await_x(ready, early, WAIT, PDL)
    total = tl.zeros([K, BLOCK], tl.float32)
    for start in range(0, QUARTER, BLOCK):
        # Codes of the next step are on their way while these are looked up.
        at += BLOCK // UNIT
        ahead = start // UNIT + BLOCK // UNIT + lane < SIZE
        low_ahead, high_ahead = codes_at(rows + at, there & ahead[None, :], SIZE, QUARTERS)
        if FORMAT == 2:
            v0, v1, v2, v3 = four_bits(low, high, levels, x.dtype.element_ty)
        else:
            v0, v1, v2, v3 = two_bits(low, levels, x.dtype.element_ty)
        # Where a mask cut codes off x is 0 too, or nothing is stored.
        place = start + column
        real = place < QUARTER
        total += v0 * _input(x, place, real)
        total += v1 * _input(x, QUARTER + place, real)
        total += v2 * _input(x, 2 * QUARTER + place, real)
        total += v3 * _input(x, 3 * QUARTER + place, real)
        low = low_ahead
        high = high_ahead
    return tl.sum(total, axis=1)


@triton.jit
def _coded_unit(
    x, u, two, ready, arena, record, levels, first, stop, weight, early, FORMAT: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """K directions from `first` on, those below `stop`; FORMAT 2, 3: at 4, 2 bits."""
    rows = part(arena, record, _STARTS + FORMAT) - number(record, _FIRSTS + FORMAT - 1) * (D >> (FORMAT - 1))
    direction = first + tl.arange(0, K)
    inside = direction < stop
    scale = row_scales(arena, record, direction, inside, FORMAT, R, x.dtype.element_ty)
    total = _coded_sum(x, two, ready, rows, levels, direction, stop, early, FORMAT, D, K, BLOCK, WAIT, PDL)
    tl.store(u + direction, total * weight * scale, mask=inside)


@triton.jit
def shrink_share(
    x, u, two, ready, records, arena, levels, site, program, D: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    N2: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, MEMBERS: tl.constexpr, SHARES: tl.constexpr, M: tl.constexpr,
    B: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program number `program` of B * MEMBERS * SHARES: its units of one row and member.

    It also has its share of B' fetched, of N_i outputs in blocks of Q; of more than one row only what is in few bits:
    all of it would not fit the cache. With WAIT x is there when the kernel before has ended, else when the linear
    beside counts the row.
    """
    row = program // (MEMBERS * SHARES)
    member = program // SHARES % MEMBERS
    share = program % SHARES
    record = record_of(records, row, site + member, M)
    end16, end8, end4, end2 = ends_of(record)
    weight = number(record, _WEIGHT).to(tl.float32, bitcast=True)
    x += row * D
    u += (row * MEMBERS + member) * R
    ready = line_of(ready, site, row, B)
    outputs = tl.where(member == 0, N0, tl.where(member == 1, N1, N2))
    kind = x.dtype.element_ty
    size: tl.constexpr = Q * kind.primitive_bitwidth // 8
    for block in range(share, tl.cdiv(outputs, Q), SHARES):
        if B == 1:
            fetch_rows(arena, record, block, 0, end16, 0, size, PDL)
            fetch_rows(arena, record, block, end16, end8, 1, size, PDL)
        fetch_rows(arena, record, block, end8, end4, 2, Q // 2, PDL)
        fetch_rows(arena, record, block, end4, end2, 3, Q // 4, PDL)
    last16, last8, last4, last2 = units_of(record, K)
    # The first unit's directions are on their way before x is there.
    for unit in range(share, last2, SHARES):
        early = unit == share
        if unit < last8:
            exact = unit < last16
            first = tl.where(exact, unit * K, end16 + (unit - last16) * K)
            stop = tl.where(exact, end16, end8)
            rows = part(arena, record, _STARTS).to(tl.pointer_type(kind))
            if unit >= last16:
                rows = part(arena, record, _STARTS + 1).to(tl.pointer_type(kind)) - number(record, _FIRSTS) * D
            direction = first + tl.arange(0, K)
            total = _wide_sum(x, ready, rows, direction, stop, early, D, K, WIDE, WAIT, PDL)
            tl.store(u + direction, total * weight, mask=direction < stop)
        elif unit < last4:
            first = end8 + (unit - last8) * K
            _coded_unit(
                x, u, two, ready, arena, record, levels, first, end4, weight, early, 2, D, R, K, BLOCK // 4, WAIT, PDL
            )  # fmt: skip
        else:
            first = end4 + (unit - last4) * K
            _coded_unit(
                x, u, two, ready, arena, record, levels, first, end2, weight, early, 3, D, R, K, BLOCK // 4, WAIT, PDL
            )  # fmt: skip
    # Who has no unit is not waited for, and leaves its place to others.
    if share < last2:
        tell_u(ready, member)


@dataclass(frozen=True)
class Shares:
    """How the work of a row and member is cut; measured, not derived (docs/log.md)."""

    programs: int
    directions: int
    """Of a program at a time"""
    inputs: int
    """Columns of a step, all quarters together"""
    wide: int
    """The same of numbers"""

    @classmethod
    def of(cls, batch: int, width: int, directions: int) -> Shares:
        """The best found for rows of `width`, of up to so many directions."""
        columns = min(2048, max(4, triton.next_power_of_2(width)))
        if batch == 1:
            # More programs would keep those that multiply weights from starting early.
            return cls(min(64, directions), 1, columns, columns)
        return cls(16, 4, columns, columns // 2)

    def constants(self) -> dict[str, int]:
        """A kernel's."""
        return {
            "SHARES": self.programs, "SHRINK_K": self.directions, "SHRINK_BLOCK": self.inputs,
            "SHRINK_WIDE": self.wide,
        }  # fmt: skip

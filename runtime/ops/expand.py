"""B'u: what a row's own adapter adds to the outputs of a member, where all of u is there.

A program has a row and a few blocks of a member's outputs, of each of which all directions lie in one stretch of the
arena, the active ones first. Directions in few bits come as four quarters of a block at once, which is how codes are
packed (`packed`). Those whose values lie as numbers are summed column by column, and added to what the others left.

Whose programs these are: `adapters`.

Shape legend: B rows, R directions at most, K directions of a tile, L columns of one quarter of a program's blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .packed import codes_at, ends_of, four_bits, record_of, rows_of_b, two_bits, units_of
from .ready import await_count, line_of


@triton.jit
def _factor(u, direction, end):
    """u [K] of directions below `end`; of others 0, whatever their codes seem to be. Other programs have written it."""
    return tl.load(u + direction, mask=direction < end, other=0.0, cache_modifier=".cg")


@triton.jit
def _wide_rows(arena, record, column, FORMAT: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr):
    """Pointer to numbers of KIND at a format, and where columns of direction 0 are from there."""
    SIZE: tl.constexpr = KIND.primitive_bitwidth // 8
    base, stride = rows_of_b(arena, record, FORMAT, Q * SIZE)
    return base.to(tl.pointer_type(KIND)), column // Q * (stride // SIZE) + column % Q


@triton.jit
def _wide_tile(rows, at, direction, end, real, Q: tl.constexpr):
    """Numbers of directions [WIDE] below `end` at columns [C], those that are `real`."""
    mask = (direction < end)[:, None] & real[None, :]
    return tl.load(rows + (direction[:, None] * Q + at[None, :]), mask=mask, other=0.0)


@triton.jit
def _plus_wide(sums, u, values, rows, at, first, end, real, WIDE: tl.constexpr, Q: tl.constexpr):
    """sums [WIDE, C] and numbers of directions from `first` on, those below `end`, by their factor.

    `values` is their first tile; of each the next is on its way while it is added.
    """
    direction = tl.arange(0, WIDE)
    for start in range(first, end, WIDE):
        ahead = _wide_tile(rows, at, start + WIDE + direction, end, real, Q)
        sums += _factor(u, start + direction, end)[:, None] * values.to(tl.float32)
        values = ahead
    return sums


@triton.jit
def _tile(rows, at, direction, end, real, QUARTER: tl.constexpr, QUARTERS: tl.constexpr):
    """Codes of directions [K] below `end` at places `at` of a quarter, those that are `real`."""
    mask = (direction < end)[:, None] & real[None, :]
    return codes_at(rows + (direction[:, None] * (QUARTERS * QUARTER) + at[None, :]), mask, QUARTER, QUARTERS)


@triton.jit
def _plus(a0, a1, a2, a3, factor, v0, v1, v2, v3):
    """Four sums and a tile of values by their factor [K]."""
    factor = factor[:, None]
    a0 += factor * v0
    a1 += factor * v1
    a2 += factor * v2
    a3 += factor * v3
    return a0, a1, a2, a3


@triton.jit
def _rows(arena, record, block, inner, FORMAT: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr):
    """Pointer to codes in units of UNIT bytes, and where places `inner` of blocks number `block` are from there."""
    base, stride = rows_of_b(arena, record, FORMAT, BYTES)
    if UNIT == 4:
        base = base.to(tl.pointer_type(tl.int32))
    return base, block * (stride // UNIT) + inner


@triton.jit
def _coded(
    u, two, number, count, record, arena, levels, first, outputs, KIND: tl.constexpr, QUARTER: tl.constexpr,
    K: tl.constexpr, L: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Four sums [L] over directions at 4 and 2 bits, at blocks from `first` on.

    Codes come four bytes at a time where quarters are whole pairs of words. `two` is 2: a number that the compiler does
    not know, so that a thread takes one word of several directions, and not four of one, and has less to share with
    others when directions are summed. The first codes are on their way before u is there, when `number` is `count`.
    """
    _, end8, end4, end2 = ends_of(record)
    UNIT: tl.constexpr = 4 if QUARTER % 8 == 0 else 1
    SIZE: tl.constexpr = QUARTER // UNIT
    lane = tl.arange(0, L // UNIT)
    if UNIT == 4:
        lane = lane // 2 * two + lane % 2
    block = lane // SIZE
    real = (block < BLOCKS) & ((block + first) * (4 * QUARTER) < outputs)
    block += first
    inner = lane % SIZE
    if UNIT == 4:
        inner = tl.multiple_of(inner, 2)
    k = tl.arange(0, K)
    a0 = tl.zeros([K, L], tl.float32)
    a1 = a0
    a2 = a0
    a3 = a0
    # Of each tile the next is on its way while it is looked up.
    rows4, at4 = _rows(arena, record, block, inner, 2, 2 * QUARTER, UNIT)
    low, high = _tile(rows4, at4, end8 + k, end4, real, SIZE, 2)
    rows2, at2 = _rows(arena, record, block, inner, 3, QUARTER, UNIT)
    codes, _ = _tile(rows2, at2, end4 + k, end2, real, SIZE, 1)
    await_count(number, count)
    factor = _factor(u, end8 + k, end4)
    for start in range(end8, end4, K):
        low_ahead, high_ahead = _tile(rows4, at4, start + K + k, end4, real, SIZE, 2)
        factor_ahead = _factor(u, start + K + k, end4)
        v0, v1, v2, v3 = four_bits(low, high, levels, KIND)
        a0, a1, a2, a3 = _plus(a0, a1, a2, a3, factor, v0, v1, v2, v3)
        low, high, factor = low_ahead, high_ahead, factor_ahead
    factor = _factor(u, end4 + k, end2)
    for start in range(end4, end2, K):
        codes_ahead, _ = _tile(rows2, at2, start + K + k, end2, real, SIZE, 1)
        factor_ahead = _factor(u, start + K + k, end2)
        v0, v1, v2, v3 = two_bits(codes, levels, KIND)
        a0, a1, a2, a3 = _plus(a0, a1, a2, a3, factor, v0, v1, v2, v3)
        codes, factor = codes_ahead, factor_ahead
    return tl.sum(a0, axis=0), tl.sum(a1, axis=0), tl.sum(a2, axis=0), tl.sum(a3, axis=0)


@triton.jit
def _store_quarter(out, column, stop, value, real):
    tl.store(out + column, value, mask=real & (column < stop))


@triton.jit
def expand_share(
    added, u, two, ready, records, arena, levels, site, program, KIND: tl.constexpr, N0: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr, MEMBERS: tl.constexpr, M: tl.constexpr, B: tl.constexpr,
    SHARES: tl.constexpr, SHRINK_K: tl.constexpr, QUARTER: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    L: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program number `program` of B * groups: a group of one row's blocks.

    It waits for those alone that make this member's u: they had x from one who had waited for the kernel before.
    """
    BLOCKS: tl.constexpr = LANES // QUARTER
    WIDTH: tl.constexpr = 4 * LANES
    SECOND: tl.constexpr = (N0 + WIDTH - 1) // WIDTH
    THIRD: tl.constexpr = SECOND + (N1 + WIDTH - 1) // WIDTH
    GROUPS: tl.constexpr = THIRD + (N2 + WIDTH - 1) // WIDTH
    row, group = program // GROUPS, program % GROUPS
    member = tl.where(group >= THIRD, 2, tl.where(group >= SECOND, 1, 0))
    outputs = tl.where(group >= THIRD, N2, tl.where(group >= SECOND, N1, N0))
    added += row.to(tl.int64) * (N0 + N1 + N2) + tl.where(group >= THIRD, N0 + N1, tl.where(group >= SECOND, N0, 0))
    group -= tl.where(group >= THIRD, THIRD, tl.where(group >= SECOND, SECOND, 0))
    record = record_of(records, row, site + member, M)
    end16, end8, _, end2 = ends_of(record)
    if end2 > 0:
        u += (row * MEMBERS + member) * R
        number = line_of(ready, site, row, B) + member
        _, _, _, units = units_of(record, SHRINK_K)
        count = tl.minimum(units, SHARES)
        # The first numbers are on their way before u is there.
        wide = group * WIDTH + tl.arange(0, 4 * L)
        inside = wide < tl.minimum((group + 1) * WIDTH, outputs)
        direction = tl.arange(0, WIDE)
        rows16, at16 = _wide_rows(arena, record, wide, 0, KIND, 4 * QUARTER)
        rows8, at8 = _wide_rows(arena, record, wide, 1, KIND, 4 * QUARTER)
        exact = end16 > 0
        end = tl.where(exact, end16, end8)
        values = _wide_tile(
            tl.where(exact, rows16, rows8), tl.where(exact, at16, at8), direction, end, inside, 4 * QUARTER
        )
        if end2 > end8:
            lane = tl.arange(0, L)
            column = (group * BLOCKS + lane // QUARTER) * (4 * QUARTER) + lane % QUARTER
            real = (lane < LANES) & (column < outputs)
            y0, y1, y2, y3 = _coded(
                u, two, number, count, record, arena, levels, group * BLOCKS, outputs, KIND, QUARTER, K, L, BLOCKS
            )
            _store_quarter(added, column, outputs, y0, real)
            _store_quarter(added, column + QUARTER, outputs, y1, real)
            _store_quarter(added, column + 2 * QUARTER, outputs, y2, real)
            _store_quarter(added, column + 3 * QUARTER, outputs, y3, real)
            # What other threads of this program have stored can be read now.
            tl.debug_barrier()
        else:
            await_count(number, count)
        if end8 > 0:
            sums = tl.zeros([WIDE, 4 * L], tl.float32)
            sums = _plus_wide(sums, u, values, rows16, at16, 0, end16, inside, WIDE, 4 * QUARTER)
            if exact:
                values = _wide_tile(rows8, at8, end16 + direction, end8, inside, 4 * QUARTER)
            sums = _plus_wide(sums, u, values, rows8, at8, end16, end8, inside, WIDE, 4 * QUARTER)
            before = tl.load(added + wide, mask=inside & (end2 > end8), other=0.0, cache_modifier=".cg")
            tl.store(added + wide, before + tl.sum(sums, axis=0), mask=inside)


@dataclass(frozen=True)
class Cut:
    """How B'u is cut; measured, not derived (docs/log.md)."""

    columns: int
    """Of a program, whole blocks"""
    directions: int
    """Of a tile at 4 and 2 bits"""
    wide: int
    """Of a tile of numbers"""

    @classmethod
    def of(cls, batch: int) -> Cut:
        """The best found."""
        return cls(64, 32, 32) if batch == 1 else cls(512, 4, 4)

    def blocks(self, columns: int) -> int:
        """Of a program, where they have so many columns."""
        return max(1, self.columns // columns)

    def programs(self, sizes: list[int], columns: int) -> int:
        """Of a row."""
        return sum(triton.cdiv(size, self.blocks(columns) * columns) for size in sizes)

    def constants(self, columns: int) -> dict[str, int]:
        """A kernel's, for blocks of `columns`."""
        lanes = self.blocks(columns) * columns // 4
        return {
            "QUARTER": columns // 4, "LANES": lanes, "L": triton.next_power_of_2(lanes), "K": self.directions,
            "WIDE": self.wide,
        }  # fmt: skip

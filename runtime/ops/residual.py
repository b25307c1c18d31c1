"""Where the residual is written: by the embedding at a step's start, and by every o and down projection.

    residual      r += y + B'u
    for the norm  r * weight in the model's dtype, and sums of squares by blocks (`norm`)

Shape legend: B rows, D channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .expand import Cut, arguments, columns_of, expanded
from .launch import dependent, release, wait
from .shrink import Shrink


@triton.jit
def _add_quarter(y, r, normed, weight, column, mask):
    """Add one quarter to a row of the residual; returns its squares."""
    value = y + tl.load(r + column, mask=mask, other=0.0)
    tl.store(r + column, value, mask=mask)
    scaled = value * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + column, scaled.to(normed.dtype.element_ty), mask=mask)
    return tl.where(mask, value * value, 0.0)


@triton.jit
def _residual(
    y, r, normed, squares, weight, u, records, arena, levels, pairs, site,
    D: tl.constexpr, M: tl.constexpr, R: tl.constexpr, LORA: tl.constexpr, QUARTER: tl.constexpr, K: tl.constexpr,
    FINE: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row = tl.program_id(0)
    first = tl.program_id(1) * (LANES // QUARTER)
    y0, y1, y2, y3 = expanded(
        y + row * D, u + row * R, records, arena, levels, pairs, row, site, first, D, normed.dtype.element_ty, QUARTER,
        M, LORA, K, FINE, L, LANES, PDL,
    )  # fmt: skip
    column = columns_of(first, QUARTER, L)
    mine = tl.arange(0, L) < LANES
    r += row * D
    normed += row * D
    total = _add_quarter(y0, r, normed, weight, column, mine & (column < D))
    total += _add_quarter(y1, r, normed, weight, column + QUARTER, mine & (column + QUARTER < D))
    total += _add_quarter(y2, r, normed, weight, column + 2 * QUARTER, mine & (column + 2 * QUARTER < D))
    total += _add_quarter(y3, r, normed, weight, column + 3 * QUARTER, mine & (column + 3 * QUARTER < D))
    tl.store(squares + row * tl.num_programs(1) + tl.program_id(1), tl.sum(total))


def add_residual(
    y: Tensor, r: Tensor, normed: Tensor, squares: Tensor, weight: Tensor, *, columns: int,
    update: Shrink | None = None, cut: Cut | None = None,
) -> None:  # fmt: skip
    """r += y + B'u in place, and the next norm's: r, y [B, D] float32; normed [B, D] in the model's dtype is r * weight
    [D]; squares [B, programs] float32, one sum for each program of a row, which are so many as `squares_of` says."""
    adapters, constants = arguments(update, r)
    batch, width = r.shape
    cut = cut or Cut.of(batch, triton.cdiv(width, columns))
    _residual[(batch, triton.cdiv(width, cut.blocks * columns))](
        y, r, normed, squares, weight, *adapters, D=width, **constants, **cut.constants(columns),
        **dependent(r.device),
    )  # fmt: skip


def squares_of(batch: int, width: int, columns: int) -> int:
    """How many sums of squares of a row `add_residual` leaves."""
    return triton.cdiv(width, Cut.of(batch, triton.cdiv(width, columns)).blocks * columns)


@triton.jit
def _embed(
    tokens, table, r, normed, squares, weight, lengths, counts, D: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr,
    COUNTS: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # In this order: what the kernels of a step fetch before they wait was written before this one.
    wait(PDL)
    release(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    at = block * COLUMNS + tl.arange(0, C)
    mask = (tl.arange(0, C) < COLUMNS) & (at < D)
    token = tl.load(tokens + row)
    value = tl.load(table + token * D + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(r + row * D + at, value, mask=mask)
    scaled = value * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + row * D + at, scaled.to(normed.dtype.element_ty), mask=mask)
    tl.store(squares + row * tl.num_programs(1) + block, tl.sum(value * value))
    if block == 0:  # only later kernels of a step read these
        length = tl.load(lengths + row)
        tl.store(lengths + row, length + (length > 0).to(tl.int32))
        count = tl.arange(0, PADDED)
        tl.store(counts + count, tl.zeros([PADDED], tl.int32), mask=count < COUNTS)


def embed(
    tokens: Tensor, table: Tensor, r: Tensor, normed: Tensor, squares: Tensor, weight: Tensor, lengths: Tensor,
    counts: Tensor,
) -> None:  # fmt: skip
    """Begin a step: tokens [B] long, table [V, D] -> r, normed and squares as `add_residual` leaves them, in as many
    blocks as squares [B, blocks] has; rows in use are one token longer, lengths [B] int32; counts int32 are 0."""
    batch, width = r.shape
    blocks = squares.shape[1]
    columns = triton.cdiv(width, blocks)
    _embed[(batch, blocks)](
        tokens, table, r, normed, squares, weight, lengths, counts, D=width, COLUMNS=columns,
        C=triton.next_power_of_2(columns), COUNTS=len(counts), PADDED=triton.next_power_of_2(len(counts)), num_warps=1,
        **dependent(r.device),
    )  # fmt: skip

"""Where the residual is written: by the embedding at a step's start, and by every o and down projection.

    residual      r += y + bias + B'u
    for the norm  r * weight in the model's dtype, and sums of squares by blocks (`norm`)

Shape legend: B rows, D channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .expand import Cut, added, arguments, factors, fetched, lanes, quarters, settled
from .launch import dependent, release, wait
from .packed import record_of
from .shrink import Shrink


@triton.jit
def _store_quarter(value, r, normed, weight, column, mask):
    """One quarter of a row of the residual; returns its squares."""
    tl.store(r + column, value, mask=mask)
    tl.store(normed + column, (value * weight).to(normed.dtype.element_ty), mask=mask)
    return tl.where(mask, value * value, 0.0)


@triton.jit
def _residual(
    y, bias, r, normed, squares, weight, u, records, arena, levels, site, four,
    D: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr, R: tl.constexpr, LORA: tl.constexpr, QUARTER: tl.constexpr,
    K: tl.constexpr, WIDE: tl.constexpr, FINE: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row = tl.program_id(0)
    kind = normed.dtype.element_ty
    block, inner = lanes(four, QUARTER, L)
    real = block < LANES // QUARTER
    block += tl.program_id(1) * (LANES // QUARTER)
    column = block * (4 * QUARTER) + inner
    real = real & (column < D)
    record = record_of(records, row, site, M)
    u += row * R
    r += row * D
    normed += row * D
    if LORA:
        tiles = fetched(record, arena, block, inner, real, kind, QUARTER, K, WIDE, FINE)
    wait(PDL)
    if LORA:
        factor = factors(u, record, K, WIDE, FINE)
    r0, r1, r2, r3 = quarters(r, column, D, real, QUARTER)
    w0, w1, w2, w3 = quarters(weight, column, D, real, QUARTER)
    y0, y1, y2, y3 = settled(y + row * D, 1.0, bias, column, D, real, BIAS, QUARTER)
    if LORA:
        y0, y1, y2, y3 = added(
            y0, y1, y2, y3, tiles, factor, 1.0, u, record, arena, levels, block, inner, real, kind, QUARTER, K,
            WIDE, FINE, L,
        )  # fmt: skip
    total = _store_quarter(r0 + y0, r, normed, w0, column, real)
    total += _store_quarter(r1 + y1, r, normed, w1, column + QUARTER, real & (column + QUARTER < D))
    total += _store_quarter(r2 + y2, r, normed, w2, column + 2 * QUARTER, real & (column + 2 * QUARTER < D))
    total += _store_quarter(r3 + y3, r, normed, w3, column + 3 * QUARTER, real & (column + 3 * QUARTER < D))
    tl.store(squares + row * tl.num_programs(1) + tl.program_id(1), tl.sum(total))


def add_residual(
    y: Tensor, r: Tensor, normed: Tensor, squares: Tensor, weight: Tensor, *, columns: int,
    update: Shrink | None = None, bias: Tensor | None = None, cut: Cut | None = None,
) -> None:  # fmt: skip
    """r += y + bias + B'u in place, and the next norm's: r, y [B, D] float32; normed [B, D] in the model's dtype is r *
    weight [D]; squares [B, programs] float32, one sum for each program of a row, so many as `squares_of` says."""
    adapters, constants = arguments(update, r)
    batch, width = r.shape
    cut = cut or Cut.of(batch, triton.cdiv(width, columns))
    _residual[(batch, triton.cdiv(width, cut.blocks * columns))](
        y, r if bias is None else bias, r, normed, squares, weight, *adapters, D=width, BIAS=bias is not None,
        **constants, **cut.constants(columns),
        **dependent(r.device),
    )  # fmt: skip


def squares_of(batch: int, width: int, columns: int) -> int:
    """How many sums of squares of a row `add_residual` leaves."""
    return triton.cdiv(width, Cut.of(batch, triton.cdiv(width, columns)).blocks * columns)


@triton.jit
def _embed(
    tokens, table, r, normed, squares, weight, lengths, D: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr,
    PDL: tl.constexpr,
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


def embed(
    tokens: Tensor, table: Tensor, r: Tensor, normed: Tensor, squares: Tensor, weight: Tensor, lengths: Tensor
) -> None:
    """Begin a step: tokens [B] long, table [V, D] -> r, normed and squares as `add_residual` leaves them, in as many
    blocks as squares [B, blocks] has; rows in use are one token longer, lengths [B] int32."""
    batch, width = r.shape
    blocks = squares.shape[1]
    columns = triton.cdiv(width, blocks)
    _embed[(batch, blocks)](
        tokens, table, r, normed, squares, weight, lengths, D=width, COLUMNS=columns,
        C=triton.next_power_of_2(columns), num_warps=1, **dependent(r.device),
    )  # fmt: skip

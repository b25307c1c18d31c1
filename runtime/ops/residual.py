"""Where the residual is written: by the embedding at a step's start, and by every o and down projection.

    residual      r += y + bias + B'u
    for the norm  r * weight in the model's dtype, and sums of squares by blocks (`norm`)

Shape legend: B rows, D channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .adapters import Update
from .launch import dependent, release, wait
from .settle import adds, arguments, columns_of, settled


@triton.jit(do_not_specialize=["site"])
def _residual(
    y, bias, r, normed, squares, weight, added, records, site, D: tl.constexpr, C: tl.constexpr, BIAS: tl.constexpr,
    M: tl.constexpr, LORA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * C + tl.arange(0, C)
    real = column < D
    at = row * D + column
    scale = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    there = adds(records, row, site, M, LORA)
    wait(PDL)
    value = settled(y, added, at, there, real, LORA)
    value += tl.load(r + at, mask=real, other=0.0)
    if BIAS:
        value += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    tl.store(r + at, value, mask=real)
    tl.store(normed + at, (value * scale).to(normed.dtype.element_ty), mask=real)
    tl.store(squares + row * tl.num_programs(1) + block, tl.sum(value * value))


def add_residual(
    y: Tensor, r: Tensor, normed: Tensor, squares: Tensor, weight: Tensor, *, update: Update | None = None,
    bias: Tensor | None = None,
) -> None:  # fmt: skip
    """r += y + bias + B'u in place, and the next norm's: r, y [B, D] float32; normed [B, D] in the model's dtype is r *
    weight [D]; squares [B, programs] float32, one sum for each program of a row, so many as `squares_of` says."""
    adapters, constants = arguments(update, r)
    batch, width = r.shape
    _residual[(batch, squares_of(batch, width))](
        y, r if bias is None else bias, r, normed, squares, weight, *adapters, D=width, C=columns_of(batch),
        BIAS=bias is not None, **constants, num_warps=1, **dependent(r.device),
    )  # fmt: skip


def squares_of(batch: int, width: int) -> int:
    """How many sums of squares of a row `add_residual` leaves."""
    return triton.cdiv(width, columns_of(batch))


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

"""h = silu(gate + B'u) * (up + B'u), both normed and with their bias: what the down projection reads.

Shape legend: B rows, F inner channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .adapters import Update
from .launch import dependent, release, wait
from .norm import Norm, rstd_of
from .settle import adds, arguments, columns_of, settled


@triton.jit(do_not_specialize=["site"])
def _gated(
    y, squares, bias, bias_up, h, added, records, site, F: tl.constexpr, C: tl.constexpr, IN: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr,
    M: tl.constexpr, LORA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row = tl.program_id(0)
    column = tl.program_id(1) * C + tl.arange(0, C)
    real = column < F
    at = row * (2 * F) + column
    there = adds(records, row, site, M, LORA)
    there_up = adds(records, row, site + 1, M, LORA)
    wait(PDL)
    gate = settled(y, added, at, there, real, LORA)
    up = settled(y, added, at + F, there_up, real, LORA)
    if NORM:
        rstd = rstd_of(squares, row, BLOCKS, PADDED, IN, EPS)
        gate *= rstd
        up *= rstd
    if BIAS:
        gate += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
        up += tl.load(bias_up + column, mask=real, other=0.0).to(tl.float32)
    tl.store(h + row * F + column, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=real)


def gate_up(
    y: Tensor, h: Tensor, *, update: Update | None = None, norm: Norm | None = None,
    biases: tuple[Tensor, ...] | None = None,
) -> None:  # fmt: skip
    """y [B, 2 F] float32, gate before up; h [B, F] in the model's dtype is written.

    norm and biases [F] are those of the linears.
    """
    adapters, constants = arguments(update, h)
    norms, norm_constants = Norm.arguments(norm, h)
    batch, width = h.shape
    columns = columns_of(batch)
    _gated[(batch, triton.cdiv(width, columns))](
        y, norms, *(biases or (h, h)), h, *adapters, F=width, C=columns, BIAS=biases is not None, **norm_constants,
        **constants, num_warps=1, **dependent(h.device),
    )  # fmt: skip

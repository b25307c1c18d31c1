"""h = silu(gate + B'u) * (up + B'u), both normed and with their bias: what the down projection reads.

Shape legend: B rows, F inner channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .expand import Cut, added, arguments, factors, fetched, lanes, settled
from .launch import dependent, release, wait
from .norm import Norm, rstd_of
from .packed import record_of
from .shrink import Shrink


@triton.jit
def _gated(
    y, squares, bias, bias_up, h, u, records, arena, levels, site, four,
    F: tl.constexpr, IN: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, BLOCKS: tl.constexpr,
    PADDED: tl.constexpr, EPS: tl.constexpr, M: tl.constexpr, R: tl.constexpr, LORA: tl.constexpr,
    QUARTER: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, FINE: tl.constexpr, L: tl.constexpr,
    LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row = tl.program_id(0)
    kind = h.dtype.element_ty
    block, inner = lanes(four, QUARTER, L)
    real = block < LANES // QUARTER
    block += tl.program_id(1) * (LANES // QUARTER)
    column = block * (4 * QUARTER) + inner
    real = real & (column < F)
    record = record_of(records, row, site, M)
    record_up = record_of(records, row, site + 1, M)
    y += row * 2 * F
    u += row * 2 * R
    h += row * F + column
    if LORA:
        tiles = fetched(record, arena, block, inner, real, kind, QUARTER, K, WIDE, FINE)
        tiles_up = fetched(record_up, arena, block, inner, real, kind, QUARTER, K, WIDE, FINE)
    wait(PDL)
    if LORA:
        factor = factors(u, record, K, WIDE, FINE)
        factor_up = factors(u + R, record_up, K, WIDE, FINE)
    rstd = rstd_of(squares, row, BLOCKS, PADDED, IN, EPS) if NORM else 1.0
    g0, g1, g2, g3 = settled(y, rstd, bias, column, F, real, BIAS, QUARTER)
    u0, u1, u2, u3 = settled(y + F, rstd, bias_up, column, F, real, BIAS, QUARTER)
    if LORA:
        g0, g1, g2, g3 = added(
            g0, g1, g2, g3, tiles, factor, rstd, u, record, arena, levels, block, inner, real, kind, QUARTER, K,
            WIDE, FINE, L,
        )  # fmt: skip
        u0, u1, u2, u3 = added(
            u0, u1, u2, u3, tiles_up, factor_up, rstd, u + R, record_up, arena, levels, block, inner, real, kind,
            QUARTER, K, WIDE, FINE, L,
        )  # fmt: skip
    tl.store(h, (g0 * tl.sigmoid(g0) * u0).to(kind), mask=real)
    tl.store(h + QUARTER, (g1 * tl.sigmoid(g1) * u1).to(kind), mask=real & (column + QUARTER < F))
    tl.store(h + 2 * QUARTER, (g2 * tl.sigmoid(g2) * u2).to(kind), mask=real & (column + 2 * QUARTER < F))
    tl.store(h + 3 * QUARTER, (g3 * tl.sigmoid(g3) * u3).to(kind), mask=real & (column + 3 * QUARTER < F))


def gate_up(
    y: Tensor, h: Tensor, *, columns: int, update: Shrink | None = None, norm: Norm | None = None,
    biases: tuple[Tensor, ...] | None = None, cut: Cut | None = None,
) -> None:  # fmt: skip
    """y [B, 2 F] float32, gate before up, in blocks of `columns` each; h [B, F] in the model's dtype is written.

    norm and biases [F] are those of the linears.
    """
    adapters, constants = arguments(update, h)
    norms, norm_constants = Norm.arguments(norm, h)
    batch, width = h.shape
    cut = cut or Cut.of(batch, triton.cdiv(width, columns))
    _gated[(batch, triton.cdiv(width, cut.blocks * columns))](
        y, norms, *(biases or (h, h)), h, *adapters, F=width, BIAS=biases is not None, **norm_constants, **constants,
        **cut.constants(columns), **dependent(h.device),
    )  # fmt: skip

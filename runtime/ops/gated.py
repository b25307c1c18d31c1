"""h = silu(gate + B'u) * (up + B'u): what the down projection reads.

Shape legend: B rows, F inner channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .expand import Cut, arguments, columns_of, expanded
from .launch import dependent, release
from .shrink import Shrink


@triton.jit
def _gated(
    y, h, u, records, arena, levels, pairs, site,
    F: tl.constexpr, M: tl.constexpr, R: tl.constexpr, LORA: tl.constexpr, QUARTER: tl.constexpr, K: tl.constexpr,
    FINE: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row = tl.program_id(0)
    first = tl.program_id(1) * (LANES // QUARTER)
    kind = h.dtype.element_ty
    y += row * 2 * F
    u += row * 2 * R
    g0, g1, g2, g3 = expanded(
        y, u, records, arena, levels, pairs, row, site, first, F, kind, QUARTER, M, LORA, K, FINE, L, LANES, PDL
    )  # fmt: skip
    u0, u1, u2, u3 = expanded(
        y + F, u + R, records, arena, levels, pairs, row, site + 1, first, F, kind, QUARTER, M, LORA, K, FINE, L, LANES,
        PDL,
    )  # fmt: skip
    column = columns_of(first, QUARTER, L)
    mine = tl.arange(0, L) < LANES
    out = h + row * F + column
    tl.store(out, (g0 * tl.sigmoid(g0) * u0).to(kind), mask=mine & (column < F))
    tl.store(out + QUARTER, (g1 * tl.sigmoid(g1) * u1).to(kind), mask=mine & (column + QUARTER < F))
    tl.store(out + 2 * QUARTER, (g2 * tl.sigmoid(g2) * u2).to(kind), mask=mine & (column + 2 * QUARTER < F))
    tl.store(out + 3 * QUARTER, (g3 * tl.sigmoid(g3) * u3).to(kind), mask=mine & (column + 3 * QUARTER < F))


def gate_up(
    y: Tensor, h: Tensor, *, columns: int, update: Shrink | None = None, cut: Cut | None = None
) -> None:  # fmt: skip
    """y [B, 2 F] float32, gate before up, in blocks of `columns` each; h [B, F] in the model's dtype is written."""
    adapters, constants = arguments(update, h)
    batch, width = h.shape
    cut = cut or Cut.of(batch, triton.cdiv(width, columns))
    _gated[(batch, triton.cdiv(width, cut.blocks * columns))](
        y, h, *adapters, F=width, **constants, **cut.constants(columns), **dependent(h.device)
    )  # fmt: skip

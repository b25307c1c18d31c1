"""From what the q, k and v projections put out to what attention reads: B'u, norms of heads, rotary, the row's page.

One program handles one head of one row. Rotary mixes a head's halves, which are the first two and the last two of its
quarters.

Shape legend: B rows, H query heads, Hkv key and value heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ..kv.formats import FULL
from .adapters import Update
from .launch import dependent, release, wait
from .norm import Norm, rstd_of
from .pages import Pages
from .settle import adds, arguments, settled

_PAGE: tl.constexpr = tl.constexpr(PAGE_TOKENS)


@dataclass(frozen=True)
class Heads:
    """What is fixed about q, k and v."""

    cosine: Tensor
    """[positions, D / 2] float32"""
    sine: Tensor
    q_norm: Tensor | None = None
    """[D], of models that norm the heads of queries and keys"""
    k_norm: Tensor | None = None
    eps: float = 0.0


@triton.jit(do_not_specialize=["site"])
def _rotary(
    y, squares, bias_q, bias_k, bias_v, query, numbers, table, lengths, cosine, sine, q_norm, k_norm, pages,
    added, records, site,
    H: tl.constexpr, HKV: tl.constexpr, HEAD_NORM: tl.constexpr, HEAD_EPS: tl.constexpr, IN: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr,
    M: tl.constexpr, LORA: tl.constexpr, UNIT_HEAD: tl.constexpr, F: tl.constexpr, QUARTER: tl.constexpr,
    L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row, head = tl.program_id(0), tl.program_id(1)
    HEAD: tl.constexpr = 4 * QUARTER
    WIDTH: tl.constexpr = (H + 2 * HKV) * HEAD
    # q, k and v are three modules: which one, and which of its heads.
    member = tl.where(head < H, 0, tl.where(head < H + HKV, 1, 2))
    own = head - tl.where(head < H, 0, tl.where(head < H + HKV, H, H + HKV))
    bias = bias_q
    if member == 2:
        bias = bias_v
    elif member == 1:
        bias = bias_k
    lane = tl.arange(0, L)
    real = lane < QUARTER
    there = adds(records, row, site + member, M, LORA)
    wait(PDL)
    # Not before: `embed` releases before it has written this.
    length = tl.load(lengths + row)
    position = tl.maximum(length - 1, 0)
    place = row * WIDTH + head * HEAD + lane
    y0 = settled(y, added, place, there, real, LORA)
    y1 = settled(y, added, place + QUARTER, there, real, LORA)
    y2 = settled(y, added, place + 2 * QUARTER, there, real, LORA)
    y3 = settled(y, added, place + 3 * QUARTER, there, real, LORA)
    if NORM:
        rstd = rstd_of(squares, row, BLOCKS, PADDED, IN, EPS)
        y0 *= rstd
        y1 *= rstd
        y2 *= rstd
        y3 *= rstd
    if BIAS:
        bias += own * HEAD + lane
        y0 += tl.load(bias, mask=real, other=0.0).to(tl.float32)
        y1 += tl.load(bias + QUARTER, mask=real, other=0.0).to(tl.float32)
        y2 += tl.load(bias + 2 * QUARTER, mask=real, other=0.0).to(tl.float32)
        y3 += tl.load(bias + 3 * QUARTER, mask=real, other=0.0).to(tl.float32)
    # Two conditions: without norms there are no weights, and the compiler must not look at what reads them.
    if HEAD_NORM:  # noqa: SIM102
        if member < 2:
            squared = tl.sum(tl.where(real, y0 * y0 + y1 * y1 + y2 * y2 + y3 * y3, 0.0))
            rstd = tl.rsqrt(squared / HEAD + HEAD_EPS)
            scale = q_norm
            if member == 1:
                scale = k_norm
            y0 *= rstd * tl.load(scale + lane, mask=real, other=0.0).to(tl.float32)
            y1 *= rstd * tl.load(scale + QUARTER + lane, mask=real, other=0.0).to(tl.float32)
            y2 *= rstd * tl.load(scale + 2 * QUARTER + lane, mask=real, other=0.0).to(tl.float32)
            y3 *= rstd * tl.load(scale + 3 * QUARTER + lane, mask=real, other=0.0).to(tl.float32)
    if member < 2:
        angle = position * (2 * QUARTER) + lane
        c0 = tl.load(cosine + angle, mask=real, other=0.0)
        c1 = tl.load(cosine + angle + QUARTER, mask=real, other=0.0)
        s0 = tl.load(sine + angle, mask=real, other=0.0)
        s1 = tl.load(sine + angle + QUARTER, mask=real, other=0.0)
        first0 = y0 * c0 - y2 * s0
        first1 = y1 * c1 - y3 * s1
        y2 = y2 * c0 + y0 * s0
        y3 = y3 * c1 + y1 * s1
        y0 = first0
        y1 = first1
    if head < H:
        _store(query + (row * H + own) * HEAD + lane, y0, y1, y2, y3, real, QUARTER)
    elif length > 0:
        # A unit has some tokens' keys, and behind them their values.
        PART: tl.constexpr = _PAGE // F
        slot = position % _PAGE
        unit = tl.load(table + (row * pages + position // _PAGE) * F + slot // PART)
        at = (unit.to(tl.int64) * HKV + own) * UNIT_HEAD + ((member - 1) * PART + slot % PART) * HEAD
        _store(numbers + at + lane, y0, y1, y2, y3, real, QUARTER)


@triton.jit
def _store(out, y0, y1, y2, y3, real, QUARTER: tl.constexpr):
    kind = out.dtype.element_ty
    tl.store(out, y0.to(kind), mask=real)
    tl.store(out + QUARTER, y1.to(kind), mask=real)
    tl.store(out + 2 * QUARTER, y2.to(kind), mask=real)
    tl.store(out + 3 * QUARTER, y3.to(kind), mask=real)


def rotate(
    y: Tensor, query: Tensor, pages: Pages, heads: Heads, *, update: Update | None = None, norm: Norm | None = None,
    biases: tuple[Tensor, ...] | None = None,
) -> None:  # fmt: skip
    """q, k and v of the token being decoded: y [B, (H + 2 Hkv) D] float32 -> query [B, H, D], and its live page.

    D is a multiple of 4; the rotary halves are the first and the last D / 2 channels of a head. norm and biases are
    those of the linears.
    """
    adapters, constants = arguments(update, query)
    norms, norm_constants = Norm.arguments(norm, query)
    batch, count, width = query.shape
    units, tables = pages.units, pages.tables
    weights = (heads.q_norm, heads.k_norm) if heads.q_norm is not None and heads.k_norm is not None else (query, query)
    _rotary[(batch, count + 2 * units.heads)](
        y, norms, *(biases or (query,) * 3), query, pages.memory.view(query.dtype), tables.full, tables.lengths,
        heads.cosine, heads.sine, *weights, tables.full.shape[1], *adapters, H=count, HKV=units.heads,
        HEAD_NORM=heads.q_norm is not None, HEAD_EPS=heads.eps, BIAS=biases is not None, **norm_constants, **constants,
        UNIT_HEAD=units.head_bytes // units.itemsize, F=units.of(FULL), QUARTER=width // 4,
        L=triton.next_power_of_2(width // 4), num_warps=1, **dependent(query.device),
    )  # fmt: skip

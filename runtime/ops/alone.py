"""One row: a linear, its adapter and what consumes it in a single launch.

At batch 1 a step is bound by bytes and then by launches, so there are five a layer and not nine:

    residual   r += W x + B'u, and what the next norm needs
    gated      h = silu(W_gate x + B'u) * (W_up x + B'u)
    rotary     q, k, v = W x + B'u; rotary; q for attention, k and v into the row's page

Outputs come in pairs that belong together: gate and up, the two halves of a head, the two halves of the residual. The
device is filled once: every program goes through a stretch of pairs, weights always one step ahead, and comes to what
else there is to do for them only then. u is made in the same launch by programs of their own, which count themselves
done. They are dispatched first and take a fraction of the time, so that hardly anybody waits for them, and whoever
does is never in their way.

Shape legend: D inputs, R directions at most, K that rounded up, N pairs of a step, C pairs of a program (rounded up),
Q columns of a block of B'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.settings import PAGE_TOKENS

from .launch import dependent, release, wait
from .norm import Norm, rstd_of
from .packed import ENDS, column_values, number, record_of
from .rotary import Heads, Pages
from .shrink import Shrink, shrink_share

_ENDS: tl.constexpr = tl.constexpr(ENDS)
_PAGE: tl.constexpr = tl.constexpr(PAGE_TOKENS)
_RESIDUAL: tl.constexpr = tl.constexpr(0)
_GATED: tl.constexpr = tl.constexpr(1)
_ROTARY: tl.constexpr = tl.constexpr(2)
PAIRS = 2
"""Of a step."""
RESIDENT = 2
"""Programs of a multiprocessor."""


@triton.jit
def _rows(w0, w1, w2, place, column, KIND: tl.constexpr, D: tl.constexpr, OUT: tl.constexpr, H: tl.constexpr,
          HKV: tl.constexpr, Q: tl.constexpr):  # fmt: skip
    """Where the weights of pairs `place` [N] lie at `column` [L]: pointers [N, L] to both of each."""
    w = w0
    w_other = w0
    if KIND == _RESIDUAL:
        first = place
        second = place + OUT // 2
    elif KIND == _GATED:
        w_other = w1
        first = place
        second = place
    else:
        # Pairs of a step are of one head.
        head = tl.min(place) // (Q // 2)
        if head >= H + HKV:
            w = w2
        elif head >= H:
            w = w1
        w_other = w
        first = (head - _before(head, H, HKV)) * Q + place % (Q // 2)
        second = first + Q // 2
    rows = w + first.to(tl.int64)[:, None] * D + column[None, :]
    return rows, w_other + second.to(tl.int64)[:, None] * D + column[None, :]


@triton.jit
def _before(head, H: tl.constexpr, HKV: tl.constexpr):
    """How many heads come before the first of the member that `head` is of: queries, then keys, then values."""
    return tl.where(head < H, 0, tl.where(head < H + HKV, H, H + HKV))


@triton.jit
def _products(
    x, w0, w1, w2, first, KIND: tl.constexpr, D: tl.constexpr, OUT: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr,
    Q: tl.constexpr, LIMIT: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """W x of both outputs of the pairs from `first` on, [C] float32 each. Waits."""
    STEPS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    column = tl.arange(0, BLOCK)
    pair = tl.arange(0, N)
    index = tl.arange(0, C)
    end = tl.minimum(first + CHUNK, LIMIT)
    place = first + pair
    rows, rows_other = _rows(w0, w1, w2, place, column, KIND, D, OUT, H, HKV, Q)
    mask = (place < end)[:, None] & (column < D)[None, :]
    own = tl.load(rows, mask=mask, other=0.0)
    own_other = tl.load(rows_other, mask=mask, other=0.0)
    wait(PDL)
    y = tl.zeros([C], tl.float32)
    y_other = tl.zeros([C], tl.float32)
    sums = tl.zeros([N, BLOCK], tl.float32)
    sums_other = tl.zeros([N, BLOCK], tl.float32)
    for step in range(0, CHUNK // N * STEPS):
        ahead = step + 1
        at = ahead % STEPS * BLOCK + column
        place = first + ahead // STEPS * N + pair
        rows, rows_other = _rows(w0, w1, w2, place, at, KIND, D, OUT, H, HKV, Q)
        mask = (place < end)[:, None] & (at < D)[None, :]
        following = tl.load(rows, mask=mask, other=0.0)
        following_other = tl.load(rows_other, mask=mask, other=0.0)
        at = step % STEPS * BLOCK + column
        given = tl.load(x + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
        sums += own.to(tl.float32) * given
        sums_other += own_other.to(tl.float32) * given
        own = following
        own_other = following_other
        if step % STEPS == STEPS - 1:
            mine = index[None, :] == (step // STEPS * N + pair)[:, None]
            y += tl.sum(tl.where(mine, tl.sum(sums, axis=1)[:, None], 0.0), axis=0)
            y_other += tl.sum(tl.where(mine, tl.sum(sums_other, axis=1)[:, None], 0.0), axis=0)
            sums = tl.zeros([N, BLOCK], tl.float32)
            sums_other = tl.zeros([N, BLOCK], tl.float32)
    return y, y_other


@triton.jit
def _pairs(
    x, squares, w0, w1, w2, bias0, bias1, bias2, u, records, arena, levels, site, count, out0, out1, out2, in0, in1,
    in2, in3, pages, program,
    KIND: tl.constexpr, D: tl.constexpr, OUT: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, Q: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr,
    LORA: tl.constexpr, SHRINKS: tl.constexpr, R: tl.constexpr, K: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program number `program` of those that make outputs: its stretch of pairs, and what becomes of them."""
    LIMIT: tl.constexpr = OUT // 2 if KIND == _RESIDUAL else OUT
    start = program * CHUNK
    y, y_other = _products(x, w0, w1, w2, start, KIND, D, OUT, H, HKV, Q, LIMIT, CHUNK, C, N, BLOCK, PDL)
    place = start + tl.arange(0, C)
    inside = (tl.arange(0, C) < CHUNK) & (place < LIMIT)
    # Which outputs of which members the pairs are.
    head = place // (Q // 2)
    if KIND == _ROTARY:
        member = tl.where(head < H, 0, tl.where(head < H + HKV, 1, 2))
        other = member
        first = (head - _before(head, H, HKV)) * Q + place % (Q // 2)
        second = first + Q // 2
    elif KIND == _GATED:
        member = tl.zeros([C], tl.int32)
        other = member + 1
        first = place
        second = place
    else:
        member = tl.zeros([C], tl.int32)
        other = member
        first = place
        second = place + OUT // 2
    if NORM:
        rstd = rstd_of(squares, 0, BLOCKS, PADDED, D, EPS)
        y *= rstd
        y_other *= rstd
    if BIAS:
        y += _bias(bias0, bias1, bias2, member, first, inside)
        y_other += _bias(bias0, bias1, bias2, other, second, inside)
    if LORA:
        record = record_of(records, 0, site + member, M)[None, :]
        record_other = record_of(records, 0, site + other, M)[None, :]
        end2 = tl.where(inside[None, :], number(record, _ENDS + 3), 0)
        end2_other = tl.where(inside[None, :], number(record_other, _ENDS + 3), 0)
        if tl.max(tl.maximum(end2, end2_other)) > 0:
            b = column_values(arena, record, levels, first, x.dtype.element_ty, Q, K)
            b_other = column_values(arena, record_other, levels, second, x.dtype.element_ty, Q, K)
            # An atomic is done by one thread of a program, a load by all, who would all look at this one number.
            while tl.atomic_add(count, 0, sem="relaxed") < SHRINKS:
                pass
            k = tl.arange(0, K)[:, None]
            factor = tl.load(u + member[None, :] * R + k, mask=k < end2, other=0.0)
            factor_other = tl.load(u + other[None, :] * R + k, mask=k < end2_other, other=0.0)
            y += tl.sum(tl.where(k < end2, b * factor, 0.0), axis=0)
            y_other += tl.sum(tl.where(k < end2_other, b_other * factor_other, 0.0), axis=0)
    if KIND == _RESIDUAL:
        # out: residual, normed, squares; in: the next norm's weight
        squared = _write(y, out0, out1, in0, first, inside) + _write(y_other, out0, out1, in0, second, inside)
        tl.store(out2 + program, squared)
    elif KIND == _GATED:
        # out: h
        tl.store(out0 + first, (y * tl.sigmoid(y) * y_other).to(out0.dtype.element_ty), mask=inside)
    else:
        # out: query, keys, values; in: cosine, sine, table, lengths
        length = tl.load(in3)
        position = tl.maximum(length - 1, 0)
        angle = position * (Q // 2) + place % (Q // 2)
        turns = member < 2
        cosine = tl.where(turns, tl.load(in0 + angle), 1.0)
        sine = tl.where(turns, tl.load(in1 + angle), 0.0)
        turned = (y * cosine - y_other * sine).to(out0.dtype.element_ty)
        turned_other = (y_other * cosine + y * sine).to(out0.dtype.element_ty)
        tl.store(out0 + first, turned, mask=inside & (member == 0))
        tl.store(out0 + second, turned_other, mask=inside & (member == 0))
        page = tl.load(in2 + position // _PAGE).to(tl.int64)
        at = ((page * HKV + first // Q) * _PAGE + position % _PAGE) * Q
        used = tl.where(inside, length, 0) > 0
        tl.store(out1 + at + first % Q, turned, mask=used & (member == 1))
        tl.store(out1 + at + second % Q, turned_other, mask=used & (member == 1))
        tl.store(out2 + at + first % Q, turned, mask=used & (member == 2))
        tl.store(out2 + at + second % Q, turned_other, mask=used & (member == 2))


@triton.jit
def _bias(bias0, bias1, bias2, member, at, inside):
    """[C] float32 of outputs `at` of members `member`."""
    found = tl.load(bias0 + at, mask=inside & (member == 0), other=0.0).to(tl.float32)
    found += tl.load(bias1 + at, mask=inside & (member == 1), other=0.0).to(tl.float32)
    return found + tl.load(bias2 + at, mask=inside & (member == 2), other=0.0).to(tl.float32)


@triton.jit
def _alone(
    x, squares, w0, w1, w2, bias0, bias1, bias2, u, records, arena, levels, pairs, site, count, out0, out1, out2, in0,
    in1, in2, in3, pages,
    KIND: tl.constexpr, D: tl.constexpr, OUT: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, Q: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr,
    LORA: tl.constexpr, MEMBERS: tl.constexpr, R: tl.constexpr, K: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    program = tl.program_id(0)
    if LORA:
        if program < MEMBERS * R:
            shrink_share(
                x, squares, u, records, arena, levels, pairs, site, program, D, R, MEMBERS, R, M, NORM, BLOCKS, PADDED,
                EPS, 1, BLOCK, PDL,
            )  # fmt: skip
            # Nor may a program that had nothing to read count before the count is 0.
            wait(PDL)
            # One thread counts for all: what the others have stored comes first.
            tl.debug_barrier()
            tl.atomic_add(count, 1, sem="release")
        else:
            _pairs(
                x, squares, w0, w1, w2, bias0, bias1, bias2, u, records, arena, levels, site, count, out0, out1, out2,
                in0, in1, in2, in3, pages, program - MEMBERS * R, KIND, D, OUT, H, HKV, Q, BIAS, NORM, BLOCKS, PADDED,
                EPS, LORA, MEMBERS * R, R, K, M, CHUNK, C, N, BLOCK, PDL,
            )  # fmt: skip
    else:
        _pairs(
            x, squares, w0, w1, w2, bias0, bias1, bias2, u, records, arena, levels, site, count, out0, out1, out2, in0,
            in1, in2, in3, pages, program, KIND, D, OUT, H, HKV, Q, BIAS, NORM, BLOCKS, PADDED, EPS, LORA, 0, R, K, M,
            CHUNK, C, N, BLOCK, PDL,
        )  # fmt: skip


@triton.jit
def _write(y, r, normed, weight, at, inside):
    """Add to the residual; returns the sum of squares."""
    value = y + tl.load(r + at, mask=inside, other=0.0)
    tl.store(r + at, value, mask=inside)
    scaled = value * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, scaled.to(normed.dtype.element_ty), mask=inside)
    return tl.sum(tl.where(inside, value * value, 0.0))


@dataclass(frozen=True)
class Source:
    """What a linear reads, and what is added to it."""

    x: Tensor
    """[1, D] in the model's dtype"""
    weights: tuple[Tensor, ...]
    """[N_i, D] each"""
    biases: tuple[Tensor, ...] | None
    norm: Norm | None
    update: Shrink | None
    count: Tensor
    """[1] int32, 0 before the launch, where the shrink's programs count themselves"""


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _chunk(pairs: int, device: torch.device) -> int:
    """Pairs of a program, whole steps, so that all programs run at once."""
    share = triton.cdiv(pairs, RESIDENT * _multiprocessors(device))
    return triton.cdiv(share, PAIRS) * PAIRS


def _launch(
    kind: int, source: Source, outputs: int, pairs: int, columns: int, tensors: tuple[Any, ...],
    heads: tuple[int, int] = (1, 1),
) -> None:  # fmt: skip
    x, update = source.x, source.update
    width = x.shape[1]
    weights = [*source.weights, *[source.weights[0]] * (3 - len(source.weights))]
    biases = [*(source.biases or source.weights), *[source.weights[0]] * (3 - len(source.weights))]
    adapters: tuple[Any, ...] = (x,) * 5 + (0,)
    members, most, modules = 1, 1, 1
    if update is not None:
        adapters = (update.u, *update.reads.tensors, update.site)
        members, most, modules = update.u.shape[1], update.u.shape[2], update.reads.records.shape[1]
    norms, constants = Norm.arguments(source.norm, x)
    shrinks = 0 if update is None else members * most
    chunk = _chunk(pairs, x.device)
    _alone[(shrinks + triton.cdiv(pairs, chunk),)](
        x, norms, *weights, *biases, *adapters, source.count, *tensors,
        KIND=kind, D=width, OUT=outputs, H=heads[0], HKV=heads[1], Q=columns, BIAS=source.biases is not None,
        LORA=update is not None, MEMBERS=members, R=most, K=triton.next_power_of_2(most), M=modules, CHUNK=chunk,
        C=triton.next_power_of_2(chunk), N=PAIRS, BLOCK=min(2048, triton.next_power_of_2(width)), num_warps=8,
        **constants, **dependent(x.device),
    )  # fmt: skip


def residual_programs(width: int, device: torch.device) -> int:
    """How many programs write a residual of `width`, and so how many sums of squares there are."""
    return triton.cdiv(width // 2, _chunk(width // 2, device))


def linear_residual(
    source: Source, r: Tensor, normed: Tensor, squares: Tensor, weight: Tensor, *, columns: int
) -> None:  # fmt: skip
    """r [1, D] float32 += W x + B'u; normed [1, D] and squares [1, residual_programs(D)] as `residual` has them."""
    width = r.shape[1]
    _launch(0, source, width, width // 2, columns, (r, normed, squares, *(weight,) * 4, 0))


def linear_gated(source: Source, h: Tensor, *, columns: int) -> None:
    """h [1, F] = silu(gate) * up."""
    _launch(1, source, h.shape[1], h.shape[1], columns, (*(h,) * 7, 0))


def linear_rotary(source: Source, query: Tensor, pages: Pages, heads: Heads) -> None:
    """query [1, H, D] and the row's page; heads without norms."""
    _, count, width = query.shape
    kv_heads = pages.keys.shape[1]
    outputs = (count + 2 * kv_heads) * width // 2
    tensors = (
        query, pages.keys, pages.values, heads.cosine, heads.sine, pages.table, pages.lengths, pages.table.shape[1],
    )  # fmt: skip
    _launch(2, source, outputs, outputs, width, tensors, (count, kv_heads))

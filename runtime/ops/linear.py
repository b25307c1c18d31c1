"""A frozen linear at every row of the batch.

    y = W x      [B, N] float32, up to three weights that share their input (q, k, v)

Where x has yet to be normed (`norm`), so has y: who consumes it does that, of whom there are fewer. Only behind the
last linear there is nobody. At batch 1 a program reads whole rows of a weight as a matrix-vector product. Else it holds
a tile of rows against the whole batch on the tensor cores.

How a weight is stored is the business of `_vector` and `_matrix` alone.

Shape legend: B rows, D inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .adapters import NO_WORK, Update, Work, add_beside
from .expand import Cut, expand_share
from .launch import dependent, dot, release, wait
from .norm import Norm, rstd_of
from .ready import clear, tell_x
from .shrink import Shares, shrink_share


@dataclass(frozen=True)
class Tiles:
    """How the work is cut; measured, not derived (docs/log.md)."""

    outputs: int
    """Rows of a weight per program."""
    inputs: int
    """Columns per step of its loop."""
    warps: int
    stages: int

    @classmethod
    def of(cls, batch: int, outputs: int, inputs: int, itemsize: int = 2, adapters: bool = False) -> Tiles:
        """The best found for a batch of this size and a weight of this shape, values of `itemsize` bytes."""
        if batch == 1:
            # Steps are unrolled, and what is asked for ahead lies in registers, of which a thread should have 64: they
            # hold six steps of 16 numbers beside programs that make B'u, seven alone, and any of 4 (twice the threads).
            least, most = (0, 6) if adapters else (2, 7)
            columns, warps = (2048, 4) if least < inputs / 2048 <= most else (1024, 8)
            return cls(1, min(columns, triton.next_power_of_2(inputs)), warps, 1)
        # Larger programs are fewer, and leave room for those that make B'u beside them; floats would not fit registers.
        large = adapters and itemsize == 2 and batch >= 16 and outputs >= 64 * _LARGE_SIDE
        side, columns = (_LARGE_SIDE, 128) if large else (_SIDE, 256)
        step = (side + max(16, triton.next_power_of_2(batch))) * itemsize
        while columns > 32 and 2 * columns * step > _SHARED_BYTES:
            columns //= 2
        # Few programs: the steps of each must be deeper in flight.
        stages = 5 if outputs <= 132 * _SIDE else 3
        return cls(side, columns, 4, min(stages, _SHARED_BYTES // (columns * step)))


_REGISTERS = 64
"""Of a thread, where a launch makes B'u as well, so that as many programs read weights as without."""
_AHEAD = 0.4
"""Of the weights' programs, that start before those that make B'u: by then u is there."""
_SIDE, _LARGE_SIDE = 32, 128
"""Rows of a weight per program that multiplies them with a batch."""
_SHARED_BYTES = 200 * 1024
"""Shared memory that a program's steps in flight may take."""


@triton.jit
def _vector(
    x, w, y, squares, block, offset, outputs, D: tl.constexpr, NORM: tl.constexpr, BLOCKS: tl.constexpr,
    PADDED: tl.constexpr, EPS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of N outputs of one row, the batch's only one."""
    n = block * N + tl.arange(0, N)
    column = tl.arange(0, BLOCK)
    rows = w + n.to(tl.int64)[:, None] * D
    inside = (n < outputs)[:, None]
    # The first weights are on their way before the kernel before has ended, and each next while the one before it is
    # used: several, as there is no loop that would keep the compiler from asking for them ahead.
    part = tl.load(rows + column[None, :], mask=inside & (column < D)[None, :], other=0.0)
    wait(PDL)
    own = tl.load(x + column, mask=column < D, other=0.0)
    sums = tl.zeros([N, BLOCK], tl.float32)
    for start in tl.static_range(BLOCK, D + BLOCK, BLOCK):
        at = start + column
        following = tl.load(rows + at[None, :], mask=inside & (at < D)[None, :], other=0.0)
        ahead = tl.load(x + at, mask=at < D, other=0.0)
        sums += part.to(tl.float32) * own.to(tl.float32)[None, :]
        part = following
        own = ahead
    out = tl.sum(sums, axis=1)
    if NORM:
        out *= rstd_of(squares, 0, BLOCKS, PADDED, D, EPS)
    tl.store(y + offset + n, out, mask=n < outputs)


@triton.jit
def _matrix(
    x, w, y, squares, block, offset, outputs, TOTAL: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
    NORM: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of N outputs of all rows."""
    n = block * N + tl.arange(0, N)
    b = tl.arange(0, M)
    column = tl.arange(0, BLOCK)
    rows = w + n.to(tl.int64)[None, :] * D
    sums = tl.zeros([M, N], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + column
        part = tl.load(rows + at[:, None], mask=(n < outputs)[None, :] & (at < D)[:, None], other=0.0)
        own = tl.load(x + b[:, None] * D + at[None, :], mask=(b < B)[:, None] & (at < D)[None, :], other=0.0)
        sums = dot(own, part, sums)
    if NORM:
        k = tl.arange(0, PADDED)
        squared = tl.load(
            squares + b[:, None] * BLOCKS + k[None, :], mask=(b < B)[:, None] & (k < BLOCKS)[None, :], other=0.0
        )
        sums *= tl.rsqrt(tl.sum(squared, axis=1) / D + EPS)[:, None]
    tl.store(y + b[:, None] * TOTAL + offset + n[None, :], sums, mask=(b < B)[:, None] & (n < outputs)[None, :])


@triton.jit
def _weights(
    x, squares, w0, w1, w2, y, block, B: tl.constexpr, D: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    N2: tl.constexpr, NORM: tl.constexpr, IN: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
    EPS: tl.constexpr, BATCH: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of N outputs of one of the weights."""
    SECOND: tl.constexpr = (N0 + N - 1) // N
    THIRD: tl.constexpr = SECOND + (N1 + N - 1) // N
    w = w0
    if block >= THIRD:
        w = w2
    elif block >= SECOND:
        w = w1
    outputs = tl.where(block >= THIRD, N2, tl.where(block >= SECOND, N1, N0))
    offset = tl.where(block >= THIRD, N0 + N1, tl.where(block >= SECOND, N0, 0))
    block -= tl.where(block >= THIRD, THIRD, tl.where(block >= SECOND, SECOND, 0))
    TOTAL: tl.constexpr = N0 + N1 + N2
    if B == 1:
        _vector(x, w, y, squares, block, offset, outputs, D, NORM, BLOCKS, PADDED, EPS, N, BLOCK, PDL)
    else:
        wait(PDL)
        _matrix(x, w, y, squares, block, offset, outputs, TOTAL, B, D, NORM, BLOCKS, PADDED, EPS, BATCH, N, BLOCK)


@triton.jit(do_not_specialize=["site", "before"])
def _linear(
    x, squares, w0, w1, w2, y, added, u, two, ready, before, records, arena, levels, site, B: tl.constexpr,
    D: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, NORM: tl.constexpr, IN: tl.constexpr,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr, BATCH: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, LORA: tl.constexpr, SHRINKS: tl.constexpr, AHEAD: tl.constexpr, EXPANDS: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, MEMBERS: tl.constexpr, M: tl.constexpr, SHARES: tl.constexpr,
    SHRINK_K: tl.constexpr, SHRINK_BLOCK: tl.constexpr, SHRINK_WIDE: tl.constexpr, QUARTER: tl.constexpr,
    K: tl.constexpr, WIDE: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs in this order: SHRINKS make u, AHEAD multiply weights, EXPANDS make B'u, the others multiply weights."""
    release(PDL)
    program = tl.program_id(0)
    LATE: tl.constexpr = SHRINKS + AHEAD
    if SHRINKS > 0 and program < SHRINKS:
        shrink_share(
            x, u, two, ready, records, arena, levels, site, program, D, N0, N1, N2, Q, R, MEMBERS, SHARES, M, B,
            SHRINK_K, SHRINK_BLOCK, SHRINK_WIDE, True, PDL,
        )  # fmt: skip
    elif EXPANDS > 0 and (program >= LATE) & (program < LATE + EXPANDS):
        expand_share(
            added, u, two, ready, records, arena, levels, site, program - LATE, x.dtype.element_ty, N0, N1, N2, R,
            MEMBERS, M, B, SHARES, SHRINK_K, QUARTER, K, WIDE, L, LANES,
        )  # fmt: skip
    else:
        block = program - SHRINKS - tl.where(program < LATE, 0, EXPANDS)
        if LORA and block == 0:
            # Whoever looked at the numbers of the site before has ended.
            wait(PDL)
            clear(ready, before, B, BATCH)
            if SHRINKS == 0:
                # `adapters` may begin.
                tell_x(ready, site, B, BATCH)
        _weights(
            x, squares, w0, w1, w2, y, block, B, D, N0, N1, N2, NORM, IN, BLOCKS, PADDED, EPS, BATCH, N, BLOCK, PDL
        )  # fmt: skip


def linear(
    x: Tensor, weights: tuple[Tensor, ...], y: Tensor, *, norm: Norm | None = None, update: Update | None = None,
    tiles: Tiles | None = None, shares: Shares | None = None, cut: Cut | None = None,
) -> None:  # fmt: skip
    """Launch it; x [B, D] contiguous, weights of up to three linears [N_i, D], y [B, sum of N_i] float32.

    With an `update` what rows' own adapters add is made as well (`adapters`).
    """
    batch, inputs = x.shape
    sizes = [len(w) for w in weights] + [0] * (3 - len(weights))
    tiles = tiles or Tiles.of(batch, sum(sizes), inputs, x.element_size(), update is not None)
    padded = [*weights, *[weights[0]] * (3 - len(weights))]
    norms, constants = Norm.arguments(norm, x)
    blocks = sum(triton.cdiv(size, tiles.outputs) for size in sizes)
    adapters: tuple[Any, ...] = (x, x, 2, x, 0, *(x,) * 3, 0)
    work = inside = NO_WORK
    if update is not None:
        adapters, work = update.tensors, Work.of(update, inputs, sizes, shares, cut)
        inside = work if batch == 1 else NO_WORK
    limit = {"maxnreg": _REGISTERS} if inside.shrinks and x.is_cuda else {}
    _linear[(inside.shrinks + inside.expands + blocks,)](
        x, norms, *padded, y, *adapters, B=batch, D=inputs, N0=sizes[0], N1=sizes[1], N2=sizes[2],
        BATCH=max(16, triton.next_power_of_2(batch)), N=tiles.outputs, BLOCK=tiles.inputs, LORA=update is not None,
        SHRINKS=inside.shrinks, AHEAD=int(_AHEAD * blocks) if inside.expands else 0, EXPANDS=inside.expands,
        **inside.constants, num_warps=tiles.warps, num_stages=tiles.stages, **constants, **limit, **dependent(x.device),
    )  # fmt: skip
    if update is not None and batch > 1:
        add_beside(x, update, sizes, work)

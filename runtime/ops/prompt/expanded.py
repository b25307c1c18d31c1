"""B'u of prompt tokens, made where a linear's outputs are consumed, so that nobody stores it.

A program has some tokens of one tile, and goes through columns, some at a time. Its tokens read the same factors, so
what it adds is a product of matrices, on tensor cores: [SUB, n] of u by [n, C] of B', a step of directions at a time. u
of the first step, mostly the only one, it keeps; while it multiplies, what it needs next is on its way.

Shape legend: T tokens, N tiles, R directions at most, n that are read, Q columns of a block of B', M modules. In
kernels: SUB tokens and C columns of a program, K directions of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import dot
from ..packed import ENDS, record_of
from .matrices import Added

_ENDS: tl.constexpr = tl.constexpr(ENDS)
WIDE = 64
"""Directions of a step in two bytes, at most: of most adapters all, so that nothing waits for a second step."""
NARROW = 16
"""And in four, which no tensor core multiplies: registers hold both factors."""


@dataclass(frozen=True)
class Patch:
    """What one program takes."""

    tokens: int
    """SUB, a power of two from 16 on that divides TILE"""
    columns: int
    """C, a power of two from 16 on; 0 where the kernel leaves no choice"""
    turns: int
    """How many times as many it goes through; 0 where the kernel leaves no choice"""
    warps: int
    stages: int
    """How many turns' loads are under way at once, its own included"""


@triton.jit
def directions_of(records, factors, module, M: tl.constexpr, LORA: tl.constexpr):
    """n of a tile's tokens: how many directions its factors have of a module; 0 without factors."""
    if LORA:
        return tl.load(record_of(records, factors, module, M) + (_ENDS + 3), mask=factors >= 0, other=0)
    else:
        return 0


@triton.jit
def directions_at(
    u, start, token, there, member, n, MEMBERS: tl.constexpr, R: tl.constexpr, K: tl.constexpr, LORA: tl.constexpr
):
    """u [SUB, K] of tokens [SUB] that are `there`, from direction `start` on; 0 behind the last one."""
    direction = start + tl.arange(0, K)
    if LORA:
        # Loads are wide only if it is known that they end at a multiple of what one of them takes.
        loaded = direction < (tl.cdiv(n, 8) * 8 if R % 8 == 0 else n)
        at = ((token * MEMBERS + member) * R)[:, None] + direction[None, :]
        value = tl.load(u + at, mask=there[:, None] & loaded[None, :], other=0.0)
        # What lies behind the last direction may be no number.
        return tl.where((direction < n)[None, :], value, 0.0)
    else:
        return direction


@triton.jit
def _columns(
    b, start, factors, n, block, within, real, SET: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, K: tl.constexpr
):
    """B' [K, C] from direction `start` on, of columns `within` their `block`."""
    direction = start + tl.arange(0, K)
    at = ((factors * SET + block) * (R * Q) + within)[None, :] + (direction * Q)[:, None]
    return tl.load(b + at, mask=(direction < n)[:, None] & real[None, :], other=0.0)


@triton.jit
def expanded(
    own, u, b, token, there, factors, member, n, block, within, real, MEMBERS: tl.constexpr, SET: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, LORA: tl.constexpr, SUB: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """B'u [SUB, C] float32 of a member for tokens [SUB] that are `there`, all with n directions of `factors`: of
    columns `within` their `block` [C]. `own` is u of the first K directions."""
    sums = tl.zeros([SUB, C], tl.float32)
    if LORA:
        sums = dot(own, _columns(b, 0, factors, n, block, within, real, SET, R, Q, K), sums)
        if R > K:
            for start in tl.range(K, n, K, num_stages=1):
                more = directions_at(u, start, token, there, member, n, MEMBERS, R, K, LORA)
                sums = dot(more, _columns(b, start, factors, n, block, within, real, SET, R, Q, K), sums)
    return sums


@triton.jit
def rstd_of_tokens(
    squares, token, there, BLOCKS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr
):
    """[SUB]: 1 over the root mean square of every token, from squares [T, BLOCKS]; of those not there it means
    nothing."""
    block = tl.arange(0, PADDED)
    mask = there[:, None] & (block < BLOCKS)[None, :]
    own = tl.load(squares + (token * BLOCKS)[:, None] + block[None, :], mask=mask, other=0.0)
    return tl.rsqrt(tl.sum(own, axis=1) / D + EPS)


def arguments(update: Added | None, like: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A kernel's arguments u, b, records and site, and its constants; without an update nothing is added."""
    if update is None:
        constants: dict[str, Any] = {"M": 1, "MEMBERS": 1, "SET": 1, "R": 1, "Q": 1, "K": NARROW, "LORA": False}
        return (like, like, like, 0), constants
    factors, records = update.factors, update.factors.reads.records
    _, members, most = update.u.shape
    step = NARROW if update.u.dtype == torch.float32 else max(NARROW, min(WIDE, triton.next_power_of_2(most)))
    constants = {"M": records.shape[1], "MEMBERS": members, "SET": factors.b.shape[1], "R": most}
    constants |= {"Q": factors.columns, "K": step, "LORA": True}
    return (update.u, factors.b, records, factors.site), constants

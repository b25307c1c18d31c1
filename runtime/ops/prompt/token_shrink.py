"""u = weight * (A' x) of the tokens of a pass: what their rows' own adapters make of x, at every member of a site.

Of the arithmetic there is little, of reading more, so the work is cut to fill the device: a program has the tokens of a
tile, or a part of them, and a share of the inputs, and makes sums of all directions of all members with it, so that x
is read once. It leaves its sums in scratch, and a second launch adds those of all shares, in their order, whatever the
order in which they were made. That the last program of a tile adds them instead would save the launch, but one
multiprocessor would read what all others have written. Where one share has all inputs there is nothing to add.

Shape legend: T tokens, N tiles, S sets of factors, R directions at most, D inputs, M modules.
In kernels: ROWS tokens of a program, RP the next power of two to R, BLOCK inputs of a step, SHARE of a program.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import dependent, dot, release, wait
from ..packed import ENDS, number, record_of
from .matrices import Factors
from .tiles import TILE, tile_of

_TILE: tl.constexpr = tl.constexpr(TILE)
_ENDS: tl.constexpr = tl.constexpr(ENDS)
_DOT_SIDE = 16
"""The least side of a matrix that tensor cores multiply."""
_PROGRAMS = 132
"""As many as an H200 has multiprocessors"""
_LEAST_INPUTS = 256
"""Of a share: of less a program writes more sums than it reads numbers."""
_SHARED_BYTES = 200 * 1024
"""Of what a program may hold of steps that are on their way"""
_JOINED = 8
"""Tokens of a program that adds shares"""


@triton.jit
def _directions(records, row, module, M: tl.constexpr):
    """How many a set reads of a module."""
    return number(record_of(records, row, module, M), _ENDS + 3)


@triton.jit
def _plus(sums, x, a, member, count, at, R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr):
    """sums [ROWS, RP] and what x [ROWS, BLOCK], inputs `at`, adds to the first `count` directions of a member."""
    direction = tl.arange(0, RP)
    mask = (direction < count)[:, None] & (at < D)[None, :]
    own = tl.load(a + (member * R + direction)[:, None] * D + at[None, :], mask=mask, other=0.0)
    return dot(x, tl.trans(own), sums)


@triton.jit
def _weighted(u, sums, weights, token, real, member, R: tl.constexpr, MEMBERS: tl.constexpr, RP: tl.constexpr):
    """Write sums [., RP] of tokens, those that are `real`, to their member's u."""
    direction = tl.arange(0, RP)
    weight = tl.load(weights + token, mask=real, other=0.0)
    value = (sums * weight[:, None]).to(u.dtype.element_ty)
    at = (token * MEMBERS + member)[:, None] * R + direction[None, :]
    tl.store(u + at, value, mask=real[:, None] & (direction < R)[None, :])


@triton.jit
def _filled(count):
    """How many directions of a member's sums lie in scratch: those that are read, and some of zeros, so that whole
    sectors of 32 bytes are written."""
    return tl.cdiv(count, 8) * 8


@triton.jit
def _leave(
    u, scratch, sums, weights, first, row, real, tile, split, member, count, R: tl.constexpr, MEMBERS: tl.constexpr,
    RP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Sums [ROWS, RP] of a member go to scratch, or are u where there is one share."""
    if SPLITS == 1:
        _weighted(u, sums, weights, first + row, real, member, R, MEMBERS, RP)
    else:
        direction = tl.arange(0, RP)
        at = (((tile * SPLITS + split) * _TILE + row) * MEMBERS + member)[:, None] * RP + direction[None, :]
        tl.store(scratch + at, sums, mask=real[:, None] & (direction < _filled(count))[None, :])


@triton.jit(do_not_specialize=["site"])
def _shrink(
    x, a, records, weights, tiles, u, scratch, site, D: tl.constexpr, R: tl.constexpr, MEMBERS: tl.constexpr,
    M: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    SHARE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    wait(PDL)
    PARTS: tl.constexpr = _TILE // ROWS
    tile, split = tl.program_id(0) // PARTS, tl.program_id(1)
    row = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    first, count, _, _, own = tile_of(tiles, tile)
    if (own >= 0) & (tl.program_id(0) % PARTS * ROWS < count):
        real = row < count
        count0 = _directions(records, own, site, M)
        count1 = _directions(records, own, site + 1, M) if MEMBERS > 1 else 0
        count2 = _directions(records, own, site + 2, M) if MEMBERS > 2 else 0
        a += own.to(tl.int64) * (MEMBERS * R * D)
        own_x = x + (first + row)[:, None] * D
        sums0 = tl.zeros([ROWS, RP], tl.float32)
        sums1 = sums0
        sums2 = sums0
        for start in tl.range(split * SHARE, tl.minimum(split * SHARE + SHARE, D), BLOCK, num_stages=STAGES):
            at = start + tl.arange(0, BLOCK)
            values = tl.load(own_x + at[None, :], mask=real[:, None] & (at < D)[None, :], other=0.0)
            sums0 = _plus(sums0, values, a, 0, count0, at, R, D, RP)
            if MEMBERS > 1:
                sums1 = _plus(sums1, values, a, 1, count1, at, R, D, RP)
            if MEMBERS > 2:
                sums2 = _plus(sums2, values, a, 2, count2, at, R, D, RP)
        _leave(u, scratch, sums0, weights, first, row, real, tile, split, 0, count0, R, MEMBERS, RP, SPLITS)
        if MEMBERS > 1:
            _leave(u, scratch, sums1, weights, first, row, real, tile, split, 1, count1, R, MEMBERS, RP, SPLITS)
        if MEMBERS > 2:
            _leave(u, scratch, sums2, weights, first, row, real, tile, split, 2, count2, R, MEMBERS, RP, SPLITS)


@triton.jit(do_not_specialize=["site"])
def _join(
    scratch, records, weights, tiles, u, site, R: tl.constexpr, MEMBERS: tl.constexpr, M: tl.constexpr,
    RP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    wait(PDL)
    PARTS: tl.constexpr = _TILE // ROWS
    tile, member = tl.program_id(0) // PARTS, tl.program_id(1)
    row = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    direction = tl.arange(0, RP)
    first, count, _, _, own = tile_of(tiles, tile)
    if (own >= 0) & (tl.program_id(0) % PARTS * ROWS < count):
        real = row < count
        mask = real[:, None] & (direction < _filled(_directions(records, own, site + member, M)))[None, :]
        at = ((tile * SPLITS * _TILE + row) * MEMBERS + member)[:, None] * RP + direction[None, :]
        sums = tl.zeros([ROWS, RP], tl.float32)
        # Unrolled: several reads are under way together.
        for split in tl.static_range(SPLITS):
            sums += tl.load(scratch + at + split * (_TILE * MEMBERS * RP), mask=mask, other=0.0)
        _weighted(u, sums, weights, first + row, real, member, R, MEMBERS, RP)


@dataclass(frozen=True)
class ShrinkCut:
    """How the work is cut; reckoned from what is read and written, see `of`."""

    tokens: int
    """Of a program, a power of two up to TILE"""
    inputs: int
    """Of a step"""
    share: int
    """Inputs of a program, whole steps"""
    warps: int
    stages: int
    """Steps on their way to shared memory, that at hand among them"""

    @classmethod
    def of(cls, tokens: int, members: int, directions: int, inputs: int, dtype: torch.dtype) -> ShrinkCut:
        """For passes of so many tokens at a site. Of bfloat16 a program has half a tile, of float32 less, as without
        tensor cores operands lie in registers as well. As many shares as fill the device with one program a
        multiprocessor where all tokens are one row's: every share more is written and read once more. Of 2,048 and 512
        tokens measured against whole tiles and fewer programs (docs/log.md)."""
        width = members * _padded(directions)
        if dtype == torch.float32:
            own, step, warps, stages = 32, 32, 4, 2
        else:
            own, step, warps = TILE // 2, 64, (4 if width <= 256 else 8)
            stages = max(2, min(4, _SHARED_BYTES // ((own + width) * step * dtype.itemsize)))
        most = max(1, min(_PROGRAMS // triton.cdiv(tokens, own), inputs // _LEAST_INPUTS))
        return cls(own, step, triton.cdiv(triton.cdiv(inputs, most), step) * step, warps, stages)

    def splits(self, inputs: int) -> int:
        """Shares of so many inputs, none of them empty."""
        return triton.cdiv(inputs, self.share)


def _padded(directions: int) -> int:
    """RP"""
    return max(_DOT_SIDE, triton.next_power_of_2(directions))


def _numbers(tiles: int, splits: int, members: int, directions: int) -> int:
    """Of scratch that a launch takes; a single share takes none."""
    return tiles * splits * TILE * members * _padded(directions) if splits > 1 else 0


@dataclass(frozen=True)
class ShrinkScratch:
    """What the shares of one launch leave for the next, which adds them; sites that follow each other share it."""

    sums: Tensor
    """[numbers] float32, of a site [N, shares, TILE, members, RP]"""

    @classmethod
    def of(
        cls, tokens: int, tiles: int, sites: Iterable[tuple[int, int]], directions: int, dtype: torch.dtype,
        device: torch.device,
    ) -> ShrinkScratch:  # fmt: skip
        """For passes of so many tokens, in that many tiles, at sites of (members, inputs), in a model of `dtype`."""
        most = 0
        for members, inputs in sites:
            splits = ShrinkCut.of(tokens, members, directions, inputs, dtype).splits(inputs)
            most = max(most, _numbers(tiles, splits, members, directions))
        return cls(torch.empty(most, device=device))


def shrink_tokens(
    x: Tensor, factors: Factors, weights: Tensor, tiles: Tensor, u: Tensor, scratch: ShrinkScratch,
    cut: ShrinkCut | None = None,
) -> None:  # fmt: skip
    """u[t, m, d] = weights[t] * sum over k of x[t, k] * a[set, m, d, k], of tokens of tiles that have factors.

    x [T, D] in the model's dtype, weights [T] float32, tiles [N, FIELDS], u [T, members, R] in the model's dtype: sums
    and weights are float32, u is rounded once. Directions that the set does not read become 0; of tokens of no tile, or
    of one without factors, u is left as it is. All tensors are contiguous. `scratch` is for at least these tiles,
    members, directions and inputs.
    """
    inputs, (_, members, most) = x.shape[1], u.shape
    assert members <= 3, "a site has up to three members"
    cut = cut or ShrinkCut.of(len(x), members, most, inputs, x.dtype)
    splits, records = cut.splits(inputs), factors.reads.records
    assert scratch.sums.numel() >= _numbers(len(tiles), splits, members, most), "shares need a place for their sums"
    sizes = {"R": most, "MEMBERS": members, "M": records.shape[1], "RP": _padded(most), "SPLITS": splits}
    _shrink[(len(tiles) * (TILE // cut.tokens), splits)](
        x, factors.a, records, weights, tiles, u, scratch.sums, factors.site, D=inputs, ROWS=cut.tokens,
        BLOCK=cut.inputs, SHARE=cut.share, STAGES=cut.stages, num_warps=cut.warps, **sizes, **dependent(x.device),
    )  # fmt: skip
    if splits > 1:
        _join[(len(tiles) * (TILE // _JOINED), members)](
            scratch.sums, records, weights, tiles, u, factors.site, ROWS=_JOINED, num_warps=4, **sizes,
            **dependent(x.device),
        )  # fmt: skip

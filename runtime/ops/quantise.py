"""Pages that have got a format of fewer bits at this step are written in it, in all layers, by one launch.

One program is a head of a layer's page: it has the largest of every group at hand, and reads and writes once. Codes and
scales are those of `kv.formats` bit for bit: divisions are rounded as IEEE 754 says, all else is done on bits.

Shape legend: B rows, L layers, U units, Hkv KV heads, D channels of a head; a part is the keys or the values.
In kernels: D channels of WIDTH; F units of a page in the model's dtype, each PART tokens; HEAD bytes of a head in a
unit; `early` and `late` are the two halves of a page's tokens, which share bytes in int4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ..kv.formats import CODE_MAX, FULL, INT4, INT8
from ..kv.units import Units
from .launch import dependent, release, wait
from .pages import Turned

_PAGE: tl.constexpr = tl.constexpr(PAGE_TOKENS)
_HALF: tl.constexpr = tl.constexpr(PAGE_TOKENS // 2)
_INT8: tl.constexpr = tl.constexpr(INT8)
_INT4: tl.constexpr = tl.constexpr(INT4)
_MOST8: tl.constexpr = tl.constexpr(CODE_MAX[INT8])
_MOST4: tl.constexpr = tl.constexpr(CODE_MAX[INT4])
_NEAREST: tl.constexpr = tl.constexpr(1.5 * 2.0**23)
"""Added to a number of at most 2^22 in size it leaves the nearest integer, halves to even, in the lowest bits: float32
has no finer ones there."""
_NEAREST_BITS: tl.constexpr = tl.constexpr(0x4B400000)
_ZERO8: tl.constexpr = tl.constexpr(128)
"""How int8 and int4 store 0."""
_ZERO4: tl.constexpr = tl.constexpr(8)


@triton.jit
def _scale(largest, most):
    """`formats.group_scale` of groups by their largest number; both float32.

    The quotient is cut down to bf16, not rounded, so that a step up is needed wherever it is not one of bf16. The least
    number that is large enough is either of the two, and the same by either way.
    """
    cut = tl.div_rn(largest, most).to(tl.int32, bitcast=True) & -65536
    short = cut.to(tl.float32, bitcast=True) * most < largest
    return (cut + tl.where(short, 65536, 0)).to(tl.float32, bitcast=True)


@triton.jit
def _codes(x, scale):
    """Integers nearest to x / scale, halves to even; both float32."""
    number = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)) + _NEAREST
    return number.to(tl.int32, bitcast=True) - _NEAREST_BITS


@triton.jit
def _read(
    numbers, source, heads, head, base, part, token, channel, HEAD: tl.constexpr, D: tl.constexpr, PART: tl.constexpr
):
    """Tokens [8, WIDTH] of a part in float32; `source` names its page's units, each with PART tokens of every part in
    HEAD numbers of a head."""
    unit = tl.load(source + token // PART).to(tl.int64)
    at = ((base + unit) * heads + head) * HEAD + (part * PART + token % PART) * D
    x = tl.load(numbers + at[:, None] + channel[None, :], mask=(channel < D)[None, :], other=0)
    # bf16 comes as the bits that it is: Triton's interpreter makes something else of its least numbers.
    return x if numbers.dtype.element_ty == tl.float32 else (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _bf16(scale):
    """The bits of a number of bf16 that is given in float32: its upper half."""
    return (scale.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def _quantise(
    units, scales, numbers, code, source, target, count,
    HKV: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr, ITEM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    release(PDL)
    row, layer, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    what = tl.load(code + row)
    if (what != _INT8) & (what != _INT4):
        return
    most = tl.where(what == _INT8, _MOST8, _MOST4).to(tl.float32)
    token = tl.arange(0, _HALF)
    channel = tl.arange(0, WIDTH)
    inside = channel < D
    # In int64: a pool may have more bytes than int32 counts.
    base = layer.to(tl.int64) * count
    source += row * F
    target += row * 2
    for part in tl.static_range(2):
        early = _read(numbers, source, HKV, head, base, part, token, channel, HEAD // ITEM, D, _PAGE // F)
        late = _read(numbers, source, HKV, head, base, part, _HALF + token, channel, HEAD // ITEM, D, _PAGE // F)
        unit = tl.load(target + tl.where(what == _INT8, part, 0)).to(tl.int64)
        out = ((base + unit) * HKV + head) * HEAD
        scale_at = scales + out // 2 + (8 + part) * D
        if part == 0:
            scale = _scale(tl.maximum(tl.max(tl.abs(early), 0), tl.max(tl.abs(late), 0)), most)
            tl.store(scale_at + channel, _bf16(scale), mask=inside)
            early = _codes(early, scale[None, :])
            late = _codes(late, scale[None, :])
        else:
            first = _scale(tl.max(tl.abs(early), 1), most)
            second = _scale(tl.max(tl.abs(late), 1), most)
            tl.store(scale_at + 2 * token, _bf16(first))
            tl.store(scale_at + 2 * token + 1, _bf16(second))
            early = _codes(early, first[:, None])
            late = _codes(late, second[:, None])
        at = units + out + token[:, None] * D + channel[None, :]
        if what == _INT8:
            tl.store(at, (early + _ZERO8).to(tl.uint8), mask=inside[None, :])
            tl.store(at + _HALF * D, (late + _ZERO8).to(tl.uint8), mask=inside[None, :])
        else:
            both = (early + _ZERO4) | (late + _ZERO4) << 4
            tl.store(at + part * _HALF * D, both.to(tl.uint8), mask=inside[None, :])


def quantise_turned(pool: Tensor, turned: Turned, units: Units, dtype: torch.dtype) -> None:
    """Write the pages that `turned` says have got int8 or int4 where they go: pool [L, U, Hkv, head_bytes] uint8, of a
    model in `dtype`, bf16 or float32. Behind `turn`, and before attention reads what has got its format."""
    assert dtype in (torch.bfloat16, torch.float32), "bits are read as those of one or the other"
    layers, count, heads, head_bytes = pool.shape
    bits = pool.view(torch.int16)
    numbers = pool.view(dtype) if dtype == torch.float32 else bits
    _quantise[(len(turned.code), layers, heads)](
        pool, bits, numbers, turned.code, turned.source, turned.target, count,
        HKV=heads, HEAD=head_bytes, D=units.channels, WIDTH=triton.next_power_of_2(units.channels), F=units.of(FULL),
        ITEM=units.itemsize, num_warps=4, **dependent(pool.device),
    )  # fmt: skip

"""How one program of decode attention goes through pages in int8 and int4, as `attend` does through the others.

What is multiplied is codes; scales stay outside of the products. A key's scale is of its channel and page, so it
multiplies the query, page by page; a value's is of its token, so it multiplies the token's weight.

`alone`, the time goes into making numbers of codes, so little is done to each: bits where they are in a word are a
float already, a denormal one, and what stands higher by some places is divided by as much in the query (of keys) or in
the end (of values). `group`, tensor cores multiply: a tile has as many rows of queries as heads times pages, and a row
attends to the tokens of its own page alone.

In kernels: HKV heads, D channels of a head, of WIDTH; HEAD bytes of a head in a unit; PAGES of a tile; LANES tokens are
read side by side, each by threads that keep a softmax of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from policy.settings import PAGE_TOKENS

from .attend import NOTHING, PAGE, merge
from .launch import dot

HALF: tl.constexpr = tl.constexpr(PAGE_TOKENS // 2)
TINIEST: tl.constexpr = tl.constexpr(2.0**-149)
"""What the lowest bit of a float is worth where no other is set."""
LARGE: tl.constexpr = tl.constexpr(2.0**110)
LEFT: tl.constexpr = tl.constexpr(2.0**39)
"""Such numbers meet others that are LARGE, and what is left to multiply is done in the end. A query times a key's scale
may be up to 2^17 without overflow: scores of millions."""
ZERO8: tl.constexpr = tl.constexpr(128)
ZERO4: tl.constexpr = tl.constexpr(8)
"""How int8 and int4 store 0."""


@triton.jit
def _code(word, AT: tl.constexpr, BITS: tl.constexpr, EXACT: tl.constexpr):
    """Of every word the BITS from bit AT on as a number times TINIEST, times 256 or 16 where they are the second or the
    upper of a half word. EXACT: of float32 models, less what stands for 0, which else is taken off in the end and costs
    two or three bits."""
    MASK: tl.constexpr = (2**BITS - 1) << (AT % 16)
    if AT >= 16:
        word = (word.to(tl.uint32, bitcast=True) >> 16).to(tl.int32, bitcast=True)
    if EXACT:
        return ((word & MASK) - (2 ** (BITS - 1) << (AT % 16))).to(tl.float32) * TINIEST
    else:
        return (word & MASK).to(tl.float32, bitcast=True)


@triton.jit
def _pair(words, at, mask):
    """Two neighbouring bfloat16 of every word, as float32."""
    both = tl.load(words + at, mask=mask, other=0)
    return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _every_fourth(query, factor, D: tl.constexpr, FOURTH: tl.constexpr):
    """A query [D] by what its channels leave over 4, four times [FOURTH] float32, as `_code` wants it: the second and
    the last meet bits that stand eight places higher."""
    at = 4 * tl.arange(0, FOURTH)
    near = factor * LARGE
    far = near / 256
    q0 = tl.load(query + at, mask=at < D, other=0.0).to(tl.float32) * near
    q1 = tl.load(query + at + 1, mask=at < D, other=0.0).to(tl.float32) * far
    q2 = tl.load(query + at + 2, mask=at < D, other=0.0).to(tl.float32) * near
    q3 = tl.load(query + at + 3, mask=at < D, other=0.0).to(tl.float32) * far
    return q0, q1, q2, q3


@triton.jit
def _zero(k0, k1, k2, k3, ZERO: tl.constexpr, EXACT: tl.constexpr):
    """What scores are too high by, [pages, 1], as codes are stored ZERO above what they mean."""
    if EXACT:
        return tl.zeros([k0.shape[0], 1], tl.float32)
    else:
        return tl.sum(k0 + k2 + 256 * (k1 + k3), axis=1)[:, None] * (ZERO / LARGE)


@triton.jit
def _no_tokens(LANES: tl.constexpr, FOURTH: tl.constexpr):
    """What `_joined_fourths` takes, before any token."""
    nothing = tl.zeros([LANES], tl.float32)
    sums = tl.zeros([LANES, FOURTH], tl.float32)
    return tl.full([LANES], NOTHING, tl.float32), nothing, nothing, sums, sums, sums, sums


@triton.jit
def _joined_fourths(top, total, offset, s0, s1, s2, s3, ZERO: tl.constexpr, EXACT: tl.constexpr):
    """Lanes that each have a softmax of their own as one row. Their sums are of `_code`, of every fourth channel;
    `offset` is those of weights, scales included."""
    highest = tl.max(top, axis=0, keep_dims=True)
    fade = tl.exp2(top - highest)
    total = tl.sum(total * fade, axis=0, keep_dims=True)
    s0 = tl.sum(s0 * fade[:, None], axis=0)
    s1 = tl.sum(s1 * fade[:, None], axis=0) / 256
    s2 = tl.sum(s2 * fade[:, None], axis=0)
    s3 = tl.sum(s3 * fade[:, None], axis=0) / 256
    sums = tl.permute(tl.join(tl.join(s0, s1), tl.join(s2, s3)), (0, 2, 1))
    sums = LEFT * tl.reshape(sums, [1, 4 * s0.shape[0]])
    if not EXACT:
        sums -= ZERO * tl.sum(offset * fade, axis=0)
    return highest, total, total, sums


@triton.jit
def _within(x):
    """Sum over pages and the tokens of a thread of x [LANES, PAGES, A, ...]."""
    return tl.sum(tl.sum(x, axis=1), axis=1)


@triton.jit
def _queries(words, at, there, q0, q1, q2, q3, D: tl.constexpr, FOURTH: tl.constexpr):
    """Every fourth of a query times the scales of keys, which lie at words `at` [PAGES]: four times [PAGES, FOURTH]."""
    word = tl.arange(0, FOURTH)
    mask = there[:, None] & (word < D // 4)[None, :]
    k0, k1 = _pair(words, at[:, None] + 2 * word[None, :], mask)
    k2, k3 = _pair(words, at[:, None] + 2 * word[None, :] + 1, mask)
    return k0 * q0[None, :], k1 * q1[None, :], k2 * q2[None, :], k3 * q3[None, :]


@triton.jit
def int8_alone(
    query, words, table, head, first, end, factor, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    HEAD: tl.constexpr, PAGES: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pages `first` to `end` in int8, of a head that shares with no other."""
    EXACT: tl.constexpr = query.dtype.element_ty == tl.float32
    FOURTH: tl.constexpr = WIDTH // 4
    page = tl.arange(0, PAGES)
    token = tl.arange(0, LANES)[:, None] + LANES * tl.arange(0, PAGE // LANES)[None, :]
    pair = tl.arange(0, LANES)[:, None] + LANES * tl.arange(0, HALF // LANES)[None, :]
    word = tl.arange(0, FOURTH)
    q0, q1, q2, q3 = _every_fourth(query, factor, D, FOURTH)
    top, total, offset, s0, s1, s2, s3 = _no_tokens(LANES, FOURTH)
    stride: tl.constexpr = HKV * HEAD // 4
    own = (token[:, :, None] * (D // 4) + word[None, None, :])[:, None, :, :]
    for start in tl.range(first, end, PAGES, num_stages=STAGES):
        there = page < end - start
        k_unit = tl.load(table + (start + page) * 2, mask=there, other=0).to(tl.int64) * stride + head * (HEAD // 4)
        v_unit = tl.load(table + (start + page) * 2 + 1, mask=there, other=0).to(tl.int64) * stride + head * (HEAD // 4)
        mask = there[None, :, None, None] & (word < D // 4)[None, None, None, :]
        k = tl.load(words + k_unit[None, :, None, None] + own, mask=mask, other=0)
        v = tl.load(words + v_unit[None, :, None, None] + own, mask=mask, other=0)
        low, high = _pair(words, (v_unit + 9 * D // 2)[None, :, None] + pair[:, None, :], there[None, :, None])
        v_scale = tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), [LANES, PAGES, PAGE // LANES])
        k0, k1, k2, k3 = _queries(words, k_unit + 4 * D, there, q0, q1, q2, q3, D, FOURTH)
        score = _code(k, 0, 8, EXACT) * k0[None, :, None, :]
        score += _code(k, 8, 8, EXACT) * k1[None, :, None, :]
        score += _code(k, 16, 8, EXACT) * k2[None, :, None, :]
        score += _code(k, 24, 8, EXACT) * k3[None, :, None, :]
        score = LEFT * tl.sum(score, axis=3) - _zero(k0, k1, k2, k3, ZERO8, EXACT)[None, :, :]
        score = tl.where(there[None, :, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(tl.max(score, axis=1), axis=1))
        fade = tl.exp2(top - higher)
        weight = tl.exp2(score - higher[:, None, None])
        total = total * fade + _within(weight)
        weight *= v_scale
        offset = offset * fade + _within(weight)
        fade = fade[:, None]
        weight = weight[:, :, :, None] * LARGE
        s0 = s0 * fade + _within(weight * _code(v, 0, 8, EXACT))
        s1 = s1 * fade + _within(weight * _code(v, 8, 8, EXACT))
        s2 = s2 * fade + _within(weight * _code(v, 16, 8, EXACT))
        s3 = s3 * fade + _within(weight * _code(v, 24, 8, EXACT))
        top = higher
    return _joined_fourths(top, total, offset, s0, s1, s2, s3, ZERO8, EXACT)


@triton.jit
def int4_alone(
    query, words, table, head, first, end, factor, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    HEAD: tl.constexpr, PAGES: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pages `first` to `end` in int4, of a head that shares with no other: a row of bytes has two tokens."""
    EXACT: tl.constexpr = query.dtype.element_ty == tl.float32
    FOURTH: tl.constexpr = WIDTH // 4
    page = tl.arange(0, PAGES)
    token = tl.arange(0, LANES)[:, None] + LANES * tl.arange(0, HALF // LANES)[None, :]
    word = tl.arange(0, FOURTH)
    q0, q1, q2, q3 = _every_fourth(query, factor, D, FOURTH)
    top, total, offset, s0, s1, s2, s3 = _no_tokens(LANES, FOURTH)
    stride: tl.constexpr = HKV * HEAD // 4
    own = (token[:, :, None] * (D // 4) + word[None, None, :])[:, None, :, :]
    for start in tl.range(first, end, PAGES, num_stages=STAGES):
        there = page < end - start
        unit = tl.load(table + start + page, mask=there, other=0).to(tl.int64) * stride + head * (HEAD // 4)
        mask = there[None, :, None, None] & (word < D // 4)[None, None, None, :]
        k = tl.load(words + unit[None, :, None, None] + own, mask=mask, other=0)
        v = tl.load(words + (unit + 2 * D)[None, :, None, None] + own, mask=mask, other=0)
        low_scale, high_scale = _pair(
            words, (unit + 9 * D // 2)[None, :, None] + token[:, None, :], there[None, :, None]
        )  # fmt: skip
        k0, k1, k2, k3 = _queries(words, unit + 4 * D, there, q0, q1, q2, q3, D, FOURTH)
        zero = _zero(k0, k1, k2, k3, ZERO4, EXACT)[None, :, :]
        k0, k1, k2, k3 = k0[None, :, None, :], k1[None, :, None, :], k2[None, :, None, :], k3[None, :, None, :]
        low = _code(k, 0, 4, EXACT) * k0 + _code(k, 8, 4, EXACT) * k1
        low += _code(k, 16, 4, EXACT) * k2
        low += _code(k, 24, 4, EXACT) * k3
        high = _code(k, 4, 4, EXACT) * k0 + _code(k, 12, 4, EXACT) * k1
        high += _code(k, 20, 4, EXACT) * k2
        high += _code(k, 28, 4, EXACT) * k3
        low = tl.where(there[None, :, None], LEFT * tl.sum(low, axis=3) - zero, float("-inf"))
        high = tl.where(there[None, :, None], LEFT / 16 * tl.sum(high, axis=3) - zero, float("-inf"))
        higher = tl.maximum(top, tl.max(tl.max(tl.maximum(low, high), axis=1), axis=1))
        fade = tl.exp2(top - higher)
        low = tl.exp2(low - higher[:, None, None])
        high = tl.exp2(high - higher[:, None, None])
        total = total * fade + _within(low + high)
        low *= low_scale
        high *= high_scale
        offset = offset * fade + _within(low + high)
        fade = fade[:, None]
        low = low[:, :, :, None] * LARGE
        high = high[:, :, :, None] * (LARGE / 16)
        s0 = s0 * fade + _within(low * _code(v, 0, 4, EXACT)) + _within(high * _code(v, 4, 4, EXACT))
        s1 = s1 * fade + _within(low * _code(v, 8, 4, EXACT)) + _within(high * _code(v, 12, 4, EXACT))
        s2 = s2 * fade + _within(low * _code(v, 16, 4, EXACT)) + _within(high * _code(v, 20, 4, EXACT))
        s3 = s3 * fade + _within(low * _code(v, 24, 4, EXACT)) + _within(high * _code(v, 28, 4, EXACT))
        top = higher
    return _joined_fourths(top, total, offset, s0, s1, s2, s3, ZERO4, EXACT)


@triton.jit
def _by_page(top, total, sums, ROWS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of queries times pages [SLOTS * ROWS] as rows of queries [ROWS]."""
    own = tl.reshape(top, [SLOTS, ROWS])
    highest = tl.max(own, axis=0)
    fade = tl.exp2(own - highest[None, :])
    total = tl.sum(tl.reshape(total, [SLOTS, ROWS]) * fade, axis=0)
    sums = tl.sum(tl.reshape(sums, [SLOTS, ROWS, WIDTH]) * fade[:, :, None], axis=0)
    return highest, total, total, sums


@triton.jit
def first_rows(top, total, far, sums, ALL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The first ROWS of ALL rows."""
    parts: tl.constexpr = ALL // ROWS
    own = tl.arange(0, parts)[:, None] == 0
    top = tl.max(tl.where(own, tl.reshape(top, [parts, ROWS]), NOTHING), axis=0)
    total = tl.sum(tl.where(own, tl.reshape(total, [parts, ROWS]), 0.0), axis=0)
    far = tl.sum(tl.where(own, tl.reshape(far, [parts, ROWS]), 0.0), axis=0)
    sums = tl.sum(tl.where(own[:, :, None], tl.reshape(sums, [parts, ROWS, WIDTH]), 0.0), axis=0)
    return top, total, far, sums


@triton.jit
def int8_group(
    query, codes, scales, table, head, first, end, factor, HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, PAGES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pages `first` to `end` in int8, of GROUP heads that share a KV head."""
    row = tl.arange(0, PAGES * ROWS)
    slot = row // ROWS
    lane = tl.arange(0, PAGES * PAGE)
    page = lane // PAGE
    channel = tl.arange(0, WIDTH)
    inside = channel < D
    kind = query.dtype.element_ty
    real = (row % ROWS < GROUP)[:, None] & inside[None, :]
    q = tl.load(query + (row % ROWS)[:, None] * D + channel[None, :], mask=real, other=0.0).to(tl.float32) * factor
    top = tl.full([PAGES * ROWS], NOTHING, tl.float32)
    total = tl.zeros([PAGES * ROWS], tl.float32)
    sums = tl.zeros([PAGES * ROWS, WIDTH], tl.float32)
    stride: tl.constexpr = HKV * HEAD
    for start in tl.range(first, end, PAGES, num_stages=STAGES):
        there = page < end - start
        k_unit = tl.load(table + (start + page) * 2, mask=there, other=0).to(tl.int64) * stride + head * HEAD
        v_unit = tl.load(table + (start + page) * 2 + 1, mask=there, other=0).to(tl.int64) * stride + head * HEAD
        own = (lane % PAGE * D)[:, None] + channel[None, :]
        mask = there[:, None] & inside[None, :]
        k = (tl.load(codes + k_unit[:, None] + own, mask=mask, other=128).to(tl.float32) - ZERO8).to(kind)
        v = (tl.load(codes + v_unit[:, None] + own, mask=mask, other=128).to(tl.float32) - ZERO8).to(kind)
        scaled = _scaled(q, scales, table + start * 2, 2, slot, slot < end - start, head, HKV, D, WIDTH, HEAD)
        at = v_unit // 2 + (HALF + 1) * D + 2 * (lane % HALF) + lane % PAGE // HALF
        v_scale = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
        score = dot(scaled.to(kind), tl.trans(k), tl.zeros([PAGES * ROWS, PAGES * PAGE], tl.float32))
        score = tl.where(there[None, :] & (page[None, :] == slot[:, None]), score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        fade = tl.exp2(top - higher)
        weight = tl.exp2(score - higher[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        sums = dot((weight * v_scale[None, :]).to(kind), v, sums * fade[:, None])
        top = higher
    return _by_page(top, total, sums, ROWS, PAGES, WIDTH)


@triton.jit
def _scaled(
    q, scales, table, UNITS: tl.constexpr, slot, there, head, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Queries [rows, WIDTH] times the scales of keys of each row's page."""
    channel = tl.arange(0, WIDTH)
    unit = tl.load(table + slot * UNITS, mask=there, other=0).to(tl.int64) * (HKV * HEAD // 2) + head * (HEAD // 2)
    mask = there[:, None] & (channel < D)[None, :]
    scale = tl.load(scales + (unit + HALF * D)[:, None] + channel[None, :], mask=mask, other=0.0)
    return q * scale.to(tl.float32)


@triton.jit
def int4_group(
    query, codes, scales, table, head, first, end, factor, HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, PAGES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pages `first` to `end` in int4, of GROUP heads that share a KV head."""
    row = tl.arange(0, PAGES * ROWS)
    slot = row // ROWS
    lane = tl.arange(0, PAGES * HALF)
    page = lane // HALF
    channel = tl.arange(0, WIDTH)
    inside = channel < D
    kind = query.dtype.element_ty
    real = (row % ROWS < GROUP)[:, None] & inside[None, :]
    q = tl.load(query + (row % ROWS)[:, None] * D + channel[None, :], mask=real, other=0.0).to(tl.float32) * factor
    top = tl.full([PAGES * ROWS], NOTHING, tl.float32)
    total = tl.zeros([PAGES * ROWS], tl.float32)
    sums = tl.zeros([PAGES * ROWS, WIDTH], tl.float32)
    stride: tl.constexpr = HKV * HEAD
    for start in tl.range(first, end, PAGES, num_stages=STAGES):
        there = page < end - start
        unit = tl.load(table + start + page, mask=there, other=0).to(tl.int64) * stride + head * HEAD
        own = (lane % HALF * D)[:, None] + channel[None, :]
        mask = there[:, None] & inside[None, :]
        k = tl.load(codes + unit[:, None] + own, mask=mask, other=ZERO4 * 17)
        v = tl.load(codes + (unit + HALF * D)[:, None] + own, mask=mask, other=ZERO4 * 17)
        scaled = _scaled(q, scales, table + start, 1, slot, slot < end - start, head, HKV, D, WIDTH, HEAD).to(kind)
        at = unit // 2 + (HALF + 1) * D + 2 * (lane % HALF)
        low_scale = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
        high_scale = tl.load(scales + at + 1, mask=there, other=0.0).to(tl.float32)
        seen = there[None, :] & (page[None, :] == slot[:, None])
        nothing = tl.zeros([PAGES * ROWS, PAGES * HALF], tl.float32)
        low = dot(scaled, tl.trans(_nibble(k & 15, kind)), nothing)
        high = dot(scaled, tl.trans(_nibble(k >> 4, kind)), nothing)
        low = tl.where(seen, low, float("-inf"))
        high = tl.where(seen, high, float("-inf"))
        higher = tl.maximum(top, tl.maximum(tl.max(low, axis=1), tl.max(high, axis=1)))
        fade = tl.exp2(top - higher)
        low = tl.exp2(low - higher[:, None])
        high = tl.exp2(high - higher[:, None])
        total = total * fade + tl.sum(low, axis=1) + tl.sum(high, axis=1)
        sums = dot((low * low_scale[None, :]).to(kind), _nibble(v & 15, kind), sums * fade[:, None])
        sums = dot((high * high_scale[None, :]).to(kind), _nibble(v >> 4, kind), sums)
        top = higher
    return _by_page(top, total, sums, ROWS, PAGES, WIDTH)


@triton.jit
def _nibble(code, kind: tl.constexpr):
    """A number in [-7, 7], exact in any dtype."""
    return (code.to(tl.float32) - ZERO4).to(kind)


@triton.jit
def coded_alone(
    query, words, table8, first8, stop8, table4, first4, stop4, head, factor, HKV: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, PAGES: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pages of both formats, of a head that shares with no other."""
    top, total, far, sums = int8_alone(
        query, words, table8, head, first8, stop8, factor, HKV, D, WIDTH, HEAD, PAGES, LANES, STAGES
    )  # fmt: skip
    top4, total4, far4, sums4 = int4_alone(
        query, words, table4, head, first4, stop4, factor, HKV, D, WIDTH, HEAD, PAGES, LANES, STAGES
    )  # fmt: skip
    return merge(top, total, far, sums, top4, total4, far4, sums4)


@triton.jit
def coded_group(
    query, codes, scales, table8, first8, stop8, table4, first4, stop4, head, factor, HKV: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    PAGES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pages of both formats, of GROUP heads that share a KV head."""
    top, total, far, sums = int8_group(
        query, codes, scales, table8, head, first8, stop8, factor, HKV, GROUP, D, ROWS, WIDTH, HEAD, PAGES, STAGES
    )  # fmt: skip
    top4, total4, far4, sums4 = int4_group(
        query, codes, scales, table4, head, first4, stop4, factor, HKV, GROUP, D, ROWS, WIDTH, HEAD, PAGES, STAGES
    )  # fmt: skip
    return merge(top, total, far, sums, top4, total4, far4, sums4)

"""How one program of decode attention goes through pages in the model's dtype: for a query head that shares its KV head
with no other (`alone`), and for those that do (`group`). What is coded is in `attend_coded`.

Both leave (top, total, far, sums) [ROWS], [ROWS, WIDTH]: maximum score, sum of weights, the part of it before the
boundary, and values summed by weight, of the tokens of their pages.

In kernels: HKV heads, D channels of a head, of WIDTH; HEAD numbers of a head in a unit, F units of a page, of PART
tokens each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from policy.settings import PAGE_TOKENS

from .launch import dot

PAGE: tl.constexpr = tl.constexpr(PAGE_TOKENS)
# The maximum over no scores. Finite: the difference of two of them is 0, not NaN.
NOTHING: tl.constexpr = tl.constexpr(-1e38)


@triton.jit
def merge(top, total, far, sums, top2, total2, far2, sums2):
    """Two results of the same rows as one."""
    higher = tl.maximum(top, top2)
    fade, rise = tl.exp2(top - higher), tl.exp2(top2 - higher)
    return higher, total * fade + total2 * rise, far * fade + far2 * rise, sums * fade[:, None] + sums2 * rise[:, None]


@triton.jit
def _full_tile(
    full, table, head, start, begin, end, kept, shift, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    HEAD: tl.constexpr, F: tl.constexpr, PART: tl.constexpr, WINDOW: tl.constexpr, CODED: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Keys and values [TOKENS, WIDTH] of one KV head from token `start` on, the first of its page, and which are seen;
    the others are 0: 0 times what lies there need not be 0."""
    lane = tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH)
    seen = lane < end - start
    if WINDOW > 0:
        seen = seen & (lane >= begin - start)
    entry = start // PAGE + lane // PAGE
    if CODED:  # behind those that stay full for good come those of the window
        entry += tl.where(entry < kept, 0, shift)
    unit = tl.load(table + entry * F + lane % PAGE // PART, mask=seen, other=0).to(tl.int64)
    at = (unit * (HKV * HEAD) + head * HEAD + lane % PART * D)[:, None] + channel[None, :]
    mask = seen[:, None] & (channel < D)[None, :]
    return tl.load(full + at, mask=mask, other=0.0), tl.load(full + at + PART * D, mask=mask, other=0.0), seen


@triton.jit
def _joined(top, total, far, sums):
    """Lanes [N] that each have a softmax of their own as one row."""
    highest = tl.max(top, axis=0, keep_dims=True)
    fade = tl.exp2(top - highest)
    total = tl.sum(total * fade, axis=0, keep_dims=True)
    far = tl.sum(far * fade, axis=0, keep_dims=True)
    return highest, total, far, tl.sum(sums * fade[:, None], axis=0, keep_dims=True)


@triton.jit
def full_alone(
    query, full, table, head, begin, first, end, boundary, factor, kept, shift, HKV: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, F: tl.constexpr, PART: tl.constexpr, WINDOW: tl.constexpr,
    DISTANT: tl.constexpr, CODED: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`full_group` for a query head that shares with no other: ROWS = 1.

    Every lane of a tile keeps a softmax of its own, so that no warp waits for another before the end.
    """
    lane = tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH)
    q = tl.load(query + channel, mask=channel < D, other=0.0).to(tl.float32) * factor
    top = tl.full([TOKENS], NOTHING, tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    far = tl.zeros([TOKENS], tl.float32)
    sums = tl.zeros([TOKENS, WIDTH], tl.float32)
    for start in tl.range(first, end, TOKENS, num_stages=STAGES):
        k, v, seen = _full_tile(
            full, table, head, start, begin, end, kept, shift, HKV, D, WIDTH, HEAD, F, PART, WINDOW, CODED, TOKENS
        )  # fmt: skip
        score = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], axis=1), float("-inf"))
        higher = tl.maximum(top, score)
        fade = tl.exp2(top - higher)
        weight = tl.exp2(score - higher)
        total = total * fade + weight
        if DISTANT:
            far = far * fade + tl.where(lane < boundary - start, weight, 0.0)
        sums = sums * fade[:, None] + weight[:, None] * v.to(tl.float32)
        top = higher
    return _joined(top, total, far, sums)


@triton.jit
def full_group(
    query, full, table, head, begin, first, end, boundary, factor, kept, shift, HKV: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    F: tl.constexpr, PART: tl.constexpr, WINDOW: tl.constexpr, DISTANT: tl.constexpr, CODED: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Over tokens `first` to `end` of pages in the model's dtype, those before `begin` unseen; of pages from number
    `kept` on entries are `shift` further on."""
    lane = tl.arange(0, TOKENS)
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    q = tl.load(query + row * D + channel, mask=(row < GROUP) & (channel < D), other=0.0)
    top = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    far = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(first, end, TOKENS, num_stages=STAGES):
        k, v, seen = _full_tile(
            full, table, head, start, begin, end, kept, shift, HKV, D, WIDTH, HEAD, F, PART, WINDOW, CODED, TOKENS
        )  # fmt: skip
        score = dot(q, tl.trans(k), tl.zeros([ROWS, TOKENS], tl.float32)) * factor
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        fade = tl.exp2(top - higher)
        weight = tl.exp2(score - higher[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        if DISTANT:
            far = far * fade + tl.sum(tl.where((lane < boundary - start)[None, :], weight, 0.0), axis=1)
        sums = dot(weight.to(v.dtype), v, sums * fade[:, None])
        top = higher
    return top, total, far, sums

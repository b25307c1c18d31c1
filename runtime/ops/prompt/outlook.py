"""What the model expects behind every token of a prompt: how open that is, and how surprising what then comes.

    entropy      H / log V of the next-token distribution               `control.signals.next_token_entropy`
    surprisal    -log p / log V, cut at 1, of the token that follows    `control.signals.surprisal`

A program has one token and goes through its logits once, a block at a time. Every lane keeps sums of its own: the
largest logit that it has met, and of all that it has met sum 2^below and sum below 2^below, where below, in bits, is
how far they lie under that. So nobody waits for others before the end. Distances are taken between logits as the head
put them out, and scaled then: what is huge does not overflow, and numbers of few bits lose next to nothing.

Shape legend: T tokens, N tiles, V vocabulary. In kernels: LANES, each with WIDE logits of a block.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..launch import dependent, release, wait
from ..sampling import _FAR, _LEAST, _number_or_least
from .tiles import TILE, tile_of

_TILE: tl.constexpr = tl.constexpr(TILE)
_BITS: tl.constexpr = tl.constexpr(math.log2(math.e))
"""Of a nat"""
_WARPS = 16
"""Of a program: four fill a multiprocessor, and 512 tokens an H200. Every lane has one load under way."""
_LOAD_BYTES = 16
"""Of a lane, the most there is."""


@triton.jit
def _lowered(masses, moments, peaks, higher, far, rate):
    """Sums that were taken below `peaks` as they are below `higher`."""
    fallen = tl.maximum(peaks - higher, far) * rate
    weight = tl.exp2(fallen)
    return weight * masses, weight * (moments + fallen * masses)


@triton.jit(do_not_specialize=["total"])
def _outlook(
    logits, scale, tokens, tiles, entropy, surprisal, total, V: tl.constexpr, BITS_V: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    # Tiles are there before the pass begins.
    first, count, _, _, _ = tile_of(tiles, tl.program_id(0) // _TILE)
    place = tl.program_id(0) % _TILE
    wait(PDL)
    if place >= count:
        return
    token = (first + place).to(tl.int64)
    logits += token * V
    # Bits of one, and how many make no difference any more.
    rate = tl.load(scale + token) * _BITS
    far = tl.div_rn(_FAR, rate)
    # The last of all tokens is followed by none.
    followed = token + 1 < total
    following = tl.load(tokens + token + 1, mask=followed, other=0)
    following = tl.minimum(tl.maximum(following, 0), V - 1)
    met = _number_or_least(tl.load(logits + following).to(tl.float32))

    lane = tl.arange(0, LANES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    peaks = tl.full([LANES], _LEAST, tl.float32)
    masses = tl.zeros([LANES], tl.float32)
    moments = tl.zeros([LANES], tl.float32)
    for start in range(0, V, LANES * WIDE):
        ids = start + lane
        x = _number_or_least(tl.load(logits + ids, mask=ids < V, other=float("-inf")).to(tl.float32))
        higher = tl.maximum(peaks, tl.max(x, axis=1))
        below = tl.maximum(x - higher[:, None], far) * rate
        mass = tl.exp2(below)
        masses, moments = _lowered(masses, moments, peaks, higher, far, rate)
        masses += tl.sum(mass, axis=1)
        moments += tl.sum(mass * below, axis=1)
        peaks = higher

    peak = tl.max(peaks, axis=0)
    masses, moments = _lowered(masses, moments, peaks, peak, far, rate)
    # Not 0 even where nothing weighs: a signal that is no number would stay with a controller for good.
    mass = tl.maximum(tl.sum(masses, axis=0), 1e-37)
    bits = tl.log2(mass)
    mean = tl.div_rn(tl.sum(moments, axis=0), mass)
    tl.store(entropy + token, tl.clamp(tl.div_rn(bits - mean, BITS_V), 0.0, 1.0))
    bits = tl.where(followed, bits - tl.maximum(met - peak, far) * rate, 0.0)
    tl.store(surprisal + token, tl.clamp(tl.div_rn(bits, BITS_V), 0.0, 1.0))


def outlook(logits: Tensor, scale: Tensor, tokens: Tensor, tiles: Tensor, entropy: Tensor, surprisal: Tensor) -> None:
    """entropy and surprisal [T] float32, both in [0, 1], of every token of a tile, of logits * scale in float32.

    logits [T, V] in the model's dtype, V at least 2, as the head puts them out of states that have yet to be normed;
    scale [T] float32, above 0, makes the norm up; tokens [T] long are the pass's, tiles [N, FIELDS]. surprisal[t] is
    that of tokens[t + 1] behind t, of whichever row that is: what stands at the last token of a row's part means
    nothing; at the last of the T it is 0. Ids beyond the vocabulary count as its nearest token. Logits may be -inf;
    those that are no number count as that, and where nothing else is left both are numbers still. Of tokens of no tile
    nothing is written. All tensors are contiguous.
    """
    total, vocabulary = logits.shape
    assert len(scale) == len(tokens) == len(entropy) == len(surprisal) == total, "a number of every token"
    _outlook[(len(tiles) * TILE,)](
        logits, scale, tokens, tiles, entropy, surprisal, total, V=vocabulary, BITS_V=math.log2(vocabulary),
        LANES=32 * _WARPS, WIDE=_LOAD_BYTES // logits.itemsize, num_warps=_WARPS, **dependent(logits.device),
    )  # fmt: skip

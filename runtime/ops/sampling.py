"""The next token of every row, and the entropy and surprisal that choosing it reveals, in two launches.

The first goes through the logits once, with many programs a row. Each leaves what it found in its share: the sums that
make the entropy, and the best of what a token is chosen from, noise included where one is drawn (Gumbel-max: the token
whose logit and noise add up to most is a draw from the softmax of the logits). The second, one program a row, merges
that and keeps the books. For greedy rows, and rows with a temperature and a penalty at most, that is all.

A row with top-k, top-p or min-p is chosen from again there, from what the first launch has stored of it. Nothing is
sorted: the least logit kept is found by bisection over the float32 numbers themselves, each step of which counts or
weighs what lies above. It ends with one logit between the bounds, or none but equal ones, so that it is exact.

Shape legend: B rows, V vocabulary, C shares of it, S tokens of a log, E tokens that end a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dependent, release, wait
from .reference.sampling import LEAST_UNIFORM, Generated, SamplingRows

_SHARE = 2048
"""Logits of a program of the first launch."""
_BLOCK = 8192
"""Logits that a program of the second has under way at a time."""
_LEAST_UNIFORM: tl.constexpr = tl.constexpr(LEAST_UNIFORM)
_FAR: tl.constexpr = tl.constexpr(-200.0)
"""What counts as the logarithm of no mass: its exp is 0 in float32, and unlike -inf it gives 0 times that."""
_LEAST: tl.constexpr = tl.constexpr(-3e38)
"""What counts as the largest of logits that are all -inf."""
_NEAR: tl.constexpr = tl.constexpr(8.0)
"""How far below the largest logit a search looks first. Half of all float32 numbers lie within 1 of 0, and a bisection
that starts from all of them spends ten steps on getting away from there; a wrong guess costs one."""
_FOUND: tl.constexpr = tl.constexpr(5)
"""Numbers that a share of logits x leaves: max x, sum exp(x - max), sum (x - max) exp(x - max), and of what is chosen
from the largest without noise and the best with it."""


@dataclass(frozen=True)
class SamplingScratch:
    """What the first launch leaves for the second."""

    found: Tensor
    """[B, 5, C] float32"""
    winner: Tensor
    """[B, C] int32: the token that is best of its share."""
    scaled: Tensor
    """[B, V] float32: logits with penalty and temperature, of rows with top-k, top-p or min-p."""
    noisy: Tensor
    """[B, V] float32: these with their noise."""

    @classmethod
    def of(cls, rows: int, vocabulary: int, device: torch.device) -> SamplingScratch:
        shares = triton.cdiv(vocabulary, _SHARE)
        return cls(
            found=torch.empty(rows, _FOUND.value, shares, device=device),
            winner=torch.empty(rows, shares, dtype=torch.int32, device=device),
            scaled=torch.empty(rows, vocabulary, device=device),
            noisy=torch.empty(rows, vocabulary, device=device),
        )


@triton.jit
def _uniform(seed, position, ids):
    """A number in [0, 1) for every seed, position and id, float32, whatever the batch."""
    return tl.rand(seed, (position.to(tl.int64) << 32) + ids)


@triton.jit
def _gumbel(uniform):
    """-log(-log(1 - uniform)), as in the reference."""
    u = tl.maximum(uniform, _LEAST_UNIFORM)
    # There is no log1p: near 0, where 1 - u would lose u, its series.
    return -tl.log(tl.where(u < 0.01, u * (1.0 + u * (0.5 + u * (1.0 / 3.0))), -tl.log(1.0 - u)))


@triton.jit
def _number_or_least(x):
    """x, and -inf where it is NaN."""
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _filters(row, temperature, top_k, top_p, min_p):
    """top-k, top-p and min-p of a row, and whether any of them is on."""
    k, p, share = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    return k, p, share, (tl.load(temperature + row) > 0.0) & ((k > 0) | (p < 1.0) | (share > 0.0))


# A batch may be one row of another, and where that begins must not have the kernel compiled anew.
@triton.jit(do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p", "penalty", "seed", "count"])
def _weigh(
    logits, stride, temperature, top_k, top_p, min_p, penalty, seed, seen, count, found, winner, scaled, noisy,
    V: tl.constexpr, SHARES: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first launch: one share of one row."""
    release(PDL)
    row, share = tl.program_id(0), tl.program_id(1)
    ids = share * SHARE + tl.arange(0, SHARE)
    inside = ids < V
    wait(PDL)
    x = _number_or_least(tl.load(logits + row * stride + ids, mask=inside, other=float("-inf")))
    peak = tl.max(x, axis=0)
    below = tl.maximum(x - tl.maximum(peak, _LEAST), _FAR)
    mass = tl.exp(below)
    factor = tl.load(penalty + row)
    score = x
    if factor != 1.0:
        had = tl.load(seen + row * V + ids, mask=inside, other=0) != 0
        score = tl.where(had, tl.where(x < 0.0, x * factor, tl.div_rn(x, factor)), x)
    heat = tl.load(temperature + row)
    noised = score
    if heat > 0.0:
        score = tl.div_rn(score, heat)
        noised = score + _gumbel(_uniform(tl.load(seed + row), tl.load(count + row), ids))
    _, _, _, filtered = _filters(row, temperature, top_k, top_p, min_p)
    if filtered:
        tl.store(scaled + row * V + ids, score, mask=inside)
        tl.store(noisy + row * V + ids, noised, mask=inside)
    best = tl.max(noised, axis=0)
    out = found + row * (_FOUND * SHARES) + share
    tl.store(out, peak)
    tl.store(out + SHARES, tl.sum(mass, axis=0))
    tl.store(out + 2 * SHARES, tl.sum(mass * below, axis=0))
    tl.store(out + 3 * SHARES, tl.max(score, axis=0))
    tl.store(out + 4 * SHARES, best)
    tl.store(winner + row * SHARES + share, tl.min(tl.where(noised == best, ids, V - 1), axis=0))


@triton.jit
def _rank(number):
    """float32 -> int64 in the same order, neighbours next to each other."""
    bits = number.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _number(rank):
    """The inverse of `_rank`."""
    bits = rank.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _above(scaled, least, top, V: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a row's logits are `least` or more, and their mass where the largest, `top`, has 1."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        score = tl.load(scaled + ids, mask=ids < V, other=float("nan"))
        kept = score >= least
        count += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp(score - top), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _least_kept(scaled, least, count, target, top, BY_MASS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest number that enough logits reach: `target` of them, or where BY_MASS so many that their mass is that.

    The caller knows `least` to be one that enough reach, `count` of them.
    """
    low, high = _rank(least), _rank(top) + 1
    beyond = tl.full([], 0, tl.int32)
    middle = tl.maximum(_rank(top - _NEAR), (low + high) >> 1)
    while (high - low > 1) & (count - beyond > 1):
        above, mass = _above(scaled, _number(middle), top, V, BLOCK)
        enough = (mass if BY_MASS else above) >= target
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        count, beyond = tl.where(enough, above, count), tl.where(enough, beyond, above)
        middle = (low + high) >> 1
    return _number(low)


@triton.jit
def _best_kept(scaled, noisy, least, V: tl.constexpr, BLOCK: tl.constexpr):
    """The token with the best noisy logit among those whose own is `least` or more."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    token = tl.full([BLOCK], V - 1, tl.int32)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        score = tl.load(scaled + ids, mask=ids < V, other=float("-inf"))
        noised = tl.load(noisy + ids, mask=(ids < V) & (score >= least), other=float("-inf"))
        better = noised > best
        best = tl.where(better, noised, best)
        token = tl.where(better, ids, token)
    return tl.min(tl.where(best == tl.max(best, axis=0), token, V - 1), axis=0)


@triton.jit(
    do_not_specialize_on_alignment=[
        "logits", "temperature", "top_k", "top_p", "min_p", "entropy", "surprisal", "tokens", "seen", "ended", "count",
        "log", "given", "pad",
    ]
)  # fmt: skip
def _choose(
    logits, stride, temperature, top_k, top_p, min_p, found, winner, scaled, noisy, entropy, surprisal,
    tokens, seen, ended, count, log, given, pad, ends, capacity,
    V: tl.constexpr, LOG_V: tl.constexpr, ENDS: tl.constexpr, SHARES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The second launch: one row."""
    release(PDL)
    row = tl.program_id(0)
    share = tl.arange(0, WIDTH)
    inside = share < SHARES
    wait(PDL)
    read = found + row * (_FOUND * SHARES) + share
    peaks = tl.load(read, mask=inside, other=float("-inf"))
    masses = tl.load(read + SHARES, mask=inside, other=0.0)
    moments = tl.load(read + 2 * SHARES, mask=inside, other=0.0)
    best = tl.load(read + 4 * SHARES, mask=inside, other=float("-inf"))
    winners = tl.load(winner + row * SHARES + share, mask=inside, other=V - 1)
    over = tl.load(ended + row) != 0
    position = tl.load(count + row)
    is_given = (position < tl.load(given + row)) & (over == 0)
    there = tl.load(log + row * capacity + position, mask=is_given, other=0)

    peak = tl.maximum(tl.max(peaks, axis=0), _LEAST)
    below = tl.maximum(peaks - peak, _FAR)
    weights = tl.exp(below)
    # Not 0 even where nothing weighs: a signal that is no number would stay with a controller for good.
    mass = tl.maximum(tl.sum(weights * masses, axis=0), 1e-37)
    moment = tl.sum(weights * (moments + below * masses), axis=0)
    log_mass = tl.log(mass)
    # Where nothing is best, as among NaN, it is the last token: what is written at its place stays in bounds.
    token = tl.min(tl.where(best == tl.max(best, axis=0), winners, V - 1), axis=0)

    k, p, share_of_top, filtered = _filters(row, temperature, top_k, top_p, min_p)
    if filtered:
        top = tl.maximum(tl.max(tl.load(read + 3 * SHARES, mask=inside, other=float("-inf")), axis=0), _LEAST)
        scores, noises = scaled + row * V, noisy + row * V
        least, above = tl.full([], float("-inf"), tl.float32), tl.full([], V, tl.int32)
        if (k > 0) & (k < V):
            least = _least_kept(scores, least, above, k, top, False, V, BLOCK)
        if p < 1.0:
            above, kept_mass = _above(scores, least, top, V, BLOCK)
            least = _least_kept(scores, least, above, p * kept_mass, top, True, V, BLOCK)
        if share_of_top > 0.0:
            least = tl.maximum(least, top + tl.log(share_of_top))
        token = _best_kept(scores, noises, least, V, BLOCK)

    token = tl.where(is_given, there.to(tl.int32), token)

    tl.store(entropy + row, tl.clamp(tl.div_rn(log_mass - tl.div_rn(moment, mass), LOG_V), 0.0, 1.0))
    own = tl.maximum(_number_or_least(tl.load(logits + row * stride + token)), _LEAST)
    tl.store(surprisal + row, tl.clamp(tl.div_rn(peak - own + log_mass, LOG_V), 0.0, 1.0))

    tl.store(seen + row * V + token, 1, mask=over == 0)
    written = tl.where(over, tl.load(pad + row), token.to(tl.int64))
    for end in tl.static_range(ENDS):
        over = over | (written == tl.load(ends + end))
    tl.store(log + row * capacity + position, written, mask=position < capacity)
    tl.store(count + row, position + 1)
    tl.store(tokens + row, written)
    tl.store(ended + row, over.to(tl.uint8))


def sample(
    logits: Tensor,
    rows: SamplingRows,
    generated: Generated,
    entropy: Tensor,
    surprisal: Tensor,
    scratch: SamplingScratch,
) -> None:
    """`reference.sampling.sample`, in place and without a wait, with noise of its own (`uniforms`).

    logits [B, V] float32 as the model put them out, V at least 2, each row contiguous. Logits may be -inf; where no
    logit of a row is a number some token is taken. `scratch` is of B and V. All of it may be one row of a larger batch
    (`row` of the records), of which no other is touched.
    """
    shares, vocabulary = scratch.winner.shape[1], logits.shape[1]
    after = dependent(logits.device)
    _weigh[(len(logits), shares)](
        logits, logits.stride(0), rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.penalty, rows.seed,
        generated.seen, generated.count, scratch.found, scratch.winner, scratch.scaled, scratch.noisy,
        V=vocabulary, SHARES=shares, SHARE=min(_SHARE, triton.next_power_of_2(vocabulary)), num_warps=4, **after,
    )  # fmt: skip
    _choose[(len(logits),)](
        logits, logits.stride(0), rows.temperature, rows.top_k, rows.top_p, rows.min_p,
        scratch.found, scratch.winner, scratch.scaled, scratch.noisy, entropy, surprisal,
        generated.tokens, generated.seen, generated.ended, generated.count, generated.log, generated.given,
        generated.pad, generated.ends, generated.log.shape[1],
        V=vocabulary, LOG_V=math.log(vocabulary), ENDS=len(generated.ends), SHARES=shares,
        WIDTH=triton.next_power_of_2(shares),
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=16, **after,
    )  # fmt: skip


@triton.jit
def _uniforms(seed, count, out, V: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    row = tl.program_id(0)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    tl.store(out + row * V + ids, _uniform(tl.load(seed + row), tl.load(count + row), ids), mask=ids < V)


def uniforms(seed: Tensor, count: Tensor, vocabulary: int) -> Tensor:
    """What `sample` draws the next token with: seed [B] int64, count [B] int32 -> [B, V] float32 in [0, 1)."""
    out = torch.empty(len(seed), vocabulary, device=seed.device)
    grid = (len(seed), triton.cdiv(vocabulary, _SHARE))
    _uniforms[grid](seed, count, out, V=vocabulary, BLOCK=_SHARE, **dependent(seed.device))
    return out

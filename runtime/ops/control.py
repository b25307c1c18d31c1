"""The controller of a decode step: what the step before has told, and the token, to the rung and weight of every row.

One program is a row. It does what `runtime.control` does for a block of one token, decision for decision:

    take in    entropy, attention and surprisal, as they became known         `machine.take_in`
    measure    novelty, prior and difficulties of the token                   `signals`, `policy.difficulty`
    choose     the summary's features through the learned policy's network    `policy.contract`, `policy.learned`
    pay        no rung above those in memory, nor above what the bucket pays   `bucket`
    add up     where pages are coded, the complexity of the token before       `Stream.close_block`

With chunks of one token every token opens one, and sees what became known in between: after a prefill several tokens'
signals wait (`gathered`), from the second step on they are the latest values and mean, max and last are one number.

Shape legend: B rows, P pages of each, S signals, W window, J rungs, F features that the policy looks at and log
lambda, H hidden units; F, H and J are filled up to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from policy.contract import Summary
from policy.difficulty import HASH_BEFORE, HASH_MODULUS, HASH_TOKEN, MOST_CODE, NEUTRAL, PAIRS
from policy.learned import MOST_GROWTH
from policy.settings import MODEL_SIGNALS, PAGE_TOKENS, SIGNALS, STATS

from ..control.bucket import ROUNDING, SLACK_TOKENS
from ..control.signals import NO_TOKEN
from .launch import release, wait

LOG_LAMBDA = Summary.FEATURES
"""The column of log lambda: behind those of `Summary.features()`."""
_S: tl.constexpr = tl.constexpr(len(SIGNALS))
_SP: tl.constexpr = tl.constexpr(triton.next_power_of_2(len(SIGNALS)))
_STATS: tl.constexpr = tl.constexpr(len(STATS))
_ENTROPY: tl.constexpr = tl.constexpr(SIGNALS.index("entropy"))
_ATTENTION: tl.constexpr = tl.constexpr(SIGNALS.index("attention"))
_SURPRISAL: tl.constexpr = tl.constexpr(SIGNALS.index("surprisal"))
_NOVELTY: tl.constexpr = tl.constexpr(SIGNALS.index("novelty"))
_PRIOR: tl.constexpr = tl.constexpr(SIGNALS.index("prior"))
_DIFFICULTY: tl.constexpr = tl.constexpr(SIGNALS.index("difficulty"))
_PAIR: tl.constexpr = tl.constexpr(SIGNALS.index("pair"))
_MODEL: tl.constexpr = tl.constexpr(len(MODEL_SIGNALS))
# Where the parts of `Summary.features()` begin.
_VALID: tl.constexpr = tl.constexpr(len(SIGNALS) * len(STATS))
_OWN: tl.constexpr = tl.constexpr(len(SIGNALS) * len(STATS) + len(SIGNALS))
_LOG_LAMBDA: tl.constexpr = tl.constexpr(LOG_LAMBDA)
_NO_TOKEN: tl.constexpr = tl.constexpr(NO_TOKEN)
_CODES: tl.constexpr = tl.constexpr(MOST_CODE)
_NEUTRAL: tl.constexpr = tl.constexpr(NEUTRAL)
_HASH_BEFORE: tl.constexpr = tl.constexpr(HASH_BEFORE)
_HASH_TOKEN: tl.constexpr = tl.constexpr(HASH_TOKEN)
_HASH_MODULUS: tl.constexpr = tl.constexpr(HASH_MODULUS)
_HASHED: tl.constexpr = tl.constexpr(PAIRS)
_CAP: tl.constexpr = tl.constexpr(MOST_GROWTH)
_SLACK: tl.constexpr = tl.constexpr(SLACK_TOKENS)
_TOLERANCE: tl.constexpr = tl.constexpr(ROUNDING)
_PAGE: tl.constexpr = tl.constexpr(PAGE_TOKENS)


@triton.jit
def _novelty(past, token, position, WINDOW: tl.constexpr, RING: tl.constexpr, TILE: tl.constexpr):
    """`signals.ngram_novelty` of the token at `position`; past [RING] has the token of position p at p mod RING."""
    one = tl.load(past + ((position - 1) & (RING - 1)))
    two = tl.load(past + ((position - 2) & (RING - 1)))
    three = tl.load(past + ((position - 3) & (RING - 1)))
    seen2 = tl.zeros([TILE], tl.int32)
    seen3 = tl.zeros([TILE], tl.int32)
    seen4 = tl.zeros([TILE], tl.int32)
    for start in range(0, WINDOW, TILE):
        back = start + 1 + tl.arange(0, TILE)
        inside = back <= WINDOW
        end = position - back
        matches = inside & (tl.load(past + (end & (RING - 1)), mask=inside, other=_NO_TOKEN) == token)
        matches &= tl.load(past + ((end - 1) & (RING - 1)), mask=inside, other=_NO_TOKEN) == one
        seen2 |= matches.to(tl.int32)
        matches &= tl.load(past + ((end - 2) & (RING - 1)), mask=inside, other=_NO_TOKEN) == two
        seen3 |= matches.to(tl.int32)
        matches &= tl.load(past + ((end - 3) & (RING - 1)), mask=inside, other=_NO_TOKEN) == three
        seen4 |= matches.to(tl.int32)
    # n-grams that would begin before the row does are left out.
    exists2 = (one != _NO_TOKEN).to(tl.int32)
    exists3 = (two != _NO_TOKEN).to(tl.int32)
    exists4 = (three != _NO_TOKEN).to(tl.int32)
    counted = exists2 + exists3 + exists4
    missing = exists2 * (1 - tl.max(seen2, 0)) + exists3 * (1 - tl.max(seen3, 0)) + exists4 * (1 - tl.max(seen4, 0))
    share = missing.to(tl.float32) / tl.maximum(counted, 1).to(tl.float32)
    return tl.where(counted > 0, share, 1.0)


@triton.jit
def _coded(table, index, there, SIZE: tl.constexpr):
    """Value of a table of difficulty [SIZE] uint8 at `index`; that of an average token outside of it, or if not
    `there`."""
    inside = there & (index >= 0) & (index < SIZE)
    return tl.load(table + index, mask=inside, other=_NEUTRAL).to(tl.float32) / _CODES


@triton.jit
def _pair_index(before, token):
    """`difficulty.hashed_pairs`"""
    mixed = before.to(tl.int64) * _HASH_BEFORE + token.to(tl.int64) * _HASH_TOKEN + 1
    return (mixed % _HASH_MODULUS) % _HASHED


@triton.jit
def _attention(distant, row, apart, PROBES: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr):
    """Mean over probed layers and heads of distant [PROBES, rows, HEADS], layers `apart` rows apart, in [0, 1]."""
    lane = tl.arange(0, LANES)
    at = (lane // HEADS * apart + row) * HEADS + lane % HEADS
    mass = tl.load(distant + at, mask=lane < PROBES * HEADS, other=0.0)
    return tl.minimum(tl.maximum(tl.sum(mass, 0) / (PROBES * HEADS), 0.0), 1.0)


@triton.jit
def _signal(column):
    """Which signal the statistics and the validity of `column` [F] are of; any where they are of none."""
    return tl.where(column < _VALID, column // _STATS, tl.where(column < _OWN, column - _VALID, 0))


@triton.jit
def _features(
    column, total, peak, last, count, entropy, attention, surprisal, novelty, prior, difficulty, pair, log_lambda,
    hears_outputs, hears_surprisal,
):  # fmt: skip
    """[F] of `Summary.features()` and log lambda those that `column` [F] names.

    total, peak, last and count [F] are what is gathered of each column's signal. Before that is seen entropy and
    attention are taken in where `hears_outputs`, the surprisal where `hears_surprisal`.
    """
    signal = _signal(column)
    value = tl.where(signal == _ENTROPY, entropy, tl.where(signal == _ATTENTION, attention, surprisal))
    output = (signal == _ENTROPY) | (signal == _ATTENTION)
    hears = (output & hears_outputs) | ((signal == _SURPRISAL) & hears_surprisal)
    value = tl.where(hears, value, 0.0)
    count += hears.to(tl.float32)
    mean = (total + value) / tl.maximum(count, 1.0)
    stat = column % _STATS
    found = tl.where(stat == 0, mean, tl.where(stat == 1, tl.maximum(peak, value), tl.where(hears, value, last)))
    found = tl.where(count > 0, found, 0.0)
    found = tl.where(column < _VALID, found, tl.where(column < _OWN, (count > 0).to(tl.float32), 0.0))
    own = column - _OWN + _MODEL
    found = tl.where(own == _NOVELTY, novelty, found)
    found = tl.where(own == _PRIOR, prior, found)
    found = tl.where(own == _DIFFICULTY, difficulty, found)
    found = tl.where(own == _PAIR, pair, found)
    # What is left is the age: 0, as the model has put something out at the token before.
    return tl.where(column == _LOG_LAMBDA, log_lambda, found)


@triton.jit
def _tanh(x):
    small = tl.exp(-2.0 * tl.abs(x))  # of no x out of range
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def _prefer(
    x, log_lambda, first, second, bias1, bias2, damage_head, scale_head, damage_bias, scale_bias, unit, floor, cost,
    SCALE_RANGE: tl.constexpr, J: tl.constexpr, JP: tl.constexpr,
):  # fmt: skip
    """The rung of least damage + lambda * cost, and the scale of every rung [J]: `LearnedPolicy.decide`.

    x [F]; first [H, F], second [inputs, outputs], heads [J, H]: a sum runs over one axis, the next one over the other,
    so that what it leaves lies as the next product needs it.
    """
    hidden = tl.sum(first * x[None, :], 1) + bias1
    hidden = hidden * tl.sigmoid(hidden)
    hidden = tl.sum(second * hidden[:, None], 0) + bias2
    hidden = hidden * tl.sigmoid(hidden)
    growth = _CAP * _tanh((tl.sum(damage_head * hidden[None, :], 1) + damage_bias) / _CAP)
    scale = 1.0 + SCALE_RANGE * _tanh(tl.sum(scale_head * hidden[None, :], 1) + scale_bias)
    step = unit * tl.exp(growth) + floor
    above = tl.arange(0, JP)[:, None] >= tl.arange(0, JP)[None, :]
    damage = tl.sum(tl.where(above, step[:, None], 0.0), 0)
    # Dividing by the temperature, which is above 0, would change no choice.
    total = damage * tl.exp(-log_lambda) + cost
    return tl.argmin(tl.where(tl.arange(0, JP) < J, total, float("inf")), 0), scale


@triton.jit
def decide_kernel(
    tokens, entropy, surprisal, distant, apart,
    slots, rungs, weights,
    positions, prompts, steps, history, gathered, balances, budgets, costs, knobs, starts, residents,
    token_codes, pair_codes, ladder_scales,
    columns, normal, first, second, biases, heads, by_rung,
    complexity, shares, pages,
    trace, log, columns_kept,
    LOOKS: tl.constexpr, PROBES: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr, WINDOW: tl.constexpr,
    RING: tl.constexpr, TILE: tl.constexpr, DECAY: tl.constexpr, VOCABULARY: tl.constexpr, PAIR_CODES: tl.constexpr,
    SCALE_RANGE: tl.constexpr, J: tl.constexpr, JP: tl.constexpr, FP: tl.constexpr, HP: tl.constexpr,
    PAGES: tl.constexpr, TRACE: tl.constexpr, LOG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    LISTENS: tl.constexpr = LOOKS or PAGES
    row = tl.program_id(0)
    j = tl.arange(0, JP)
    real = j < J
    if LOOKS:
        f = tl.arange(0, FP)
        h = tl.arange(0, HP)
        column = tl.load(columns + f)
        mean = tl.load(normal + f)
        std = tl.load(normal + FP + f)
        first_layer = tl.load(first + h[:, None] * FP + f[None, :])
        second_layer = tl.load(second + h[:, None] * HP + h[None, :])
        bias1 = tl.load(biases + h)
        bias2 = tl.load(biases + HP + h)
        damage_head = tl.load(heads + j[:, None] * HP + h[None, :])
        scale_head = tl.load(heads + JP * HP + j[:, None] * HP + h[None, :])
        damage_bias = tl.load(by_rung + j)
        scale_bias = tl.load(by_rung + JP + j)
        unit = tl.load(by_rung + 2 * JP + j)
        floor = tl.load(by_rung + 3 * JP + j)
        relative_cost = tl.load(by_rung + 4 * JP + j)
    if PAGES:
        each = tl.arange(0, _SP)
        share = tl.load(shares + each, mask=each < _S, other=0.0)
    wait(PDL)
    release(PDL)
    # What can be loaded at once is, for rows that are not in use too: a load on the way to another costs its latency.
    slot = tl.load(slots + row).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int32)
    position = tl.load(positions + row)
    prompt = tl.load(prompts + row)
    step = tl.load(steps + row)
    knob = tl.load(knobs + row)
    start = tl.load(starts + row)
    resident = tl.load(residents + row)
    balance = tl.load(balances + row)
    budget = tl.load(budgets + row)
    cost = tl.load(costs + row * J + j, mask=real, other=0.0)
    own = gathered + row * (4 * _S)
    heard = tl.load(own + 3 * _S + _ENTROPY)
    if LISTENS:
        latest_entropy = tl.load(entropy + row)
    if LOOKS:
        latest_surprisal = tl.load(surprisal + row)
        waiting = own + _signal(tl.maximum(column, 0))
        total = tl.load(waiting)
        peak = tl.load(waiting + _S)
        last = tl.load(waiting + 2 * _S)
        count = tl.load(waiting + 3 * _S)
    if PAGES:
        told = tl.load(own + each, mask=each < _S, other=0.0)
    if slot < 0:
        tl.store(rungs + row, 0)
        tl.store(weights + row, 0.0)
        return
    ladder_scale = tl.load(ladder_scales + slot * J + j, mask=real, other=0.0)

    if PAGES:
        # Of the token that the step before has processed. The first step has none; beyond the last page none counts.
        page = (position - 1) // _PAGE
        counted = (step > 0) & (page < pages)
        page_sum = tl.load(complexity + row * pages + page, mask=counted, other=0.0)
    if LISTENS:
        past = history + row * RING
        before = tl.load(past + ((position - 1) & (RING - 1)))
        difficulty = _coded(token_codes + slot * VOCABULARY, token, token >= 0, VOCABULARY)
        both = (before >= 0) & (token >= 0)
        pair = _coded(pair_codes + slot * PAIR_CODES, _pair_index(before, token), both, PAIR_CODES)
        prior = tl.exp(-tl.maximum(position - prompt, 0).to(tl.float32) / DECAY)
        attention = 0.0
        if PROBES:
            attention = _attention(distant, row, apart, PROBES, HEADS, LANES)
        novelty = _novelty(past, token, position, WINDOW, RING, TILE)
    if PAGES:
        # Its own signals have waited, one value of each, which is their total.
        told = tl.where(each == _ENTROPY, latest_entropy, tl.where(each == _ATTENTION, attention, told))
        page_sum += tl.sum(told * share, 0).to(tl.float64)
    if LOOKS:
        x = _features(
            column, total, peak, last, count, latest_entropy, attention, latest_surprisal, novelty, prior, difficulty,
            pair, knob, step > 0, position > 0,
        )  # fmt: skip
        x = tl.where(column >= 0, (x - mean) / std, 0.0)
        choice, scale = _prefer(
            x, knob, first_layer, second_layer, bias1, bias2, damage_head, scale_head, damage_bias, scale_bias, unit,
            floor, relative_cost, SCALE_RANGE, J, JP,
        )  # fmt: skip
    else:
        choice = knob.to(tl.int32)
        scale = tl.load(by_rung + j, mask=real, other=0.0)
    # Before the model has put anything out there is nothing to decide from, and a prompt runs at the start rung.
    known = (step > 0) | (heard > 0)
    wish = tl.minimum(tl.where(known & (position >= prompt), choice, start), resident)
    payable = (balance + _TOLERANCE >= tl.maximum(cost - budget, 0.0)) & (j <= wish)
    rung = tl.max(tl.where(payable, j, 0), 0)
    at = row * columns_kept + step
    if TRACE:
        forced = tl.load(trace + at, mask=step < columns_kept, other=-1).to(tl.int32)
        rung = tl.where(forced >= 0, forced, rung)
    balance = tl.minimum(balance + budget - tl.sum(tl.where(j == rung, cost, 0.0), 0), budget * _SLACK)
    weight = tl.sum(tl.where(j == rung, scale * ladder_scale, 0.0), 0)

    # All warps read the row; the first to be done must not write what another one has yet to read.
    tl.debug_barrier()
    tl.store(rungs + row, rung)
    tl.store(weights + row, weight)
    tl.store(positions + row, position + 1)
    tl.store(steps + row, step + 1)
    tl.store(balances + row, balance)
    if PAGES:
        tl.store(complexity + row * pages + page, page_sum, mask=counted)
    if LISTENS:
        tl.store(past + (position & (RING - 1)), token)
        # What the model has put out is seen; the token's own signals wait for the next step.
        signal = tl.arange(0, _SP)[None, :]
        kind = tl.arange(0, 4)[:, None]
        value = tl.where(signal == _NOVELTY, novelty, tl.where(signal == _PRIOR, prior, 0.0))
        value = tl.where(signal == _DIFFICULTY, difficulty, tl.where(signal == _PAIR, pair, value))
        value = tl.where((kind == 3) & (signal >= _MODEL), 1.0, value)
        tl.store(own + kind * _S + signal, value, mask=signal < _S)
    if LOG:
        tl.store(log + at, rung.to(tl.int16), mask=step < columns_kept)

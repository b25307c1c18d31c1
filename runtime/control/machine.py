"""The tensor state machine that turns signals into chunks, decisions and rung weights.

One state, batched over rows, advanced block by block by two pure functions:

    open_block   before a pass: which of its tokens open a chunk, at which rung and scale, what gates every token
    take_in      after it: the model's own signals of the tokens it handled

A decision therefore sees only what is completed, plus what follows from the opening token itself; and it sees all of
that: what became known since the last opening waits for the next one, whichever chunk its tokens belong to. What an
opening at each token of the block would see, and what the policy would choose there, is computed for all of them at
once; only what depends on the token before (`recurrence`, `bucket`) goes token by token. A decode step is the block of
one token. The same code runs in training, prefill and decode, on any device, without a host synchronisation. Source:
DESIGN sections 4-6.

Shape legend: B rows, T tokens of a block (real ones first, padding behind), S signals (in the order of `SIGNALS`),
J rungs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy.contract import Decision, RankPolicy, Summary
from policy.settings import SIGNALS, Settings

from ..sending import to_device
from .bucket import Offer, filled, pay
from .known import (
    at_end,
    gathered_tokens,
    known_before,
    left_over,
    running_mean,
    smoothed_tokens,
    would_see,
)
from .record import NO_RUNG
from .recurrence import class_bounds, levels, openings
from .state import Chunk, Gathered, Held, Smoothed, State, over_tensors


@dataclass(frozen=True)
class Constants:
    """Settings that the machine needs as tensors, made once."""

    signal_weights: Tensor
    """[S]"""
    thresholds: Tensor
    """[classes - 1]"""
    limited: bool
    """Whether any row has a budget to keep: without, nothing needs paying token by token."""
    partial: bool
    """Whether any row's ladder is in memory in part alone: chunks then open within that part."""

    @classmethod
    def of(cls, settings: Settings, limited: bool, partial: bool, device: torch.device) -> Constants:
        chunk = settings.chunk
        weights = torch.tensor([chunk.weights[name] for name in SIGNALS])
        return cls(to_device(weights, device), to_device(torch.tensor(chunk.thresholds), device), limited, partial)


@dataclass(frozen=True)
class Opened:
    """What was decided for a block; in the place of padding it holds nothing of use."""

    opens: Tensor
    """[B, T] bool: a chunk opens here."""
    chunk: Chunk
    """[B, T] each: the chunk that the token is in."""
    held: Held
    """[B, T, ...]: what its opening saw."""
    age: Tensor
    """[B, T] float32 as in `Summary`."""
    weights: Tensor
    """[B, T, J] float32 over rungs, scales folded in: what gates the token."""
    active: Tensor
    """[B, T] long: highest rung index with any weight."""
    beside: Tensor | None
    """[B, T] long: where a fade passes between two banks the other rung, which is read too; `NO_RUNG` elsewhere. None
    where nothing fades."""


def token_complexity(values: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the valid signals: values [..., S], valid [..., S] bool, weights [S] -> [...] in [0, 1]."""
    weights = weights * valid
    return (values * weights).sum(-1) / weights.sum(-1).clamp(min=1e-9)


@dataclass(frozen=True)
class Latest:
    """Of every token the latest opening in its block, itself included."""

    index: Tensor
    """[B, T] long: its place in the block; 0 where there is none."""
    there: Tensor
    """[B, T] bool: there is one; else the chunk from before the block goes on."""

    def holds(self, opened: Tensor, carried: Tensor) -> Tensor:
        """What holds at each token: opened [B, T, ...] at its opening, or else carried [B, ...]."""
        shape = (*self.index.shape, *[1] * (opened.dim() - 2))
        index, there = self.index.view(shape), self.there.view(shape)
        return torch.where(there, opened.gather(1, index.expand_as(opened)), carried[:, None])


def open_block(
    state: State, signals: Tensor, in_prompt: Tensor, real: Tensor, settings: Settings, policy: RankPolicy,
    constants: Constants, *, full: bool = False, outputs: Tensor | None = None,
    rows: Tensor | None = None,
    hidden: Tensor | None = None,
    prompt: bool = False,
) -> tuple[State, Opened]:  # fmt: skip
    """Decide for every token of a block that is about to be processed.

    signals [B, T, 4] are the tokens' own, in_prompt and real [B, T] bool; `full` says that none is padding, where the
    host knows. With outputs [B, T, 3], what the model puts out at every token and how surprising the one behind it is,
    the block is decided as if it went through the model token by token. `rows` [B] long are the rows' numbers in their
    batch, where these are some of them, `hidden` [B, T, 2 d] what an opening at each token sees of the model's states.
    `prompt` says that all tokens are of prompts whose start rung is within the budget, where the host knows.
    Returns the state after the block and what was decided.
    """
    steps = torch.arange(real.shape[1], device=real.device)
    positions, count = state.position[:, None] + steps, None if full else real.sum(1)
    own = signals if outputs is None else torch.cat([outputs, signals], 2)
    end = smoothed_tokens(state.smoothed, own, settings.chunk.smoothing)
    smoothed = end if outputs is None else known_before(end, state.smoothed)
    level, opens, start = _chunking(state, smoothed, positions, real, settings, constants)
    at = torch.where(opens, steps, -1).cummax(1).values
    latest = Latest(at.clamp(min=0), at >= 0)

    gathered = gathered_tokens(state.gathered, own, at, settings.chunk.max_tokens)
    seen = would_see(state.held, state.gathered, gathered)
    # Of the block's tokens the first is decided on what the model has just put out, the others on what grows old.
    age = (1 - 1 / (1 + steps)) if outputs is None else torch.zeros_like(steps, dtype=torch.float32)
    age = age.expand(positions.shape)
    decision = _decide(policy, seen, signals, positions, age, state.operating.knob, rows, hidden)
    wish = _within_start(decision.rung.view_as(positions), smoothed.seen[..., 0], state, in_prompt)
    if constants.partial:
        wish = torch.minimum(wish, state.offer.resident[:, None])
    rung, bucket = latest.holds(wish, state.chunk.rung), state.bucket
    if constants.limited and prompt and settings.fade_tokens == 1:
        bucket = filled(bucket, state.offer.cost.gather(1, rung), real)
    elif constants.limited:
        chunk, offer = state.chunk, state.offer
        rung, bucket = pay(bucket, offer, chunk.rung, chunk.before_rung, wish, opens, positions, start, real, settings)
    scale = decision.scales.view(*rung.shape, -1).gather(2, rung[..., None])[..., 0]
    chunk = _chunks(state.chunk, rung, scale, level, start, positions, latest)
    held = over_tensors(latest.holds, seen, state.held)
    weights, active, beside = _weights(chunk, positions, state.offer, settings.fade_tokens)

    def after(tokens: Tensor, carried: Tensor) -> Tensor:
        return at_end(count, tokens, carried)

    after_block = State(
        position=state.position + (len(steps) if count is None else count),
        level=after(level, state.level),
        smoothed=over_tensors(after, end, state.smoothed),
        gathered=left_over(state.gathered, gathered, count, opens),
        held=over_tensors(after, held, state.held),
        chunk=over_tensors(after, chunk, state.chunk),
        bucket=bucket,
        offer=state.offer,
        operating=state.operating,
    )
    return after_block, Opened(opens, chunk, held, age, weights, active, beside)


def _chunking(
    state: State, smoothed: Smoothed, positions: Tensor, real: Tensor, settings: Settings, constants: Constants
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T] each: complexity class, where chunks open, and where each token's chunk starts."""
    if settings.chunk.max_tokens == 1:  # every token is a chunk, whatever its class
        return torch.zeros_like(positions), real, positions
    complexity = token_complexity(smoothed.mean, smoothed.seen, constants.signal_weights)
    level = levels(state.level, *class_bounds(complexity, settings.chunk, constants.thresholds), real)
    return level, *openings(state.chunk.start, state.chunk.level, positions, level, real, settings.chunk)


def take_in(
    state: State, values: Tensor, real: Tensor, signals: slice, settings: Settings, *, full: bool = False
) -> State:
    """Take in what the model has put out since the block was opened: values [B, T, C] of some signals.

    real is [B, T] bool (False: padding, trailing); `full` as in `open_block`.
    """
    alpha, smoothed, gathered = settings.chunk.smoothing, state.smoothed, state.gathered
    count = None if full else real.sum(1)
    before, seen = smoothed.mean[:, signals], smoothed.seen[:, signals]
    mean = at_end(count, running_mean(before, seen, values, alpha), before)
    mask = real[..., None]
    now = Gathered(
        total=gathered.total[:, signals] + (values * mask).sum(1),
        peak=torch.maximum(gathered.peak[:, signals], values.masked_fill(~mask, 0.0).amax(1)),
        last=at_end(count, values, gathered.last[:, signals]),
        count=gathered.count[:, signals] + (real.shape[1] if count is None else count[:, None]),
    )
    some = torch.ones_like(seen) if count is None else seen | (count > 0)[:, None]

    def joined(own: Tensor, whole: Tensor) -> Tensor:
        return torch.cat([whole[:, : signals.start], own, whole[:, signals.stop :]], 1)

    return replace(
        state,
        smoothed=Smoothed(joined(mean, smoothed.mean), joined(some, smoothed.seen)),
        gathered=over_tensors(joined, now, gathered),
    )


def _decide(
    policy: RankPolicy, seen: Held, signals: Tensor, positions: Tensor, age: Tensor, knob: Tensor, rows: Tensor | None,
    hidden: Tensor | None,
) -> Decision:  # fmt: skip
    """The policy's choice for a chunk opening at each of the B x T tokens."""
    rows = torch.arange(len(positions), device=positions.device) if rows is None else rows
    summary = Summary(
        seen.stats.flatten(0, 1), seen.valid.flatten(0, 1), signals.flatten(0, 1), positions.flatten(),
        rows[:, None].expand_as(positions).flatten(), age.flatten(),
        None if hidden is None else hidden.flatten(0, 1),
    )  # fmt: skip
    return policy.decide(summary, knob[:, None].expand_as(positions).flatten())


def _within_start(rung: Tensor, known: Tensor, state: State, in_prompt: Tensor) -> Tensor:
    """rung [B, T], or the start rung: before the model has put anything out (known [B, T] bool) there is nothing to
    decide from, and a prompt runs at it: a pass over many tokens reads what the dearest of them does."""
    return torch.where(~known | in_prompt, state.operating.start_rung[:, None], rung)


def _chunks(
    carried: Chunk, rung: Tensor, scale: Tensor, level: Tensor, start: Tensor, positions: Tensor, latest: Latest
) -> Chunk:
    """[B, T] each: the chunk of every token; rung and start are that already, scale and level as if it opened there."""
    scale, level = latest.holds(scale, carried.scale), latest.holds(level, carried.level)
    # A chunk that opens comes from the one of the token before it.
    last_rung = torch.cat([carried.rung[:, None], rung[:, :-1]], 1)
    last_scale = torch.cat([carried.scale[:, None], scale[:, :-1]], 1)
    first = positions == 0
    before_rung = latest.holds(torch.where(first, rung, last_rung), carried.before_rung)
    before_scale = latest.holds(torch.where(first, scale, last_scale), carried.before_scale)
    return Chunk(start, level, rung, scale, before_rung, before_scale)


def _weights(chunk: Chunk, positions: Tensor, offer: Offer, fade_tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights over rungs [B, T, J] float32 of tokens in chunks [B, T], and `Opened`'s active and beside of them."""
    index = torch.arange(offer.cost.shape[1], device=positions.device)
    target = (chunk.rung[..., None] == index) * chunk.scale[..., None]
    if fade_tokens == 1:
        return target, chunk.rung, None
    before = (chunk.before_rung[..., None] == index) * chunk.before_scale[..., None]
    age = positions - chunk.start + 1
    # lerp is exact at both ends
    weights = torch.lerp(before, target, (age / fade_tokens).clamp(max=1.0)[..., None])
    fading = age < fade_tokens
    high, low = torch.maximum(chunk.rung, chunk.before_rung), torch.minimum(chunk.rung, chunk.before_rung)
    apart = offer.bank.gather(1, high) != offer.bank.gather(1, low)
    return weights, torch.where(fading, high, chunk.rung), torch.where(fading & apart, low, NO_RUNG)

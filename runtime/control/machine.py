"""The tensor state machine that turns signals into chunks, decisions and rung weights.

One state, batched over rows, advanced by two pure functions:

    step_token      before a token is processed: its token-only signals, does it open a chunk, at which rung and scale
    complete_block  after a forward pass: the model's own signals of the tokens it handled

A decision therefore sees only what is completed, plus the opening token's own novelty and prior; and it sees all of
that: what became known since the last opening waits for the next one, whichever chunk its tokens belong to. The same
code runs in training, prefill and decode, on any device, without a host synchronisation. Source: DESIGN sections 4-6.

Shape legend: B rows, T tokens of a block, S signals (in the order of `SIGNALS`), J rungs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from policy.contract import RankPolicy, Summary
from policy.operating import Operating
from policy.settings import MODEL_SIGNALS, SIGNALS, ChunkSettings, Settings

# Slices of the signal axis: views, where index lists would copy an index to the device at every token.
MODEL_OUTPUT = slice(0, len(MODEL_SIGNALS))
TOKEN_ONLY = slice(len(MODEL_SIGNALS), len(SIGNALS))

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Smoothed:
    """Running mean of every signal over all tokens so far."""

    mean: Tensor
    """[B, S]"""
    seen: Tensor
    """[B, S] bool: a value of this signal exists."""


@dataclass(frozen=True)
class Gathered:
    """Signals that have become known since the last opening: what the next one will see."""

    total: Tensor
    """[B, S] their sum."""
    peak: Tensor
    """[B, S] their maximum."""
    last: Tensor
    """[B, S] the latest of them."""
    count: Tensor
    """[B, S] how many they are."""


@dataclass(frozen=True)
class Held:
    """What the latest opening saw."""

    stats: Tensor
    """[B, S, 3] mean, max, last."""
    valid: Tensor
    """[B, S] bool"""


@dataclass(frozen=True)
class Chunk:
    """The open chunk."""

    start: Tensor
    """[B] long: position of its first token."""
    level: Tensor
    """[B] long: complexity class when it opened."""
    rung: Tensor
    """[B] long: its rung index."""
    scale: Tensor
    """[B] its scale."""


@dataclass(frozen=True)
class Fade:
    """Weights over rungs, scales folded in."""

    start: Tensor
    """[B, J] when the open chunk opened."""
    end: Tensor
    """[B, J] one-hot of its rung times its scale."""
    now: Tensor
    """[B, J] of the latest token."""


@dataclass(frozen=True)
class State:
    """Everything a row remembers between tokens. Every tensor has the rows first."""

    position: Tensor
    """[B] long: index of the next token, from the row's first real one."""
    level: Tensor
    """[B] long: complexity class now."""
    smoothed: Smoothed
    gathered: Gathered
    held: Held
    chunk: Chunk
    fade: Fade
    operating: Operating
    """What the rows may spend; no token changes it."""

    def select(self, index: Tensor) -> State:
        """The rows `index` [N] long, in that order; rows may repeat."""
        rows = _over_tensors(lambda tensor: tensor.index_select(0, index), self)
        return replace(rows, operating=self.operating.select(index))

    def where(self, live: Tensor, other: State) -> State:
        """This state in rows where `live` [B] bool holds, `other` elsewhere."""
        return _over_tensors(lambda new, old: torch.where(live.view(-1, *[1] * (new.dim() - 1)), new, old), self, other)


def _over_tensors(function: Callable[..., Tensor], *parts: _Part) -> _Part:
    """`function` over the tensors of equal parts of a state; what rows may spend is left as it is."""
    first: Any = parts[0]
    if isinstance(first, Tensor):
        return function(*parts)  # type: ignore[return-value]
    if isinstance(first, Operating):
        return first  # type: ignore[return-value]
    names = [field.name for field in fields(first)]
    return replace(first, **{name: _over_tensors(function, *(getattr(part, name) for part in parts)) for name in names})


def initial_state(operating: Operating, rungs: int, device: torch.device) -> State:
    """The state of `len(operating)` rows before the first token: the start rung at full weight, no signal seen."""
    operating = operating.to(device)
    rows, signals = len(operating), len(SIGNALS)
    zeros = torch.zeros(rows, signals, device=device)
    none = torch.zeros(rows, signals, dtype=torch.bool, device=device)
    index = torch.zeros(rows, dtype=torch.long, device=device)
    start = operating.start_rung
    weights = torch.nn.functional.one_hot(start, rungs).float()
    return State(
        position=index,
        level=index,
        smoothed=Smoothed(zeros, none),
        gathered=Gathered(zeros, zeros, zeros, zeros),
        held=Held(torch.zeros(rows, signals, 3, device=device), none),
        chunk=Chunk(index, index, start, torch.ones(rows, device=device)),
        fade=Fade(weights, weights, weights),
        operating=operating,
    )


@dataclass(frozen=True)
class Constants:
    """Settings that the machine needs as tensors, made once."""

    signal_weights: Tensor
    """[S]"""
    thresholds: Tensor
    """[classes - 1]"""

    @classmethod
    def of(cls, settings: Settings, device: torch.device) -> Constants:
        chunk = settings.chunk
        weights = torch.tensor([chunk.weights[name] for name in SIGNALS], device=device)
        return cls(weights, torch.tensor(chunk.thresholds, device=device))


def token_complexity(values: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the valid signals: values [..., S], valid [..., S] bool, weights [S] -> [...] in [0, 1]."""
    weights = weights * valid
    return (values * weights).sum(-1) / weights.sum(-1).clamp(min=1e-9)


def complexity_level(complexity: Tensor, level: Tensor, chunk: ChunkSettings, thresholds: Tensor) -> Tensor:
    """Class after hysteresis: it moves only as far as the complexity is past a threshold by the margin."""
    at_least = (complexity[:, None] > thresholds + chunk.hysteresis).sum(1)
    at_most = (complexity[:, None] > thresholds - chunk.hysteresis).sum(1)
    return torch.minimum(torch.maximum(level, at_least), at_most)


def step_token(
    state: State, token_signals: Tensor, in_prompt: Tensor, settings: Settings, policy: RankPolicy, constants: Constants
) -> tuple[State, Tensor]:
    """Advance every row by one token that is about to be processed.

    token_signals [B, 2] are its novelty and prior, in_prompt [B] bool. Returns the new state, whose `fade.now` gates
    this token, and [B] bool: the token opens a chunk.
    """
    here = torch.ones_like(in_prompt)[:, None]
    smoothed = _smooth(state.smoothed, TOKEN_ONLY, token_signals[:, None], here, settings.chunk.smoothing)
    complexity = token_complexity(smoothed.mean, smoothed.seen, constants.signal_weights)
    level = complexity_level(complexity, state.level, settings.chunk, constants.thresholds)
    opens = _opens(state, level, settings.chunk)
    held, gathered = _hand_over(state.held, state.gathered, opens)

    operating = state.operating
    decision = policy.decide(Summary(held.stats, held.valid, token_signals, state.position), operating.knob)
    # Before the first completed block there is nothing to decide from: the start rung stands.
    # A prompt never runs above it either, so that a budget holds from the first token on.
    start_only = ~smoothed.seen[:, 0] | (in_prompt & (decision.rung > operating.start_rung))
    rung = torch.where(start_only, operating.start_rung, decision.rung)
    scale = torch.where(start_only, 1.0, decision.scale)
    chunk = Chunk(
        start=torch.where(opens, state.position, state.chunk.start),
        level=torch.where(opens, level, state.chunk.level),
        rung=torch.where(opens, rung, state.chunk.rung),
        scale=torch.where(opens, scale, state.chunk.scale),
    )
    state = replace(
        state, position=state.position + 1, level=level, smoothed=smoothed, held=held, chunk=chunk,
        gathered=_gather(gathered, TOKEN_ONLY, token_signals[:, None], here),
        fade=_fade(state.fade, chunk, state.position, opens, settings.fade_tokens),
    )  # fmt: skip
    return state, opens


def complete_block(state: State, outputs: Tensor, real: Tensor, settings: Settings) -> State:
    """Take in the model's signals of the block just processed.

    outputs [B, T, 2] are entropy and attention, real [B, T] bool (False: padding, trailing).
    """
    return replace(
        state,
        smoothed=_smooth(state.smoothed, MODEL_OUTPUT, outputs, real, settings.chunk.smoothing),
        gathered=_gather(state.gathered, MODEL_OUTPUT, outputs, real),
    )


def _opens(state: State, level: Tensor, chunk: ChunkSettings) -> Tensor:
    length = state.position - state.chunk.start
    changed = (level != state.chunk.level) & (length >= chunk.min_tokens)
    return (state.position == 0) | (length >= chunk.max_tokens) | changed


def _hand_over(held: Held, gathered: Gathered, opens: Tensor) -> tuple[Held, Gathered]:
    """Where a chunk opens, what has been gathered is what it sees, and gathering starts anew."""
    fresh = opens[:, None] & (gathered.count > 0)
    mean = gathered.total / gathered.count.clamp(min=1)
    stats = torch.where(fresh[..., None], torch.stack([mean, gathered.peak, gathered.last], dim=-1), held.stats)
    emptied = _over_tensors(lambda tensor: tensor.masked_fill(opens[:, None], 0.0), gathered)
    return Held(stats, held.valid | fresh), emptied


def _fade(fade: Fade, chunk: Chunk, position: Tensor, opens: Tensor, fade_tokens: int) -> Fade:
    opened = opens[:, None]
    target = torch.nn.functional.one_hot(chunk.rung, fade.now.shape[1]) * chunk.scale[:, None]
    start, end = torch.where(opened, fade.now, fade.start), torch.where(opened, target, fade.end)
    progress = ((position - chunk.start + 1) / fade_tokens).clamp(max=1.0)
    return Fade(start, end, torch.lerp(start, end, progress[:, None]))  # lerp is exact at both ends


def _smooth(smoothed: Smoothed, signals: slice, values: Tensor, real: Tensor, alpha: float) -> Smoothed:
    """Move the running means of `signals` over values [B, T, 2] where real [B, T]; the first one is taken whole.

    The recurrence m <- m + alpha (x - m) is linear, so T tokens are one weighted sum: x_t counts alpha (1 - alpha) to
    the power of the tokens behind it.
    """
    before, seen = smoothed.mean[:, signals], smoothed.seen[:, signals]
    count = real.sum(1, keepdim=True)
    steps = torch.arange(values.shape[1], device=values.device)
    decay = torch.pow(1.0 - alpha, (count - 1 - steps).clamp(min=0).float()) * real
    first = (steps == 0)[:, None] & ~seen[:, None]
    weights = decay[..., None] * torch.where(first, 1.0, alpha)
    kept = torch.pow(1.0 - alpha, count.float()) * seen
    after = before * kept + (values * weights).sum(1)
    mean, all_seen = smoothed.mean.clone(), smoothed.seen.clone()
    mean[:, signals] = torch.where(count > 0, after, before)
    all_seen[:, signals] = seen | (count > 0)
    return Smoothed(mean, all_seen)


def _gather(gathered: Gathered, signals: slice, values: Tensor, real: Tensor) -> Gathered:
    """Add values [B, T, 2] where real [B, T]."""
    mask = real[..., None]
    total, peak = gathered.total.clone(), gathered.peak.clone()
    last, count = gathered.last.clone(), gathered.count.clone()
    total[:, signals] += (values * mask).sum(1)
    peak[:, signals] = torch.maximum(peak[:, signals], values.masked_fill(~mask, 0.0).amax(1))
    count[:, signals] += mask.sum(1)
    # The last real token: padding trails, so it is the one with the largest index.
    newest = real.sum(1)
    picked = values.gather(1, (newest - 1).clamp(min=0)[:, None, None].expand(-1, 1, values.shape[2]))[:, 0]
    last[:, signals] = torch.where(newest[:, None] > 0, picked, last[:, signals])
    return Gathered(total, peak, last, count)

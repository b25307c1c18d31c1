"""The tensor state machine that turns signals into chunks, decisions and rung weights.

One state, batched over rows, advanced by two pure functions:

    step_token      before a token is processed: its token-only signals, does it open a chunk, at which rung and scale
    complete_block  after a forward pass: the model's own signals of the tokens it handled

A decision therefore sees only what is completed, plus the opening token's own novelty and prior. The same code runs in
training, prefill and decode, on any device, without a host synchronisation. Source: DESIGN sections 4-6.

Shape legend: B rows, T tokens of a block, S = 4 signals (in the order of `SIGNALS`), J rungs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from policy.contract import RankPolicy, Summary
from policy.settings import SIGNALS, ChunkSettings, Settings

# Slices of the signal axis: views, where index lists would copy an index to the device at every token.
MODEL_OUTPUT = slice(0, None, 2)
TOKEN_ONLY = slice(1, None, 2)
assert SIGNALS[MODEL_OUTPUT] == ("entropy", "attention"), "model outputs are the even signals"
assert SIGNALS[TOKEN_ONLY] == ("novelty", "prior"), "token-only signals are the odd ones"


@dataclass(frozen=True)
class State:
    """Everything a row remembers between tokens. Every field has the rows first."""

    position: Tensor
    """[B] long: index of the next token, from the row's first real one."""
    smoothed: Tensor
    """[B, S] running mean of each signal."""
    seen: Tensor
    """[B, S] bool: a value of this signal exists."""
    level: Tensor
    """[B] long: complexity class now."""
    chunk_level: Tensor
    """[B] long: complexity class when the open chunk opened."""
    chunk_start: Tensor
    """[B] long: position of the open chunk's first token."""
    total: Tensor
    """[B, S] sum of each signal over the open chunk's tokens whose value is known."""
    peak: Tensor
    """[B, S] their maximum."""
    last: Tensor
    """[B, S] the latest of them."""
    count: Tensor
    """[B, S] how many they are."""
    held: Tensor
    """[B, S, 3] mean, max, last of the latest closed chunk that had a known value."""
    held_valid: Tensor
    """[B, S] bool"""
    fade_from: Tensor
    """[B, J] weights when the open chunk opened."""
    fade_to: Tensor
    """[B, J] one-hot of its rung times its scale."""
    weights: Tensor
    """[B, J] weights of the latest token."""
    rung: Tensor
    """[B] long: the open chunk's rung index."""
    scale: Tensor
    """[B] its scale."""

    def select(self, index: Tensor) -> State:
        """The rows `index` [N] long, in that order; rows may repeat."""
        return State(**{f.name: getattr(self, f.name).index_select(0, index) for f in fields(self)})

    def where(self, live: Tensor, other: State) -> State:
        """This state in rows where `live` [B] bool holds, `other` elsewhere."""
        return State(**{f.name: _where(live, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})


def _where(live: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(live.view(-1, *[1] * (new.dim() - 1)), new, old)


def initial_state(settings: Settings, rows: int, device: torch.device) -> State:
    """The state before the first token: the start rung at full weight, no signal seen."""
    signals, rungs = len(SIGNALS), len(settings.rungs)
    zeros = torch.zeros(rows, signals, device=device)
    none = torch.zeros(rows, signals, dtype=torch.bool, device=device)
    index = torch.zeros(rows, dtype=torch.long, device=device)
    start = torch.full_like(index, settings.start_rung)
    weights = torch.nn.functional.one_hot(start, rungs).float()
    return State(
        position=index, smoothed=zeros, seen=none, level=index, chunk_level=index, chunk_start=index,
        total=zeros, peak=zeros, last=zeros, count=zeros,
        held=torch.zeros(rows, signals, 3, device=device), held_valid=none,
        fade_from=weights, fade_to=weights, weights=weights, rung=start, scale=torch.ones(rows, device=device),
    )  # fmt: skip


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
    state: State, token_signals: Tensor, in_prompt: Tensor, settings: Settings, policy: RankPolicy, knob: Tensor,
    constants: Constants,
) -> tuple[State, Tensor]:  # fmt: skip
    """Advance every row by one token that is about to be processed.

    token_signals [B, 2] are its novelty and prior, in_prompt [B] bool, knob [B]. Returns the new state, whose
    `weights` gate this token, and [B] bool: the token opens a chunk.
    """
    chunk = settings.chunk
    state = _smooth(state, TOKEN_ONLY, token_signals, chunk.smoothing)
    complexity = token_complexity(state.smoothed, state.seen, constants.signal_weights)
    level = complexity_level(complexity, state.level, chunk, constants.thresholds)
    length = state.position - state.chunk_start
    changed = (level != state.chunk_level) & (length >= chunk.min_tokens)
    opens = (state.position == 0) | (length >= chunk.max_tokens) | changed

    fresh = opens[:, None] & (state.count > 0)
    closed = torch.stack([state.total / state.count.clamp(min=1), state.peak, state.last], dim=-1)
    held = torch.where(fresh[..., None], closed, state.held)
    held_valid = state.held_valid | fresh
    decision = policy.decide(Summary(held, held_valid, token_signals, state.position), knob)
    # Before the first completed block there is nothing to decide from: the start rung stands.
    # A prompt never runs above it either, so that a budget holds from the first token on.
    start_only = ~state.seen[:, 0] | (in_prompt & (decision.rung > settings.start_rung))
    rung = torch.where(start_only, settings.start_rung, decision.rung)
    scale = torch.where(start_only, 1.0, decision.scale)
    rung, scale = torch.where(opens, rung, state.rung), torch.where(opens, scale, state.scale)

    open_column = opens[:, None]
    target = torch.nn.functional.one_hot(rung, len(settings.rungs)) * scale[:, None]
    fade_from = torch.where(open_column, state.weights, state.fade_from)
    fade_to = torch.where(open_column, target, state.fade_to)
    start = torch.where(opens, state.position, state.chunk_start)
    progress = ((state.position - start + 1) / settings.fade_tokens).clamp(max=1.0)
    state = replace(
        state,
        position=state.position + 1, level=level, chunk_level=torch.where(opens, level, state.chunk_level),
        chunk_start=start, rung=rung, scale=scale, held=held, held_valid=held_valid,
        total=state.total.masked_fill(open_column, 0.0), peak=state.peak.masked_fill(open_column, 0.0),
        last=state.last.masked_fill(open_column, 0.0), count=state.count.masked_fill(open_column, 0.0),
        fade_from=fade_from, fade_to=fade_to,
        weights=torch.lerp(fade_from, fade_to, progress[:, None]),  # lerp is exact at both ends
    )  # fmt: skip
    return _accumulate(state, TOKEN_ONLY, token_signals[:, None], torch.ones_like(opens)[:, None]), opens


def complete_block(state: State, outputs: Tensor, positions: Tensor, real: Tensor, settings: Settings) -> State:
    """Take in the model's signals of the block just processed.

    outputs [B, T, 2] are entropy and attention, positions [B, T] long, real [B, T] bool (False: padding, trailing).
    """
    for t in range(outputs.shape[1]):
        state = _smooth(state, MODEL_OUTPUT, outputs[:, t], settings.chunk.smoothing, real[:, t])
    in_open_chunk = real & (positions >= state.chunk_start[:, None])
    return _accumulate(state, MODEL_OUTPUT, outputs, in_open_chunk)


@dataclass(frozen=True)
class Constants:
    """Settings that the machine needs as tensors, made once."""

    signal_weights: Tensor
    thresholds: Tensor

    @classmethod
    def of(cls, settings: Settings, device: torch.device) -> Constants:
        chunk = settings.chunk
        return cls(torch.tensor(chunk.weights, device=device), torch.tensor(chunk.thresholds, device=device))


def _smooth(state: State, signals: slice, values: Tensor, alpha: float, live: Tensor | None = None) -> State:
    """Move the running means of `signals` towards `values` [B, 2]; the first value is taken whole."""
    before, seen = state.smoothed[:, signals], state.seen[:, signals]
    after = torch.where(seen, torch.lerp(before, values, alpha), values)
    if live is not None:
        after = torch.where(live[:, None], after, before)
        seen = seen | live[:, None]
    else:
        seen = torch.ones_like(seen)
    smoothed, all_seen = state.smoothed.clone(), state.seen.clone()
    smoothed[:, signals], all_seen[:, signals] = after, seen
    return replace(state, smoothed=smoothed, seen=all_seen)


def _accumulate(state: State, signals: slice, values: Tensor, counted: Tensor) -> State:
    """Add values [B, T, 2] where counted [B, T] to the open chunk's summary."""
    mask = counted[..., None]
    total, peak, last, count = state.total.clone(), state.peak.clone(), state.last.clone(), state.count.clone()
    total[:, signals] += (values * mask).sum(1)
    peak[:, signals] = torch.maximum(peak[:, signals], values.masked_fill(~mask, 0.0).amax(1))
    count[:, signals] += mask.sum(1)
    # The last counted token: padding trails, so it is the one with the largest index.
    steps = torch.arange(1, values.shape[1] + 1, device=values.device)
    newest = (steps * counted).amax(1)
    picked = values.gather(1, (newest - 1).clamp(min=0)[:, None, None].expand(-1, 1, values.shape[2]))[:, 0]
    last[:, signals] = torch.where(newest[:, None] > 0, picked, last[:, signals])
    return replace(state, total=total, peak=peak, last=last, count=count)

"""What decides in the fast path: the rows' state in tensors that stay where they are, and one launch a step.

A row is decided by a `Stream` up to the end of its prompt, and by the controller from there on: `load` takes over what
the stream remembers. Every tensor keeps its address, as the graph that captured it needs, so rows come and go by being
written to. Covered is what `why_not` lets pass; all else is the reference path's.

Shape legend: B rows, n of them, A slots of ladders, V vocabulary, J rungs, S signals, N decode steps, P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from triton import next_power_of_2

from policy.contract import RankPolicy
from policy.difficulty import NEUTRAL, PAIRS, Difficulty
from policy.fixed import FixedPolicy
from policy.learned import LearnedPolicy
from policy.rungs import nearest_rung
from policy.settings import SIGNALS, Settings

from ..control.signals import NO_TOKEN, history_tokens
from ..control.state import Gathered
from ..control.stream import Stream
from ..ops.control import decide_kernel
from ..ops.launch import dependent
from ..ops.resolve import Rows
from ..sending import to_device
from .network import Network

MOST_HIDDEN = 128
MOST_RUNGS = 64
"""A program holds the whole network in its registers."""
_TILE = 256
"""Tokens of a window that are compared at once."""


def why_not(policy: RankPolicy, settings: Settings) -> str | None:
    """Why the controller cannot decide as this policy does, as a clause about the policy; None where it can.

    Where chunks have one token fades have, too: `Settings` allows no longer ones.
    """
    if not isinstance(policy, LearnedPolicy | FixedPolicy):
        return f"it is of the kind {policy.kind}, not learned or fixed"
    if policy.wants_hidden:
        return "it looks at the model's hidden states"
    if settings.chunk.max_tokens > 1:
        return "its chunks are longer than one token"
    if isinstance(policy, LearnedPolicy) and policy.config()["hidden"] > MOST_HIDDEN:
        return f"its network is wider than {MOST_HIDDEN} units"
    if len(policy.rungs) > MOST_RUNGS:
        return f"it has more than {MOST_RUNGS} rungs"
    return None


@dataclass(frozen=True)
class Ladders:
    """What the controller must know of every ladder; slots that no row names may be written at any time."""

    token: Tensor
    """[A, V] uint8 codes of difficulty"""
    pair: Tensor
    """[A, PAIRS] uint8"""
    scale: Tensor
    """[A, J] float32: the ladder's own scale of every rung"""

    @classmethod
    def of(cls, slots: int, vocabulary: int, rungs: int, device: torch.device) -> Ladders:
        """Slots in which every token is average and every scale 1."""
        token, pair = (
            torch.full((slots, size), NEUTRAL, dtype=torch.uint8, device=device) for size in (vocabulary, PAIRS)
        )
        return cls(token, pair, torch.ones(slots, rungs, device=device))

    def put(self, slot: int, difficulty: Difficulty, scales: Tensor) -> None:
        """Difficulty of one ladder, and scales [J] of its rungs, the top rung's again where others have more."""
        for table, own in ((self.token, difficulty.token), (self.pair, difficulty.pair)):
            table[slot] = NEUTRAL
            table[slot, : len(own)] = own[: table.shape[1]].to(table.device)
        self.scale[slot] = scales[-1]
        self.scale[slot, : len(scales)] = scales.to(self.scale)


@dataclass(frozen=True)
class RowState:
    """What every row remembers between steps, and what it may spend: `control.state.State` as far as one-token chunks
    depend on it.

    Left out are running means, classes and the open chunk, which nothing of a one-token chunk follows from (the KV
    policy judges pages by the signals themselves), and what the latest opening saw: from a row's second token on
    something new of every signal is known at each opening.
    """

    position: Tensor
    """[B] int32: index of the token to be processed, from the row's first one."""
    prompt: Tensor
    """[B] int32: where the response starts."""
    step: Tensor
    """[B] int32: decode steps since the row was loaded."""
    history: Tensor
    """[B, R] int32, R a power of two: the token of position p at p mod R, NO_TOKEN before the first one."""
    gathered: Tensor
    """[B, 4, S] float32 in the order of `Gathered`: signals that the next opening will see."""
    balance: Tensor
    """[B] float64: what is left in the bucket, in the bytes of the row's exact adapter."""
    budget: Tensor
    """[B] float64 per token; infinite: no limit."""
    cost: Tensor
    """[B, J] float64 per token at every rung."""
    knob: Tensor
    """[B] float32: log lambda within the policy's range; of a fixed policy its rung."""
    start: Tensor
    """[B] int32: the rung of the prompt, and before anything is known."""
    resident: Tensor
    """[B] int32: the highest rung in memory."""

    @classmethod
    def of(cls, rows: int, rungs: int, past: int, device: torch.device) -> RowState:
        """Rows that have not begun, of `rungs` rungs and with so much `past` for novelty."""
        whole = torch.zeros(rows, dtype=torch.int32, device=device)
        amount = torch.zeros(rows, dtype=torch.float64, device=device)
        return cls(
            position=whole.clone(),
            prompt=whole.clone(),
            step=whole.clone(),
            history=whole.new_full((rows, next_power_of_2(past)), NO_TOKEN),
            gathered=torch.zeros(rows, len(fields(Gathered)), len(SIGNALS), device=device),
            balance=amount.clone(),
            budget=amount.clone(),
            cost=amount.new_zeros(rows, rungs),
            knob=torch.zeros(rows, device=device),
            start=whole.clone(),
            resident=whole.clone(),
        )


class Controller:
    """Writes rung and weight of `rows` at every step, as `policy` decides; `ladders` are what it knows of theirs.

    `trace` [B, N] int16 holds rungs that replace what was decided at a row's n-th step since it was loaded, -1 where
    nothing does; the rung of every step is written to `log` [B, N] int16, of no step beyond N. To `complexity` [B, P]
    float64, sums over the tokens of every page, which somebody else judges pages by, a step adds the token before its
    own as `Stream.close_block` measures it. `state` is that of the same rows, where others have made it. Raises
    ValueError for what is not covered.
    """

    def __init__(
        self, policy: RankPolicy, settings: Settings, rows: Rows, ladders: Ladders, *, trace: Tensor | None = None,
        log: Tensor | None = None, complexity: Tensor | None = None, state: RowState | None = None,
    ) -> None:  # fmt: skip
        reason = why_not(policy, settings)
        if reason is not None:
            raise ValueError(f"policy: expected one that the fast path covers, got one that it does not: {reason}")
        assert isinstance(policy, LearnedPolicy | FixedPolicy), "no other is covered"
        assert trace is None or log is None or trace.shape == log.shape, "both are of the same steps"
        device = rows.slot.device
        self.policy, self.settings, self.rows, self.ladders = policy, settings, rows, ladders
        self.trace, self.log, self.complexity = trace, log, complexity
        past = history_tokens(settings.signals.novelty_window_tokens)
        self.state = RowState.of(len(rows.slot), len(policy.rungs), past, device) if state is None else state
        self._network = Network.of(policy, device)
        self._hears_attention = isinstance(policy, LearnedPolicy) and "attention" in policy.config()["signals"]
        self._shares: Tensor | None = None
        if complexity is not None:
            assert len(complexity) == len(rows.slot), "it is of the same rows"
            assert complexity.dtype == torch.float64, "the order of adding must decide nothing"
            assert complexity.is_contiguous(), "the kernel takes its rows to lie one behind the other"
            self._shares = complexity_shares(settings, device)
            self._hears_attention |= settings.chunk.weights["attention"] > 0
        self._constants = self._sizes()

    def _sizes(self) -> dict[str, Any]:
        """The kernel's constants that no call changes."""
        network, signals = self._network, self.settings.signals
        rungs, window = len(self.policy.rungs), signals.novelty_window_tokens
        inputs, hidden = (1, 1) if network.first is None else (network.first.shape[1], network.first.shape[0])
        return {
            "LOOKS": self.policy.looks, "WINDOW": window, "RING": self.state.history.shape[1],
            "TILE": min(_TILE, next_power_of_2(window)), "DECAY": signals.prior_decay_tokens,
            "VOCABULARY": self.ladders.token.shape[1], "PAIR_CODES": self.ladders.pair.shape[1],
            "SCALE_RANGE": self.policy.scale_range if isinstance(self.policy, LearnedPolicy) else 0.0,
            "J": rungs, "JP": next_power_of_2(rungs), "FP": inputs, "HP": hidden,
            "PAGES": self.complexity is not None, "TRACE": self.trace is not None, "LOG": self.log is not None,
            "num_warps": 4 if hidden <= 64 else 8,
        }  # fmt: skip

    def load(self, index: Tensor, stream: Stream, slot: Tensor, complexity: Tensor | None = None) -> None:
        """Go on with rows `index` [n] long where `stream`, all of its n rows, stands between two blocks; their ladders
        lie in `slot` [n], and their pages go on from the sums of `complexity` [n, <= P] float64, those beyond from 0.

        The first step takes in how surprising its token is under what the stream expected; entropy and attention of
        the token before it the stream has taken in itself. Rows of a static stream have their rung and weight from
        here on, with or without steps.
        """
        assert complexity is None or self.complexity is not None, "nobody judges pages here"
        own, state, policy = self.state, stream.state, self.policy
        knob = state.operating.knob
        if isinstance(policy, LearnedPolicy):
            knob = knob.clamp(*policy.log_lambda_range)
        else:
            knob = nearest_rung(knob, len(policy.rungs))
        past = torch.arange(stream.history.shape[1], device=index.device) - stream.history.shape[1]
        ring = torch.full((len(index), own.history.shape[1]), NO_TOKEN, device=index.device)
        ring.scatter_(1, (state.position[:, None] + past) % ring.shape[1], stream.history)
        values = [
            (own.position, state.position),
            (own.prompt, stream.prompt_tokens),
            (own.step, torch.zeros_like(index)),
            (own.history, ring),
            (own.gathered, torch.stack([getattr(state.gathered, field.name) for field in fields(Gathered)], 1)),
            (own.balance, state.bucket.balance),
            (own.budget, state.bucket.budget),
            (own.cost, state.offer.cost),
            (own.knob, knob),
            (own.start, state.operating.start_rung),
            (own.resident, state.offer.resident),
            (self.rows.slot, slot),
        ]
        if stream.static is not None:
            rung = to_device(torch.tensor(stream.static), index.device)
            weight = self._network.by_rung[0, rung] * self.ladders.scale[slot.long(), rung]
            values += [(self.rows.rung, rung), (self.rows.weight, weight)]
        if self.complexity is not None:
            sums = self.complexity.new_zeros(len(index), self.complexity.shape[1])
            if complexity is not None:
                sums[:, : complexity.shape[1]] = complexity
            values.append((self.complexity, sums))
        for kept, new in values:
            kept[index] = new.to(kept.dtype)

    def step(self, tokens: Tensor, entropy: Tensor, surprisal: Tensor, distant: Tensor | None = None) -> None:
        """Decide for tokens [B] long, which are about to be processed.

        surprisal [B] is theirs; entropy [B] and distant [probed layers, B, heads] (attention mass beyond the recent
        pages) the model has put out at the tokens before them; all float32. `distant` may be left out where neither
        the policy nor what pages are judged by looks at attention.
        """
        own, rows, ladders, network = self.state, self.rows, self.ladders, self._network
        probes, heads, apart = 0, 1, 0
        if distant is not None:  # the first rows of more
            probes, _, heads = distant.shape
            apart = distant.stride(0) // heads
        assert distant is not None or not self._hears_attention, "who looks at attention is given it"
        traced = self.log if self.trace is None else self.trace
        pages = None if self.complexity is None else self.complexity.shape[1]
        decide_kernel[(len(rows.slot),)](
            tokens, entropy, surprisal, distant, apart, rows.slot, rows.rung, rows.weight,
            *(getattr(own, field.name) for field in fields(own)), ladders.token, ladders.pair, ladders.scale,
            network.columns, network.normal, network.first, network.second, network.biases, network.heads,
            network.by_rung, self.complexity, self._shares, pages,
            self.trace, self.log, 0 if traced is None else traced.shape[1],
            **self._constants, PROBES=probes, HEADS=heads, LANES=next_power_of_2(max(probes * heads, 1)),
            **dependent(tokens.device),
        )  # fmt: skip


def complexity_shares(settings: Settings, device: torch.device) -> Tensor:
    """[S] float32: how much of a completed token's complexity each signal makes, 0 where that of the surprisal would
    be: the token behind is not known. They sum to 1, or to 0 where no other counts anything."""
    counted = {name: weight for name, weight in settings.chunk.weights.items() if name != "surprisal"}
    whole = sum(counted.values()) or 1.0
    return torch.tensor([counted.get(name, 0.0) / whole for name in SIGNALS], device=device)

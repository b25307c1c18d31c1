"""One batch of sequences on its way through the model: tokens in, rung weights out, and what was decided on record.

The stream wraps the pure state machine with what it needs per sequence: past tokens for novelty, the prompt's length
for the prior, every token's complexity for the KV pages, and the record from which a trace is built after the fact.
Nothing here synchronises with the host except `trace` and `mean_rank`, which are called when the tokens are out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policy.contract import RankPolicy
from policy.settings import SIGNALS, STATS, Settings

from .machine import Constants, State, complete_block, initial_state, step_token, token_complexity
from .signals import NO_TOKEN, history_tokens, next_token_entropy, ngram_novelty, positional_prior, roll_history


@dataclass(frozen=True)
class ChunkTrace:
    """One chunk as it was decided."""

    start: int
    """Position of its first token, from the row's first real token."""
    length: int
    signals: dict[str, dict[str, float] | None]
    """Per signal mean, max and last value that the decision saw; None before the first one exists."""
    rung: int
    """Rank."""
    scale: float
    kv_format: list[str]
    """Format of every KV page that holds tokens of this chunk, oldest first, as of when the trace was taken."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class _Block:
    """What one block decided; tensors stay on the device."""

    positions: Tensor
    real: Tensor
    opens: Tensor
    rung: Tensor
    scale: Tensor
    active: Tensor
    held: Tensor
    held_valid: Tensor
    first: Tensor


class Stream:
    """Signals, chunks and decisions of B rows.

    `knob` is the policy's knob, one number or [B]; `prompt_tokens` [B] says where every row's response starts
    (default: at its first token).
    """

    def __init__(
        self,
        settings: Settings,
        policy: RankPolicy,
        knob: float | Tensor,
        rows: int,
        device: torch.device,
        prompt_tokens: Tensor | None = None,
    ) -> None:
        self.settings, self.policy = settings, policy
        self.knob = torch.as_tensor(knob, dtype=torch.float32, device=device).expand(rows)
        self.prompt_tokens = torch.zeros(rows, dtype=torch.long, device=device)
        if prompt_tokens is not None:
            self.prompt_tokens = prompt_tokens.to(device)
        self.state = initial_state(settings, rows, device)
        self.constants = Constants.of(settings, device)
        past = history_tokens(settings.signals.novelty_window_tokens)
        self.history = torch.full((rows, past), NO_TOKEN, dtype=torch.long, device=device)
        self._complexity = torch.zeros(rows, 0, device=device)
        self._processed = 0
        """Columns processed so far; no row has more tokens."""
        self._token_signals = torch.zeros(rows, 0, 2, device=device)
        self._blocks: list[_Block] = []

    @torch.no_grad()
    def open_block(self, tokens: Tensor, real: Tensor, ragged: bool) -> Tensor:
        """Decide for every token of a block before it is processed.

        tokens [B, T] long, real [B, T] bool with padding trailing (`ragged` False promises that there is none).
        Returns the weights over rungs, [B, T, J] float32.
        """
        tokens = torch.where(real, tokens, NO_TOKEN)
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        positions = self.state.position[:, None] + steps
        signals = self.settings.signals
        novelty = ngram_novelty(self.history, tokens, signals.novelty_window_tokens)
        prior = positional_prior(positions, self.prompt_tokens, signals.prior_decay_tokens)
        self.history = roll_history(self.history, tokens, real.sum(1))
        self._token_signals = torch.stack([novelty, prior], dim=-1)
        in_prompt = positions < self.prompt_tokens[:, None]
        states: list[State] = []
        opens: list[Tensor] = []
        for t in range(tokens.shape[1]):
            before = self.state
            after, opened = step_token(
                before,
                self._token_signals[:, t],
                in_prompt[:, t],
                self.settings,
                self.policy,
                self.knob,
                self.constants,
            )
            if ragged:
                after, opened = after.where(real[:, t], before), opened & real[:, t]
            self.state = after
            states.append(after)
            opens.append(opened)

        def over_tokens(name: str) -> Tensor:
            return torch.stack([getattr(state, name) for state in states], dim=1)

        gates = over_tokens("weights")
        rungs = torch.arange(gates.shape[-1], device=gates.device)
        self._blocks.append(
            _Block(
                positions=positions,
                real=real,
                opens=torch.stack(opens, 1),
                rung=over_tokens("rung"),
                scale=over_tokens("scale"),
                active=((gates > 0) * rungs).amax(-1),
                held=over_tokens("held"),
                held_valid=over_tokens("held_valid"),
                first=self._token_signals,
            )
        )
        return gates

    @property
    def active_rung(self) -> Tensor:
        """[B, T] highest rung index with any weight, of the block under way."""
        return self._blocks[-1].active

    @torch.no_grad()
    def close_block(self, logits: Tensor, attention: Tensor) -> None:
        """Take in what the model put out for the block: logits [B, T, V], attention proxy [B, T]."""
        block = self._blocks[-1]
        outputs = torch.stack([next_token_entropy(logits), attention], dim=-1)
        self.state = complete_block(self.state, outputs, block.positions, block.real, self.settings)
        values = torch.stack([outputs, self._token_signals], dim=-1).flatten(-2)  # back to the order of SIGNALS
        all_valid = torch.ones_like(values, dtype=torch.bool)
        self._remember(token_complexity(values, all_valid, self.constants.signal_weights), block)

    def _remember(self, complexity: Tensor, block: _Block) -> None:
        rows, steps = complexity.shape
        needed = self._processed + steps
        if needed >= self._complexity.shape[1]:
            # Twice the room each time, so that the work per token stays constant; the last column takes the padding.
            grown = complexity.new_zeros(rows, 2 * needed + 1)
            grown[:, : self._processed] = self._complexity[:, : self._processed]
            self._complexity = grown
        spare = self._complexity.shape[1] - 1
        self._complexity.scatter_(1, torch.where(block.real, block.positions, spare), complexity)
        self._processed = needed

    @property
    def complexity(self) -> Tensor:
        """[B, N] complexity of every completed token, by position (0 where a row has no token yet)."""
        return self._complexity[:, : self._processed]

    def select_rows(self, index: Tensor) -> Stream:
        """A stream that goes on from here with rows `index` [N] (repeats allowed) and an empty record."""
        other = Stream(self.settings, self.policy, 0.0, len(index), index.device, self.prompt_tokens[index])
        other.knob, other.state, other.history = self.knob[index], self.state.select(index), self.history[index]
        other._complexity, other._processed = self._complexity[index], self._processed
        return other

    def record(self) -> dict[str, Tensor]:
        """Everything decided so far, by column of processing: `positions`, `real`, `opens`, `rung`, `scale` and
        `active` [B, N]; what each token's decision saw: `held` [B, N, S, 3], `held_valid` [B, N, S], `first` [B, N, 2].
        """
        names = _Block.__dataclass_fields__
        return {name: torch.cat([getattr(block, name) for block in self._blocks], dim=1) for name in names}

    def mean_rank(self, rung_rank: Tensor, lengths: list[int] | None = None) -> tuple[float, float]:
        """Byte-weighted mean active rank over (response, prompt) tokens; nan where there are none.

        rung_rank [J] is `Ladder.mean_rank()`; `lengths` cuts rows at that many tokens.
        """
        record = self.record()
        counted = record["real"].clone()
        if lengths is not None:
            counted &= record["positions"] < torch.tensor(lengths, device=counted.device)[:, None]
        ranks = rung_rank.to(counted.device)[record["active"]]
        response = counted & (record["positions"] >= self.prompt_tokens[:, None])
        means = [ranks[which].mean().item() for which in (response, counted & ~response)]
        return means[0], means[1]

    def trace(self, row: int, length: int, page_formats: list[str], page_tokens: int) -> list[ChunkTrace]:
        """The chunks of one row up to `length` tokens; `page_formats` are those of its KV pages, oldest first."""
        record = {name: value[row].cpu() for name, value in self.record().items()}
        order = [i for i in record["real"].nonzero()[:, 0].tolist() if record["positions"][i] < length]
        starts = [i for i in order if record["opens"][i]]
        positions = [int(record["positions"][i]) for i in starts]
        ends = [*positions[1:], length]
        chunks = []
        for i, start, end in zip(starts, positions, ends, strict=True):
            pages = page_formats[start // page_tokens : (end - 1) // page_tokens + 1]
            signals = {
                name: dict(zip(STATS, record["held"][i, s].tolist(), strict=True))
                if record["held_valid"][i, s]
                else None
                for s, name in enumerate(SIGNALS)
            }
            rank = self.settings.rungs[int(record["rung"][i])]
            chunks.append(ChunkTrace(start, end - start, signals, rank, float(record["scale"][i]), pages))
        return chunks

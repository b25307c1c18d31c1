"""One batch of sequences on its way through the model: tokens in, rung weights out.

The stream wraps the pure state machine with what it needs per sequence: past tokens for novelty, the prompt's length
for the prior, and the running sums of what was spent. What it holds does not grow with the text, unless a record is
asked for. Nothing here synchronises with the host.

Shape legend: B rows, T tokens of a block, V vocabulary, J rungs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy.contract import RankPolicy
from policy.operating import Operating
from policy.settings import Settings

from .machine import Constants, State, complete_block, initial_state, step_token, token_complexity
from .record import Block, Record, Sums
from .signals import NO_TOKEN, history_tokens, next_token_entropy, ngram_novelty, positional_prior, roll_history


class Stream:
    """Signals, chunks and decisions of the rows of `operating`.

    `prompt_tokens` [B] says where every row's response starts (default: at its first token); `keep_record` keeps
    everything that was decided, not only its sums.
    """

    def __init__(
        self,
        settings: Settings,
        policy: RankPolicy,
        operating: Operating,
        device: torch.device,
        prompt_tokens: Tensor | None = None,
        *,
        keep_record: bool = False,
    ) -> None:
        rows = len(operating)
        self.settings, self.policy = settings, policy
        self.prompt_tokens = torch.zeros(rows, dtype=torch.long, device=device)
        if prompt_tokens is not None:
            self.prompt_tokens = prompt_tokens.to(device)
        self.state = initial_state(operating, len(policy.rungs), device)
        self.constants = Constants.of(settings, device)
        past = history_tokens(settings.signals.novelty_window_tokens)
        self.history = torch.full((rows, past), NO_TOKEN, dtype=torch.long, device=device)
        self.sums = Sums(rows, len(policy.rungs), device)
        self.record = Record() if keep_record else None
        self._block: Block | None = None

    @torch.no_grad()
    def open_block(self, tokens: Tensor, real: Tensor, ragged: bool) -> Tensor:
        """Decide for every token of a block before it is processed.

        tokens [B, T] long, real [B, T] bool with padding trailing (`ragged` False promises that there is none).
        Returns the weights over rungs, [B, T, J] float32.
        """
        tokens = torch.where(real, tokens, NO_TOKEN)
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        positions = self.state.position[:, None] + steps
        in_prompt = positions < self.prompt_tokens[:, None]
        signals = self._token_signals(tokens, real, positions)
        states: list[State] = []
        opens: list[Tensor] = []
        for t in range(tokens.shape[1]):
            before = self.state
            after, opened = step_token(
                before, signals[:, t], in_prompt[:, t], self.settings, self.policy, self.constants
            )
            if ragged:
                after, opened = after.where(real[:, t], before), opened & real[:, t]
            self.state = after
            states.append(after)
            opens.append(opened)
        gates = torch.stack([state.fade.now for state in states], 1)
        rungs = torch.arange(gates.shape[-1], device=gates.device)
        self._block = Block(
            positions=positions,
            real=real,
            opens=torch.stack(opens, 1),
            rung=torch.stack([state.chunk.rung for state in states], 1),
            scale=torch.stack([state.chunk.scale for state in states], 1),
            active=((gates > 0) * rungs).amax(-1),
            held=torch.stack([state.held.stats for state in states], 1),
            held_valid=torch.stack([state.held.valid for state in states], 1),
            first=signals,
        )
        self.sums.add(tokens, real, ~in_prompt, self._block.active)
        return gates

    def _token_signals(self, tokens: Tensor, real: Tensor, positions: Tensor) -> Tensor:
        """[B, T, 2] novelty and prior; the history moves on."""
        settings = self.settings.signals
        novelty = ngram_novelty(self.history, tokens, settings.novelty_window_tokens)
        self.history = roll_history(self.history, tokens, real.sum(1))
        prior = positional_prior(positions, self.prompt_tokens, settings.prior_decay_tokens)
        return torch.stack([novelty, prior], dim=-1)

    @property
    def block(self) -> Block:
        """What was decided for the block under way, or else the latest one."""
        assert self._block is not None, "open_block comes first"
        return self._block

    @torch.no_grad()
    def close_block(self, logits: Tensor, attention: Tensor) -> Tensor:
        """Take in what the model put out for the block: logits [B, T, V], attention proxy [B, T].

        Returns every token's complexity, [B, T] float32, by which its KV page is judged.
        """
        block = self.block
        outputs = torch.stack([next_token_entropy(logits), attention], dim=-1)
        self.state = complete_block(self.state, outputs, block.real, self.settings)
        values = torch.cat([outputs, block.first], dim=-1)
        all_valid = torch.ones_like(values, dtype=torch.bool)
        complexity = token_complexity(values, all_valid, self.constants.signal_weights)
        if self.record is not None:
            self.record.blocks.append(block)
            self.record.complexities.append(complexity)
        return complexity

    def columns(self) -> dict[str, Tensor]:
        """The record by column of processing, see `Record.columns`. Raises ValueError when none was asked for."""
        if self.record is None:
            raise ValueError("trace: expected a run that keeps its record, got one without; pass keep_record=True")
        return self.record.columns()

    def select_rows(self, index: Tensor) -> Stream:
        """A stream that goes on from here with rows `index` [N] (repeats allowed) and an empty record."""
        operating, keep = self.state.operating.select(index), self.record is not None
        prompt_tokens = self.prompt_tokens[index]
        other = Stream(self.settings, self.policy, operating, index.device, prompt_tokens, keep_record=keep)
        other.state, other.history, other.sums = self.state.select(index), self.history[index], self.sums.select(index)
        return other

    def restarted(self) -> Stream:
        """A stream before the first token of the same rows, for the same prompts and responses."""
        operating, keep = self.state.operating, self.record is not None
        device = self.prompt_tokens.device
        other = Stream(self.settings, self.policy, operating, device, self.prompt_tokens, keep_record=keep)
        other.sums = self.sums.restarted()
        return other

"""One batch of sequences on its way through the model: tokens in, rung weights out.

The stream wraps the pure state machine with what it needs per sequence: past tokens for novelty, the prompt's length
for the prior, and the running sums of what was spent. What it holds does not grow with the text, unless a record is
asked for. Nothing here synchronises with the host.

A policy that does not look at the text, with full-precision KV pages and no record of the signals, needs none of them:
such a stream is `static`, neither measures nor decides, and may take a whole prompt as one block.

Shape legend: B rows, T tokens of a block, V vocabulary, J rungs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from policy.contract import RankPolicy, Summary
from policy.difficulty import Difficulty
from policy.operating import Operating
from policy.rungs import nearest_rung
from policy.settings import MODEL_SIGNALS, SIGNALS, STATS, TOKEN_SIGNALS, Settings

from .bucket import SAME_COST, Offer, affordable
from .known import OUTPUTS, SURPRISAL, pick
from .machine import Constants, Opened, open_block, take_in, token_complexity
from .record import Block, Keep, Record, Sums
from .signals import (
    NO_TOKEN,
    history_tokens,
    log_probabilities,
    next_token_entropy,
    ngram_novelty,
    positional_prior,
    roll_history,
    surprisal,
)
from .state import initial_state


class Stream:
    """Signals, chunks and decisions of the rows of `operating`, which choose among what their ladders `offer`.

    `prompt_tokens` [B] says where every row's response starts (default: at its first token); `keep` says what is kept
    of every token beside the sums; `difficulty` are the tables of every row, without which every token is average,
    and `numbers` [B] the rows' own in their batch, where these are some of them. `hidden` says that the model's states
    are looked at: blocks then come with embeddings and close with states.
    """

    def __init__(
        self,
        settings: Settings,
        policy: RankPolicy,
        operating: Operating,
        offer: Offer,
        device: torch.device,
        prompt_tokens: Tensor | None = None,
        *,
        keep: Keep = Keep.SUMS,
        difficulty: Difficulty | None = None,
        numbers: Tensor | None = None,
        hidden: bool = False,
    ) -> None:
        rows = len(operating)
        self.rows, self.settings, self.policy, self.keep = rows, settings, policy, keep
        self.prompt_tokens = torch.zeros(rows, dtype=torch.long, device=device)
        if prompt_tokens is not None:
            self.prompt_tokens = prompt_tokens.to(device)
        self.static = None if keep is Keep.DECISIONS else static_rungs(policy, operating, offer)
        """The rung index of every row, on the host, where no token changes it; else None."""
        self.adapters: list[int] = operating.adapter.tolist()
        """Which ladder every row uses, on the host."""
        self.affordable = affordable(operating, offer)
        """Whether prompts stay at their start rungs"""
        self.state = initial_state(operating, offer, device)
        self.constants = Constants.of(settings, bool(operating.budget.isfinite().any()), offer.partial, device)
        if self.static is not None:
            self._static = _static_weights(policy, self.state.operating.knob, self.state.offer.resident)
        past = history_tokens(settings.signals.novelty_window_tokens)
        self.history = torch.full((rows, past), NO_TOKEN, dtype=torch.long, device=device)
        if difficulty is None:
            difficulty = Difficulty.stack([Difficulty.neutral(device=device)] * rows)
        self.difficulty = difficulty.to(device)
        self.numbers, self.hidden = numbers, hidden or policy.wants_hidden
        self.latest_state: Tensor | None = None
        """[B, d] the model's last hidden state at the latest completed token of every row; None before the first."""
        self.expected: Tensor | None = None
        """[B, V] `log_probabilities` of the token that follows the latest one of every row; None before the first."""
        self.sums = Sums(rows, len(policy.rungs), device)
        self.record = Record()
        self._block: Block | None = None
        self._tokens = self.history[:, :0]
        """Those of the block under way."""
        self._full = False
        """No token of the block under way is padding, as far as the host knows."""

    @torch.no_grad()
    def open_block(
        self, tokens: Tensor, real: Tensor, *, full: bool = False, prompt: bool = False,
        embeddings: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Decide for every token of a block before it is processed.

        tokens [B, T] long, real [B, T] bool with padding trailing; `full` says that there is none, and `prompt` that
        all tokens are of prompts, where the host knows; embeddings [B, T, d] are the tokens', where states are looked
        at. Returns the weights over rungs, [B, T, J] float32; of a static stream [B, 1, J], the same for all tokens,
        and the same tensor every time.
        """
        self._full = full
        self._tokens = tokens = torch.where(real, tokens, NO_TOKEN)
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        positions = self.state.position[:, None] + steps
        in_prompt = positions < self.prompt_tokens[:, None]
        if self.static is not None:
            weights, rung = self._static
            active, beside = rung[:, None].expand_as(tokens), None
            self.state = replace(self.state, position=self.state.position + real.sum(1))
        else:
            hidden = None
            if self.hidden:
                assert embeddings is not None, "who looks at states is given embeddings"
                state = torch.zeros_like(embeddings[:, 0]) if self.latest_state is None else self.latest_state
                hidden = torch.cat([state[:, None].expand_as(embeddings), embeddings], 2)
            paid = prompt and self.affordable
            opened = self._decide(tokens, real, positions, in_prompt, hidden=hidden, paid=paid)
            weights, active, beside = opened.weights, opened.active, opened.beside
        self.sums.add(tokens, real, ~in_prompt, active, beside)
        if self.keep >= Keep.RUNGS:
            self.record.active.append(active)
        return weights

    @torch.no_grad()
    def replay(
        self, tokens: Tensor, real: Tensor, outputs: Tensor | None, states: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Decide for every token of whole texts, as if they went through the model token by token.

        tokens [B, T] and real as in `open_block`; outputs [B, T, 3] are the `outputs` of an earlier pass over them,
        None where there was none; states [B, T, d] are the model's in that pass and embeddings [B, T, d] the tokens',
        where states are looked at. Returns the weights over rungs, [B, T, J].
        """
        tokens = torch.where(real, tokens, NO_TOKEN)
        positions = self.state.position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        in_prompt = positions < self.prompt_tokens[:, None]
        if outputs is None:
            outputs = torch.zeros(*tokens.shape, len(MODEL_SIGNALS), device=tokens.device)
        hidden = None
        if self.hidden:
            assert embeddings is not None, "who looks at states is given embeddings"
            states = torch.zeros_like(embeddings) if states is None else states
            before = torch.nn.functional.pad(states[:, :-1], (0, 0, 1, 0))
            hidden = torch.cat([before, embeddings], 2)
        opened = self._decide(tokens, real, positions, in_prompt, outputs, hidden)
        self.sums.add(tokens, real, ~in_prompt, opened.active, opened.beside)
        if self.keep >= Keep.RUNGS:
            self.record.active.append(opened.active)
        if self.keep is Keep.DECISIONS:
            self.record.blocks.append(self.block)
            self.record.complexities.append(self._complexity(outputs[..., OUTPUTS], self.block))
        return opened.weights

    def _complexity(self, outputs: Tensor, block: Block) -> Tensor:
        """[B, T] float32 of a block at which the model put out entropy and attention [B, T, 2]."""
        values = torch.cat([outputs, torch.zeros_like(outputs[..., :1]), block.first], dim=-1)
        valid = torch.ones_like(values, dtype=torch.bool)
        valid[..., SURPRISAL] = False  # that of the token behind the block is not known
        return token_complexity(values, valid, self.constants.signal_weights)

    def _decide(
        self, tokens: Tensor, real: Tensor, positions: Tensor, in_prompt: Tensor, outputs: Tensor | None = None,
        hidden: Tensor | None = None, paid: bool = False,
    ) -> Opened:  # fmt: skip
        signals = self._token_signals(tokens, real, positions)
        if self.expected is not None:
            # How surprising a block's first token is follows from what the model put out before it.
            first = surprisal(self.expected, tokens[:, 0])[:, None, None]
            expected = real[:, :1] & (self.state.position[:, None] > 0)
            self.state = take_in(self.state, first, expected, SURPRISAL, self.settings)
        self.state, opened = open_block(
            self.state, signals, in_prompt, real, self.settings, self.policy, self.constants, full=self._full,
            outputs=outputs, rows=self.numbers, hidden=hidden, prompt=paid,
        )  # fmt: skip
        chunk, held = opened.chunk, opened.held
        self._block = Block(
            positions, real, opened.opens, chunk.rung, chunk.scale, opened.active, opened.weights, held.stats,
            held.valid, signals, opened.age, signals[..., :0] if hidden is None else hidden,
        )  # fmt: skip
        return opened

    def _token_signals(self, tokens: Tensor, real: Tensor, positions: Tensor) -> Tensor:
        """[B, T, 4] novelty, prior and difficulties; the history moves on."""
        settings = self.settings.signals
        novelty = ngram_novelty(self.history, tokens, settings.novelty_window_tokens)
        before = torch.cat([self.history[:, -1:], tokens[:, :-1]], 1)
        self.history = roll_history(self.history, tokens, real.sum(1))
        prior = positional_prior(positions, self.prompt_tokens, settings.prior_decay_tokens)
        return torch.cat([torch.stack([novelty, prior], -1), self.difficulty.values(before, tokens)], -1)

    @property
    def block(self) -> Block:
        """What was decided for the block under way, or else the latest one."""
        assert self._block is not None, "open_block comes first, and a static stream decides nothing"
        return self._block

    @torch.no_grad()
    def close_block(self, logits: Tensor, attention: Tensor, states: Tensor | None = None) -> Tensor:
        """Take in what the model put out for the block: logits [B, T, V], attention proxy [B, T], and its last hidden
        states [B, T, d] where they are looked at.

        Returns every token's complexity, [B, T] float32, by which its KV page is judged. Not for a static stream.
        """
        log_p = log_probabilities(logits)
        following = surprisal(log_p[:, :-1], self._tokens[:, 1:])
        return self.close_outputs(next_token_entropy(log_p), attention, following, self._last(log_p), states)

    @torch.no_grad()
    def close_outputs(
        self, entropy: Tensor, attention: Tensor, following: Tensor, latest: Tensor, states: Tensor | None = None
    ) -> Tensor:
        """`close_block` for who has measured the block's logits: entropy [B, T], surprisal of each token after the
        first, `following` [B, T - 1], and `latest` [B, V], `log_probabilities` at every row's last token of the block.

        All are numbers, at padding too; a row without a token in the block keeps what it had, whatever its `latest`.
        """
        block, outputs = self.block, torch.stack([entropy, attention], dim=-1)
        self.state = take_in(self.state, outputs, block.real, OUTPUTS, self.settings, full=self._full)
        if following.shape[1] > 0:
            own = following[..., None]
            self.state = take_in(self.state, own, block.real[:, 1:], SURPRISAL, self.settings, full=self._full)
        self.expected = self._latest(latest, self.expected)
        if states is not None:
            self.latest_state = self._latest(self._last(states), self.latest_state)
        complexity = self._complexity(outputs, block)
        if self.keep is Keep.DECISIONS:
            self.record.blocks.append(block)
            self.record.complexities.append(complexity)
        return complexity

    def _last(self, values: Tensor) -> Tensor:
        """values [B, T, ...] at every row's last token of the block; at any where it has none."""
        if self._full:
            # A copy, or the whole block's would be held until the next one.
            return values[:, -1].clone() if values.shape[1] > 1 else values[:, -1]
        return pick(values, (self.block.real.sum(1) - 1).clamp(min=0))

    def _latest(self, last: Tensor, before: Tensor | None) -> Tensor:
        """[B, ...] `last` where a row has a token in the block, or else what was before it; zeros before the first."""
        if self._full:
            return last
        some = self.block.real.any(1)[:, None]
        return torch.where(some, last, torch.zeros_like(last) if before is None else before)

    def columns(self) -> dict[str, Tensor]:
        """The record by column of processing, see `Record.columns`. Raises ValueError when none was asked for."""
        if self.keep is not Keep.DECISIONS:
            raise ValueError("trace: expected a run that keeps its record, got one without; pass keep_record=True")
        return self.record.columns()

    def active_rungs(self) -> Tensor:
        """[B, N] long: the highest active rung of every column processed, of a stream that keeps them."""
        assert self.keep >= Keep.RUNGS, "only a stream that keeps its rungs can tell them"
        return torch.cat(self.record.active, 1)

    def select_rows(self, index: Tensor) -> Stream:
        """A stream that goes on from here with rows `index` [N] (repeats allowed) and an empty record."""
        state = self.state.select(index)
        other = Stream(
            self.settings, self.policy, state.operating, state.offer, index.device, self.prompt_tokens[index],
            keep=self.keep, difficulty=self.difficulty.select(index), hidden=self.hidden,
        )  # fmt: skip
        other.state, other.history, other.sums = state, self.history[index], self.sums.select(index)
        other.expected = None if self.expected is None else self.expected[index]
        other.latest_state = None if self.latest_state is None else self.latest_state[index]
        return other

    def restarted(self) -> Stream:
        """A stream before the first token of the same rows, for the same prompts and responses."""
        other = Stream(
            self.settings, self.policy, self.state.operating, self.state.offer, self.prompt_tokens.device,
            self.prompt_tokens, keep=self.keep, difficulty=self.difficulty, hidden=self.hidden,
        )  # fmt: skip
        other.sums = self.sums.restarted()
        return other


def static_rungs(policy: RankPolicy, operating: Operating, offer: Offer) -> list[int] | None:
    """The rung index of every row where neither text nor budget can change it, and nothing else needs signals.

    A fixed policy that starts elsewhere than where it goes on is not static.
    """
    if policy.looks or not operating.kv.is_full:
        return None
    offer = offer.to(operating.knob.device)
    rung, start = (
        torch.minimum(asked, offer.resident)
        for asked in (nearest_rung(operating.knob, len(policy.rungs)), operating.start_rung)
    )
    affordable = offer.cost.gather(1, rung[:, None])[:, 0] <= operating.budget + SAME_COST
    stays = bool(((start == rung) & affordable).all())
    return rung.tolist() if stays else None


def _static_weights(policy: RankPolicy, knob: Tensor, resident: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over rungs [B, 1, J] and the rung [B] of a policy that does not look; none above `resident` [B]."""
    rows, index = len(knob), torch.arange(len(knob), device=knob.device)
    blind = Summary(
        knob.new_zeros(rows, len(SIGNALS), len(STATS)), torch.zeros(rows, len(SIGNALS), device=knob.device).bool(),
        knob.new_zeros(rows, len(TOKEN_SIGNALS)), index,
    )  # fmt: skip
    decision = policy.decide(blind, knob)
    rung = torch.minimum(decision.rung, resident)
    one_hot = rung[:, None] == torch.arange(decision.scales.shape[1], device=knob.device)
    return (one_hot * decision.scales)[:, None], rung

"""The blockwise forward: one model, one plan, any number of sequences.

`AdaptiveRun.forward` is what `model(...)` becomes. Per block it asks the stream for the rung weights, sets the gate
that the adapted linears read, runs the model's own forward, and hands logits and attention back to the stream, then the
block's pages to the KV cache.

Shape legend: B rows, T input columns, V vocabulary, J rungs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from policy.settings import PAGE_TOKENS

from .attention import AttentionProbe
from .gate import Gate
from .kv import FORMATS, PagedCache
from .layout import Layout
from .mask import block_mask
from .plan import RunPlan
from .stream import ChunkTrace, Stream


class AdaptiveCache(PagedCache):
    """A paged KV cache and the stream whose tokens it holds: all that one batch of sequences remembers."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.settings.kv)
        self.stream = stream
        self.next_call_is_prompt = False
        """Set by `generate`: the tokens of the next call are prompt, and the response starts behind them."""

    def select_rows(self, index: Tensor) -> AdaptiveCache:
        """A copy of rows `index` [N] (repeats allowed) that goes on independently."""
        other = super().select_rows(index)
        assert isinstance(other, AdaptiveCache), "PagedCache.select_rows keeps the class"
        other.stream = self.stream.select_rows(index)
        return other


class AdaptiveRun:
    """What `adaptive` yields: makes caches, runs forwards, tells what the latest sequences did."""

    def __init__(self, model: PreTrainedModel, plan: RunPlan) -> None:
        self.model, self.plan = model, plan
        config = model.config.get_text_config(decoder=True)
        self.gate = Gate(plan.ladder, model.device)
        signals = plan.settings.signals
        self.probe = AttentionProbe(config.num_hidden_layers, signals.attention_layers, signals.recent_pages)
        self.probe.keeps_received = "sparse" in (plan.settings.kv.hard, plan.settings.kv.easy)
        self.last: AdaptiveCache | None = None
        """Cache of the latest call that started a batch of sequences."""
        self._forward = model.forward
        self._text_config = config

    def new_cache(
        self,
        rows: int,
        *,
        prompt_tokens: Tensor | None = None,
        knob: float | Tensor | None = None,
    ) -> AdaptiveCache:
        """An empty cache for `rows` sequences; pass it as `past_key_values`.

        The response starts at `prompt_tokens` [rows], by default at the first token.
        """
        knob = self.plan.knob if knob is None else knob
        stream = Stream(self.plan.settings, self.plan.policy, knob, rows, self.model.device, prompt_tokens)
        self.last = AdaptiveCache(stream)
        return self.last

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: AdaptiveCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The model's forward at the policy's ranks: input_ids [B, T], attention_mask [B, past + T], logits [B, T, V].

        `position_ids` are implied by the mask and ignored. Raises ValueError for what a blockwise forward cannot give
        (input embeddings, attentions, hidden states) and for a cache of another kind.
        """
        _refuse_arguments(input_ids, past_key_values, kwargs)
        assert input_ids is not None
        cache = past_key_values if past_key_values is not None else self.new_cache(len(input_ids))
        keep = _columns_to_keep(logits_to_keep, input_ids.shape[1], labels is not None)
        logits = self.logits(input_ids, attention_mask, cache, keep)
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        loss = None
        if labels is not None:
            loss = self.model.loss_function(logits=logits, labels=labels, vocab_size=self._text_config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=None if use_cache is False else cache)

    @torch.no_grad()
    def logits(
        self, tokens: Tensor, attention_mask: Tensor | None, cache: AdaptiveCache, keep: int | None = None
    ) -> Tensor:
        """Logits [B, keep, V] of the last `keep` columns (default: all) of tokens [B, T], appended to `cache`."""
        held = cache.stream.state.position
        if len(held) != len(tokens):
            raise ValueError(
                f"past_key_values: expected a cache of {len(tokens)} rows, got {len(held)}; start a new one"
            )
        layout = Layout(tokens, attention_mask, held)
        if cache.next_call_is_prompt:
            cache.stream.prompt_tokens = held + layout.real.sum(1)
            cache.next_call_is_prompt = False
        logits = self._blocks(layout, cache, tokens.shape[1] if keep is None else keep)
        cache.seen_columns += tokens.shape[1]
        return logits

    def _blocks(self, layout: Layout, cache: AdaptiveCache, keep: int) -> Tensor:
        block = self.plan.settings.block_tokens
        first_kept, spare = layout.columns - keep, len(layout.tokens) * keep
        rows = torch.arange(len(layout.tokens), device=layout.tokens.device)[:, None]
        kept: Tensor | None = None
        for start in range(0, layout.steps, block):
            tokens, real, columns, ragged = layout.block(start, min(start + block, layout.steps))
            logits = self._block(tokens, real, ragged, cache)
            if kept is None:
                kept = logits.new_zeros(spare + 1, logits.shape[-1])
            # What is not kept, and padding, goes to one spare line behind the rest, which so stays contiguous.
            target = torch.where(real & (columns >= first_kept), rows * keep + columns - first_kept, spare)
            kept.index_copy_(0, target.flatten(), logits.flatten(0, 1))
        assert kept is not None
        return kept[:spare].view(len(rows), keep, -1)

    def _block(self, tokens: Tensor, real: Tensor, ragged: bool, cache: AdaptiveCache) -> Tensor:
        stream = cache.stream
        steps = torch.arange(tokens.shape[1], device=real.device)
        positions = torch.where(real, stream.state.position[:, None] + steps, -1)
        weights = stream.open_block(tokens, real, ragged)
        # The one deliberate wait per block: the reference path slices factors by a host number to spend no more than
        # the active rank; transformers' own loop waits for its stopping criteria at the same place.
        self.gate.set(weights, int(stream.active_rung.max()))
        cache.begin(positions)
        self.probe.begin(positions)
        output = self._forward(
            input_ids=tokens,
            attention_mask=block_mask(self._text_config, positions, cache.visible(), self.model.dtype),
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        stream.close_block(output.logits, self.probe.attention())
        if self.probe.keeps_received:
            cache.add_attention_mass(self.probe.received())
        cache.settle(stream.complexity)
        return output.logits

    @torch.no_grad()
    def gated(self, tokens: Tensor, real: Tensor, weights: Tensor) -> Tensor:
        """One pass at given rung weights, without cache, signals or decisions: what targets are measured with.

        tokens [B, T] long and real [B, T] bool with padding trailing, weights [B, T, J] -> logits [B, T, V].
        """
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        positions = torch.where(real, steps, -1)
        rungs = torch.arange(weights.shape[-1], device=weights.device)
        self.gate.set(weights, int(((weights > 0) * rungs).max()))
        self.probe.begin(positions)
        mask = block_mask(self._text_config, positions, real, self.model.dtype)
        position_ids = positions.clamp(min=0)
        return self._forward(input_ids=tokens, attention_mask=mask, position_ids=position_ids, use_cache=False).logits

    def mean_rank(self, lengths: list[int] | None = None) -> tuple[float, float]:
        """Byte-weighted mean active rank of the latest sequences over (response, prompt) tokens."""
        return self._latest().stream.mean_rank(self.plan.ladder.mean_rank(), lengths)

    def trace(self, row: int, length: int) -> list[ChunkTrace]:
        """Chunks of one row of the latest sequences, up to `length` real tokens."""
        cache = self._latest()
        full = str(self.model.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
        names = [full if FORMATS[code] == "full" else FORMATS[code] for code in cache.page_formats()[row].tolist()]
        return cache.stream.trace(row, length, names, PAGE_TOKENS)

    def _latest(self) -> AdaptiveCache:
        if self.last is None:
            raise ValueError("trace: expected a forward or generate call before this, got none; run the model first")
        return self.last


def _columns_to_keep(logits_to_keep: int | Tensor, columns: int, has_labels: bool) -> int:
    if has_labels or isinstance(logits_to_keep, Tensor) or logits_to_keep == 0:
        return columns
    return min(logits_to_keep, columns)


def _refuse_arguments(input_ids: Tensor | None, cache: object, kwargs: dict[str, Any]) -> None:
    if input_ids is None:
        raise ValueError("input_ids: expected token ids (novelty is measured on them), got none; pass input_ids")
    if cache is not None and not isinstance(cache, AdaptiveCache):
        raise ValueError(
            f"past_key_values: expected the cache of this adaptive run, got {type(cache).__name__}; leave it out or "
            "pass run.new_cache(...)"
        )
    # Flags that ask for nothing, and what transformers passes along beside the inputs.
    passed_along = ("cache_position", "tokenizer")
    refused = [k for k, v in kwargs.items() if v is not None and v is not False and k not in passed_along]
    if refused:
        raise ValueError(f"forward: expected ids, mask, cache and labels, got {', '.join(refused)}; leave it out")

"""The blockwise forward: one model, one plan, any number of sequences.

`AdaptiveRun.forward` is what `model(...)` becomes. Per block it asks the stream for the rung weights, sets the gate
that the adapted linears read, runs the model's own forward, and hands logits and attention back to the stream, then the
block's pages to the KV cache.

Shape legend: B rows, T input columns, V vocabulary, J rungs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from policy.operating import Operating
from policy.settings import PAGE_TOKENS

from ..control.record import PROMPT, RESPONSE, ChunkTrace, mean_rank, trace
from ..control.stream import Stream
from ..kv import FORMATS
from ..loading import check_context, context_limit
from ..plan import RunPlan
from .attention import AttentionProbe
from .gate import NO_RUNG, Gate
from .layout import Layout
from .mask import RowMask
from .pages import PagedCache
from .rope import CallLength


class AdaptiveCache(PagedCache):
    """A paged KV cache and the stream whose tokens it holds: all that one batch of sequences remembers."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.state.operating.kv)
        self.stream = stream
        self.next_call_is_prompt = False
        """Set by `generate`: the tokens of the next call are prompt, and the response starts behind them."""

    def select_rows(self, index: Tensor) -> AdaptiveCache:
        """A copy of rows `index` [N] (repeats allowed) that goes on independently."""
        other = super().select_rows(index)
        assert isinstance(other, AdaptiveCache), "PagedCache.select_rows keeps the class"
        other.stream = self.stream.select_rows(index)
        return other

    def reset(self) -> None:
        """Forget all tokens, but not what the rows may spend nor where their responses start."""
        super().reset()
        self.stream = self.stream.restarted()


class AdaptiveRun:
    """What `adaptive` yields: makes caches, runs forwards, tells what the latest sequences did.

    With `keep_record` every decision is kept, for `trace`; it grows with the text.
    """

    def __init__(self, model: PreTrainedModel, plan: RunPlan, *, keep_record: bool = False) -> None:
        self.model, self.plan, self.keep_record = model, plan, keep_record
        # A copy: the caller's policy stays on its device and in its mode.
        self.policy = copy.deepcopy(plan.policy).to(model.device).eval()
        config = model.config.get_text_config(decoder=True)
        self.gates = [Gate(ladder, model.device) for ladder in plan.ladders]
        signals = plan.settings.signals
        self.probe = AttentionProbe(config.num_hidden_layers, signals.attention_layers, signals.recent_pages)
        self.probe.keeps_received = plan.operating.kv.may_be_sparse
        self.mask = RowMask()
        self.call_length = CallLength()
        self.last: AdaptiveCache | None = None
        """Cache of the latest call that started a batch of sequences."""
        self._forward = model.forward
        self._text_config = config
        self._limit = context_limit(model)

    def new_cache(
        self,
        rows: int,
        *,
        prompt_tokens: Tensor | None = None,
        operating: Operating | None = None,
    ) -> AdaptiveCache:
        """An empty cache for `rows` sequences; pass it as `past_key_values`.

        The response starts at `prompt_tokens` [rows], by default at the first token; what the rows may spend is
        `operating`, by default the plan's. Raises ValueError when that is of another number of rows.
        """
        operating = (self.plan.operating if operating is None else operating).for_rows(rows)
        stream = Stream(
            self.plan.settings, self.policy, operating, self.model.device, prompt_tokens, keep_record=self.keep_record
        )
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
        after = held + layout.real.sum(1)
        # the host knows an upper bound: only where that is too much does the longest row cost a wait
        if self._limit is not None and max(cache.lengths, default=0) + layout.steps > self._limit:
            longest = int(after.argmax())
            check_context(self.model, int(held[longest]), int(after[longest] - held[longest]))
        if cache.next_call_is_prompt:
            cache.stream.prompt_tokens = after
            cache.next_call_is_prompt = False
        with self.call_length.of(after):
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
        self._set_gates(weights, stream.block.active, stream.state.operating.adapter)
        cache.begin(positions)
        self.probe.begin(positions)
        self.mask.begin(positions, cache.visible())
        output = self._forward(
            input_ids=tokens,
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        complexity = stream.close_block(output.logits, self.probe.attention())
        if self.probe.keeps_received:
            cache.add_attention_mass(self.probe.received())
        cache.settle(complexity, positions)
        return output.logits

    def _set_gates(self, weights: Tensor, active: Tensor, adapter: Tensor) -> None:
        """Weights [B, T, J] and active rungs [B, T] to the ladders that the rows use, adapter [B]."""
        mine = [adapter == number for number in range(len(self.gates))]
        highest = [active.amax(1).masked_fill(~rows, NO_RUNG).amax() for rows in mine]
        # The one deliberate wait per block: the reference path slices factors by a host number to spend no more than
        # the active rank; transformers' own loop waits for its stopping criteria at the same place.
        for gate, rows, rung in zip(self.gates, mine, torch.stack(highest).tolist(), strict=True):
            gate.set(weights if len(mine) == 1 else weights * rows[:, None, None], rung)

    @torch.no_grad()
    def gated(self, tokens: Tensor, real: Tensor, weights: Tensor) -> Tensor:
        """One pass of the first ladder at given rung weights, without cache, signals or decisions: what targets are
        measured with.

        tokens [B, T] long and real [B, T] bool with padding trailing, weights [B, T, J] -> logits [B, T, V].
        """
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        positions = torch.where(real, steps, -1)
        rungs = torch.arange(weights.shape[-1], device=weights.device)
        first = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        self._set_gates(weights, ((weights > 0) * rungs).amax(-1), first)
        self.probe.begin(positions)
        self.mask.begin(positions, real)
        position_ids = positions.clamp(min=0)
        # any mask at all: without one and without a cache transformers looks for several texts packed into a row
        return self._forward(input_ids=tokens, attention_mask=real, position_ids=position_ids, use_cache=False).logits

    def mean_rank(self) -> tuple[float, float]:
        """Byte-weighted mean active rank of the latest sequences over (response, prompt) tokens.

        Padding of rows that ended before others is not counted; nan where there are no tokens.
        """
        stream = self._latest().stream
        counts = stream.sums.counts.cpu()
        ranks = self.plan.rung_rank()[stream.state.operating.adapter.cpu()]
        return mean_rank(counts[:, RESPONSE], ranks), mean_rank(counts[:, PROMPT], ranks)

    def row_mean_rank(self) -> list[float]:
        """The first of `mean_rank`, row by row."""
        stream = self._latest().stream
        counts = stream.sums.counts[:, RESPONSE].cpu()
        ranks = self.plan.rung_rank()[stream.state.operating.adapter.cpu()]
        return [mean_rank(own, rank) for own, rank in zip(counts, ranks, strict=True)]

    def trace(self, row: int, length: int) -> list[ChunkTrace]:
        """Chunks of one row of the latest sequences, up to `length` real tokens. Raises ValueError without record."""
        cache = self._latest()
        full = str(self.model.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
        names = [full if FORMATS[code] == "full" else FORMATS[code] for code in cache.page_formats()[row].tolist()]
        rungs = self.plan.ladders[int(cache.stream.state.operating.adapter[row])].rungs
        own = {name: column[row] for name, column in cache.stream.columns().items()}
        return trace(own, length, rungs, names, PAGE_TOKENS)

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
    nothing = (v is None or v is False or (isinstance(v, dict) and not v) for v in kwargs.values())
    refused = [k for k, empty in zip(kwargs, nothing, strict=True) if not empty and k not in passed_along]
    if refused:
        raise ValueError(f"forward: expected ids, mask, cache and labels, got {', '.join(refused)}; leave it out")

"""The blockwise forward: one model, one plan, any number of sequences.

`AdaptiveRun.forward` is what `model(...)` becomes. Per block it asks the stream for the rung weights, sets the gate
that the adapted linears read, runs the model's own forward, and hands logits and attention back to the stream, then the
block's pages to the KV cache.

Shape legend: B rows, T input columns, V vocabulary, J rungs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from policy.difficulty import Difficulty
from policy.operating import Operating
from policy.settings import PAGE_TOKENS

from ..control.record import PROMPT, RESPONSE, ChunkTrace, Keep, mean_rank, trace
from ..control.stream import Stream
from ..kv import FORMATS
from ..loading import check_context, context_limit
from ..plan import STATIC_BLOCK_TOKENS, RunPlan
from .attention import AttentionProbe
from .gate import Gate
from .kept import Chosen, LastColumns
from .layout import Columns, Layout
from .mask import RowMask, Streams
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

    `keep` says what is kept of every token; `trace` needs `Keep.DECISIONS`.
    """

    def __init__(self, model: PreTrainedModel, plan: RunPlan, *, keep: Keep = Keep.SUMS, hidden: bool = False) -> None:
        self.model, self.plan, self.keep = model, plan, keep
        self.hidden = hidden or plan.policy.wants_hidden
        """Whether the model's states are looked at."""
        self.states: Tensor | None = None
        """[B, T, d] the last hidden states of the pass under way."""
        # Where the rows are: what they read is picked for every stream, in training once a pass.
        self._offer, self._difficulty = plan.offer(), plan.difficulty().to(model.device)
        self.policy = plan.policy_on(model.device)
        config = model.config.get_text_config(decoder=True)
        self.gates = [Gate(ladder, model.device) for ladder in plan.ladders]
        self._set: Tensor | None = None
        """The weights that the gates stand at, where the next pass may bring the same ones."""
        signals = plan.settings.signals
        self.probe = AttentionProbe(config.num_hidden_layers, signals.attention_layers, signals.recent_pages)
        self.probe.keeps_received = plan.operating.kv.may_be_sparse
        self.mask = RowMask()
        self.call_length = CallLength()
        self.last: AdaptiveCache | None = None
        """Cache of the latest call that started a batch of sequences."""
        self.path = ""
        """Which way the latest `generate` went, and why."""
        self._call = threading.RLock()
        self._forward = model.forward
        self._text_config = config
        self._limit = context_limit(model)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One call at a time: gates, masks and what attention hears belong to the pass under way.

        A call may hold calls of its own thread, as `generate` does. Raises ValueError in a second thread, at once.
        """
        if not self._call.acquire(blocking=False):
            raise ValueError(
                "model: expected one call at a time, got a second one while another thread's is under way; a model "
                "serves one thread at a time: wait for it, or give every thread a model of its own"
            )
        try:
            yield
        finally:
            self._call.release()

    def new_cache(
        self,
        rows: int,
        *,
        prompt_tokens: Tensor | None = None,
        operating: Operating | None = None,
        difficulty: Difficulty | None = None,
    ) -> AdaptiveCache:
        """An empty cache for `rows` sequences; pass it as `past_key_values`.

        The response starts at `prompt_tokens` [rows], by default at the first token; what the rows may spend is
        `operating`, by default the plan's, and `difficulty` are the tables of every row, by default those of its
        adapter. Raises ValueError when they are of another number of rows.
        """
        stream = self.new_stream(rows, prompt_tokens=prompt_tokens, operating=operating, difficulty=difficulty)
        self.last = AdaptiveCache(stream)
        return self.last

    def new_stream(
        self,
        rows: int,
        *,
        prompt_tokens: Tensor | None = None,
        operating: Operating | None = None,
        difficulty: Difficulty | None = None,
        numbers: Tensor | None = None,
    ) -> Stream:
        """What decides for `rows` sequences; arguments as in `new_cache`, `numbers` as in `Stream`."""
        operating = (self.plan.operating if operating is None else operating).for_rows(rows)
        if difficulty is None:
            difficulty = self._difficulty.select(operating.adapter)
        if len(difficulty.token) != rows or len(difficulty.pair) != rows:
            raise ValueError(
                f"difficulty: expected the tables of {rows} rows, got {len(difficulty.token)}; give as many"
            )
        return Stream(
            self.plan.settings, self.policy, operating, self._offer.select(operating.adapter), self.model.device,
            prompt_tokens, keep=self.keep, difficulty=difficulty, numbers=numbers, hidden=self.hidden,
        )  # fmt: skip

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
        columns = tokens.shape[1]
        return self._run(tokens, attention_mask, cache, LastColumns(columns, columns if keep is None else keep))

    @torch.no_grad()
    def logits_at(self, tokens: Tensor, attention_mask: Tensor | None, cache: AdaptiveCache, wanted: Tensor) -> Tensor:
        """Logits [N, V] where wanted [B, T] bool holds, row after row, of tokens [B, T], appended to `cache`."""
        return self._run(tokens, attention_mask, cache, Chosen(wanted))

    def _run(
        self, tokens: Tensor, attention_mask: Tensor | None, cache: AdaptiveCache, kept: LastColumns | Chosen
    ) -> Tensor:
        held = cache.lengths or [0] * cache.stream.rows
        if len(held) != len(tokens):
            raise ValueError(
                f"past_key_values: expected a cache of {len(tokens)} rows, got {len(held)}; start a new one"
            )
        layout = Layout(tokens, attention_mask, held)
        longest = max(zip(held, layout.counts, strict=True), key=sum)
        if self._limit is not None and sum(longest) > self._limit:
            check_context(self.model, *longest)
        block = self.plan.settings.block_tokens
        if cache.next_call_is_prompt:
            cache.stream.prompt_tokens = cache.stream.state.position + layout.real.sum(1)
            cache.next_call_is_prompt = False
            block = self.plan.settings.prompt_tokens
        if cache.stream.static is not None:  # no decision waits for a block to end
            block = max(block, STATIC_BLOCK_TOKENS)
        with self.call_length.of(sum(longest)):
            for start in range(0, layout.steps, block):
                columns = layout.block(start, min(start + block, layout.steps))
                kept.add(columns, self._block(columns, cache), start if layout.dense else None)
        cache.seen_columns += tokens.shape[1]
        return kept.logits()

    def _block(self, columns: Columns, cache: AdaptiveCache) -> Tensor:
        stream = cache.stream
        steps = torch.arange(columns.real.shape[1], device=columns.real.device)
        positions = torch.where(columns.real, stream.state.position[:, None] + steps, -1)
        embeddings = self.embeddings(columns.tokens) if self.hidden else None
        weights = stream.open_block(columns.tokens, columns.real, full=columns.full, embeddings=embeddings)
        if weights is not self._set:  # a static stream's stay what they are
            self._set_gates(weights, self._active(stream, weights, columns.real), stream)
        cache.begin(columns.positions, self.model.device)
        self.probe.begin(positions if stream.static is None else None)
        self.mask.begin(positions, cache.visible())
        output = self._forward(
            input_ids=columns.tokens,
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        if stream.static is None:
            complexity = stream.close_block(output.logits, self.probe.attention(), self.states)
            if self.probe.keeps_received:
                cache.add_attention_mass(self.probe.received())
            cache.settle(complexity, positions)
        return output.logits

    def embeddings(self, tokens: Tensor) -> Tensor:
        """[B, T, d] float32 of tokens [B, T] long."""
        found: Tensor = self.model.get_input_embeddings()(tokens)
        return found.to(self.model.device, torch.float32)

    def hear_states(self, head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Before the head of the model runs: what it is given are the last hidden states."""
        self.states = inputs[0].to(self.model.device, torch.float32)

    def _active(self, stream: Stream, weights: Tensor, real: Tensor) -> list[list[int]]:
        """The rungs of every ladder that any of its real tokens runs at, on the host; weights [B, T, J]."""
        if stream.static is not None:
            rows = list(zip(stream.static, stream.adapters, strict=True))
            return [sorted({rung for rung, own in rows if own == number}) for number in range(len(self.gates))]
        active = ((weights > 0) & real[..., None]).any(1)
        if len(self.gates) > 1:
            numbers = torch.arange(len(self.gates), device=active.device)
            active = (active & (stream.state.operating.adapter == numbers[:, None])[..., None]).any(1)
        else:
            active = active.any(0, keepdim=True)
        # A deliberate wait, once per block that decides: what is read of every module is settled on the host, so that
        # no more is than the active rungs need.
        return [_indices(own) for own in active.tolist()]

    def _set_gates(self, weights: Tensor, active: Sequence[Sequence[int]], stream: Stream) -> None:
        """Weights [B, T, J] to the ladders that the rows use, each with its active rungs."""
        self._set = None  # also where one of them refuses
        fades = stream.static is None and self.plan.settings.fade_tokens > 1
        for number, (gate, rungs) in enumerate(zip(self.gates, active, strict=True)):
            mine = weights
            if len(self.gates) > 1:
                mine = weights * (stream.state.operating.adapter == number)[:, None, None]
            gate.set(mine, rungs, fades=fades)
        self._set = None if stream.static is None else weights

    @torch.no_grad()
    def gated(
        self, tokens: Tensor, real: Tensor, weights: Tensor, *, streams: Streams | None = None, listen: bool = False
    ) -> Tensor:
        """One pass of the first ladder at given rung weights, without cache or decisions: what targets are measured
        with.

        tokens [B, T] long and real [B, T] bool with padding trailing, weights [B, T, J], or [B, 1, J] for all
        tokens of a row alike -> logits [B, T, V]. With `streams` the T slots are those; `listen` lets the probe hear
        the pass. Raises ValueError for a rung that is not in memory.
        """
        steps = torch.arange(tokens.shape[1], device=tokens.device) if streams is None else streams.slots
        positions = torch.where(real, steps, -1)
        self._set = None
        self.gates[0].set(weights, _indices((weights > 0).flatten(0, -2).any(0).tolist()))
        for other in self.gates[1:]:
            other.set(weights, ())
        self.probe.begin(positions if listen else None)
        self.mask.begin(positions, real, streams)
        position_ids = positions.clamp(min=0)
        with self.call_length.of(int(steps[-1]) + 1):
            # any mask at all: without one and without a cache transformers looks for several texts packed into a row
            output = self._forward(
                input_ids=tokens, attention_mask=real, position_ids=position_ids, use_cache=False
            )  # fmt: skip
        return output.logits

    def mean_rank(self) -> tuple[float, float]:
        """Byte-weighted mean active rank of the latest sequences over (response, prompt) tokens.

        Padding of rows that ended before others is not counted; nan where there are no tokens.
        """
        ranks = self.plan.rung_rank()
        return self._mean(RESPONSE, ranks), self._mean(PROMPT, ranks)

    def row_mean_rank(self) -> list[float]:
        """The first of `mean_rank`, row by row."""
        counts, beside, adapters = self._counted(RESPONSE)
        ranks = self.plan.rung_rank()[adapters]
        return [mean_rank(*own) for own in zip(counts, ranks, beside, strict=True)]

    def adapter_bytes(self) -> float:
        """Mean bytes of the adapter that a response token of the latest sequences read, counted as in `mean_rank`; a
        token that fades between two banks reads both."""
        return self._mean(RESPONSE, self.plan.rung_bytes())

    def adapter_share(self) -> float:
        """The same relative to all bytes of the exact adapter."""
        return self._mean(RESPONSE, self.plan.rung_cost())

    def _mean(self, part: int, by_rung: Tensor) -> float:
        """Mean over the tokens of prompt or response of what the rungs of every ladder come to, [A, J]."""
        counts, beside, adapters = self._counted(part)
        return mean_rank(counts, by_rung[adapters], beside)

    def _counted(self, part: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of prompt or response the `Sums`' counts and beside [B, J], and every row's ladder [B]; on the host."""
        stream = self._latest().stream
        counts, beside = (sums[:, part].cpu() for sums in (stream.sums.counts, stream.sums.beside))
        return counts, beside, torch.tensor(stream.adapters)

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


def _indices(flags: Sequence[bool]) -> list[int]:
    return [index for index, flag in enumerate(flags) if flag]


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

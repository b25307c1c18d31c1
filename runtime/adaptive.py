"""The context manager that makes a Hugging Face causal LM adaptive, and undoes itself.

    with adaptive(model, adapter, policy="policy/") as run:
        model.generate(**inputs)        # stock transformers: samplers, processors, streamers, stopping criteria
        model(input_ids).logits         # perplexity harnesses see the same rank policy

Inside, `model.forward` takes whatever it is given apart into blocks and, per block: asks the stream for the rung
weights, sets the gate that the adapted linears read, runs the model's own forward on the block, and hands logits and
attention back to the stream, then the block's pages to the KV cache. Nothing else in the model changes.

Padding never reaches the model: rows are laid out by position, so slot p of a row's cache is its token p, and every
row takes the decisions it would take alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from policy.checkpoint import PolicyCheckpoint
from policy.settings import PAGE_TOKENS

from .adapter import Adapter
from .attention import AttentionProbe, probed_attention
from .fingerprint import model_fingerprint
from .gate import AdaptedLinear, Gate
from .kv import FORMATS, PagedCache
from .mask import block_mask
from .plan import RunPlan, plan_run
from .stream import ChunkTrace, Stream


class AdaptiveCache(PagedCache):
    """A paged KV cache and the stream whose tokens it holds: all that one batch of sequences remembers."""

    def __init__(self, stream: Stream, *, first_call_is_prompt: bool = False) -> None:
        super().__init__(stream.settings.kv)
        self.stream = stream
        self.first_call_is_prompt = first_call_is_prompt

    def select_rows(self, index: Tensor) -> AdaptiveCache:
        """A copy of rows `index` [N] (repeats allowed) that goes on independently."""
        other = super().select_rows(index)
        other.stream = self.stream.select_rows(index)
        other.first_call_is_prompt = self.first_call_is_prompt
        return other


class AdaptiveRun:
    """What `adaptive` yields: makes caches, runs forwards, tells what the latest sequences did."""

    def __init__(self, model: PreTrainedModel, plan: RunPlan) -> None:
        self.model, self.plan = model, plan
        config = model.config.get_text_config(decoder=True)
        device = next(model.parameters()).device
        self.gate = Gate(plan.ladder, device)
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
        first_call_is_prompt: bool = False,
        knob: float | Tensor | None = None,
    ) -> AdaptiveCache:
        """An empty cache for `rows` sequences; pass it as `past_key_values`.

        The response starts at `prompt_tokens` [rows], or after the first call's tokens, or else at the first token.
        """
        knob = self.plan.knob if knob is None else knob
        device = next(self.model.parameters()).device
        stream = Stream(self.plan.settings, self.plan.policy, knob, rows, device, prompt_tokens)
        self.last = AdaptiveCache(stream, first_call_is_prompt=first_call_is_prompt)
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
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The model's forward at the policy's ranks: input_ids [B, T], attention_mask [B, past + T] -> logits [B, T, V].

        `position_ids` are implied by the mask and ignored. Raises ValueError for what a blockwise forward cannot give
        (input embeddings, attentions, hidden states) and for a cache of another kind.
        """
        _refuse_arguments(input_ids, past_key_values, kwargs)
        assert input_ids is not None
        rows, columns = input_ids.shape
        cache = past_key_values if past_key_values is not None else self.new_cache(rows)
        layout = _Layout(input_ids, attention_mask)
        if cache.first_call_is_prompt and cache.seen_columns == 0:
            cache.stream.prompt_tokens = layout.real.sum(1)
        keep = _columns_to_keep(logits_to_keep, columns, labels is not None)
        logits = self._blocks(layout, cache, keep)
        cache.seen_columns += columns
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        loss = None
        if labels is not None:
            loss = self.model.loss_function(logits=logits, labels=labels, vocab_size=self._text_config.vocab_size)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=None if use_cache is False else cache
        )
        return output.to_tuple() if return_dict is False else output

    def _blocks(self, layout: _Layout, cache: AdaptiveCache, keep: int) -> Tensor:
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
        positions = torch.where(real, stream.state.position[:, None] + torch.arange(tokens.shape[1], device=real.device), -1)
        weights = stream.open_block(tokens, real, ragged)
        # The one deliberate wait per block: the reference path slices factors by a host number to spend no more than
        # the active rank; transformers' own loop waits for its stopping criteria at the same place.
        self.gate.set(weights, int(stream.active_rung.max()))
        cache.begin(positions)
        self.probe.begin(positions)
        visible = cache.visible()
        mask = block_mask(self._text_config, positions, visible, self.model.dtype)
        output = self._forward(
            input_ids=tokens,
            attention_mask=mask,
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


class _Layout:
    """Input columns as positions: every row's real tokens first, padding behind them."""

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        rows, self.columns = input_ids.shape
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < self.columns or attention_mask.shape[0] != rows:
                raise ValueError(
                    f"attention_mask: expected [{rows}, at least {self.columns}], got {list(attention_mask.shape)}; "
                    "pass the tokenizer's own mask"
                )
            real = attention_mask[:, -self.columns :].bool()
        # A stable sort keeps the real tokens in order; where nothing is padded it is the identity.
        self.order = (~real).long().argsort(dim=1, stable=True)
        self.tokens, self.real = input_ids.gather(1, self.order), real.gather(1, self.order)
        # Deliberate wait, once per call: page allocation and the number of blocks are host decisions.
        counts = real.sum(1)
        self.shortest, self.steps = (int(n) for n in torch.stack([counts.min(), counts.max()]))

    def block(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Tokens, real, input columns [B, end - start] each, and whether any of it is padding."""
        part = slice(start, end)
        return self.tokens[:, part], self.real[:, part], self.order[:, part], end > self.shortest


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
    # Flags that ask for nothing, and what older transformers passes along for the cache.
    refused = [k for k, v in kwargs.items() if v is not None and v is not False and k != "cache_position"]
    if refused:
        raise ValueError(f"forward: expected ids, mask, cache and labels, got {', '.join(refused)}; leave it out")


@contextmanager
def adaptive(
    model: PreTrainedModel,
    adapter: str | Path | Adapter,
    *,
    policy: str | Path | PolicyCheckpoint | None = None,
    budget: float | None = None,
    latency_budget_ms: float | None = None,
    rung: int | None = None,
) -> Iterator[AdaptiveRun]:
    """Make `model.generate(...)` and `model(...)` adaptive until the block ends; arguments as in `generate`.

    The model must be the plain base model in its Hugging Face class, loaded with attention `sdpa` or `eager`. Raises
    ValueError for an adapter of another model, and all that `plan_run` raises.
    """
    with activate(model, _plan(model, adapter, policy, budget, latency_budget_ms, rung)) as run:
        yield run


def _plan(
    model: PreTrainedModel,
    adapter: str | Path | Adapter,
    policy: str | Path | PolicyCheckpoint | None,
    budget: float | None,
    latency_budget_ms: float | None,
    rung: int | None,
) -> RunPlan:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a plain Hugging Face model, got {type(model).__name__}; pass its base model")
    fingerprint = None if policy is None else model_fingerprint(model)
    return plan_run(
        adapter, policy=policy, budget=budget, latency_budget_ms=latency_budget_ms, rung=rung,
        model_fingerprint=fingerprint,
    )  # fmt: skip


@contextmanager
def activate(model: PreTrainedModel, plan: RunPlan) -> Iterator[AdaptiveRun]:
    """`adaptive` for a plan that is already settled."""
    if "forward" in vars(model):
        raise ValueError("model: expected one that is not adaptive yet, got one inside `adaptive`; leave that first")
    linears = adapted_modules(model, plan)
    run = AdaptiveRun(model, plan)
    plan.policy.to(next(model.parameters()).device).eval()
    with ExitStack() as undo:
        undo.enter_context(probed_attention(model, run.probe))
        for name, linear in linears.items():
            weight = linear.weight
            factors = plan.ladder.modules[name]
            a, b = (half.to(weight.device, model.dtype) for half in (factors.a, factors.b))
            hook = AdaptedLinear(run.gate, run.gate.column[name], a, b)
            undo.callback(linear.register_forward_hook(hook).remove)
        model.forward = _adaptive_forward(model, run)
        undo.callback(delattr, model, "forward")
        model.generate = _adaptive_generate(model, run)
        undo.callback(delattr, model, "generate")
        yield run


def _adaptive_forward(model: PreTrainedModel, run: AdaptiveRun) -> Any:
    """`run.forward` with the signature of the model's own, which transformers inspects."""

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return run.forward(*args, **kwargs)

    return forward


def _adaptive_generate(model: PreTrainedModel, run: AdaptiveRun) -> Any:
    """`model.generate` with our cache handed in; everything else is transformers' own loop."""
    original = model.generate

    @functools.wraps(original)
    def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is None:
            raise ValueError("generate: expected input_ids, got none; pass the tokenizer's output")
        config = kwargs.get("generation_config") or model.generation_config
        beams = kwargs.get("num_beams", getattr(config, "num_beams", None))
        if beams not in (None, 1) or kwargs.get("assistant_model") is not None:
            raise ValueError("generate: expected greedy or sampling, got beams or an assistant model; leave it out")
        copies = kwargs.get("num_return_sequences", getattr(config, "num_return_sequences", None)) or 1
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = run.new_cache(ids.shape[0] * copies, first_call_is_prompt=True)
        return original(inputs, *args, **kwargs)

    return generate


def adapted_modules(model: PreTrainedModel, plan: RunPlan) -> dict[str, nn.Module]:
    """The linears that the ladder adapts, by name. Raises ValueError when one is missing or of another shape."""
    found = {}
    for name, factors in plan.ladder.modules.items():
        expected = (factors.a.shape[1], factors.b.shape[1])
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"adapter: expected a module {name}, the model has none; it is of another model") from None
        if hasattr(linear, "in_features"):
            shape = (linear.in_features, linear.out_features)
        elif hasattr(linear, "nf"):  # GPT-2's Conv1D stores [in, out]
            shape = tuple(linear.weight.shape)
        else:
            raise ValueError(f"adapter: expected {name} to be a linear layer, got {type(linear).__name__}")
        if shape != expected:
            raise ValueError(
                f"adapter: expected {name} with (in, out) {expected}, the model's is {shape}; it is of another model"
            )
        found[name] = linear
    return found

"""The context manager that makes a Hugging Face causal LM adaptive, and undoes itself.

    with adaptive(model, adapter, policy="policy/") as run:
        model.generate(**inputs)        # stock transformers: samplers, processors, streamers, stopping criteria
        model(input_ids).logits         # perplexity harnesses see the same rank policy

Inside, `model.forward` is the blockwise forward of `run`, the forward of every adapted linear adds its gated update,
attention is listened to, and `model.generate` brings a paged cache. Nothing else in the model changes, and nothing
stays behind.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from policy.checkpoint import PolicyCheckpoint
from policy.rungs import Rung

from ..control.record import Keep
from ..fingerprint import model_fingerprint
from ..ladder import Ladder
from ..loading import check_context, end_tokens, generation_option, require_plain
from ..plan import AdapterSource, RunPlan, plan_run
from .architecture import refuse_unsupported
from .attention import probed_attention
from .gate import AdaptedLinear
from .placing import placed
from .rope import rope_of_whole_call
from .run import AdaptiveCache, AdaptiveRun

__all__ = ["AdaptiveRun", "activate", "adaptive", "require_servable"]

DEFAULT_NEW_TOKENS = 20
"""What transformers generates when nothing says how much."""
CLAIM = "adaptive_context"
"""Attribute of a model that is inside `adaptive`."""


@contextmanager
def adaptive(
    model: PreTrainedModel,
    adapter: AdapterSource | Sequence[AdapterSource],
    *,
    policy: str | Path | PolicyCheckpoint | None = None,
    budget: float | Sequence[float] | None = None,
    latency_budget_ms: float | None = None,
    rung: Rung | Sequence[Rung] | None = None,
    resident_rung: Rung | None = None,
    keep_record: bool = False,
    batch: int | None = None,
) -> Iterator[AdaptiveRun]:
    """Make `model.generate(...)` and `model(...)` adaptive until the block ends; arguments as in `generate`.

    `keep_record` keeps every decision for `trace`, memory that grows with the text; `batch` says how many rows a
    `latency_budget_ms` is of, by default those of the batch bucket that the policy's fit went by. The model must be the
    plain base model in its Hugging Face class, loaded with attention `sdpa` or `eager`. Raises ValueError for an
    adapter of another model, an architecture that cannot be served, and all that `plan_run` raises.
    """
    require_plain(model)
    fingerprint = None if policy is None else model_fingerprint(model)
    plan = plan_run(
        adapter, policy=policy, budget=budget, latency_budget_ms=latency_budget_ms, rung=rung,
        resident_rung=resident_rung, model_fingerprint=fingerprint, device=model.device, batch=batch,
    )  # fmt: skip
    with activate(model, plan, keep=Keep.DECISIONS if keep_record else Keep.SUMS, checked=False) as run:
        yield run


@contextmanager
def activate(
    model: PreTrainedModel, plan: RunPlan, *, keep: Keep = Keep.SUMS, checked: bool = True, hidden: bool = False
) -> Iterator[AdaptiveRun]:
    """`adaptive` for a plan that is already settled; `checked` says that `require_servable` was asked before, `hidden`
    that the model's states are recorded whatever the policy looks at."""
    with ExitStack() as undo:
        undo.enter_context(_claimed(model))
        if not checked:
            require_servable(model, plan.ladders)
        linears = [adapted_modules(model, ladder) for ladder in plan.ladders]
        run = AdaptiveRun(model, plan, keep=keep, hidden=hidden)
        if run.hidden:
            hook = model.get_output_embeddings().register_forward_pre_hook(run.hear_states)
            undo.callback(hook.remove)
        undo.enter_context(probed_attention(model, run.probe, run.mask))
        undo.enter_context(rope_of_whole_call(model, run.call_length))
        dtype = model.dtype
        for ladder, gate, adapted in zip(plan.ladders, run.gates, linears, strict=True):
            banks = _readable(ladder)
            for name, linear in adapted.items():
                device = next(linear.parameters()).device  # layers may lie on different devices
                own = {bank: placed(ladder.banks[bank][name], device, dtype) for bank in banks}
                forward: Callable[..., Tensor] = linear.forward
                adapted_forward = AdaptedLinear(forward, gate, gate.column[name], own)
                undo.enter_context(_replaced(linear, "forward", adapted_forward))
        undo.enter_context(_replaced(model, "forward", _adaptive_forward(model, run)))
        undo.enter_context(_replaced(model, "generate", _adaptive_generate(model, run)))
        undo.enter_context(_replaced(model, "prepare_inputs_for_generation", _adaptive_inputs(model)))
        yield run


def require_servable(model: PreTrainedModel, ladders: Sequence[Ladder]) -> None:
    """Make sure that `model` can be served with the adapters of `ladders`; runs three tokens through it.

    Raises ValueError, in one line, for a model with PEFT in it, an architecture that the reference path cannot run, and
    an adapter of another model.
    """
    require_plain(model)
    found = [adapted_modules(model, ladder) for ladder in ladders]
    for ladder in ladders:
        _refuse_overflow(model, ladder)
    refuse_unsupported(model, {name: linear for linears in found for name, linear in linears.items()})


def _readable(ladder: Ladder) -> list[int]:
    """The banks of the rungs that are in memory."""
    return sorted(set(ladder.bank_of[: ladder.highest + 1]))


def _refuse_overflow(model: PreTrainedModel, ladder: Ladder) -> None:
    """Raise ValueError, naming the module, where the highest rung in memory overflows the model's dtype."""
    most = torch.finfo(model.dtype).max
    for name, ranges in zip(ladder.modules, ladder.ranges([ladder.highest]), strict=True):
        if not ranges:
            continue
        parts = (ladder.banks[r.bank][name].read(r.start, r.stop, r.bits) for r in ranges)
        a, b = (torch.cat(halves).double() for halves in zip(*parts, strict=True))
        # At most the product of the factors' norms, which is cheap to know.
        norm = float(a.norm() * b.norm())
        if norm > most:
            norm = float(((a @ a.T) * (b @ b.T)).sum().sqrt())
        largest = max(norm, float(a.abs().max()), float(b.abs().max()))
        if not largest <= most:  # nor is NaN
            raise ValueError(
                f"adapter: expected updates within {model.dtype}, at most {most:g}, got a norm of {largest:g} in "
                f"{name}; load the model in a wider dtype, or lower lora_alpha"
            )


@contextmanager
def _claimed(model: PreTrainedModel) -> Iterator[None]:
    """Hold the model for one context; a second one, of this thread or another, is refused."""
    owner = object()
    # One step, which threads cannot come between.
    if vars(model).setdefault(CLAIM, owner) is not owner:
        raise ValueError(
            "model: expected one that is not adaptive yet, got one inside `adaptive`, here or in another thread; leave "
            "that first: a model serves one context at a time"
        )
    try:
        yield
    finally:
        del vars(model)[CLAIM]


@contextmanager
def _replaced(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Give this one module another method; an instance's own (device maps put one there) comes back afterwards."""
    own = vars(module).get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


def _adaptive_forward(model: PreTrainedModel, run: AdaptiveRun) -> Callable[..., Any]:
    """`run.forward` with the signature of the model's own, which transformers inspects."""
    original: Callable[..., Any] = model.forward

    @functools.wraps(original)
    def forward(*args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        with run.alone():
            output = run.forward(*args, **kwargs)
        return output.to_tuple() if return_dict is False else output

    return forward


def _adaptive_inputs(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's own inputs of a generation step, whose cache may start anew but not be lost.

    Phi-3's drop it where the text outgrows the original context: the other frequencies need other keys. The whole text
    then runs once more into the same cache, emptied, for the same budgets, prompts and responses.
    """
    original: Any = model.prepare_inputs_for_generation

    @functools.wraps(original)
    def prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        inputs: dict[str, Any] = original(input_ids, *args, **kwargs)
        if not isinstance(cache, AdaptiveCache) or inputs.get("past_key_values") is not None:
            return inputs
        if mask is not None and mask.shape[1] != input_ids.shape[1]:
            raise ValueError(
                f"generate: expected the whole text, which this model processes anew here, got {input_ids.shape[1]} of "
                f"{mask.shape[1]} columns; pass the earlier turns' tokens too"
            )
        whole = {"past_key_values": None, "next_sequence_length": None}
        inputs = original(input_ids, *args, **{**kwargs, **whole})
        cache.reset()
        return {**inputs, "past_key_values": cache}

    return prepare


def check_length(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raises ValueError when prompt and new tokens of this call of `generate` outgrow the model's context.

    input_ids [B, T], attention_mask [B, T] or with the columns that a cache holds in front.
    """
    columns = input_ids.shape[1]
    longest = columns if attention_mask is None else int(attention_mask.sum(1).max())
    new = generation_option(model, kwargs, "max_new_tokens")
    if new is None:
        end = generation_option(model, kwargs, "max_length")  # counts columns, padding included
        if end is None:
            end = min(
                columns + DEFAULT_NEW_TOKENS, getattr(model.config, "max_position_embeddings", None) or sys.maxsize
            )
        new = max(end - columns, 0)
    check_context(model, longest, new)


def _adaptive_generate(model: PreTrainedModel, run: AdaptiveRun) -> Callable[..., Any]:
    """`model.generate` with our cache handed in; everything else is transformers' own loop."""
    original: Any = model.generate

    @functools.wraps(original)
    def generate(inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs["generation_config"] = generation_config
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is None:
            raise ValueError("generate: expected input_ids, got none; pass the tokenizer's output")
        assisted = any(kwargs.get(name) is not None for name in ("assistant_model", "prompt_lookup_num_tokens"))
        if generation_option(model, kwargs, "num_beams") not in (None, 1) or assisted:
            raise ValueError("generate: expected greedy or sampling, got beams or an assistant model; leave it out")
        if kwargs.get("use_cache") is False:
            raise ValueError("generate: expected use_cache=True (decisions live in the cache), got False; leave it out")
        for name in ("cache_implementation", "prefill_chunk_size"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"generate: expected no {name} (the run has its own), got {kwargs[name]!r}; leave it out"
                )
            if generation_option(model, kwargs, name) is not None:
                kwargs[name] = None
        if generation_option(model, kwargs, "use_cache") is False:  # a model saved while training may have it off
            kwargs["use_cache"] = True
        copies = generation_option(model, kwargs, "num_return_sequences") or 1
        check_length(model, ids, kwargs.get("attention_mask"), kwargs)
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = kwargs["past_key_values"] = run.new_cache(ids.shape[0] * copies)
        if isinstance(cache, AdaptiveCache):  # any other is refused by forward, in one line
            cache.next_call_is_prompt = True
            cache.stream.sums.expect(end_tokens(model, kwargs), generation_option(model, kwargs, "pad_token_id"))
            run.last = cache
        with run.alone():
            return original(inputs, kwargs.pop("generation_config"), *args, **kwargs)

    return generate


def adapted_modules(model: PreTrainedModel, ladder: Ladder) -> dict[str, nn.Module]:
    """The linears that the ladder adapts, by name.

    Raises ValueError when one is missing or of another shape.
    """
    found: dict[str, nn.Module] = {}
    for name, own in ladder.modules.items():
        expected = (own.a.width, own.b.width)
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"adapter: expected a module {name}, the model has none; it is of another model") from None
        shape: tuple[int, int]
        if isinstance(linear, nn.Linear):
            shape = (linear.in_features, linear.out_features)
        elif isinstance(linear, Conv1D):  # GPT-2's, which stores [in, out]
            shape = (linear.weight.shape[0], linear.weight.shape[1])
        else:
            raise ValueError(f"adapter: expected {name} to be a linear layer, got {type(linear).__name__}")
        if shape != expected:
            raise ValueError(
                f"adapter: expected {name} with (in, out) {expected}, the model's is {shape}; it is of another model"
            )
        found[name] = linear
    return found

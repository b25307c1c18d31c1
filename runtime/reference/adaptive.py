"""The context manager that makes a Hugging Face causal LM adaptive, and undoes itself.

    with adaptive(model, adapter, policy="policy/") as run:
        model.generate(**inputs)        # stock transformers: samplers, processors, streamers, stopping criteria
        model(input_ids).logits         # perplexity harnesses see the same rank policy

Inside, `model.forward` is the blockwise forward of `run`, every adapted linear has a hook, attention is listened to,
and `model.generate` brings a paged cache. Nothing else in the model changes, and nothing stays behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from policy.checkpoint import PolicyCheckpoint

from ..control.record import Keep
from ..fingerprint import model_fingerprint
from ..ladder import Ladder
from ..plan import AdapterSource, RunPlan, plan_run
from .attention import probed_attention
from .gate import AdaptedLinear
from .run import AdaptiveCache, AdaptiveRun

__all__ = ["AdaptiveRun", "activate", "adaptive"]


@contextmanager
def adaptive(
    model: PreTrainedModel,
    adapter: AdapterSource | Sequence[AdapterSource],
    *,
    policy: str | Path | PolicyCheckpoint | None = None,
    budget: float | Sequence[float] | None = None,
    latency_budget_ms: float | None = None,
    rung: int | Sequence[int] | None = None,
    keep_record: bool = False,
) -> Iterator[AdaptiveRun]:
    """Make `model.generate(...)` and `model(...)` adaptive until the block ends; arguments as in `generate`.

    `keep_record` keeps every decision for `trace`, memory that grows with the text. The model must be the plain base
    model in its Hugging Face class, loaded with attention `sdpa` or `eager`. Raises ValueError for an adapter of
    another model, and all that `plan_run` raises.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a plain Hugging Face model, got {type(model).__name__}; pass its base model")
    fingerprint = None if policy is None else model_fingerprint(model)
    plan = plan_run(
        adapter, policy=policy, budget=budget, latency_budget_ms=latency_budget_ms, rung=rung,
        model_fingerprint=fingerprint, device=model.device,
    )  # fmt: skip
    with activate(model, plan, keep=Keep.DECISIONS if keep_record else Keep.SUMS) as run:
        yield run


@contextmanager
def activate(model: PreTrainedModel, plan: RunPlan, *, keep: Keep = Keep.SUMS) -> Iterator[AdaptiveRun]:
    """`adaptive` for a plan that is already settled."""
    if hasattr(model.forward, "adaptive_run"):
        raise ValueError("model: expected one that is not adaptive yet, got one inside `adaptive`; leave that first")
    linears = [adapted_modules(model, ladder) for ladder in plan.ladders]
    run = AdaptiveRun(model, plan, keep=keep)
    with ExitStack() as undo:
        undo.enter_context(probed_attention(model, run.probe))
        for ladder, gate, adapted in zip(plan.ladders, run.gates, linears, strict=True):
            for name, linear in adapted.items():
                factors = ladder.modules[name]
                device = next(linear.parameters()).device  # layers may lie on different devices
                a, b = (half.to(device, model.dtype) for half in (factors.a, factors.b))
                hook = AdaptedLinear(gate, gate.column[name], a, b)
                undo.callback(linear.register_forward_hook(hook).remove)
        undo.enter_context(_replaced(model, "forward", _adaptive_forward(model, run)))
        undo.enter_context(_replaced(model, "generate", _adaptive_generate(model, run)))
        yield run


@contextmanager
def _replaced(model: PreTrainedModel, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Give this one model another method; an instance's own (device maps put one there) comes back afterwards."""
    own = vars(model).get(name)
    setattr(model, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(model, name)
        else:
            setattr(model, name, own)


def _adaptive_forward(model: PreTrainedModel, run: AdaptiveRun) -> Callable[..., Any]:
    """`run.forward` with the signature of the model's own, which transformers inspects."""
    original: Callable[..., Any] = model.forward

    @functools.wraps(original)
    def forward(*args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        output = run.forward(*args, **kwargs)
        return output.to_tuple() if return_dict is False else output

    forward.adaptive_run = run  # type: ignore[attr-defined]  # the mark of a model that is adaptive already
    return forward


def generation_option(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """An option as transformers settles it: the call's own, its `generation_config`'s, the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    given = getattr(kwargs.get("generation_config"), name, None)
    return given if given is not None else getattr(model.generation_config, name, None)


def end_tokens(model: PreTrainedModel, kwargs: dict[str, Any]) -> list[int]:
    """The end-of-sequence tokens that this call of `generate` stops at."""
    ends = generation_option(model, kwargs, "eos_token_id")
    ends = ends.tolist() if isinstance(ends, Tensor) else ends
    return [] if ends is None else [int(end) for end in (ends if isinstance(ends, list | tuple) else [ends])]


def _adaptive_generate(model: PreTrainedModel, run: AdaptiveRun) -> Callable[..., Any]:
    """`model.generate` with our cache handed in; everything else is transformers' own loop."""
    original: Any = model.generate

    @functools.wraps(original)
    def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
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
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = kwargs["past_key_values"] = run.new_cache(ids.shape[0] * copies)
        if isinstance(cache, AdaptiveCache):  # any other is refused by forward, in one line
            cache.next_call_is_prompt = True
            cache.stream.sums.expect(end_tokens(model, kwargs), generation_option(model, kwargs, "pad_token_id"))
            run.last = cache
        return original(inputs, *args, **kwargs)

    return generate


def adapted_modules(model: PreTrainedModel, ladder: Ladder) -> dict[str, nn.Module]:
    """The linears that the ladder adapts, by name.

    Raises ValueError when one is missing or of another shape, or when its update overflows the model's dtype.
    """
    found: dict[str, nn.Module] = {}
    most = torch.finfo(model.dtype).max
    for name, factors in ladder.modules.items():
        norm = float(factors.singular_values.max())
        if norm > most:
            raise ValueError(
                f"adapter: expected updates within {model.dtype}, at most {most:g}, got a norm of {norm:g} in {name}; "
                "load the model in a wider dtype, or lower lora_alpha"
            )
        expected = (factors.a.shape[1], factors.b.shape[1])
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

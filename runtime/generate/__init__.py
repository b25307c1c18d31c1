"""Generate text with an adapter of which every stretch gets only as much as the policy says it needs.

    from runtime import generate
    out = generate("meta-llama/Llama-2-7b-hf", "path/to/adapter", ["..."], policy="path/to/policy", max_new_tokens=64)
    print(out.texts[0])

Everything of transformers' `model.generate` works as it does there: the loop, sampling, logits processors, stopping
criteria and streamers are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from policy.checkpoint import PolicyCheckpoint
from policy.rungs import Rung

from ..control.record import ChunkTrace
from ..loading import end_tokens, generation_option, load_model, load_tokenizer, require_plain
from ..plan import AdapterSource
from ..reference.adaptive import AdaptiveRun, check_length
from .choice import adaptive

__all__ = ["Generation", "adaptive", "generate"]


@dataclass(frozen=True)
class Generation:
    """What came out: `texts` are the completions alone, `sequences` the prompts with them as transformers has it."""

    texts: list[str]
    sequences: Tensor
    """[B, columns] long, left-padded prompts included."""
    tokens: list[int]
    """New tokens of every row, the end-of-sequence token included."""
    mean_rank: float
    """Byte-weighted mean active rank over the new tokens that went through the model; nan for a single new token."""
    row_mean_rank: list[float]
    """The same, row by row."""
    prompt_mean_rank: float
    """The same over the prompt."""
    adapter_bytes: float
    """Mean bytes of the adapter read per new token that went through the model; nan for a single new token."""
    adapter_share: float
    """The same relative to all bytes of the exact adapter."""
    kv_bytes: int
    """Bytes of the keys and values of all tokens at the end, in the formats of their pages."""
    kv_bytes_full: int
    """Bytes the same tokens take in the model's own dtype."""
    kv_bytes_allocated: int
    """Bytes of KV storage really held at the end: the room of pages not yet full, spare pages and tables included."""
    path: str
    """Which way it went, `fast` or `reference`, and why."""
    trace: list[list[ChunkTrace]] | None
    """Per row its chunks, when `return_trace=True`."""


def generate(
    model: str | Path | PreTrainedModel,
    adapter: AdapterSource | Sequence[AdapterSource],
    prompts: str | Sequence[str] | Tensor,
    *,
    policy: str | Path | PolicyCheckpoint | None = None,
    budget: float | Sequence[float] | None = None,
    latency_budget_ms: float | None = None,
    rung: Rung | Sequence[Rung] | None = None,
    resident_rung: Rung | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    return_trace: bool = False,
    fast: bool | None = None,
    seed: int | Sequence[int] | None = None,
    **generation_kwargs: Any,
) -> Generation:
    """Complete `prompts` with `adapter` on `model` at the ranks that `policy` chooses.

    `adapter` is a PEFT folder, a hub id or a saved ladder; `adapter`, `budget` and `rung` may be lists, one entry per
    prompt: every row of the batch then gets what it would get alone. `model` is a path, a hub id or a loaded model;
    `prompts` one text, several, or token ids [B, T] (then without a mask every column is a token; pass
    `attention_mask` for padded ones). `budget` in [0, 1] is the mean adapter cost relative to the top rung; 1.0, or no
    policy, is the full adapter with full-precision KV. `latency_budget_ms` are milliseconds of
    a step of all prompts together; it works where the policy's latency table has their batch bucket, and on the path
    that the table is of.
    `rung` serves one fixed rung. `resident_rung` keeps no more of the adapter in memory than its rungs up to that one
    read, which is then what no policy means (a warning says so), and the highest that a policy may choose; a budget of
    1 is refused with it. All else goes to transformers' `generate`.

    On a GPU, models of the LLaMA family go through the engine where it covers what is asked for; `fast=True` insists,
    and is refused with the reason, `fast=False` never does. `seed` is of the engine's sampling: one for each row, or
    one from which those of the rows follow.

    Raises FileNotFoundError for a wrong path and ValueError, one line each, for input that does not fit together.
    """
    if not isinstance(model, str | Path):
        require_plain(model)
    if tokenizer is None and not (isinstance(prompts, Tensor) and isinstance(model, PreTrainedModel)):
        tokenizer = load_tokenizer(str(model.name_or_path) if isinstance(model, PreTrainedModel) else model)
    if not isinstance(model, PreTrainedModel):
        model = load_model(model, dtype=dtype)
    inputs = _inputs(prompts, tokenizer, generation_kwargs, model)
    check_length(model, inputs["input_ids"], inputs["attention_mask"], generation_kwargs)
    if generation_kwargs.get("stop_strings") is not None:
        generation_kwargs["tokenizer"] = tokenizer
    chosen = adaptive(
        model, adapter, policy=policy, budget=budget, latency_budget_ms=latency_budget_ms, rung=rung,
        resident_rung=resident_rung, keep_record=return_trace, fast=fast, batch=len(inputs["input_ids"]),
    )  # fmt: skip
    if seed is not None:
        generation_kwargs["seed"] = seed
    with chosen as run:
        output = model.generate(**inputs, **generation_kwargs)  # type: ignore[operator]  # a method of a mixin
        sequences = output if isinstance(output, Tensor) else output.sequences
        counts = _new_tokens(sequences[:, inputs["input_ids"].shape[1] :], model, generation_kwargs)
        return _collect(run, tokenizer, inputs, sequences, counts, return_trace)


def _inputs(
    prompts: str | Sequence[str] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    generation_kwargs: dict[str, Any],
    model: PreTrainedModel,
) -> dict[str, Tensor]:
    if isinstance(prompts, Tensor):
        inputs = {"input_ids": prompts}
        if generation_kwargs.get("attention_mask") is not None:
            inputs["attention_mask"] = generation_kwargs.pop("attention_mask")
        else:
            inputs["attention_mask"] = prompts.new_ones(prompts.shape)
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(texts):
            raise ValueError(f"prompts: expected at least one text that is not empty, got {texts!r}; pass a prompt")
        try:
            "".join(texts).encode("utf-8")
        except UnicodeEncodeError:  # what a shell's stray bytes become
            raise ValueError("prompts: expected UTF-8 text, got bytes that are not; convert the prompt") from None
        assert tokenizer is not None
        encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if tokenizer.pad_token_id is not None:
            generation_kwargs.setdefault("pad_token_id", tokenizer.pad_token_id)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _new_tokens(new: Tensor, model: PreTrainedModel, generation_kwargs: dict[str, Any]) -> list[int]:
    """How many tokens of every row count: up to and with its first end-of-sequence token, without padding behind."""
    ends = end_tokens(model, generation_kwargs)
    pad = generation_option(model, generation_kwargs, "pad_token_id")
    counts = []
    for row in new.tolist():
        count = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        while count == len(row) and row and row[-1] == pad and pad not in ends:  # another criterion stopped this row
            row.pop()
            count -= 1
        counts.append(count)
    return counts


def _collect(
    run: AdaptiveRun,
    tokenizer: PreTrainedTokenizerBase | None,
    inputs: dict[str, Tensor],
    sequences: Tensor,
    tokens: list[int],
    return_trace: bool,
) -> Generation:
    cache = run.last
    assert cache is not None, "generate made or was given one"
    copies = sequences.shape[0] // inputs["input_ids"].shape[0]
    new = sequences[:, inputs["input_ids"].shape[1] :]
    prompts = inputs["attention_mask"].sum(1).repeat_interleave(copies).tolist()
    # The last new token never went through the model.
    lengths = [prompt + max(count - 1, 0) for prompt, count in zip(prompts, tokens, strict=True)]
    mean_rank, prompt_mean_rank = run.mean_rank()
    texts = [
        str(tokenizer.decode(row[:count], skip_special_tokens=True)) if tokenizer is not None else ""
        for row, count in zip(new, tokens, strict=True)
    ]
    trace = [run.trace(row, length) for row, length in enumerate(lengths)] if return_trace else None
    return Generation(
        texts, sequences, tokens, mean_rank, run.row_mean_rank(), prompt_mean_rank, run.adapter_bytes(),
        run.adapter_share(), cache.kv_bytes(), cache.kv_bytes_full(), cache.kv_bytes_allocated(), run.path, trace,
    )  # fmt: skip

"""What a call of `generate` asks for, as far as the engine covers it, settled as transformers settles it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..loading import end_tokens, generation_option
from ..ops.reference.sampling import Sampling
from ..reference.adaptive import DEFAULT_NEW_TOKENS

DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What transformers samples with when nothing says otherwise."""
COVERED = {
    "input_ids", "inputs", "attention_mask", "max_new_tokens", "max_length", "do_sample", "eos_token_id",
    "pad_token_id", "bos_token_id", "use_cache", "streamer", "seed", "generation_config", "transformers_version",
    "_from_model_config", *DEFAULTS,
}  # fmt: skip
"""What a call may ask for."""
MOST_ROWS = 128


def why_not_call(model: PreTrainedModel, rows: int, kwargs: dict[str, Any]) -> str | None:
    """Why the engine cannot serve a call of `generate` with these options, as a clause; None where it can."""
    for name, value in kwargs.items():
        if name not in COVERED and value is not None and value is not False:
            return f"{name} is asked for"
    for config in (kwargs.get("generation_config"), model.generation_config):
        if isinstance(config, GenerationConfig):
            for name, value in config.to_diff_dict().items():
                if name not in COVERED and value is not None and value is not False:
                    return f"{name} is asked for"
    if rows > MOST_ROWS:
        return f"the batch has {rows} rows, more than {MOST_ROWS}"
    return None


@dataclass(frozen=True)
class Options:
    """What a call asks for. Raises ValueError for values out of their limits."""

    new_tokens: int
    """Of every row, at most"""
    sampling: list[Sampling]
    """By row"""
    ends: list[int]
    """Tokens that end a row"""
    pad: int
    streamer: BaseStreamer | None

    @classmethod
    def of(cls, model: PreTrainedModel, ids: Tensor, kwargs: dict[str, Any]) -> Options:
        def option(name: str) -> Any:
            found = generation_option(model, kwargs, name)
            return DEFAULTS.get(name) if found is None else found

        rows = len(ids)
        greedy = not option("do_sample")
        seeds = _seeds(kwargs.get("seed"), rows)
        settings: dict[str, Any] = {"penalty": float(option("repetition_penalty"))}
        if not greedy:
            settings |= {name: option(name) for name in ("temperature", "top_k", "top_p", "min_p")}
        sampling = [Sampling(**settings, seed=seed) for seed in seeds]
        ends = end_tokens(model, kwargs)
        pad = option("pad_token_id")
        pad = pad[0] if isinstance(pad, list) else pad
        new = option("max_new_tokens")
        if new is None:
            length = option("max_length")
            new = DEFAULT_NEW_TOKENS if length is None else length - ids.shape[1]
        if new < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {new}; raise max_length or max_new_tokens")
        return cls(new, sampling, ends, int(pad if pad is not None else (ends or [0])[0]), kwargs.get("streamer"))


def _seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """A seed for every row: those given, or drawn from PyTorch's generator, which `set_seed` sets."""
    if seed is None:
        drawn: list[int] = torch.randint(2**62, (rows,)).tolist()
        return drawn
    if isinstance(seed, int):
        # Rows of one seed draw alike from alike logits; apart they are by their own numbers.
        return [seed + row for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(f"seed: expected one for each of {rows} rows, got {len(seed)}; give as many")
    return list(seed)

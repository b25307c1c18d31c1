"""Load a model and its tokenizer from a path or the hub, turning what can go wrong into one line."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .locate import is_hub_id

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> torch.device:
    """The GPU when PyTorch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """What milliseconds are measured on: the GPU's name, or the CPU and its threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def load_model(name: str | Path, *, dtype: str = "auto", device: torch.device | None = None) -> PreTrainedModel:
    """A causal LM in eval mode on `device` (default: `default_device()`), in `dtype` (a key of `DTYPES`).

    Raises FileNotFoundError when there is no such model, ValueError for an unknown dtype, a truncated weight file or a
    configuration that is no causal LM.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}; correct it")
    _require(name)
    try:
        config = AutoConfig.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=DTYPES[dtype])
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"model: expected whole files in {name}, got {_first_line(error)}; copy it again") from None
    except OSError as error:
        raise FileNotFoundError(f"model: expected a model at {str(name)!r}, got {_first_line(error)}") from None
    place(model, device or default_device())
    return model.eval()


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Move the model to `device`, unless it is there: a quantised base refuses to be moved once it is placed."""
    if model.device != torch.empty(0, device=device).device:  # "cuda" becomes "cuda:0", as tensors report it
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types


def context_limit(model: PreTrainedModel) -> int | None:
    """The most tokens a row may have; None where the configuration names no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left, with a pad token. Raises FileNotFoundError when there is none."""
    _require(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"tokenizer: expected one at {str(name)!r}, got {_first_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _require(name: str | Path) -> None:
    # transformers takes a missing path for a hub id and answers with a page about tokens and private repositories.
    if not Path(name).is_dir() and not is_hub_id(name):
        raise FileNotFoundError(f"model: expected a model folder or a hub id, got {str(name)!r}; check the path")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

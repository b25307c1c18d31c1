"""Load a model and its tokenizer from a path or the hub, turning what can go wrong into one line."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
    torch.nn.Module.to(model, device or default_device())
    return model.eval()


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
    # `folder/name` beside a folder of that name is a mistyped path, not a hub id.
    looks_local = isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1
    looks_local = looks_local or Path(name).parent.is_dir()
    if looks_local and not Path(name).is_dir() and "/" in str(name):
        raise FileNotFoundError(f"model: expected a model folder or a hub id, got {str(name)!r}; check the path")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

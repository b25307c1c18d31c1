"""Load a model and its tokenizer from a path or the hub, turning what can go wrong into one line."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .locate import is_hub_id

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHOWN = 3
"""Tensors that a message names."""
REASON_CHARACTERS = 240


def quiet_libraries() -> None:
    """No progress bars, advice or log lines of what models are loaded with: what a user gets to read is ours."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries are not for the user to read


def default_device() -> torch.device:
    """The GPU when PyTorch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """What milliseconds are measured on: the GPU's name, or the CPU and its threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def kernels_why_not(device: torch.device, *, interpreted: bool) -> str | None:
    """Why the engine's kernels cannot run on `device`, as a clause; None where they can. Triton's interpreter, where it
    is asked for and `interpreted` kernels are welcome, runs them anywhere."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and not (interpreted and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the model is on {device.type}, and the engine's kernels need a GPU"
    return None


def load_model(name: str | Path, *, dtype: str = "auto", device: torch.device | None = None) -> PreTrainedModel:
    """A causal LM in eval mode on `device` (default: `default_device()`), in `dtype` (a key of `DTYPES`).

    Raises FileNotFoundError when there is no such model, ValueError for an unknown dtype, a truncated weight file,
    weights that its configuration asks for and the files lack or have in another shape, and whatever else is no causal
    LM.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}; correct it")
    _require(name)
    with _loading("model", name):
        config = AutoConfig.from_pretrained(name)
        # Shapes that differ are collected like weights that lack; the default names none of them.
        both: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=DTYPES[dtype], output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
        model, loaded = both
    _require_weights(name, loaded)
    place(model, device or default_device())
    return model.eval()


def _require_weights(name: str | Path, loaded: dict[str, Any]) -> None:
    # transformers fills what it does not find with random numbers and says so in its log alone.
    lacking = sorted(loaded["missing_keys"])
    differing = [f"{key} {list(own)} for {list(asked)}" for key, own, asked in sorted(loaded["mismatched_keys"])]
    for found, wanted, got in ((lacking, "every weight", "none for "), (differing, "weights of the shapes", "")):
        if found:
            shown = ", ".join([*found[:SHOWN], *(["..."] if len(found) > SHOWN else [])])
            raise ValueError(
                f"model: expected {wanted} that the configuration of {str(name)!r} asks for, got {got}"
                f"{shown} ({len(found)} in all); copy the folder again or correct its config.json"
            )


@contextmanager
def _loading(what: str, name: str | Path) -> Iterator[None]:
    """Turn whatever transformers raises over a folder or a hub id into one line.

    Any exception: files are read by many hands (transformers, tokenizers, safetensors, quantisers), each with errors of
    its own, and a file that is not what it should be surfaces as a KeyError as soon as as a ValueError.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{what}: expected whole files in {str(name)!r}, got {_first_line(error)}; copy it again"
        ) from None
    except OSError as error:
        raise FileNotFoundError(f"{what}: expected one at {str(name)!r}, got {_first_line(error)}") from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{what}: expected one that transformers can load at {str(name)!r}, got "
            f"{textwrap.shorten(reason, REASON_CHARACTERS, placeholder=' ...')}; correct its files or copy them again"
        ) from None


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Move the model to `device`, unless it is there: a quantised base refuses to be moved once it is placed."""
    if model.device != torch.empty(0, device=device).device:  # "cuda" becomes "cuda:0", as tensors report it
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types


def require_plain(model: object) -> None:
    """Raises ValueError unless `model` is a Hugging Face model without PEFT around it or inside: its adapter would
    silently be added to ours."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model: expected a path or a plain Hugging Face model, got {name}; pass a PeftModel's `unload()`, else "
            "the base model"
        )
    wrapped = next((at for at, module in model.named_modules() if type(module).__module__.startswith("peft.")), None)
    if wrapped is not None:
        raise ValueError(
            f"model: expected a plain Hugging Face model, got {name} with PEFT's layers in it ({wrapped}); pass the "
            "PeftModel's `unload()`, or load the base model again"
        )


def context_limit(model: PreTrainedModel) -> int | None:
    """The most tokens a row may have; None where the configuration names no limit.

    RoPE that stretches itself runs further than `max_position_embeddings` where that is the original context.
    """
    config = model.config.get_text_config(decoder=True)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [parameters for parameters in rope.values() if isinstance(parameters, dict)]
    return max(_stretched(limit, parameters) for parameters in by_layer_type or [rope])


def _stretched(limit: int, rope: dict[str, Any]) -> int:
    kind, original = rope.get("rope_type", "default"), rope.get("original_max_position_embeddings")
    # Dynamic NTK always names the original context; the others name either, and say which the original one is.
    if "dynamic" in kind or (kind in ("longrope", "yarn") and original == limit):
        return int(limit * (rope.get("factor") or 1.0))
    return limit


def check_context(model: PreTrainedModel, held: int, new: int) -> None:
    """Raises ValueError when a row that holds `held` tokens has no room for `new` more in the model's context."""
    limit = context_limit(model)
    if limit is not None and held + new > limit:
        raise ValueError(
            f"prompts: expected prompt and new tokens to fit the model's context of {limit}, got {held} + {new}; "
            "shorten the prompt or ask for fewer new tokens"
        )


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left, with a pad token.

    Raises FileNotFoundError for a wrong path, ValueError when there is none or its files are damaged.
    """
    _require(name)
    with _loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _require(name: str | Path) -> None:
    # transformers takes a missing path for a hub id and answers with a page about tokens and private repositories.
    if not Path(name).is_dir() and not is_hub_id(name):
        raise FileNotFoundError(f"model: expected a model folder or a hub id, got {str(name)!r}; check the path")
    # A configuration that is none would be the tokenizer's complaint first, which is loaded before the model.
    path = Path(name) / "config.json"
    if path.is_file():
        with _loading("model", name):
            config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "model_type" not in config:
            got = "one without it" if isinstance(config, dict) else type(config).__name__
            raise ValueError(f"{path}: expected a JSON object with model_type, got {got}; copy the folder again")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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

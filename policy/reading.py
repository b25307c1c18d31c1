"""Files from users, read before they are believed: strict JSON, and what a tensor file says it holds.

JSON as people and programs write it, less what Python's parser lets through: NaN and infinities, numbers that overflow,
one name given twice. A tensor file's header gives names, shapes and dtypes while nothing of its tensors is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .limits import shown

LARGEST_JSON_BYTES = 2**24
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Shapes = Mapping[str, tuple[tuple[int, ...], object]]
"""Shape and dtype of every tensor, by name; a dtype that PyTorch does not have by its name in the file."""


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError, in one line with the file's name, for anything else."""
    size = path.stat().st_size
    if size > LARGEST_JSON_BYTES:
        raise ValueError(f"{path}: expected at most {LARGEST_JSON_BYTES} bytes of JSON, got {size}; {remedy}")
    try:
        found = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_once
        )
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, got lists or objects nested too deep; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}; {remedy}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}; {remedy}")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text}, which is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {shown(text)}, which is too large")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {shown(name)} twice in one object")
        found[name] = value
    return found


def read_shapes(path: Path, remedy: str) -> Shapes:
    """What the header of a safetensors file says. Raises ValueError, with the file's name, when it is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no dict
            return {
                name: (tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in parts.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, got one that does not parse ({error}); {remedy}"
        ) from None


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """The same of tensors at hand."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

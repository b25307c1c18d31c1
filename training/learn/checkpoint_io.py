"""Lightning checkpoints without pickle: a folder of `checkpoint.safetensors` and `checkpoint.json`.

A pickled `.ckpt` from a stranger is code that runs on load. Here tensors go to safetensors and everything else to JSON;
what is neither is refused when saving, by name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning.pytorch.plugins import CheckpointIO
from safetensors import SafetensorError
from torch import Tensor

from policy.files import new_folder

TENSORS, TREE = "checkpoint.safetensors", "checkpoint.json"


class SafetensorsCheckpointIO(CheckpointIO):
    """Writes and reads Lightning's checkpoint dictionary without pickling anything."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the folder `path`, replacing an older one. Raises ValueError for a value that is no plain data."""
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        tree = _pack(checkpoint, tensors, "checkpoint")
        with new_folder(path, overwrite=True) as scratch:
            safetensors.torch.save_file(tensors, scratch / TENSORS)
            (scratch / TREE).write_text(json.dumps(tree))

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Read what `save_checkpoint` wrote. Raises FileNotFoundError or ValueError in one line."""
        path = Path(path)
        if not (path / TREE).is_file() or not (path / TENSORS).is_file():
            raise FileNotFoundError(f"checkpoint: expected {TENSORS} and {TREE} in {path}, got neither or one; refit")
        try:
            tensors = safetensors.torch.load_file(path / TENSORS)
            return _unpack(json.loads((path / TREE).read_text()), tensors)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"checkpoint: expected whole files in {path}, got {error}; delete it and refit") from None

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path)


def _pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        # Numbered, because keys with dots in them can join to one name; copied, because safetensors stores no views.
        name = f"{len(tensors)}.{where}"
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        # Optimizer states have integer keys, which JSON objects do not keep.
        items = [[_pack(k, tensors, f"{where}.key"), _pack(v, tensors, f"{where}.{k}")] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        items = [_pack(v, tensors, f"{where}.{i}") for i, v in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    if isinstance(value, Path):
        return {"plain": str(value)}
    raise ValueError(f"{where}: expected tensors and plain data in a checkpoint, got {type(value).__name__}")


def _unpack(tree: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in value}
    if kind in ("list", "tuple"):
        items = [_unpack(v, tensors) for v in value]
        return items if kind == "list" else tuple(items)
    return value


def latest(folder: Path) -> Path | None:
    """The checkpoint `folder/last` when there is a whole one."""
    path = folder / "last"
    return path if (path / TREE).is_file() and (path / TENSORS).is_file() else None

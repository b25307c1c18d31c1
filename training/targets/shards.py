"""Collected targets on disk: one shard per few documents, written whole or not at all, checked when read.

A shard is a safetensors file and, written after it, a JSON file with its SHA-256. A shard counts as done only when both
are there and agree, so a process may be killed at any moment and the next one, of any world size, does what is missing.
The folder's name is a digest of everything the targets depend on: other settings never meet another run's shards.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from policy.files import write_whole


class ShardStore:
    """Shards 0..count-1 in `root/<name>-<digest of key>`."""

    def __init__(self, root: Path, name: str, key: dict[str, Any], count: int) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = root / f"{name}-{digest}"
        self.count = count
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "key.json", json.dumps(key, indent=2, sort_keys=True).encode())

    def missing(self) -> list[int]:
        """Shards that are not there whole."""
        return [index for index in range(self.count) if self._digest(index) is None]

    def write(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Store a shard; the checksum follows the data, so an interrupted write leaves the shard missing."""
        data = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        write_whole(self._path(index), data)
        record = {"shard": index, "sha256": hashlib.sha256(data).hexdigest()}
        write_whole(self._path(index).with_suffix(".json"), json.dumps(record).encode())

    def read(self, index: int) -> dict[str, Tensor]:
        """A shard's tensors. Raises ValueError when it is missing or damaged."""
        expected, data = self._digest(index), b""
        if expected is not None:
            data = self._path(index).read_bytes()
        if expected is None or hashlib.sha256(data).hexdigest() != expected:
            raise ValueError(
                f"{self._path(index)}: expected a whole shard with its checksum, got a damaged one; delete the file "
                "and run again"
            )
        return safetensors.torch.load(data)

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def _digest(self, index: int) -> str | None:
        path = self._path(index)
        record = path.with_suffix(".json")
        if not path.is_file() or not record.is_file():
            return None
        return json.loads(record.read_bytes())["sha256"]


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """12 hex digits over names and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]

"""A ladder as an artefact: `ladder.safetensors` (its factors and edges) and `ladder.json` (everything else).

Built once, loaded without a QR or an SVD. `open_ladder` is what every command does with its `--adapter`: a saved ladder
is loaded, a PEFT folder or hub id becomes an `svd` ladder on the fly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from policy.files import new_folder

from .adapter import Adapter, load_adapter
from .factors import Ladder, LadderFactors, build_ladder

SCHEMA_VERSION = 1
TENSORS = "ladder.safetensors"
RECORD = "ladder.json"
EDGES = "edges"
_PARTS = ("a", "b", "singular_values")


def open_ladder(source: str | Path | Adapter | Ladder, rungs: Sequence[int] | None = None) -> Ladder:
    """The ladder of whatever a user calls an adapter: a saved ladder, a PEFT folder, a hub id, or one already read.

    `rungs` are the ones wanted; by default a saved ladder's own, or those of `build_ladder`. Raises what
    `load_ladder`, `load_adapter` and `build_ladder` raise.
    """
    if isinstance(source, str | Path):
        source = load_ladder(source) if (Path(source) / RECORD).is_file() else load_adapter(source)
    if isinstance(source, Adapter):
        return build_ladder(source, rungs)
    return source if rungs is None or tuple(rungs) == source.rungs else source.with_rungs(rungs)


def save_ladder(ladder: Ladder, folder: str | Path) -> Path:
    """Write both files as a new `folder`, replacing an older one whole, and return its path."""
    folder = Path(folder)
    tensors: dict[str, Tensor] = {EDGES: ladder.edges.contiguous()}
    for name, factors in ladder.modules.items():
        tensors |= {f"{name}.{part}": getattr(factors, part).detach().cpu().contiguous() for part in _PARTS}
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    record = {
        "schema_version": SCHEMA_VERSION,
        "kind": ladder.kind,
        "rungs": ladder.rungs,
        "modules": list(ladder.modules),
        "bytes": ladder.rung_bytes().tolist(),
        "base_model": ladder.base_model,
        "fingerprints": {"adapter": ladder.adapter, "ladder": ladder.fingerprint},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder, overwrite=True) as scratch:
        (scratch / TENSORS).write_bytes(data)
        (scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def load_ladder(folder: str | Path) -> Ladder:
    """Read what `save_ladder` wrote, on the CPU.

    Raises FileNotFoundError for a missing file and ValueError, naming the file, for anything that is not as
    `save_ladder` writes it.
    """
    folder = Path(folder)
    for name in (RECORD, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"ladder: expected {RECORD} and {TENSORS} in {folder}, got no {name}; save again")
    record = _read_record(folder / RECORD)
    data = (folder / TENSORS).read_bytes()
    if hashlib.sha256(data).hexdigest() != record["tensors_sha256"]:
        raise ValueError(f"{folder / TENSORS}: expected the file {RECORD} was written with, got another; save it again")
    try:
        tensors = safetensors.torch.load(data)
        modules = {name: LadderFactors(*(tensors[f"{name}.{part}"] for part in _PARTS)) for name in record["modules"]}
        prints = record["fingerprints"]
        ladder = Ladder(
            record["kind"], tuple(record["rungs"]), modules, tensors[EDGES], prints["adapter"], record["base_model"]
        )
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: expected a whole ladder, got one without {error}; save it again") from None
    if ladder.fingerprint != prints["ladder"]:
        raise ValueError(
            f"{folder / RECORD}: expected fingerprint {prints['ladder']}, got {ladder.fingerprint} from what the file "
            "says; save it again"
        )
    return ladder


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}; save the ladder again") from None
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path}: expected schema_version {SCHEMA_VERSION}, got {version!r}; save the ladder again")
    missing = {"kind", "rungs", "modules", "base_model", "fingerprints", "tensors_sha256"} - record.keys()
    if missing:
        raise ValueError(f"{path}: expected {', '.join(sorted(missing))}, got a record without; save the ladder again")
    return record

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
import torch
from torch import Tensor

from policy.files import new_folder
from policy.limits import Choice, Entries, Maybe, Several, Text, refused, shown
from policy.reading import Shapes, read_json, read_shapes
from policy.rungs import RUNGS

from .adapter import Adapter, load_adapter
from .factors import SVD, Ladder, LadderFactors, build_ladder

SCHEMA_VERSION = 1
TENSORS = "ladder.safetensors"
RECORD = "ladder.json"
EDGES = "edges"
_PARTS = ("a", "b", "singular_values")
_RECORD = Entries(
    {
        "kind": Choice((SVD,)),
        "rungs": RUNGS,
        "modules": Several(Text(), 1, 100_000),
        "base_model": Maybe(Text(0)),
        "fingerprints": Entries({"adapter": Text(), "ladder": Text()}),
        "tensors_sha256": Text(64, 64),
    }
)


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
    path = folder / TENSORS
    record = _read_record(folder / RECORD)
    shapes = read_shapes(path, "copy or save it again")
    try:
        # What the record says is held against the header of the tensor file while no tensor is in memory.
        _check_tensors(record["modules"], shapes)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != record["tensors_sha256"]:
            raise ValueError(f"expected the file {RECORD} was written with, got another; save both again")
        tensors = safetensors.torch.load(data)
        modules = {name: _factors(name, tensors) for name in record["modules"]}
        prints = record["fingerprints"]
        ladder = Ladder(
            record["kind"], record["rungs"], modules, tensors[EDGES], prints["adapter"], record["base_model"]
        )
        _check_values(ladder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if ladder.fingerprint != prints["ladder"]:
        raise ValueError(
            f"{folder / RECORD}: expected fingerprint {prints['ladder']}, got {ladder.fingerprint} from what the file "
            "says; save it again"
        )
    return ladder


def _read_record(path: Path) -> dict[str, Any]:
    found = read_json(path, "save the ladder again")
    try:
        Choice((SCHEMA_VERSION,)).take("schema_version", found.get("schema_version"))
        record = _RECORD.take("", {name: found[name] for name in _RECORD.of if name in found})
        if len(set(record["modules"])) != len(record["modules"]):
            raise refused("modules", "every name once", record["modules"])
    except ValueError as error:
        raise ValueError(f"{path}: {error} or save the ladder again") from None
    return record


def _check_tensors(modules: Sequence[str], found: Shapes) -> None:
    """Raise ValueError, naming the tensor, unless the file holds the table and the factors of every module."""
    dtypes = {f"{name}.{part}": torch.float32 for name in modules for part in _PARTS} | {EDGES: torch.int64}
    for name in sorted(dtypes.keys() | found.keys()):
        wanted, got = dtypes.get(name), found[name][1] if name in found else None
        if got != wanted:
            raise ValueError(f"tensor {shown(name)}: expected {wanted or 'none'}, got {got or 'none'}; save it again")


def _factors(name: str, tensors: dict[str, Tensor]) -> LadderFactors:
    try:
        return LadderFactors(*(tensors[f"{name}.{part}"] for part in _PARTS))
    except ValueError as error:
        raise ValueError(f"module {name}: {error}") from None


def _check_values(ladder: Ladder) -> None:
    """Raise ValueError unless the factors are numbers, in order, and the top rung reads them all."""
    for name, factors in ladder.modules.items():
        parts = (factors.a, factors.b, factors.singular_values)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ValueError(f"module {name}: expected finite numbers, got NaN or infinity; save the ladder again")
        if bool((factors.singular_values < 0).any()) or bool((factors.singular_values.diff() > 0).any()):
            got = shown(factors.singular_values.tolist())
            raise ValueError(
                f"module {name}: expected singular values that fall to 0, got {got}; save the ladder again"
            )
    rows = [len(factors.a) for factors in ladder.modules.values()]
    if ladder.rank_table[-1].tolist() != rows or max(rows) != ladder.rungs[-1]:
        got = f"{shown(ladder.rank_table[-1].tolist())} of {shown(rows)} directions at rung {ladder.rungs[-1]}"
        raise ValueError(f"edges: expected a top rung that is the whole adapter, got {got}; save the ladder again")

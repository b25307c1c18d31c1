"""Ladders saved before there were banks and formats: `svd` factors in float32, the top rung all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from policy.limits import Choice, Entries, Maybe, Several, Text, refused, shown
from policy.reading import Shapes
from policy.rungs import RUNGS

from .banks import SVD, Directions, Ladder
from .formats import wide_rows

VERSION = 1
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


def read_schema1(found: dict[str, Any]) -> dict[str, Any]:
    """What a record of version 1, read already, says. Raises ValueError for anything that is no such record."""
    record: dict[str, Any] = _RECORD.take("", {name: found[name] for name in _RECORD.of if name in found})
    if len(set(record["modules"])) != len(record["modules"]):
        raise refused("modules", "every name once", record["modules"])
    return record


def load_version1(path: Path, record: dict[str, Any], shapes: Shapes) -> Ladder:
    """The ladder of a tensor file with such a record and header. The exact factors are not there: the singular
    directions serve all rungs.

    Raises ValueError for tensors that contradict each other.
    """
    names = [f"{name}.{half}" for name in record["modules"] for half in "ab"]
    for name in names:
        shape, dtype = shapes.get(name, ((), None))
        if len(shape) != 2 or dtype != torch.float32:
            got = f"{list(shape)} of {dtype}" if name in shapes else "none"
            raise ValueError(f"tensor {shown(name)}: expected [R, D] of torch.float32, got {got}; save it again")
    if "edges" not in shapes:
        raise ValueError("tensor edges: expected one, got none; save it again")
    with safe_open(path, framework="pt") as file:
        rows = [wide_rows(file.get_tensor(name)) for name in names]
        edges = file.get_tensor("edges")
    bank = dict(zip(record["modules"], map(Directions, rows[::2], rows[1::2]), strict=True))
    rungs = record["rungs"]
    return Ladder(
        SVD, rungs, (bank, bank), (*(0 for _ in rungs[:-1]), 1), edges, (1.0,) * len(rungs),
        record["fingerprints"]["adapter"], record["base_model"],
    )  # fmt: skip

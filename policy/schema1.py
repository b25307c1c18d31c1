"""Reads policies of schema 1, in which the signals were in another order and the rungs part of the settings, of schema
2, which had fewer signals, of schema 3, which had one table of latency at most, and of schema 4, in which prompts went
in the blocks of every other text.

Kept for one release: export such a policy again and this file is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .limits import Entries, Number, Several, Whole, refused, shown
from .rungs import MOST_RUNGS, RUNGS
from .settings import PAPER_SIGNALS, STATS

_SIGNALS = ("entropy", "novelty", "attention", "prior")
_MOVED = Entries({"rungs": RUNGS, "start_rung": Whole(0, MOST_RUNGS - 1)})
"""What was among the settings and is not any more."""
_WEIGHTS = Several(Number(0, 1e6), len(_SIGNALS), len(_SIGNALS))


def upgrade_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a schema 1 policy as schema 2 has it. Raises ValueError if it is none."""
    settings, config = record["settings"], record["config"]
    if not isinstance(settings, dict) or not isinstance(settings.get("chunk"), dict) or not isinstance(config, dict):
        raise refused("settings, settings.chunk, config", "objects", [settings, config])
    moved = _MOVED.take("settings", {name: settings[name] for name in _MOVED.of if name in settings})
    if list(moved["rungs"]) != record["rungs"]:
        raise refused("rungs", f"those of settings, {shown(list(moved['rungs']))}", record["rungs"])
    old = settings["chunk"].get("weights")
    weights = dict(zip(_SIGNALS, _WEIGHTS.take("chunk.weights", old), strict=True))
    kept = {name: value for name, value in settings.items() if name not in _MOVED.of}
    settings = {**kept, "chunk": {**settings["chunk"], "weights": weights}}
    if record["kind"] == "percentile":
        config = {**config, "weights": weights}
    return {**record, "schema_version": 2, "settings": settings, "config": config}


def upgrade_tensors(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a schema 1 policy, of the same names and shapes, in the order of schema 2.

    Feature by feature, as `Summary.features` lays them out: statistics, validity, the first token's signals.
    """
    if kind != "learned":
        return tensors
    moved = [_SIGNALS.index(name) for name in PAPER_SIGNALS]
    statistics = [signal * len(STATS) + stat for signal in moved for stat in range(len(STATS))]
    known = [len(_SIGNALS) * len(STATS) + signal for signal in moved]
    rest = range(len(statistics) + len(known), tensors["trunk.0.weight"].shape[1])
    order = torch.tensor([*statistics, *known, *rest])
    features = len(tensors["feature_mean"])
    return {
        **tensors,
        "feature_mean": tensors["feature_mean"][order[:features]],
        "feature_std": tensors["feature_std"][order[:features]],
        "trunk.0.weight": tensors["trunk.0.weight"][:, order].contiguous(),
    }


def upgrade_schema2(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a schema 2 policy as schema 3 has it: it knew the four signals of the paper alone."""
    config = record["config"]
    if not isinstance(config, dict):
        raise refused("config", "an object", config)
    added: dict[str, dict[str, Any]] = {
        "learned": {"signals": list(PAPER_SIGNALS), "vocabulary": 0, "width": 0},
        "percentile": {"sign": 1, "of": "chunk"},
    }
    return {**record, "schema_version": 3, "config": {**added.get(record["kind"], {}), **config}}


def upgrade_schema3(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a schema 3 policy as schema 4 has it: its table was of the reference path, at one row."""
    table = record["latency"]
    if table is None:
        return {**record, "schema_version": 4}
    if not isinstance(table, dict):
        raise refused("latency", "an object", table)
    bucket = {**table, "batch": None, "controller_ms": None}
    return {**record, "schema_version": 4, "latency": {"buckets": [bucket], "batch": None}}


def upgrade_schema4(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a schema 4 policy as schema 5 has it: its prompts went in blocks of `block_tokens`, as all else."""
    settings = record["settings"]
    if not isinstance(settings, dict):
        raise refused("settings", "an object", settings)
    if "block_tokens" not in settings:  # whoever reads the settings says so
        return {**record, "schema_version": 5}
    return {**record, "schema_version": 5, "settings": {"prompt_tokens": settings["block_tokens"], **settings}}

"""Reads policies of schema 1, in which the signals were in another order and the rungs part of the settings.

Kept for one release: export such a policy again and this file is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .settings import SIGNALS, STATS

_SIGNALS = ("entropy", "novelty", "attention", "prior")


def upgrade(record: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and tensors of a schema 1 policy as schema 2 has them. Raises KeyError or ValueError if it is none."""
    settings = dict(record["settings"])
    rungs, _ = settings.pop("rungs"), settings.pop("start_rung")
    if rungs != record["rungs"]:
        raise ValueError(f"rungs: expected those of settings, got {record['rungs']} beside {rungs}")
    weights = dict(zip(_SIGNALS, settings["chunk"]["weights"], strict=True))
    settings["chunk"] = {**settings["chunk"], "weights": weights}
    config = dict(record["config"])
    if record["kind"] == "percentile":
        config["weights"] = weights
    if record["kind"] == "learned":
        tensors = _reordered(tensors)
    return {**record, "schema_version": 2, "settings": settings, "config": config}, tensors


def _reordered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Feature by feature, as `Summary.features` lays them out: statistics, validity, the first token's signals."""
    moved = [_SIGNALS.index(name) for name in SIGNALS]
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

"""A policy of every kind, what is saved with it, and ways to spoil the files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from policy import (
    SIGNALS,
    TOKEN_SIGNALS,
    ChunkSettings,
    Fingerprints,
    FixedPolicy,
    KnobCurve,
    KVSettings,
    LatencyTable,
    LatencyTables,
    LearnedPolicy,
    PercentilePolicy,
    PolicyCheckpoint,
    RandomPolicy,
    RankPolicy,
    Settings,
    SignalSettings,
    Summary,
)
from policy.difficulty import PAIRS, Difficulty
from policy.settings import PAPER_SIGNALS

RUNGS = (2, 4, 8, 16)
COST = (0.125, 0.25, 0.5, 1.0)
VOCABULARY = 11
WEIGHTS = dict(zip(PAPER_SIGNALS, (0.1, 0.3, 0.2, 0.4), strict=True))
SETTINGS = Settings(
    block_tokens=8,
    prompt_tokens=24,
    fade_tokens=1,
    signals=SignalSettings(recent_pages=3),
    chunk=ChunkSettings(min_tokens=1, max_tokens=5, weights=WEIGHTS, thresholds=(0.3,)),
    kv=KVSettings(hard="full", easy="sparse"),
)
PRINTS: Fingerprints = {"model": "m-1", "adapter": "a-1", "ladder": "l-1", "shared": False}
TABLE = LatencyTable("NVIDIA H200", ms=(10.5, 11.0, 13.0, 14.0), ms_base=10.0, spread_ms=0.1)
REFERENCE = LatencyTables((TABLE,))
ALONE = dataclasses.replace(TABLE, batch=1, controller_ms=0.01)
TABLES = LatencyTables((ALONE, LatencyTable("NVIDIA H200", (22.0, 24.0, 28.0, 30.0), 20.0, 0.2, 32, -0.01)), 1)


def tables() -> Difficulty:
    generator = torch.Generator().manual_seed(2)
    return Difficulty.of(*(4 * torch.rand(size, generator=generator) + 0.1 for size in (VOCABULARY, PAIRS)))


def build(kind: str) -> RankPolicy:
    torch.manual_seed(0)
    scales = torch.tensor([1.3, 1.2, 1.1, 1.0])
    if kind == "fixed":
        return FixedPolicy(RUNGS, scales)
    if kind == "percentile":
        return PercentilePolicy.calibrate(torch.rand(500), RUNGS, "entropy", scales, spread=1.25)
    if kind == "random":
        return RandomPolicy(RUNGS, seed=5, spread=0.5, scales=scales)
    policy = learned(vocabulary=VOCABULARY)
    policy.set_difficulty(tables())
    return policy


def learned(**config: Any) -> LearnedPolicy:
    policy = LearnedPolicy(
        RUNGS, hidden=7, scale_range=0.1, log_lambda_range=(-9.5, 3), cost=torch.tensor(COST), **config
    )
    policy.calibrate(torch.rand(50, Summary.FEATURES), torch.rand(50, 4))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter))
    return policy


def checkpoint(kind: str = "learned", **changes: Any) -> PolicyCheckpoint:
    policy = build(kind)
    cheap, dear = policy.knob_range()
    values: dict[str, Any] = {
        "policy": policy,
        "settings": SETTINGS,
        "curve": KnobCurve((0.2, 0.9), (cheap, dear)),
        "cost": COST,
        "fingerprints": PRINTS,
        "default_budget": 0.4,
        "latency": TABLES,
        "metrics": {"kl_nats": 0.1, "best fixed": [1, 2, None]},
    }
    return PolicyCheckpoint(**(values | changes))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / "policy.json").read_text())
    change(record)
    (folder / "policy.json").write_text(json.dumps(record))


def replace_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """New tensors with a digest that agrees, as another program would write them."""
    state = safetensors.torch.load_file(folder / "policy.safetensors")
    change(state)
    data = safetensors.torch.save(state)
    (folder / "policy.safetensors").write_bytes(data)
    edit(folder, lambda record: record.update(tensors_sha256=hashlib.sha256(data).hexdigest()))


def summary_of(rows: int) -> Summary:
    generator = torch.Generator().manual_seed(1)
    return Summary(
        torch.rand(rows, len(SIGNALS), 3, generator=generator),
        torch.rand(rows, len(SIGNALS), generator=generator) < 0.8,
        torch.rand(rows, len(TOKEN_SIGNALS), generator=generator), torch.arange(rows),
        age=torch.rand(rows, generator=generator),
    )  # fmt: skip

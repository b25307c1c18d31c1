"""What one adaptive run will do, settled from the user's arguments before the model is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from policy.checkpoint import PolicyCheckpoint
from policy.contract import RankPolicy
from policy.fixed import FixedPolicy
from policy.settings import FULL_KV, Settings

from .adapter import Adapter, load_adapter
from .fingerprint import adapter_fingerprint
from .ladder import Ladder, build_ladder
from .loading import device_name

STATIC_BLOCK_TOKENS = 512
"""Prefill block when the rung never changes: large, because no decision waits for a block to end."""


@dataclass(frozen=True)
class RunPlan:
    """A ladder, the policy that moves on it, its knob, and all settings."""

    ladder: Ladder
    policy: RankPolicy
    settings: Settings
    knob: float


def plan_run(
    adapter: str | Path | Adapter,
    *,
    policy: str | Path | PolicyCheckpoint | None = None,
    budget: float | None = None,
    latency_budget_ms: float | None = None,
    rung: int | None = None,
    model_fingerprint: str | None = None,
    device: torch.device | None = None,
) -> RunPlan:
    """Settle a run. No policy, or `budget=1.0`, means the top rung and full-precision KV; `rung` a fixed rank.

    Raises ValueError for arguments that contradict each other, a rung the adapter does not have, a budget or latency
    out of range, and for a policy that was made for another model or adapter; FileNotFoundError for a wrong path.
    """
    if isinstance(adapter, str | Path):
        adapter = load_adapter(adapter)
    if budget is not None and not 0 <= budget <= 1:
        raise ValueError(f"budget: expected a number in [0, 1] (1 = the top rung), got {budget}; correct it")
    if policy is None:
        if latency_budget_ms is not None or budget not in (None, 1.0):
            raise ValueError(f"budget: expected a policy to spend {budget or latency_budget_ms} by, got none; pass one")
        rungs = None if rung is None else sorted({rung, adapter.rank})
        ladder = build_ladder(adapter, rungs)
        return static_plan(ladder, ladder.rungs[-1] if rung is None else rung)
    if rung is not None:
        raise ValueError(f"rung: expected either a policy or a fixed rung, got a policy and {rung}; drop one")
    checkpoint = policy if isinstance(policy, PolicyCheckpoint) else PolicyCheckpoint.load(policy)
    ladder = build_ladder(adapter, checkpoint.policy.settings.rungs)
    assert model_fingerprint is not None, "a policy is only used with a model at hand"
    checkpoint.check(model=model_fingerprint, adapter=adapter_fingerprint(adapter), rungs=ladder.rungs)
    if budget == 1.0 and latency_budget_ms is None:
        return static_plan(ladder, ladder.rungs[-1])
    measured = checkpoint.latency
    if latency_budget_ms is not None and measured is not None and device is not None:
        here = device_name(device)
        if here != measured.device:
            raise ValueError(
                f"latency_budget_ms: expected the device the policy's table was measured on, {measured.device}, got "
                f"{here}; use budget, or fit the policy on this device"
            )
    knob = checkpoint.knob_for(budget=budget, latency_budget_ms=latency_budget_ms)
    return RunPlan(ladder, checkpoint.policy, checkpoint.policy.settings, knob)


def static_plan(ladder: Ladder, rung: int) -> RunPlan:
    """The run at one fixed rank with full-precision KV."""
    index = ladder.rung_index(rung)
    settings = Settings(ladder.rungs, start_rung=index, block_tokens=STATIC_BLOCK_TOKENS, fade_tokens=1)
    settings = replace(settings, kv=FULL_KV)
    return RunPlan(ladder, FixedPolicy(settings), settings, float(index))

"""What one adaptive run will do, settled from the user's arguments before the model is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from policy.checkpoint import PolicyCheckpoint
from policy.contract import RankPolicy
from policy.curve import check_budget
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
    if budget is not None:
        check_budget(budget)
    if rung is not None and (policy is not None or budget is not None or latency_budget_ms is not None):
        raise ValueError(f"rung: expected a fixed rung alone, got rung={rung} with a policy or a budget; drop one")
    if policy is None:
        if latency_budget_ms is not None or budget not in (None, 1.0):
            asked = f"budget={budget}" if budget is not None else f"latency_budget_ms={latency_budget_ms}"
            raise ValueError(f"policy: expected one to spend {asked} by, got none; pass a policy folder")
        ladder = build_ladder(adapter, None if rung is None else sorted({rung, adapter.rank}))
        return static_plan(ladder, ladder.rungs[-1] if rung is None else rung)
    checkpoint = policy if isinstance(policy, PolicyCheckpoint) else PolicyCheckpoint.load(policy)
    ladder = build_ladder(adapter, checkpoint.policy.settings.rungs)
    assert model_fingerprint is not None, "a policy is only used with a model at hand"
    checkpoint.check(model=model_fingerprint, adapter=adapter_fingerprint(adapter), rungs=ladder.rungs)
    if latency_budget_ms is not None:
        _check_device(checkpoint, device)
    spent = checkpoint.budget_for(budget, latency_budget_ms)
    if spent == 1.0:
        return static_plan(ladder, ladder.rungs[-1])
    # Calibration ran every budget from its own rung: before the first signal, and in the prompt, it is the budget.
    settings = replace(checkpoint.settings, start_rung=checkpoint.rung_for(spent))
    return RunPlan(ladder, checkpoint.policy, settings, checkpoint.knob_for(spent))


def _check_device(checkpoint: PolicyCheckpoint, device: torch.device | None) -> None:
    if checkpoint.latency is None or device is None:
        return
    if device_name(device) != checkpoint.latency.device:
        raise ValueError(
            f"latency_budget_ms: expected the device of the policy's table, {checkpoint.latency.device}, got "
            f"{device_name(device)}; use budget, or fit the policy on this device"
        )


def static_plan(ladder: Ladder, rung: int) -> RunPlan:
    """The run at one fixed rank with full-precision KV."""
    index = ladder.rung_index(rung)
    settings = Settings(ladder.rungs, start_rung=index, block_tokens=STATIC_BLOCK_TOKENS, fade_tokens=1)
    settings = replace(settings, kv=FULL_KV)
    return RunPlan(ladder, FixedPolicy(settings), settings, float(index))

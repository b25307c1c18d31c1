"""What one adaptive run will do, settled from the user's arguments before the model is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from policy.checkpoint import PolicyCheckpoint
from policy.contract import RankPolicy
from policy.curve import check_budget
from policy.fixed import FixedPolicy
from policy.operating import Operating
from policy.settings import FULL_KV, Settings

from .ladder import Adapter, Ladder, open_ladder
from .loading import device_name

STATIC_BLOCK_TOKENS = 512
"""Prefill block when the rung never changes: large, because no decision waits for a block to end."""

AdapterSource = str | Path | Adapter | Ladder
"""What a user may call an adapter: a PEFT folder, a hub id, a saved ladder, or either already read."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class RunPlan:
    """The ladders of a run, the policy that moves on them, all settings, and what the rows may spend."""

    ladders: tuple[Ladder, ...]
    policy: RankPolicy
    settings: Settings
    operating: Operating
    """One row, which stands for all of them, or one for every sequence of a batch."""

    @property
    def ladder(self) -> Ladder:
        """The ladder of a run with one adapter."""
        assert len(self.ladders) == 1, "a run with several adapters has several ladders"
        return self.ladders[0]

    def rung_rank(self) -> Tensor:
        """[A, J] equivalent rank of every ladder's rungs; where a ladder has fewer, its top rung again."""
        ranks = [ladder.mean_rank().double() for ladder in self.ladders]
        return torch.stack([torch.cat([r, r[-1:].expand(len(self.policy.rungs) - len(r))]) for r in ranks])

    def rung_cost(self) -> Tensor:
        """[A, J] float64 bytes of every ladder's rungs, relative to its exact adapter."""
        ranks = self.rung_rank()
        return ranks / ranks[:, -1:]


def plan_run(
    adapter: AdapterSource | Sequence[AdapterSource],
    *,
    policy: str | Path | PolicyCheckpoint | None = None,
    budget: float | Sequence[float] | None = None,
    latency_budget_ms: float | None = None,
    rung: int | Sequence[int] | None = None,
    model_fingerprint: str | None = None,
    device: torch.device | None = None,
) -> RunPlan:
    """Settle a run. No policy, or `budget=1.0`, means the top rung and full-precision KV; `rung` a fixed rank.

    `adapter`, `budget` and `rung` may be lists, one entry per sequence of the batch; a single value stands for all.

    Raises ValueError for arguments that contradict each other, a rung the adapter does not have, a budget or latency
    out of range, and for a policy that was made for another model or adapter; FileNotFoundError for a wrong path.
    """
    budgets, rungs = _listed(budget), _listed(rung)
    sources = list(adapter) if isinstance(adapter, Sequence) and not isinstance(adapter, str) else [adapter]
    rows = _rows(adapter=sources, budget=budgets, rung=rungs)
    unique, number = _unique(sources)
    numbers = _spread(number, rows)
    for share in budgets or ():
        check_budget(share)
    if rungs is not None and (policy is not None or budgets is not None or latency_budget_ms is not None):
        raise ValueError(f"rung: expected a fixed rung alone, got rung={rung} with a policy or a budget; drop one")
    if policy is None:
        if latency_budget_ms is not None or any(share != 1 for share in budgets or ()):
            asked = f"budget={budget}" if budgets is not None else f"latency_budget_ms={latency_budget_ms}"
            raise ValueError(f"policy: expected one to spend {asked} by, got none; pass a policy folder")
        ladders = [open_ladder(source) for source in unique]
        asked_rungs = _spread(rungs, rows) if rungs is not None else [ladders[i].rungs[-1] for i in numbers]
        return static_plan(ladders, asked_rungs, numbers)
    checkpoint = policy if isinstance(policy, PolicyCheckpoint) else PolicyCheckpoint.load(policy)
    assert model_fingerprint is not None, "a policy is only used with a model at hand"
    ladders = [ladder_for(checkpoint, source, model_fingerprint) for source in unique]
    if latency_budget_ms is not None:
        _check_device(checkpoint, device)
    shares: list[float | None] = [*budgets] if budgets is not None else [None]
    spent = [checkpoint.budget_for(share, latency_budget_ms) for share in _spread(shares, rows)]
    operating = checkpoint.operating(spent, numbers)
    return RunPlan(tuple(ladders), checkpoint.policy, checkpoint.settings, operating)


def ladder_for(checkpoint: PolicyCheckpoint, source: AdapterSource, model_fingerprint: str) -> Ladder:
    """The ladder of `source` at the policy's rungs. Raises ValueError when the policy was made for another one."""
    ladder = open_ladder(source)
    ladder = ladder.with_rungs(checkpoint.rungs_for(ladder.rungs[-1]))
    prints = {"adapter": ladder.adapter, "ladder": ladder.fingerprint}
    checkpoint.check(model=model_fingerprint, rungs=ladder.rungs, **prints)
    return ladder


def _check_device(checkpoint: PolicyCheckpoint, device: torch.device | None) -> None:
    if checkpoint.latency is None or device is None:
        return
    if device_name(device) != checkpoint.latency.device:
        raise ValueError(
            f"latency_budget_ms: expected the device of the policy's table, {checkpoint.latency.device}, got "
            f"{device_name(device)}; use budget, or fit the policy on this device"
        )


def static_plan(ladder: Ladder | Sequence[Ladder], rung: int | Sequence[int], adapter: Sequence[int] = (0,)) -> RunPlan:
    """The run at fixed ranks with full-precision KV: `rung` of ladder number `adapter`, one for all rows or for each.

    Raises ValueError for a rank that a ladder does not reach.
    """
    ladders = [ladder] if isinstance(ladder, Ladder) else list(ladder)
    asked = [rung] if isinstance(rung, int) else list(rung)
    numbers = _spread(list(adapter), len(asked))
    for i, own in enumerate(ladders):
        missing = {r for r, n in zip(asked, numbers, strict=True) if n == i} - set(own.rungs)
        if missing:
            ladders[i] = own.with_rungs(sorted({*own.rungs, *missing}))
    index = torch.tensor([ladders[n].rung_index(r) for r, n in zip(asked, numbers, strict=True)])
    policy = FixedPolicy(max((own.rungs for own in ladders), key=len))
    settings = Settings(block_tokens=STATIC_BLOCK_TOKENS, fade_tokens=1, kv=FULL_KV)
    operating = Operating.at(index.float(), index, FULL_KV, torch.tensor(numbers))
    return RunPlan(tuple(ladders), policy, settings, operating)


def _listed(value: _Item | Sequence[_Item] | None) -> list[_Item] | None:
    if value is None:
        return None
    return list(value) if isinstance(value, Sequence) else [value]


def _rows(**given: Sequence[object] | None) -> int:
    """How many rows the lists among the arguments are for. Raises ValueError when they disagree or are empty."""
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    several = {name: length for name, length in lengths.items() if length != 1}
    if len(set(several.values())) > 1 or 0 in several.values():
        shown = ", ".join(f"{length} of {name}" for name, length in several.items())
        raise ValueError(f"{next(iter(several))}: expected one entry per prompt, got {shown}; give as many of each")
    return max(lengths.values())


def _spread(values: list[_Item], rows: int) -> list[_Item]:
    return values * rows if len(values) == 1 else values


def _unique(sources: Sequence[AdapterSource]) -> tuple[list[AdapterSource], list[int]]:
    """Every adapter once, in the order of first use, and the number of each entry: none is read or factored twice."""
    keys = [str(source) if isinstance(source, str | Path) else id(source) for source in sources]
    first = dict(zip(reversed(keys), reversed(sources), strict=True))
    order = list(dict.fromkeys(keys))
    return [first[key] for key in order], [order.index(key) for key in keys]

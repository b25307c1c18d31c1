"""What one adaptive run will do, settled from the user's arguments before the model is touched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from policy.checkpoint import PolicyCheckpoint
from policy.contract import RankPolicy
from policy.curve import check_budget
from policy.difficulty import Difficulty
from policy.fixed import FixedPolicy
from policy.operating import Operating
from policy.rungs import RUNG, Rung
from policy.settings import FULL_KV, Settings

from .control.bucket import Offer
from .ladder import Adapter, Ladder, open_ladder
from .loading import device_name

STATIC_BLOCK_TOKENS = 512
"""Prefill block when the rung never changes: large, because no decision waits for a block to end."""

CPU = torch.device("cpu")

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

    def policy_on(self, device: torch.device) -> RankPolicy:
        """A copy of the policy that decides on `device`: the caller's stays where it is, and in its mode."""
        return copy.deepcopy(self.policy).to(device).eval()

    def rung_rank(self) -> Tensor:
        """[A, J] equivalent rank of every ladder's rungs; where a ladder has fewer, its top rung again."""
        return self._by_rung([ladder.mean_rank().double() for ladder in self.ladders])

    def rung_bytes(self) -> Tensor:
        """[A, J] float64 bytes that every ladder's rungs read, as in `rung_rank`."""
        return self._by_rung([ladder.rung_bytes() for ladder in self.ladders])

    def rung_cost(self) -> Tensor:
        """[A, J] float64 bytes of every ladder's rungs, relative to its exact adapter."""
        spent = self.rung_bytes()
        return spent / spent[:, -1:]

    def offer(self) -> Offer:
        """What the state machine chooses among in every ladder, [A] rows."""
        banks = self._by_rung([torch.tensor(ladder.bank_of) for ladder in self.ladders])
        resident = torch.tensor([ladder.highest for ladder in self.ladders])
        return Offer.of(self.rung_cost(), banks, resident)

    def difficulty(self) -> Difficulty:
        """[A, ...] token difficulty of every ladder: its own, else what the policy knows of others, else none."""
        known = self.policy.difficulty() or Difficulty.neutral()
        return Difficulty.stack([(ladder.difficulty or known).to(CPU) for ladder in self.ladders])

    def _by_rung(self, values: Sequence[Tensor]) -> Tensor:
        """[A, J] of values [J] for every ladder, the top's again where a ladder has fewer rungs than others."""
        most = len(self.policy.rungs)
        return torch.stack([torch.cat([own, own[-1:].expand(most - len(own))]) for own in values])


def plan_run(
    adapter: AdapterSource | Sequence[AdapterSource],
    *,
    policy: str | Path | PolicyCheckpoint | None = None,
    budget: float | Sequence[float] | None = None,
    latency_budget_ms: float | None = None,
    rung: Rung | Sequence[Rung] | None = None,
    resident_rung: Rung | None = None,
    model_fingerprint: str | None = None,
    device: torch.device | None = None,
    batch: int | None = None,
) -> RunPlan:
    """Settle a run. No policy, or `budget=1.0`, means the top rung and full-precision KV; `rung` a fixed rung.

    `adapter`, `budget` and `rung` may be lists, one entry per sequence of the batch; a single value stands for all.
    `latency_budget_ms` is of a step of `batch` rows; left out, of the batch bucket that the policy's fit went by.

    Of every ladder no more is in memory than its rungs up to `resident_rung` read. Without a policy that is then the
    rung, unless a lower one is asked for, and a warning says so; a policy chooses among those rungs, whatever it would
    choose of all of them. A budget of 1 asks for the exact adapter, and is refused where that is not in memory; a
    policy whose default it is stays below it without a word.

    Raises ValueError for arguments that contradict each other, a rung that the ladder does not have or that is not in
    memory, a budget or latency out of range, and for a policy that was made for another model or adapter;
    FileNotFoundError for a wrong path.
    """
    budgets = _listed(budget)
    rungs = None if rung is None else [RUNG.take("rung", value) for value in _listed(rung) or ()]
    if resident_rung is not None:
        resident_rung = RUNG.take("resident_rung", resident_rung)
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
            means = f"budget={budget}" if budgets is not None else f"latency_budget_ms={latency_budget_ms}"
            raise ValueError(f"policy: expected one to spend {means} by, got none; pass a policy folder")
        ladders = [open_ladder(source) for source in unique]
        for ladder in ladders if budgets is not None else ():
            _check_whole(ladder, _highest(ladder, resident_rung))
        asked: list[Rung | None] = [None] if rungs is None else [*rungs]
        return _fixed_plan(ladders, _spread(asked, rows), numbers, resident_rung)
    checkpoint = policy if isinstance(policy, PolicyCheckpoint) else PolicyCheckpoint.load(policy)
    assert model_fingerprint is not None, "a policy is only used with a model at hand"
    ladders = [ladder_for(checkpoint, source, model_fingerprint, resident_rung) for source in unique]
    if latency_budget_ms is not None:
        _check_device(checkpoint, device)
    shares: list[float | None] = [*budgets] if budgets is not None else [None]
    for asked_share, own in zip(_spread(shares, rows), numbers, strict=True):
        if asked_share == 1:
            _check_whole(ladders[own], ladders[own].rungs[ladders[own].highest])
    spent = [checkpoint.budget_for(share, latency_budget_ms, batch) for share in _spread(shares, rows)]
    operating = checkpoint.operating(spent, numbers)
    return RunPlan(tuple(ladders), checkpoint.policy, checkpoint.settings, operating)


def engine_plan(
    adapters: Sequence[AdapterSource], *, policy: PolicyCheckpoint | None = None, resident_rung: Rung | None = None,
    model_fingerprint: str | None = None,
) -> RunPlan:  # fmt: skip
    """What an engine holds whose requests say themselves what they may spend; the plan's one row means nothing.

    Without a policy every rung in memory can be asked for. Raises ValueError as `plan_run` does.
    """
    if policy is None:
        ladders = [_up_to(open_ladder(source), resident_rung) for source in adapters]
        settings = _whole_blocks()
        fixed = FixedPolicy(max((own.rungs for own in ladders), key=len))
        return RunPlan(tuple(ladders), fixed, settings, Operating.at(0.0, 0))
    assert model_fingerprint is not None, "a policy is only used with a model at hand"
    ladders = [ladder_for(policy, source, model_fingerprint, resident_rung) for source in adapters]
    return RunPlan(tuple(ladders), policy.policy, policy.settings, Operating.at(0.0, 0))


def ladder_for(
    checkpoint: PolicyCheckpoint, source: AdapterSource, model_fingerprint: str, resident_rung: Rung | None = None
) -> Ladder:
    """The ladder of `source` at the policy's rungs, in memory up to `resident_rung`. Raises ValueError when the policy
    was made for another one."""
    ladder = open_ladder(source)
    prints = {"model": model_fingerprint, "adapter": ladder.adapter}
    try:
        own = ladder.with_rungs(checkpoint.rungs_for(ladder.rungs[-1]))
    except ValueError:
        if not checkpoint.fingerprints["shared"]:
            checkpoint.check(**prints, rungs=ladder.rungs)  # says which adapter, or which ladder of it
        raise
    checkpoint.check(**prints, rungs=own.rungs, ladder=own.fingerprint)
    return _up_to(own, resident_rung)


def _up_to(ladder: Ladder, rung: Rung | None) -> Ladder:
    """The ladder with no more in memory than its rungs up to `rung` read; None: than there is."""
    if rung is None:
        return ladder
    if rung not in ladder.rungs:
        raise ValueError(f"resident_rung: expected one of {ladder.rungs}, got {rung}; take one of them")
    return ladder.up_to(rung)


def _check_whole(ladder: Ladder, highest: Rung) -> None:
    """Raise ValueError where the highest rung in memory is not the exact adapter, which a budget of 1 asks for."""
    if highest != ladder.rungs[-1]:
        raise ValueError(
            f"budget: expected less than 1, which is the exact adapter {ladder.rungs[-1]}, with the resident rung "
            f"{highest}, got 1; lower it, or leave out resident_rung"
        )


def _check_device(checkpoint: PolicyCheckpoint, device: torch.device | None) -> None:
    if checkpoint.latency is None or device is None:
        return
    if device_name(device) != checkpoint.latency.device:
        raise ValueError(
            f"latency_budget_ms: expected the device of the policy's table, {checkpoint.latency.device}, got "
            f"{device_name(device)}; use budget, or fit the policy on this device"
        )


def static_plan(
    ladder: Ladder | Sequence[Ladder], rung: Rung | Sequence[Rung], adapter: Sequence[int] = (0,)
) -> RunPlan:
    """The run at fixed rungs with full-precision KV: `rung` of ladder number `adapter`, one for all rows or for each.

    Raises ValueError for a rung that a ladder does not have, or of which not all is in memory.
    """
    ladders = [ladder] if isinstance(ladder, Ladder) else list(ladder)
    asked = [rung] if isinstance(rung, int | float) else list(rung)
    numbers = _spread(list(adapter), len(asked))
    ladders = [
        _having(own, {r for r, n in zip(asked, numbers, strict=True) if n == i}) for i, own in enumerate(ladders)
    ]
    index = [ladders[n].rung_index(r) for r, n in zip(asked, numbers, strict=True)]
    for n, j in zip(numbers, index, strict=True):
        ladders[n].require_resident(j)
    rungs = torch.tensor(index)
    policy = FixedPolicy(max((own.rungs for own in ladders), key=len))
    operating = Operating.at(rungs.float(), rungs, FULL_KV, torch.tensor(numbers))
    return RunPlan(tuple(ladders), policy, _whole_blocks(), operating)


def _whole_blocks() -> Settings:
    """Of a run whose rungs never change: texts and prompts in the largest blocks, every page as it is."""
    return Settings(block_tokens=STATIC_BLOCK_TOKENS, prompt_tokens=STATIC_BLOCK_TOKENS, fade_tokens=1, kv=FULL_KV)


def _having(ladder: Ladder, rungs: set[Rung]) -> Ladder:
    """The ladder with its own rungs and these."""
    missing = rungs - set(ladder.rungs)
    return ladder.with_rungs(sorted({*ladder.rungs, *missing})) if missing else ladder


def _fixed_plan(
    ladders: Sequence[Ladder], asked: Sequence[Rung | None], numbers: Sequence[int], resident_rung: Rung | None
) -> RunPlan:
    """The run at the rung asked for in every row, by default the highest that may be in memory; a warning says so where
    that is not the exact adapter. What these rungs do not read is dropped from memory."""
    highest = [_highest(ladder, resident_rung) for ladder in ladders]
    served = [highest[number] if rung is None else rung for rung, number in zip(asked, numbers, strict=True)]
    kept = []
    for i, (ladder, most) in enumerate(zip(ladders, highest, strict=True)):
        rows = [row for row, number in enumerate(numbers) if number == i]
        top, rungs = ladder.rungs[-1], sorted({served[row] for row in rows})
        if rungs[-1] > most < top:
            raise ValueError(
                f"rung: expected at most the resident rung {most}, got {rungs[-1]}; ask for less, or raise "
                "resident_rung"
            )
        if most < top and any(asked[row] is None for row in rows):
            warnings.warn(f"every token gets rung {most}, the resident one, not the exact adapter {top}", stacklevel=3)
        if ladder.resident is None:
            ladder = ladder.with_rungs(rungs)
            ladder = ladder if rungs[-1] == top else ladder.up_to(rungs[-1])
        kept.append(ladder)
    return static_plan(kept, served, numbers)


def _highest(ladder: Ladder, resident_rung: Rung | None) -> Rung:
    """The highest rung that may be in memory. Raises ValueError where the ladder has none of that name there."""
    if resident_rung is None:
        return ladder.rungs[ladder.highest]
    ladder = _having(ladder, {resident_rung})
    ladder.require_resident(ladder.rung_index(resident_rung))
    return resident_rung


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

"""A policy on disk: `policy.safetensors` (its tensors) and `policy.json` (everything else). Nothing is pickled.

It carries what serving needs to repeat what training measured: the run's settings, the knob's calibration, costs,
fingerprints of the model and adapter it was fitted to, and its metrics. Writing goes to a temporary folder beside the
target and is moved into place, so a failure leaves what was there before; `policy.json` holds the digest of the tensor
file, so two files that do not belong together are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .contract import RankPolicy
from .cost import LatencyTables
from .curve import KnobCurve, check_budget
from .fixed import FixedPolicy
from .learned import LearnedPolicy
from .limits import (
    Choice,
    Entries,
    Flag,
    Made,
    Maybe,
    Number,
    Several,
    Text,
    check_fields,
    limited,
    read_record,
    refused,
    shown,
)
from .operating import Operating
from .percentile import PercentilePolicy
from .random import RandomPolicy
from .reading import Shapes, read_json, read_shapes, shapes_of
from .rungs import MOST_RUNGS, Rung, rungs_at_shares, same_shares
from .schema1 import upgrade_record, upgrade_schema2, upgrade_schema3, upgrade_schema4, upgrade_tensors
from .settings import FULL_KV, Settings

SCHEMA_VERSION = 5
TENSORS = "policy.safetensors"
RECORD = "policy.json"

KINDS: Mapping[str, type[RankPolicy]] = {
    FixedPolicy.kind: FixedPolicy,
    PercentilePolicy.kind: PercentilePolicy,
    LearnedPolicy.kind: LearnedPolicy,
    RandomPolicy.kind: RandomPolicy,
}
"""Every kind that can be stored. `oracle` is not among them: a schedule fits only the tokens it was made for."""

_FIELDS = (
    "kind", "settings", "config", "rungs", "curve", "cost", "default_budget", "latency", "fingerprints", "metrics",
    "tensors_sha256",
)  # fmt: skip
_PRINTS = Entries({"model": Text(), "adapter": Text(), "ladder": Maybe(Text()), "shared": Flag()})
_COST_TOLERANCE = 1e-6
"""Costs are float32 shares of bytes; a user's 8 / 48 must still reach the rung that costs it."""

_OWN_LADDER = "pass the folder `ladder` that the fit wrote beside the policy as --adapter"

_Value = TypeVar("_Value")


class Fingerprints(TypedDict):
    """What the policy was fitted to. A `shared` policy may be used with any adapter of the same model, of any rank."""

    model: str
    adapter: str
    ladder: str | None
    shared: bool


@dataclass
class PolicyCheckpoint:
    """A policy with all that is needed to serve it. Raises ValueError when its parts do not fit together."""

    policy: RankPolicy = field(metadata=limited(Made(RankPolicy)))
    settings: Settings = field(metadata=limited(Made(Settings)))
    curve: KnobCurve | None = field(metadata=limited(Maybe(Made(KnobCurve))))
    """Budget to knob; None only for `fixed`, whose knob follows from `cost` directly."""
    cost: tuple[float, ...] = field(metadata=limited(Several(Number(0, 1), 1, MOST_RUNGS, ascending=True)))
    """Cost of each rung, [J], non-decreasing, 1 at the top."""
    fingerprints: Fingerprints = field(metadata=limited(_PRINTS))
    default_budget: float = field(default=1.0, metadata=limited(Number(0, 1)))
    latency: LatencyTables | None = field(default=None, metadata=limited(Maybe(Made(LatencyTables))))
    metrics: dict[str, Any] = field(default_factory=dict, metadata=limited(Made(dict)))

    def __post_init__(self) -> None:
        check_fields(self)
        count = len(self.policy.rungs)
        if len(self.cost) != count or self.cost[-1] != 1:
            raise refused("cost", f"{count} ascending numbers in [0, 1] ending in 1", self.cost)
        if self.curve is None and not isinstance(self.policy, FixedPolicy):
            raise refused("curve", f"a calibrated knob curve for a {self.policy.kind} policy", None)
        if self.latency is not None and len(self.latency.chosen.ms) != count:
            raise refused("latency.ms", f"{count} latencies, one per rung", self.latency.chosen.ms)
        self._check_affordable("default_budget", self.default_budget)

    def budget_for(
        self, budget: float | None = None, latency_budget_ms: float | None = None, rows: int | None = None
    ) -> float:
        """The budget meant by either argument; neither: the default. A latency is of a step of a batch of `rows`; left
        out: of the bucket that the fit went by. Raises ValueError for both arguments at once, a budget outside [0, 1],
        or a latency or a number of rows that no measurement supports."""
        if budget is not None and latency_budget_ms is not None:
            got = f"budget={budget!r} and latency_budget_ms={latency_budget_ms!r}"
            raise ValueError(f"budget: expected budget or latency_budget_ms, got {got}; give one of them")
        if latency_budget_ms is not None:
            if self.latency is None:
                raise ValueError("latency_budget_ms: expected a policy with a latency table, got none; use budget")
            table = self.latency.for_rows(rows)
            # From the share of time to the share of cost; the same thing where cost was taken from this very table.
            return float(np.interp(table.budget_for(latency_budget_ms), table.cost(), self.cost))
        return self.default_budget if budget is None else check_budget(budget)

    def rung_for(self, budget: float) -> int:
        """Index of the dearest rung whose cost is within `budget` (the cheapest, when none is)."""
        return max(0, bisect_right(self.cost, check_budget(budget) + _COST_TOLERANCE) - 1)

    def knob_for(self, budget: float | None = None, latency_budget_ms: float | None = None) -> float:
        """The knob that spends `budget`, or `latency_budget_ms` per token, on average; neither: the default budget.

        A budget of 1 is the dear end of the knob, the top rung throughout; one below what the policy can reach is its
        cheap end. A `fixed` policy takes `rung_for` the budget. Raises as `budget_for` does.
        """
        budget = self.budget_for(budget, latency_budget_ms)
        if budget == 1:
            return self.policy.knob_range()[1]
        if self.curve is None or isinstance(self.policy, FixedPolicy):
            return float(self.rung_for(budget))
        return self.curve.knob(budget)

    def operating(self, budgets: Sequence[float], adapters: Sequence[int]) -> Operating:
        """What rows of these budgets may spend, each on the ladder of its number in `adapters`.

        A row starts at the dearest rung within its budget, keeps its prompt there, and is held to its budget whatever
        the text. A budget of 1 is the exact adapter with full-precision KV. Raises ValueError for a budget outside
        [0, 1] or below what the smallest rung costs.
        """
        for budget in budgets:
            self._check_affordable("budget", budget)
        return Operating.at(
            torch.tensor([self.knob_for(budget) for budget in budgets]),
            torch.tensor([self.rung_for(budget) for budget in budgets]),
            [FULL_KV if budget == 1 else self.settings.kv for budget in budgets],
            torch.tensor(adapters),
            torch.tensor(budgets, dtype=torch.float64),
        )

    def _check_affordable(self, name: str, budget: float) -> None:
        if check_budget(budget) < self.cost[0] - _COST_TOLERANCE:
            least = f"at least {self.cost[0]:.6g}, which the smallest rung {self.policy.rungs[0]} costs"
            raise refused(name, least, budget, "raise it, or fit a policy with a lower rung")

    def rungs_for(self, rank: Rung) -> tuple[Rung, ...]:
        """The rungs of an adapter of `rank`: the policy's own, or for a `shared` policy the same shares of `rank`."""
        return rungs_at_shares(self.policy.rungs, rank) if self.fingerprints["shared"] else self.policy.rungs

    def check(self, *, model: str, adapter: str, rungs: Sequence[Rung], ladder: str | None = None) -> None:
        """Raise ValueError unless the policy fits this model, adapter, rungs and (where both have one) ladder.

        A `shared` policy fits every adapter of the model whose rungs are the same shares of its rank.
        """
        own = self.fingerprints
        if model != own["model"]:
            raise ValueError(
                f"model: expected fingerprint {own['model']}, got {model}; load the base model the policy was fitted to"
            )
        if adapter != own["adapter"] and not own["shared"]:
            raise ValueError(
                f"adapter: expected fingerprint {own['adapter']}, got {adapter}; "
                "load the adapter the policy was fitted to, or fit one policy and mark it shared"
            )
        given, wanted = tuple(rungs), self.policy.rungs
        if not (given == wanted or (own["shared"] and same_shares(given, wanted))):
            raise ValueError(f"rungs: expected {wanted}, got {given}; {_OWN_LADDER}")
        known = ladder is not None and own["ladder"] is not None and not own["shared"]
        if known and ladder != own["ladder"]:
            raise ValueError(f"ladder: expected fingerprint {own['ladder']}, got {ladder}; {_OWN_LADDER}")

    def save(self, folder: str | Path) -> None:
        """Write both files into `folder`, replacing those of an earlier save and touching nothing else there.

        Raises ValueError, before anything is written, for a policy that cannot be stored: an `oracle`, tensors that
        are not finite or not of the dtype they were built with, metrics that are not JSON.
        """
        folder = Path(folder)
        if self.policy.kind not in KINDS:
            kinds = ", ".join(KINDS)
            raise ValueError(
                f"policy: expected a kind that can be exported ({kinds}), got {self.policy.kind!r}, "
                "which fits only the tokens it was made for; export the policy it was compared with"
            )
        state = {name: value.detach().cpu().contiguous() for name, value in self.policy.state_dict().items()}
        blank = _rebuild(self.policy.kind, self.policy.rungs, self.policy.config(), "meta")
        _check_shapes(blank, shapes_of(state), "policy")
        _check_values(self.policy, state, "policy")
        tensors = safetensors.torch.save(state, metadata={"format": "pt"})
        record = self._record(hashlib.sha256(tensors).hexdigest())

        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
        temporary.mkdir()
        try:
            (temporary / TENSORS).write_bytes(tensors)
            (temporary / RECORD).write_text(record, encoding="utf-8")
            if folder.is_dir():
                for name in (TENSORS, RECORD):
                    os.replace(temporary / name, folder / name)
            else:
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path) -> PolicyCheckpoint:
        """Read what `save` wrote, on the CPU and in eval mode.

        Raises FileNotFoundError for a missing folder or file and ValueError for anything in them that is not as
        `save` writes it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"policy: expected a folder, got {folder}, which is not one; check the path")
        for name in (RECORD, TENSORS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"policy: expected {RECORD} and {TENSORS} in {folder}, got no {name}; export again"
                )
        record = _read_record(folder / RECORD)
        version = record["schema_version"]
        # Everything the record says is held to its limits, and to what the tensor file says it holds, while the policy
        # has no memory yet.
        if version == 1:
            record = _parse(f"{folder / RECORD}: schema 1", lambda: upgrade_record(record))
        if version < 3:
            record = _parse(f"{folder / RECORD}: schema 2", lambda: upgrade_schema2(record))
        if version < 4:
            record = _parse(f"{folder / RECORD}: schema 3", lambda: upgrade_schema3(record))
        if version < SCHEMA_VERSION:
            record = _parse(f"{folder / RECORD}: schema 4", lambda: upgrade_schema4(record))
        loaded = _parse(str(folder / RECORD), lambda: cls._from_record(record))
        path, policy = folder / TENSORS, loaded.policy
        _check_shapes(policy, read_shapes(path, "copy or export it again"), str(path))
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != record["tensors_sha256"]:
            raise ValueError(f"{path}: expected the file {RECORD} was written with, got another; export both again")
        tensors = safetensors.torch.load(data)
        if version == 1:
            tensors = upgrade_tensors(policy.kind, tensors)
        loaded.policy = _rebuild(policy.kind, policy.rungs, policy.config(), "cpu").eval()
        loaded.policy.load_state_dict(tensors)
        _check_values(loaded.policy, tensors, str(path))
        return loaded

    @classmethod
    def _from_record(cls, record: Mapping[str, Any]) -> PolicyCheckpoint:
        """All that the record says, with a policy on the meta device, whose tensors have shapes and no memory."""
        curve, latency = record["curve"], record["latency"]
        config = Entries(KINDS[record["kind"]].CONFIG).take("config", record["config"])
        return cls(
            policy=_rebuild(record["kind"], record["rungs"], config, "meta"),
            settings=Settings.from_dict(record["settings"]),
            curve=None if curve is None else read_record(KnobCurve, curve, "curve"),
            cost=record["cost"],
            fingerprints=record["fingerprints"],
            default_budget=record["default_budget"],
            latency=None if latency is None else read_record(LatencyTables, latency, "latency"),
            metrics=record["metrics"],
        )

    def _record(self, digest: str) -> str:
        record = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.policy.kind,
            "settings": self.settings.to_dict(),
            "config": self.policy.config(),
            "rungs": self.policy.rungs,
            "curve": self.curve and asdict(self.curve),
            "cost": self.cost,
            "default_budget": self.default_budget,
            "latency": self.latency and asdict(self.latency),
            "fingerprints": dict(self.fingerprints),
            "metrics": self.metrics,
            "tensors_sha256": digest,
            "libraries": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "safetensors": safetensors.__version__,
            },
        }
        try:
            return json.dumps(record, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"metrics: expected JSON values and finite numbers, got {error}; convert them") from None


def _rebuild(kind: str, rungs: Sequence[Rung], config: Mapping[str, Any], device: str) -> RankPolicy:
    """A policy of this kind whose tensors are still to be loaded; the random generator is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return KINDS[kind](rungs, **config)


def _parse(where: str, build: Callable[[], _Value]) -> _Value:
    """`build()`, with any complaint turned into one line that says where the value stands."""
    try:
        return build()
    except ValueError as error:
        raise ValueError(f"{where}: {error} or export the policy again") from None


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path, "export the policy again")
    version = record.get("schema_version")
    if type(version) is not int or version not in range(1, SCHEMA_VERSION + 1):
        raise ValueError(
            f"{path}: expected schema_version {SCHEMA_VERSION} (or 1, 2, 3, 4), got {shown(version)}; "
            "export the policy with this version, or read it with the one that wrote it"
        )
    missing = [name for name in _FIELDS if name not in record]
    if missing:
        raise ValueError(f"{path}: expected {', '.join(missing)}, got a record without; export the policy again")
    _parse(str(path), lambda: Choice(tuple(KINDS)).take("kind", record["kind"]))
    return record


def _check_shapes(policy: RankPolicy, found: Shapes, where: str) -> None:
    """Raise ValueError, naming the tensor, unless `found` are those of a state of `policy`: names, shapes, dtypes."""
    expected = shapes_of(policy.state_dict())
    for name, wanted in expected.items():
        got = found.get(name)
        if got != wanted:
            shape = "none" if got is None else _shape(*got)
            raise ValueError(
                f"{where}: tensor {name}: expected {_shape(*wanted)}, got {shape}; export the policy again"
            )
    extra = sorted(set(found) - set(expected))
    if extra:
        raise ValueError(
            f"{where}: tensor {shown(extra[0])}: expected no such tensor, got one; export the policy again"
        )


def _shape(shape: tuple[int, ...], dtype: object) -> str:
    return f"{shape} {dtype}"


def _check_values(policy: RankPolicy, state: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError, naming the tensor, unless `state`, loaded into `policy`, is finite and what it can serve."""
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: tensor {name}: expected finite numbers, got NaN or infinity; fit it again")
    try:
        policy.check_tensors()
    except ValueError as error:
        raise ValueError(f"{where}: tensor {error} or export the policy again") from None

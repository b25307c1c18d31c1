"""Traces: which rungs a policy chose on real texts, token by token, replayed where speed is measured.

Random weights have no easy text, so what a controller would choose on them says nothing. `benchmarks.record_trace`
writes down what it chose on held-out documents of a real adapter; in `benchmarks.decode` the controller computes at
every step as it does in use, and the trace decides.

Shape legend: B rows, N steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policy.limits import Entries, Number, Several, Text, Whole, refused
from policy.reading import read_json
from policy.rungs import RUNG, Rung

FOLDER = Path(__file__).parent / "traces"
DEFAULT = FOLDER / "medquad.json"
SCHEMA_VERSION = 1
AGAIN = "record it again with benchmarks.record_trace"
MOST_ROWS, MOST_STEPS = 4096, 2**20
_TRACE = Entries(
    {
        "around": RUNG,
        "budget": Number(0, 1, above=True),
        "rungs": Several(Several(RUNG, 1, MOST_STEPS), 1, MOST_ROWS),
    }
)


@dataclass(frozen=True)
class Trace:
    """What one budget came to."""

    adapter: str
    """Name of the adapter on whose documents it was recorded."""
    around: Rung
    """The rung whose bytes the budget is."""
    budget: float
    """Share of the exact adapter's bytes that a token may read on average."""
    rungs: tuple[tuple[Rung, ...], ...]
    """[B, N] equivalent ranks"""

    @property
    def mean_rank(self) -> float:
        """Over all rows and steps."""
        return float(torch.tensor(self.rungs, dtype=torch.float64).mean())

    def replay(self, rows: int, steps: int, rungs: Sequence[Rung]) -> Tensor:
        """[rows, steps] int16: indices of `rungs`, ascending, the nearest where a ladder has not the very one.

        Of fewer rows than were recorded those that are nearest to the mean rank of all; more, and more steps, repeat
        what there is.
        """
        ranks = torch.tensor(self.rungs, dtype=torch.float64)
        order = (ranks.mean(1) - ranks.mean()).abs().argsort(stable=True) if rows < len(ranks) else None
        own = ranks if order is None else ranks[order[:rows].sort().values]
        own = own[torch.arange(rows) % len(own)][:, torch.arange(steps) % own.shape[1]]
        there = torch.tensor(list(rungs), dtype=torch.float64)
        return (own[..., None] - there).abs().argmin(-1).to(torch.int16)


def load_traces(path: Path) -> list[Trace]:
    """What `save_traces` wrote. Raises FileNotFoundError, or ValueError naming the file and what in it is not as
    expected."""
    if not path.is_file():
        raise FileNotFoundError(
            f"--trace: expected a file, got none at {path}; record one, see benchmarks.record_trace"
        )
    record = read_json(path, AGAIN)
    try:
        version = Whole(SCHEMA_VERSION, SCHEMA_VERSION).take("schema_version", record.get("schema_version"))
        assert version == SCHEMA_VERSION, "there is no other"
        adapter = Text().take("adapter", record.get("adapter"))
        given = record.get("traces")
        if not isinstance(given, list) or not given:
            raise refused("traces", "a list of at least one", given, AGAIN)
        return [_taken(f"traces[{i}]", adapter, own) for i, own in enumerate(given)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _taken(name: str, adapter: str, given: Any) -> Trace:
    known = {key: given[key] for key in _TRACE.of if key in given} if isinstance(given, dict) else given
    own = _TRACE.take(name, known)
    if len({len(row) for row in own["rungs"]}) > 1:
        raise refused(f"{name}.rungs", "rows of one length", [len(row) for row in own["rungs"]], AGAIN)
    return Trace(adapter, own["around"], own["budget"], own["rungs"])


def save_traces(path: Path, head: dict[str, Any], traces: Sequence[dict[str, Any]]) -> None:
    """Write `traces`, dicts with `around`, `budget` and `rungs` at least, behind what `head` says of them; a row of
    rungs a line."""
    lines = []
    for own in traces:
        fields = json.dumps({name: value for name, value in own.items() if name != "rungs"})
        rows = ",\n    ".join(json.dumps(row, separators=(",", ":")) for row in own["rungs"])
        lines.append(f'  {fields[:-1]}, "rungs": [\n    {rows}\n  ]}}')
    text = json.dumps({"schema_version": SCHEMA_VERSION, **head}, indent=1)[:-2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{text},\n "traces": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")

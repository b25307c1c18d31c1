"""What rows keep from one step to the next: tensors that stay where they are, so rows come and go by being written to.

Graphs of several batch buckets share them: a smaller one works on the first rows. What a step only passes from kernel
to kernel is `buffers`.

Shape legend: B rows, N steps at most, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kv.units import Units
from ..ops.pages import PagePolicy, PageTables, Turned
from ..ops.reference.sampling import Generated, SamplingRows
from ..ops.resolve import Rows
from .model import Model

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Lanes:
    """B rows; every tensor of them has one axis of rows, the first but for `distant`."""

    rows: Rows
    """What they read of which ladder"""
    tables: PageTables
    """Which pages every row has, and how many tokens"""
    turned: Turned
    """What has become of pages at this step"""
    kept: PagePolicy
    """What becomes of them"""
    generated: Generated
    sampling: SamplingRows
    rungs: Tensor
    """[B, N] int16: the rung of every step, where a controller runs"""
    entropy: Tensor
    """[B] float32 at the newest token"""
    surprisal: Tensor
    """[B] float32 of it"""
    distant: Tensor
    """[probes, B, H] float32: attention mass of the newest token beyond the recent pages, in layers that are listened
    to"""

    @classmethod
    def of(cls, model: Model, units: Units, rows: int, pages: int, steps: int, ends: int, probes: int = 1) -> Lanes:
        """Rows that are not in use, of up to `pages` pages; `ends` tokens end a row, `probes` layers are listened
        to."""
        device = model.device
        whole = torch.zeros(rows, dtype=torch.int32, device=device)
        made = Generated.of(rows, model.shape.vocabulary, steps, torch.zeros(ends, dtype=torch.long, device=device))
        made.ended.fill_(1)
        amount = torch.zeros(rows, device=device)
        return cls(
            Rows(whole - 1, whole.clone(), amount.clone()), PageTables.of(rows, pages, units, device),
            Turned.of(rows, units, device), PagePolicy.of(rows, pages, device), made, SamplingRows.of(rows, device),
            torch.zeros(rows, steps, dtype=torch.int16, device=device), amount.clone(), amount.clone(),
            torch.zeros(max(probes, 1), rows, model.shape.heads, device=device),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.entropy)

    def part(self, first: int, count: int) -> Lanes:
        """Rows `first` and on, as views."""
        rows = slice(first, first + count)
        some = over_rows(lambda own: own[rows], self)
        generated = replace(some.generated, ends=self.generated.ends)
        return replace(some, generated=generated, distant=self.distant[:, rows])


def over_rows(function: Callable[[Tensor], Tensor], record: _Record) -> _Record:
    """`function` over the tensors of a record, and of records in it."""
    if isinstance(record, Tensor):
        return function(record)  # type: ignore[return-value]
    assert is_dataclass(record), "rows are kept in tensors, and those in records"
    own: Any = record
    return replace(own, **{field.name: over_rows(function, getattr(own, field.name)) for field in fields(own)})

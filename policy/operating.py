"""What a request may spend, row by row: tensors, so that requests of different means share one batch.

Made in one place (`runtime.plan`; the fit's comparisons make theirs with `Operating.at`), carried by the state of the
rows, read by the state machine (knob, start rung, budget), the gate (adapter) and the page table (KV policy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .settings import FULL_KV, PAGE_ACTIONS, KVSettings

SPARSE = "sparse"
UNLIMITED = math.inf
"""The budget of a row that none holds to one: targets, calibration, and comparisons at equal bytes."""


@dataclass(frozen=True)
class Operating:
    """What each of B rows may spend."""

    knob: Tensor
    """[B] float32: where on the policy's trade-off curve the row runs."""
    start_rung: Tensor
    """[B] long: rung index of the prompt, and until the model has put something out."""
    budget: Tensor
    """[B] float64: bytes of the adapter that a token may read on average, relative to all of it, whatever the text;
    `UNLIMITED`: as many as the policy chooses."""
    adapter: Tensor
    """[B] long: which of the run's ladders the row uses."""
    kv: KVRows
    """What becomes of its KV pages; on the host, where pages are allocated."""

    @classmethod
    def at(
        cls,
        knob: float | Tensor,
        start_rung: int | Tensor,
        kv: KVSettings | Sequence[KVSettings] = FULL_KV,
        adapter: int | Tensor = 0,
        budget: float | Tensor = UNLIMITED,
    ) -> Operating:
        """Rows at these values; numbers stand for every row, tensors are [B]. Raises ValueError where rows differ."""
        given = (
            torch.as_tensor(knob, dtype=torch.float32), torch.as_tensor(start_rung), torch.as_tensor(adapter),
            torch.as_tensor(budget, dtype=torch.float64),
        )  # fmt: skip
        kvs = [kv] if isinstance(kv, KVSettings) else list(kv)
        rows = max([len(kvs), *(len(x) for x in given if x.ndim)])
        lengths = [len(kvs), *(len(x) for x in given if x.ndim)]
        if not set(lengths) <= {1, rows}:
            raise ValueError(f"operating: expected one value a row or one for all, got {lengths} of them; give {rows}")
        knobs, starts, adapters, budgets = (x.expand(rows) for x in given)
        kv_rows = KVRows.of(kvs if len(kvs) == rows else kvs * rows)
        return cls(knobs, starts.long(), budgets, adapters.long(), kv_rows)

    def __len__(self) -> int:
        return len(self.knob)

    def for_rows(self, rows: int) -> Operating:
        """This for `rows` sequences: one row stands for all of them, n rows for n times as many, each its own copies.

        Raises ValueError when they do not divide.
        """
        if rows % len(self):
            raise ValueError(
                f"input_ids: expected {len(self)} rows (or a multiple), one per budget, rung or adapter given, got "
                f"{rows}; pass as many prompts"
            )
        return self.select(torch.arange(len(self)).repeat_interleave(rows // len(self)))

    def select(self, index: Tensor) -> Operating:
        """The rows `index` [N] long, in that order; rows may repeat."""
        at = index.to(self.knob.device)
        kv = self.kv.select(index.tolist())
        return Operating(self.knob[at], self.start_rung[at], self.budget[at], self.adapter[at], kv)

    def to(self, device: torch.device) -> Operating:
        """Its tensors on `device`; the KV policy stays on the host. Nobody waits for a GPU that they go to."""
        later = device.type == "cuda"
        own = (self.knob, self.start_rung, self.budget, self.adapter)
        knob, start_rung, budget, adapter = (tensor.to(device, non_blocking=later) for tensor in own)
        return replace(self, knob=knob, start_rung=start_rung, budget=budget, adapter=adapter)


@dataclass(frozen=True)
class KVRows:
    """What may become of the KV pages of each of B rows: `KVSettings` as host tensors, where pages are allocated."""

    hard: Tensor
    """[B] long: index into `PAGE_ACTIONS` for a page that is hard."""
    easy: Tensor
    """[B] long: and for one that is not."""
    threshold: Tensor
    """[B] float32, as complexities are: a page whose mean token complexity is at least this is hard."""
    sink_pages: Tensor
    """[B] long"""
    window_tokens: Tensor
    """[B] long"""
    sparse_keep: int
    """Tokens that a sparse page keeps: the shape of its storage, so one number for all rows."""

    @classmethod
    def of(cls, rows: Sequence[KVSettings]) -> KVRows:
        """The rows' settings side by side. Raises ValueError when two that may be sparse keep different amounts."""
        keeps = {kv.sparse_keep for kv in rows if SPARSE in (kv.hard, kv.easy)}
        if len(keeps) > 1:
            raise ValueError(
                f"kv.sparse_keep: expected one number for all rows of a batch, got {sorted(keeps)}; use one"
            )
        return cls(
            torch.tensor([PAGE_ACTIONS.index(kv.hard) for kv in rows]),
            torch.tensor([PAGE_ACTIONS.index(kv.easy) for kv in rows]),
            torch.tensor([kv.threshold for kv in rows], dtype=torch.float32),
            torch.tensor([kv.sink_pages for kv in rows]),
            torch.tensor([kv.window_tokens for kv in rows]),
            keeps.pop() if keeps else FULL_KV.sparse_keep,
        )

    def __len__(self) -> int:
        return len(self.hard)

    @property
    def is_full(self) -> bool:
        """True when no page of any row is ever stored in fewer bits than the model computes in."""
        full = PAGE_ACTIONS.index("full")
        return bool(((self.hard == full) & (self.easy == full)).all())

    @property
    def may_be_sparse(self) -> bool:
        """True when a page of some row may keep its heavy hitters alone."""
        sparse = PAGE_ACTIONS.index(SPARSE)
        return bool(((self.hard == sparse) | (self.easy == sparse)).any())

    def select(self, rows: Sequence[int]) -> KVRows:
        """These rows, in this order; rows may repeat."""
        index = torch.tensor(list(rows), dtype=torch.long)
        return KVRows(
            self.hard[index], self.easy[index], self.threshold[index], self.sink_pages[index],
            self.window_tokens[index], self.sparse_keep,
        )  # fmt: skip

    def for_rows(self, rows: int) -> KVRows:
        """This for `rows` sequences; one row stands for all of them. Raises ValueError for another number of rows."""
        if len(self) not in (1, rows):
            raise ValueError(
                f"kv: expected the policy of {rows} rows, or of one for all, got {len(self)}; give as many"
            )
        return self if len(self) == rows else self.select([0] * rows)

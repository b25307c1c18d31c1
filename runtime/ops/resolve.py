"""What every row reads of every module in this step: from slot, rung and weight to `packed`'s records.

The store's tables say where each ladder lies:

    edges    [SLOTS, J, M, 4] int32       of module m, rung j reads directions up to these at 16, 8, 4 and 2 bits
    bank_of  [SLOTS, J] int32             the bank it reads them from
    parts    [SLOTS, BANKS, M, 16] int32  `packed`'s numbers 5 to 20 of every bank

One small launch a step. A row without an adapter, or of weight 0, reads nothing: all its ranges end at 0.

Shape legend: B rows, M modules, J rungs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dependent, release, wait
from .packed import ENDS, PARTS, RECORD, STARTS_A, WEIGHT, Reads, level_table

_ENDS: tl.constexpr = tl.constexpr(ENDS)
_WEIGHT: tl.constexpr = tl.constexpr(WEIGHT)
_STARTS_A: tl.constexpr = tl.constexpr(STARTS_A)
_RECORD: tl.constexpr = tl.constexpr(RECORD)
_MODULES: tl.constexpr = tl.constexpr(8)


@dataclass(frozen=True)
class Rows:
    """What every row of the batch uses of which ladder: device tensors that the controller writes."""

    slot: Tensor
    """[B] int32: where its ladder lies; -1 for none."""
    rung: Tensor
    """[B] int32"""
    weight: Tensor
    """[B] float32: what multiplies its update, scales folded in; 0 for none."""


@dataclass(frozen=True)
class Tables:
    """Where the ladders of a store lie."""

    edges: Tensor
    bank_of: Tensor
    parts: Tensor

    @classmethod
    def of(cls, slots: int, rungs: int, banks: int, modules: int, device: torch.device) -> Tables:
        """Tables of empty slots."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(zeros(slots, rungs, modules, 4), zeros(slots, rungs), zeros(slots, banks, modules, PARTS))


@triton.jit
def _resolve(
    records, slots, rungs, weights, edges, bank_of, parts, J: tl.constexpr, BANKS: tl.constexpr, M: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    release(PDL)
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    weight = tl.load(weights + row)
    module = tl.program_id(1) * _MODULES + tl.arange(0, _MODULES)
    field = tl.arange(0, 16)
    own = records + (row * M + module)[:, None] * _RECORD
    inside = (module < M)[:, None]
    used = (slot >= 0) & (weight != 0.0)
    rung = tl.where(used, tl.load(rungs + row), 0)
    slot = tl.where(used, slot, 0).to(tl.int64)
    bank = tl.load(bank_of + slot * J + rung)
    place = slot * BANKS + bank
    ends = tl.load(
        edges + ((slot * J + rung) * M + module)[:, None] * 4 + field[None, :],
        mask=inside & (field < 4)[None, :], other=0,
    )  # fmt: skip
    tl.store(own + _ENDS + field[None, :], tl.where(used, ends, 0), mask=inside & (field < 4)[None, :])
    tl.store(records + (row * M + module) * _RECORD + _WEIGHT, weight.to(tl.int32, bitcast=True), mask=module < M)
    numbers = tl.load(parts + (place * M + module)[:, None] * 16 + field[None, :], mask=inside, other=0)
    tl.store(own + _STARTS_A + field[None, :], numbers, mask=inside)


def resolve(reads: Reads, rows: Rows, tables: Tables) -> None:
    """Write `reads.records` for `rows`; a rung beyond the resident one is the caller's mistake."""
    batch, modules, _ = reads.records.shape
    _resolve[(batch, triton.cdiv(modules, _MODULES.value))](
        reads.records, rows.slot, rows.rung, rows.weight, tables.edges, tables.bank_of, tables.parts,
        J=tables.edges.shape[1], BANKS=tables.parts.shape[1], M=modules, num_warps=1, **dependent(reads.records.device),
    )  # fmt: skip


def reads_for(rows: int, modules: int, arena: Tensor, dtype: torch.dtype) -> Reads:
    """Records of `rows` rows that read nothing yet, of ladders in `arena`, for a model in `dtype`."""
    device = arena.device
    records = torch.zeros(rows, modules, RECORD, dtype=torch.int32, device=device)
    return Reads(records, arena, level_table(device, dtype))

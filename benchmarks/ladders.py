"""Ladders of a 7B size without an adapter behind them: what a kernel reads, with random content.

How many directions a rung reads at which bits is that of a real ladder: the mean over the modules of `mixed` ladders
built from rank-64 adapters (`benchmarks/results/ladder-*.json` say how those were made). Speed depends on these numbers
and on no value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.engine.store import Module
from runtime.ladder import Directions, Ladder
from runtime.ladder.banks import MIXED
from runtime.ladder.formats import CODED, PLANES, Rows, wide_rows
from runtime.packing import packed_length

RANK = 64
MIX: dict[int, tuple[int, int, int, int]] = {
    2: (0, 0, 3, 9), 4: (0, 0, 6, 17), 6: (0, 1, 11, 19), 8: (0, 1, 17, 19), 12: (0, 3, 30, 16), 16: (0, 8, 40, 9),
    24: (0, 31, 27, 3), 32: (0, 64, 0, 0), 64: (64, 0, 0, 0),
}  # fmt: skip
"""Directions at 16, 8, 4 and 2 bits of every rung."""


def random_ladder(modules: Mapping[str, Module], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Ladder:
    """A ladder with the rungs of `MIX` on all `modules`, its directions on `device`; too small to overflow."""
    generator = torch.Generator(device).manual_seed(seed)

    def coded(width: int) -> Rows:
        parts: dict[str, Tensor] = {}
        for bits, plane in zip(CODED, PLANES, strict=True):
            shape = (RANK, packed_length(width, plane))
            parts[f"plane{bits}"] = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
            parts[f"scale{bits}"] = torch.full((RANK,), width**-0.5 / 8, dtype=torch.bfloat16, device=device)
        return Rows.of(width, parts, device)

    def exact(width: int) -> Rows:
        rows = torch.randn(RANK, width, device=device, generator=generator) * width**-0.5 / 8
        return wide_rows(rows.to(dtype))

    banks = tuple(
        {name: Directions(make(own.inputs), make(own.outputs)) for name, own in modules.items()}
        for make in (coded, exact)
    )
    edges = torch.tensor([MIX[rung] for rung in MIX]).cumsum(1)[:, None].repeat(1, len(modules), 1)
    return Ladder(
        MIXED, tuple(MIX), banks, (*(0 for _ in list(MIX)[:-1]), 1), edges, (1.0,) * len(MIX), f"random-{seed}"
    )

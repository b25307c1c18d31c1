"""Ladders of a 7B size without an adapter behind them: what a kernel reads, with random content.

How many directions a rung reads at which bits is that of a real ladder: the mean over the modules of `mixed` ladders
built from rank-64 adapters (`benchmarks/results/ladder-*.json` say how those were made). Speed depends on these numbers
and on no value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from runtime.engine.store import AdapterStore, Module, Table, packed_ladder
from runtime.ladder import Directions, Ladder
from runtime.ladder.banks import MIXED
from runtime.ladder.formats import BITS, CODED, PLANES, Rows, wide_rows
from runtime.ops.packed import ALIGNMENT, NUMBERS, ROWS, STARTS_A, STARTS_B
from runtime.packing import packed_length

RANK = 64
MIX: dict[int, tuple[int, int, int, int]] = {
    2: (0, 0, 3, 9), 4: (0, 0, 6, 17), 6: (0, 1, 11, 19), 8: (0, 1, 17, 19), 12: (0, 3, 30, 16), 16: (0, 8, 40, 9),
    24: (0, 31, 27, 3), 32: (0, 64, 0, 0), 64: (64, 0, 0, 0),
}  # fmt: skip
"""Directions at 16, 8, 4 and 2 bits of every rung."""


def read_bytes(modules: Collection[Module], dtype: torch.dtype) -> dict[int, int]:
    """By rung what a step reads of one row's adapter at these modules, from where the store keeps it.

    There directions at 8 bits lie in the model's dtype, as those at 16 bits do, so both count alike; at 4 and at 2 bits
    A' and B' share one float32 scale. What a rung costs by its ladder, and a policy by that, is `Ladder.rung_bytes`.
    """
    found = {}
    value_bits = [torch.finfo(dtype).bits if bits in NUMBERS else bits for bits in BITS]
    for rung, counts in MIX.items():
        bits = sum(count * own for count, own in zip(counts, value_bits, strict=True))
        scales = 4 * sum(counts[len(NUMBERS) :])
        found[rung] = sum(bits * (own.inputs + own.outputs) // 8 + scales for own in modules)
    return found


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


def fill(store: AdapterStore, ladder: Ladder, count: int) -> Ladder:
    """Put `count` adapters with the ladder's table into the store, each in bytes of its own; returns the ladder as it
    is remembered, its directions there by name alone.

    Codes of 4 and 2 bits are drawn anew for every one of them; scales, and what is read at 16 and 8 bits, which the
    store keeps as numbers, are the ladder's. The ladder is packed once, so that hundreds take seconds, and no more than
    what is resident of them is ever in memory.
    """
    table, blob = packed_ladder(ladder, store.modules, store.directions, store.dtype, store.device)
    # What a store remembers of a ladder lies on the host; here it need not lie anywhere.
    meta = torch.device("meta")
    banks = tuple({name: own.to(meta) for name, own in bank.items()} for bank in ladder.banks)
    named = replace(ladder, banks=banks, whole=ladder.sample())
    coded = _coded(table, store.modules, blob)
    generator = torch.Generator(store.device).manual_seed(1)
    for _ in range(count):
        drawn = torch.randint(0, 256, blob.shape, dtype=torch.uint8, device=store.device, generator=generator)
        store.put(named, table, torch.where(coded, drawn, blob))
    return named


def _coded(table: Table, modules: Mapping[str, Module], blob: Tensor) -> Tensor:
    """Which bytes of what `packed_ladder` has made are codes, bool like blob."""
    coded = torch.zeros_like(blob, dtype=torch.bool)
    for (_, name), row in table.items():
        own = modules[name]
        widths = {STARTS_A: own.inputs, STARTS_B: -(-own.outputs // own.columns) * own.columns}
        for first, width in widths.items():
            for f, bits in enumerate(BITS):
                if bits in NUMBERS:
                    continue
                start = row[first - STARTS_A + f] * ALIGNMENT
                coded[start : start + row[ROWS - STARTS_A + f] * width * bits // 8] = True
    return coded

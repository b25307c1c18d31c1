"""Ladders of linears of any widths, resident in a store, for tests of the kernels that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from runtime.engine.store import AdapterStore, Module, needed_bytes
from runtime.ladder import Adapter, Directions, Ladder, LoraFactors
from runtime.ladder.banks import MIXED
from runtime.ladder.factors import exact_bank
from runtime.ladder.formats import Rows, encode
from runtime.ops.packed import ALIGNMENT, SCALES, STARTS_A
from tests.runtime.reference import handmade_ladder

RANK = 12
"""Directions of the stores: more than the ladders have that `handmade_ladder` makes, and no power of two."""


def random_adapter(modules: Mapping[str, Module], rank: int, seed: int) -> Adapter:
    """Factors of every module, normal, exact in bfloat16 with their scale in them."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    factors = {
        name: LoraFactors(drawn(rank, own.inputs), drawn(own.outputs, rank), 0.125) for name, own in modules.items()
    }
    return Adapter(Path("random"), None, factors)


def mixed_ladder(modules: Mapping[str, Module], seed: int) -> Ladder:
    """A ladder whose rungs read directions at 16, 8, 4 and 2 bits at once, every module and rung another number."""
    adapter, generator = random_adapter(modules, RANK, seed), torch.Generator().manual_seed(seed)

    def rows(width: int) -> Rows:
        parts = encode(torch.randn(RANK, width, generator=generator)).parts()
        return Rows.of(width, parts | {"wide": torch.randn(8, width, generator=generator).bfloat16()})

    bank = {name: Directions(rows(own.inputs), rows(own.outputs)) for name, own in modules.items()}
    first = torch.tensor([(1, 2, 5, 7), (2, 3, 6, 8), (2, 4, 7, 9)])
    edges = torch.stack([first + m % 4 for m in range(len(modules))], 1)
    edges = torch.cat([edges, torch.full((1, len(modules), 4), RANK)])
    return Ladder(
        MIXED, (1, 2, 4, RANK), (bank, exact_bank(adapter)), (0, 0, 0, 1), edges, (1.1, 0.9, 1.05, 1.0), f"mixed-{seed}"
    )


def ladders_of(modules: Mapping[str, Module]) -> list[Ladder]:
    """Two that `handmade_ladder` makes, a mixed one, and one of which not all is resident."""
    handmade = [handmade_ladder(random_adapter(modules, 8, seed), seed) for seed in range(3)]
    return [handmade[0], handmade[1], mixed_ladder(modules, 3), handmade[2].up_to(handmade[2].rungs[3])]


def stored(
    ladders: Sequence[Ladder], modules: Mapping[str, Module], dtype: torch.dtype, device: torch.device
) -> AdapterStore:
    """A store of these ladders, one slot more than that, and NaN wherever nothing lies."""
    store = AdapterStore(
        modules, slots=len(ladders) + 1, capacity_bytes=needed_bytes(ladders, modules, RANK, dtype), rungs=6,
        directions=RANK, dtype=dtype, device=device,
    )  # fmt: skip
    store.arena.fill_(255)  # NaN in every float format
    for ladder in ladders:
        store.load(ladder)
    for own in store.tables.parts.flatten(0, 2):
        start = ALIGNMENT * int(own[SCALES - STARTS_A])
        scales = store.arena[start : start + 4 * 2 * RANK].view(torch.float32)
        if own.any():
            scales[scales == 0] = torch.nan  # of directions that no rung reads at a format
    return store


def factors(ladder: Ladder, name: str, rung: int) -> tuple[Tensor, Tensor]:
    """What a rung reads of a module, its scale left out: a [n, D] and b [n, N] float64."""
    a, b = ladder.update(name, rung, torch.float64)
    return a, b / ladder.scales[rung]

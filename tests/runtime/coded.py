"""A ladder in fewer bits, by hand: its directions are an `svd` ladder's, its table is drawn."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from policy.rungs import Rung
from runtime import Ladder, build_ladder
from runtime.ladder import Adapter, Bank, Directions
from runtime.ladder.banks import DISTILLED, MIXED
from runtime.ladder.formats import BITS, encode


def encoded(bank: Bank, factor: float = 1.0) -> dict[str, Directions]:
    """The 16-bit directions of a bank, times `factor`, in all planes."""
    return {
        name: Directions(*(encode(factor * half) for half in own.read(0, own.counts()[0], 16)))
        for name, own in bank.items()
    }


def narrow(adapter: Adapter) -> Adapter:
    """The same with factors in bfloat16."""
    factors = {n: replace(f, a=f.a.bfloat16(), b=f.b.bfloat16()) for n, f in adapter.modules.items()}
    return replace(adapter, modules=factors)


def drawn_edges(ladder: Ladder, rungs: int, seed: int = 0) -> Tensor:
    """[rungs, M, F] of which none falls: directions at 8, 4, 2 or no bits, other ones in every module; the last reads
    everything at 8."""
    whole = ladder.edges[-1]
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(rungs, len(whole), len(BITS), generator=generator).sort(0).values.sort(2).values
    edges = (shares * (whole + 1)).long()
    edges[-1] = whole
    edges[..., 0] = 0
    return edges


def coded_ladder(adapter: Adapter, rungs: tuple[Rung, ...] = (0.5, 1, 2, 4), seed: int = 0) -> Ladder:
    """A `mixed` ladder of an adapter: `rungs` below it, by names that say little of their bytes, each with a scale."""
    svd = build_ladder(adapter, ())
    bank, exact = svd.banks
    edges = torch.cat([drawn_edges(svd, len(rungs), seed), svd.edges])
    scales = (*(1.0 + 0.03 * (len(rungs) - j) for j in range(len(rungs))), 1.0)
    return replace(
        svd, kind=MIXED, rungs=(*rungs, adapter.rank), banks=(encoded(bank), exact), edges=edges, scales=scales,
        bank_of=(*(0 for _ in rungs), 1),
    )  # fmt: skip


def two_bank_ladder(adapter: Adapter, rungs: tuple[Rung, ...] = (0.5, 1, 2, 4), seed: int = 0) -> Ladder:
    """The same as a `distilled` one: its lower half reads directions of its own, which are a little longer."""
    ladder = coded_ladder(adapter, rungs, seed)
    low = len(rungs) // 2
    longer = encoded(build_ladder(adapter, ()).banks[0], 1.05)
    counts = ladder.edges[low - 1].tolist()
    kept = {name: d.keep(n) for (name, d), n in zip(longer.items(), counts, strict=True)}
    return replace(
        ladder, kind=DISTILLED, banks=(kept, *ladder.banks),
        bank_of=(*(0 for _ in range(low)), *(1 for _ in range(low, len(rungs))), 2),
    )  # fmt: skip

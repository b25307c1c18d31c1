"""An adapter and a few texts -> its ladder, of the kind asked for.

svd      the adapter's singular directions, 16 bits, the same rank in every module; needs no text
ranked   16 bits, the directions of all modules by effect per byte
mixed    the same directions in 8, 4, 2 or no bits, by effect per byte
distilled  `mixed`, its lower rungs then trained (see `distil`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.rungs import Rung, checked_rungs, rungs_of_rank
from runtime.fingerprint import adapter_fingerprint
from runtime.ladder import Adapter, Bank, Directions, Ladder, build_ladder
from runtime.ladder.factors import MIXED, RANKED, SVD, exact_bank, svd_rows
from runtime.ladder.formats import BITS, CODED, encode, wide_rows

from ..documents import Example
from .allocate import HALF, allocate, order_of
from .effects import enough, measure_effects
from .quality import Candidate, measure
from .updates import Pair

EFFECT_TOKENS, SCALE_TOKENS = 8192, 2048
"""Completion tokens that effects are measured on, and scales calibrated on."""
TEXT_PER_COMPLETION = 8
"""Where completions are short, no more than this many times as much text is read for them."""
SCALES = (1.0, 1.06, 1.12)
"""Where a rung's KL is measured to find its best scale, by the parabola through these."""
LEAST_SCALE, MOST_SCALE = 0.94, 1.18

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """An adapter's singular directions in the order of their effect, by module."""

    pairs: Mapping[str, Pair]
    """a [R, d_in], b [R, d_out] float32"""
    effects: Mapping[str, Tensor]
    """[R] float64, falling"""


def build(
    kind: str, adapter: Adapter, model: PreTrainedModel, documents: Sequence[Example],
    rungs: Sequence[Rung] | None = None, *, seed: int = 0, say: Say | None = None,
) -> Ladder:  # fmt: skip
    """The `svd`, `ranked` or `mixed` ladder of `adapter`, with `rungs` (default: by share) and the exact one on top.

    Effects are measured on the first documents, until they have `EFFECT_TOKENS` completion tokens, and the scales of
    the rungs calibrated on the first, until they have `SCALE_TOKENS`.
    Raises ValueError for rungs that the kind cannot have, and what `measure_effects` raises.
    """
    if kind == SVD:
        return build_ladder(adapter, rungs)
    found = adapter_directions(adapter, model, documents, seed=seed)
    if say is not None:
        say(f"effects of {sum(len(e) for e in found.effects.values())} directions measured")
    wanted = ranked_ladder(adapter, found, rungs) if kind == RANKED else None
    ladder = wanted or mixed_ladder(adapter, found, rungs, model.device)
    return calibrated(ladder, model, documents)


def adapter_directions(
    adapter: Adapter, model: PreTrainedModel, documents: Sequence[Example], *, seed: int
) -> Measured:
    """Factor an adapter and measure what its directions do on `documents`."""
    pairs = {name: svd_rows(name, own, adapter) for name, own in adapter.modules.items()}
    exact = {name: (own.a.float(), own.scale * own.b.float().T) for name, own in adapter.modules.items()}
    chosen = enough(documents, EFFECT_TOKENS, EFFECT_TOKENS * TEXT_PER_COMPLETION)
    effects = measure_effects(model, exact, pairs, chosen, seed=seed)
    order = order_of(effects)
    return Measured(
        {name: (a[order[name]].contiguous(), b[order[name]].contiguous()) for name, (a, b) in pairs.items()},
        {name: own[order[name]] for name, own in effects.items()},
    )


def mixed_ladder(
    adapter: Adapter, measured: Measured, rungs: Sequence[Rung] | None = None, device: torch.device | None = None
) -> Ladder:
    """Directions in 8, 4, 2 or no bits, written on `device` and held on the CPU.

    Raises ValueError for a rung between a half of the adapter and all of it.
    """
    here, there = torch.device("cpu"), device
    bank = {
        name: Directions(*(encode(half.to(there or here)).to(here) for half in pair))
        for name, pair in measured.pairs.items()
    }
    return _ladder(MIXED, adapter, measured, bank, rungs, CODED)


def ranked_ladder(adapter: Adapter, measured: Measured, rungs: Sequence[Rung] | None = None) -> Ladder:
    """Directions of all modules at 16 bits or not at all."""
    bank = {
        name: Directions(*(wide_rows(half.to(adapter.modules[name].a.dtype)) for half in pair))
        for name, pair in measured.pairs.items()
    }
    return _ladder(RANKED, adapter, measured, bank, rungs, (16,))


def _ladder(
    kind: str, adapter: Adapter, measured: Measured, bank: Bank, rungs: Sequence[Rung] | None, formats: Sequence[int]
) -> Ladder:
    top = adapter.rank
    wanted = rungs_of_rank(top) if rungs is None else checked_rungs(sorted({*rungs, top}))
    if wanted[-1] > top:
        raise ValueError(f"rungs: expected ranks up to the adapter's {top}, got {wanted[-1]}; leave it out")
    widths = {name: (own.a.width, own.b.width) for name, own in bank.items()}
    lower = wanted[:-1]
    exact = exact_bank(adapter)
    whole = torch.tensor([len(own.a.wide) for own in exact.values()])[:, None].expand(-1, len(BITS))
    edges = torch.cat(
        [allocate(measured.effects, widths, [rung / top for rung in lower], formats), whole[None]]
        if lower
        else [whole[None]]
    )
    bank_of = (*(0 for _ in lower), 1)
    return Ladder(
        kind, wanted, (bank, exact), bank_of, edges, (1.0,) * len(wanted), adapter_fingerprint(adapter),
        adapter.base_model,
    )  # fmt: skip


def calibrated(ladder: Ladder, model: PreTrainedModel, documents: Sequence[Example]) -> Ladder:
    """The ladder with the scale of least KL at every rung below a half, by a parabola through `SCALES`."""
    rungs = [j for j, rung in enumerate(ladder.rungs[:-1]) if 0 < rung < HALF * ladder.rungs[-1]]
    some = enough(documents, SCALE_TOKENS, SCALE_TOKENS * TEXT_PER_COMPLETION)
    candidates = [
        Candidate(f"{ladder.rungs[j]} x {scale}", pairs_of(ladder, j, scale)) for j in rungs for scale in SCALES
    ]
    found = measure(model, exact_pairs(ladder), candidates, some, name="scales")
    kls = torch.tensor([own.kl for own in found]).view(len(rungs), len(SCALES))
    scales = list(ladder.scales)
    for j, own in zip(rungs, kls, strict=True):
        scales[j] = ladder.scales[j] * lowest(own)
    return replace(ladder, scales=tuple(scales))


def lowest(kl: Tensor) -> float:
    """Where the parabola through kl [3] at `SCALES` is lowest, within the range allowed; the best of the three where it
    has no lowest point."""
    x = torch.tensor(SCALES, dtype=torch.float64)
    c = torch.linalg.solve(torch.stack([x**2, x, torch.ones(3)], 1), kl.double())
    best = float(-c[1] / (2 * c[0])) if float(c[0]) > 0 else float(x[kl.argmin()])
    return min(max(best, LEAST_SCALE), MOST_SCALE)


def pairs_of(ladder: Ladder, rung: int, scale: float = 1.0) -> Callable[[], dict[str, Pair]]:
    """What the rung of this index is, decoded when asked for."""

    def decoded() -> dict[str, Pair]:
        found = {}
        for name in ladder.modules:
            a, b = ladder.update(name, rung)
            found[name] = (a, scale * b)
        return found

    return decoded


def exact_pairs(ladder: Ladder) -> dict[str, Pair]:
    """The adapter's own factors by module."""
    return pairs_of(ladder, len(ladder.rungs) - 1)()

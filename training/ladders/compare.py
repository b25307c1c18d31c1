"""A ladder beside what others make of the same adapter: truncated, rounded, LoRAQuant, each at its own bytes.

Every baseline is held against a `mixed` rung of as many bytes, allocated for the comparison, so that nothing is
interpolated; one of more than half the adapter's against everything at 8 bits, which is fewer.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from policy.files import write_whole
from runtime.ladder import Adapter, Ladder, build_ladder

from ..documents import Example
from .allocate import HALF
from .baselines import Compressed, converted, loraquant, uniform
from .build import Measured, exact_pairs, mixed_ladder, pairs_of
from .quality import Candidate, Quality, measure
from .updates import Pair

LORAQUANT = ((2, 0.8), (2, 0.9), (3, 0.9))
"""Bits of the leading part, and its share of the energy."""
INTEGERS = (8, 4, 3)
CONVERTED_SHARE = 4
"""PEFT's conversion is the same truncation as `svd`, by a dense SVD; one rank shows it."""
STYLES = {
    "svd": ("svd ladder", "#d55e00", "X"), "mixed": ("mixed ladder", "#0072b2", "o"),
    "ranked": ("ranked ladder", "#e69f00", "s"), "distilled": ("distilled ladder", "#000000", "D"),
    "int": ("uniform rounding", "#999999", "v"), "loraquant": ("LoRAQuant", "#cc79a7", "P"),
    "convert_to_lora": ("PEFT convert_to_lora", "#009e73", "^"),
}  # fmt: skip


@dataclass(frozen=True)
class Against:
    """A baseline, and the `mixed` rung of its bytes."""

    baseline: Quality
    mixed: Quality


@dataclass(frozen=True)
class LadderComparison:
    """What everything loses on the held-out documents."""

    ladders: Mapping[str, Sequence[Quality]]
    """By kind, the rungs below the exact one, ascending."""
    against: Sequence[Against]


def rung_candidates(ladder: Ladder, rungs: Sequence[int] | None = None) -> list[Candidate]:
    """The rungs of a ladder (default: all) as candidates."""
    chosen = range(len(ladder.rungs)) if rungs is None else rungs
    amounts = ladder.rung_bytes().tolist()
    return [Candidate(f"{ladder.kind} {ladder.rungs[j]:g}", pairs_of(ladder, j), amounts[j]) for j in chosen]


def compare(
    ladder: Ladder, adapter: Adapter, measured: Measured | None, model: PreTrainedModel, documents: Sequence[Example],
    peft: Any | None = None,
) -> LadderComparison:  # fmt: skip
    """Measure `ladder`, the `svd` ladder and all baselines on `documents`.

    `measured` are the directions with their effects; without them (an `svd` ladder) no baseline is held against a rung.
    `peft` is the library, where it is installed.
    """
    svd = build_ladder(adapter)
    ladders = {svd.kind: svd, ladder.kind: ladder}
    if measured is not None and "mixed" not in ladders:
        lower = [rung for rung in ladder.rungs if rung <= HALF * adapter.rank]
        ladders["mixed"] = mixed_ladder(adapter, measured, lower, model.device)
    whole = float(svd.rung_bytes()[-1])
    found: list[Candidate] = []
    places: dict[str, slice] = {}
    for kind, own in ladders.items():
        candidates = rung_candidates(own, range(len(own.rungs) - 1))
        places[kind] = slice(len(found), len(found) + len(candidates))
        found += candidates
    pairs: list[tuple[int, int]] = []
    for baseline in baselines(adapter, model, peft):
        found.append(Candidate(baseline.name, functools.partial(_decoded, baseline), baseline.bytes))
        if measured is not None:
            rung = min(baseline.bytes / whole, HALF) * adapter.rank
            equal = mixed_ladder(adapter, measured, [rung], model.device)
            found.append(Candidate(f"mixed at {baseline.name}", pairs_of(equal, 0), float(equal.rung_bytes()[0])))
            pairs.append((len(found) - 2, len(found) - 1))
    quality = measure(model, exact_pairs(svd), found, documents, name="comparison")
    return LadderComparison(
        {kind: quality[place] for kind, place in places.items()},
        [Against(quality[i], quality[j]) for i, j in pairs],
    )


def _decoded(compressed: Compressed) -> Mapping[str, Pair]:
    return compressed.modules


def baselines(adapter: Adapter, model: PreTrainedModel, peft: Any | None) -> list[Compressed]:
    """Everything that is not a ladder, built."""
    found = [uniform(adapter, bits) for bits in INTEGERS]
    found += [loraquant(adapter, energy=energy, high_bits=bits) for bits, energy in LORAQUANT]
    rank = adapter.rank // CONVERTED_SHARE
    if peft is not None and rank > 0:
        found.append(converted(model, adapter.path, rank, peft=peft))
    return found


def write_comparison(comparison: LadderComparison, title: str, folder: Path) -> None:
    """Write `compare.json` and `ladder.png` into `folder`."""
    record = {
        "ladders": {kind: [asdict(own) for own in rungs] for kind, rungs in comparison.ladders.items()},
        "against": [{"baseline": asdict(own.baseline), "mixed": asdict(own.mixed)} for own in comparison.against],
    }
    write_whole(folder / "compare.json", (json.dumps(record, indent=2) + "\n").encode())
    image = io.BytesIO()
    ladder_figure(comparison, title).savefig(image, format="png")
    write_whole(folder / "ladder.png", image.getvalue())


def ladder_figure(comparison: LadderComparison, title: str) -> Figure:
    """KL over bytes, both logarithmic: a line per ladder, a mark per baseline."""
    figure = Figure(figsize=(8.0, 5.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind, rungs in comparison.ladders.items():
        label, color, marker = STYLES[kind]
        shown = [own for own in rungs if own.kl > 0 and own.bytes > 0]
        axes.plot([q.bytes for q in shown], [q.kl for q in shown], color=color, marker=marker, label=label, lw=2)
    named: set[str] = set()
    for own in comparison.against:
        label, color, marker = next(style for name, style in STYLES.items() if own.baseline.name.startswith(name))
        axes.plot(
            [own.baseline.bytes], [own.baseline.kl], color=color, marker=marker, ls="", ms=9,
            label=None if label in named else label,
        )  # fmt: skip
        named.add(label)
    axes.set(xscale="log", yscale="log", xlabel="bytes of the adapter", ylabel="KL to the exact adapter, nats a token")
    axes.grid(True, which="major", alpha=0.3)
    axes.set_title(title, fontsize=14, loc="left")
    axes.legend(frameon=False)
    return figure

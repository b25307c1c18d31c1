"""What deciding is worth: time with the controller against time without, and the bytes between them.

controller  exact, deciding, less exact: the same bytes, so the difference is the controller
net         exact less the trace: what is left of the bytes saved, the controller's own cost taken off
uniform     the trace less the rung that it is around: about the same bytes, so what moving between rungs costs

And what a rung is worth: of the time that its bytes less would take, how much comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .ladders import RANK
from .opponents import GRAPH

COLUMNS = ("controller off -> on", "exact", "deciding", "net ms", "saved GB", "= ms", "controller", "against uniform")

RETURNED = ("of the bytes saved come back", "this engine", GRAPH, "over no adapter")


def net(records: Sequence[dict[str, Any]], bandwidth: float) -> list[dict[str, Any]]:
    """Of every case with a trace what it saves, bandwidth in bytes a second.

    Of the same rows and adapters there are an exact case with and without controller, and one at the trace's rung.
    """
    found = []
    for own in records:
        if "trace" not in own:
            continue
        alike = [other for other in records if _rows(other) == _rows(own) and "trace" not in other]
        by = {(other["rung"], other["controller"]): other for other in alike}
        exact, idle, uniform = by[RANK, False], by[RANK, True], by[own["rung"], False]
        saved = exact["bytes"] - own["bytes"]
        found.append(
            {
                "batch": own["batch"], "context": own["context"], "rung": own["rung"],
                "mean_rank": own["trace"]["mean_rank"], "exact_ms": exact["ms_per_step"],
                "deciding_ms": own["ms_per_step"], "net_ms": exact["ms_per_step"] - own["ms_per_step"],
                "saved_bytes": saved, "saved_ms_at_bandwidth": 1000 * saved / bandwidth,
                "controller_ms": idle["ms_per_step"] - exact["ms_per_step"], "uniform_ms": uniform["ms_per_step"],
                "against_uniform_ms": own["ms_per_step"] - uniform["ms_per_step"],
                "against_uniform_bytes": own["bytes"] - uniform["bytes"],
            }
        )  # fmt: skip
    return found


def rows_of(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lines for people."""
    return [
        [
            f"{own['batch']} row{'s' * (own['batch'] > 1)}, trace around rung {own['rung']}",
            f"{own['exact_ms']:.3f}", f"{own['deciding_ms']:.3f}", f"{own['net_ms']:+.3f}",
            f"{own['saved_bytes'] / 1e9:.2f}", f"{own['saved_ms_at_bandwidth']:.3f}", f"{own['controller_ms']:+.3f}",
            f"{own['against_uniform_ms']:+.3f}",
        ]
        for own in found
    ]  # fmt: skip


def _rows(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["batch"], record["context"], record["adapters"], record.get("resident_rung"), record["kv"]


def returned(records: Sequence[dict[str, Any]], bandwidth: float) -> list[list[str]]:
    """Lines for people: of every case at a rung below the exact one what comes back of the bytes it saves, ours and
    plain PyTorch's where that was timed, and what it takes over rows without adapters; bandwidth in bytes a second.

    Plain PyTorch's adapters are of the rung's rank in 16 bits, and so is what they save.
    """
    lines = []
    for own in records:
        if own["rung"] in (None, RANK) or "resident_rung" in own:
            continue
        exact = next(other for other in records if _rows(other) == _rows(own) and other["rung"] == RANK)
        none = next(other for other in records if _batch(other) == _batch(own) and other["rung"] is None)
        would = 1000 * (exact["bytes"] - own["bytes"]) / bandwidth
        peers = 1000 * (1 - own["rung"] / RANK) * (exact["bytes"] - none["bytes"]) / bandwidth
        both = [(other["peer"] or {}).get(GRAPH, {}).get("ms_per_step") for other in (exact, own)]
        lines.append(
            [
                own["name"], _percent((exact["ms_per_step"] - own["ms_per_step"]) / would),
                "" if None in both else _percent((both[0] - both[1]) / peers),
                f"{own['ms_per_step'] / none['ms_per_step'] - 1:.1%}",
            ]
        )  # fmt: skip
    return lines


def _percent(share: float) -> str:
    """Whole per cent; next to nothing has no sign."""
    return f"{round(share, 2) + 0.0:.0%}"


def _batch(record: dict[str, Any]) -> tuple[int, int]:
    return record["batch"], record["context"]

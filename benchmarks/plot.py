"""Draws a record of `benchmarks.decode`: of every case its milliseconds a step, the floor of bytes, and its peers.

Ours is a bar, the floor a line across it: what is seen beyond the line is what is left to gain. Peers are marks on
the same line; those far beyond the rest stand at the edge with their figure. Colours are read on white and on black,
and the background is the page's.

    python -m benchmarks.plot                                  # the newest record of every shape -> docs/decode.svg
    python -m benchmarks.plot --record R.json --output R.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from runtime.command import one_line_errors

from .opponents import EAGER, GRAPH, GRAPH_COMPILED, PEFT_EAGER, PEFT_STATIC, STATIC
from .printing import RESULTS, parse, result_path
from .records import load_record, newest

DEFAULT = Path(__file__).parent.parent / "docs" / "decode.svg"
GREY = "#808790"
"""Of text and lines: at least 3.6 to one against white and against black."""
OURS, DECIDING, FLOOR = "#2f81d6", "#7ab3ea", "#e69f00"
# Okabe and Ito's colours, without those that vanish on white or on black; marks differ as well.
MARKS = {
    GRAPH: ("o", "#d55e00"), GRAPH_COMPILED: ("D", "#009e73"), EAGER: ("v", "#cc79a7"), STATIC: ("s", "#cc79a7"),
    PEFT_EAGER: ("^", "#b8860b"), PEFT_STATIC: ("P", "#b8860b"),
}  # fmt: skip
OTHER = ("x", GREY)
FAR = 1.25
"""The axis reaches so far beyond what is longest of ours, and to plain PyTorch in a graph."""


def groups(record: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Cases of the same rows and context, in the order of the record."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for case in record["cases"]:
        found.setdefault((case["batch"], case["context"]), []).append(case)
    return list(found.values())


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """A column for each record, under its shape and device; in it a panel for each batch."""
    columns = [groups(record) for record in records]
    heights = [[len(cases) + 1.6 for cases in column] for column in columns]
    tallest = max(sum(column) for column in heights)
    made = Figure(figsize=(9 * len(records), 0.3 * tallest + 1.1), layout="constrained")
    parts = made.subfigures(1, len(records), squeeze=False)[0]
    shown: set[str] = set()
    for part, record, column, own in zip(parts, records, columns, heights, strict=True):
        part.patch.set_alpha(0)
        title = (
            f"{record['shape']}, bf16, {record['device']}: milliseconds a step ({record['read_tb_s']:.2f} TB/s read)"
        )
        part.suptitle(title, color=GREY, fontsize=10)
        panels = part.subplots(len(column), 1, squeeze=False, gridspec_kw={"height_ratios": own})[:, 0]
        for axes, cases in zip(panels, column, strict=True):
            shown |= _panel(axes, cases)
    handles: list[Any] = [Patch(color=OURS, label="this engine"), Patch(color=DECIDING, label="deciding"),
                          Line2D([], [], color=FLOOR, lw=2.5, label="floor of bytes")]  # fmt: skip
    for name in sorted(shown, key=lambda name: ([*MARKS, name].index(name), name)):
        mark, color = MARKS.get(name, OTHER)
        handles.append(Line2D([], [], marker=mark, color=color, ls="", label=name))
    made.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, labelcolor=GREY, fontsize=8)
    made.patch.set_alpha(0)
    return made


def _panel(axes: Axes, cases: Sequence[dict[str, Any]]) -> set[str]:
    """Draw cases of one batch; returns the names of the peers that are there."""
    near = [case["ms_per_step"] for case in cases]
    near += [own for case in cases for name, own in _peers(case) if name == GRAPH]
    edge = FAR * max(case["ms_per_step"] for case in cases)
    edge, shown = max(edge, 1.05 * max(near)), set()
    for line, case in enumerate(cases):
        ours = case["ms_per_step"]
        axes.barh(line, ours, height=0.66, color=DECIDING if case["controller"] else OURS, zorder=2)
        axes.plot([case["floor_ms"]] * 2, [line - 0.42, line + 0.42], color=FLOOR, lw=2.5, zorder=3)
        axes.text(ours, line, f" {ours:.2f}", va="center", ha="left", color=GREY, fontsize=7.5, zorder=4)
        for name, own in _peers(case):
            mark, color = MARKS.get(name, OTHER)
            axes.plot(min(own, edge), line, marker=mark, color=color, ms=6, zorder=5, clip_on=False)
            shown.add(name)
        far = [f"{own:.1f}" for _, own in sorted(_peers(case), key=lambda peer: peer[1]) if own > edge]
        if far:
            axes.text(1.02 * edge, line, ", ".join(far), va="center", ha="left", color=GREY, fontsize=7.5)
    axes.set_xlim(0, edge)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_yticks(range(len(cases)), [case["name"] for case in cases], fontsize=8)
    rows = cases[0]["batch"]
    axes.set_title(f"{rows} row{'s' * (rows > 1)}, context {cases[0]['context']}", color=GREY, fontsize=9, loc="left")
    axes.tick_params(colors=GREY, labelsize=8)
    axes.grid(axis="x", color=GREY, alpha=0.25, zorder=0)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(GREY)
    return shown


def _peers(case: dict[str, Any]) -> list[tuple[str, float]]:
    """(name, milliseconds) of the peers that could be timed."""
    return [(name, own["ms_per_step"]) for name, own in (case["peer"] or {}).items() if "ms_per_step" in own]


def save(made: Figure, path: Path) -> None:
    """Write it as SVG, the same bytes for the same figure; letters stay letters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "decode", "font.family": "sans-serif"}):
        FigureCanvasSVG(made).print_svg(path, metadata={"Date": None})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description="Draws records of benchmarks.decode."
    )
    parser.add_argument(
        "--record", nargs="+", help="records (default: the newest of every shape in benchmarks/results)"
    )
    parser.add_argument("--output", help="SVG file (default: docs/decode.svg)")
    return parse(parser, {})


def main() -> None:
    with one_line_errors():
        args = arguments()
        path = result_path(args.output or DEFAULT, "")
        records = [load_record(own) for own in (map(Path, args.record) if args.record else newest(RESULTS))]
        save(figure(records), path)
        print(path)


if __name__ == "__main__":
    main()

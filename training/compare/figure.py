"""The trade-off as one picture: what every policy loses at its mean rank, and that loss against the fixed rungs'.

Beside the policies, left, the fixed rungs of plain truncation: what the ladder is worth.

Left, KL over mean rank as measured; both policies of a close race are seen, because the exported one is a broad line
below the others' thin ones. Right, what the left side is too coarse for: how far every policy is from the fixed rungs
at equal rank, with intervals. That axis is linear for a few per cent and logarithmic beyond, so that a close race and a
baseline that loses half as much again fit one panel.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation


@dataclass(frozen=True)
class Style:
    """How a policy is named and drawn."""

    label: str
    color: str
    marker: str
    knob: str
    """What tables call its knob; empty where it has none."""


# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well.
STYLE = {
    "fixed": Style("fixed rungs", "#000000", "o", "rung"),
    "percentile": Style("percentile thresholds", "#e69f00", "s", "centre"),
    "learned": Style("learned", "#0072b2", "D", "log_lambda"),
    "capped": Style("learned, budget kept", "#cc79a7", "P", "log_lambda"),
    "random": Style("random", "#999999", "v", "centre"),
    "oracle": Style("oracle", "#009e73", "^", ""),
    "svd": Style("svd ladder, fixed rungs", "#d55e00", "X", "rung"),
}
"""Every policy that is shown, by its name; one more is one more entry."""

PERCENT_TICKS = (0, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LINEAR_PERCENT = 4.0
"""Up to about this far from the fixed rungs the right panel is linear."""
LEAST_PERCENT = 2.5
"""The right panel reaches at least this far, so that it has a scale where nothing differs."""
BESIDE_POINTS = 4.5
"""What is read at the same rank is drawn this far beside each other."""
TITLE_LETTERS = 88


def tradeoff_figure(summary: dict[str, Any], run: str) -> Figure:
    """Both panels under the verdict's sentence; all of it is in `summary`, but for the name of the run."""
    # TensorBoard shows it at less than half its size, pixel by pixel: few inches, large letters, broad lines.
    figure = Figure(figsize=(10.0, 5.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    kl, ratio = figure.subplots(1, 2, sharex=True)
    exported, over_fixed, compared = summary["exported"], summary["over_fixed"], summary["compared_at"]
    for axes in (kl, ratio):
        _frame(axes, over_fixed["mean_rank"])
    _draw_kl(kl, summary["curves"], exported)
    _draw_ratio(ratio, over_fixed, exported)
    # What is in brackets stays together.
    sentence = re.sub(r"\(.*?\)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), summary["verdict"])
    figure.suptitle(textwrap.fill(sentence, TITLE_LETTERS), fontsize=15.5, x=0.01, ha="left")
    read = f", compared at {', '.join(map(str, compared))}" if compared else ""
    figure.supxlabel(
        f"mean rank over scored tokens{read} ({run}, {summary['documents']['test']} documents)", fontsize=14
    )
    return figure


def latency_figure(summary: dict[str, Any], run: str) -> Figure | None:
    """KL over the milliseconds of a step, policy by policy; None where the clock does not tell the rungs apart."""
    latency = summary["latency"]
    if not latency["resolved"]:
        return None
    figure = Figure(figsize=(10.0, 5.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    timed = {name: rows for name, rows in summary["curves"].items() if all("latency_ms" in row for row in rows)}
    _draw_kl(axes, timed, summary["exported"], "latency_ms")
    ends = {latency["ms_base"]: "no adapter", latency["ms"][-1]: "exact"}
    for ms, name in ends.items():
        axes.axvline(ms, color="#999999", linewidth=1.5, linestyle=":")
        axes.annotate(f" {name}", (ms, 1), xycoords=("data", "axes fraction"), fontsize=13, va="top")
    _plain(axes)
    batch, deciding = latency["batch"], latency["controller_ms"]
    rows = "one row of the reference path" if batch is None else f"batch {batch}"
    beside = "" if deciding is None else f"; deciding adds {deciding:.3f}"
    figure.supxlabel(
        f"milliseconds a step, mean over scored tokens ({run}, {latency['device']}, {rows}{beside})", fontsize=14
    )
    return figure


def _draw_kl(axes: Axes, curves: dict[str, list[dict[str, Any]]], exported: str, over: str = "mean_rank") -> None:
    for place, (name, rows) in enumerate(curves.items()):
        points = sorted((row[over], row["kl"]) for row in rows)
        if not points:
            continue
        spent, kls = zip(*points, strict=True)
        label = STYLE[name].label + (" (exported)" if name == exported else "")
        axes.plot(spent, kls, label=label, **_line(name, exported, len(curves) - 1 - place))
    if any(row["kl"] > 0 for rows in curves.values() for row in rows):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title("KL to full rank, nats per token", fontsize=14, loc="left")
    legend = axes.legend(frameon=False, fontsize=13, handlelength=1.6, labelspacing=0.25, loc="lower left")
    for text, name in zip(legend.get_texts(), (name for name, rows in curves.items() if rows), strict=True):
        text.set_fontweight("bold" if name == exported else "normal")


def _draw_ratio(axes: Axes, over_fixed: dict[str, Any], exported: str) -> None:
    every = over_fixed["at_rank"]
    axes.set_yscale("asinh", linear_width=LINEAR_PERCENT)
    for place, (name, ratios) in enumerate(every.items()):
        there = [(rank, r) for rank, r in zip(over_fixed["mean_rank"], ratios, strict=True) if r is not None]
        ranks = [rank for rank, _ in there]
        style = _line(name, exported, 0)
        points = 0.0 if name == "fixed" else BESIDE_POINTS * (place - len(every) / 2)
        beside = axes.transData + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
        axes.plot(ranks, [_percent(r["ratio"]) for _, r in there], transform=beside, **style)
        low, high = ([_percent(r["interval_95"][end]) for _, r in there] for end in (0, 1))
        bars = {"color": style["color"], "linewidth": 2.5, "zorder": style["zorder"]}
        axes.vlines(ranks, low, high, transform=beside, **bars)
        axes.update_datalim([*zip(ranks, low, strict=True), *zip(ranks, high, strict=True)])
    axes.update_datalim([(over_fixed["mean_rank"][0], end) for end in (-LEAST_PERCENT, LEAST_PERCENT)])
    axes.autoscale_view()
    bottom, top = axes.get_ylim()
    axes.set_yticks([tick for tick in sorted({*PERCENT_TICKS, *(-t for t in PERCENT_TICKS)}) if bottom <= tick <= top])
    axes.yaxis.set_major_formatter(lambda percent, _: f"{percent:+.0f} %" if percent else "fixed")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title("KL against fixed rungs, 95 % intervals", fontsize=14, loc="left")


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def _line(name: str, exported: str, later: int) -> dict[str, Any]:
    """The exported policy is a broad line under the others, whose marks are open.

    `later` is how many are drawn on the same spots after it: their marks are smaller, so that none hides another.
    """
    style = STYLE[name]
    own = {"color": style.color, "marker": style.marker}
    if name == exported:
        return {**own, "linewidth": 6, "markersize": 11, "zorder": 2}
    size = 7 + 2 * later
    return {**own, "linewidth": 2, "markersize": size, "markerfacecolor": "none", "markeredgewidth": 2, "zorder": 3}


def _frame(axes: Axes, ranks: list[float]) -> None:
    # The square root of the rank: small rungs stay apart, a rung of 0 has its place, and margins left of it.
    axes.set_xscale("function", functions=(lambda rank: np.sign(rank) * np.sqrt(np.abs(rank)), lambda x: x * np.abs(x)))
    axes.set_xticks(ranks, [f"{rank:.0f}" if rank >= 10 else f"{rank:.2g}" for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=14)
    axes.grid(True, color="#e6e6e6")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

"""What a fit leaves behind for people: the figure, the table, the summary, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .files import write_whole

STYLE: dict[str, dict[str, Any]] = {
    "fixed": {"color": "#444444", "marker": "o", "label": "fixed rung"},
    "percentile": {"color": "#d98c1f", "marker": "s", "label": "percentile thresholds"},
    "random": {"color": "#b5b5b5", "marker": "x", "label": "random in the same band"},
    "learned": {"color": "#1f6fd9", "marker": "D", "label": "learned"},
    "oracle": {"color": "#2f9e5b", "marker": "^", "label": "oracle"},
}


def tradeoff_figure(curves: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """KL over mean rank for every policy; both axes are what was measured on held-out documents."""
    figure = Figure(figsize=(7.2, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, rows in curves.items():
        points = sorted((row["mean_rank"], row["kl"]) for row in rows)
        ranks, kls = zip(*points, strict=True)
        axes.plot(ranks, kls, markersize=5, linewidth=1.4, **STYLE[name])
    axes.set_xlabel("mean rank, byte-weighted, over scored tokens")
    axes.set_ylabel("KL to full rank, nats per completion token")
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="major", color="#e6e6e6")
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def write_report(output: Path, summary: dict[str, Any]) -> Figure:
    """Write `tradeoff.csv`, `tradeoff.png` and, last, `summary.json`; return the figure."""
    curves = summary["curves"]
    write_whole(output / "tradeoff.csv", _csv(curves).encode())
    verdict = f"exported: {summary['exported']}, captured {summary['captured']['share']:.0%} of the headroom"
    figure = tradeoff_figure(curves, verdict)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(output / "tradeoff.png", image.getvalue())
    write_whole(output / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    return figure


def log_report(logger: TensorBoardLogger, figure: Figure, summary: dict[str, Any], params: dict[str, Any]) -> None:
    """The figure, one scalar line per policy (KL over hundredths of mean rank) and the HParams row of this run."""
    writer = logger.experiment
    writer.add_figure("tradeoff", figure, close=False)
    for name, rows in summary["curves"].items():
        for row in sorted(rows, key=lambda row: row["mean_rank"]):
            writer.add_scalar(f"tradeoff/{name}_kl", row["kl"], round(100 * row["mean_rank"]))
    metrics = {"hp/quality": summary["operating_point"]["kl"], "hp/latency": summary["operating_point"]["latency_ms"]}
    logger.log_hyperparams(params, metrics)
    logger.finalize("success")


def _csv(curves: dict[str, list[dict[str, Any]]]) -> str:
    rows = [{"policy": name, **row} for name, points in curves.items() for row in points]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

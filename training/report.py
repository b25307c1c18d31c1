"""What a fit leaves behind for people: the figure, the table, the summary, TensorBoard."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
    _replace(output / "tradeoff.csv", lambda path: _write_csv(path, curves))
    verdict = f"exported: {summary['exported']}, captured {summary['captured']['share']:.0%} of the headroom"
    figure = tradeoff_figure(curves, verdict)
    _replace(output / "tradeoff.png", lambda path: figure.savefig(path, format="png"))
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    _replace(output / "summary.json", lambda path: path.write_text(text))
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


def _write_csv(path: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    rows = [{"policy": name, **row} for name, points in curves.items() for row in points]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _replace(path: Path, write: Any) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    write(scratch)
    os.replace(scratch, path)

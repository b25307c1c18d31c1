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

from policy.files import write_whole

STYLE: dict[str, dict[str, Any]] = {
    "fixed": {"color": "#444444", "marker": "o", "label": "fixed rung"},
    "percentile": {"color": "#d98c1f", "marker": "s", "label": "percentile thresholds"},
    "random": {"color": "#b5b5b5", "marker": "x", "label": "random in the same band"},
    "learned": {"color": "#1f6fd9", "marker": "D", "label": "learned"},
    "capped": {"color": "#1f6fd9", "marker": "d", "linestyle": ":", "label": "learned, its budget kept"},
    "oracle": {"color": "#2f9e5b", "marker": "^", "label": "oracle"},
}


def tradeoff_figure(curves: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """KL over mean rank for every policy; both axes are what was measured on held-out documents."""
    # TensorBoard shows it at a quarter of its size: few inches, large letters.
    figure = Figure(figsize=(7.2, 5.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, rows in curves.items():
        points = sorted((row["mean_rank"], row["kl"]) for row in rows)
        ranks, kls = zip(*points, strict=True)
        axes.plot(ranks, kls, markersize=7, linewidth=2, **STYLE[name])
    axes.set_xlabel("mean rank, byte-weighted, over scored tokens", fontsize=15)
    axes.set_ylabel("KL to full rank, nats per token", fontsize=15)
    axes.set_yscale("log")
    axes.tick_params(which="both", labelsize=13)
    axes.set_title(title, fontsize=15)
    axes.grid(True, which="major", color="#e6e6e6")
    axes.legend(frameon=False, fontsize=14)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def write_report(output: Path, summary: dict[str, Any]) -> Figure:
    """Write `tradeoff.csv`, `tradeoff.png` and, last, `summary.json`; return the figure."""
    curves = summary["curves"]
    write_whole(output / "tradeoff.csv", _csv(curves).encode())
    share = summary["captured"]["share"]
    captured = "no measurable headroom" if share is None else f"captured {share:.0%} of the headroom"
    # A name such as `.` says nothing.
    figure = tradeoff_figure(curves, f"{output.resolve().name}\nexported: {summary['exported']}, {captured}")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(output / "tradeoff.png", image.getvalue())
    write_whole(output / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    return figure


def log_report(logger: TensorBoardLogger, figure: Figure, summary: dict[str, Any], params: dict[str, Any]) -> None:
    """The figure, and the HParams row of this run: every setting, and what to compare runs by."""
    logger.experiment.add_figure("tradeoff", figure, close=False)
    metrics = {
        "hp/quality": summary["operating_point"]["kl"],
        "hp/latency": summary["operating_point"]["latency_ms"],
        "hp/headroom": summary["headroom"]["nats"],
        "hp/captured": summary["captured"]["share"] or 0.0,
    }
    learned = zip(summary["compared_at"], summary["kl_at"]["learned"], strict=True)
    metrics |= {f"hp/learned_kl_at_{rank}": kl for rank, kl in learned}
    logger.log_hyperparams(flat(params), metrics)
    logger.finalize("success")


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str | int | float]:
    """Nested settings as TensorBoard can compare them: `chunk.max_tokens` and the like, numbers or strings."""
    found: dict[str, str | int | float] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, (str, int, float)) else str(value)
    return found


def _csv(curves: dict[str, list[dict[str, Any]]]) -> str:
    rows = [{"policy": name, **row} for name, points in curves.items() for row in points]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

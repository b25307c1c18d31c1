"""What a fit leaves behind for people: the table, the figure, the summary, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from policy.files import write_whole

from .curves import Curve
from .figure import STYLE, latency_figure, tradeoff_figure


def table(
    curves: dict[str, Curve], rung_rank: np.ndarray, rung_ms: np.ndarray | None
) -> dict[str, list[dict[str, Any]]]:
    """The curves as plain numbers: per point its knob, mean rank, KL, prompt's mean rank, perplexity, latency.

    `latency_ms` is the measured decode time of every rung, averaged over the rungs that were active; it is left out
    where rungs were not timed.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, curve in curves.items():
        rows[name] = []
        for point in curve.points:
            scores = point.scores
            row: dict[str, Any] = {} if point.knob is None else {STYLE[name].knob: point.knob}
            row |= {
                "aimed_at": float(rung_rank[point.rung]),
                "mean_rank": scores.mean(rung_rank),
                "kl": scores.value("kl"),
                **({} if rung_ms is None else {"latency_ms": scores.mean(rung_ms)}),
                "prompt_mean_rank": scores.prompt_mean(rung_rank),
                "perplexity": scores.value("perplexity"),
            }
            rows[name].append(row)
    return rows


def write_report(output: Path, summary: dict[str, Any]) -> Figure:
    """Write `tradeoff.csv`, `tradeoff.png` and, last, `summary.json`; return the figure."""
    write_whole(output / "tradeoff.csv", _csv(summary).encode())
    # A path such as `.` says nothing.
    figure = tradeoff_figure(summary, output.resolve().name)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(output / "tradeoff.png", image.getvalue())
    write_whole(output / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    return figure


def log_report(logger: TensorBoardLogger, figure: Figure, summary: dict[str, Any], params: dict[str, Any]) -> None:
    """The figure, where the clock tells the rungs apart KL over milliseconds as well, the trade-off to lay over that of
    other runs, and the HParams row: settings, what to compare runs by.

    TensorBoard sorts cards by tag and opens the first two groups: `compare` and `eval` come before `hp`, `tradeoff` and
    `train`. Its steps are whole numbers: percent of the adapter's bytes. Over them it is given ratios alone, of a KL to
    the fixed rungs' and of an svd rung's bytes to those that the ladder needs for its KL: they are what runs differ in,
    and TensorBoard smooths every line unless told otherwise, which a ratio survives and a KL that falls twentyfold does
    not.
    """
    logger.experiment.add_figure("compare/tradeoff", figure, close=False)
    timed = latency_figure(summary, Path(logger.root_dir).resolve().name)
    if timed is not None:
        logger.experiment.add_figure("compare/latency", timed, close=False)
    over_fixed = summary["over_fixed"]
    for name, ratios in over_fixed["at_rank"].items():
        for share, found in zip(over_fixed["share"], ratios, strict=True):
            if found is not None and name != "fixed":
                logger.experiment.add_scalar(f"tradeoff/{name}_over_fixed", found["ratio"], round(100 * share))
    ladder = summary["ladder"]
    for own in ladder.get("over_svd", ()):
        step = round(100 * own["share"])
        logger.experiment.add_scalar("tradeoff/svd_bytes_over_ladder", own["fewer_bytes"], step)
    metrics = {
        "hp/quality": summary["operating_point"]["kl"],
        "hp/latency": summary["operating_point"]["latency_ms"],
        "hp/headroom": summary["headroom"]["nats"],
        "hp/captured": summary["captured"]["share"],
    }
    if summary["bytes_saved"] is not None:
        metrics["hp/bytes_saved"] = summary["bytes_saved"]["ratio"]
    compared = over_fixed["compared"]["learned"]
    if compared is not None:
        metrics["hp/learned_over_fixed"] = compared["ratio"]
    if ladder.get("fewer_bytes") is not None:
        metrics["hp/svd_bytes_over_ladder"] = ladder["fewer_bytes"]
    learned = zip(summary["compared_at"], summary["kl_at"]["learned"], strict=True)
    metrics |= {f"hp/learned_kl_at_{rank}": kl for rank, kl in learned}
    # What is not known stays blank.
    logger.log_hyperparams(flat(params), {name: value for name, value in metrics.items() if value is not None})
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


def _csv(summary: dict[str, Any]) -> str:
    """A row per measured point, and beside it what its policy reaches at the very rank that the point was aimed at.

    The svd ladder's rungs are its own: nothing is aimed at those of the ladder in use.
    """
    over_fixed = summary["over_fixed"]
    rows: list[dict[str, Any]] = []
    for name, points in summary["curves"].items():
        if name not in over_fixed["kl"]:
            rows += [{"policy": name, **row} for row in points]
            continue
        for row in points:
            at = over_fixed["mean_rank"].index(row["aimed_at"])
            kl, found = over_fixed["kl"][name][at], over_fixed["at_rank"][name][at]
            low, high = (None, None) if found is None else found["interval_95"]
            ratio = None if found is None else found["ratio"]
            equal = {"kl_at_rank": kl, "over_fixed": ratio, "over_fixed_low": low}
            rows.append({"policy": name, **row, **equal, "over_fixed_high": high})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

"""What a fit leaves behind for people, of made curves: the table, the figure and the summary say the same."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.made_curves import (
    DOCUMENTS,
    FIXED,
    PERCENTILE,
    RUNG_RANK,
    RUNGS,
    curve,
    policies,
    scores,
)
from training.compare.curves import Curve, Point
from training.compare.figure import STYLE, Style, latency_figure, tradeoff_figure
from training.compare.tradeoff import log_report, table, write_report
from training.compare.verdict import judge
from training.learn.train import new_logger
from training.summary import print_verdict

MS = np.array([1.0, 2.0, 4.0, 6.0, 8.0])
WORSE = curve("learned", [(4, 0.82), (8, 0.41), (16, 0.21), (24, 0.11)])
BETTER = curve("learned", [(4, 0.5), (8, 0.3), (16, 0.15), (24, 0.07)])


def report(folder: Path, curves: dict[str, Curve]) -> tuple[dict, Figure]:
    """The summary's part that a report is made of, and the figure."""
    found = judge(curves, RUNGS, RUNG_RANK, resamples=50, seed=0)
    described = {"documents": {"test": DOCUMENTS}, **found.describe()}
    summary = {"curves": table(curves, RUNG_RANK, MS), **described}
    return summary, write_report(folder, summary)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "tradeoff.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def wild(name: str, factor: float) -> Curve:
    """KL of about `factor` times the fixed rungs', by documents that differ."""
    each = factor + np.random.default_rng(2).normal(0, 0.05, DOCUMENTS)
    return curve(name, [(4, 0.8 * each), (8, 0.4 * each), (16, 0.2 * each), (24, 0.1 * each)])


def test_the_table_has_one_row_per_point_and_averages_latency_over_active_rungs():
    curves = {"fixed": FIXED, "oracle": Curve("oracle", (Point(None, scores(12, 0.2), 2),))}
    rows = table(curves, RUNG_RANK, MS)
    assert [row["mean_rank"] for row in rows["fixed"]] == pytest.approx([4, 8, 16, 24])
    assert [row["latency_ms"] for row in rows["fixed"]] == pytest.approx([1, 2, 4, 6])
    (row,) = rows["oracle"]
    expected = {"aimed_at": 16, "mean_rank": 12, "kl": 0.2, "latency_ms": 3, "prompt_mean_rank": 12}
    assert row == pytest.approx({**expected, "perplexity": np.exp(2)})
    assert [row["rung"] for row in rows["fixed"]] == [0, 1, 2, 3]
    assert [row["aimed_at"] for row in rows["fixed"]] == [4, 8, 16, 24]


def test_the_csv_has_what_every_policy_reaches_at_the_rank_of_the_rung_it_was_aimed_at(tmp_path):
    summary, _ = report(tmp_path, policies(wild("learned", 1.02)))
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    rows = rows_of(tmp_path)
    for name, points in summary["curves"].items():
        own = [row for row in rows if row["policy"] == name]
        assert [float(row["mean_rank"]) for row in own] == [point["mean_rank"] for point in points]
        assert [float(row["aimed_at"]) for row in own] == summary["over_fixed"]["mean_rank"] == [4, 8, 16, 24]
        assert [float(row["kl_at_rank"]) for row in own] == summary["over_fixed"]["kl"][name]
        for row, found in zip(own, summary["over_fixed"]["at_rank"][name], strict=True):
            read = [float(row[column]) for column in ("over_fixed", "over_fixed_low", "over_fixed_high")]
            assert read == [found["ratio"], *found["interval_95"]]
            assert (read[1] < read[0] < read[2]) == (name == "learned")
    at = [summary["over_fixed"]["mean_rank"].index(rank) for rank in summary["compared_at"]]
    for name, kl in summary["over_fixed"]["kl"].items():
        assert [kl[i] for i in at] == summary["kl_at"][name], "the table that fit prints"


def test_a_rung_that_is_not_reached_has_no_row_and_no_number(tmp_path):
    """Rows of other rungs have what belongs to their own, wherever they stand."""
    short = curve("learned", [(4, 0.5), (16, 0.14), (24, 0.07)])
    summary, _ = report(tmp_path, policies(short))
    own = [row for row in rows_of(tmp_path) if row["policy"] == "learned"]
    assert [float(row["aimed_at"]) for row in own] == [4, 16, 24]
    assert [float(row["kl_at_rank"]) for row in own] == pytest.approx([0.5, 0.14, 0.07])
    assert [float(row["over_fixed"]) for row in own] == pytest.approx([0.5 / 0.8, 0.14 / 0.2, 0.07 / 0.1])
    over_fixed = summary["over_fixed"]
    assert [over_fixed[key]["learned"][1] for key in ("kl", "at_rank", "bytes_saved")] == [None] * 3
    assert summary["compared_at"] == [16, 24]


def test_a_policy_that_reaches_no_rung_has_a_figure_and_no_row(tmp_path):
    summary, figure = report(tmp_path, policies(WORSE, Curve("percentile", ())))
    assert summary["curves"]["percentile"] == []
    assert "percentile" not in {row["policy"] for row in rows_of(tmp_path)}
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == ["fixed rungs (exported)", "learned", "random", "oracle"]
    bold = [text.get_fontweight() == "bold" for text in figure.axes[0].get_legend().get_texts()]
    assert bold == [True, False, False, False]


@pytest.mark.parametrize(("learned", "exported"), [(WORSE, "fixed"), (BETTER, "learned")])
def test_the_figure_shows_what_is_exported_at_once(tmp_path, learned, exported):
    summary, figure = report(tmp_path, policies(learned))
    assert summary["exported"] == exported
    title = figure.get_suptitle().replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ")
    assert title == summary["verdict"]
    assert title.startswith("Fixed rungs are exported" if exported == "fixed" else "The learned policy is exported")
    kl, _ = figure.axes
    labels = dict(zip(summary["curves"], kl.get_legend().get_texts(), strict=True))
    for name, label in labels.items():
        assert label.get_text() == STYLE[name].label + (" (exported)" if name == exported else "")
        assert (label.get_fontweight() == "bold") == (name == exported)
    for axes in figure.axes:
        lines = dict(zip(summary["curves"], axes.lines, strict=True))
        broad = lines.pop(exported)
        assert broad.get_linewidth() >= 2 * max(line.get_linewidth() for line in lines.values())
        assert broad.get_zorder() < min(line.get_zorder() for line in lines.values()), "it hides no other"
    assert f"compared at 8, 16, 24 ({tmp_path.name}, {DOCUMENTS} documents)" in figure.get_supxlabel()


def test_the_figures_numbers_are_the_summarys(tmp_path):
    summary, figure = report(tmp_path, policies(wild("learned", 1.02)))
    kl, ratio = figure.axes
    for line, (name, rows) in zip(kl.lines, summary["curves"].items(), strict=True):
        assert line.get_color() == STYLE[name].color
        assert line.get_xydata().tolist() == [[row["mean_rank"], row["kl"]] for row in rows]
    shown = zip(ratio.lines, ratio.collections, summary["over_fixed"]["at_rank"].values(), strict=True)
    for line, bars, found in shown:
        assert line.get_xdata() == pytest.approx(RUNG_RANK[:-1])
        assert line.get_ydata() == pytest.approx([100 * (one["ratio"] - 1) for one in found])
        ends = [[100 * (end - 1) for end in one["interval_95"]] for one in found]
        assert [bar[:, 1].tolist() for bar in bars.get_segments()] == [pytest.approx(pair) for pair in ends]
    low, high = ratio.get_ylim()
    assert low < -40, "the oracle halves the KL"
    assert high > 90, "random doubles it at rank 24"


def seen(figure: Figure, name: str) -> list[int]:
    """Pixels of a policy's colour in each panel, the legend aside."""
    for axes in figure.axes:
        if axes.get_legend() is not None:
            axes.get_legend().set_visible(False)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    of_colour = (abs(pixels - 255 * np.array(to_rgb(STYLE[name].color))) < 30).all(-1)[::-1]
    boxes = (axes.get_window_extent() for axes in figure.axes)
    return [int(of_colour[int(b.y0) : int(b.y1), int(b.x0) + 5 : int(b.x1)].sum()) for b in boxes]


@pytest.mark.parametrize("exported", ["fixed", "learned"])
def test_curves_that_lie_on_each_other_are_all_seen(tmp_path, exported):
    """Learned, percentile and oracle on the fixed rungs' own points: nobody's marks are all hidden."""
    points = [(4, 0.8), (8, 0.4), (16, 0.2), (24, 0.1)]
    same = {name: curve(name, points) for name in ("percentile", "oracle")}
    summary, _ = report(tmp_path, policies(curve("learned", points), **same))
    figure = write_report(tmp_path, {**summary, "exported": exported})
    for name in summary["curves"]:
        assert min(seen(figure, name)) > 30, name


def test_a_policy_with_one_point_is_seen(tmp_path):
    """A mark stands for it where there is no line."""
    summary, _ = report(tmp_path, policies(WORSE))
    only = {**summary["curves"], "percentile": summary["curves"]["percentile"][2:3]}
    assert seen(tradeoff_figure({**summary, "curves": only}, "run"), "percentile")[0] > 30


def test_one_more_policy_is_one_more_entry_of_style(tmp_path, monkeypatch):
    monkeypatch.setitem(STYLE, "capped", Style("learned, capped", "#cc79a7", "P", "log_lambda"))
    summary, figure = report(tmp_path, {**policies(WORSE), "capped": wild("capped", 0.97)})
    assert summary["curves"]["capped"][0]["log_lambda"] == 0
    assert len(summary["kl_at"]["capped"]) == 3
    assert [row["policy"] for row in rows_of(tmp_path)].count("capped") == 4
    assert all(float(row["over_fixed"]) < 1 for row in rows_of(tmp_path) if row["policy"] == "capped")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()][-1] == "learned, capped"
    assert min(seen(figure, "capped")) > 30


def test_where_nothing_differs_the_ratio_has_a_scale(tmp_path):
    same = {name: Curve(name, FIXED.points) for name in ("learned", "percentile", "random", "oracle")}
    _, figure = report(tmp_path, {"fixed": FIXED, **same})
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["-2 %", "fixed", "+2 %"]


def left_behind(folder: Path, curves: dict[str, Curve], ms: np.ndarray | None, latency_ms: float | None) -> dict:
    """Everything that a fit leaves of these curves: the summary, with what is written, logged and printed of it."""
    found = judge(curves, RUNGS, RUNG_RANK, resamples=50, seed=0)
    clock = {"device": "NVIDIA H200", "batch": 32, "ms": MS.tolist(), "ms_base": 0.5, "controller_ms": 0.04}
    summary = {
        "curves": table(curves, RUNG_RANK, ms), "documents": {"test": DOCUMENTS}, "ladder": {}, "seconds": 1.0,
        "latency": clock | {"resolved": ms is not None},
        "operating_point": {"kl": 0.25, "latency_ms": latency_ms}, **found.describe(),
    }  # fmt: skip
    figure = write_report(folder, summary)
    log_report(new_logger(folder, "", fresh=True), figure, summary, {"seed": 0})
    return summary


def logged(folder: Path) -> dict[str, float]:
    """The HParams row's metrics."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"] if tag.startswith("hp/")}


def pictures(folder: Path) -> set[str]:
    return set(EventAccumulator(str(folder)).Reload().Tags()["images"])


def printed(summary: dict, folder: Path, capsys) -> str:
    capsys.readouterr()
    print_verdict(summary, folder)
    return " ".join(capsys.readouterr().out.split())


def test_what_is_not_known_stays_blank_everywhere(tmp_path, capsys):
    """An oracle that gains nothing, a clock that tells no rungs apart, and thresholds that miss a rung."""
    missing = replace(PERCENTILE, points=PERCENTILE.points[2:])
    curves = policies(WORSE, missing, oracle=replace(FIXED, name="oracle"))
    summary = left_behind(tmp_path, curves, None, None)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["captured"] == {"share": None, "interval_95": None}
    assert written["operating_point"]["latency_ms"] is written["net_ms"] is None
    assert written["kl_at"]["percentile"] == [None, pytest.approx(0.21), pytest.approx(0.1)]
    assert "latency_ms" not in rows_of(tmp_path)[0]
    assert "latency_ms" not in json.dumps(written["curves"])
    assert not [row for row in rows_of(tmp_path) if row["policy"] == "percentile" and row["aimed_at"] == "8.0"]
    metrics = logged(tmp_path)
    assert not {"hp/captured", "hp/latency"} & metrics.keys(), "no number stands for what is not known"
    assert pictures(tmp_path) == {"compare/tradeoff"}
    assert (metrics["hp/headroom"], metrics["hp/quality"]) == (0, pytest.approx(0.25))
    shown = printed(summary, tmp_path, capsys)
    assert "Headroom 0.0000 nats, which cannot be told from zero." in shown
    assert "│ 8 │ 0.4000 │ - │ 0.4100 │ 0.5000 │ 0.4000 │" in shown
    assert "captured" not in shown


def test_what_is_known_is_shown_everywhere(tmp_path, capsys):
    summary = left_behind(tmp_path, policies(BETTER), MS, 2.5)
    metrics, share = logged(tmp_path), summary["captured"]["share"]
    assert (metrics["hp/captured"], metrics["hp/latency"]) == (pytest.approx(share), 2.5)
    assert metrics["hp/bytes_saved"] == pytest.approx(summary["bytes_saved"]["ratio"])
    assert metrics["hp/learned_kl_at_8"] == pytest.approx(0.3)
    assert [float(row["latency_ms"]) for row in rows_of(tmp_path)[:4]] == pytest.approx(MS[:4])
    low, high = summary["captured"]["interval_95"]
    shown = printed(summary, tmp_path, capsys)
    assert f"captured {share:.0%} (95 % interval {low:.0%} to {high:.0%})" in shown
    assert f" {summary['verdict']}. " in shown
    assert pictures(tmp_path) == {"compare/tradeoff", "compare/latency"}


def test_the_picture_over_milliseconds_has_every_timed_policy_at_its_own(tmp_path):
    """The svd ladder's rungs were not timed, and have no place in it."""
    curves = policies(BETTER)
    summary = left_behind(tmp_path, curves, MS, 2.5)
    summary["curves"] |= table({"svd": replace(FIXED, name="svd")}, RUNG_RANK, None)
    figure = latency_figure(summary, "my-run")
    (axes,) = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() != "None"}
    assert drawn.keys() == {STYLE[n].label + " (exported)" * (n == summary["exported"]) for n in curves}
    for name, rows in table(curves, RUNG_RANK, MS).items():
        label = STYLE[name].label + " (exported)" * (name == summary["exported"])
        assert drawn[label] == sorted([row["latency_ms"], row["kl"]] for row in rows)
    marks = {text.get_text().strip(): text.xy[0] for text in axes.texts}
    assert marks == {"no adapter": 0.5, "exact": MS[-1]}
    said = figure.get_supxlabel()
    assert said == ("milliseconds a step, mean over scored tokens (my-run, NVIDIA H200, batch 32; deciding adds 0.040)")
    assert latency_figure(summary | {"latency": summary["latency"] | {"resolved": False}}, "my-run") is None


def test_an_adapter_that_does_nothing_has_its_figure(tmp_path):
    """No KL has a place on a logarithmic axis, and no ratio is one of nothing."""
    flat = {name: curve(name, [(rank, 0.0) for rank in RUNGS[:-1]]) for name in policies(WORSE)}
    summary, _ = report(tmp_path, flat)
    assert summary["over_fixed"]["compared"] == dict.fromkeys(flat)
    assert summary["verdict"] == "Fixed rungs are exported: they lose nothing that can be measured"


def test_a_rung_of_no_rank_has_its_place(tmp_path):
    """No adapter at all: nothing can be saved of no bytes, by fixed rungs or by anyone."""
    ranks = np.array([0.0, *RUNG_RANK[1:]])
    curves = policies(WORSE)
    found = judge(curves, (0, *RUNGS[1:]), ranks, resamples=50, seed=0)
    described = {"documents": {"test": DOCUMENTS}, **found.describe()}
    figure = write_report(tmp_path, {"curves": table(curves, ranks, MS), **described})
    assert figure.axes[0].get_xlim()[0] < 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [summary["curves"][name][0]["mean_rank"] for name in curves] == [0] * len(curves)
    assert summary["over_fixed"]["bytes_saved"]["fixed"][0] == {"ratio": 0, "interval_95": [0, 0]}

"""Whatever takes long moves a bar: what every stage of a real fit hands it, and when it shows."""

import io
import itertools
import time
from dataclasses import dataclass

import pytest
from rich.console import Console
from rich.progress import Progress

from training.fit import main
from training.progress import progress_bar, with_progress


@dataclass
class Bar:
    """What one bar was told."""

    name: str
    total: int
    steps: list[int]


@pytest.fixture(scope="module")
def bars(case, tmp_path_factory) -> list[Bar]:
    """Every bar of one real fit, in order."""
    found = []

    class Recorder(Progress):
        def add_task(self, name, total):
            found.append(Bar(name, total, []))
            return super().add_task(name, total=total)

        def advance(self, task, steps):
            found[-1].steps.append(steps)
            super().advance(task, steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.progress.Progress", Recorder)
        main(case.arguments(tmp_path_factory.mktemp("bars") / "out", **{"amounts.shard_documents": 1}))
    return found


def test_every_stage_of_a_fit_has_a_bar(bars):
    movers = [f"{name} on {part}" for name in ("percentile", "learned", "random") for part in ("validation", "test")]
    # Knobs are set anew until they are met, and the oracle runs again where the first run missed its mean rank.
    assert [name for name, _ in itertools.groupby(bar.name for bar in bars)] == [
        "effects", "scales", "latency of every rung", "tables", "trajectory-uncalibrated", "trajectory-full-1",
        "trajectory-full-32", "later damage", "training round-0", "trajectory-own-0-1", "training round-1",
        "fixed on test", *movers, "learned, capped, on test", "tables-test", "trajectory-test", "oracle on test",
        "fixed in blocks on test", "learned in blocks on validation", "learned in blocks on test",
        "fixed in steps on test", "learned, in steps, on test", "svd on test",
    ]  # fmt: skip


def test_every_bar_moves_to_its_end(bars):
    """Documents that are scored side by side step together, at most a batch of them; everything else one by one."""
    for bar in bars:
        assert sum(bar.steps) == bar.total, bar.name
        most = 48 if bar.name.endswith(" on test") or bar.name.endswith(" on validation") else 1
        assert 0 < min(bar.steps) <= max(bar.steps) <= most, bar.name
    totals = {bar.name: bar.total for bar in bars}
    # 12 labelled documents, three a shard, for a shard of one document at three scales is one of three at the ladder's
    # own; 3 epochs of two batches; 6 documents at 8 rungs below the top.
    expected = {"tables": 4, "training round-0": 6, "fixed on test": 48, "learned on test": 48}
    assert {name: totals[name] for name in expected} == expected
    # Four validation documents at five knobs, and then at every rung that is not met yet: fewer each time.
    asked = [bar.total for bar in bars if bar.name == "learned on validation"]
    assert asked[:2] == [20, 32]
    assert asked[1:] == sorted(asked[1:], reverse=True)
    assert asked[-1] < asked[1]


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def terminal(request, monkeypatch):
    """Whether bars go to a terminal, and what they write."""
    shown = io.StringIO()
    monkeypatch.setattr("training.progress.Console", lambda **_: Console(file=shown, force_terminal=request.param))
    return request.param, shown


def written(shown: io.StringIO, text: str, seconds: float) -> bool:
    """Whether `text` is written within some seconds."""
    deadline = time.monotonic() + seconds
    while text not in shown.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    return text in shown.getvalue()


def test_a_bar_shows_on_a_terminal_before_a_long_first_step_is_over(terminal, monkeypatch):
    on_terminal, shown = terminal
    monkeypatch.setattr("training.progress.PATIENCE_SECONDS", 0.05)
    for _ in with_progress([1, 2], "block 1", 2):
        assert written(shown, "block 1", 5 if on_terminal else 0.3) == on_terminal
    assert bool(shown.getvalue()) == on_terminal
    assert shown.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K" if on_terminal else ""), "the cursor is back"


def test_nothing_shows_of_what_is_over_soon(terminal):
    _, shown = terminal
    assert list(with_progress([1, 2, 3], "block 1", 3)) == [1, 2, 3]
    with progress_bar("block 2", 1) as advance:
        advance(1)
    assert shown.getvalue() == ""


def test_of_several_processes_only_the_first_shows_bars(terminal, monkeypatch):
    _, shown = terminal
    monkeypatch.setattr("training.progress.PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("training.progress.is_first_process", lambda: False)
    with progress_bar("block 1", 1):
        assert not written(shown, "block 1", 0.3)
    assert shown.getvalue() == ""


def test_a_bar_goes_away_when_the_work_fails(terminal, monkeypatch):
    on_terminal, shown = terminal
    monkeypatch.setattr("training.progress.PATIENCE_SECONDS", 0.0)

    def fail():
        for _ in with_progress([1, 2], "block 1", 2):
            assert written(shown, "block 1", 5 if on_terminal else 0.1) == on_terminal
            raise ValueError("mistake")

    with pytest.raises(ValueError, match="mistake"):
        fail()
    length = len(shown.getvalue())
    time.sleep(0.3)
    assert len(shown.getvalue()) == length, "nothing draws it any more"

"""The file of measured milliseconds: an exact round trip, what it says of a fit, and one line for whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from policy import LatencyTable
from policy.measured import MeasuredCost

RUNGS = (0.5, 4, 8)
ONE = LatencyTable("NVIDIA H200", (4.1, 4.2, 4.3), 4.0, 0.01, 1, 0.005)
MANY = LatencyTable("NVIDIA H200", (12.5, 13.0, 15.0), 12.0, 0.02, 32, 0.04)
COST = MeasuredCost("m-1", "a-1", "l-1", "bfloat16", RUNGS, 512, 1, (ONE, MANY))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    COST.save(tmp_path / "latency.json")
    return tmp_path / "latency.json"


def test_a_round_trip_is_exact(path: Path) -> None:
    loaded = MeasuredCost.load(str(path))
    assert loaded == COST
    assert [*map(type, loaded.rungs)] == [float, int, int]
    assert [own.name for own in path.parent.iterdir()] == ["latency.json"]
    record = json.loads(path.read_text())
    assert record["schema_version"] == 1
    assert [own["batch"] for own in record["buckets"]] == [1, 32]


def test_a_fit_goes_by_the_bucket_asked_for_and_by_the_smallest_unless_told() -> None:
    assert COST.tables().chosen == COST.tables(1).chosen == ONE
    assert COST.tables(32).chosen == MANY
    assert COST.tables(32).buckets == (ONE, MANY), "the others come along"
    message = r"latency_batch: expected one that was measured \(1, 32\), got 8; take one of them, or measure it with"
    with pytest.raises(ValueError, match=message):
        COST.tables(8)


def test_what_was_measured_of_another_model_or_ladder_is_refused() -> None:
    own: dict[str, Any] = {"model": "m-1", "adapter": "a-1", "rungs": RUNGS, "ladder": "l-1"}
    COST.check(**own)
    COST.check(model="m-1", adapter="a-1")
    for name, other, message in (
        ("model", "m-2", "expected the model of this fit, fingerprint m-2, got the table of m-1; measure it with"),
        ("adapter", "a-2", "expected the adapter of this fit, fingerprint a-2, got the table of a-1; measure it with"),
        ("rungs", (4, 8), r"expected rungs \(4, 8\), got the table of \(0.5, 4, 8\); measure the folder `ladder`"),
        ("ladder", "l-2", "expected the ladder of this fit, fingerprint l-2, got the table of l-1; measure the folder"),
    ):
        with pytest.raises(ValueError, match=f"latency: {message}"):
            COST.check(**{**own, name: other})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema_version=2), "schema_version: expected one of 1, got 2"),
        (lambda r: r.pop("adapter"), "adapter: expected text of .*, got none; add it"),
        (lambda r: r.update(note=1), r"names: expected names among model, .*, got \['note'\]"),
        (lambda r: r.update(rungs=[8, 4, 2]), "rungs: expected a list .* strictly ascending, .*, got"),
        (lambda r: r.update(rungs=[4, 8]), r"buckets.ms: expected 2 latencies, one per rung, got \(4.1"),
        (lambda r: r["buckets"][0].update(ms=[1, 2]), r"buckets: expected as many rungs in each, got \[2, 3\]"),
        (lambda r: r["buckets"][0].update(ms="fast"), "latency.ms: expected a list .*, got 'fast'"),
        (lambda r: r["buckets"].reverse(), r"buckets: expected batches in strictly ascending order, .*, got \[32, 1\]"),
        (lambda r: r.update(buckets=[{**r["buckets"][0], "batch": None}]), "buckets: expected the batch of each, got"),
        (lambda r: r["buckets"][1].update(device="another"), "buckets: expected one device, got"),
        (lambda r: r.update(buckets=[]), "buckets: expected a list of 1 to 16, .*, got "),
        (lambda r: r.update(context_tokens=0), "context_tokens: expected a whole number in .*, got 0"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"latency\.json: {message}.* python -m runtime\.measure") as caught:
        MeasuredCost.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("oops", "expected JSON, got"),
        ("[1]", "expected a JSON object, got list"),
        ('{"ms": NaN}', "expected JSON, got"),
    ],
)
def test_text_that_is_no_table_is_one_line(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"latency\.json: {message}.*; measure it with python -m runtime\.measure"):
        MeasuredCost.load(path)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(FileNotFoundError, match=f"latency: expected a file, got {path}, which is none; measure it"):
            MeasuredCost.load(path)

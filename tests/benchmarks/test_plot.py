"""The figure shows what a record says, and a file that is no record is one line."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.opponents import EAGER, GRAPH, PEFT_EAGER
from benchmarks.plot import DEFAULT, figure, save
from benchmarks.printing import RESULTS
from benchmarks.records import load_record, newest


def case(batch=1, name="no adapter", ms=4.0, **more):
    own = {"batch": batch, "context": 512, "controller": False, "floor_ms": 3.0, "ms_per_step": ms, "name": name}
    return own | {"peer": None, "rung": None} | more


def record(*cases, shape="llama-7b", date="2026-01-01"):
    return {"benchmark": "decode", "date": date, "device": "a GPU", "shape": shape, "read_tb_s": 4.0, "cases": [*cases]}


def texts(path):
    return [own.text.strip() for own in ElementTree.parse(path).iter() if own.tag.endswith("text") and own.text]


def test_every_case_peer_and_panel_is_named(tmp_path):
    slow = {EAGER: {"ms_per_step": 18.7}, GRAPH: {"ms_per_step": 5.13}, PEFT_EAGER: {"failed": "out of memory"}}
    made = figure(
        [
            record(case(peer=slow), case(name="1 adapter, exact", ms=4.5), case(32, "32 adapters, exact", 15.0)),
            record(case(name="another's"), shape="llama-3.1-8b"),
        ]
    )
    save(made, tmp_path / "deep" / "a.svg")
    found = texts(tmp_path / "deep" / "a.svg")
    for text in ("no adapter", "1 adapter, exact", "32 adapters, exact", "another's", "4.50", "15.00", EAGER, GRAPH):
        assert text in found
    assert "18.7" in found  # beyond the axis
    assert "5.1" not in found  # on it
    assert PEFT_EAGER not in found
    assert any(text.startswith("32 rows, context 512") for text in found)


def test_the_same_record_makes_the_same_bytes(tmp_path):
    for name in "ab":
        save(figure([record(case())]), tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_committed_figure_is_of_the_committed_records(tmp_path):
    save(figure([load_record(path) for path in newest(RESULTS)]), tmp_path / "own.svg")
    assert texts(tmp_path / "own.svg") == texts(DEFAULT), "draw it again: python -m benchmarks.plot"


def test_the_newest_record_of_every_shape_is_taken(tmp_path):
    for name, own in (
        ("decode-a.json", record(case(), date="2026-01-02")),
        ("decode-b.json", record(case(), date="2026-01-01")),
        ("decode-c.json", record(case(), shape="another", date="2025-01-01")),
        ("kernels-d.json", {}),
    ):
        (tmp_path / name).write_text(json.dumps(own))
    assert [path.name for path in newest(tmp_path)] == ["decode-c.json", "decode-a.json"]
    with pytest.raises(FileNotFoundError, match=r"--record: expected decode-\*.json in .*, got none"):
        newest(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"benchmark": "kv"}, "expected a record of benchmarks.decode, got another file"),
        (record(), "expected a record of benchmarks.decode, got another file"),
        (record({"batch": 1}), r"cases\[0\]: expected context, got none"),
    ],
)
def test_another_file_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as refusal:
        load_record(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert Path(path).name in str(refusal.value)

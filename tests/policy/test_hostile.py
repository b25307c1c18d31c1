"""A `policy.json` that anybody may have edited: right, or refused in one line before anything is allocated for it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy import KINDS, SIGNALS, PolicyCheckpoint
from tests.policy.checkpoints import checkpoint, summary_of

HERE = Path(__file__).parent
OLD = {
    "schema 1": HERE / "schema1", "schema 2": HERE / "schema2" / "learned", "schema 3": HERE / "schema3",
    "schema 4": HERE / "schema4",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
NESTED: list[Any] = [[[[[[[[[[1]]]]]]]]]]
HOSTILE = [
    math.nan, math.inf, -math.inf, -1, 0, 1, 1.5, 16.0, True, False, None, "", "x", "1", "a\nb", [], {}, [1], {"a": 1},
    NESTED, [None] * 2000, 1e308, -1e308, 1e-320, 10**9, 10**13, 10**400, -(10**13), -0.0, "\ud800",
]  # fmt: skip
FREE = ("metrics", "libraries")
"""Whatever JSON they hold is right."""


def places(record: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to every value in a record: leaves, and what holds them."""
    inner = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(record: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


def edited(record: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    at(changed, path[:-1])[path[-1]] = value
    return changed


def same(one: Any, other: Any) -> bool:
    """Equal as JSON, a number written as an int or as a float, never true for 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def still_serves(loaded: PolicyCheckpoint) -> bool:
    """Decisions and what rows may spend are what any policy gives: rungs that exist, finite scales and knobs."""
    summary = dataclasses.replace(summary_of(3), valid=torch.ones(3, len(SIGNALS)).bool())
    rows = loaded.operating([loaded.cost[0], max(0.5, loaded.cost[0]), 1.0], [0, 0, 0])
    decision = loaded.policy.decide(summary, rows.knob)
    inside = (decision.rung >= 0) & (decision.rung < len(loaded.policy.rungs))
    return bool((inside & decision.scale.isfinite() & rows.knob.isfinite()).all())


def loaded_or_refused(folder: Path) -> PolicyCheckpoint | str:
    """The policy, or the message of a ValueError; anything else that is raised is a defect."""
    try:
        return PolicyCheckpoint.load(folder)
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole policy of every kind, and one of every schema of old."""
    folder = tmp_path_factory.mktemp("policies")
    for kind in KINDS:
        checkpoint(kind).save(folder / kind)
    for name, exported in OLD.items():
        shutil.copytree(exported, folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("kind", [*KINDS, *OLD])
@given(data=st.data())
@settings(max_examples=300)
def test_any_value_in_the_place_of_any_other_is_right_or_refused(
    kind: str, data: st.DataObject, saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved[kind]
    text = (folder / "policy.json").read_text()
    record = json.loads(text)
    path = data.draw(st.sampled_from(list(places(record))))
    value = data.draw(st.sampled_from(HOSTILE))
    changed = edited(record, path, value)
    (folder / "policy.json").write_text(json.dumps(changed))
    loaded = loaded_or_refused(folder)
    (folder / "policy.json").write_text(text)
    if isinstance(loaded, str):
        assert loaded.startswith(str(folder))
        assert "\n" not in loaded
        assert ", got " in loaded
        assert len(loaded) < 1000
        return
    assert still_serves(loaded)
    if kind in OLD or path[0] in FREE:
        return
    # What was believed is what the file says, in the type that the place has; a rung may be a fraction.
    loaded.save(folder.parent / "again")
    again = json.loads((folder.parent / "again" / "policy.json").read_text())
    for name in record.keys() - {"libraries"}:
        assert same(again[name], changed[name]), name
    before, after = at(record, path), at(again, path)
    fraction = path[0] == "rungs" and isinstance(value, float) and not value.is_integer()
    assert type(after) is (float if fraction else type(before)) or (
        path[-1] in ("ladder", "latency", "curve", "controller_ms") and after is None
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("cost", 0), math.nan),
        (("settings", "chunk", "thresholds", 0), math.nan),
        (("settings", "chunk", "max_tokens"), 16.5),
        (("settings", "chunk", "max_tokens"), 16.0),
        (("settings", "kv", "window_tokens"), 1e308),
        (("settings", "kv", "sink_pages"), math.inf),
        (("settings", "signals", "recent_pages"), 1.5),
        (("settings", "block_tokens"), True),
        (("settings", "block_tokens"), 3.5),
        (("settings", "prompt_tokens"), 0),
        (("settings", "prompt_tokens"), 24.0),
        (("settings", "signals", "novelty_window_tokens"), 10**13),
        (("config", "hidden"), 10**9),
        (("config", "hidden"), 8),
        (("config", "scale_range"), True),
        (("config", "signals"), NESTED),
        (("config", "signals"), {"entropy": 1}),
        (("config", "signals", 0), "age"),
        (("config", "signals", 0), 0),
        (("config", "vocabulary"), True),
        (("config", "vocabulary"), 11.0),
        (("config", "vocabulary"), 12),
        (("kind",), ["learned"]),
        (("kind",), {}),
        (("schema_version",), True),
        (("schema_version",), 2.0),
        (("rungs",), list(range(1, 5000))),
        (("rungs", 3), 10**9),
        (("rungs", 0), "2"),
        (("rungs", 0), True),
        (("rungs", 1), 2.0),
        (("rungs", 3), math.nan),
        (("metrics",), []),
        (("default_budget",), True),
        (("fingerprints", "shared"), 0),
        (("latency", "buckets", 0, "ms_base"), 1e308),
        (("latency", "buckets", 0, "batch"), 1.0),
        (("latency", "buckets"), []),
        (("latency", "batch"), True),
        (("curve", "knobs", 0), 1e308),
    ],
)
def test_what_was_once_believed_is_refused(path: tuple, value: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved["learned"], tmp_path / "policy")
    record = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps(edited(record, path, value)))
    with pytest.raises(ValueError, match=r"policy\.(json|safetensors): .*expected .*, got .*; ") as caught:
        PolicyCheckpoint.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "expected JSON, got lists or objects nested too deep"),
        ('{"a":' * 100_000, "expected JSON, got lists or objects nested too deep"),
        ('{"cost": [NaN]}', "expected JSON, got NaN, which is no JSON"),
        ('{"cost": [-Infinity]}', "expected JSON, got -Infinity, which is no JSON"),
        ('{"metrics": 1e999}', "expected JSON, got the number '1e999', which is too large"),
        ('{"kind": "fixed", "kind": "fixed"}', "expected JSON, got the name 'kind' twice in one object"),
        ('{"a": ' + "9" * 10_000 + "}", "expected JSON, got Exceeds the limit"),
        ("[0" + ",0" * 2**23 + "]", "expected at most 16777216 bytes of JSON, got 16777219"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_text_that_is_no_record_is_one_line(text: str, message: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved["fixed"], tmp_path / "policy")
    (folder / "policy.json").write_text(text)
    with pytest.raises(ValueError, match=f"policy.json: {message}.*; export the policy again") as caught:
        PolicyCheckpoint.load(folder)
    assert "\n" not in str(caught.value)


CAPPED = """
import json, resource, sys
from pathlib import Path
from policy import PolicyCheckpoint
root = Path(sys.argv[1])
PolicyCheckpoint.load(root / "whole")  # whatever is loaded late is loaded now
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 64 * 2**20,) * 2)
for folder in sorted(root.iterdir()):
    if folder.name != "whole":
        try:
            PolicyCheckpoint.load(folder)
            print(json.dumps([folder.name, "loaded"]))
        except ValueError as error:
            print(json.dumps([folder.name, str(error)]))
"""
LARGE = {
    "hidden beyond its limit": (("config", "hidden"), 10**9),
    "hidden within its limit, of other tensors": (("config", "hidden"), 8192),
    "a vocabulary beyond its limit": (("config", "vocabulary"), 10**12),
    "many signals": (("config", "signals"), ["entropy"] * 10**5),
    "a window": (("settings", "signals", "novelty_window_tokens"), 10**13),
    "many rungs": (("rungs",), list(range(1, 1025))),
    "too many rungs": (("rungs",), list(range(10**6))),
    "too large a rung": (("rungs",), [2, 4, 8, 10**12]),
    "many costs": (("cost",), [1.0] * 10**6),
    "many knots": (("curve", "budgets"), [0.5] * 10**6),
    "many thresholds": (("settings", "chunk", "thresholds"), [0.5] * 10**6),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to cap what a process may map")
def test_what_a_record_asks_for_is_not_allocated(saved: dict[str, Path], tmp_path: Path) -> None:
    """64 MiB beyond what is mapped; the largest network within the limits alone takes 256."""
    record = json.loads((saved["learned"] / "policy.json").read_text())
    for name, (path, value) in LARGE.items():
        folder = shutil.copytree(saved["learned"], tmp_path / name)
        (folder / "policy.json").write_text(json.dumps(edited(record, path, value)))
    shutil.copytree(saved["learned"], tmp_path / "whole")
    done = subprocess.run(
        [sys.executable, "-c", CAPPED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found.keys() == LARGE.keys()
    for name, message in found.items():
        assert ": expected " in message, name

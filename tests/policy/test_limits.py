"""What a value may be: strict types, finite numbers, ends as they are written, every field of every record."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from policy import (
    KINDS,
    SIGNALS,
    ChunkSettings,
    KnobCurve,
    KVSettings,
    LatencyTable,
    PolicyCheckpoint,
    Settings,
    SignalSettings,
)
from policy.limits import Choice, Entries, Flag, Limit, Maybe, Number, Several, Text, Whole, limits_of, shown
from policy.settings import AGE, SIGNAL_SETS, SignalNames, SignalWeights

RECORDS = (SignalSettings, ChunkSettings, KVSettings, Settings, KnobCurve, LatencyTable, PolicyCheckpoint)
DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("limit", "taken"),
    [
        (Whole(0, 3), [0, 3, np.int64(2)]),
        (Number(0, 1), [0, 1, 0.5, -0.0, np.float32(0.25)]),
        (Number(0, 1, above=True, below=True), [0.5, 1e-320]),
        (Choice((1, 4)), [1, 4]),
        (Text(most=3), ["a", "abc"]),
        (Flag(), [True, False]),
        (Maybe(Flag()), [None, True]),
        (Several(Whole(0, 9), 1, 3, ascending=True), [(1,), (1, 1, 2)]),
        (Entries({"a": Flag()}), [{"a": True}]),
        (Entries({"a": Flag()}, complete=False), [{}, {"a": True}]),
        (SignalNames(), [("entropy",), ("age",), ("attention", "prior", "pair", "age"), *SIGNAL_SETS.values()]),
    ],
)
def test_what_is_within_a_limit_is_kept(limit: Limit, taken: list) -> None:
    for value in taken:
        assert limit.take("x", value) == value


@pytest.mark.parametrize(
    ("limit", "refused"),
    [
        (Whole(0, 3), [-1, 4, 1.0, True, None, "1", math.nan, 10**400, [1], np.bool_(1), np.float64(1)]),
        (Number(0, 1), [-1e-9, 1.1, math.nan, math.inf, -math.inf, True, None, "0.5", 10**400, -(10**400), [0.5]]),
        (Number(0, 1, above=True), [0, -0.0, 0.0]),
        (Number(0, 1, below=True), [1, 1.0]),
        (Choice((1, 4)), [1.0, True, 2, None, [1]]),
        (Choice(("full",)), ["Full", None, ["full"], {}]),
        (Text(most=3), ["", "abcd", None, 1, b"a"]),
        (Flag(), [0, 1, None, "true"]),
        (Maybe(Flag()), [0, "none"]),
        (Several(Whole(0, 9), 1, 3, ascending=True), [(), (1, 2, 3, 4), (2, 1), "12", 3, None, {}, (1, True), (1.0,)]),
        (Several(Whole(0, 9), 1, 3, distinct=True), [(1, 1), (2, 1)]),
        (Entries({"a": Flag()}), [{}, {"a": 1}, {"a": True, "b": True}, [("a", True)], None, {1: True}]),
        (SignalWeights(), [{}, {"entropy": 0}, {"luck": 1}, {"entropy": -1}, {"entropy": 1e-300}, {"entropy": 1e308}]),
        (SignalNames(), [[], (), "age", b"age", None, 1, {}, {"age": 1}, [None], [b"age"], [["age"]], [math.nan]]),
        (SignalNames(), [[""], ["luck"], ["Age"], ["age", "age"], ["entropy", "prior", "entropy"], ["entropy", 1]]),
        (SignalNames(), [[10**400], DEEP, ["age", DEEP], ["age"] * 10**5]),
    ],
)
def test_what_is_not_is_refused_by_name_in_one_line(limit: Limit, refused: list) -> None:
    for value in refused:
        with pytest.raises(ValueError, match=r"^here.*: expected .*, got .*; ") as caught:
            limit.take("here", value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [DEEP, "x" * 10**6, list(range(10**5)), {"a\nb": "c\nd"}, 10**4000, "\ud800"])
def test_an_error_is_short_and_on_one_line_whatever_was_given(value: object) -> None:
    assert len(shown(value)) < 1000
    assert "\n" not in shown(value)


@pytest.mark.parametrize("record", RECORDS)
def test_every_field_of_every_record_has_a_limit(record: type) -> None:
    assert limits_of(record).keys() == {field.name for field in dataclasses.fields(record)}


def with_wrong_values(record: Any) -> list[tuple[str, Any]]:
    wrong = [None, True, "x", math.nan, math.inf, -math.inf, -1e9, 1e308, 10**13, 1.5, [], {}, [math.nan]]
    own = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return [(name, value) for name in own for value in wrong if not within(limits_of(record)[name], value)]


def within(limit: Limit, value: object) -> bool:
    try:
        limit.take("x", value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("record", [SignalSettings(), ChunkSettings(), KVSettings(), Settings()], ids=type)
def test_a_record_made_in_python_is_held_to_its_limits_too(record: Any) -> None:
    tried = with_wrong_values(record)
    names = {name for name, _ in tried}
    assert names == {field.name for field in dataclasses.fields(record)}
    for name, value in tried:
        with pytest.raises(ValueError, match=rf"{name}(\.|\[|: expected)"):
            dataclasses.replace(record, **{name: value})


def test_what_a_record_keeps_is_plain_python() -> None:
    chunk = ChunkSettings(
        min_tokens=np.int64(2), max_tokens=9, smoothing=1, thresholds=[np.float32(0.25)], weights={"prior": 2}
    )
    assert (type(chunk.min_tokens), type(chunk.smoothing), chunk.thresholds) == (int, float, (0.25,))
    assert type(chunk.thresholds[0]) is float
    assert chunk.weights == dict.fromkeys(SIGNALS, 0.0) | {"prior": 2.0}


def test_signals_are_kept_in_one_order() -> None:
    assert SignalNames().take("x", ["age", "pair", "entropy"]) == ("entropy", "pair", "age")
    assert SIGNAL_SETS["default"] == (*SIGNALS, AGE)


def test_by_default_every_token_is_a_chunk_and_complexity_is_that_of_the_paper() -> None:
    chunk = ChunkSettings()
    assert (chunk.min_tokens, chunk.max_tokens) == (1, 1)
    assert {name for name, weight in chunk.weights.items() if weight} == {"entropy", "attention", "novelty", "prior"}
    assert chunk.weights.keys() == set(SIGNALS)
    assert len(set(chunk.weights.values()) - {0.0}) == 1, "all alike"


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_of_a_policy_is_named_in_its_configuration(kind: str) -> None:
    """What the constructor takes beside rungs and tensors is what the file holds and checks."""
    parameters = set(KINDS[kind].__init__.__annotations__) - {"rungs", "scales", "grid", "cost", "return"}
    assert parameters == set(KINDS[kind].CONFIG)

"""A ladder on disk that is damaged, contradicts itself or holds nonsense is refused in one line."""

import json
import math
from itertools import product

import pytest
import torch

from runtime import load_ladder, save_ladder
from runtime.ladder.store import RECORD, TENSORS
from tests.runtime.store.stored import Q, assert_same, change, damage_tensors, edge, part, rewritten

DAMAGE = {
    "another tensor file": (damage_tensors, "expected the file ladder.json was written with"),
    "half a tensor file": (
        lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:5000]),
        "expected a whole safetensors file",
    ),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "got no ladder.safetensors"),
    "no JSON": (lambda folder: (folder / RECORD).write_text("{"), "expected JSON"),
    "another schema": (change(schema_version=9), "schema_version: expected one of 1, 2, got 9"),
    "an older schema": (change(schema_version=1), "fingerprints: expected names among adapter, ladder, got"),
    "a module too many": (change(modules=["nowhere"]), "widths: expected 1 pairs, one for each module, got 14"),
    "another module": (change(modules=["nowhere"], widths=[[1, 1]]), r"tensor edges: expected \(4, 1, 4\) torch.int64"),
    "a module twice": (change(modules=["m", "m"]), r"modules: expected every name once, got \('m', 'm'\)"),
    "another kind": (
        change(kind="mixed"),
        "fingerprints.directions: expected none of svd, text of any other kind, got",
    ),
    "another coded kind": (
        change(kind="mixed", fingerprints={"adapter": "a", "ladder": "b", "directions": "c"}),
        "expected fingerprint b, got",
    ),
    "no kind": (change(kind="ladder"), "kind: expected one of svd, ranked, mixed, distilled, got 'ladder'"),
    "other rungs": (change(rungs=[0, 2, 5, 8]), "expected fingerprint"),
    "half a rung": (change(rungs=[0, 2, 4.5, 8]), "expected fingerprint"),
    "fewer rungs": (change(rungs=[0, 2, 8]), r"tensor edges: expected \(3, 14, 4\) torch.int64, got \(\(4, 14, 4\)"),
    "a huge rung": (change(rungs=[0, 2, 4, 10**12]), r"rungs\[3\]: expected a rank in"),
    "rungs that fall": (change(rungs=[4, 2, 0, 8]), "rungs: expected a list of .* strictly ascending"),
    "a bank without end": (change(bank_of=[0, 0, 0, 10**9]), r"bank_of\[3\]: expected a whole number in"),
    "a bank more": (change(bank_of=[0, 0, 1, 2]), "edges: expected at most the directions that module .* in bank 2"),
    "a scale": (change(scales=[1, 1.1, 1, 1]), "expected fingerprint"),
    "a scale of none": (change(scales=[1, 0, 1, 1]), r"scales\[1\]: expected a number in \(0"),
    "another width": (change(widths=[[64, 65]] * 14), r"tensor 0\..*\.wide: expected \[rows, "),
    "the top as resident": (change(resident=3), "resident: expected .* not the top's, got 3"),
    "a list": (lambda folder: (folder / RECORD).write_text("[]"), "expected a JSON object, got list"),
    "nested": (lambda folder: (folder / RECORD).write_text("[" * 100_000), "nested too deep"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused_in_one_line(saved, damage, message):
    damage(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_ladder(saved)
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value)


HOSTILE = [math.nan, math.inf, -1, 0, 1.5, True, None, "", "x", [], {}, [1], {"a": 1}, [None] * 2000, 1e308, 10**13]


@pytest.mark.parametrize("kind", ["svd", "coded"])
def test_any_value_in_the_place_of_any_other_is_right_or_refused_in_one_line(kind, ladder, coded, tmp_path):
    ladder = {"svd": ladder, "coded": coded}[kind]
    saved = save_ladder(ladder, tmp_path / "ladder")
    text = (saved / RECORD).read_text()
    record = json.loads(text)
    places = [(name,) for name in record] + [(name, 1) for name in ("rungs", "bank_of", "scales", "widths")]
    places += [("modules", 0), ("bytes", 0)] + [("fingerprints", name) for name in record["fingerprints"]]
    accepted = set()
    for place, value in product(places, HOSTILE):
        changed = json.loads(text)
        holder = changed if len(place) == 1 else changed[place[0]]
        if holder[place[-1]] == value and type(holder[place[-1]]) is type(value):
            continue
        holder[place[-1]] = value
        (saved / RECORD).write_text(json.dumps(changed))
        found = loaded_or_refused(saved)
        if isinstance(found, str):
            assert found.startswith(str(saved)), (place, value)
            assert "\n" not in found
            assert ", got " in found
            assert len(found) < 1000
        else:
            accepted.add((place[0], str(value)))
            assert found.base_model is None or isinstance(found.base_model, str)
            if place[0] != "resident":
                assert found.fingerprint == ladder.fingerprint
    # A name, a figure that nothing reads; and, of what is there, less.
    assert {name for name, _ in accepted} <= {"base_model", "bytes", "resident", "quality"}
    assert {value for name, value in accepted if name == "resident"} <= {"0"}
    assert {value for name, value in accepted if name == "quality"} <= {"[]"}


def loaded_or_refused(folder):
    try:
        return load_ladder(folder)
    except ValueError as error:
        return str(error)


WRONG_TENSORS = {
    "an edge beyond the module": (edge(2, 0, 3, 9), r"edges: expected at most the directions that module"),
    "an edge below 0": (edge(0, 0, 0, -1), "edges: expected counts that do not fall over formats"),
    "an edge that falls along formats": (edge(2, 0, 1, 3), "edges: expected counts that do not fall over formats"),
    "an edge that falls along rungs": (edge(1, 0, slice(None), 5), "edges: expected none to fall"),
    "fewer bits than are there": (edge(1, 0, 0, 1), "edges: expected at most the directions that module"),
    "a top rung that leaves something out": (
        edge(3, 0, slice(None), 7),
        "edges: expected a top rung that is the whole adapter",
    ),
    "a top rung in fewer bits": (edge(3, 0, 0, 7), "edges: expected"),
    "edges of another type": (
        lambda tensors: tensors.update(edges=tensors["edges"].float()),
        r"tensor edges: expected \(4, 14, 4\) torch.int64, got .*torch.float32",
    ),
    "a factor of other rows": (
        part("0.a.wide", lambda a: a[:3]),
        f"edges: expected at most .* module {Q} has in bank 0",
    ),
    "an exact factor of other rows": (
        part("1.b.wide", lambda b: b[:5]),
        f"edges: expected at most the directions that module {Q} has in bank 1",
    ),
    "a factor with an axis more": (
        part("1.b.wide", lambda b: b[None]),
        rf"tensor 1\.{Q}\.b\.wide: expected \[rows, 64\]",
    ),
    "a factor of another type": (
        part("0.a.wide", torch.Tensor.int),
        rf"tensor 0\.{Q}\.a\.wide: expected .* or torch.float64, got \[8, 64\] of torch.int32",
    ),
    "a factor of a type that there is not": (
        part("0.a.wide", lambda a: a.to(torch.float8_e5m2)),
        rf"tensor '0\.{Q}\.a\.wide': expected a dtype of PyTorch's, got F8_E5M2",
    ),
    "a factor that is not finite": (part("0.b.wide", lambda b: b * torch.inf), f"module {Q}: expected finite numbers"),
    "an exact factor that is not finite": (
        part("1.a.wide", lambda a: a * torch.nan),
        f"module {Q}: expected finite numbers",
    ),
    "a tensor too many": (lambda tensors: tensors.update(x=torch.ones(1)), "tensor 'x': expected none, got"),
    "a part that there is not": (
        lambda tensors: tensors.update({f"0.{Q}.a.plane3": torch.ones(1)}),
        rf"tensor '0\.{Q}\.a\.plane3': expected none, got",
    ),
    "a tensor too few": (lambda tensors: tensors.pop(f"0.{Q}.b.wide"), f"edges: expected at most .* module {Q} has"),
}


def table(name, value):
    return lambda tensors: tensors.update({f"difficulty.{name}": value(tensors[f"difficulty.{name}"]).contiguous()})


TABLES = r"expected some torch.uint8 codes, got "


WRONG_TABLES = {
    "codes of another type": (table("token", torch.Tensor.long), rf"tensor difficulty\.token: {TABLES}.*torch.int64"),
    "codes below 0": (table("pair", torch.Tensor.char), rf"tensor difficulty\.pair: {TABLES}.*torch.int8"),
    "codes of a type that there is not": (
        table("pair", lambda t: t.float().to(torch.float8_e5m2)),
        rf"tensor difficulty\.pair: {TABLES}.*F8_E5M2",
    ),
    "no code": (table("token", lambda t: t[:0]), rf"tensor difficulty\.token: {TABLES}\(\(0,\), torch.uint8\)"),
    "one code alone": (table("pair", lambda t: t[0]), rf"tensor difficulty\.pair: {TABLES}\(\(\), torch.uint8\)"),
    "a table with an axis more": (
        table("pair", lambda t: t[None]),
        rf"tensor difficulty\.pair: {TABLES}.*\(1, 65536\)",
    ),
    "no table of pairs": (lambda tensors: tensors.pop("difficulty.pair"), rf"tensor difficulty\.pair: {TABLES}None"),
    "no table of tokens": (lambda tensors: tensors.pop("difficulty.token"), rf"tensor difficulty\.token: {TABLES}None"),
    "a code beyond 1": (
        table("token", lambda t: t.index_fill(0, torch.tensor([7]), 255)),
        r"tensor difficulty\.token: expected codes up to 254, got 255",
    ),
    "a table of something else": (
        lambda tensors: tensors.update({"difficulty.triple": tensors["difficulty.pair"].clone()}),
        r"tensor 'difficulty\.triple': expected none, got one",
    ),
}


WRONG_CODED = {
    "a plane of other rows": (part("0.a.plane2", lambda x: x[:5]), rf"tensor 0\.{Q}\.a\.plane2: expected the 8 rows"),
    "a finer plane of other rows": (
        part("0.b.plane8", lambda x: x[:5]),
        rf"tensor 0\.{Q}\.b\.plane8: expected the 8 rows that have a scale at 8 bits",
    ),
    "a plane of another width": (
        part("0.a.plane4", lambda x: x[:, :-1]),
        rf"tensor 0\.{Q}\.a\.plane4: expected \[rows, 16\] of torch.uint8, got \[8, 15\]",
    ),
    "a plane of another type": (part("0.a.plane4", torch.Tensor.float), rf"tensor 0\.{Q}\.a\.plane4: expected .*uint8"),
    "a scale too few": (part("0.a.scale8", lambda x: x[:5]), f"edges: expected at most .* module {Q} has in bank 0"),
    "a scale too few of those that nobody reads": (
        part("0.a.scale2", lambda x: x[:7]),
        "expected directions of which .* is the sample, got",
    ),
    "a scale of another type": (
        part("0.a.scale2", torch.Tensor.float),
        rf"tensor 0\.{Q}\.a\.scale2: expected .*bfloat16",
    ),
    "a scale that is not finite": (part("0.b.scale8", lambda x: x * torch.inf), f"module {Q}: expected finite numbers"),
    "other scales": (part("0.b.scale8", lambda x: x * 2), "expected directions of which .* is the sample, got"),
}


@pytest.mark.parametrize(("damage", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_tensors_that_contradict_each_other_are_refused(saved, damage, message):
    assert_refused(saved, damage, message)


@pytest.mark.parametrize(("damage", "message"), WRONG_TABLES.values(), ids=WRONG_TABLES.keys())
def test_tables_that_are_none_are_refused(saved_tables, damage, message):
    assert_refused(saved_tables, damage, message)


@pytest.mark.parametrize(("damage", "message"), WRONG_CODED.values(), ids=WRONG_CODED.keys())
def test_coded_tensors_that_contradict_each_other_are_refused(saved_coded, damage, message):
    assert_refused(saved_coded, damage, message)


def assert_refused(folder, damage, message):
    rewritten(folder, lambda tensors: None)
    load_ladder(folder)
    rewritten(folder, damage)
    with pytest.raises(ValueError, match=rf"{TENSORS}: {message}") as error:
        load_ladder(folder)
    assert "\n" not in str(error.value)
    assert ", got " in str(error.value)
    assert str(error.value).endswith("again")


def test_a_file_cannot_hold_more_than_it_says(saved_coded, coded):
    """A ladder of fewer rungs over the same directions is right; what nobody reads is loaded and saved all the same."""

    def fewer(record):
        for name in ("rungs", "bank_of", "scales", "bytes"):
            record[name] = record[name][2:]

    rewritten(saved_coded, lambda tensors: tensors.update(edges=tensors["edges"][2:].contiguous()), fewer)
    assert_same(load_ladder(saved_coded), coded.with_rungs((2, 4)))

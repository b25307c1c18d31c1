"""A ladder on disk as the first version wrote it: it still loads, and its damage is refused."""

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save

from runtime import load_ladder, open_ladder, save_ladder
from runtime.ladder.store import RECORD, TENSORS
from tests.runtime.store.stored import Q, assert_same, change, damage_tensors, edge


@pytest.fixture
def schema1(ladder, tmp_path):
    """A ladder as version 1 wrote it: float32 factors and singular values by module, the edges, a record."""
    folder = tmp_path / "old"
    folder.mkdir()
    tensors = {"edges": ladder.edges}
    for name, own in ladder.banks[0].items():
        a, b = own.read(0, 8, 16)
        tensors |= {f"{name}.a": a, f"{name}.b": b, f"{name}.singular_values": a.square().sum(1)}
    data = save(tensors, metadata={"format": "pt"})
    (folder / TENSORS).write_bytes(data)
    record = {
        "schema_version": 1, "kind": "svd", "rungs": ladder.rungs, "modules": list(ladder.modules),
        "bytes": ladder.rung_bytes().tolist(), "base_model": ladder.base_model,
        "fingerprints": {"adapter": ladder.adapter, "ladder": ladder.fingerprint},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return folder


def test_a_ladder_of_the_first_version_still_loads(schema1, ladder, tmp_path):
    found = load_ladder(schema1)
    assert (found.kind, found.rungs, found.fingerprint) == ("svd", ladder.rungs, ladder.fingerprint)
    assert torch.equal(found.edges, ladder.edges)
    for name, own in ladder.banks[0].items():
        for j in range(len(ladder.rungs)):
            rank = ladder.rungs[j]
            a, b = found.update(name, j)
            assert torch.equal(a, own.a.wide[:rank])
            assert torch.equal(b, own.b.wide[:rank])
    assert float(found.lost_energy()[-1]) == 0
    held = open_ladder(schema1, (2, 3), resident_rung=3)
    assert (held.rungs, held.resident, held.resident_bytes()) == ((2, 3, 8), 1, ladder.with_rungs((3,)).rung_bytes()[0])
    assert load_ladder(schema1, 4).resident == 2
    assert_same(load_ladder(save_ladder(found, tmp_path / "again")), found)


OLD_DAMAGE = {
    "another tensor file": (damage_tensors, "expected the file ladder.json was written with"),
    "other rungs": (change(rungs=[0, 2, 5, 8]), "expected fingerprint"),
    "fewer rungs": (change(rungs=[0, 2, 8]), r"edges: expected \(3, 14, 4\) torch.int64"),
    "another kind": (change(kind="mixed"), "kind: expected one of svd, got 'mixed'"),
    "a module twice": (change(modules=["m", "m"]), "modules: expected every name once"),
    "a module too many": (change(modules=["m"]), r"tensor 'm\.a': expected \[R, D\] of torch.float32, got none"),
    "no kind": (change(kind=None), "kind: expected"),
}


WRONG_OLD = {
    "a factor of another type": (
        lambda t: t.update({f"{Q}.a": t[f"{Q}.a"].half()}),
        rf"tensor '{Q}\.a': expected \[R, D\] of torch.float32, got \[8, 64\] of torch.float16",
    ),
    "a factor of fewer rows": (lambda t: t.update({f"{Q}.a": t[f"{Q}.a"][:5].clone()}), "edges: expected at most the"),
    "a factor that is not finite": (lambda t: t[f"{Q}.b"].fill_(math.nan), f"module {Q}: expected finite numbers"),
    "no edges": (lambda t: t.pop("edges"), "tensor edges: expected one, got none"),
    "edges of another type": (lambda t: t.update(edges=t["edges"].int()), r"edges: expected .*, got .* torch.int32"),
    "a top rung that leaves something out": (
        edge(3, 0, slice(None), 7),
        "edges: expected a top rung that is the whole",
    ),
}


@pytest.mark.parametrize(("damage", "message"), OLD_DAMAGE.values(), ids=OLD_DAMAGE.keys())
def test_damage_of_the_first_version_is_refused_in_one_line(schema1, damage, message):
    damage(schema1)
    with pytest.raises(ValueError, match=message) as error:
        load_ladder(schema1)
    assert "\n" not in str(error.value)
    assert str(schema1) in str(error.value)


@pytest.mark.parametrize(("damage", "message"), WRONG_OLD.values(), ids=WRONG_OLD.keys())
def test_tensors_of_the_first_version_that_contradict_each_other_are_refused(schema1, damage, message):
    tensors = load_file(schema1 / TENSORS)
    damage(tensors)
    data = save(tensors)
    (schema1 / TENSORS).write_bytes(data)
    change(tensors_sha256=hashlib.sha256(data).hexdigest())(schema1)
    with pytest.raises(ValueError, match=rf"{TENSORS}: {message}") as error:
        load_ladder(schema1)
    assert "\n" not in str(error.value)

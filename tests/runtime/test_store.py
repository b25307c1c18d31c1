"""A ladder on disk: what is loaded is what was saved, whatever took an adapter takes it, damage is refused."""

import hashlib
import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load, save

from runtime import adaptive, build_ladder, generate, load_adapter, load_ladder, open_ladder, save_ladder
from runtime.export.__main__ import main as export
from runtime.ladder.formats import BITS
from runtime.ladder.store import RECORD, TENSORS

GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, "min_new_tokens": 12}


@pytest.fixture(scope="module")
def ladder(llama_adapter):
    return build_ladder(load_adapter(llama_adapter), (0, 2, 4, 8))


@pytest.fixture
def saved(ladder, tmp_path):
    return save_ladder(ladder, tmp_path / "ladder")


def test_loaded_is_what_was_saved(ladder, saved):
    found = load_ladder(saved)
    assert (found.kind, found.rungs, found.adapter, found.fingerprint) == (
        "svd", ladder.rungs, ladder.adapter, ladder.fingerprint,
    )  # fmt: skip
    assert list(found.modules) == list(ladder.modules)
    assert torch.equal(found.edges, ladder.edges)
    for name, factors in ladder.modules.items():
        for part in ("a", "b", "singular_values"):
            assert torch.equal(getattr(found.modules[name], part), getattr(factors, part))
    assert json.loads((saved / RECORD).read_text())["bytes"] == ladder.rung_bytes().tolist()


def test_the_table_says_which_bits_every_direction_is_read_at(varied_ladder, llama_adapter):
    ladder = varied_ladder(llama_adapter, (2, 4, 8))
    bits = ladder.bits()
    for j in range(3):
        for m in range(len(ladder.modules)):
            assert bits[j, m].tolist() == [16] * int(ladder.rank_table[j, m]) + [0] * (8 - int(ladder.rank_table[j, m]))
    expected = (ladder.rank_table.double() * ladder.row_elements.double()).sum(1) * 2
    assert torch.equal(ladder.rung_bytes(), expected)


def test_bytes_count_every_range_at_its_own_bits(ladder):
    """Rung 1 reads its directions at 16, 8, 4 and 2 bits: ranges of 1, 2, 1 and 3."""
    edges = ladder.edges.clone()
    edges[1] = torch.tensor([1, 3, 4, 7])
    edges[2] = torch.tensor([2, 4, 6, 8])
    mixed = replace(ladder, edges=edges)
    assert mixed.bits()[1, 0].tolist() == [16, 8, 8, 4, 2, 2, 2, 0]
    assert BITS == (16, 8, 4, 2)
    assert float(mixed.rung_bytes()[1]) == float(ladder.row_elements.sum()) * (16 + 2 * 8 + 4 + 3 * 2) / 8
    assert float(mixed.mean_rank()[1]) == pytest.approx((16 + 16 + 4 + 6) / 16)


def test_no_factoring_when_loaded(saved, monkeypatch):
    monkeypatch.setattr("runtime.ladder.factors.svd_factors", lambda factors: 1 / 0)
    assert open_ladder(saved, (2, 6)).rungs == (2, 6, 8)
    assert open_ladder(str(saved)).rungs == (0, 2, 4, 8)


def test_everything_that_takes_an_adapter_takes_a_ladder(
    tiny_llama, llama_adapter, ladder, saved, tmp_path, monkeypatch
):
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    for asked in ({}, {"rung": 3}):
        outs = [generate(tiny_llama, source, ids, **asked, **GREEDY) for source in (llama_adapter, saved, ladder)]
        assert all(torch.equal(outs[0].sequences, out.sequences) for out in outs)
    with adaptive(tiny_llama, str(saved), rung=2):
        logits = tiny_llama(ids).logits
    folders = []
    for name, source in (("from-peft", llama_adapter), ("from-ladder", saved)):
        folders.append(tmp_path / name)
        monkeypatch.setattr(
            "sys.argv", ["export", "--adapter", str(source), "--rung", "2", "--output", str(folders[-1])]
        )
        export()
    exported = [load_adapter(folder) for folder in folders]
    for name, factors in exported[0].modules.items():
        assert torch.equal(factors.a, exported[1].modules[name].a)
    with adaptive(tiny_llama, folders[1]):
        torch.testing.assert_close(tiny_llama(ids).logits, logits, atol=1e-5, rtol=1e-5)


def test_the_fingerprint_is_that_of_source_and_table(
    ladder, llama_adapter, make_peft_adapter, tiny_llama_factory, tmp_path
):
    assert build_ladder(load_adapter(llama_adapter), (0, 2, 4, 8)).fingerprint == ladder.fingerprint
    assert ladder.with_rungs((0, 2, 4)).fingerprint == ladder.fingerprint
    assert ladder.with_rungs((2, 4)).fingerprint != ladder.fingerprint
    other = make_peft_adapter(tiny_llama_factory, tmp_path / "other", seed=3)
    assert build_ladder(load_adapter(other), (0, 2, 4, 8)).fingerprint != ladder.fingerprint


def damage_tensors(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)


def change(**fields):
    def edit(folder):
        record = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps({**record, **fields}))

    return edit


DAMAGE = {
    "another tensor file": (damage_tensors, "expected the file ladder.json was written with"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "got no ladder.safetensors"),
    "no JSON": (lambda folder: (folder / RECORD).write_text("{"), "expected JSON"),
    "another schema": (change(schema_version=9), "schema_version: expected one of 1, got 9"),
    "a module too many": (change(modules=["nowhere"]), "tensor .*: expected none, got torch.float32"),
    "a module twice": (change(modules=["m", "m"]), r"modules: expected every name once, got \('m', 'm'\)"),
    "another kind": (change(kind="ranked"), "kind: expected one of svd, got 'ranked'"),
    "other rungs": (change(rungs=[0, 2, 5, 8]), "expected fingerprint"),
    "fewer rungs": (change(rungs=[0, 2, 8]), r"edges: expected \(3, 14, 4\) torch.int64, .*, got \(4, 14, 4\)"),
    "a huge rung": (change(rungs=[0, 2, 4, 10**12]), r"rungs\[3\]: expected a whole number"),
    "rungs that fall": (change(rungs=[4, 2, 0, 8]), "rungs: expected a list of .* strictly ascending"),
    "a list": (lambda folder: (folder / RECORD).write_text("[]"), "expected a JSON object, got list"),
    "nested": (lambda folder: (folder / RECORD).write_text("[" * 100_000), "nested too deep"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused_in_one_line(saved, damage, message):
    damage(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_ladder(saved)
    assert "\n" not in str(error.value)


HOSTILE = [math.nan, math.inf, -1, 0, 1.5, True, None, "", "x", [], {}, [1], {"a": 1}, [None] * 2000, 1e308, 10**13]


def test_any_value_in_the_place_of_any_other_is_right_or_refused_in_one_line(saved, ladder):
    text = (saved / RECORD).read_text()
    record = json.loads(text)
    places = [(name,) for name in record] + [("rungs", 1), ("modules", 0), ("bytes", 0)]
    places += [("fingerprints", name) for name in record["fingerprints"]]
    accepted = set()
    for place, value in product(places, HOSTILE):
        changed = json.loads(text)
        holder = changed if len(place) == 1 else changed[place[0]]
        holder[place[-1]] = value
        (saved / RECORD).write_text(json.dumps(changed))
        found = loaded_or_refused(saved)
        if isinstance(found, str):
            assert found.startswith(str(saved)), (place, value)
            assert "\n" not in found
            assert ", got " in found
            assert len(found) < 1000
        else:
            accepted.add(place[0])
            assert found.fingerprint == ladder.fingerprint
            assert found.base_model is None or isinstance(found.base_model, str)
    assert accepted == {"base_model", "bytes"}, "a name, and a figure that nothing reads"


def loaded_or_refused(folder):
    try:
        return load_ladder(folder)
    except ValueError as error:
        return str(error)


def rewritten(folder, change):
    """Other tensors with a record that agrees with them in digest and fingerprint, as another program would write."""
    tensors = load((folder / TENSORS).read_bytes())
    change(tensors)
    data = save(tensors)
    (folder / TENSORS).write_bytes(data)
    record = json.loads((folder / RECORD).read_text())
    identity = {key: record[key] for key in ("kind", "rungs")}
    identity |= {"edges": tensors["edges"].tolist(), "adapter": record["fingerprints"]["adapter"]}
    record["fingerprints"]["ladder"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    record["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / RECORD).write_text(json.dumps(record))


Q = "model.layers.0.self_attn.q_proj"


def edge(j, m, f, value):
    return lambda tensors: tensors["edges"].__setitem__((j, m, f), value)


def part(name, value):
    return lambda tensors: tensors.update({f"{Q}.{name}": value(tensors[f"{Q}.{name}"]).contiguous()})


WRONG_TENSORS = {
    "an edge beyond the module": (edge(3, 0, 3, 9), r"edges: expected 0 to every module's rows, got \[0, 9\]"),
    "an edge below 0": (edge(0, 0, 0, -1), r"edges: expected 0 to every module's rows, got \[-1, 8\]"),
    "an edge that falls along formats": (edge(2, 0, 1, 3), "edges: expected none to fall"),
    "an edge that falls along rungs": (edge(1, 0, slice(None), 5), "edges: expected none to fall"),
    "a top rung that leaves something out": (
        edge(slice(2, 4), 0, slice(None), 7),
        "edges: expected a top rung that is",
    ),
    "edges of another type": (
        lambda tensors: tensors.update(edges=tensors["edges"].float()),
        "tensor 'edges': expected torch.int64, got torch.float32",
    ),
    "a factor of other rows": (
        part("a", lambda a: a[:5]),
        rf"module {Q}: .* expected shapes \[R, d_in\], .*, got \[\(5, 64\), \(8, 64\)",
    ),
    "a factor with an axis more": (
        part("b", lambda b: b[None]),
        rf"module {Q}: .* expected shapes \[R, d_in\], .*, got .*\(1, 8, 64\)",
    ),
    "a factor of another type": (
        part("a", torch.Tensor.half),
        f"tensor '{Q}.a': expected torch.float32, got torch.float16",
    ),
    "a factor that is not finite": (part("b", lambda b: b * torch.inf), f"module {Q}: expected finite numbers"),
    "singular values that rise": (
        part("singular_values", lambda s: s.flip(0)),
        f"module {Q}: expected singular values",
    ),
    "a tensor too many": (lambda tensors: tensors.update(x=torch.ones(1)), "tensor 'x': expected none, got"),
    "a tensor too few": (lambda tensors: tensors.pop(f"{Q}.b"), f"tensor '{Q}.b': expected torch.float32, got none"),
}


@pytest.mark.parametrize(("damage", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_tensors_that_contradict_each_other_are_refused(saved, damage, message):
    rewritten(saved, lambda tensors: None)
    load_ladder(saved)
    rewritten(saved, damage)
    with pytest.raises(ValueError, match=rf"{TENSORS}: {message}") as error:
        load_ladder(saved)
    assert "\n" not in str(error.value)
    assert ", got " in str(error.value)
    assert str(error.value).endswith("again")

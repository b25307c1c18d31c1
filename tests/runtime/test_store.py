"""A ladder on disk: what is loaded is what was saved, whatever took an adapter takes it, damage is refused."""

import json
from dataclasses import replace

import pytest
import torch

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
    "another schema": (change(schema_version=9), "expected schema_version 1, got 9"),
    "a module too many": (change(modules=["nowhere"]), "expected a whole ladder"),
    "another kind": (change(kind="ranked"), "expected fingerprint"),
    "a list": (lambda folder: (folder / RECORD).write_text("[]"), "expected schema_version 1, got None"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused_in_one_line(saved, damage, message):
    damage(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_ladder(saved)
    assert "\n" not in str(error.value)

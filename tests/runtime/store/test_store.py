"""A ladder on disk: what is loaded is what was saved, and whatever took an adapter takes it."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from policy.difficulty import Difficulty
from runtime import adaptive, build_ladder, generate, load_adapter, load_ladder, open_ladder, save_ladder
from runtime.export.__main__ import main as export
from runtime.ladder import store
from runtime.ladder.formats import PARTS
from runtime.ladder.store import RECORD, TENSORS
from tests.runtime.reference import drawn_tables
from tests.runtime.store.stored import Q, assert_same, assert_same_tables, parts

GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, "min_new_tokens": 12}


def test_loaded_is_what_was_saved(any_ladder, tmp_path):
    quality = tuple(
        {"rung": r, "share": 0.1, "bytes": 12.0, "kl": -1e-12, "kl_se": None, "perplexity": 3.5}
        for r in any_ladder.rungs
    )
    ladder = replace(any_ladder, quality=quality)
    folder = save_ladder(ladder, tmp_path / "ladder", {"texts": ["a", "b"], "kind": "nobody's business"})
    assert_same(load_ladder(folder), ladder)
    assert_same(open_ladder(str(folder)), ladder)
    record = json.loads((folder / RECORD).read_text())
    assert record["bytes"] == ladder.rung_bytes().tolist()
    assert record["texts"] == ["a", "b"]
    assert record["kind"] == ladder.kind, "what a ladder says of itself cannot be said otherwise"


def test_tables_of_difficulty_go_wherever_their_ladder_goes(any_ladder, tmp_path):
    tables = drawn_tables(1, vocabulary=300)
    ladder = replace(any_ladder, difficulty=tables)
    folder = save_ladder(ladder, tmp_path / "ladder")
    lowest = ladder.rungs[0]
    found = [
        load_ladder(folder), load_ladder(folder, lowest), open_ladder(folder, (lowest,)),
        open_ladder(folder, (0,), resident_rung=0),
        load_ladder(save_ladder(load_ladder(folder, lowest), tmp_path / "again")), ladder.up_to(lowest),
        ladder.with_rungs((0,)), ladder.with_rungs((lowest,)).up_to(lowest),
    ]  # fmt: skip
    for own in found:
        assert_same_tables(own.difficulty, tables)
    names = load_file(folder / TENSORS).keys() - load_file(save_ladder(any_ladder, tmp_path / "plain") / TENSORS).keys()
    assert names == {"difficulty.token", "difficulty.pair"}


def test_tables_of_difficulty_are_no_part_of_the_fingerprint(any_ladder, tmp_path):
    prints = set()
    for number, tables in enumerate((None, drawn_tables(0), drawn_tables(1), Difficulty.neutral())):
        ladder = replace(any_ladder, difficulty=tables)
        folder = save_ladder(ladder, tmp_path / str(number))
        prints |= {
            ladder.fingerprint,
            load_ladder(folder).fingerprint,
            load_ladder(folder, ladder.rungs[0]).fingerprint,
        }
    assert len(prints) == 1


def test_tables_that_share_memory_are_written_each(ladder, tmp_path):
    codes = drawn_tables(0, 900).token
    for number, tables in enumerate((Difficulty(codes[:400], codes[100:500]), Difficulty(codes[100:500:2], codes))):
        found = load_ladder(save_ladder(replace(ladder, difficulty=tables), tmp_path / str(number)))
        assert_same_tables(found.difficulty, tables)


def test_it_is_loaded_as_far_up_as_asked_for(any_ladder, tmp_path):
    """Equal to what the whole one keeps of itself, with the fingerprint of the whole, and saved again as it is."""
    folder = save_ladder(any_ladder, tmp_path / "ladder")
    for rung in any_ladder.rungs:
        found = load_ladder(folder, rung)
        assert_same(found, any_ladder.up_to(rung))
        again = save_ladder(found, tmp_path / "again")
        assert_same(load_ladder(again), found)
        for lower in any_ladder.rungs[: found.highest + 1]:
            assert_same(load_ladder(again, lower), any_ladder.up_to(lower))
        if found.resident is not None:
            with pytest.raises(ValueError, match=rf"rung: expected at most the resident rung {rung}, got"):
                load_ladder(again, any_ladder.rungs[found.resident + 1])
            with pytest.raises(
                ValueError, match=r"rungs: expected .*, those of a ladder of which not all is in memory"
            ):
                open_ladder(again, (1, 2, 3))


def test_no_more_is_read_than_asked_for(saved_coded, coded, monkeypatch):
    read = []

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs).__enter__()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def get_tensor(self, name):
            assert name == "edges"
            return self.file.get_tensor(name)

        def get_slice(self, name):
            inner = self.file.get_slice(name)
            return type("Slice", (), {"__getitem__": lambda _, rows: read.append(inner[rows]) or read[-1]})()

    monkeypatch.setattr(store, "safe_open", Watched)
    for rung in coded.rungs:
        read.clear()
        held = load_ladder(saved_coded, rung)
        assert sum(x.nbytes for x in read) == sum(x.nbytes for x in parts(held).values())
    assert len(read) == len(load_file(saved_coded / TENSORS)) - 1


def test_the_rungs_and_the_memory_that_were_asked_for(saved, saved_coded, coded, ladder, llama_adapter):
    assert open_ladder(saved, (2, 6)).rungs == (2, 6, 8)
    held = open_ladder(saved, (3, 5), resident_rung=5)
    assert (held.rungs, held.resident) == ((3, 5, 8), 1)
    assert held.resident_bytes() == ladder.with_rungs((3, 5)).rung_bytes()[1]
    assert held.fingerprint == ladder.with_rungs((3, 5)).fingerprint
    held = open_ladder(saved_coded, (0, 0.5, 4), resident_rung=0.5)
    assert_same(held, coded.with_rungs((0, 0.5, 4)).up_to(0.5))
    assert open_ladder(llama_adapter, (1, 2), resident_rung=1).resident_bytes() == ladder.rung_bytes()[1] / 2
    assert open_ladder(coded, resident_rung=1).resident == 1
    assert open_ladder(coded) is coded
    assert open_ladder(coded.up_to(1), resident_rung=0.5).resident == 0
    for source in (saved_coded, coded):
        with pytest.raises(ValueError, match=r"^rung: expected one of \(0\.5, 1, 2, 4, 8\), got 3; "):
            open_ladder(source, resident_rung=3)


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


def test_a_coded_ladder_serves_the_same_saved_and_in_part(tiny_llama, coded, saved_coded):
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    for rung in coded.rungs:
        sources = (coded, saved_coded, str(saved_coded), load_ladder(saved_coded, rung), coded.up_to(rung))
        outs = [generate(tiny_llama, source, ids, rung=rung, **GREEDY).sequences for source in sources]
        assert all(torch.equal(outs[0], out) for out in outs)


def test_the_fingerprint_is_that_of_source_and_table(
    ladder, llama_adapter, make_peft_adapter, tiny_llama_factory, tmp_path
):
    assert build_ladder(load_adapter(llama_adapter), (0, 2, 4, 8)).fingerprint == ladder.fingerprint
    assert ladder.with_rungs((0, 2, 4)).fingerprint == ladder.fingerprint
    assert ladder.with_rungs((2, 4)).fingerprint != ladder.fingerprint
    other = make_peft_adapter(tiny_llama_factory, tmp_path / "other", seed=3)
    assert build_ladder(load_adapter(other), (0, 2, 4, 8)).fingerprint != ladder.fingerprint


def test_a_ladder_replaces_a_ladder_and_nothing_else(ladder, coded, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_same(load_ladder(save_ladder(ladder, tmp_path / "empty")), ladder)
    assert_same(load_ladder(save_ladder(coded, saved)), coded)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary").write_text("today")
    (tmp_path / "file").write_text("today")
    for path in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(FileExistsError, match=r"ladder: expected a new folder or an older ladder, got .*; choose"):
            save_ladder(ladder, path)
    assert (tmp_path / "mine" / "diary").read_text() == (tmp_path / "file").read_text() == "today"


def test_tensors_that_share_memory_are_written_each(adapter, tmp_path):
    """Views of one large tensor, and one bank used twice."""
    ladder = build_ladder(adapter, (2,))
    pool = torch.cat([own.a.wide for own in ladder.banks[0].values() if own.a.width == 64])
    views = iter(pool.split(8))
    bank = {
        name: replace(own, a=replace(own.a, wide=next(views))) if own.a.width == 64 else own
        for name, own in ladder.banks[0].items()
    }
    shared = replace(ladder, banks=(bank, bank))
    folder = save_ladder(shared, tmp_path / "ladder")
    assert_same(load_ladder(folder), shared)
    assert (folder / TENSORS).stat().st_size < 1.1 * 2 * sum(4 * 8 * (o.a.width + o.b.width) for o in bank.values())


def test_a_record_that_could_not_be_read_again_is_not_written(ladder, tmp_path):
    good = {"rung": 2, "share": 0.1, "bytes": 1.0, "kl": 0.1, "kl_se": 0.1, "perplexity": 2.0}
    for quality, message in (
        ({**good, "kl": math.nan}, r"quality\[0\]\.kl: expected a number"),
        ({**good, "extra": 1}, "quality.*: expected names among"),
        ({"rung": 2}, r"quality\[0\]\.share: expected .*, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            save_ladder(replace(ladder, quality=(quality,) * 4), tmp_path / "ladder")
    with pytest.raises(ValueError, match=r"extra: expected what JSON can say, got .*; correct it"):
        save_ladder(ladder, tmp_path / "ladder", {"loss": math.inf})
    assert not list(tmp_path.iterdir())


def test_the_file_is_written_from_any_device_and_layout(coded, tmp_path):
    turned = {
        name: replace(own, a=replace(own.a, scales=tuple(torch.stack([s, s], 1)[:, 0] for s in own.a.scales)))
        for name, own in coded.banks[0].items()
    }
    assert not next(iter(turned.values())).a.scales[0].is_contiguous()
    exact = {
        name: replace(own, b=replace(own.b, wide=own.b.wide.T.contiguous().T)) for name, own in coded.modules.items()
    }
    assert not next(iter(exact.values())).b.wide.is_contiguous()
    assert_same(load_ladder(save_ladder(replace(coded, banks=(turned, exact)), tmp_path / "l")), coded)


def test_the_names_in_a_file_are_those_of_the_parts(saved_coded):
    names = {
        name.removeprefix(f"0.{Q}.a.") for name in load_file(saved_coded / TENSORS) if name.startswith(f"0.{Q}.a.")
    }
    assert names == set(PARTS) - {"wide"}

"""Packed rungs stay small, serve the same tokens and leave as PEFT adapters."""

import pytest
import torch
from safetensors.torch import load_file

from runtime import build_ladder, export_rung, generate, load_adapter, load_ladder, save_ladder
from runtime.export import export_packed, folder_bytes
from runtime.ladder.adapter import WEIGHTS_NAME
from runtime.ladder.store import RECORD, TENSORS
from tests.runtime.coded import coded_ladder, narrow, two_bank_ladder
from tests.runtime.export.exported import CODED_RUNGS

GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, "min_new_tokens": 12}


@pytest.mark.parametrize("rung", CODED_RUNGS)
@pytest.mark.parametrize("build", [coded_ladder, two_bank_ladder])
def test_a_packed_rung_is_small_and_serves_the_same_tokens(
    build, rung, llama_adapter, tiny_llama_factory, tokens, tmp_path
):
    ladder = build(load_adapter(llama_adapter), CODED_RUNGS)
    whole = save_ladder(ladder, tmp_path / "whole")
    folder = export_packed(load_ladder(whole), tmp_path / "packed", rung=rung)
    nbytes = float(ladder.rung_bytes()[ladder.rung_index(rung)])
    held = load_file(folder / TENSORS)
    scales = sum(x.nbytes for name, x in held.items() if ".scale" in name)
    values = sum(x.nbytes for name, x in held.items() if name != "edges") - scales
    # The scales of one format are the rung's own, those of others come on top; the header is names.
    assert values + scales / 3 <= nbytes <= values + scales
    assert folder_bytes(folder) <= 1.1 * nbytes + 250 * len(held) + len((folder / RECORD).read_text())

    packed = load_ladder(folder)
    assert (packed.rungs, packed.resident, packed.kind) == ((rung, 8), 0, ladder.kind)
    assert float(packed.rung_bytes()[0]) == nbytes
    for name in ladder.modules:
        for own, expected in zip(packed.update(name, 0), ladder.update(name, ladder.rung_index(rung)), strict=True):
            assert torch.equal(own, expected)
    with pytest.raises(ValueError, match=rf"rung: expected at most the resident rung {rung}, got 8; "):
        packed.up_to(8)

    model = tiny_llama_factory()
    expected = generate(model, ladder, tokens[:, :9], rung=rung, **GREEDY).sequences
    assert torch.equal(generate(model, folder, tokens[:, :9], rung=rung, **GREEDY).sequences, expected)
    with pytest.warns(UserWarning, match=rf"every token gets .*{rung}, .*resident.* not the exact adapter"):
        assert torch.equal(generate(model, str(folder), tokens[:, :9], **GREEDY).sequences, expected)
    with pytest.raises(ValueError, match=r"rung: expected at most the resident rung") as error:
        generate(model, folder, tokens[:, :9], rung=8, **GREEDY)
    assert "\n" not in str(error.value)


def test_a_packed_rung_of_16_bits_is_that_prefix(llama_adapter, tmp_path):
    ladder = build_ladder(narrow(load_adapter(llama_adapter)), (2, 6))
    folder = export_packed(ladder, tmp_path / "packed", rung=6, scale=1.5)
    found = load_ladder(folder)
    assert (found.rungs, found.scales, found.resident) == ((6, 8), (1.5, 1.0), 0)
    assert found.resident_bytes() == int(ladder.rung_bytes()[1])
    held = sum(x.nbytes for name, x in load_file(folder / TENSORS).items() if name != "edges")
    assert held == int(ladder.rung_bytes()[1])
    for name in ladder.modules:
        a, b = ladder.update(name, 1)
        own = found.update(name, 0)
        assert torch.equal(own[0], a)
        assert torch.equal(own[1], 1.5 * b)


def test_a_packed_rung_leaves_as_a_peft_adapter_and_packed_again(llama_adapter, tmp_path):
    ladder = coded_ladder(load_adapter(llama_adapter), CODED_RUNGS)
    packed = load_ladder(export_packed(ladder, tmp_path / "packed", rung=1))
    plain, again = (export_rung(own, 1, tmp_path / name) for name, own in (("plain", ladder), ("again", packed)))
    assert (plain / WEIGHTS_NAME).read_bytes() == (again / WEIGHTS_NAME).read_bytes()
    twice = export_packed(packed, tmp_path / "twice", rung=1)
    assert (twice / TENSORS).read_bytes() == (tmp_path / "packed" / TENSORS).read_bytes()
    for write in (export_rung, lambda own, rung, path: export_packed(own, path, rung=rung)):
        with pytest.raises(ValueError, match=r"rung: expected at most the resident rung 1, got 8; "):
            write(packed, 8, tmp_path / "top")
    assert not (tmp_path / "top").exists()


def test_a_whole_ladder_is_packed_as_it_is(llama_adapter, tmp_path):
    ladder = coded_ladder(load_adapter(llama_adapter), CODED_RUNGS)
    found = load_ladder(export_packed(ladder, tmp_path / "packed"))
    assert (found.rungs, found.resident, found.fingerprint) == (ladder.rungs, None, ladder.fingerprint)


def test_refusals_of_packing_leave_nothing_behind(llama_adapter, tmp_path):
    ladder = coded_ladder(load_adapter(llama_adapter), CODED_RUNGS).with_rungs((0, 1))
    (tmp_path / "present").mkdir()
    output = tmp_path / "packed"
    cases = [
        ({"rung": 8}, "rung: expected one below 8 to pack, got the adapter itself, .*; write it unpacked"),
        (
            {"rung": 0},
            "rung: expected one with directions, got 0, the base model without an adapter; name a higher one",
        ),
        ({"rung": 3}, r"rung: expected one of \(0, 1, 8\), got 3; "),
        ({"scale": 1.1}, "scale: expected 1 for a whole ladder, got 1.1; name a rung, or leave it out"),
        ({"rung": 1, "scale": -1.0}, r"scale: expected a number in \(0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            export_packed(ladder, output, **options)
    with pytest.raises(FileExistsError, match="output: expected a folder that does not exist"):
        export_packed(ladder, tmp_path / "present", rung=1)
    assert [path.name for path in tmp_path.iterdir()] == ["present"]
    assert not list((tmp_path / "present").iterdir())

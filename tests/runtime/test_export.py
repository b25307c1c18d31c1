"""Rungs written back as plain PEFT adapters: PEFT loads them and computes what the runtime computes at that rung."""

import json
import sys

import pytest
import torch

from runtime import adaptive, build_ladder, export, export_rung, load_adapter
from runtime.export.__main__ import main
from runtime.ladder.adapter import CONFIG_NAME
from runtime.plan import static_plan
from runtime.reference.adaptive import activate

LOGITS = {"atol": 1e-4, "rtol": 0}
# Exported folders do not say that GPT-2's linears are transposed; PEFT looks at the model and says so.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 256, (2, 40), generator=generator)


@torch.no_grad()
def peft_logits(peft_load, model, folder, tokens):
    return peft_load(model, folder)(tokens).logits


@pytest.fixture(params=["llama", "gpt2", "patterned"])
def case(request, tiny_llama_factory, tiny_gpt2_factory, make_peft_adapter, tmp_path):
    """(model factory, adapter folder); `patterned` has another rank and alpha in some modules, under rsLoRA."""
    factory = tiny_gpt2_factory if request.param == "gpt2" else tiny_llama_factory
    if request.param != "patterned":
        return factory, request.getfixturevalue(f"{request.param}_adapter")
    patterns = {"rank_pattern": {"mlp.up_proj": 3, "q_proj": 12}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True}
    return factory, make_peft_adapter(factory, tmp_path / "patterned", **patterns)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("rung", [1, 4, 6, "top"])
def test_logits_at_a_rung_equal_pefts_with_the_exported_folder(case, rung, uniform, peft_load, tokens, tmp_path):
    factory, folder = case
    adapter = load_adapter(folder)
    rung = adapter.rank if rung == "top" else rung
    ladder = build_ladder(adapter, sorted({rung, adapter.rank}))
    exported = export_rung(ladder, rung, tmp_path / "rung", uniform=uniform)
    expected = peft_logits(peft_load, factory(), exported, tokens)
    model = factory()
    with adaptive(model, adapter, rung=rung):
        torch.testing.assert_close(model(tokens).logits, expected, **LOGITS)
    config = json.loads((exported / CONFIG_NAME).read_text())
    assert config["r"] == config["lora_alpha"] == rung
    assert not (uniform and config["rank_pattern"])


@pytest.mark.parametrize("uniform", [False, True])
def test_ranks_that_differ_by_module(
    uniform, llama_adapter, varied_ladder, peft_load, tiny_llama_factory, tokens, tmp_path
):
    ladder = varied_ladder(llama_adapter, (3, 8))
    ranks = ladder.rank_table[0].tolist()
    assert len(set(ranks)) > 3
    assert 0 in ranks, "a module without any direction is part of the case"
    expected = peft_logits(
        peft_load, tiny_llama_factory(), export_rung(ladder, 3, tmp_path / "rung", uniform=uniform), tokens
    )
    model = tiny_llama_factory()
    with activate(model, static_plan(ladder, 3)):
        torch.testing.assert_close(model(tokens).logits, expected, **LOGITS)


@pytest.mark.parametrize("name", ["gsm8k", "medquad"])
@pytest.mark.parametrize("rung", [8, 24])
def test_real_adapter_at_a_rung(
    name, rung, datapack, base_model_path, load_model, peft_load, pack_tokenizer, pack_documents, tmp_path
):
    text = [document["prompt"] + document["completion"] for document in pack_documents(name, 2)]
    batch = pack_tokenizer(text, return_tensors="pt", padding=True, truncation=True, max_length=96)
    adapter = load_adapter(datapack / "adapters" / name)
    exported = export_rung(build_ladder(adapter), rung, tmp_path / "rung")
    model = load_model(base_model_path)
    with adaptive(model, adapter, rung=rung):
        logits = model(**batch).logits
    with torch.no_grad():
        expected = peft_load(model, exported)(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], **LOGITS)


def test_scale_multiplies_the_update(llama_adapter, tmp_path):
    ladder = build_ladder(load_adapter(llama_adapter))
    plain = load_adapter(export_rung(ladder, 4, tmp_path / "plain"))
    scaled = load_adapter(export_rung(ladder, 4, tmp_path / "scaled", scale=1.125))
    for name, factors in plain.modules.items():
        other = scaled.modules[name]
        torch.testing.assert_close(other.scale * other.b @ other.a, 1.125 * factors.scale * factors.b @ factors.a)


def test_ladder_of_an_exported_rung_is_that_prefix(llama_adapter, tmp_path):
    ladder = build_ladder(load_adapter(llama_adapter))
    again = build_ladder(load_adapter(export_rung(ladder, 6, tmp_path / "rung")))
    assert again.rungs == (2, 4, 6)
    for name, factors in ladder.modules.items():
        torch.testing.assert_close(again.modules[name].singular_values, factors.singular_values[:6])


def test_dtype_of_the_stored_factors(llama_adapter, tmp_path):
    ladder = build_ladder(load_adapter(llama_adapter))
    written = load_adapter(export_rung(ladder, 2, tmp_path / "rung", dtype=torch.bfloat16, base_model="base"))
    assert {factors.a.dtype for factors in written.modules.values()} == {torch.bfloat16}
    assert written.base_model == "base"


def test_refusals_leave_nothing_behind(llama_adapter, tmp_path, monkeypatch):
    ladder = build_ladder(load_adapter(llama_adapter), (0, 4))
    with pytest.raises(ValueError, match="expected a rank above 0"):
        export_rung(ladder, 0, tmp_path / "zero")
    with pytest.raises(ValueError, match=r"rung: expected one of \(0, 4, 8\), got 5"):
        export_rung(ladder, 5, tmp_path / "five")
    present = tmp_path / "present"
    present.mkdir()
    with pytest.raises(FileExistsError, match="expected a folder that does not exist"):
        export_rung(ladder, 4, present)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_rung(ladder, 4, tmp_path / "half")
    assert list(tmp_path.iterdir()) == [present]


def test_command_writes_the_rung(llama_adapter, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rung"
    arguments = ["--adapter", str(llama_adapter), "--rung", "5", "--output", str(output), "--uniform"]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    main()
    assert "rung 5 written" in capsys.readouterr().out
    assert load_adapter(output).rank == 5


@pytest.mark.parametrize("rung", ["9", "0", "-1"])
def test_command_ends_in_one_line_for_a_bad_rung(rung, llama_adapter, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rung"
    arguments = ["--adapter", str(llama_adapter), "--rung", rung, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not output.exists()

"""Rungs written back: PEFT loads them and computes what the runtime computes at that rung."""

import json
from dataclasses import replace

import pytest
import torch

from runtime import adaptive, build_ladder, export, export_rung, load_adapter
from runtime.ladder import Directions
from runtime.ladder.adapter import CONFIG_NAME
from runtime.ladder.formats import wide_rows
from runtime.plan import static_plan
from runtime.reference.adaptive import activate
from tests.runtime.coded import coded_ladder, narrow, two_bank_ladder
from tests.runtime.export.exported import CODED_RUNGS, LOGITS, peft_logits

# Exported folders do not say that GPT-2's linears are transposed; PEFT looks at the model and says so.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")


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


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("rung", CODED_RUNGS)
@pytest.mark.parametrize("build", [coded_ladder, two_bank_ladder])
def test_a_rung_in_fewer_bits_leaves_decoded(
    build, rung, uniform, llama_adapter, peft_load, tiny_llama_factory, tokens, tmp_path
):
    ladder = build(load_adapter(llama_adapter), CODED_RUNGS)
    exported = export_rung(ladder, rung, tmp_path / "rung", uniform=uniform)
    expected = peft_logits(peft_load, tiny_llama_factory(), exported, tokens)
    model = tiny_llama_factory()
    with activate(model, static_plan(ladder, rung)):
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    written = load_adapter(exported)
    ranks = ladder.rank_table[ladder.rung_index(rung)].tolist()
    assert written.rank == max(ranks), "a rank is the number of directions, whatever their bits"
    if not uniform:
        read = {name: rank for name, rank in zip(ladder.modules, ranks, strict=True) if rank}
        assert {name: factors.rank for name, factors in written.modules.items()} == read
    with adaptive(model, exported):
        torch.testing.assert_close(model(tokens).logits, expected, **LOGITS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [16, 5.6])
def test_the_top_rung_leaves_as_the_adapter_itself(dtype, alpha, make_peft_adapter, tiny_llama_factory, tmp_path):
    adapter = load_adapter(make_peft_adapter(tiny_llama_factory, tmp_path / "adapter", alpha=alpha))
    adapter = narrow(adapter) if dtype == torch.bfloat16 else adapter
    written = load_adapter(export_rung(coded_ladder(adapter), 8, tmp_path / "rung"))
    for name, factors in adapter.modules.items():
        own = written.modules[name]
        assert own.scale == 1
        assert torch.equal(own.a.float(), factors.a.float())
        assert torch.equal(own.b.float(), (factors.scale * factors.b.double()).float())
        # The scale 0.7 takes B out of 16 bits; both are written in one dtype.
        assert own.a.dtype == own.b.dtype == (dtype if alpha == 16 else torch.float32)


def test_a_16_bit_rung_is_written_in_16_bits_where_they_hold_it(llama_adapter, tmp_path):
    adapter = narrow(load_adapter(llama_adapter))
    svd, coded = build_ladder(adapter, (4,)), coded_ladder(adapter)
    cases = {
        "svd": (svd, {}, torch.bfloat16),
        "svd in a power of two": (svd, {"scale": 0.5}, torch.bfloat16),
        "svd at a scale": (svd, {"scale": 1.1}, torch.float32),
        "svd as told": (svd, {"scale": 1.1, "dtype": torch.bfloat16}, torch.bfloat16),
        "decoded": (coded, {}, torch.float32),
    }
    for name, (ladder, options, dtype) in cases.items():
        written = load_adapter(export_rung(ladder, 4, tmp_path / name, **options))
        assert {x.dtype for f in written.modules.values() for x in (f.a, f.b)} == {dtype}, name
    rung = {name: ladder.update(name, 0)[0] for ladder in (svd,) for name in svd.modules}
    for name, factors in load_adapter(tmp_path / "svd").modules.items():
        assert torch.equal(factors.a.float(), rung[name])


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
    ladder = ladder.with_rungs((6,))
    again = build_ladder(load_adapter(export_rung(ladder, 6, tmp_path / "rung")), (2, 4))
    assert again.rungs == (2, 4, 6)
    for name in ladder.modules:
        for own, before in zip(again.banks[0][name].read(0, 6, 16), ladder.update(name, 0), strict=True):
            # Directions of one rank, up to their signs.
            torch.testing.assert_close(own.square().sum(1), before.square().sum(1))


def test_dtype_of_the_stored_factors(llama_adapter, tmp_path):
    ladder = build_ladder(load_adapter(llama_adapter))
    written = load_adapter(export_rung(ladder, 2, tmp_path / "rung", dtype=torch.bfloat16, base_model="base"))
    assert {factors.a.dtype for factors in written.modules.values()} == {torch.bfloat16}
    assert written.base_model == "base"


def test_refusals_leave_nothing_behind(llama_adapter, tmp_path, monkeypatch):
    ladder = build_ladder(load_adapter(llama_adapter), (0, 4))
    with pytest.raises(ValueError, match="rung: expected one with directions, got 0"):
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


@pytest.mark.parametrize("scale", [1e300, 1e38, 1e-300, 0, -1, float("nan"), float("inf"), True, "1"])
def test_a_scale_that_the_written_tensors_cannot_hold_is_refused(scale, llama_adapter, tmp_path):
    with pytest.raises(ValueError, match=r"scale: expected .*, got .*; ") as error:
        export_rung(build_ladder(load_adapter(llama_adapter)), 4, tmp_path / "rung", scale=scale)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_a_scale_is_held_against_the_dtype_that_is_written(scale, llama_adapter, tmp_path):
    ladder = build_ladder(load_adapter(llama_adapter))
    assert all(
        bool(f.b.any()) for f in load_adapter(export_rung(ladder, 4, tmp_path / "f32", scale=scale)).modules.values()
    )
    narrow = {1e6: torch.float16, 1e-6: torch.float8_e5m2}[scale]
    with pytest.raises(ValueError, match=rf"scale: expected one at which {narrow} holds the update of"):
        export_rung(ladder, 4, tmp_path / "narrow", scale=scale, dtype=narrow)
    assert not (tmp_path / "narrow").exists()


def test_an_update_is_held_against_the_dtype_too(llama_adapter, tmp_path):
    """Both halves are within float16, what they multiply to is not."""
    ladder = build_ladder(load_adapter(llama_adapter))
    large = {
        name: Directions(*(wide_rows(1e3 * half) for half in own.read(0, 8, 16)))
        for name, own in ladder.banks[0].items()
    }
    assert max(float(own.b.wide.abs().max()) for own in large.values()) < torch.finfo(torch.float16).max
    with pytest.raises(ValueError, match=r"scale: expected one at which torch\.float16 holds the update of"):
        export_rung(replace(ladder, banks=(large, ladder.banks[1])), 4, tmp_path / "rung", dtype=torch.float16)

"""Rungs written back: PEFT loads them and computes what the runtime computes at that rung; packed, they stay small."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from policy import (
    FULL_KV,
    Fingerprints,
    FixedPolicy,
    KnobCurve,
    LearnedPolicy,
    PercentilePolicy,
    PolicyCheckpoint,
    RandomPolicy,
    Settings,
)
from runtime import (
    adaptive,
    build_ladder,
    export,
    export_policy,
    export_rung,
    generate,
    load_adapter,
    load_ladder,
    open_ladder,
    save_ladder,
)
from runtime.export import export_packed, folder_bytes
from runtime.export.__main__ import main
from runtime.fingerprint import model_fingerprint
from runtime.ladder import Directions
from runtime.ladder.adapter import CONFIG_NAME, WEIGHTS_NAME
from runtime.ladder.formats import wide_rows
from runtime.ladder.store import RECORD, TENSORS
from runtime.plan import static_plan
from runtime.reference.adaptive import activate
from tests.runtime.coded import coded_ladder, two_bank_ladder

LOGITS = {"atol": 1e-4, "rtol": 0}
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, "min_new_tokens": 12}
CODED_RUNGS = (0.5, 1, 2, 4)
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


def narrow(adapter):
    return replace(
        adapter, modules={n: replace(f, a=f.a.bfloat16(), b=f.b.bfloat16()) for n, f in adapter.modules.items()}
    )


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


RUNGS, SCALES, COST = (2, 4, 6, 8), (1.3, 0.85, 1.054, 1.0), (0.25, 0.5, 0.75, 1.0)


@pytest.fixture
def fixed_policy(tiny_llama_factory, llama_adapter, tmp_path):
    """`fixed_policy(**fingerprints)`: the folder of a fixed policy of `llama_adapter` with a scale at every rung."""

    def make(kind=FixedPolicy, **prints):
        ladder = build_ladder(load_adapter(llama_adapter), RUNGS)
        own = Fingerprints(
            model=model_fingerprint(tiny_llama_factory()),
            adapter=ladder.adapter,
            ladder=ladder.fingerprint,
            shared=False,
        )
        policies = {
            FixedPolicy: lambda: FixedPolicy(RUNGS, torch.tensor(SCALES)),
            PercentilePolicy: lambda: PercentilePolicy(RUNGS, "entropy"),
            LearnedPolicy: lambda: LearnedPolicy(RUNGS),
            RandomPolicy: lambda: RandomPolicy(RUNGS, seed=0),
        }
        policy = policies[kind]()
        curve = None if kind is FixedPolicy else KnobCurve((0.25, 1.0), policy.knob_range())
        settings = Settings(block_tokens=8, kv=FULL_KV)
        PolicyCheckpoint(policy, settings, curve, COST, own | prints, 0.75).save(tmp_path / "policy")
        return tmp_path / "policy"

    return make


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("budget", [None, 0.25, 0.5, 0.74, 1.0])
def test_an_exported_policy_gives_the_logits_that_it_serves(
    budget, uniform, fixed_policy, llama_adapter, peft_load, tiny_llama_factory, tokens, tmp_path
):
    folder = fixed_policy()
    exported = export_policy(folder, llama_adapter, tmp_path / "exported", budget=budget, uniform=uniform)
    expected = peft_logits(peft_load, tiny_llama_factory(), exported, tokens)
    model = tiny_llama_factory()
    with adaptive(model, llama_adapter, policy=folder, budget=budget):
        torch.testing.assert_close(model(tokens).logits, expected, **LOGITS)


@pytest.mark.parametrize(("budget", "index"), [(None, 2), (0.25, 0), (0.5, 1), (0.74, 1), (1.0, 3)])
def test_the_rung_and_scale_of_a_budget_are_written(budget, index, fixed_policy, llama_adapter, tmp_path):
    written = load_adapter(export_policy(fixed_policy(), llama_adapter, tmp_path / "exported", budget=budget))
    plain = load_adapter(
        export_rung(build_ladder(load_adapter(llama_adapter), RUNGS), RUNGS[index], tmp_path / "plain")
    )
    assert written.rank == RUNGS[index]
    for name, factors in plain.modules.items():
        other = written.modules[name]
        torch.testing.assert_close(other.b @ other.a, SCALES[index] * factors.b @ factors.a, atol=1e-7, rtol=1e-5)


def test_a_shared_policy_is_written_for_an_adapter_of_another_rank(
    fixed_policy, make_peft_adapter, tiny_llama_factory, tmp_path
):
    other = make_peft_adapter(tiny_llama_factory, tmp_path / "other", r=16, seed=5)
    written = load_adapter(export_policy(fixed_policy(shared=True), other, tmp_path / "exported"))
    assert written.rank == 12, "the same share of 16 as 6 is of 8"
    with pytest.raises(ValueError, match="adapter: expected fingerprint"):
        export_policy(fixed_policy(), other, tmp_path / "again")
    same_rank = make_peft_adapter(tiny_llama_factory, tmp_path / "same rank", seed=6)
    with pytest.raises(ValueError, match=r"adapter: expected fingerprint .* load the adapter the policy was fitted to"):
        export_policy(fixed_policy(), same_rank, tmp_path / "again")
    assert not (tmp_path / "again").exists()


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


def test_command_writes_what_the_policy_serves(fixed_policy, llama_adapter, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rung"
    arguments = ["--adapter", llama_adapter, "--policy", fixed_policy(), "--budget", "0.5", "--output", output]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    main()
    ladder = build_ladder(load_adapter(llama_adapter))
    size, exact = (
        (output / WEIGHTS_NAME).stat().st_size + (output / CONFIG_NAME).stat().st_size,
        ladder.rung_bytes()[-1],
    )
    assert capsys.readouterr().out == (
        f"rung 4 written to {output} at scale 0.85\n{size:,} bytes; the exact adapter takes {int(exact):,}\n"
    )
    again = load_adapter(export_policy(tmp_path / "policy", llama_adapter, tmp_path / "again", budget=0.5))
    for name, factors in load_adapter(output).modules.items():
        assert torch.equal(factors.a, again.modules[name].a)
        assert torch.equal(factors.b, again.modules[name].b)


MISTAKES = {
    "both": (FixedPolicy, ["--rung", "4", "--policy", "POLICY"], "rung: expected --rung or --policy, got both"),
    "neither": (FixedPolicy, [], "rung: expected --rung or --policy, got neither"),
    "padding of what is packed": (FixedPolicy, ["--rung", "4", "--packed", "--uniform"], "uniform: expected a PEFT"),
    "a scale of all": (FixedPolicy, ["--packed", "--scale", "1.1"], "scale: expected 1 for a whole ladder, got 1.1"),
    "the top packed": (FixedPolicy, ["--rung", "8", "--packed"], "rung: expected one below 8 to pack"),
    "a budget alone beside packed": (FixedPolicy, ["--packed", "--budget", "0.5"], "budget: expected --policy with it"),
    "half a direction": (FixedPolicy, ["--rung", "2.5"], "rungs: expected whole ranks of an svd ladder, got [2.5]"),
    "a rung that is no number": (FixedPolicy, ["--rung", "nan"], "--rung: expected a rank in"),
    "a budget alone": (FixedPolicy, ["--rung", "4", "--budget", "0.5"], "budget: expected --policy with it"),
    "a scale beside": (FixedPolicy, ["--policy", "POLICY", "--scale", "1.1"], "scale: expected the policy's own"),
    "a budget beyond": (FixedPolicy, ["--policy", "POLICY", "--budget", "1.5"], "budget: expected a share"),
    "a budget that is none": (FixedPolicy, ["--policy", "POLICY", "--budget", "nan"], "budget: expected a share"),
    "no policy": (FixedPolicy, ["--policy", "/nowhere"], "policy: expected a folder"),
    "percentile": (
        PercentilePolicy,
        ["--policy", "POLICY"],
        "policy: expected a fixed one, got percentile, which mixes",
    ),
    "learned": (LearnedPolicy, ["--policy", "POLICY"], "policy: expected a fixed one, got learned, which mixes"),
    "random": (RandomPolicy, ["--policy", "POLICY"], "policy: expected a fixed one, got random, which mixes"),
    "a scale that overflows": (FixedPolicy, ["--rung", "4", "--scale", "1e300"], "scale: expected"),
}


@pytest.mark.parametrize(("kind", "more", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_command_ends_in_one_line_for_what_does_not_fit(
    kind, more, message, fixed_policy, llama_adapter, tmp_path, monkeypatch, capsys
):
    folder, output = fixed_policy(kind), tmp_path / "rung"
    given = [str(folder) if argument == "POLICY" else argument for argument in more]
    monkeypatch.setattr(sys, "argv", ["export", "--adapter", str(llama_adapter), "--output", str(output), *given])
    with pytest.raises(SystemExit, match="2"):
        main()
    found = capsys.readouterr().err
    assert found.startswith(f"error: {message}")
    assert found.count("\n") == 1
    assert not output.exists()


def test_command_writes_the_rung(llama_adapter, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rung"
    arguments = ["--adapter", str(llama_adapter), "--rung", "5", "--output", str(output), "--uniform"]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    main()
    assert "rung 5 written" in capsys.readouterr().out
    assert load_adapter(output).rank == 5


PACKING = {
    "a fractional rung": ("coded", ["--rung", "0.5", "--packed"], "rung 0.5", (0.5, 8)),
    "a whole rung": ("coded", ["--rung", "4.0", "--packed"], "rung 4", (4, 8)),
    "a rung of svd at a scale": ("peft", ["--rung", "5", "--packed", "--scale", "1.25"], "rung 5", (5, 8)),
    "all of them": ("coded", ["--packed"], "ladder", (0.5, 1, 2, 4, 8)),
    "all of svd": ("peft", ["--packed"], "ladder", (1, 2, 3, 4, 8)),
    "what a policy serves": ("peft", ["--policy", "POLICY", "--packed", "--budget", "0.5"], "rung 4", (4, 8)),
}


@pytest.mark.parametrize(("source", "more", "what", "rungs"), PACKING.values(), ids=PACKING)
def test_command_packs(source, more, what, rungs, fixed_policy, llama_adapter, tmp_path, monkeypatch, capsys):
    ladder = coded_ladder(load_adapter(llama_adapter), CODED_RUNGS)
    adapter = {"peft": llama_adapter, "coded": save_ladder(ladder, tmp_path / "ladder")}[source]
    given, output = (
        [str(fixed_policy()) if argument == "POLICY" else argument for argument in more],
        tmp_path / "packed",
    )
    monkeypatch.setattr(sys, "argv", ["export", "--adapter", str(adapter), "--output", str(output), *given])
    main()
    found = load_ladder(output)
    assert found.rungs == rungs
    assert found.resident == (None if what == "ladder" else 0)
    own = {"a rung of svd at a scale": 1.25, "what a policy serves": 0.85}
    scale = next((value for name, value in own.items() if PACKING[name][1] == more), 1)
    at = "" if scale == 1 else f" at scale {scale}"
    assert found.scales[0] == pytest.approx(scale * (1 if source == "peft" else open_ladder(adapter, rungs).scales[0]))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{what} written to {output}{at}"
    sizes = re.fullmatch(r"([\d,]+) bytes; the exact adapter takes ([\d,]+)", second)
    assert [int(size.replace(",", "")) for size in sizes.groups()] == [
        sum(file.stat().st_size for file in output.iterdir()), int(ladder.rung_bytes()[-1]),
    ]  # fmt: skip


def test_command_writes_a_fractional_rung(llama_adapter, tmp_path, monkeypatch, capsys):
    adapter = save_ladder(coded_ladder(load_adapter(llama_adapter), CODED_RUNGS), tmp_path / "ladder")
    output = tmp_path / "rung"
    arguments = ["--adapter", str(adapter), "--rung", "0.5", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    main()
    assert capsys.readouterr().out.startswith(f"rung 0.5 written to {output}\n")
    assert load_adapter(output).rank == int(load_ladder(adapter).rank_table[0].max())


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

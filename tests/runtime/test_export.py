"""Rungs written back as plain PEFT adapters: PEFT loads them and computes what the runtime computes at that rung."""

import json
import sys
from dataclasses import replace

import pytest
import torch

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
from runtime import adaptive, build_ladder, export, export_policy, export_rung, load_adapter
from runtime.export.__main__ import main
from runtime.fingerprint import model_fingerprint
from runtime.ladder import LadderFactors
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
    with pytest.raises(ValueError, match=r"rungs: expected \(2, 4, 6, 8\), got \(2, 4, 6, 8, 16\)"):
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
    large = {name: LadderFactors(1e3 * f.a, 1e3 * f.b, 1e6 * f.singular_values) for name, f in ladder.modules.items()}
    assert max(float(f.b.abs().max()) for f in large.values()) < torch.finfo(torch.float16).max
    with pytest.raises(ValueError, match=r"scale: expected one at which torch\.float16 holds the update of"):
        export_rung(replace(ladder, modules=large), 4, tmp_path / "rung", dtype=torch.float16)


def test_command_writes_what_the_policy_serves(fixed_policy, llama_adapter, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rung"
    arguments = ["--adapter", llama_adapter, "--policy", fixed_policy(), "--budget", "0.5", "--output", output]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    main()
    assert capsys.readouterr().out == f"rung 4 written to {output} at scale 0.85\n"
    again = load_adapter(export_policy(tmp_path / "policy", llama_adapter, tmp_path / "again", budget=0.5))
    for name, factors in load_adapter(output).modules.items():
        assert torch.equal(factors.a, again.modules[name].a)
        assert torch.equal(factors.b, again.modules[name].b)


MISTAKES = {
    "both": (FixedPolicy, ["--rung", "4", "--policy", "POLICY"], "rung: expected --rung or --policy, got both"),
    "neither": (FixedPolicy, [], "rung: expected --rung or --policy, got neither"),
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

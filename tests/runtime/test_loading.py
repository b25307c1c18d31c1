"""What is wrong with a model folder, or with the model handed in, is one line that says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import adaptive, build_ladder, generate, load_adapter, load_model, load_tokenizer
from runtime.reference.adaptive import require_servable

CPU = torch.device("cpu")
EMBEDDED = Path(__file__).resolve().parents[2] / "checkpoints" / "base"


@pytest.fixture
def folder(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(path, change):
    """Load a folder's weights, let `change` alter the dict, and store what is left."""
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def configure(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def refusal(function, *args) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # every test looks at the message
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_whole_folder_is_loaded(folder, tiny_llama):
    loaded = load_model(folder, device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tiny_llama.parameters(), strict=True))


def test_missing_weights_are_named(folder):
    rewrite(folder, lambda weights: weights.pop("model.layers.1.input_layernorm.weight"))
    message = refusal(load_model, folder)
    assert "none for model.layers.1.input_layernorm.weight (1 in all)" in message


def test_many_missing_weights_are_counted(folder):
    configure(folder, num_hidden_layers=4, layer_types=None)
    message = refusal(load_model, folder)
    assert "none for model.layers.2.input_layernorm.weight, " in message
    assert ", ... (18 in all); copy the folder again or correct its config.json" in message


def test_weights_of_another_model_are_refused(folder):
    configure(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert "none for lm_head.weight" in refusal(load_model, folder) or "transformer.h.0" in refusal(load_model, folder)


def test_tied_weights_are_not_missing(tiny_llama_factory, tmp_path):
    model = tiny_llama_factory()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path, device=CPU)
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"hidden_size": 96}, "model.embed_tokens.weight [256, 64] for [256, 96]"),
        ({"vocab_size": 300}, "lm_head.weight [256, 64] for [300, 64]"),
        ({"intermediate_size": 96}, "mlp.down_proj.weight [64, 160] for [64, 96]"),
    ],
)
def test_shapes_that_differ_are_named(folder, changes, differs):
    configure(folder, **changes)
    message = refusal(load_model, folder)
    assert "weights of the shapes that the configuration of" in message
    assert differs in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": -1}, "negative dimension -1"),
        ({"hidden_size": 65}, "not a multiple of the number of attention heads"),
        ({"hidden_size": "64"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "nonsense"}, "KeyError: 'nonsense'"),
        ({"model_type": "nonsense"}, "model type `nonsense`"),
        ({"model_type": "vit"}, "ViTConfig"),
        ({"dtype": "nonsense"}, "no attribute 'nonsense'"),
    ],
)
def test_configuration_that_makes_no_model_is_one_line(folder, changes, reason):
    configure(folder, **changes)
    message = refusal(load_model, folder)
    assert reason in message
    assert str(folder) in message


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize(("text", "got"), [("[]", "list"), ("null", "NoneType"), ('"x"', "str"), ("{}", "without it")])
def test_configuration_that_is_none_is_one_line(folder, load, text, got):
    (folder / "config.json").write_text(text)
    message = refusal(load, folder)
    assert f"{folder / 'config.json'}: expected a JSON object with model_type, got" in message
    assert got in message


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_configuration_cut_short_is_one_line(folder, load):
    (folder / "config.json").write_text('{"model_type": "lla')
    assert "model: expected whole files" in refusal(load, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{}", "[]", "1", ""])
def test_damaged_tokenizer_is_one_line(tmp_path, name, text):
    if (name, text) == ("tokenizer_config.json", "{}"):
        pytest.skip("an empty configuration is a valid one")
    copy = tmp_path / "model"
    shutil.copytree(EMBEDDED, copy, copy_function=shutil.copyfile)
    (copy / name).write_text(text)
    message = refusal(load_tokenizer, copy)
    assert message.startswith("tokenizer: expected ")
    assert str(copy) in message


@pytest.fixture
def peft_model(tiny_llama_factory, llama_adapter, peft_load):
    return peft_load(tiny_llama_factory(), llama_adapter)


IDS = torch.tensor([[5, 7, 11, 13]])
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}


def test_peft_model_is_refused_and_its_unload_is_what_to_pass(peft_model, llama_adapter):
    expected = peft_model.generate(input_ids=IDS, **GREEDY)
    for call in (
        lambda: generate(peft_model, llama_adapter, IDS, **GREEDY),
        lambda: generate(peft_model, llama_adapter, "a text"),
        lambda: adaptive(peft_model, llama_adapter).__enter__(),
    ):
        message = refusal(call)
        assert "got PeftModelForCausalLM; pass a PeftModel's `unload()`" in message
    plain = peft_model.unload()
    assert torch.equal(generate(plain, llama_adapter, IDS, **GREEDY).sequences, expected)
    with adaptive(plain, llama_adapter):
        assert torch.equal(plain.generate(IDS, **GREEDY), expected)


def test_base_taken_out_of_a_peft_model_still_carries_its_adapter(peft_model, llama_adapter):
    base = peft_model.get_base_model()
    for call in (
        lambda: generate(base, llama_adapter, IDS, **GREEDY),
        lambda: adaptive(base, llama_adapter).__enter__(),
    ):
        message = refusal(call)
        assert "LlamaForCausalLM with PEFT's layers in it (model.layers.0.self_attn.q_proj)" in message
        assert "pass the PeftModel's `unload()`" in message


def test_peft_layers_beside_those_of_our_adapter_are_refused(
    make_peft_adapter, tiny_llama_factory, peft_load, llama_adapter, tmp_path
):
    """They are no part of our adapter, and would silently be added."""
    mine = make_peft_adapter(tiny_llama_factory, tmp_path / "mine", r=2, target_modules=["q_proj"])
    others = make_peft_adapter(tiny_llama_factory, tmp_path / "others", r=2, target_modules=["down_proj"])
    base = peft_load(tiny_llama_factory(), others).get_base_model()
    assert "(model.layers.0.mlp.down_proj)" in refusal(lambda: adaptive(base, mine).__enter__())


def test_what_a_fit_asks_before_its_plans_refuses_peft_models_too(peft_model, llama_adapter):
    ladder = build_ladder(load_adapter(llama_adapter))
    assert "PEFT's layers" in refusal(lambda: require_servable(peft_model.get_base_model(), [ladder]))


def test_other_objects_are_no_models(llama_adapter):
    assert "got dict; pass" in refusal(lambda: generate({}, llama_adapter, IDS))

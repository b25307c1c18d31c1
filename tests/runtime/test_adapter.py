"""Reading PEFT folders: the same update as PEFT's own, or one line that says what is wrong."""

import json
import math
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import adaptive, build_ladder, load_adapter
from runtime.ladder.adapter import CONFIG_NAME, WEIGHTS_NAME

# PEFT sorts the keys of a pattern when it saves, so only patterns in that order mean the same after loading.
PATTERNS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank by tail": {"rank_pattern": {"q_proj": 3, "mlp.down_proj": 5}},
    "alpha by tail": {"alpha_pattern": {"v_proj": 32, "layers.1.self_attn.o_proj": 2}},
    "rank by regex": {"rank_pattern": {r"layers\.1\..*": 6, r"model\.layers\.\d+\.self_attn\.(q|k)_proj": 2}},
    "first pattern wins": {"rank_pattern": {"layers.0.self_attn.q_proj": 1, "q_proj": 4, r"self_attn\..*": 7}},
    "anchored at the start": {"rank_pattern": {r"^model\.layers\.0\.mlp\..*": 3}},
    "tails begin at a dot": {"rank_pattern": {"proj": 2, "_proj": 3}},
    "both with rslora": {"rank_pattern": {"k_proj": 12}, "alpha_pattern": {"k_proj": 5}, "use_rslora": True},
    "some modules only": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "without mlp": {"exclude_modules": ["gate_proj", "up_proj"]},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "dropout in training": {"lora_dropout": 0.5},
}


# PEFT says which patterns match nothing; one of the cases is about exactly that.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS.keys())
def test_update_of_every_module_equals_pefts(options, make_peft_adapter, peft_load, tiny_llama_factory, tmp_path):
    folder = make_peft_adapter(tiny_llama_factory, tmp_path / "adapter", **options)
    adapter = load_adapter(folder)
    check_updates(adapter, peft_load(tiny_llama_factory(), folder))
    assert adapter.rank == max(factors.rank for factors in adapter.modules.values())


def test_conv1d_factors_are_read_as_they_act(gpt2_adapter, peft_load, tiny_gpt2_factory):
    check_updates(load_adapter(gpt2_adapter), peft_load(tiny_gpt2_factory(), gpt2_adapter), transposed=True)


def check_updates(adapter, reference, transposed=False):
    from peft.tuners.lora import LoraLayer

    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in reference.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert adapter.modules.keys() == layers.keys()
    for name, layer in layers.items():
        factors = adapter.modules[name]
        expected = layer.get_delta_weight("default").detach()
        got = factors.scale * factors.b @ factors.a
        torch.testing.assert_close(got, expected.T if transposed else expected, atol=1e-7, rtol=1e-5)


def test_base_model_and_path_are_kept(llama_adapter):
    adapter = load_adapter(str(llama_adapter))
    assert adapter.path == llama_adapter
    assert adapter.rank == 8


@pytest.fixture
def copy(llama_adapter, tmp_path):
    """`copy(**changes)`: the folder with another configuration."""

    def make(**changes) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(llama_adapter, folder)
        config = json.loads((folder / CONFIG_NAME).read_text())
        (folder / CONFIG_NAME).write_text(json.dumps(config | changes))
        return folder

    return make


REFUSED = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "lora_bias": True,
    "bias": "all",
    "target_parameters": ["mlp.experts"],
    "layer_replication": [[0, 2], [1, 2]],
    "trainable_token_indices": [1, 2],
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "megatron_config": {"a": 1},
    "a_feature_of_the_future": {"strength": 0.1},
}


@pytest.mark.parametrize(("key", "value"), REFUSED.items(), ids=REFUSED.keys())
def test_unsupported_feature_is_refused_by_name(copy, key, value):
    with pytest.raises(ValueError, match=rf"{key}=") as error:
        load_adapter(copy(**{key: value}))
    assert_one_line(error)


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_initialisation_that_changes_the_base_is_refused(copy, init):
    with pytest.raises(ValueError, match="init_lora_weights="):
        load_adapter(copy(init_lora_weights=init))


def test_all_refused_features_are_named_at_once(copy):
    with pytest.raises(ValueError, match=r"bias='lora_only', use_dora=True"):
        load_adapter(copy(bias="lora_only", use_dora=True))


@pytest.mark.parametrize("value", [False, None, 0, [], {}, ""])
def test_unknown_feature_that_is_off_is_no_obstacle(copy, value):
    assert load_adapter(copy(a_feature_of_the_future=value)).rank == 8


@pytest.mark.parametrize("value", [True, False, "gaussian", "orthogonal", "eva"])
def test_initialisation_that_leaves_the_base_alone_is_accepted(copy, value):
    assert load_adapter(copy(init_lora_weights=value)).rank == 8


def test_adapter_of_embeddings_is_refused(make_peft_adapter, tiny_llama_factory, tmp_path):
    folder = make_peft_adapter(tiny_llama_factory, tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="lora_embedding") as error:
        load_adapter(folder)
    assert_one_line(error)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_peft_writes_with_the_feature_is_refused(make_peft_adapter, tiny_llama_factory, tmp_path, options):
    folder = make_peft_adapter(tiny_llama_factory, tmp_path / "a", **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        load_adapter(folder)


def test_rank_that_contradicts_the_configuration(copy):
    with pytest.raises(ValueError, match=r"expected rank 4 for model\.layers\.0\.mlp\.down_proj .* \[8, 160\]"):
        load_adapter(copy(r=4))


def test_missing_rank_and_alpha_mean_pefts_defaults(copy):
    folder = copy()
    config = json.loads((folder / CONFIG_NAME).read_text())
    del config["r"], config["lora_alpha"]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    assert {factors.scale for factors in load_adapter(folder).modules.values()} == {1.0}


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def test_factors_of_different_rank(copy):
    folder = copy()
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:, :5].contiguous()}))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj .* lora_B \[64, 5\]") as error:
        load_adapter(folder)
    assert_one_line(error)


def test_half_a_pair(copy):
    folder = copy()
    rewrite(folder, lambda tensors: tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"))
    with pytest.raises(ValueError, match=r"lora_A and lora_B of model\.layers\.1\.self_attn\.q_proj.*\['A'\]"):
        load_adapter(folder)


def test_no_factors_at_all(copy):
    folder = copy()
    rewrite(folder, dict.clear)
    with pytest.raises(ValueError, match="empty"):
        load_adapter(folder)


def test_names_with_the_adapters_name_are_read_alike(copy):
    folder = copy()
    before = load_adapter(folder).modules

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    rewrite(folder, rename)
    after = load_adapter(folder).modules
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].a, after[name].a) for name in before)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_truncated_weights(copy, kept):
    folder = copy()
    whole = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(whole[:kept])
    with pytest.raises(ValueError, match="expected a whole safetensors file") as error:
        load_adapter(folder)
    assert_one_line(error)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_missing_file(copy, name):
    folder = copy()
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_adapter(folder)


@pytest.mark.parametrize("text", ["{", "", "\x00", "[]", "3", "[" * 100_000, '{"a":' * 100_000, '{"r": 8, "r": 4}'])
def test_configuration_that_is_no_json(copy, text):
    folder = copy()
    (folder / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=rf"{CONFIG_NAME}: expected (a )?JSON") as error:
        load_adapter(folder)
    assert_one_line(error)


HOSTILE = [
    math.nan, math.inf, -math.inf, -1, 0, 1.5, 8.0, True, False, None, "", "x", "8", "a\nb", [], {}, [1], {"a": 1},
    {"(": 4}, {"[": 4}, {"q_proj": "x"}, {"q_proj": None}, {"q_proj": 2.5}, {"q_proj": math.inf}, {"q_proj": True},
    {"q_proj": [2]}, {"(" * 3000: 2}, {"a{99999999999999999999}": 2}, {"*": 2}, 1e300, -1e300, 1e308, 10**9, 10**13,
    10**400, [None] * 2000,
]  # fmt: skip


def test_any_value_in_the_place_of_any_other_is_right_or_refused_in_one_line(copy):
    """Every key of PEFT's own file, and its values that change the numbers, replaced by anything."""
    folder = copy()
    text = (folder / CONFIG_NAME).read_text()
    config, before = json.loads(text), load_adapter(folder).modules
    assert {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "base_model_name_or_path",
    } <= config.keys()
    refused = dict.fromkeys(config, 0)
    for name, value in product(config, HOSTILE):
        (folder / CONFIG_NAME).write_text(json.dumps(config | {name: value}))
        loaded = loaded_or_refused(folder)
        if isinstance(loaded, str):
            refused[name] += 1
            assert loaded.startswith(str(folder)), (name, value)
            assert "\n" not in loaded
            assert ", got " in loaded
            assert len(loaded) < 1000
            continue
        scales = [factors.scale for factors in loaded.modules.values()]
        assert all(math.isfinite(scale) for scale in scales), (name, value)
        if name not in ("lora_alpha", "alpha_pattern", "use_rslora"):
            assert scales == [factors.scale for factors in before.values()], (name, value)
    # What is right: no other rank than that of the tensors, on, off or unsaid, and a pattern that names no module.
    accepted = {name: len(HOSTILE) - count for name, count in refused.items()}
    assert accepted["r"] == 0
    assert accepted["use_rslora"] == 3
    assert accepted["rank_pattern"] == len([None, {}, {"a": 1}])


def loaded_or_refused(folder):
    try:
        return load_adapter(folder)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": math.nan}, "expected JSON, got NaN"),
        ({"lora_alpha": 1e300}, r"lora_alpha: expected a number in \[-1e\+06, 1e\+06\], got 1e\+300"),
        ({"lora_alpha": None}, "lora_alpha: expected a number .*, got None"),
        ({"r": None}, "r: expected a whole number .*, got None"),
        ({"r": "x"}, "r: expected a whole number .*, got 'x'"),
        ({"r": True}, "r: expected a whole number .*, got True"),
        ({"rank_pattern": [1]}, r"rank_pattern: expected by regular expression .*, got \[1\]"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: expected regular expressions, got '\('"),
        ({"alpha_pattern": {"[": 4}}, r"alpha_pattern: expected regular expressions, got '\['"),
        ({"rank_pattern": {"q_proj": "x"}}, r"rank_pattern\['q_proj'\]: expected a whole number .*, got 'x'"),
        ({"alpha_pattern": {"q_proj": 1e300}}, r"alpha_pattern\['q_proj'\]: expected a number .*, got 1e\+300"),
        ({"use_rslora": "no"}, "use_rslora: expected true or false, got 'no'"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: expected text .*, got 3"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(copy, changes, message):
    with pytest.raises(ValueError, match=rf"{CONFIG_NAME}: {message}.*; ") as error:
        load_adapter(copy(**changes))
    assert_one_line(error)


def scaled(folder, factor):
    rewrite(folder, lambda tensors: tensors.update({name: factor * tensor for name, tensor in tensors.items()}))


def test_an_update_that_overflows_float32_is_refused(copy):
    folder = copy(lora_alpha=1e6)
    scaled(folder, 1e18)
    with pytest.raises(
        ValueError, match=rf"{folder}: module model\.layers\.0\..*: expected an update within float32"
    ) as error:
        build_ladder(load_adapter(folder))
    assert_one_line(error)


def test_an_update_that_overflows_the_models_dtype_is_refused(copy, tiny_llama):
    folder = copy()
    scaled(folder, 1e3)
    ids = torch.tensor([[5, 6, 7]])
    with adaptive(tiny_llama, folder):
        assert bool(tiny_llama(ids).logits.isfinite().all())
    half = tiny_llama.half()
    with (
        pytest.raises(
            ValueError, match=r"adapter: expected updates within torch\.float16, at most 65504, got"
        ) as error,
        adaptive(half, folder),
    ):
        pass
    assert_one_line(error)


@pytest.mark.parametrize("text", ["{}", '{"peft_type": "IA3"}', '{"peft_type": null}', '{"peft_type": ["LORA"]}'])
def test_configuration_of_something_else(copy, text):
    folder = copy()
    (folder / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match="expected peft_type LORA"):
        load_adapter(folder)


@pytest.mark.parametrize("name", ["/nowhere/adapter", "adapter", "some-user/no-such-adapter", "a/b/c"])
def test_missing_folder_or_hub_id_without_a_connection(name):
    with pytest.raises(FileNotFoundError, match=f"got '{name}'") as error:
        load_adapter(name)
    assert_one_line(error)


def test_missing_path_is_never_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_adapter(Path("runs/adapter"))


def assert_one_line(error):
    assert "\n" not in str(error.value)
    assert ", got " in str(error.value) or ", found " in str(error.value)

"""A fingerprint follows the checkpoint, not its dtype; a policy of other numbers is another policy's."""

from dataclasses import replace

import pytest
import torch

from runtime import build_ladder, load_adapter
from runtime.fingerprint import adapter_fingerprint, model_fingerprint, sampled
from tests.runtime.coded import coded_ladder


def test_model_has_one_identity_in_either_dtype(base_model_path, load_model):
    full, half = (model_fingerprint(load_model(base_model_path, dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert full == half
    assert len(full) == 16


def test_model_of_other_weights_names_or_shape_is_another(tiny_llama, tiny_llama_factory):
    own = model_fingerprint(tiny_llama)
    assert own == model_fingerprint(tiny_llama_factory())
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert model_fingerprint(tiny_llama) != own
    other = tiny_llama_factory()
    other.config.num_key_value_heads = 4
    assert model_fingerprint(other) != own


@pytest.mark.parametrize("change", ["a", "b", "scale", "missing"])
def test_adapter_of_other_factors_is_another(llama_adapter, change):
    adapter = load_adapter(llama_adapter)
    own = adapter_fingerprint(adapter)
    assert own == adapter_fingerprint(load_adapter(llama_adapter))
    name = "model.layers.0.self_attn.q_proj"
    factors = adapter.modules.pop(name)
    if change != "missing":
        adapter.modules[name] = replace(factors, **{change: getattr(factors, change) * 1.5})
    assert adapter_fingerprint(adapter) != own


def test_a_sample_is_over_names_shapes_and_values():
    values = torch.arange(100.0)
    own = sampled([("a", values)])
    assert len(own) == 16
    assert sampled([("a", values.double())]) == own == sampled([("a", values.bfloat16())])
    assert sampled([("a", values), ("b", torch.empty(0, 4))]) == own, "what is empty is not there"
    others = [
        sampled([("b", values)]),
        sampled([("a", values.view(10, 10))]),
        sampled([("a", values + 1)]),
        sampled([("a", values), ("b", values)]),
        sampled([("a", values[:-1])]),
        sampled([]),
    ]
    assert len({own, *others}) == 7


def test_a_ladder_knows_its_adapter(llama_adapter):
    adapter = load_adapter(llama_adapter)
    for ladder in (build_ladder(adapter), coded_ladder(adapter)):
        assert ladder.adapter == adapter_fingerprint(adapter)
        assert ladder.up_to(ladder.rungs[0]).adapter == ladder.adapter

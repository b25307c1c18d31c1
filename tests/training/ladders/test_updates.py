"""What a linear is made to add is what merging adds, and nothing of it stays."""

import pytest
import torch
from torch import nn

from runtime.ladder import load_adapter
from training.ladders.updates import frozen, low_rank, updated


@pytest.fixture(params=["llama", "gpt2"])
def adapted(request, make_peft_adapter, tiny_llama_factory, tiny_gpt2_factory, tmp_path):
    """A factory and an adapter; GPT-2's linears hold their weights transposed."""
    factory = {"llama": tiny_llama_factory, "gpt2": tiny_gpt2_factory}[request.param]
    return factory, load_adapter(make_peft_adapter(factory, tmp_path / "adapter", r=4))


def pairs_of(adapter):
    return {name: (own.a, own.scale * own.b.T) for name, own in adapter.modules.items()}


def test_it_is_the_merged_model_inside_and_itself_outside(adapted, merged, unchanged):
    factory, adapter = adapted
    model, tokens = factory(), torch.arange(3, 43).view(2, 20)
    check, plain = unchanged(model), model(tokens).logits
    with updated(model, low_rank(pairs_of(adapter), model)):
        inside = model(tokens).logits
    expected = merged(factory(), adapter)(tokens).logits
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(inside, plain, atol=0.1), "otherwise this says nothing"
    assert torch.equal(model(tokens).logits, plain)
    check()


def test_updates_of_updates_add_up(tiny_llama, unchanged):
    name, x = "model.layers.0.self_attn.q_proj", torch.randn(2, 3, 64)
    linear = tiny_llama.get_submodule(name)
    check, plain = unchanged(tiny_llama), linear(x)
    with updated(tiny_llama, {name: lambda x: x}):
        with updated(tiny_llama, {name: lambda x: 10 * x}):
            torch.testing.assert_close(linear(x), plain + 11 * x)
        torch.testing.assert_close(linear(x), plain + x)
    check()


def test_a_forward_of_the_instances_own_is_called_and_put_back(tiny_llama):
    name = "model.layers.0.mlp.up_proj"
    linear = tiny_llama.get_submodule(name)

    def own(x):
        return 3 * x

    linear.forward = own
    with updated(tiny_llama, {name: lambda x: x}):
        assert torch.equal(linear(torch.ones(2)), torch.full((2,), 4.0))
    assert vars(linear)["forward"] is own


def test_nothing_stays_after_an_exception(tiny_llama, unchanged):
    check, name = unchanged(tiny_llama), "model.layers.0.mlp.up_proj"
    with pytest.raises(RuntimeError, match="stop"), updated(tiny_llama, {name: lambda x: x}), frozen(tiny_llama):
        raise RuntimeError("stop")
    check()
    # nor where the second of them cannot be entered
    with pytest.raises(AttributeError), updated(tiny_llama, {name: lambda x: x, "nowhere": lambda x: x}):
        pass
    check()


def test_low_rank_is_in_the_dtype_of_the_model(tiny_llama):
    model, name = tiny_llama.bfloat16(), "model.layers.0.self_attn.q_proj"
    a, b = torch.randn(3, 64), torch.randn(3, 64)
    update = low_rank({name: (a, b)}, model)[name]
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(update(x), (x @ a.bfloat16().T) @ b.bfloat16())


def test_gradients_flow_through_to_the_pair(tiny_llama):
    name = "model.layers.0.self_attn.q_proj"
    a, b = torch.randn(3, 64, requires_grad=True), torch.zeros(3, 64, requires_grad=True)
    with frozen(tiny_llama), updated(tiny_llama, low_rank({name: (a, b)}, tiny_llama)):
        tiny_llama(torch.arange(3, 13)[None]).logits.logsumexp(-1).sum().backward()
    assert b.grad is not None
    assert float(b.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())


def test_frozen_puts_back_who_asked_for_a_gradient_and_every_modules_mode(tiny_llama, unchanged):
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    tiny_llama.lm_head.weight.requires_grad_(False)
    check = unchanged(tiny_llama)
    with torch.no_grad(), frozen(tiny_llama):
        assert torch.is_grad_enabled()
        assert not any(parameter.requires_grad for parameter in tiny_llama.parameters())
        assert not any(module.training for module in tiny_llama.modules() if isinstance(module, nn.Module))
    check()

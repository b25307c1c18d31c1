"""Many architectures through the whole path: the top rung equals PEFT in logits and in greedy tokens."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama import modeling_llama

from policy.settings import PAGE_TOKENS
from runtime import adaptive, build_ladder, load_adapter
from runtime.plan import STATIC_BLOCK_TOKENS, static_plan
from runtime.reference.adaptive import activate

SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# Far shorter than the text, and no multiple of a page.
WINDOW = 11
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, head_dim=12),
    "gpt2": GPT2Config(
        vocab_size=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "mistral, sliding": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "mistral, full": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2, mixed": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "gemma2": Gemma2Config(
        **SHAPE, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": PhiConfig(**SHAPE),
    "phi3": Phi3Config(**SHAPE, sliding_window=WINDOW),
    "gpt-neox": GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def factory(request):
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(request.param).eval()

    return make


@pytest.fixture
def batch():
    """Rows of 70, 23 and 47 tokens, padded on the left."""
    ids = torch.randint(3, 128, (3, 70), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(70) >= torch.tensor([0, 47, 23])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_top_rung_equals_peft(factory, batch, implementation, make_peft_adapter, peft_load, tmp_path):
    folder = make_peft_adapter(factory, tmp_path / "adapter", r=4)
    model = factory()
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers runs this model with eager attention only")
    model.set_attn_implementation(implementation)
    options = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30, "pad_token_id": 0}
    with adaptive(model, folder):
        logits, tokens = model(**batch).logits, model.generate(**batch, **options)
    reference = peft_load(factory(), folder)
    real = batch["attention_mask"].bool()
    # a plain forward would count GPT-2's learned positions from the padding on
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference(**batch, position_ids=positions).logits
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=0)
    assert torch.equal(tokens, reference.generate(**batch, **options))


def test_prefill_in_small_blocks_equals_one_pass(factory, batch, make_peft_adapter, tmp_path):
    """Windows, masks and positions hold across blocks that end inside pages and windows."""
    plan = static_plan(build_ladder(load_adapter(make_peft_adapter(factory, tmp_path / "adapter", r=4))), 4)
    assert plan.settings.block_tokens == plan.settings.prompt_tokens == STATIC_BLOCK_TOKENS
    model, real = factory(), batch["attention_mask"].bool()
    with activate(model, plan):
        expected = model(**batch).logits
    with activate(model, replace(plan, settings=replace(plan.settings, block_tokens=9))):
        torch.testing.assert_close(model(**batch).logits[real], expected[real], atol=2e-5, rtol=1e-5)


def test_nothing_of_the_run_stays_behind(factory, batch, make_peft_adapter, tmp_path):
    folder = make_peft_adapter(factory, tmp_path / "adapter", r=4)
    model = factory()
    names, masks = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    with torch.no_grad():
        before = model(**batch).logits
    with adaptive(model, folder):
        model(**batch)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    assert (names, masks) == (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (lambda *args, **kwargs: torch.zeros(1, 1, 3, PAGE_TOKENS), "masks made by transformers' functions"),
        (lambda *args, **kwargs: None, "masked attention, got none in LlamaAttention"),
    ],
)
def test_masks_of_a_models_own_are_refused(tiny_llama, llama_adapter, monkeypatch, own, reason):
    """They would know nothing of rows that lie elsewhere in the cache."""
    monkeypatch.setattr(modeling_llama, "create_causal_mask", own)
    with pytest.raises(ValueError, match=reason) as error:
        adaptive(tiny_llama, llama_adapter).__enter__()
    assert "LlamaForCausalLM; it cannot be served" in str(error.value)


def test_refused_model_is_left_as_it_was(tiny_llama, llama_adapter, monkeypatch):
    names = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="cannot be served"):
        adaptive(tiny_llama, llama_adapter).__enter__()
    assert names == (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    assert tiny_llama.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in tiny_llama.modules())
    assert "generate" not in vars(tiny_llama)


def test_flash_attention_takes_no_mask_of_rows_and_is_refused(tiny_llama, llama_adapter):
    tiny_llama.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation 'sdpa' or 'eager', got 'flash_attention_2'"):
        adaptive(tiny_llama, llama_adapter).__enter__()


def test_a_vision_model_beside_the_text_keeps_its_own_attention(tmp_path, make_peft_adapter):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**SHAPE, "head_dim": 8, "layer_types": ["full_attention"] * 2},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
    )

    def make():
        return AutoModelForCausalLM.from_config(config).eval()

    adapter = make_peft_adapter(make, tmp_path / "adapter", r=2, target_modules=r".*language_model.*q_proj")
    model = make()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    with adaptive(model, adapter):
        model(torch.ones(1, 5).long())
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"
    with (
        adaptive(model, adapter),
        pytest.raises(ValueError, match=f"context of {SHAPE['max_position_embeddings']}, got 120 . 20"),
    ):
        model.generate(torch.ones(1, 120).long(), do_sample=False)  # nothing caps transformers' default here


def test_opt_is_served(batch, make_peft_adapter, peft_load, tmp_path):
    """OPT counts its positions from the mask, not from position_ids alone."""
    config = OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=128, init_std=0.1, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip

    def make():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    folder = make_peft_adapter(make, tmp_path / "adapter", r=4)
    model = make()
    with adaptive(model, folder):
        logits = model(**batch).logits
    with torch.no_grad():
        expected = peft_load(make(), folder)(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=0)

"""Architectures of transformers, one tiny model each: exact against PEFT, or refused by name. No third outcome.

What comes out is the table in docs/architectures.md, and a paragraph of the README made from it. After a change that
moves a result, or for another transformers, one command measures and writes both:

    REWRITE=1 pytest tests/runtime/test_architectures.py
"""

import os
import re
import textwrap
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from runtime import adaptive, build_ladder, load_adapter
from runtime.plan import static_plan
from runtime.reference.adaptive import activate

ROOT = Path(__file__).resolve().parents[2]
TABLE, README = ROOT / "docs" / "architectures.md", ROOT / "README.md"
MARKS = ("<!-- architectures: written by tests/runtime/test_architectures.py -->", "<!-- end of architectures -->")
VERSIONS = f"transformers {transformers.__version__}, PEFT {peft.__version__}"

# What most configurations call these things; a configuration takes those that it knows.
SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "n_embd": 32, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "max_position_embeddings": 128, "n_positions": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1, "init_std": 0.1,
    "sliding_window": 11, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
RECURRENT = {"layer_types": ["linear_attention", "full_attention"]}
DEFAULT = object()
"""In a case: the configuration's own value, not that of `SHAPE`."""
# Every head has keys and values of its own, and the size of a head is that of its parts.
LATENT = {"num_key_value_heads": 4, "head_dim": DEFAULT}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 1.9, 2.8, 3.7], **ROPE}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}

ALL = "all-linear"
ATTENTION = r".*\.(q_proj|k_proj|v_proj|qkv_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj|out_proj)"


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    family: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of the configuration, beside `SHAPE`."""
    targets: str | list[str] = ALL
    variant: str = ""

    @property
    def adapter(self) -> str:
        """What the adapter is on, in the words of the table."""
        if isinstance(self.targets, list):
            return ", ".join(f"`{name}`" for name in self.targets)
        return "all linears" if self.targets == ALL else "attention"

    @property
    def key(self) -> str:
        return " | ".join([self.family, f"`{self.model_type}`", self.variant, self.adapter])


def llama(variant: str, **rope: Any) -> Case:
    return Case("Llama", "llama", {"rope_parameters": {"rope_theta": 10000.0, **rope}}, variant=variant)


CASES = [
    llama("", rope_type="default"),
    llama("linear RoPE", rope_type="linear", factor=4.0),
    Case("Llama", "llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}, variant="dynamic RoPE"),
    llama("llama3 RoPE", rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **ROPE),
    llama("yarn RoPE", rope_type="yarn", **ROPE),
    llama("longrope RoPE", **LONGROPE),
    Case("Llama 4", "llama4_text", {
        "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 13, "intermediate_size_mlp": 48,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attn_temperature_tuning": False,
    }, ATTENTION, "chunked attention"),
    Case("Llama 4", "llama4_text", {
        "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 13, "intermediate_size_mlp": 48,
        "num_experts_per_tok": 1, "floor_scale": 8,
    }, ATTENTION, "temperature tuning"),
    Case("Mistral", "mistral", variant="sliding window"),
    Case("Mistral", "mistral", {"sliding_window": None}, variant="full attention"),
    Case("Ministral", "ministral", MIXED),
    Case("Ministral 3", "ministral3", {"rope_parameters": {
        "rope_type": "yarn", "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0,
        "beta_slow": 1.0, **ROPE,
    }}),
    Case("Mixtral", "mixtral", targets=ATTENTION),
    Case("Qwen2", "qwen2"),
    Case("Qwen2", "qwen2", {"use_sliding_window": True, "max_window_layers": 1}, variant="sliding window"),
    Case("Qwen2 MoE", "qwen2_moe"),
    Case("Qwen3", "qwen3"),
    Case("Qwen3 MoE", "qwen3_moe", targets=ATTENTION),
    Case("Qwen3 Next", "qwen3_next", RECURRENT, ATTENTION),
    Case("Qwen3.5", "qwen3_5_text", RECURRENT, ATTENTION),
    Case("Gemma", "gemma"),
    Case("Gemma 2", "gemma2", {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    Case("Gemma 3", "gemma3_text", {**MIXED, "query_pre_attn_scalar": 8}),
    Case("Gemma 3", "gemma3_text", {"use_bidirectional_attention": True}, variant="attention to both sides"),
    Case("Gemma 3", "gemma3", {
        "text_config": {**SHAPE, **MIXED, "query_pre_attn_scalar": 8},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4,
        },
        "mm_tokens_per_image": 4, "image_token_index": 127, "boi_token_index": 126, "eoi_token_index": 125,
    }, r".*language_model" + ATTENTION, "text through its vision model"),
    Case("Gemma 3n", "gemma3n_text", {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": MIXED["layer_types"] * 2, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    }),
    Case("Gemma 4", "gemma4_text", {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": MIXED["layer_types"] * 2,
        "global_head_dim": 16,
    }),
    Case("VaultGemma", "vaultgemma", MIXED),
    Case("Recurrent Gemma", "recurrent_gemma", {
        "num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"], "lru_width": 32,
        "attention_window_size": 11,
    }, ATTENTION),
    Case("GPT-2", "gpt2"),
    Case("GPT-Neo", "gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 11}),
    Case("GPT-J", "gptj", {"rotary_dim": 4}),
    Case("GPT-NeoX", "gpt_neox"),
    Case("GPT-NeoX Japanese", "gpt_neox_japanese"),
    Case("GPT-BigCode", "gpt_bigcode"),
    Case("gpt-oss", "gpt_oss", MIXED),
    Case("CodeGen", "codegen", {"rotary_dim": 4}),
    Case("OPT", "opt", {"word_embed_proj_dim": 32}),
    Case("Phi", "phi"),
    Case("Phi-3", "phi3"),
    Case("Phi-3", "phi3", {"rope_parameters": {k: v for k, v in LONGROPE.items() if k != "factor"},
                           "original_max_position_embeddings": 16, "sliding_window": None}, variant="longrope RoPE"),
    Case("Phi-3.5 MoE", "phimoe", targets=ATTENTION),
    Case("Falcon", "falcon"),
    Case("Falcon", "falcon", {"alibi": True}, variant="alibi"),
    Case("Falcon Mamba", "falcon_mamba", targets=["in_proj"]),
    Case("BLOOM", "bloom"),
    Case("MPT", "mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    Case("StableLM", "stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    Case("StarCoder2", "starcoder2"),
    Case("OLMo", "olmo", {"clip_qkv": 0.5}),
    Case("OLMo 2", "olmo2"),
    Case("OLMo 3", "olmo3", MIXED),
    Case("OLMoE", "olmoe", targets=ATTENTION),
    Case("OLMo Hybrid", "olmo_hybrid", RECURRENT, ATTENTION),
    Case("FlexOlmo", "flex_olmo", targets=ATTENTION),
    Case("Cohere", "cohere", {"logit_scale": 1.0, "use_qk_norm": True}),
    Case("Cohere 2", "cohere2", {**MIXED, "logit_scale": 1.0}),
    Case("Granite", "granite", {"embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    Case("Granite MoE", "granitemoe", {"attention_multiplier": 0.3}),
    Case("Granite MoE shared", "granitemoeshared", {"attention_multiplier": 0.3}),
    Case("Granite 4", "granitemoehybrid", {
        **MAMBA, "layer_types": ["full_attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 48,
    }, variant="attention layers alone"),
    Case("Granite 4", "granitemoehybrid", {
        **MAMBA, **RECURRENT, "num_local_experts": 0, "shared_intermediate_size": 48,
    }, ATTENTION, "with Mamba layers"),
    Case("GLM", "glm"),
    Case("GLM 4", "glm4"),
    Case("GLM 4 MoE", "glm4_moe", targets=ATTENTION),
    Case("GLM 4 MoE Lite", "glm4_moe_lite", LATENT, ATTENTION),
    Case("GLM MoE DSA", "glm_moe_dsa", LATENT, ATTENTION),
    Case("Nemotron", "nemotron"),
    Case("Nemotron-H", "nemotron_h", targets=["q_proj"]),
    Case("SmolLM3", "smollm3", {**MIXED, "no_rope_layers": [1, 0], "use_sliding_window": True}),
    Case("EXAONE 4", "exaone4", MIXED),
    Case("EXAONE MoE", "exaone_moe", targets=ATTENTION),
    Case("ERNIE 4.5", "ernie4_5"),
    Case("ERNIE 4.5 MoE", "ernie4_5_moe", {"moe_k": 2}, ATTENTION),
    Case("Helium", "helium"),
    Case("Arcee", "arcee"),
    Case("Apertus", "apertus"),
    Case("Seed-OSS", "seed_oss"),
    Case("Hunyuan dense", "hunyuan_v1_dense", {"rope_parameters": {**DYNAMIC, "alpha": 1000.0}}),
    Case("Hunyuan MoE", "hunyuan_v1_moe", targets=ATTENTION),
    Case("DeepSeek-V2", "deepseek_v2", {**LATENT, "topk_method": "greedy"}, ATTENTION),
    Case("DeepSeek-V3", "deepseek_v3", LATENT, ATTENTION),
    Case("DeepSeek-V3", "deepseek_v3", LATENT, ["kv_b_proj"], "an adapter on kv_b_proj"),
    Case("DeepSeek-V3.2", "deepseek_v32", {
        **LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    }, ATTENTION),
    Case("MiniCPM3", "minicpm3", {"num_key_value_heads": 4}, ATTENTION),
    Case("MiniMax", "minimax", RECURRENT, ATTENTION),
    Case("MiniMax-M2", "minimax_m2", targets=ATTENTION),
    Case("MiMo-V2-Flash", "mimo_v2_flash", MIXED, ATTENTION),
    Case("dots.llm1", "dots1", targets=ATTENTION),
    Case("DBRX", "dbrx", {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    }),
    Case("Persimmon", "persimmon"),
    Case("JetMoE", "jetmoe"),
    Case("DiffLlama", "diffllama"),
    Case("Doge", "doge", {"keep_window_size": 20}, ATTENTION),
    Case("Doge", "doge", {}, ["dt_proj"], "an adapter on dt_proj"),
    Case("Jais 2", "jais2"),
    Case("BitNet", "bitnet"),
    Case("nanochat", "nanochat"),
    Case("ModernBERT decoder", "modernbert-decoder", MIXED),
    Case("CTRL", "ctrl", {"dff": 48}),
    Case("BioGPT", "biogpt"),
    Case("XGLM", "xglm", {"d_model": 32, "attention_heads": 4, "num_layers": 2}),
    Case("XLNet", "xlnet", {"d_model": 32, "d_inner": 48, "d_head": 8}),
    Case("BERT", "bert", {"is_decoder": True}, variant="as a decoder"),
    Case("BERT", "bert", variant="as an encoder"),
    Case("RoBERTa", "roberta", {"is_decoder": True}, variant="as a decoder"),
    Case("BART", "bart", {
        "d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
        "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "num_hidden_layers": DEFAULT,
        "num_attention_heads": DEFAULT, "hidden_size": DEFAULT,
    }),
    Case("HRM", "hrm_text", targets=ATTENTION),
    Case("Mamba", "mamba", targets=["in_proj"]),
    Case("Mamba 2", "mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}, ["in_proj"]),
    Case("RWKV", "rwkv", targets=["key"]),
    Case("Jamba", "jamba", {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 4,
    }, ATTENTION),
    Case("Bamba", "bamba", {**MAMBA, "attn_layer_indices": [1]}, ATTENTION),
    Case("Zamba 2", "zamba2", {"layer_types": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1]}, ATTENTION),
    Case("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}, ATTENTION),
]  # fmt: skip


def model_of(case: Case) -> nn.Module:
    known = {entry.name for entry in fields(CONFIG_MAPPING[case.model_type])}
    options = {name: value for name, value in SHAPE.items() if name in known} | case.options
    config = CONFIG_MAPPING[case.model_type](**{k: deepcopy(v) for k, v in options.items() if v is not DEFAULT})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Rows of 40, 13 and 27 tokens, padded on the left: longer than windows, chunks and the original context."""
    ids = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) >= torch.tensor([0, 27, 13])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}


def refusal(case: Case, folder: Path, batch: dict[str, torch.Tensor]) -> str | None:
    """Why the architecture is refused, before anything is generated; None where it is served."""
    model = model_of(case)
    try:
        with adaptive(model, folder):
            return None
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert type(model).__name__ in message
    with torch.no_grad():
        assert model(**batch).logits.isfinite().any(), "the model itself runs, and still does"
    return message


def assert_exact(case: Case, folder: Path, batch: dict[str, torch.Tensor], reference: nn.Module) -> None:
    """Logits and greedy tokens of the top rung are PEFT's, in blocks that end inside pages, windows and chunks."""
    plan = static_plan(build_ladder(load_adapter(folder)), 2)
    model, real = model_of(case), batch["attention_mask"].bool()
    with activate(model, replace(plan, settings=replace(plan.settings, block_tokens=13, prompt_tokens=13))):
        logits, tokens = model(**batch).logits, model.generate(**batch, **GREEDY)
    # a plain forward would count learned positions from the padding on
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference(**batch, position_ids=positions).logits[real]
        # and the model counts by itself where nothing is padded
        alone = reference(input_ids=batch["input_ids"][:1]).logits
        with reference.disable_adapter():
            plain = reference(input_ids=batch["input_ids"][:1]).logits
    assert (alone - plain).abs().max() > 0.01, "the adapter must make a difference"
    torch.testing.assert_close(logits[real], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[:1], alone, atol=1e-4, rtol=0)
    assert torch.equal(tokens, reference.generate(**batch, **GREEDY))


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, str]]:
    """Results by case; with REWRITE, the table and the README are written from them at the end."""
    results: dict[str, str] = {}
    yield results
    if os.environ.get("REWRITE") and results.keys() == {case.key for case in CASES}:
        TABLE.write_text(table(results), encoding="utf-8")
        README.write_text(with_paragraph(README.read_text(encoding="utf-8"), paragraph(results)), encoding="utf-8")


# GPT-BigCode of transformers 5.17 is scripted, which torch 2.13 has given up
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key.replace(" | ", ", ").replace("`", ""))
def test_exact_or_refused_by_name(case, batch, measured, make_peft_adapter, peft_load, tmp_path):
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {case.model_type}")
    folder = make_peft_adapter(lambda: model_of(case), tmp_path / "adapter", r=2, target_modules=case.targets)
    reason = refusal(case, folder, batch)
    if reason is None:
        assert_exact(case, folder, batch, peft_load(model_of(case), folder))
    measured[case.key] = "exact" if reason is None else f"refused: {reason}"
    text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    if VERSIONS in text and not os.environ.get("REWRITE"):
        assert recorded(text).get(case.key) == measured[case.key], "write the table anew, as this file's docstring says"


def recorded(text: str) -> dict[str, str]:
    """The results that a table holds, by case."""
    rows = re.findall(r"^\| (.+) \| (exact|refused: .+) \|$", text, flags=re.MULTILINE)
    return dict(rows)


def table(results: dict[str, str]) -> str:
    lines = "\n".join(f"| {key} | {result} |" for key, result in results.items())
    return f"""# Architectures

Tiny models with random weights, rows padded on the left, in float32: logits within 1e-4 of PEFT's and the same greedy
tokens ("exact"), or one line before anything is generated ("refused"). Written by
`REWRITE=1 pytest tests/runtime/test_architectures.py`, which measures every line and, without `REWRITE`, fails where
this table says something else. {VERSIONS}.

"Attention" in the adapter's column: this version of PEFT also puts `all-linear` on fused experts (`target_parameters`),
which are no linears and are refused by that name. "All linears" leaves the head out.

| family | model type | variant | adapter on | result |
| --- | --- | --- | --- | --- |
{lines}
"""


def paragraph(results: dict[str, str]) -> str:
    def names(exact: bool) -> str:
        found: dict[str, list[str]] = {}
        for case in CASES:
            if (results[case.key] == "exact") == exact:
                found.setdefault(case.family, []).append(case.variant)
        return ", ".join(map(in_words, found, found.values()))

    text = (
        f"Equal to PEFT in logits and greedy tokens: {names(True)}. Refused by name, before anything is generated: "
        f"{names(False)}. Reasons are in [docs/architectures.md](docs/architectures.md)."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def in_words(family: str, variants: list[str]) -> str:
    named = ", ".join(filter(None, variants))
    return family if not named else f"{family} ({'also ' if '' in variants else ''}{named})"


def with_paragraph(readme: str, text: str) -> str:
    before, rest = readme.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def test_table_and_readme_hold_every_case():
    if os.environ.get("REWRITE"):
        pytest.skip("they are written at the end")
    held = recorded(TABLE.read_text(encoding="utf-8"))
    assert list(held) == [case.key for case in CASES]
    readme = README.read_text(encoding="utf-8")
    assert with_paragraph(readme, paragraph(held)) == readme

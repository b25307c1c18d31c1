"""Models and adapters of a given shape, with random weights: speed depends on shapes, not on what was learned.

The model is built on the device in its final dtype, so that a 7B model never exists in float32 or on the host. The
adapter is written as a PEFT folder, because that is where every measured path starts.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from runtime.ladder.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME

SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    },
    # The scaling of its rotary frequencies depends on the trained context alone, not on the length of a text.
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    },
}  # fmt: skip

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_model(shape: str, dtype: torch.dtype, device: torch.device, **config: Any) -> PreTrainedModel:
    """A random LLaMA of a named shape that never ends a sequence by itself, in eval mode; same weights at each call."""
    options = copy.deepcopy(SHAPES[shape]) | {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0} | config
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**options), dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def adapted_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The seven linears of every layer, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(LINEARS)
    }


def write_adapter(model: PreTrainedModel, rank: int, folder: Path) -> Path:
    """A random LoRA on all seven linears as a PEFT folder, bf16, alpha = 2 rank.

    Its update is about an eighth of the random weights: B is not zero, or every comparison would pass.
    """
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, linear in adapted_linears(model).items():
        a = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        b = torch.randn(linear.out_features, rank, generator=generator) * 0.08 / rank**0.5
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.bfloat16()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.bfloat16()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(LINEARS),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one decoded token must read: all but the embedding, of which it reads one row."""
    embedding = model.get_input_embeddings().weight
    counted = [p for p in model.parameters() if p is not embedding]
    if model.get_output_embeddings().weight is embedding:
        counted.append(embedding)
    return sum(p.numel() * p.element_size() for p in counted)


def lora_bytes(model: PreTrainedModel, rank: int) -> int:
    """Bytes of both factors of all adapted linears at one rank, in the model's dtype."""
    elements = sum(linear.in_features + linear.out_features for linear in adapted_linears(model).values())
    return rank * elements * model.dtype.itemsize


def kv_token_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers, in the model's dtype."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize

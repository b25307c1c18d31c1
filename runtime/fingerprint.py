"""Short identities of a model and an adapter, so that a policy is used only with what it was made for.

A fingerprint is the architecture, the names and shapes of the tensors and a sample of their values, not a hash of
13 GB. Samples are rounded to bf16 first: one checkpoint loaded in bf16 or fp32, on any device, has one identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from .ladder import Adapter

SAMPLES_PER_TENSOR = 8
CONFIG_KEYS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "n_embd", "n_layer", "n_head",
)  # fmt: skip


def model_fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits. Independent of dtype bf16 or fp32, of the device, and of the path the model came from."""
    config = {key: getattr(model.config, key, None) for key in CONFIG_KEYS}
    return _digest(config, ((name, tensor) for name, tensor in model.named_parameters()))


def adapter_fingerprint(adapter: Adapter) -> str:
    """16 hex digits over every module's factors and scale."""
    config = {name: factors.scale for name, factors in adapter.modules.items()}
    halves = ((f"{name}.{half}", t) for name, f in adapter.modules.items() for half, t in (("a", f.a), ("b", f.b)))
    return _digest(config, halves)


def sampled(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits over names, shapes and a sample of the values of tensors that are not all empty."""
    return _digest({}, ((name, tensor) for name, tensor in tensors if tensor.numel()))


def _digest(config: Mapping[str, object], tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).long().to(flat.device)
        sample = flat[index].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{list(tensor.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()[:16]

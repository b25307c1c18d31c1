"""A LLaMA-family model as the engine sees it: sizes, and the tensors of the Hugging Face model itself, none copied.

Served are the dense decoders whose layer is: norm, q/k/v, rotary, attention, o, residual; norm, gate/up, SiLU times,
down, residual. `why_not` says what a model has that this is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .store import Module

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the call."""
DTYPES = (torch.bfloat16, torch.float32)
COLUMNS = 64
"""Outputs of a block of a module that has no heads."""
MEMBERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
"""The linears of a layer, in the order in which modules are numbered."""
QKV, OUT, GATE_UP, DOWN = 0, 3, 4, 6
"""The first member of each group of linears that share their input."""
SITES = (QKV, OUT, GATE_UP, DOWN)


@dataclass(frozen=True)
class Shape:
    """Sizes that a kernel is compiled for."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    eps: float


@dataclass(frozen=True)
class Linears:
    """Linears that share their input."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Layer:
    """One layer's own tensors."""

    qkv: Linears
    o: Linears
    gate_up: Linears
    down: Linears
    attention_norm: Tensor
    """[hidden]"""
    inner_norm: Tensor
    q_norm: Tensor | None
    """[head_dim]"""
    k_norm: Tensor | None
    window: int
    """Tokens that it sees; 0: all."""


@dataclass(frozen=True)
class Model:
    """What a decode step reads of a model."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    layers: tuple[Layer, ...]
    embedding: Tensor
    """[V, hidden]"""
    head: Tensor
    """[V, hidden]; the embedding itself where they are tied"""
    norm: Tensor
    """[hidden]"""
    cosine: Tensor
    """[positions, head_dim / 2] float32"""
    sine: Tensor
    prefix: str
    """Where the layers are: `PREFIX.0.self_attn.q_proj` and so on."""

    def modules(self) -> dict[str, Module]:
        """The linears that an adapter may adapt, by name, in the order in which kernels number them."""
        s, wide = self.shape, block_columns(self.shape.hidden)
        inner, attended = block_columns(self.shape.inner), self.shape.heads * self.shape.head_dim
        kv = self.shape.kv_heads * s.head_dim
        sizes = (
            Module(s.hidden, attended, s.head_dim), Module(s.hidden, kv, s.head_dim), Module(s.hidden, kv, s.head_dim),
            Module(attended, s.hidden, wide), Module(s.hidden, s.inner, inner), Module(s.hidden, s.inner, inner),
            Module(s.inner, s.hidden, wide),
        )  # fmt: skip
        return {
            f"{self.prefix}.{layer}.{name}": size
            for layer in range(s.layers)
            for name, size in zip(MEMBERS, sizes, strict=True)
        }


def block_columns(width: int) -> int:
    """Outputs of a block of a module of `width` outputs."""
    return min(COLUMNS, width)


def why_not(model: PreTrainedModel) -> str | None:
    """Why the engine cannot run the model, as a clause; None where it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"the model is {config.model_type}, not one of {', '.join(FAMILIES)}"
    if model.dtype not in DTYPES:
        return f"it computes in {str(model.dtype).removeprefix('torch.')}, not in bfloat16 or float32"
    devices = {own.device for own in model.parameters()}
    if len(devices) > 1 or any(hasattr(own, "_hf_hook") for own in model.modules()):
        return "its layers lie on several devices"
    rope = _rope_type(config)
    if rope not in ROPES:
        return f"its rotary embedding is {rope}, whose frequencies depend on the length of the text"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    for name, own in model.named_modules():
        if name.rpartition(".")[2].endswith(("_proj", "lm_head")) and type(own) is not nn.Linear:
            return f"{name} is a {type(own).__name__}, not a plain linear layer"
    sizes = (config.hidden_size, config.intermediate_size, _head_dim(config))
    if any(size % 4 for size in sizes):
        return f"its widths {sizes} are not multiples of 4"
    return None


def model_of(model: PreTrainedModel, positions: int) -> Model:
    """The tensors of a model that `why_not` has nothing against, for texts of up to `positions` tokens."""
    config, inner = model.config, model.model
    shape = Shape(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads, _head_dim(config),
        config.intermediate_size, config.vocab_size, config.rms_norm_eps,
    )  # fmt: skip
    windows = list(_windows(config))
    layers = tuple(_layer(own, window) for own, window in zip(inner.layers, windows, strict=True))
    device = inner.embed_tokens.weight.device
    cosine, sine = _rotary_tables(inner.rotary_emb, positions, device)
    return Model(
        shape, model.dtype, device, layers, inner.embed_tokens.weight, model.get_output_embeddings().weight,
        inner.norm.weight, cosine, sine, "model.layers",
    )  # fmt: skip


def _layer(layer: Any, window: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    q_norm, k_norm = (None if norm is None else norm.weight for norm in norms)
    return Layer(
        _linears(attention.q_proj, attention.k_proj, attention.v_proj), _linears(attention.o_proj),
        _linears(mlp.gate_proj, mlp.up_proj), _linears(mlp.down_proj), layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight, q_norm, k_norm, window,
    )  # fmt: skip


def _linears(*linears: nn.Linear) -> Linears:
    biases = tuple(own.bias for own in linears if own.bias is not None)
    assert len(biases) in (0, len(linears)), "linears that share their input have a bias all or none"
    return Linears(tuple(own.weight for own in linears), biases or None)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_type(config: Any) -> str:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return str(rope.get("rope_type", rope.get("type", "default")))


def _windows(config: Any) -> Iterator[int]:
    """Tokens that every layer sees, 0 for all."""
    window = getattr(config, "sliding_window", None) or 0
    if not getattr(config, "use_sliding_window", True):
        window = 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * (
        config.num_hidden_layers
    )
    for kind in kinds:
        yield window if kind == "sliding_attention" else 0


@torch.no_grad()
def _rotary_tables(rotary: nn.Module, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[positions, head_dim / 2] float32 each: of the model's own rotary embedding, scaling included."""
    like = torch.zeros(1, dtype=torch.float32, device=device)
    cosine, sine = rotary(like, torch.arange(positions, device=device)[None])
    half = cosine.shape[-1] // 2
    return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()

"""A LLaMA's decode step in plain PyTorch, as gpt-fast writes it: static tensors, one CUDA graph, compiled if asked for.

What a decode step costs when nothing but PyTorch's own operations is used and nothing is launched by the host: the
strongest opponent without kernels of one's own. The weights are those of a transformers model, not copies; every row
may have a LoRA of its own, as two batched products.

Shape legend: B rows, S slots of the KV cache, H heads, Hkv KV heads, D head size, d hidden size, R rank.
Source: https://github.com/meta-pytorch/gpt-fast
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from .shapes import adapted_linears

Adapters = dict[str, tuple[Tensor, Tensor]]
"""A [B, R, d_in] and B [B, d_out, R] of every adapted linear by its path, each row's scale folded into its B."""

WARM_UPS = 3
# Without it inductor leaves products with one row to cuBLAS; with it they become reductions, at the memory's speed.
COMPILE: dict[str, Any] = {"coordinate_descent_tuning": True}

# In this order: flash attention splits the context of a few rows over the whole GPU. It knows no float32.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def random_adapters(model: PreTrainedModel, batch: int, rank: int) -> Adapters:
    """An adapter for every row, in the model's dtype, of the size that `shapes.write_adapter` gives its own."""
    options: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    return {
        name: (
            torch.randn(batch, rank, linear.in_features, **options).mul_(linear.in_features**-0.5),
            torch.randn(batch, linear.out_features, rank, **options).mul_(0.16 * rank**-0.5),
        )
        for name, linear in adapted_linears(model).items()
    }


class GraphedPeer:
    """Greedy decoding of B rows at one context, a step at a time; eager where there is no GPU.

    tokens [B] long are fed by the next step and replaced with what it chooses. kv holds keys and values
    [B, Hkv, S, D] of every layer, S = context, random at first: there is no prefill.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        context: int,
        adapters: Adapters | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        config, device = model.config, model.device
        self.model, self.context, self.compiled = model, context, compiled
        self.adapters = adapters or {}
        self.linears: dict[str, nn.Linear] = adapted_linears(model)
        self.tokens = torch.full((batch,), 3, device=device)
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        self.kv = [
            (torch.randn(shape, dtype=model.dtype, device=device), torch.randn(shape, dtype=model.dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]
        like = torch.empty(0, dtype=model.dtype, device=device)
        cos, sin = model.model.rotary_emb(like, torch.arange(context, device=device)[None])
        # The sign of `rotate_half` is in the table: a rotation is then a roll and two products.
        half = config.head_dim // 2
        self.cos, self.sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)
        self.last = torch.tensor([context - 1], device=device)
        self._forward = torch.compile(self._decode, fullgraph=True, options=COMPILE) if compiled else self._decode
        self.graph = self._capture() if device.type == "cuda" else None

    def step(self) -> None:
        """Decode every row's token at the last slot, over the whole context; again and again at the same slot.

        So every step reads as much as every other. Does not wait for the device.
        """
        if self.graph is not None:
            self.graph.replay()
        else:
            self._launch()

    def decode(self, position: int) -> None:
        """Decode every row's token at any slot, over the slots up to it: without a graph, never compiled."""
        with torch.no_grad(), sdpa_kernel(ATTENTION, set_priority=True):
            self._decode(torch.tensor([position], device=self.last.device), position + 1)

    def close(self) -> None:
        """Let go of all device memory but the model's."""
        if self.graph is not None:
            self.graph.reset()
        self.graph, self.kv, self.adapters = None, [], {}
        if self.compiled:
            torch.compiler.reset()

    def _launch(self) -> None:
        with torch.no_grad(), sdpa_kernel(ATTENTION, set_priority=True):
            self._forward(self.last, self.context)

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = _side_stream(self.last.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._launch()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._launch()
        return graph

    def _decode(self, position: Tensor, length: int) -> None:
        """One step: position [1] long is the slot that is written, the last of the `length` that are read."""
        model, size = self.model.model, self.model.config.head_dim
        x = model.embed_tokens(self.tokens)[:, None]
        cos, sin = self.cos[position], self.sin[position]
        for index, (layer, (keys, values)) in enumerate(zip(model.layers, self.kv, strict=True)):
            attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
            h = _norm(layer.input_layernorm, x)
            q, k, v = (self._linear(f"{attention}.{name}_proj", h).view(len(h), -1, 1, size) for name in "qkv")
            keys.index_copy_(2, position, _rotate(k, cos, sin))
            values.index_copy_(2, position, v)
            # Without a mask, over exactly what is filled: a mask would cost the split of the context over the GPU.
            read = F.scaled_dot_product_attention(
                _rotate(q, cos, sin), keys[:, :, :length], values[:, :, :length], enable_gqa=k.shape[1] < q.shape[1]
            )
            x = x + self._linear(f"{attention}.o_proj", read.reshape(len(h), 1, -1))
            h = _norm(layer.post_attention_layernorm, x)
            h = F.silu(self._linear(f"{mlp}.gate_proj", h)) * self._linear(f"{mlp}.up_proj", h)
            x = x + self._linear(f"{mlp}.down_proj", h)
        logits = self.model.lm_head(_norm(model.norm, x))[:, 0]
        self.tokens.copy_(logits.argmax(-1))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """x [B, 1, d_in] through one linear and every row's own adapter -> [B, 1, d_out]."""
        y = self.linears[name](x)
        if name not in self.adapters:
            return y
        a, b = self.adapters[name]
        if len(x) == 1:
            return y + F.linear(F.linear(x, a[0]), b[0])
        return y.baddbmm_(torch.bmm(x, a.mT), b.mT)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where all peers warm up and are captured: cuBLAS keeps a workspace for good for every stream that it has seen."""
    return torch.cuda.Stream(device)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, H, 1, D], with tables [1, D] of its position."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)

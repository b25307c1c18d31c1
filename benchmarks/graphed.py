"""A LLaMA's decode step in plain PyTorch, as gpt-fast writes it: static tensors, one CUDA graph, compiled if asked for.

What a decode step costs when nothing but PyTorch's own operations is used and nothing is launched by the host: the
strongest opponent without kernels of one's own. So it is made as fast as it gets that way:

- q, k and v are one product, gate and up another (`fuse`), and the residual is added in the product that makes it.
- Rows of one token are multiplied as vectors where there is one row.
- Query heads that share keys and values stand side by side as query positions, so nothing is repeated.
- Attention is the fastest of PyTorch's own implementations at this very shape, measured once (`attention`).

Every row may have a LoRA of its own, as two batched products for linears that share their input.

Shape legend: B rows, S slots of the KV cache, H heads, Hkv KV heads, D head size, d hidden size, R rank.
Source: https://github.com/meta-pytorch/gpt-fast
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel
from transformers import PreTrainedModel

from .attention import PREFERRED, fastest, side_stream
from .fused import Fused, Update, fuse

WARM_UPS = 3
# Without it inductor leaves products with one row to cuBLAS; with it they become reductions, at the memory's speed.
COMPILE: dict[str, Any] = {"coordinate_descent_tuning": True}


class GraphedPeer:
    """Greedy decoding of B rows at one context, a step at a time; eager where there is no GPU.

    tokens [B] long are fed by the next step and replaced with what it chooses. kv holds keys and values
    [2, B, Hkv, S, D] of every layer, S = context, random at first: there is no prefill. The model's own q, k, v, gate
    and up weights become views of fused ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        context: int,
        updates: list[dict[str, Update]] | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        config, device = model.config, model.device
        self.model, self.context, self.compiled = model, context, compiled
        self.layers: list[dict[str, Fused]] = fuse(model)
        self.updates: list[dict[str, Update]] = updates or []
        self.tokens = torch.full((batch,), 3, device=device)
        shape = (2, batch, config.num_key_value_heads, context, config.head_dim)
        self.kv = [torch.randn(shape, dtype=model.dtype, device=device) for _ in range(config.num_hidden_layers)]
        like = torch.empty(0, dtype=model.dtype, device=device)
        cos, sin = model.model.rotary_emb(like, torch.arange(context, device=device)[None])
        # The sign of `rotate_half` is in the table: a rotation is then a roll and two products.
        half = config.head_dim // 2
        self.cos, self.sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)
        self.last = torch.tensor([context - 1], device=device)
        # A compiler makes reductions of such products by itself.
        self._vectors = batch == 1 and not compiled
        self.attention = fastest(self._queries(batch), self.kv) if device.type == "cuda" else PREFERRED
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
        with torch.no_grad(), sdpa_kernel(self.attention, set_priority=True):
            self._decode(torch.tensor([position], device=self.last.device), position + 1)

    def close(self) -> None:
        """Let go of all device memory but the model's."""
        if self.graph is not None:
            self.graph.reset()
        self.graph, self.kv, self.updates = None, [], []
        if self.compiled:
            torch.compiler.reset()

    def _queries(self, batch: int) -> Tensor:
        """Some queries [B, Hkv, H / Hkv, D]."""
        config = self.model.config
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        shape = (batch, shared, heads // shared, config.head_dim)
        return torch.randn(shape, dtype=self.model.dtype, device=self.last.device)

    def _launch(self) -> None:
        with torch.no_grad(), sdpa_kernel(self.attention, set_priority=True):
            self._forward(self.last, self.context)

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = side_stream(self.last.device)
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
        model, config = self.model.model, self.model.config
        batch, size, shared = len(self.tokens), config.head_dim, config.num_key_value_heads
        heads = config.num_attention_heads
        x = model.embed_tokens(self.tokens)
        cos, sin = self.cos[position], self.sin[position]
        for index, (layer, kv) in enumerate(zip(model.layers, self.kv, strict=True)):
            qkv = self._product(index, "qkv", _norm(layer.input_layernorm, x)).view(batch, -1, size)
            turned = qkv[:, : heads + shared]
            turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
            kv[0].index_copy_(2, position, turned[:, heads:, None])
            kv[1].index_copy_(2, position, qkv[:, heads + shared :, None])
            # Without a mask, over exactly what is filled: a mask would cost the split of the context over the GPU.
            query = turned[:, :heads].view(batch, shared, -1, size)
            read = F.scaled_dot_product_attention(query, kv[0, :, :, :length], kv[1, :, :, :length])
            x = self._product(index, "o", read.reshape(batch, -1), x)
            h = self._product(index, "gate_up", _norm(layer.post_attention_layernorm, x))
            gate, up = h.chunk(2, -1)
            x = self._product(index, "down", F.silu(gate) * up, x)
        logits = self._linear(_norm(model.norm, x), self.model.lm_head.weight, None)
        self.tokens.copy_(logits.argmax(-1))

    def _product(self, layer: int, site: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, d_in] through the linears of a site, and every row's own adapter -> [B, d_out], onto the residual."""
        own = self.layers[layer][site]
        update = self.updates[layer].get(site) if self.updates else None
        if self.compiled:
            y = F.linear(x, own.weight, own.bias)
            y = y if residual is None else residual + y
            return y if update is None else y + update.of(x)
        if residual is None or own.bias is not None:
            y = self._linear(x, own.weight, own.bias)
            y = y if residual is None else y.add_(residual)
        elif self._vectors:
            y = residual.view(-1).addmv_(own.weight, x.view(-1)).view(1, -1)
        else:
            y = residual.addmm_(x, own.weight.T)
        if update is not None:
            update.add(x, y)
        return y

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._vectors:
            return F.linear(x, weight, bias)
        y = torch.mv(weight, x.view(-1)) if bias is None else torch.addmv(bias, weight, x.view(-1))
        return y.view(1, -1)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

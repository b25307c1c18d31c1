"""Attention as transformers calls it, with an ear on it: how much mass falls outside the most recent pages.

A few layers run the model's own eager attention, which returns its softmax; all others keep the implementation the
model was loaded with. The function is registered under a name of its own while the context manager is active, and the
name is taken back afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..control.signals import distant_attention

SUPPORTED = ("sdpa", "eager")


class AttentionProbe:
    """Collects the attention proxy of the pass under way, [B, T], averaged over the probed layers."""

    def __init__(self, layers: int, probed: int, recent_pages: int) -> None:
        wanted = min(probed, layers)
        self.layers = {round((i + 1) * layers / wanted) - 1 for i in range(wanted)}
        self.recent_pages = recent_pages
        self.listening = False
        """Whether the pass under way is listened to at all: what decides nothing needs no attention."""
        self.positions: Tensor | None = None
        self._mass: list[Tensor] = []
        self._received: list[Tensor] = []
        self.keeps_received = False
        """Also collect the mass each slot receives (only `sparse` pages need it)."""

    def begin(self, positions: Tensor | None) -> None:
        """Start a pass whose query tokens lie at `positions` [B, T], padding at -1; None: do not listen to it."""
        self.listening, self.positions, self._mass, self._received = positions is not None, positions, [], []

    def record(self, weights: Tensor) -> None:
        """Take in one probed layer's softmax, [B, H, T, N]."""
        assert self.positions is not None, "begin() opens every pass"
        self._mass.append(distant_attention(weights, self.positions, self.recent_pages))
        if self.keeps_received:
            real = (self.positions >= 0).to(weights.dtype)
            self._received.append((weights.mean(1) * real[..., None]).sum(1))

    def attention(self) -> Tensor:
        """[B, T] float32 in [0, 1]"""
        if len(self._mass) != len(self.layers):
            raise ValueError(
                f"attention: expected {len(self.layers)} layers to report, got {len(self._mass)}; this model does not "
                "call transformers' attention interface"
            )
        return torch.stack(self._mass).mean(0)

    def received(self) -> Tensor:
        """[B, N] mass that every slot received in this pass."""
        return torch.stack(self._received).mean(0)


@contextmanager
def probed_attention(model: PreTrainedModel, probe: AttentionProbe) -> Iterator[None]:
    """Let `probe` hear the attention of `model` until the block ends.

    Raises ValueError when the model runs an attention implementation that takes no explicit mask.
    """
    original = model.config.get_text_config(decoder=True)._attn_implementation
    if original not in SUPPORTED:
        raise ValueError(
            f"attention: expected attn_implementation {' or '.join(map(repr, SUPPORTED))}, got {original!r}; load the "
            "model with attn_implementation='sdpa'"
        )
    name = f"chunkwise_{id(probe)}"
    ALL_ATTENTION_FUNCTIONS[name] = _probing(probe, original)
    try:
        model.set_attn_implementation(name)
        if model.config.get_text_config(decoder=True)._attn_implementation != name:
            raise ValueError(
                "attention: expected a model that calls transformers' attention interface, got "
                f"{type(model).__name__}, which does not; it cannot be served"
            )
        yield
    finally:
        model.set_attn_implementation(original)
        del ALL_ATTENTION_FUNCTIONS[name]


def eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The eager attention of a layer's own modelling file, which knows its extras (soft caps, sinks)."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _probing(probe: AttentionProbe, original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        eager = eager_attention(module)
        if probe.listening and module.layer_idx in probe.layers:
            if original == "sdpa":  # which knows no soft cap: a probed layer computes what its neighbours do
                kwargs.pop("softcap", None)
            output, weights = eager(module, query, key, value, attention_mask, **kwargs)
            probe.record(weights)
            return output, None
        run = eager if original == "eager" else ALL_ATTENTION_FUNCTIONS[original]
        return run(module, query, key, value, attention_mask, **kwargs)

    return attention

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
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..control.signals import distant_attention
from .mask import RowMask

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
        self.reported: set[int] = set()
        """Probed layers heard in this pass."""
        self._heard: list[Tensor] = []
        self.keeps_received = False
        """Also collect the mass each slot receives (only `sparse` pages need it)."""

    def begin(self, positions: Tensor | None) -> None:
        """Start a pass whose query tokens lie at `positions` [B, T], padding at -1; None: do not listen to it."""
        self.listening, self.positions = positions is not None, positions
        self.reported, self._heard = set(), []

    def record(self, layer: int, weights: Tensor) -> None:
        """Take in a softmax of one probed layer, [B, H, T, N]; some layers attend more than once."""
        self.reported.add(layer)
        self._heard.append(weights.mean(1))

    def attention(self) -> Tensor:
        """[B, T] float32 in [0, 1]"""
        assert self.reported == self.layers, "the rehearsal heard every layer"
        assert self.positions is not None, "begin() opens every pass"
        return distant_attention(self._mean(), self.positions, self.recent_pages)

    def received(self) -> Tensor:
        """[B, N] mass that every slot received in this pass."""
        assert self.positions is not None, "begin() opens every pass"
        return (self._mean() * (self.positions >= 0)[..., None]).sum(1)

    def _mean(self) -> Tensor:
        """[B, T, N] float32: the softmax over heads and probed layers."""
        return torch.stack(self._heard).float().mean(0)


@contextmanager
def probed_attention(model: PreTrainedModel, probe: AttentionProbe, mask: RowMask) -> Iterator[None]:
    """Let `probe` hear the attention of `model`, and `mask` make its masks, until the block ends.

    Raises ValueError when the model runs an attention implementation that takes no explicit mask.
    """
    text = model.config.get_text_config(decoder=True)
    # of a model with several parts, its text alone: what a vision model beside it runs is its own
    part = next((key for key in model.config.sub_configs if getattr(model.config, key) is text), "")
    original = text._attn_implementation
    if original not in SUPPORTED:
        raise ValueError(
            f"attention: expected attn_implementation {' or '.join(map(repr, SUPPORTED))}, got {original!r}; load the "
            "model with attn_implementation='sdpa'"
        )
    name = f"chunkwise_{id(probe)}"
    # in the class-wide tables: some modelling files look names up in an instance of their own
    AttentionInterface.register(name, _probing(probe, original))
    AttentionMaskInterface.register(name, mask)
    try:
        model.set_attn_implementation({part: name})
        if text._attn_implementation != name:
            raise ValueError(
                "attention: expected a model that calls transformers' attention interface, got "
                f"{type(model).__name__}, which does not; it cannot be served"
            )
        yield
    finally:
        model.set_attn_implementation({part: original})
        # transformers has no public way to take a name out again
        del AttentionInterface._global_mapping[name]
        del AttentionMaskInterface._global_mapping[name]


def _probing(probe: AttentionProbe, original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is None:
            raise ValueError(f"attention: expected masked attention, got none in {type(module).__name__}")
        # the eager attention of the layer's own modelling file knows its extras (soft caps, sinks)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        layer: int = module.layer_idx  # type: ignore[assignment]  # nn.Module types what it does not know as tensors
        if probe.listening and layer in probe.layers:
            if original == "sdpa":  # which knows no soft cap: a probed layer computes what its neighbours do
                kwargs.pop("softcap", None)
            output, weights = eager(module, query, key, value, attention_mask, **kwargs)
            probe.record(layer, weights)
            return output, None
        run = eager if original == "eager" else ALL_ATTENTION_FUNCTIONS[original]
        return run(module, query, key, value, attention_mask, **kwargs)

    return attention

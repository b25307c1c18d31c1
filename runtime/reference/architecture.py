"""What the reference path needs of an architecture; what lacks it is refused by name, before anything is generated.

It needs keys and values per token as the only memory, positions that it may give itself, attention and masks made
through transformers' interfaces, and adapted linears that see every token of a pass once. What a configuration says is
read first; the rest is heard in a rehearsal: three tokens through the base model, into a cache of their own.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policy.operating import KVRows
from policy.settings import FULL_KV

from .attention import AttentionProbe, probed_attention
from .mask import RowMask
from .pages import PagedCache

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layer types that remember keys and values per token and nothing else."""
REHEARSED_TOKENS = 3
"""Fewer than a page has slots: what runs over the cache instead of the pass is told apart by its length."""

FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""How a modelling file fails that wants more of a cache or of its inputs than we give."""
REASON_CHARACTERS = 160


def refuse_unsupported(model: PreTrainedModel, linears: Mapping[str, nn.Module]) -> None:
    """Make sure that `model` can be served with adapters on `linears`, by name; runs three tokens through it.

    Raises ValueError, one line that names the architecture and the reason, when it cannot.
    """
    _refuse_by_configuration(model)
    _rehearse(model, linears)


def _refuse_by_configuration(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - ATTENTION_LAYERS:
        others = ", ".join(sorted(kinds - ATTENTION_LAYERS))
        raise _refusal(model, "keys and values per token as the only memory", f"{others} layers with another state")
    if model._is_stateful and not kinds:
        raise _refusal(model, "keys and values per token as the only memory", "a recurrent state")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _refusal(model, "position_ids in its forward", "a model that counts positions by itself")
    for name, module in model.named_modules():
        # RoBERTa's begin behind the index of the padding when it counts them, and at 0 when transformers' loop does
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            raise _refusal(model, "positions from 0 on", f"a place for padding among them ({name})")


@torch.no_grad()
def _rehearse(model: PreTrainedModel, linears: Mapping[str, nn.Module]) -> None:
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    probe, mask = AttentionProbe(layers, layers, recent_pages=1), _CausalMask()
    positions = torch.arange(REHEARSED_TOKENS, device=model.device)[None]
    cache = _AskedCache(KVRows.of([FULL_KV]))
    cache.begin(positions)
    probe.begin(positions)
    mask.begin(positions, cache.visible())
    strays: dict[str, int] = {}
    failure: Exception | None = None
    with ExitStack() as undo:
        undo.enter_context(probed_attention(model, probe, mask))
        for name, linear in linears.items():
            undo.callback(linear.register_forward_pre_hook(_note_strays(strays, name)).remove)
        try:
            model(input_ids=torch.ones_like(positions), position_ids=positions, past_key_values=cache, use_cache=True)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            failure = error
    for name, seen in strays.items():
        where = "the whole cache" if seen > REHEARSED_TOKENS else "only some of them"
        raise ValueError(
            f"adapter: expected linears that see every token of a pass once, got {name}, which {type(model).__name__} "
            f"runs over {where}; train an adapter without it"
        )
    if failure is not None:
        reason = textwrap.shorten(f"{type(failure).__name__}: {failure}", REASON_CHARACTERS, placeholder=" ...")
        raise _refusal(model, "a forward over keys and values in a cache of our own", reason) from failure
    if probe.reported != probe.layers:
        heard = f"attention from {len(probe.reported)} of {layers} layers"
        raise _refusal(model, "every layer to call transformers' attention interface", heard)
    if cache.asked_by_a_layer:
        raise _refusal(model, "layers that take their positions from outside", "layers that count those of the cache")
    if not mask.made:
        raise _refusal(model, "masks made by transformers' functions", "a model that makes its own")
    if mask.looks_ahead:
        raise _refusal(model, "attention to earlier tokens alone", "tokens that see later ones")


def _note_strays(strays: dict[str, int], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A rung belongs to a token: where a linear sees others than those of the pass, its update has no place."""

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen = args[0].numel() // args[0].shape[-1]
        if seen != REHEARSED_TOKENS:
            strays[name] = seen

    return note


class _AskedCache(PagedCache):
    """Also says whether a layer asked how long its past is, which for rows of different lengths has no one answer."""

    asked_by_a_layer = False

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        self.asked_by_a_layer = self.asked_by_a_layer or layer_idx is not None
        return super().get_seq_length()

    def get_query_offset(self, layer_idx: int = 0) -> int:  # transformers' masks ask this, and ours have their own
        return super().get_seq_length()


class _CausalMask(RowMask):
    """Also says whether a mask was made at all, and whether it lets a token see a later one."""

    made = looks_ahead = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        mask = super().__call__(*args, **kwargs)
        later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
        self.made, self.looks_ahead = True, self.looks_ahead or bool((mask == 0)[..., later].any())
        return mask


def _refusal(model: PreTrainedModel, expected: str, got: str) -> ValueError:
    return ValueError(f"model: expected {expected}, got {got} in {type(model).__name__}; it cannot be served")

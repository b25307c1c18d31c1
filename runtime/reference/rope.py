"""Rotary embeddings whose frequencies depend on the length of the call: dynamic NTK and LongRoPE.

transformers picks their frequencies from the largest position of a forward call. A prompt that runs in blocks would get
those of every block's own end, other ones than the model was made with. So while a call is under way each block's
positions carry one more column, the largest position of the whole call, which is cut off again behind the embedding.
Source: transformers, `modeling_rope_utils.dynamic_rope_update`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class CallLength:
    """The largest position of the forward call under way; None outside of one."""

    def __init__(self) -> None:
        self.largest: int | None = None

    @contextmanager
    def of(self, tokens: int) -> Iterator[None]:
        """A call after which the longest row holds `tokens` tokens."""
        self.largest = tokens - 1
        try:
            yield
        finally:
            self.largest = None


@contextmanager
def rope_of_whole_call(model: nn.Module, length: CallLength) -> Iterator[None]:
    """Let the rotary embeddings of `model` that depend on the length of a call see `length`, until the block ends."""
    with ExitStack() as undo:
        for module in model.modules():
            kinds = _rope_types(module).values()
            if any("dynamic" in kind or kind == "longrope" for kind in kinds):
                hooks = _RopeHooks(length)
                undo.callback(module.register_forward_pre_hook(hooks.before, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(hooks.after).remove)
                undo.callback(_forget_growth, module)
        yield


def _rope_types(module: nn.Module) -> dict[str, str]:
    """What a rotary embedding calls its kinds, by the prefix of their buffers: one, or one a layer type."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return {f"{layer_type}_": kind for layer_type, kind in kinds.items()}
    return {"": kinds} if isinstance(kinds, str) else {}


def _forget_growth(module: nn.Module) -> None:
    """Back to the frequencies of the original context.

    Dynamic NTK keeps those of the longest call so far, so that a text's would depend on the texts before it.
    """
    for prefix, kind in _rope_types(module).items():
        if "dynamic" in kind:
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


class _RopeHooks:
    """The pair of hooks of one rotary embedding: `forward(x, position_ids, ...)`, out come [..., T, D] tensors."""

    def __init__(self, length: CallLength) -> None:
        self.length = length
        self.added = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        _forget_growth(module)
        largest = self.length.largest
        self.added = largest is not None
        if largest is None:
            return args, kwargs
        named = "position_ids" in kwargs
        positions = kwargs["position_ids"] if named else args[1]
        positions = torch.nn.functional.pad(positions, (0, 1), value=largest)
        if named:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.added:
            return output
        if isinstance(output, Tensor):
            return output[..., :-1, :]
        return tuple(part[..., :-1, :] for part in output)

"""A model whose linears add something: the exact adapter, a rung as it is trained, any compressed adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Update = Callable[[Tensor], Tensor]
"""What a linear adds for its input: x [..., d_in] -> [..., d_out]."""
Pair = tuple[Tensor, Tensor]
"""a [n, d_in] and b [n, d_out], whose update of the weights is b.T @ a."""


@contextmanager
def updated(model: PreTrainedModel, updates: Mapping[str, Update]) -> Iterator[None]:
    """Inside, every linear named adds its update to what it puts out; gradients flow through. Undone on exit."""
    with ExitStack() as undo:
        for name, update in updates.items():
            undo.enter_context(_adding(model.get_submodule(name), update))
        yield


@contextmanager
def _adding(linear: nn.Module, update: Update) -> Iterator[None]:
    original: Callable[..., Tensor] = linear.forward
    own = vars(linear).get("forward")

    def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return original(x, *args, **kwargs) + update(x)

    vars(linear)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(linear)["forward"]
        else:
            vars(linear)["forward"] = own


def low_rank(pairs: Mapping[str, Pair], model: PreTrainedModel) -> dict[str, Update]:
    """The updates of a compressed adapter, on the devices of the linears and in the dtype of the model."""

    def update(a: Tensor, b: Tensor) -> Update:
        return lambda x: (x @ a.T) @ b

    found = {}
    for name, (a, b) in pairs.items():
        device = next(model.get_submodule(name).parameters()).device
        found[name] = update(a.to(device, model.dtype), b.to(device, model.dtype))
    return found


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside, no parameter of the model asks for a gradient, and dropout is off."""
    asked = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for parameter, _ in asked:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter, before in asked:
            parameter.requires_grad_(before)
        for module, training in modes:
            module.training = training

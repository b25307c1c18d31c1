"""Buffers that show where a kernel wrote, and when it read; and how near to the truth is near enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from runtime.ops.launch import INTERPRETED

GUARD = 64
TINY = 2.0**-20
"""Relative to the result: with their order sums of n numbers in float32 differ by about sqrt(n) 2^-24, n is at most a
few hundred here, and PyTorch may be lucky."""


def poisoned(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN in this shape, and NaN around it."""
    return torch.full((math.prod(shape) + 2 * GUARD,), torch.nan, dtype=dtype, device=device)[GUARD:-GUARD].view(shape)


def guarded(values: Tensor) -> Tensor:
    """The values, with NaN around them."""
    return poisoned(*values.shape, device=values.device, dtype=values.dtype).copy_(values)


@contextmanager
def arriving(
    modules: Sequence[ModuleType], *tensors: Tensor, told: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """In the interpreter, what the kernels before those of the modules write is something else until a program of
    theirs waits: NaN, or one less. `told` is called whenever one does."""
    if not INTERPRETED:
        yield
        return
    held = [(own, own.clone()) for own in tensors]
    for own in tensors:
        own.copy_(torch.full_like(own, torch.nan) if own.is_floating_point() else own - 1)

    def wait(PDL: bool) -> None:
        while held:
            own, there = held.pop()
            own.copy_(there)
        told()

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "wait", wait)
        yield
    assert not held, "nobody has waited"


def check_guards(*buffers: Tensor) -> None:
    """Nothing was written around these, which `poisoned` or `guarded` gave."""
    for own in buffers:
        whole = own.as_strided((own.numel() + 2 * GUARD,), (1,), 0)
        assert bool(whole[:GUARD].isnan().all() & whole[-GUARD:].isnan().all())


def check_near(found: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Every row of `found` is as near to the truth, float64, as what PyTorch makes of the same numbers in the same
    dtype. What is stored in few bits may be off by half a unit more: Triton's interpreter cuts them off."""
    tiny = max(TINY, torch.finfo(found.dtype).eps / 2)
    found, eager, truth = (own.double().flatten(1) for own in (found, eager, truth))
    allowed = 2 * (eager - truth).norm(dim=1) + tiny * truth.norm(dim=1)
    error = (found - truth).norm(dim=1)
    assert bool((error <= allowed).all()), (error / truth.norm(dim=1), allowed / truth.norm(dim=1))

"""Buffers that show where a kernel wrote, and how near to the truth is near enough."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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

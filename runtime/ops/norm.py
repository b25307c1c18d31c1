"""An RMS norm that costs no pass of its own.

    norm(r) = r * weight / sqrt(mean(r^2) + eps)

Whoever writes the residual r leaves r * weight, in the model's dtype, and sums of squares of r by blocks of columns.
Linears take that as it is, and who consumes what they put out multiplies it by `rstd`, a sum over a few dozen numbers.
r itself is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """What makes the norm of what was made of r * weight."""

    squares: Tensor
    """[B, blocks] float32"""
    eps: float
    width: int
    """D"""

    @staticmethod
    def arguments(norm: Norm | None, like: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """A kernel's tensor and constants; without a norm any tensor."""
        if norm is None:
            return like, {"NORM": False, "BLOCKS": 1, "PADDED": 1, "EPS": 0.0, "IN": 1}
        blocks = norm.squares.shape[1]
        padded = triton.next_power_of_2(blocks)
        return norm.squares, {"NORM": True, "BLOCKS": blocks, "PADDED": padded, "EPS": norm.eps, "IN": norm.width}


@triton.jit
def rstd_of(squares, row, BLOCKS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr):
    """1 over the root mean square of a row."""
    block = tl.arange(0, PADDED)
    return tl.rsqrt(tl.sum(tl.load(squares + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)) / D + EPS)

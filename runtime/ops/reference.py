"""The gated low-rank update in plain PyTorch: what every kernel of this operation must equal.

Shape legend: B rows, T tokens, J rungs, R directions of a module, r those that are read.
"""

from __future__ import annotations

from torch import Tensor


def direction_gate(weights: Tensor, reads: Tensor) -> Tensor:
    """g[k] = sum_j weight[j] * reads[j, k]: rung, scale and cross-fade in one vector.

    weights [B, T, J] over rungs, scales folded in; reads [J, r] 1 where rung j reads direction k -> [B, T, r].
    Source: DESIGN section 4.
    """
    return weights @ reads


def lora_delta(x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """B'(g * (A' x)): x [B, T, d_in], a [r, d_in], b [r, d_out], gate [B, T, r] or [B, 1, r] -> [B, T, d_out]."""
    return ((x.to(a.dtype) @ a.T) * gate.to(a.dtype)) @ b

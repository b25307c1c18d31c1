"""The gated low-rank update in plain PyTorch: what every kernel of this operation must equal.

Shape legend: B rows, T tokens, J rungs, R directions of a module, r those that are read.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def direction_gate(weights: Tensor, reads: Tensor) -> Tensor:
    """g[k] = sum_j weight[j] * reads[j, k]: rung, scale and cross-fade in one vector.

    weights [B, T, J] over rungs, scales folded in; reads [J, r] 1 where rung j reads direction k -> [B, T, r].
    Source: DESIGN section 4.
    """
    return weights @ reads


def add_lora_(output: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """output += B'(g * (A' x)), in place, in as few launches as PyTorch has for it.

    x [..., d_in], a [r, d_in], b [r, d_out], gate [..., r] or anything that broadcasts to it, all of one dtype; output
    [..., d_out], contiguous, is returned.
    """
    read = linear(x, a).mul_(gate)
    output.view(-1, output.shape[-1]).addmm_(read.view(-1, read.shape[-1]), b)
    return output

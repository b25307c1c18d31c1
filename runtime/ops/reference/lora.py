"""The gated low-rank update in plain PyTorch: what every kernel of this operation must equal.

A row is one direction of a bank at one format: of a direction that two rungs read at different bits there are two rows,
of which a token uses one.

Shape legend: B rows of a batch, T tokens, J rungs, N rows of directions that a pass reads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def direction_gate(weights: Tensor, cells: Tensor, reads: Tensor, bank_of: Tensor) -> Tensor:
    """What multiplies every row of directions at every token: rung, scale and cross-fade in one number.

    weights [B, T, J] over rungs, 0 where a rung is not active, every scale folded in; bank_of [J] long, the bank that a
    rung reads; cells [J, N] 1 where rung j reads row n as it is, at its format; reads [J, N] 1 where it reads the row's
    direction at any format; both 0 in rows of other banks than the rung's -> [B, T, N].

    A direction is read at the bits of the finest of a bank's active rungs, the highest: bits never fall along the rungs
    of a bank. There it counts for every active rung of the bank that reads it:

        g[n] = cells[h, n] * sum_j weight[j] * reads[j, n],    h the highest rung of n's bank with weight[h] > 0

    Where one rung of a bank is active at most, that is weights @ cells. Source: DESIGN section 4.
    """
    active = weights > 0
    rung = torch.arange(len(bank_of), device=bank_of.device)
    above = (bank_of[:, None] == bank_of) & (rung[:, None] > rung)  # [i, j]: i is a higher rung of j's bank
    highest = active & (active.float() @ above.float() == 0)
    return (weights @ reads) * (highest.to(cells.dtype) @ cells)


def add_lora_(output: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """output += B'(g * (A' x)), in place, in as few launches as PyTorch has for it.

    x [..., d_in], a [N, d_in], b [N, d_out], gate [..., N] or anything that broadcasts to it, all of one dtype; output
    [..., d_out], contiguous, is returned.
    """
    read = linear(x, a).mul_(gate)
    output.view(-1, output.shape[-1]).addmm_(read.view(-1, read.shape[-1]), b)
    return output

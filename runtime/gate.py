"""From weights over rungs to weights over directions: rung, scale and cross-fade in one vector.

A token's state is a weight per rung (its scale folded in). Direction k of module m then counts

    g[m, k] = sum_j weight[j] * (k < rank_table[j, m])

and the module adds B'(g * (A' x)): one pass at the active rank, however many rungs a fade spans (DESIGN section 4).
The stream sets the gate before a forward pass; every adapted linear reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ladder import Ladder


class Gate:
    """The direction weights of the pass under way, shared by all adapted linears of one model."""

    def __init__(self, ladder: Ladder, device: torch.device) -> None:
        # Modules with the same ranks at every rung share their gate: for the `svd` ladder that is all of them.
        columns, index = ladder.rank_table.unique(dim=1, return_inverse=True)
        self.column = dict(zip(ladder.modules, index.tolist(), strict=True))
        self._ranks = columns.tolist()
        self._prefix = [
            (torch.arange(int(ranks[-1])) < ranks[:, None]).float().to(device) for ranks in columns.T.contiguous()
        ]
        self._weights: Tensor | None = None
        self._active = 0
        self._cached: dict[int, Tensor] = {}

    def set(self, weights: Tensor, active_rung: int) -> None:
        """Weights over rungs [B, T, J] for the next pass; no rung above index `active_rung` has any weight."""
        self._weights, self._active, self._cached = weights, active_rung, {}

    def directions(self, column: int) -> Tensor:
        """[B, T, r] float32 direction weights of the modules of `column`, r their active rank (0 is allowed)."""
        assert self._weights is not None, "the stream sets the gate before every forward pass"
        if column not in self._cached:
            rank = self._ranks[self._active][column]
            self._cached[column] = self._weights @ self._prefix[column][:, :rank]
        return self._cached[column]


def lora_delta(x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """B'(g * (A' x)), the reference op: x [B, T, d_in], a [r, d_in], b [r, d_out], gate [B, T, r] -> [B, T, d_out]."""
    return ((x.to(a.dtype) @ a.T) * gate.to(a.dtype)) @ b


class AdaptedLinear:
    """Forward hook of one adapted linear: adds the gated update to what the frozen layer puts out.

    A hook changes no module, parameter name or state dict, and serves `nn.Linear` and GPT-2's `Conv1D` alike.
    """

    def __init__(self, gate: Gate, column: int, a: Tensor, b: Tensor) -> None:
        self.gate, self.column, self.a, self.b = gate, column, a, b

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        gate = self.gate.directions(self.column)
        rank = gate.shape[-1]
        if rank == 0:
            return output
        x = args[0]
        if x.shape[:-1] != gate.shape[:-1]:  # some models flatten [B, T] on the way
            gate = gate.reshape(*x.shape[:-1], rank)
        gate = gate.to(x.device)  # layers may lie on other devices than the stream
        return output + lora_delta(x, self.a[:rank], self.b[:rank], gate).to(output.dtype)

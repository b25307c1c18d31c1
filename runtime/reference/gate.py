"""From weights over rungs to weights over directions, for every adapted linear of one ladder.

The stream's weights, scales folded in, are set before a forward pass; every adapted linear reads them through its
ladder's gate and adds its gated update: one pass over the directions of the active rung, however many rungs a fade
spans. Rows of other adapters have no weight here. Source: DESIGN section 4.

Shape legend: B rows, T tokens, J rungs, r active directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ladder import Ladder
from ..ops.reference import add_lora_, direction_gate

NO_RUNG = -1


class Gate:
    """The direction weights of the pass under way, shared by all linears that one ladder adapts."""

    def __init__(self, ladder: Ladder, device: torch.device) -> None:
        # Modules with the same ranks at every rung share their gate: for the `svd` ladder that is all of them.
        columns, index = ladder.rank_table.unique(dim=1, return_inverse=True)
        self.column = dict(zip(ladder.modules, index.tolist(), strict=True))
        self._ranks = columns.tolist()
        self._reads = [
            (torch.arange(int(ranks[-1])) < ranks[:, None]).float().to(device) for ranks in columns.T.contiguous()
        ]
        self._weights: Tensor | None = None
        self._active = NO_RUNG
        self._cached: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def set(self, weights: Tensor, active_rung: int) -> None:
        """Weights over rungs [B, T, J] for the next pass, or [B, 1, J] for all its tokens alike; none above index
        `active_rung` is used (`NO_RUNG`: none)."""
        self._weights, self._active, self._cached = weights[..., : len(self._ranks)], active_rung, {}

    def directions(self, column: int, like: Tensor) -> Tensor | None:
        """[B, T, r] direction weights of the modules of `column`, r their active rank, on the device and in the dtype
        of `like`; [B, 1, r] where all tokens have the same; None where r is 0."""
        assert self._weights is not None, "the stream sets the gate before every forward pass"
        rank = 0 if self._active == NO_RUNG else self._ranks[self._active][column]
        if rank == 0:
            return None
        # Layers may lie on other devices than the stream.
        key = (column, like.device, like.dtype)
        if key not in self._cached:
            self._cached[key] = direction_gate(self._weights, self._reads[column][:, :rank]).to(like)
        return self._cached[key]


class AdaptedLinear:
    """The forward of one adapted linear: what the frozen layer puts out, and the gated update added to it.

    It stands in for the layer's `forward` and changes no module, parameter name or state dict; a forward hook would do
    the same in more of PyTorch's own Python. Serves `nn.Linear` and GPT-2's `Conv1D` alike.
    """

    def __init__(self, linear: Callable[..., Tensor], gate: Gate, column: int, a: Tensor, b: Tensor) -> None:
        """`linear` is the frozen layer's own forward."""
        self.linear, self.gate, self.column, self.a, self.b = linear, gate, column, a, b
        self._read: tuple[int, torch.dtype, Tensor, Tensor] = (len(a), a.dtype, a, b)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.linear(x, *args, **kwargs)
        gate, dtype = self.gate.directions(self.column, output), output.dtype
        if gate is None:
            return output
        rank = gate.shape[-1]
        if x.dim() != gate.dim():  # some models flatten [B, T] on the way
            gate = gate.expand(-1, len(x) // len(gate), -1).reshape(*x.shape[:-1], rank)
        if x.dtype != dtype:
            x = x.to(dtype)
        return add_lora_(output, x, *self._directions(rank, dtype), gate)

    def _directions(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first `rank` directions [rank, d_in] and [rank, d_out], kept from one pass to the next."""
        if self._read[:2] != (rank, dtype):
            self._read = (rank, dtype, self.a[:rank].to(dtype), self.b[:rank].to(dtype))
        return self._read[2:]

"""From weights over rungs to weights over directions, for every adapted linear of one ladder.

The stream's weights, scales folded in, are set before a forward pass; every adapted linear reads them through its
ladder's gate and adds its gated update: one pass over the rows of directions that the active rungs read, however many
rungs a fade spans. Rows of a batch on other adapters have no weight here. Source: DESIGN section 4.

Which rungs are active somewhere in a pass is known on the host. It settles what is read of every module, ranges of rows
of the ladder's banks, and with that the columns of one table for all modules: the gates of a pass are one product of
the weights with that table, and a module's gate is a slice of them.

Shape legend: B rows, T tokens, J rungs, N rows of directions that a pass reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ladder import Directions, Ladder, Range
from ..ladder.formats import BITS
from ..ops.reference.lora import add_lora_, direction_gate

KEPT_LAYOUTS = 64
"""Sets of active rungs whose tables are kept: passes have the same few again and again."""

Ranges = tuple[Range, ...]


@dataclass(frozen=True)
class Layout:
    """What a pass reads in which certain rungs are active, modules of equal edges (a column) alike."""

    ranges: tuple[Ranges, ...]
    """By column"""
    columns: tuple[slice, ...]
    """By column its part of N"""
    cells: Tensor
    """[J, N] float32: 1 where the rung reads the row at the row's format"""
    reads: Tensor | None
    """[J, N] float32: 1 where it reads the row's direction at any format; None where these are the cells"""


class Gate:
    """The direction weights of the pass under way, shared by all linears that one ladder adapts."""

    def __init__(self, ladder: Ladder, device: torch.device) -> None:
        self.ladder = ladder
        # Modules with the same edges at every rung share their gate: for the `svd` ladder that is all of them.
        edges, index = ladder.edges.transpose(0, 1).unique(dim=0, return_inverse=True)
        self.column = dict(zip(ladder.modules, index.tolist(), strict=True))
        self._module = [index.tolist().index(column) for column in range(len(edges))]
        self._tables = _Tables(ladder, edges.transpose(0, 1), device)
        self._bank_of = torch.tensor(ladder.bank_of, device=device)
        scaled = any(scale != 1 for scale in ladder.scales)
        self._scales = torch.tensor(ladder.scales, device=device) if scaled else None
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._layout: Layout | None = None
        self._weights: Tensor | None = None
        self._fades = False
        self._gates: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._cached: dict[tuple[int, torch.device, torch.dtype], tuple[Ranges, Tensor] | None] = {}

    def set(self, weights: Tensor, active: Sequence[int], *, fades: bool = True) -> None:
        """Weights over rungs [B, T, J] for the next pass, or [B, 1, J] for all its tokens alike.

        `active` are the indices of the rungs that have any; `fades` says that a token may have several. Raises
        ValueError for a rung that is not in memory.
        """
        rungs = tuple(sorted(active))
        if rungs:
            self.ladder.require_resident(rungs[-1])
        self._weights, self._fades = weights[..., : len(self._bank_of)], fades
        self._gates, self._cached = {}, {}
        if rungs not in self._layouts:
            while len(self._layouts) >= KEPT_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            self._layouts[rungs] = self._made(rungs)
        self._layout = self._layouts[rungs]

    def read(self, column: int, like: Tensor) -> tuple[Ranges, Tensor] | None:
        """What the modules of `column` read, and its [B, T, n] direction weights on the device and in the dtype of
        `like`; [B, 1, n] where all tokens have the same; None where nothing is read."""
        # Layers may lie on other devices than the stream.
        key = (column, like.device, like.dtype)
        if key not in self._cached:
            self._cached[key] = self._slice(column, like)
        return self._cached[key]

    def _slice(self, column: int, like: Tensor) -> tuple[Ranges, Tensor] | None:
        layout = self._layout
        assert layout is not None, "the stream sets the gate before every forward pass"
        ranges = layout.ranges[column]
        if not ranges:
            return None
        key = (like.device, like.dtype)
        if key not in self._gates:
            self._gates[key] = self._all(layout).to(like)
        return ranges, self._gates[key][..., layout.columns[column]]

    def _all(self, layout: Layout) -> Tensor:
        """[B, T, N] float32 direction weights of all columns."""
        weights = self._weights
        assert weights is not None, "set with the layout"
        if self._scales is not None:
            weights = weights * self._scales
        if layout.reads is None or not self._fades:
            return weights @ layout.cells
        return direction_gate(weights, layout.cells, layout.reads, self._bank_of)

    def _made(self, rungs: tuple[int, ...]) -> Layout:
        by_module = self.ladder.ranges(rungs)
        ranges = tuple(tuple(by_module[m]) for m in self._module)
        ends = torch.tensor([0, *(sum(map(len, own)) for own in ranges)]).cumsum(0).tolist()
        columns = tuple(slice(start, end) for start, end in pairwise(ends))
        cells, reads = self._tables.of(ranges)
        # A pass reads a direction at two formats only where two of its rungs share a bank that has several.
        banks = [self.ladder.bank_of[rung] for rung in rungs]
        several = any(banks.count(bank) > 1 for bank in self._tables.mixed)
        return Layout(ranges, columns, cells, reads if several else None)


class _Tables:
    """The cells and reads of every row that any rung reads, of which those of a pass are slices: made once on the
    device, where a new set of active rungs is to wait for nothing."""

    def __init__(self, ladder: Ladder, edges: Tensor, device: torch.device) -> None:
        """`edges` [J, C, F] are those of every column."""
        starts = torch.cat([torch.zeros_like(edges[..., :1]), edges[..., :-1]], -1)
        cells, reads, width = [], [], 0
        self._at: dict[tuple[int, int], int] = {}
        """Where the rows of a bank at a format begin"""
        for bank in sorted(set(ladder.bank_of)):
            mine = torch.tensor([own == bank for own in ladder.bank_of])[:, None, None]
            for f, bits in enumerate(BITS):
                rows = torch.arange(int((edges[..., f] * mine[..., 0]).max()))
                cell = mine & (rows >= starts[..., f, None]) & (rows < edges[..., f, None])
                if not bool(cell.any()):
                    continue
                self._at[bank, bits] = width
                width += len(rows)
                cells.append(cell)
                reads.append(mine & (rows < edges[..., -1:]))
        none = torch.zeros(*edges.shape[:2], 0, dtype=torch.bool)
        self._cells, self._reads = (torch.cat([none, *own], -1).float().to(device) for own in (cells, reads))
        """[J, C, all rows]"""
        formats = [bank for bank, _ in self._at]
        self.mixed = {bank for bank in formats if formats.count(bank) > 1}
        """Banks that are read at more than one format."""

    def of(self, ranges: Sequence[Ranges]) -> tuple[Tensor, Tensor]:
        """Cells and reads [J, N] of these ranges, column by column."""
        parts = [
            (column, slice(at + r.start, at + r.stop))
            for column, own in enumerate(ranges)
            for r in own
            for at in [self._at[r.bank, r.bits]]
        ]
        if not parts:
            return self._cells[:, 0, :0], self._reads[:, 0, :0]
        cells, reads = (
            torch.cat([x[:, column, rows] for column, rows in parts], -1) for x in (self._cells, self._reads)
        )
        return cells, reads


class AdaptedLinear:
    """The forward of one adapted linear: what the frozen layer puts out, and the gated update added to it.

    It stands in for the layer's `forward` and changes no module, parameter name or state dict; a forward hook would do
    the same in more of PyTorch's own Python. Serves `nn.Linear` and GPT-2's `Conv1D` alike.

    Of directions that are stored in other bits than the layer computes in, those that the pass reads are decoded, and
    kept while the next passes read the same: never more than the active rungs have.
    """

    def __init__(
        self, linear: Callable[..., Tensor], gate: Gate, column: int, directions: Mapping[int, Directions]
    ) -> None:
        """`linear` is the frozen layer's own forward; `directions` are the module's by bank, on the layer's device."""
        self.linear, self.gate, self.column, self.directions = linear, gate, column, directions
        self._key: tuple[Ranges, torch.dtype] | None = None
        self.decoded: tuple[Tensor, Tensor] | None = None
        """[n, d_in] and [n, d_out] of the latest pass; of directions that needed no decoding, the stored ones."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.linear(x, *args, **kwargs)
        read, dtype = self.gate.read(self.column, output), output.dtype
        if read is None:
            self.decoded = None
            return output
        ranges, gate = read
        if x.dim() != gate.dim():  # some models flatten [B, T] on the way
            gate = gate.expand(-1, len(x) // len(gate), -1).reshape(*x.shape[:-1], gate.shape[-1])
        if x.dtype != dtype:
            x = x.to(dtype)
        return add_lora_(output, x, *self._decode(ranges, dtype), gate)

    def _decode(self, ranges: Ranges, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.decoded is None or self._key != (ranges, dtype):
            self.decoded = None  # before the others take their place
            parts = [self.directions[r.bank].read(r.start, r.stop, r.bits, dtype) for r in ranges]
            self.decoded = parts[0] if len(parts) == 1 else _joined(parts)
            self._key = (ranges, dtype)
        return self.decoded


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    a, b = zip(*parts, strict=True)
    return torch.cat(a), torch.cat(b)

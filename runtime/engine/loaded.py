"""What prompts multiply with of adapters: the directions of some rungs as matrices, of all layers.

A prompt reads one rung of one ladder, and so do its next blocks, and other prompts of the same adapter. So what the
store has in few bits is turned into matrices once, and kept until others need the room: as many bytes a set as an
adapter of so many directions has in the model's dtype.

Shape legend: L layers, S sets of factors, R directions at most, D inputs, Q columns of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from ..ops.prompt.dense import unpack_layers
from ..ops.prompt.matrices import Factors
from ..ops.resolve import Rows, reads_for, resolve
from ..sending import put
from .model import DOWN, GATE_UP, MEMBERS, OUT, QKV, Model, block_columns
from .store import AdapterStore

Key = tuple[int, int]
"""Slot and rung"""


@dataclass(frozen=True)
class Site:
    """Linears that share their input, in every layer."""

    inputs: int
    outputs: tuple[int, ...]
    columns: int
    """Q, of their blocks"""

    @property
    def blocks(self) -> int:
        """Of all members."""
        return sum(triton.cdiv(size, self.columns) for size in self.outputs)


def sites_of(model: Model) -> dict[int, Site]:
    """By the number of a site's first member."""
    s, layer = model.shape, model.layers[0]
    found = {QKV: (layer.qkv, s.head_dim), OUT: (layer.o, 0), GATE_UP: (layer.gate_up, 0), DOWN: (layer.down, 0)}
    sites = {}
    for first, (own, columns) in found.items():
        outputs = tuple(len(weight) for weight in own.weights)
        sites[first] = Site(own.weights[0].shape[1], outputs, columns or block_columns(outputs[0]))
    return sites


class Loaded:
    """Room for S sets of factors, and which ones they are, as long as ladders stay in their slots."""

    def __init__(self, model: Model, store: AdapterStore, sets: int) -> None:
        self._store, self._sites = store, sites_of(model)
        layers, most = model.shape.layers, store.directions
        like = torch.empty(0, dtype=model.dtype, device=model.device)
        self._a = {
            first: like.new_zeros(layers, sets, len(own.outputs), most, own.inputs)
            for first, own in self._sites.items()
        }
        """[L, S, members, R, D] of every site"""
        self._b = {
            first: like.new_zeros(layers, sets, own.blocks, most, own.columns) for first, own in self._sites.items()
        }
        """[L, S, blocks, R, Q]"""
        self.reads = reads_for(sets, len(store.modules), store.arena, model.dtype)
        """What every set is, [S, M, 32]"""
        self._fresh = reads_for(sets, len(store.modules), store.arena, model.dtype)
        self._rows, self._fresh_rows = (
            Rows(
                torch.full((sets,), -1, dtype=torch.int32, device=model.device),
                torch.zeros(sets, dtype=torch.int32, device=model.device),
                torch.ones(sets, device=model.device),
            )
            for _ in range(2)
        )  # fmt: skip
        self._keys: list[Key | None] = [None] * sets

    def __len__(self) -> int:
        return len(self._keys)

    def numbers(self, keys: Sequence[Key]) -> dict[Key, int]:
        """The number of every set asked for, no more than there is room for; what is not there yet takes the place of
        others."""
        wanted = set(keys)
        assert len(wanted) <= len(self), "there is room for them"
        there = {key: number for number, key in enumerate(self._keys) if key in wanted}
        missing = [key for key in dict.fromkeys(keys) if key not in there]
        if missing:
            free = [number for number, key in enumerate(self._keys) if key not in wanted]
            fresh: list[Key | None] = [None] * len(self)
            for key, number in zip(missing, free, strict=False):
                self._keys[number] = fresh[number] = key
                there[key] = number
            self._unpack(fresh)
        return there

    def factors(self, layer: int, first: int) -> Factors:
        """Those of a layer's site."""
        return Factors(self.reads, layer * len(MEMBERS) + first, self._a[first][layer], self._b[first][layer])

    def _unpack(self, fresh: Sequence[Key | None]) -> None:
        """Write the sets that are new."""
        for rows, keys in ((self._rows, self._keys), (self._fresh_rows, fresh)):
            put(rows.slot, [-1 if key is None else key[0] for key in keys])
            put(rows.rung, [0 if key is None else key[1] for key in keys])
        resolve(self.reads, self._rows, self._store.tables)
        resolve(self._fresh, self._fresh_rows, self._store.tables)
        for first, site in self._sites.items():
            unpack_layers(self._fresh, first, len(MEMBERS), self._a[first], self._b[first], site.outputs)

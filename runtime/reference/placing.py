"""A ladder's directions where the layers that read them are, and, where that is asked for, decoded once for all.

Serving keeps them packed: a layer decodes what the rungs of a pass read, and no more is in memory. Training and
scoring run thousands of passes over a few rungs of one ladder; inside `keep_decoded` every format is decoded once and
stays until the block ends, which takes the memory of a few adapters and saves most of such a pass on a small model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..ladder import Directions
from ..ladder.formats import BITS, Rows

_Place = tuple[int, torch.device, torch.dtype]
_KEPT: ContextVar[dict[_Place, tuple[Directions, Directions]] | None] = ContextVar("kept", default=None)
"""By the directions' identity, their device and dtype: the directions themselves, so that they live, and as placed."""


@dataclass(frozen=True)
class Decoded(Directions):
    """Directions that remember what they were read as."""

    kept: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def read(self, start: int, stop: int, bits: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """As `Directions` do, each format decoded whole when it is first read."""
        if (bits, dtype) not in self.kept:
            self.kept[bits, dtype] = super().read(0, self.counts()[BITS.index(bits)], bits, dtype)
        a, b = self.kept[bits, dtype]
        return a[start:stop], b[start:stop]


@contextmanager
def keep_decoded() -> Iterator[None]:
    """Inside, what is read of a ladder stays decoded."""
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def placed(own: Directions, device: torch.device, dtype: torch.dtype) -> Directions:
    """Directions on the device of the layer that reads them, none in more bits than the model computes in."""
    kept = _KEPT.get()
    if kept is None:
        return _moved(own, device, dtype)
    key = (id(own), device, dtype)
    if key not in kept:
        moved = _moved(own, device, dtype)
        kept[key] = own, Decoded(moved.a, moved.b)
    return kept[key][1]


def _moved(own: Directions, device: torch.device, dtype: torch.dtype) -> Directions:
    def wide(rows: Rows) -> Tensor:
        return rows.wide.to(dtype) if dtype.itemsize <= rows.wide.dtype.itemsize else rows.wide

    return Directions(*(replace(half, wide=wide(half)).to(device) for half in (own.a, own.b)))

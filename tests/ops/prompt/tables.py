"""Tiles of a pass, written where kernels look for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.ops.prompt.tiles import FIELDS


def written(tiles: Sequence[Sequence[int]], most: int, device: torch.device) -> Tensor:
    """[most, FIELDS] int32; those behind the last one are not in use."""
    table = torch.zeros(most, FIELDS, dtype=torch.int32)
    table[: len(tiles)] = torch.tensor(tiles, dtype=torch.int32)
    return table.to(device)

"""Codes of 1, 2 or 4 bits in bytes, along one axis: how KV pages and ladder rows lie in memory.

A byte holds one code of each of the axis' 8 / bits equal parts, the first part lowest: parts are slices, so nothing is
interleaved on the way back, and any length works, the last part being filled up with zeros.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def packed_length(length: int, bits: int) -> int:
    """Bytes that `length` codes of 1, 2, 4 or 8 `bits` take."""
    return -(-length * bits // 8)


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Codes in [0, 2**bits) of any integer dtype, `length` along `dim` -> uint8, `packed_length(length, bits)` there.

    Codes are not checked: one that does not fit its bits changes its neighbours.
    """
    parts, length = 8 // bits, codes.shape[dim]
    short = packed_length(length, bits) * parts - length
    if short:
        shape = list(codes.shape)
        shape[dim] = short
        codes = torch.cat([codes, codes.new_zeros(shape)], dim)
    chunks = codes.to(torch.uint8).chunk(parts, dim)
    packed = chunks[0].clone()
    for number, chunk in enumerate(chunks[1:], start=1):
        packed |= chunk << (bits * number)
    return packed


def unpack(packed: Tensor, bits: int, length: int, dim: int = -1) -> Tensor:
    """The inverse of `pack`: uint8 codes, `length` of them along `dim`; no more than there are."""
    dim %= packed.dim()
    shifts = _shifts(bits, packed.device).view(-1, *[1] * (packed.dim() - dim))
    codes = (packed.unsqueeze(dim) >> shifts).bitwise_and_(2**bits - 1)
    return codes.flatten(dim, dim + 1).narrow(dim, 0, length)


@lru_cache(maxsize=16)
def _shifts(bits: int, device: torch.device) -> Tensor:
    """Of every part of a byte; made on the device, which nothing has to wait for."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)

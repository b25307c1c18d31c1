"""Codes of 1, 2 or 4 bits in bytes, along one axis: how KV pages and ladder rows lie in memory.

A byte holds one code of each of the axis' 8 / bits equal parts, the first part lowest: parts are slices, so nothing is
interleaved on the way back, and any length works, the last part being filled up with zeros.
"""

from __future__ import annotations

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
    mask = 2**bits - 1
    codes = torch.cat([packed >> shift & mask for shift in range(0, 8, bits)], dim)
    return codes.narrow(dim, 0, length)

"""What prompts multiply with, and the first half of what their adapters add, in plain PyTorch: what kernels must equal.

Everything is computed in float32, or in float64 where that is asked for, and rounded once, to the dtype in which a
kernel stores it. Nothing of this is fast: bytes of the store are taken apart one direction at a time.

Shape legend: T tokens, S sets of factors, n directions that a set reads of a module, R at most, D inputs, N outputs, Q
columns of a block of B'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ladder.formats import BITS
from ...packing import unpack
from ..packed import ALIGNMENT, ENDS, FIRSTS, NUMBERS, ROWS, SCALES, STARTS_A, STARTS_B, STRETCH, Reads
from ..prompt.tiles import COUNT, FACTORS, FIRST


def dense(
    reads: Reads, own: int, module: int, *, inputs: int, outputs: int, columns: int, directions: int,
    dtype: torch.dtype, wide: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What set number `own` reads of a module: a [n, D] and b [n, N] in `wide`, of a store of R = `directions` for a
    model in `dtype`, blocks of B' being Q = `columns` wide.

    Rows of codes are what the levels say, stretched in bfloat16 (`packed`), and the scales of both halves, as much
    smaller, are in b. The product of the two is the update; what that weighs is left out.
    """
    record = reads.records[own, module].tolist()
    ends = [0, *record[ENDS : ENDS + 4]]
    scales = _stretch(reads.arena, record[SCALES], 4 * 2 * directions).view(torch.float32).view(2, directions).to(wide)
    blocks = -(-outputs // columns)
    a, b = [], []
    for place, bits in enumerate(BITS):
        for direction in range(*ends[place : place + 2]):
            row = direction - (record[FIRSTS + place - 1] if place else 0)
            a.append(_row(reads, record[STARTS_A + place], row, inputs, bits, dtype).to(wide))
            # A block has all rows of a format, one behind the other; the next block follows.
            parts = [
                _row(reads, record[STARTS_B + place], block * record[ROWS + place] + row, columns, bits, dtype)
                for block in range(blocks)
            ]
            scale = torch.ones((), dtype=wide, device=scales.device)
            if bits not in NUMBERS:
                scale = scales[place - len(NUMBERS), direction]
                scale = scale * STRETCH[bits] ** -2 if dtype == torch.bfloat16 else scale
            b.append(torch.cat(parts)[:outputs].to(wide) * scale)
    none = torch.zeros(0, device=reads.arena.device, dtype=wide)
    return (torch.stack(a), torch.stack(b)) if a else (none.view(0, inputs), none.view(0, outputs))


def _stretch(arena: Tensor, start: int, length: int) -> Tensor:
    """Bytes of the arena from a number of cache lines on."""
    return arena[ALIGNMENT * start : ALIGNMENT * start + length]


def _row(reads: Reads, start: int, row: int, width: int, bits: int, dtype: torch.dtype) -> Tensor:
    """[width]: a row at `bits` of those that begin at `start`, scales of 4 and 2 bits left out."""
    size = width * (torch.finfo(dtype).bits if bits in NUMBERS else bits) // 8
    own = _stretch(reads.arena, start, (row + 1) * size)[row * size :]
    if bits in NUMBERS:
        return own.view(dtype)
    levels = reads.levels[:16] if bits == 4 else reads.levels[16:20]
    return levels[unpack(own, bits, width).long()]


def shrink_tokens(x: Tensor, a: Tensor, counts: Tensor, weights: Tensor, tiles: Tensor, u: Tensor) -> Tensor:
    """u [T, members, R] with what the tiles' tokens have in it, in u's dtype, computed in float64 where that is it.

    x [T, D], a [S, members, R, D], counts [S, members] how many directions a set reads, weights [T], tiles [N, FIELDS].
    u[t, m, d] = weights[t] * a[set, m, d] x[t], 0 for directions that are not read; of tokens of no tile, or of one
    without factors, it is as it was.
    """
    found, wide = u.clone(), torch.promote_types(u.dtype, torch.float32)
    for tile in tiles.tolist():
        own, tokens = tile[FACTORS], slice(tile[FIRST], tile[FIRST] + tile[COUNT])
        if own < 0:
            continue
        for member, count in enumerate(counts[own].tolist()):
            sums = x[tokens].to(wide) @ a[own, member, :count].to(wide).T * weights[tokens, None].to(wide)
            found[tokens, member] = torch.nn.functional.pad(sums, (0, u.shape[2] - count)).to(u.dtype)
    return found

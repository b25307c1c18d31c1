"""How far the rows of a site are: who makes u waits for x, and who makes B'u for u.

    0, 1, 2     of every member how many programs have made their part of u
    3           whether x is there

Every site and row has these numbers on a cache line of its own, so that those who look at a row do not hold up others.
They are 0 at every site but the latest.

Shape legend: B rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LINE, X = 32, 3
"""Numbers from one row's on to the next row's, and which of them says that x is there."""
_LINE: tl.constexpr = tl.constexpr(LINE)
_X: tl.constexpr = tl.constexpr(X)


def nothing_ready(modules: int, rows: int, device: torch.device) -> Tensor:
    """[modules, B, LINE] int32; a site is the module of its first member."""
    return torch.zeros(modules, rows, LINE, dtype=torch.int32, device=device)


@triton.jit
def line_of(ready, site, row, B: tl.constexpr):
    """Pointer to the numbers of a site and row."""
    return ready + (site * B + row) * _LINE


@triton.jit
def clear(ready, site, B: tl.constexpr, ROWS: tl.constexpr):
    """Put a site back, of which nobody looks at a number any more; ROWS: a power of two from B on."""
    row = tl.arange(0, ROWS)[:, None]
    tl.store(line_of(ready, site, row, B) + tl.arange(0, _X + 1)[None, :], 0, mask=row < B)


@triton.jit
def tell_x(ready, site, B: tl.constexpr, ROWS: tl.constexpr):
    """Say of all rows that x is there, where this program has waited for it."""
    row = tl.arange(0, ROWS)
    tl.debug_barrier()
    tl.atomic_xchg(line_of(ready, site, row, B) + _X, 1, mask=row < B, sem="release")


@triton.jit
def tell_u(line, member):
    """Count a program; nobody sees it counted before what all of its threads have written."""
    tl.debug_barrier()
    tl.atomic_add(line + member, 1, sem="release")


@triton.jit
def await_x(line):
    """Until x is there."""
    await_count(line + _X, 1)


@triton.jit
def await_count(number, count):
    """Until a number in memory is so high. One thread looks for all; only its first and last look empty its cache."""
    while tl.atomic_add(number, 0, sem="acquire") < count:
        while tl.atomic_add(number, 0, sem="relaxed") < count:
            pass

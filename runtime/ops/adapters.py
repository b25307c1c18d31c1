"""What rows' own adapters add to linears: B'u, made beside the multiplication of the weights by the same x.

    u = weight * scale * A'x      some programs (`shrink`), each of which then counts in a number of the row and member
    B'u                           others (`expand`), which wait until that number says that all of u is there (`ready`)

Programs start in order, and none waits for one behind it, so whoever is waited for runs. While one waits the first
directions that it is to read are on their way. Who consumes what the linears put out adds B'u to it (`settle`).

Of one row these are programs of the linear's launch: the first make u, and those in the middle B'u, while the others
read weights, so memory is never idle. Of more rows they are a launch of their own, which does not wait for the linear
before it to end: the linear says by another number that x is there. Products of many rows hold so much shared memory
that little else fits beside programs of their shape.

Shape legend: B rows, D inputs, N_i outputs of a member, R directions at most, M modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .expand import Cut, expand_share
from .launch import dependent, release, wait
from .packed import Reads
from .shrink import Shares, shrink_share


@dataclass(frozen=True)
class Update:
    """What the rows' adapters add at one site, and where it is made."""

    u: Tensor
    """[B, members, R] float32, written"""
    added: Tensor
    """[B, sum of N_i] float32: B'u, written where a row has an adapter"""
    reads: Reads
    site: int
    """Number of the first member's module"""
    columns: int
    """Of a block of B'"""
    ready: Tensor
    """[M, B, LINE] int32: at the latest site how far its rows are, 0 at all others (`ready`)"""
    before: int
    """The site before this one, of which `ready` is put back"""

    @property
    def tensors(self) -> tuple[Any, ...]:
        """A kernel's: added, u, two, ready, before, records, arena, levels, site."""
        return self.added, self.u, 2, self.ready, self.before, *self.reads.tensors, self.site


@dataclass(frozen=True)
class Work:
    """The programs that an update takes."""

    shrinks: int
    expands: int
    constants: dict[str, int]
    """A kernel's"""

    @classmethod
    def of(cls, update: Update, inputs: int, sizes: list[int], shares: Shares | None, cut: Cut | None) -> Work:
        """For members of so many inputs and outputs."""
        batch, members, most = update.u.shape
        shares, cut = shares or Shares.of(batch, inputs, most), cut or Cut.of(batch)
        constants = {
            "Q": update.columns, "R": most, "MEMBERS": members, "M": update.reads.records.shape[1],
            **shares.constants(), **cut.constants(update.columns),
        }  # fmt: skip
        return cls(
            batch * members * shares.programs, batch * cut.programs(sizes[:members], update.columns), constants
        )  # fmt: skip


NO_WORK = Work(
    0, 0, {"Q": 4, "R": 1, "MEMBERS": 1, "M": 1, **Shares(1, 1, 4, 4).constants(), **Cut(4, 1, 1).constants(4)}
)
"""What a kernel is given where there is no update."""
_WARPS, _REGISTERS = 2, 168
"""Of a program, and of a thread at most, in a launch of their own."""


@triton.jit(do_not_specialize=["site", "before"])
def _adapters(
    x, added, u, two, ready, before, records, arena, levels, site, B: tl.constexpr, D: tl.constexpr, N0: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, SHRINKS: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, MEMBERS: tl.constexpr,
    M: tl.constexpr, SHARES: tl.constexpr, SHRINK_K: tl.constexpr, SHRINK_BLOCK: tl.constexpr,
    SHRINK_WIDE: tl.constexpr, QUARTER: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, L: tl.constexpr,
    LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    program = tl.program_id(0)
    if program < SHRINKS:
        shrink_share(
            x, u, two, ready, records, arena, levels, site, program, D, N0, N1, N2, Q, R, MEMBERS, SHARES, M, B,
            SHRINK_K, SHRINK_BLOCK, SHRINK_WIDE, False, PDL,
        )  # fmt: skip
    else:
        expand_share(
            added, u, two, ready, records, arena, levels, site, program - SHRINKS, x.dtype.element_ty, N0,
            N1, N2, R, MEMBERS, M, B, SHARES, SHRINK_K, QUARTER, K, WIDE, L, LANES,
        )  # fmt: skip
    # One is enough, and all of them would keep others from their places until the linear has ended.
    if program == 0:
        wait(PDL)


def add_beside(x: Tensor, update: Update, sizes: list[int], work: Work) -> None:
    """Launch it for x [B, D] right behind the linear that reads it, of outputs `sizes`, which counts rows ready."""
    batch, inputs = x.shape
    limit = {"maxnreg": _REGISTERS} if x.is_cuda else {}
    _adapters[(work.shrinks + work.expands,)](
        x, *update.tensors, B=batch, D=inputs, N0=sizes[0], N1=sizes[1], N2=sizes[2], SHRINKS=work.shrinks,
        **work.constants, num_warps=_WARPS, **limit, **dependent(x.device),
    )  # fmt: skip

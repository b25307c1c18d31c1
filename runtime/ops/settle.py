"""y + B'u: what a linear puts out and what a row's own adapter adds to it, as those who consume it read it.

They norm it where its input has yet to be (`norm`), and add the bias.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .adapters import Update
from .packed import ENDS, number, record_of

_ENDS: tl.constexpr = tl.constexpr(ENDS)


@triton.jit
def adds(records, row, module, M: tl.constexpr, LORA: tl.constexpr):
    """Whether the row's adapter adds anything to a module."""
    if LORA:
        return number(record_of(records, row, module, M), _ENDS + 3) > 0
    else:
        return False


@triton.jit
def settled(y, added, at, there, real, LORA: tl.constexpr):
    """y + B'u at `at`, float32."""
    value = tl.load(y + at, mask=real, other=0.0)
    if LORA:
        value += tl.load(added + at, mask=real & there, other=0.0)
    return value


def arguments(update: Update | None, like: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A kernel's arguments added, records and site, and its constants; without an update nothing is added."""
    if update is None:
        return (like, like, 0), {"M": 1, "LORA": False}
    return (update.added, update.reads.records, update.site), {"M": update.reads.records.shape[1], "LORA": True}


def columns_of(batch: int) -> int:
    """Columns of a program of one warp; measured, not derived (docs/log.md)."""
    return 128 if batch <= 4 else 256

"""What the programs of a site's adapters ask of each other, as the interpreter runs them one after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from runtime.ops import adapters, expand, packed, ready, shrink
from runtime.ops.adapters import Update
from runtime.ops.launch import INTERPRETED
from runtime.ops.packed import ENDS, Reads
from runtime.ops.shrink import Shares

BEFORE = 17
"""What `ready` says of the site before."""


def makers(reads: Reads, module: int, shares: Shares) -> Tensor:
    """[B] int32: how many programs make some of u, as far as there are units of directions of one format."""
    ends = reads.records[:, module, ENDS : ENDS + 4]
    units = (ends.diff(prepend=torch.zeros_like(ends[:, :1])) / shares.directions).ceil().sum(1)
    return units.clamp(max=shares.programs).int()


class Late:
    """What others write and a program reads: NaN from its start until it has waited."""

    def __init__(self, own: Tensor):
        self.own, self.there, self.away = own, own.clone(), False

    def leave(self) -> None:
        if not self.away:
            self.there.copy_(self.own)
            self.own.fill_(torch.nan)
        self.away = True

    def arrive(self) -> None:
        if self.away:
            self.own.copy_(self.there)
        self.away = False


@dataclass
class Seen:
    """What programs asked of each other, and had fetched, and what is late for them."""

    update: Update
    x: Late
    u: Late
    x_there: bool = False
    """Whether the kernel before has ended"""
    waits: set[tuple[int, int]] = field(default_factory=set)
    """Address of a number, and how high it was to be"""
    fetched: list[tuple[int, int]] = field(default_factory=list)
    """Address and bytes"""
    ended: int = 0
    """How often the launch beside waited for the linear"""

    def waited(self) -> None:
        """A program of the linear's launch has: none has counted before."""
        if not self.x_there:
            assert bool((self.update.ready[self.update.site] == 0).all())
            assert bool((self.update.ready[self.update.before] == BEFORE).all())
        self.x_there = True
        self.x.arrive()


@contextmanager
def watched(x: Tensor, update: Update) -> Iterator[Seen | None]:
    """Nothing is seen of compiled kernels. In the interpreter programs come one after another, so one that has to wait
    would for ever, and fails; and each is without x, or without u, until it has waited."""
    if not INTERPRETED:
        yield None
        return
    seen = Seen(update, Late(x), Late(update.u))

    def await_count(late: Late, number: Any, count: Any) -> None:
        there, wanted = tl.load(number).handle.data.item(), int(count)
        assert there >= wanted, f"a program waits for {wanted}, and {there} is all that comes before it"
        seen.waits.add((number.handle.data.item(), wanted))
        late.arrive()

    def record_of(late: Late, *arguments: Any) -> Any:
        if seen.x_there:
            late.leave()
        return packed.record_of(*arguments)

    def fetch(pointer: Any, size: Any, PDL: bool) -> None:
        seen.fetched.append((pointer.handle.data.item(), size.handle.data.item()))

    def wait(PDL: bool) -> None:
        seen.ended += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ready, "await_count", partial(await_count, seen.x))
        patch.setattr(expand, "await_count", partial(await_count, seen.u))
        for module, late in ((shrink, seen.x), (expand, seen.u)):
            patch.setattr(module, "record_of", partial(record_of, late))
        patch.setattr(packed, "fetch", fetch)
        patch.setattr(adapters, "wait", wait)
        yield seen
    seen.x.arrive()
    seen.u.arrive()

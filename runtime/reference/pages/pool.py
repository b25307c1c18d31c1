"""Where the pages of one format live, and who may use which of them.

One `PageAllocator` per format hands out page numbers for all layers at once, on the host, because the layers of a
model always hold the same tokens in the same format; each layer owns a `PagePool` per format with the tensors behind
these numbers.

Pools hold close to what is used, since saving memory is what the formats are for. Growing copies a pool, but the
reference path reads the whole pool in every pass anyway, and a row claims a page only once in 16 tokens, so near-exact
growth costs little; it is never more than the concatenation that a `DynamicCache` does for every token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...kv import formats
from ...kv.formats import Parts

GROWTH = 64
"""A pool that is too small grows to what is needed and 1/GROWTH more: none for a short row, 1.6 % for many rows."""

SHRINK = 8
"""A pool shrinks when more than 1/SHRINK of it is free: decoding with the default window never does (1 page in 10)."""


class PageAllocator:
    """Free list of the pages of one format; `capacity` is how many pages every layer's pool must hold."""

    def __init__(self, used: int = 0) -> None:
        self.capacity = used
        self.free: list[int] = []

    @property
    def used(self) -> int:
        return self.capacity - len(self.free)

    def take(self, pages: int) -> list[int]:
        """Claim `pages` page numbers, growing `capacity` where the free list is too short."""
        if pages > len(self.free):
            needed = self.used + pages
            grown = needed + needed // GROWTH
            # Popped from the end, so low numbers are handed out first and the tail is what a shrink cuts off.
            self.free = [*range(grown - 1, self.capacity - 1, -1), *self.free]
            self.capacity = grown
        return [self.free.pop() for _ in range(pages)]

    def release(self, pages: Iterable[int]) -> None:
        """Return page numbers to the free list."""
        self.free.extend(pages)

    def shrink(self) -> tuple[list[int], list[int]] | None:
        """Cut `capacity` where too much is free: (pages to move, where to) or None when it stays as it is."""
        if len(self.free) * SHRINK <= self.capacity:
            return None
        kept = self.used + self.used // GROWTH
        free = set(self.free)
        sources = [page for page in range(kept, self.capacity) if page not in free]
        holes = sorted(page for page in free if page < kept)
        self.capacity, self.free = kept, holes[len(sources) :][::-1]
        return sources, holes[: len(sources)]


class PagePool:
    """The tensors of all pages of one format of one layer, each [H, N, ...] with the page axis second."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @property
    def capacity(self) -> int:
        return next(iter(self.parts.values())).shape[1]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return sum(part[:, :1].nbytes for part in self.parts.values())

    def grow(self, pages: int) -> None:
        """Hold at least `pages` pages; those beyond the present ones are unwritten."""
        present = self.capacity
        if pages <= present:
            return
        for name, part in self.parts.items():
            larger = formats.blank((part.shape[0], pages, *part.shape[2:]), part.dtype, part.device)
            larger[:, :present] = part
            self.parts[name] = larger

    def compact(self, pages: int, sources: Tensor, targets: Tensor) -> None:
        """Move `sources` to `targets` and hold `pages` pages only; the rest of the memory is given back."""
        for name, part in self.parts.items():
            smaller = part[:, :pages].clone()
            smaller.index_copy_(1, targets, part.index_select(1, sources))
            self.parts[name] = smaller

    def read(self, ids: Tensor) -> Parts:
        """Copies of the pages `ids`, int64 [N]."""
        return {name: part.index_select(1, ids) for name, part in self.parts.items()}

    def view(self, first: int, pages: int) -> Parts:
        """The pages themselves, not copies: `pages` of them from number `first` on."""
        return {name: part[:, first : first + pages] for name, part in self.parts.items()}

    def write(self, ids: Tensor, parts: Parts) -> None:
        """Overwrite the pages `ids`, int64 [N]."""
        for name, part in self.parts.items():
            part.index_copy_(1, ids, parts[name])

    def write_tokens(self, slots: Tensor, tokens: Parts) -> None:
        """Overwrite single tokens of full pages: slots int64 [n] = 16 * page + slot, tokens [H, n, D] per part."""
        for name, part in self.parts.items():
            part.view(part.shape[0], -1, part.shape[3]).index_copy_(1, slots, tokens[name])

    def clear(self, ids: Tensor) -> None:
        """Zero the pages `ids`, int64 [N]."""
        for part in self.parts.values():
            part.index_fill_(1, ids, 0)


def device_ids(ids: Iterable[int] | Tensor, device: torch.device) -> Tensor:
    """Page numbers as int64 on `device`, copied without waiting for it."""
    host = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=torch.int64)
    return host.to(device, torch.int64, non_blocking=True)

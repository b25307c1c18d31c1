"""Which page of which row is where, in which format: one table for all layers, because decisions are per page.

Slot indices are row-relative: the token at position p of a row lives in page p // 16, slot p % 16 of that row, and left
padding has no slot. Formats and page numbers are host tensors: allocation is host work, and the index tensors that
the layers gather with are made from them once per pass (`Pass`), vectorised, and again only when some page has been
claimed or converted since. What depends on values of the model (attention received, slots kept) stays on its device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from policy.operating import KVRows
from policy.settings import PAGE_ACTIONS, PAGE_TOKENS

from ...kv import formats
from ...kv.formats import DROPPED, FORMATS, FULL, NONE, SPARSE, STORED
from ...kv.units import pages_for
from .passes import Pass, Read
from .pool import PageAllocator, PagePool, device_ids

ACTION_CODES = torch.tensor([FORMATS.index(action) for action in PAGE_ACTIONS])
"""Format code of each page action."""


class PageTable:
    """Lengths, page formats and page numbers of a batch, and the free lists behind them.

    `kv` says of every row what may become of its pages; one row stands for all of them.
    """

    def __init__(self, kv: KVRows) -> None:
        self.kv = kv
        self.lengths: list[int] = []
        self.settled: list[int] = []
        """Pages of each row whose format is final, from the first page on, sinks included."""
        self.formats = torch.zeros(0, 0, dtype=torch.int8)
        self.index = torch.zeros(0, 0, dtype=torch.int32)
        self.allocators = {code: PageAllocator() for code in STORED}
        self.device = torch.device("cpu")
        self.hidden: Tensor | None = None
        """bool [B, S], slots that were dropped or not kept; None as long as there are none."""
        self.received: Tensor | None = None
        """fp32 [B, S], attention mass per slot; None unless a page may become sparse."""
        self.complexity = torch.zeros(0, 0, dtype=torch.float64)
        """fp64 [B, P], sum over each page's tokens so far; fp64, so that the order of adding decides nothing."""
        self.kept: PagePool | None = None
        """Slots of the sparse pages, uint8 [1, N, sparse_keep]; the same for all layers."""
        self._reads: tuple[Read, ...] | None = None
        self._passes: dict[torch.device, Pass] = {}

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def pages(self) -> int:
        """Pages of the longest row."""
        return self.formats.shape[1]

    @property
    def slots(self) -> int:
        return self.pages * PAGE_TOKENS

    def settled_away(self) -> int:
        """How many pages, of all rows, are no longer in full precision."""
        return int(((self.formats != FULL) & (self.formats != NONE)).sum())

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor the table holds, index tensors of the present pass included; some may share their storage."""
        yield from (self.formats, self.index, self.complexity)
        yield from (x for x in (self.hidden, self.received) if x is not None)
        if self.kept is not None:
            yield from self.kept.parts.values()
        for read in self._reads or ():
            yield from (read.target, read.source)
        for made in self._passes.values():
            yield from made.tensors()

    def begin(self, positions: Tensor, device: torch.device) -> None:
        """Append the tokens at `positions` [B, T] (-1 = padding): claims their pages and plans the pass."""
        # The one sync of a pass when positions live on a GPU: allocation is host work. Host positions avoid it.
        host = positions.detach().to("cpu", torch.int64)
        if not self.lengths:
            self.kv = self.kv.for_rows(len(host))
            self.complexity = torch.zeros(len(host), 0, dtype=torch.float64, device=device)
            self.lengths, self.settled = [0] * len(host), [0] * len(host)
            self.formats, self.index = self.formats.new_zeros(len(host), 0), self.index.new_zeros(len(host), 0)
        live = host >= 0
        self._check(host, live)
        before, self.device = self.lengths, device
        self.lengths = [length + count for length, count in zip(before, live.sum(1).tolist(), strict=True)]
        self._widen(max(map(pages_for, self.lengths)))
        fresh = self._claim(before)
        rows, columns = live.nonzero(as_tuple=True)
        places = host[rows, columns]
        slots = self.index[rows, places // PAGE_TOKENS].long() * PAGE_TOKENS + places % PAGE_TOKENS
        reads = self._read_plan()
        made = Pass(
            batch=self.batch,
            pages=self.pages,
            query_tokens=host.shape[1],
            columns=None if live.all() else rows * host.shape[1] + columns,
            slots=slots,
            fresh=torch.tensor(fresh) if fresh else None,
            reads=reads,
            dense=len(reads) == 1 and reads[0].code == FULL and len(reads[0].source) == self.batch * self.pages,
        )
        self._passes = {torch.device("cpu"): made}
        self.passing(device)

    def passing(self, device: torch.device) -> Pass:
        """The present pass with its tensors on `device`."""
        if device not in self._passes:
            if not self._passes:
                raise ValueError("PagedCache.update: expected begin(positions) before the forward pass; call it first")
            self._passes[device] = self._passes[torch.device("cpu")].to(device)
        return self._passes[device]

    def _check(self, host: Tensor, live: Tensor) -> None:
        if host.dim() != 2 or host.shape[0] != self.batch:
            shape = list(host.shape)
            raise ValueError(f"positions: expected [{self.batch}, tokens], got {shape}; give one row per sequence")
        expected = torch.tensor(self.lengths)[:, None] + live.cumsum(1) - 1
        wrong = (live & (host != expected)).any(1).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            raise ValueError(
                f"positions: expected row {row} to go on at {self.lengths[row]} without gaps (-1 = padding), "
                f"got {host[row][live[row]].tolist()[:8]}; positions count from the row's first real token"
            )

    def _widen(self, pages: int) -> None:
        """Make room for `pages` pages a row in everything that has a page or slot axis."""
        more = pages - self.pages
        if more <= 0:
            return
        self.formats = torch.nn.functional.pad(self.formats, (0, more), value=NONE)
        self.index = torch.nn.functional.pad(self.index, (0, more))
        self.complexity = torch.nn.functional.pad(self.complexity, (0, more))
        if self.hidden is not None:
            self.hidden = torch.nn.functional.pad(self.hidden, (0, more * PAGE_TOKENS), value=False)
        if self.received is not None:
            self.received = torch.nn.functional.pad(self.received, (0, more * PAGE_TOKENS))

    def _claim(self, before: list[int]) -> list[int]:
        """Claim a full-precision page for every page that begins in this pass; returns those left partly unwritten."""
        fresh = []
        for row, (old, new) in enumerate(zip(before, self.lengths, strict=True)):
            first, end = pages_for(old), pages_for(new)
            if first == end:
                continue
            ids = self.allocators[FULL].take(end - first)
            self.formats[row, first:end] = FULL
            self.index[row, first:end] = torch.tensor(ids, dtype=torch.int32)
            self._reads = None
            if new % PAGE_TOKENS:
                fresh.append(ids[-1])
        return fresh

    def _read_plan(self) -> tuple[Read, ...]:
        if self._reads is None:
            flat, index = self.formats.flatten(), self.index.flatten().long()
            found = [(code, (flat == code).nonzero().flatten()) for code in STORED]
            self._reads = tuple(_read(code, target, index[target]) for code, target in found if len(target))
        return self._reads

    def visible(self) -> Tensor:
        """bool [B, S] on the device of the pass: the slot holds a token that attention may read."""
        lengths = device_ids(self.lengths, self.device)
        written = torch.arange(self.slots, device=self.device) < lengths[:, None]
        return written if self.hidden is None else written & ~self.hidden

    def add_mass(self, mass: Tensor) -> None:
        """Accumulate attention received per slot, [B, <= S]; kept only when a page may become sparse."""
        if not self.kv.may_be_sparse:
            return
        if self.received is None:
            self.received = torch.zeros(self.batch, self.slots, device=self.device)
        self.received[:, : mass.shape[1]] += mass.to(self.device, torch.float32)

    def add_complexity(self, complexity: Tensor, positions: Tensor) -> None:
        """Add the tokens of a pass, complexity [B, T] at positions [B, T] (-1 = padding), to their pages."""
        if complexity.shape != positions.shape or len(complexity) != self.batch:
            got = f"{list(complexity.shape)} and {list(positions.shape)}"
            raise ValueError(
                f"complexity, positions: expected [{self.batch}, tokens] each, got {got}; pass those of the pass"
            )
        real = (positions >= 0).to(self.device)
        pages = positions.clamp(min=0).to(self.device) // PAGE_TOKENS
        self.complexity.scatter_add_(1, pages, complexity.to(self.device).double() * real)

    def choose(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Final formats of the pages that have left the window: format code -> (rows [N], pages [N]), host tensors."""
        due = []
        limits = zip(self.lengths, self.kv.sink_pages.tolist(), self.kv.window_tokens.tolist(), strict=True)
        for row, (length, sinks, window) in enumerate(limits):
            end = max(0, length - window) // PAGE_TOKENS
            due += [(row, page) for page in range(max(self.settled[row], sinks), end)]
            self.settled[row] = max(self.settled[row], end)
        if not due:
            return {}
        rows, pages = torch.tensor(due).unbind(1)
        hard, easy = ACTION_CODES[self.kv.hard[rows]], ACTION_CODES[self.kv.easy[rows]]
        codes = hard
        if bool((hard != easy).any()):
            at = device_ids(rows, self.device), device_ids(pages, self.device)
            # A sync, only when a page leaves the window (once in 16 tokens of a row): its format decides allocation.
            mean = self.complexity[at].cpu() / PAGE_TOKENS
            codes = torch.where(mean >= self.kv.threshold[rows], hard, easy)
        return {code: (rows[codes == code], pages[codes == code]) for code in codes.unique().tolist()}

    def assign(self, code: int, rows: Tensor, pages: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give pages their final format: where they were (int64 [N], full) and where they go (None: nowhere)."""
        source, target = self.index[rows, pages].long(), None
        if code in STORED:
            target = torch.tensor(self.allocators[code].take(len(rows)))
            self.index[rows, pages] = target.int()
        if code in (SPARSE, DROPPED):
            self._hide(rows, pages, target)
        self.formats[rows, pages] = code
        self._reads, self._passes = None, {}
        return source, target

    def _hide(self, rows: Tensor, pages: Tensor, target: Tensor | None) -> None:
        """Make slots invisible: whole pages, or, with `target` numbers of sparse pages, all but the heavy hitters."""
        at = _slots(rows, pages, self.device)
        if self.hidden is None:
            self.hidden = torch.zeros(self.batch, self.slots, dtype=torch.bool, device=self.device)
        gone = torch.ones(at[1].shape, dtype=torch.bool, device=self.device)
        if target is not None:
            mass = torch.zeros(at[1].shape, device=self.device) if self.received is None else self.received[at]
            kept = formats.keep_heaviest(mass, self.kv.sparse_keep)
            gone.scatter_(1, kept, False)
            capacity = self.allocators[SPARSE].capacity
            if self.kept is None:
                self.kept = PagePool({"slots": formats.blank((1, capacity, kept.shape[1]), torch.uint8, self.device)})
            self.kept.grow(capacity)
            self.kept.write(device_ids(target, self.device), {"slots": kept.to(torch.uint8)[None]})
        self.hidden[at] = gone

    def kept_slots(self, ids: Tensor) -> Tensor:
        """Slots that the sparse pages `ids` keep, uint8 [N, sparse_keep], on the device of `ids`."""
        assert self.kept is not None, "there are no sparse pages"
        return self.kept.read(ids.to(self.device))["slots"][0].to(ids.device)

    def release(self, ids: Tensor) -> tuple[int, Tensor, Tensor] | None:
        """Free full pages: (new capacity, pages to move, where to) when every layer must compact its pool."""
        allocator = self.allocators[FULL]
        allocator.release(ids.tolist())
        moves = allocator.shrink()
        if moves is None:
            return None
        sources, targets = (torch.tensor(pages, dtype=torch.int64) for pages in moves)
        full = self.formats == FULL
        renamed = torch.arange(int(self.index.max()) + 1, dtype=torch.int32)
        renamed[sources] = targets.int()
        self.index[full] = renamed[self.index[full].long()]
        return allocator.capacity, sources, targets

    def select(self, rows: list[int]) -> tuple[PageTable, dict[int, Tensor]]:
        """A table of these rows (repeats allowed), without slack, and the present number of each of its pages."""
        other = PageTable(self.kv.select(rows))
        other.lengths, other.settled = [self.lengths[r] for r in rows], [self.settled[r] for r in rows]
        pages, other.device = max(map(pages_for, other.lengths), default=0), self.device
        other.formats, other.index = self.formats[rows, :pages], self.index[rows, :pages]
        other.complexity = self.complexity.index_select(0, device_ids(rows, self.device))[:, :pages].contiguous()
        sources = {}
        for code in STORED:
            mask = other.formats == code
            sources[code] = other.index[mask].long()
            other.index[mask] = torch.arange(len(sources[code]), dtype=torch.int32)
            other.allocators[code] = PageAllocator(used=len(sources[code]))
        at = device_ids(rows, self.device)
        for name in ("hidden", "received"):
            present = getattr(self, name)
            if present is not None:
                setattr(other, name, present.index_select(0, at)[:, : pages * PAGE_TOKENS].contiguous())
        if self.kept is not None:
            other.kept = PagePool(self.kept.read(device_ids(sources[SPARSE], self.device)))
        return other, sources


def _read(code: int, target: Tensor, source: Tensor) -> Read:
    first = int(source[0])
    in_order = torch.equal(source, torch.arange(first, first + len(source)))
    return Read(code, target, source, first if in_order else None)


def _slots(rows: Tensor, pages: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index pair of shapes [N, 1] and [N, 16] into anything of shape [B, S]."""
    rows, pages = device_ids(rows, device), device_ids(pages, device)
    return rows[:, None], pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=device)

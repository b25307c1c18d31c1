"""Many ladders on one device: an arena of bytes, and tables that tell kernels where each one lies.

A ladder takes one stretch of the arena, as long as what its rungs up to the resident one read, and one slot of the
tables. Rows of a batch name slots in a device tensor, so ladders come and go without a graph being captured again: a
slot that no row names may be written at any time.

Rows of B' are stored in blocks of columns, all directions of a block together: a program that adds a row's update to
one block reads one stretch, and of that the beginning. How wide a module's blocks are is the model's business
(`engine.model`); the layout of what lies inside is `ops.packed`'s.

Shape legend: J rungs, M modules of the model in its order, Q columns of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from ..ladder import Ladder
from ..ladder.formats import BITS, CODED, Rows
from ..ops.packed import ALIGNMENT, FIRSTS, NUMBERS, PARTS, ROWS, SCALES, STARTS_A, STARTS_B
from ..ops.resolve import Tables
from ..packing import pack
from .free import Free


@dataclass(frozen=True)
class Module:
    """What the store must know of a linear of the model."""

    inputs: int
    outputs: int
    columns: int
    """Q, of its blocks of outputs."""


class AdapterStore:
    """`slots` ladders of up to `rungs` rungs in `capacity_bytes` of `device`; exact factors in `dtype`.

    `modules` are the linears that may be adapted, by name, in the order in which kernels number them.
    """

    def __init__(
        self, modules: Mapping[str, Module], *, slots: int, capacity_bytes: int, rungs: int, directions: int,
        dtype: torch.dtype, device: torch.device, banks: int = 3,
    ) -> None:  # fmt: skip
        self.modules, self.dtype, self.device, self.directions = dict(modules), dtype, device, directions
        self._number = {name: number for number, name in enumerate(modules)}
        self.arena = torch.zeros(capacity_bytes, dtype=torch.uint8, device=device)
        """[bytes] where all directions lie"""
        self.tables = Tables.of(slots, rungs, banks, len(self.modules), device)
        self.ladders: list[Ladder | None] = [None] * slots
        """What lies in every slot, without its directions being read again."""
        self._stretch: list[tuple[int, int] | None] = [None] * slots
        self._free = Free(capacity_bytes, ALIGNMENT)
        self._lock = Lock()
        self._loader = ThreadPoolExecutor(1, "adapters")

    def bytes_of(self, slot: int) -> int:
        """Bytes of the arena that the ladder in `slot` takes."""
        stretch = self._stretch[slot]
        return 0 if stretch is None else stretch[1]

    def load(self, ladder: Ladder) -> int:
        """Copy what the ladder's resident rungs read to the device; returns its slot.

        Raises ValueError for an adapter of other modules than the model's, more rungs, banks or directions than there
        is room for, and MemoryError when slots or bytes are used up.
        """
        return self.put(ladder, *self.packed(ladder))

    def packed(self, ladder: Ladder) -> tuple[Table, Tensor]:
        """What `put` takes of a ladder. Raises ValueError as `load` does."""
        self._check(ladder)
        return packed_ladder(ladder, self.modules, self.directions, self.dtype, self.device)

    def put(self, ladder: Ladder, table: Table, blob: Tensor) -> int:
        """`load` of what `packed` made of the ladder already. Raises MemoryError as `load` does."""
        with self._lock:
            slot = next((i for i, own in enumerate(self.ladders) if own is None), None)
            if slot is None:
                raise MemoryError(
                    f"adapters: expected at most {len(self.ladders)} at a time, got one more; evict one, or make the "
                    "store with more slots"
                )
            start = self._free.take(len(blob))
            self.ladders[slot], self._stretch[slot] = ladder, (start, len(blob))
        self.arena[start : start + len(blob)] = blob
        parts = torch.zeros_like(self.tables.parts[slot], device="cpu")
        for (bank, name), own in table.items():
            row = torch.tensor(own)
            row[: SCALES + 1 - STARTS_A] += start // ALIGNMENT
            parts[bank, self._number[name]] = row
        self.tables.parts[slot] = parts.to(self.device)
        edges = torch.zeros_like(self.tables.edges[slot], device="cpu")
        index = [self._number[name] for name in ladder.modules]
        # Rungs above the resident one read nothing; the controller never chooses them.
        edges[: ladder.highest + 1, index] = ladder.edges[: ladder.highest + 1].int()
        self.tables.edges[slot] = edges.to(self.device)
        banks = torch.zeros_like(self.tables.bank_of[slot], device="cpu")
        banks[: len(ladder.bank_of)] = torch.tensor(ladder.bank_of, dtype=torch.int32)
        self.tables.bank_of[slot] = banks.to(self.device)
        return slot

    def load_later(self, ladder: Ladder) -> Future[int]:
        """`load` in the background; the future holds the slot."""
        return self._loader.submit(self.load, ladder)

    def evict(self, slot: int) -> None:
        """Free a slot and its bytes; no row may name it any more. Raises ValueError for one that is empty."""
        with self._lock:
            stretch = self._stretch[slot]
            if stretch is None:
                raise ValueError(f"slot: expected one that holds an adapter, got {slot}; it is empty already")
            self._free.give(*stretch)
            self.ladders[slot] = self._stretch[slot] = None

    def _check(self, ladder: Ladder) -> None:
        for name, own in ladder.modules.items():
            module = self.modules.get(name)
            if module is None:
                raise ValueError(f"adapter: expected linears of the model's layers, got {name}; use fast=False")
            if (own.a.width, own.b.width) != (module.inputs, module.outputs):
                raise ValueError(
                    f"adapter: expected {name} with (in, out) {(module.inputs, module.outputs)}, got "
                    f"{(own.a.width, own.b.width)}; it is of another model"
                )
        limits = {
            "rungs": (self.tables.edges.shape[1], len(ladder.rungs)),
            "banks": (self.tables.parts.shape[1], len(ladder.banks)),
            "directions": (self.directions, int(ladder.edges[: ladder.highest + 1].max())),
        }
        for name, (most, found) in limits.items():
            if found > most:
                raise ValueError(f"{name}: expected at most {most}, got {found}; make the store with more")


Table = dict[tuple[int, str], list[int]]
"""By bank and module its row of `Tables.parts`, counted from the ladder's first byte."""


def packed_ladder(
    ladder: Ladder, modules: Mapping[str, Module], directions: int, dtype: torch.dtype, device: torch.device
) -> tuple[Table, Tensor]:
    """Where everything that the resident rungs read lies, and the bytes themselves, uint8 on `device`."""
    table: Table = {}
    pieces: list[Tensor] = []
    length = 0
    for number in _banks(ladder):
        for name, ranges in _formats(ladder, number).items():
            row, own = [0] * PARTS, ladder.banks[number][name].to(device)

            def put(field: int, tensor: Tensor, row: list[int] = row) -> None:
                nonlocal length
                row[field - STARTS_A] = length // ALIGNMENT
                pieces.append(_bytes(tensor))
                length += len(pieces[-1])

            scales = torch.zeros(len(BITS) - len(NUMBERS), directions, device=device)
            for f, (bits, (first, stop)) in enumerate(zip(BITS, ranges, strict=True)):
                row[ROWS - STARTS_A + f] = stop - first
                if stop == first:
                    continue
                if f > 0:
                    row[FIRSTS - STARTS_A + f - 1] = first
                if bits in NUMBERS:
                    a, b = (half.read(first, stop, bits, dtype) for half in (own.a, own.b))
                    put(STARTS_A + f, a)
                    put(STARTS_B + f, _blocks(b, modules[name].columns))
                    continue
                put(STARTS_A + f, pack(own.a.codes(first, stop, bits), bits))
                put(STARTS_B + f, pack(_blocks(own.b.codes(first, stop, bits), modules[name].columns), bits))
                both = _scales(own.a, bits)[first:stop] * _scales(own.b, bits)[first:stop]
                scales[f - len(NUMBERS), first:stop] = both
            put(SCALES, scales)
            table[number, name] = row
    return table, torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=device)


def _banks(ladder: Ladder) -> list[int]:
    """Those that the resident rungs read."""
    return sorted(set(ladder.bank_of[: ladder.highest + 1]))


def _formats(ladder: Ladder, bank: int) -> dict[str, list[tuple[int, int]]]:
    """By module and format the directions, first and stop, that any resident rung of the bank reads at that format.

    A direction that rungs read at different bits is there in each of them: the nested planes of a saved ladder are
    smaller, and cost a kernel more instructions (docs/log.md).
    """
    rungs = [j for j in range(ladder.highest + 1) if ladder.bank_of[j] == bank]
    stops = ladder.edges[rungs].cpu()
    starts = torch.cat([torch.zeros_like(stops[..., :1]), stops[..., :-1]], -1)
    there = stops > starts
    first = starts.masked_fill(~there, torch.iinfo(torch.long).max).amin(0)
    stop = stops.masked_fill(~there, 0).amax(0)
    first = torch.minimum(first, stop)
    # Exact rows are read from the first on.
    first[:, 0] = 0
    found = torch.stack([first, stop], -1).tolist()
    return {name: [tuple(own) for own in ranges] for name, ranges in zip(ladder.modules, found, strict=True)}


def _scales(rows: Rows, bits: int) -> Tensor:
    """[R] float32 of rows that may be read at `bits`."""
    return rows.scales[CODED.index(bits)].float()


def _blocks(rows: Tensor, columns: int) -> Tensor:
    """rows [R, D] -> [ceil(D / Q), R, Q], the last block filled up with zeros."""
    short = -rows.shape[1] % columns
    padded = torch.nn.functional.pad(rows, (0, short))
    return padded.unflatten(1, (padded.shape[1] // columns, columns)).transpose(0, 1).contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, filled up to the alignment."""
    flat = tensor.contiguous().view(torch.uint8).flatten() if tensor.dtype != torch.uint8 else tensor.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % ALIGNMENT))


def needed_bytes(
    ladders: Sequence[Ladder], modules: Mapping[str, Module], directions: int, dtype: torch.dtype
) -> int:  # fmt: skip
    """Bytes that these ladders take in a store of `directions`, alignment included."""
    total = 0
    for ladder in ladders:
        for number in _banks(ladder):
            for name, ranges in _formats(ladder, number).items():
                own = modules[name]
                outputs = -(-own.outputs // own.columns) * own.columns
                sizes = [4 * (len(BITS) - len(NUMBERS)) * directions]
                for bits, (first, stop) in zip(BITS, ranges, strict=True):
                    value_bits = torch.finfo(dtype).bits if bits in NUMBERS else bits
                    sizes += [(stop - first) * width * value_bits // 8 for width in (own.inputs, outputs)]
                total += sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    return total

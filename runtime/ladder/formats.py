"""How a row of a factor is written in few bits, and read back at 2, 4 or 8 of them: the specification.

One code, in three planes. A value over its row's unit falls into a cell of a fixed partition of the line; the first 2
bits of the cell's number are its sign and whether it lies beyond 1, the next 2 bits divide that range in four, the last
4 bits divide that in sixteen. So a row read at 4 bits is the first two planes, at 8 bits all three, and rungs that read
the same row at different precision share what they read:

    plane         2 bits             2 more                 4 more
    |x| / unit    < 1, >= 1          8 cells                128 cells
    error         0.118              0.0097                 5e-5        of a normal row's energy, one factor

The 8 cells are those of the best nested 4-bit quantiser of a normal distribution, which the rows of a singular factor
nearly have (kurtosis 3.0 to 4.1 on real adapters): a uniform 4-bit grid with the best clip has an error of 0.0115, so
nesting costs nothing here, it gains a sixth. Within a cell the 16 are equal; in the last one, which has no end, they
widen geometrically. What a cell is read as is its mean under the normal distribution, times one bf16 scale per row and
format, by least squares. A row's unit is its root mean square, stretched where its tails are heavy, by the least error
over all formats; it is not stored.

16 bits are a row as given. Pure functions without state. Shapes: R rows, D values of a row.
Source: DESIGN section 3; Lloyd 1982 and Max 1960 for the levels; Equitz and Cover 1991 for nesting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from policy.limits import refused

from ..packing import pack, packed_length, unpack

BITS = (16, 8, 4, 2)
"""Bits a value, finest first: the order of every tensor that has a format axis."""
CODED = (2, 4, 8)
"""The formats that are read from planes, in the order of the planes."""
PLANES = (2, 2, 4)
"""Bits a value of every plane; a format of CODED reads the planes up to its own."""
SCALE_BYTES = 2
WIDE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What rows as given may be; the first where there are none. All are counted at 16 bits a value."""
PARTS = ("wide", *(f"plane{bits}" for bits in CODED), *(f"scale{bits}" for bits in CODED))
"""The tensors that rows are made of, by name."""
LARGEST = 1e37
"""Beyond it a row's scale might not be a bf16 number any more."""

_CELLS = (0.0, 0.237, 0.479, 0.731, 1.0, 1.350, 1.767, 2.336)
"""Where the eight 4-bit cells of a magnitude begin, in root mean squares."""
_FINE = 16
_GRID = 1024
"""Cells begin at whole numbers of 1 / 1024 units: into which one a value falls is looked up, exactly, not searched."""
_FIRST_STEP, _GROWTH = 0.06, 1.1
"""Width of the first of the last cell's sixteen, and of each over the one before: the last begins at 4.2."""
STRETCHES = (0.9, 1.0, 1.1, 1.25, 1.5, 1.8, 2.2, 3.0, 5.0, 12.0)
"""Units of a row to choose from, in its root mean squares: 8 bits reach to 4.4 of them, and the longest rows that there
are may have one value at a hundred root mean squares."""
ERRORS = {2: 0.1177, 4: 0.0097, 8: 5e-5}
"""Squared error of a normal row over its energy; what an error of a format is measured against."""


def _fine_cells() -> list[int]:
    """Where the 128 8-bit cells of a magnitude begin, on the grid."""
    starts = []
    for start, end in pairwise(_CELLS):
        starts += [start + (end - start) * i / _FINE for i in range(_FINE)]
    widths = [_FIRST_STEP * _GROWTH**i for i in range(_FINE)]
    starts += [_CELLS[-1] + sum(widths[:i]) for i in range(_FINE)]
    return [round(_GRID * start) for start in starts]


def _normal_mean(start: float, end: float) -> float:
    """Mean of a standard normal variable between two positive limits, from density over tail mass."""
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (start, end)]
    mass = [math.erfc(x / math.sqrt(2)) / 2 for x in (start, end)]
    return (density[0] - density[1]) / (mass[0] - mass[1])


def _levels(starts: list[int]) -> Tensor:
    """[2 * cells] float32: what every signed code is read as, negative ones in the second half."""
    edges = [*(start / _GRID for start in starts), math.inf]
    means = [_normal_mean(*limits) for limits in pairwise(edges)]
    return torch.tensor([*means, *(-mean for mean in means)])


_STARTS = _fine_cells()
_CELL_AT = torch.repeat_interleave(
    torch.arange(len(_STARTS)), torch.tensor([end - start for start, end in pairwise([*_STARTS, _STARTS[-1] + 1])])
)
"""[grid] long: the 8-bit cell of every point of the grid; the last point stands for all beyond."""
LEVELS = {bits: _levels(_STARTS[:: 2 ** (8 - bits)]) for bits in CODED}
"""What a code of 2, 4 or 8 bits is read as, before its row's scale; the highest bit is the sign."""


@lru_cache(maxsize=64)
def _levels_on(bits: int, device: torch.device) -> Tensor:
    """Brought there once: a copy from the host waits for the device."""
    return LEVELS[bits].to(device)


@lru_cache(maxsize=16)
def _cells_on(device: torch.device) -> Tensor:
    """The same of the cells."""
    return _CELL_AT.to(device)


def row_bytes(width: int, bits: int) -> int:
    """Bytes that a row of `width` values takes at `bits`, its scale included."""
    if bits == 16:
        return 2 * width
    return sum(packed_length(width, plane) for plane in PLANES[: CODED.index(bits) + 1]) + SCALE_BYTES


@dataclass(frozen=True)
class Rows:
    """The rows of one factor: a prefix of them as given, or a prefix in each plane; later planes have fewer rows."""

    width: int
    """D, values of a row"""
    wide: Tensor
    """[R16, D] float: the rows that may be read at 16 bits"""
    planes: tuple[Tensor, ...]
    """[P2, .], [P4, .], [P8, .] uint8, packed along the row; a plane serves its own format and the finer ones"""
    scales: tuple[Tensor, ...]
    """[R2], [R4], [R8] bf16: of every row that may be read at 2, 4 and 8 bits"""

    def __post_init__(self) -> None:
        bytes_of = {f"plane{bits}": packed_length(self.width, plane) for bits, plane in zip(CODED, PLANES, strict=True)}
        for name, part in self.parts().items():
            inner = () if name.startswith("scale") else (bytes_of.get(name, self.width),)
            dtypes = WIDE_DTYPES if name == "wide" else (torch.uint8 if name in bytes_of else torch.bfloat16,)
            if part.dim() != 1 + len(inner) or part.shape[1:] != inner or part.dtype not in dtypes:
                expected = f"[{', '.join(['rows', *map(str, inner)])}] of {' or '.join(map(str, dtypes))}"
                got = f"{list(part.shape)} of {part.dtype}"
                raise ValueError(f"{name}: expected {expected}, got {got}; save the ladder again")
        for plane, (bits, needed) in zip(self.planes, self._plane_rows(), strict=True):
            if len(plane) < needed:
                raise ValueError(
                    f"plane{bits}: expected the {needed} rows that have a scale at {bits} bits or more, got "
                    f"{len(plane)}; save the ladder again"
                )

    @classmethod
    def of(cls, width: int, parts: Mapping[str, Tensor], device: torch.device | None = None) -> Rows:
        """Rows of D = `width` values from their `parts`, of which those of no rows may be left out.

        Raises ValueError, naming the part, for one of another shape or dtype and for scales without codes.
        """
        none = {"wide": torch.empty(0, width, dtype=WIDE_DTYPES[0], device=device)}
        for bits, plane in zip(CODED, PLANES, strict=True):
            none[f"plane{bits}"] = torch.empty(0, packed_length(width, plane), dtype=torch.uint8, device=device)
            none[f"scale{bits}"] = torch.empty(0, dtype=torch.bfloat16, device=device)
        found = [parts.get(name, none[name]) for name in PARTS]
        return cls(width, found[0], tuple(found[1:4]), tuple(found[4:]))

    def parts(self) -> dict[str, Tensor]:
        """All tensors, by the names of PARTS."""
        return dict(zip(PARTS, (self.wide, *self.planes, *self.scales), strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes held, 16-bit rows counted at two bytes a value whatever their dtype."""
        return 2 * self.wide.numel() + sum(x.nbytes for x in (*self.planes, *self.scales))

    def counts(self) -> dict[int, int]:
        """How many rows may be read at each of BITS."""
        coded = {bits: len(scale) for bits, scale in zip(CODED, self.scales, strict=True)}
        return {16: len(self.wide), **{bits: coded[bits] for bits in reversed(CODED)}}

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device; nothing is copied that is there already."""
        if all(part.device == device for part in self.parts().values()):
            return self
        return Rows.of(self.width, {name: part.to(device) for name, part in self.parts().items()})

    def read(self, start: int, stop: int, bits: int, dtype: torch.dtype) -> Tensor:
        """Rows start to stop at `bits`, [stop - start, D] in `dtype`, rounded to it from float32.

        Raises ValueError for a format that there is not, and for rows that may not be read at it.
        """
        held = self.counts()
        if bits not in held:
            raise refused("bits", f"one of {BITS}", bits)
        if not 0 <= start <= stop <= held[bits]:
            raise ValueError(
                f"rows: expected some of the {held[bits]} in memory at {bits} bits, got {start} to {stop}; load the "
                "ladder with a higher resident_rung"
            )
        if bits == 16:
            return self.wide[start:stop].to(dtype)
        last = CODED.index(bits)
        codes = self.codes(start, stop, bits)
        # Signs lead: the codes of a format are all numbers of its bits.
        values = _levels_on(bits, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
        return values.mul_(self.scales[last][start:stop, None]).to(dtype)

    def codes(self, start: int, stop: int, bits: int) -> Tensor:
        """uint8 [stop - start, D]: codes of rows start to stop at 8, 4 or 2 bits, the first plane's bits leading."""
        last = CODED.index(bits)
        codes, *finer = (
            unpack(plane[start:stop], width, self.width)
            for plane, width in zip(self.planes[: last + 1], PLANES, strict=False)
        )
        for part, width in zip(finer, PLANES[1:], strict=False):
            codes = codes << width | part
        return codes

    def keep(self, counts: Mapping[int, int]) -> Rows:
        """These rows, of which no more than counts[bits] can be read at `bits`; copies, so that the rest is freed."""
        held = {bits: min(count, counts[bits]) for bits, count in self.counts().items()}
        kept = {"wide": self.wide[: held[16]].clone()}
        for i, (bits, plane, scale) in enumerate(zip(CODED, self.planes, self.scales, strict=True)):
            kept[f"plane{bits}"] = plane[: max(held[finer] for finer in CODED[i:])].clone()
            kept[f"scale{bits}"] = scale[: held[bits]].clone()
        return Rows.of(self.width, kept)

    def _plane_rows(self) -> list[tuple[int, int]]:
        """Every format of CODED with the rows that its plane must have."""
        return [(bits, max(map(len, self.scales[i:]))) for i, bits in enumerate(CODED)]


def wide_rows(rows: Tensor) -> Rows:
    """Rows [R, D] as given, for 16 bits alone; the tensor is not copied."""
    return Rows.of(rows.shape[-1], {"wide": rows}, rows.device)


def encode(rows: Tensor) -> Rows:
    """Rows [R, D] of any float dtype in all three planes. Raises ValueError, naming the row, for one that is not finite
    or beyond LARGEST."""
    if rows.dim() != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
        raise refused("rows", "floats [R, D], D at least 1", f"{list(rows.shape)} of {rows.dtype}", "give one factor")
    return packed(*quantise(rows, best_stretch(rows)))


def packed(codes: Tensor, scales: tuple[Tensor, ...]) -> Rows:
    """What `quantise` gave of one factor, codes [R, D] and scales [R], as it is stored."""
    planes = (codes >> 6, codes >> 4 & 3, codes & 15)
    parts = {f"plane{b}": pack(part, bits) for b, bits, part in zip(CODED, PLANES, planes, strict=True)}
    parts |= {f"scale{bits}": scale for bits, scale in zip(CODED, scales, strict=True)}
    return Rows.of(codes.shape[1], parts, codes.device)


def best_stretch(rows: Tensor) -> Tensor:
    """[..., R] float32: of STRETCHES the one with the least error of rows [..., R, D], over all formats.

    Raises ValueError, naming the row (counted through all axes), for one that is not finite or beyond LARGEST.
    """
    within = (rows.float().abs() <= LARGEST).all(-1)  # nor is NaN
    if not bool(within.all()):
        bad = int((~within.flatten()).nonzero()[0, 0])
        raise ValueError(
            f"rows: expected finite numbers up to {LARGEST:g}, got others in row {bad}; train the adapter again"
        )
    unit = _unit(rows)[0]
    energy = unit.square().sum(-1)
    found = []
    for stretch in STRETCHES:
        codes, scales = quantise(unit, torch.full_like(energy, stretch))
        errors = ((dequantise(codes, scales, bits) - unit).square().sum(-1) / ERRORS[bits] for bits in CODED)
        found.append(torch.stack(list(errors)).sum(0))
    return torch.tensor(STRETCHES, device=rows.device)[torch.stack(found).argmin(0)]


def quantise(rows: Tensor, stretch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """uint8 codes of 8 bits of rows [..., R, D] up to LARGEST, whose units are stretch [..., R] times their root mean
    squares, and the bf16 scales [..., R] at 2, 4 and 8 bits: the best in the least-squares sense for these codes. Codes
    of fewer bits are the first of these; a row of zeros has scales of 0."""
    unit, largest = _unit(rows)
    rms = unit.square().mean(-1, keepdim=True).sqrt() * stretch[..., None]
    at = unit.abs().div_(torch.where(rms > 0, rms, 1)).mul_(_GRID).clamp_(max=len(_CELL_AT) - 1).long()
    codes = _cells_on(rows.device)[at].add_((unit < 0).long() << 7)
    scales = []
    for bits in CODED:
        level = _levels_on(bits, rows.device)[codes >> (8 - bits)]
        best = (level * unit).sum(-1) / level.square().sum(-1)
        scales.append((best * largest[..., 0]).to(torch.bfloat16))
    return codes.to(torch.uint8), tuple(scales)


def dequantise(codes: Tensor, scales: tuple[Tensor, ...], bits: int) -> Tensor:
    """What rows with these codes [..., R, D] and scales are read as at `bits`, float32."""
    return _levels_on(bits, codes.device)[codes.long() >> (8 - bits)] * scales[CODED.index(bits)][..., None]


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over their largest magnitude, and that, [..., 1]: the squares of tiny values would vanish."""
    rows = rows.float()
    largest = rows.abs().amax(-1, keepdim=True)
    return rows / torch.where(largest > 0, largest, 1), largest

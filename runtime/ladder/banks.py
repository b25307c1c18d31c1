"""The ladder as its readers see it: an adapter in a few ordered lists of directions, and what every rung reads of them.

A rung is a table, not a rank: directions are ordered so that their bits fall, so a rung reads one contiguous range of
directions per format, and `edges` says where each range ends. Rungs whose directions are the same share a *bank*: of a
row that two of them read, the coarser reading is the beginning of the finer one. The last bank is the adapter itself,
as given, and the top rung alone reads it. A ladder need not be in memory whole: `resident` says how far up it is.

Shape legend: M modules, J rungs, F formats (in the order of `BITS`), R a module's directions in a bank.
Source: DESIGN section 3.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy.difficulty import Difficulty
from policy.limits import Choice
from policy.rungs import Rung, checked_rungs

from ..fingerprint import sampled
from .formats import BITS, Rows, row_bytes

SVD, RANKED, MIXED, DISTILLED = KINDS = ("svd", "ranked", "mixed", "distilled")


@dataclass(frozen=True)
class Directions:
    """One module's directions in one bank: what a range of them adds to the weights is `b.T @ a`."""

    a: Rows
    """R rows of d_in values"""
    b: Rows
    """R rows of d_out values"""

    @property
    def nbytes(self) -> int:
        """Bytes of both halves, 16-bit values counted at two bytes whatever their dtype."""
        return self.a.nbytes + self.b.nbytes

    def counts(self) -> list[int]:
        """How many directions may be read at each of BITS."""
        return [min(own) for own in zip(self.a.counts().values(), self.b.counts().values(), strict=True)]

    def keep(self, counts: Sequence[int]) -> Directions:
        """These directions, of which no more than `counts` can be read at each of BITS; copies."""
        held = dict(zip(BITS, counts, strict=True))
        return Directions(self.a.keep(held), self.b.keep(held))

    def read(self, start: int, stop: int, bits: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Directions start to stop at `bits`: [n, d_in] and [n, d_out] in `dtype`."""
        return self.a.read(start, stop, bits, dtype), self.b.read(start, stop, bits, dtype)

    def to(self, device: torch.device) -> Directions:
        """The same directions on another device."""
        return Directions(self.a.to(device), self.b.to(device))


Bank = Mapping[str, Directions]
"""The directions of every module, by its path."""


@dataclass(frozen=True)
class Range:
    """Directions start to stop of a bank, at a format."""

    bank: int
    bits: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Ladder:
    """The whole adapter's ladder; the top rung is the adapter itself."""

    kind: str
    """How its directions were chosen and written: one of `KINDS`."""
    rungs: tuple[Rung, ...]
    """Equivalent ranks, ascending; 0 is the base model alone."""
    banks: tuple[Bank, ...]
    """Lists of directions, each of all modules in one order; the last is the exact adapter's."""
    bank_of: tuple[int, ...]
    """[J] the bank that every rung reads."""
    edges: Tensor
    """[J, M, F] long: of its bank, rung j reads module m's directions edges[j, m, f - 1] to edges[j, m, f] at format f.

    Never falls along f, nor along j within a bank; modules in the order of `modules`.
    """
    scales: tuple[float, ...]
    """[J] what multiplies every rung's update; 1 at the top."""
    adapter: str
    """Fingerprint of the adapter it was made of."""
    base_model: str | None = None
    """Name of the base model, where the adapter told."""
    resident: int | None = None
    """Index of the highest rung whose directions are in memory; None: all are."""
    whole: str | None = None
    """The `sample` of the whole ladder's directions, where not all are in memory to take it from."""
    quality: tuple[Mapping[str, float | None], ...] = ()
    """What every rung was measured to lose on held-out documents, where it was."""
    difficulty: Difficulty | None = None
    """How much of the adapter every token needs, where that was learned; no part of the fingerprint."""

    def __post_init__(self) -> None:
        Choice(KINDS).take("kind", self.kind)
        # A whole rank is an int everywhere, or one ladder would have two fingerprints.
        object.__setattr__(self, "rungs", checked_rungs(self.rungs))
        count, last = len(self.rungs), len(self.banks) - 1
        banks_fit = len(self.bank_of) == count and set(self.bank_of) <= set(range(last + 1))
        if not banks_fit or self.bank_of.count(last) != 1 or self.bank_of[-1] != last:
            raise ValueError(
                f"bank_of: expected a bank for each of {count} rungs, the last for the top alone, got "
                f"{list(self.bank_of)} of {last + 1}; save the ladder again"
            )
        if len(self.scales) != count or self.scales[-1] != 1 or not all(0 < s < float("inf") for s in self.scales):
            raise ValueError(
                f"scales: expected a positive one for each of {count} rungs, 1 at the top, got {list(self.scales)}; "
                "save the ladder again"
            )
        if len(self.quality) not in (0, count):
            raise ValueError(
                f"quality: expected that of all {count} rungs or of none, got {len(self.quality)}; measure it again"
            )
        if self.resident is not None and not 0 <= self.resident < count - 1:
            raise ValueError(
                f"resident: expected the index of one of {count} rungs, not the top's, got {self.resident}; save the "
                "ladder again"
            )
        if self.resident is not None and self.kind != SVD and not self.whole:
            raise ValueError("whole: expected a sample of the directions of all rungs, got none; save the ladder again")
        self._check_edges()
        self._check_banks()

    def _check_edges(self) -> None:
        expected, found = (len(self.rungs), len(self.modules), len(BITS)), tuple(self.edges.shape)
        if found != expected or self.edges.dtype != torch.long:
            got = f"{found} {self.edges.dtype}"
            raise ValueError(f"edges: expected {expected} torch.int64, [J, M, F], got {got}; save the ladder again")
        if bool((self.edges < 0).any()) or bool((self.edges.diff(dim=2) < 0).any()):
            raise ValueError("edges: expected counts that do not fall over formats, got some; save the ladder again")
        for bank in set(self.bank_of):
            if bool((self.edges[[j for j, own in enumerate(self.bank_of) if own == bank]].diff(dim=0) < 0).any()):
                raise ValueError("edges: expected none to fall from rung to rung, got some; save the ladder again")

    def _check_banks(self) -> None:
        widths = {name: (own.a.width, own.b.width) for name, own in self.modules.items()}
        for number, bank in enumerate(self.banks):
            if list(bank) != list(widths) or any((own.a.width, own.b.width) != widths[n] for n, own in bank.items()):
                raise ValueError(
                    f"banks: expected the {len(widths)} modules of the adapter in its order and widths, got others in "
                    f"bank {number}; save the ladder again"
                )
            held, needed = [own.counts() for own in bank.values()], self._needed(number)
            short = (needed.cpu() > torch.tensor(held)).any(1).nonzero()
            if len(short):
                m = int(short[0, 0])
                raise ValueError(
                    f"edges: expected at most the directions that module {list(bank)[m]} has in bank {number}, "
                    f"{held[m]} at {BITS} bits, got {needed[m].tolist()}; save the ladder again"
                )

    def _needed(self, bank: int) -> Tensor:
        """[M, F] how many of a bank's directions the rungs in memory read at each format."""
        rungs = [j for j in range(self.highest + 1) if self.bank_of[j] == bank]
        if not rungs:
            return torch.zeros_like(self.edges[0])
        edges = self.edges[rungs]
        return edges.masked_fill(edges == _starts(edges), 0).amax(0)

    @property
    def highest(self) -> int:
        """Index of the highest rung whose directions are in memory."""
        return len(self.rungs) - 1 if self.resident is None else self.resident

    @property
    def modules(self) -> Bank:
        """The exact adapter's factors by module path; in memory only where the top rung is."""
        return self.banks[-1]

    @property
    def rank_table(self) -> Tensor:
        """[J, M] long: how many directions of module m rung j reads, whatever their bits."""
        return self.edges[..., -1]

    def bits(self) -> Tensor:
        """[J, M, R] long: how precisely rung j reads direction k of module m; 0 where it does not."""
        k = torch.arange(int(self.edges.max()))
        beyond = (k >= self.edges[..., None]).sum(2)  # of how many formats the range ends before k
        return torch.tensor([*BITS, 0])[beyond]

    @property
    def row_elements(self) -> Tensor:
        """[M] float32: d_in + d_out of every module, the weight of one of its directions in bytes and mean rank."""
        return torch.tensor([float(own.a.width + own.b.width) for own in self.modules.values()])

    def rung_bytes(self) -> Tensor:
        """[J] float64 bytes that every rung reads, scales included."""
        directions = self.edges.diff(dim=2, prepend=torch.zeros_like(self.edges[..., :1])).double()
        widths = [(own.a.width, own.b.width) for own in self.modules.values()]
        price = [[float(row_bytes(i, bits) + row_bytes(o, bits)) for bits in BITS] for i, o in widths]
        return torch.einsum("jmf,mf->j", directions, torch.tensor(price, dtype=torch.float64))

    def mean_rank(self) -> Tensor:
        """[J] float32 equivalent rank of every rung: its bytes in 16-bit directions of all modules."""
        return (self.rung_bytes() / (2 * self.row_elements.double().sum())).float()

    def resident_bytes(self) -> int:
        """Bytes of all directions in memory, 16-bit values counted at two bytes whatever their dtype."""
        return sum(own.nbytes for bank in self.banks for own in bank.values())

    def ranges(self, active: Sequence[int]) -> list[list[Range]]:
        """[M] what a pass reads of every module in which the rungs of these indices are active: of each bank and format
        the directions of all of them."""
        found: list[list[Range]] = [[] for _ in self.modules]
        for bank in sorted({self.bank_of[j] for j in active}):
            rungs = [j for j in active if self.bank_of[j] == bank]
            stop = self.edges[rungs]
            start = _starts(stop)
            there = stop > start
            low = start.masked_fill(~there, torch.iinfo(torch.long).max).amin(0).tolist()
            high = stop.masked_fill(~there, 0).amax(0).tolist()
            for own, lows, highs in zip(found, low, high, strict=True):
                ends = zip(BITS, lows, highs, strict=True)
                own += [Range(bank, bits, first, last) for bits, first, last in ends if last > first]
        return found

    def update(self, name: str, rung: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """What the rung of this index adds to a module's weight, scale included: b.T @ a of the a [n, d_in] and
        b [n, d_out] returned. Raises ValueError for a rung above the resident one."""
        self.require_resident(rung)
        bank, ends = self.banks[self.bank_of[rung]], self.edges[rung, list(self.modules).index(name)].tolist()
        # Of no directions too there is one range, so that something is read that has the widths and the device.
        found = [own for own in zip(BITS, [0, *ends], ends, strict=False) if own[2] > own[1]] or [(BITS[0], 0, 0)]
        parts = [bank[name].read(start, stop, bits, dtype) for bits, start, stop in found]
        a, b = (torch.cat(halves) for halves in zip(*parts, strict=True))
        return a, self.scales[rung] * b

    def lost_energy(self) -> Tensor:
        """[J] float64: squared Frobenius norm of what every rung's update lacks of the adapter's, over the adapter's;
        an adapter of zeros loses nothing. Raises ValueError unless all rungs are in memory."""
        top = len(self.rungs) - 1
        lost, whole = torch.zeros(top + 1, dtype=torch.float64), 0.0
        for name in self.modules:
            a, b = self.update(name, top, torch.float64)
            whole += _energy(a, b)
            for j in range(top):
                own = self.update(name, j, torch.float64)
                lost[j] += _energy(torch.cat((a, own[0])), torch.cat((b, -own[1])))
        return lost.clamp_min(0) / (whole or 1.0)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over kind, rungs, table and the adapter it was made of, and over what is written in fewer bits.

        The factors of `svd` follow from these, and are left out: an SVD differs in its last bits, and in signs, from
        machine to machine. Less in memory does not change it.
        """
        identity: dict[str, object] = {
            "kind": self.kind, "rungs": self.rungs, "edges": self.edges.tolist(), "adapter": self.adapter,
        }  # fmt: skip
        if self.kind != SVD:
            identity |= {"bank_of": self.bank_of, "rows": self.sample()}
        if self.kind != SVD or any(scale != 1 for scale in self.scales):
            identity["scales"] = self.scales
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def sample(self) -> str | None:
        """16 hex digits over scales and 16-bit values of all directions but the exact ones, in memory or not; none of
        `svd`, whose directions follow from the adapter."""
        if self.kind == SVD or self.whole is not None:
            return self.whole
        return sampled(
            (f"{number}.{name}.{half}.{part}", tensor)
            for number, bank in enumerate(self.banks[:-1])
            for name, own in bank.items()
            for half, rows in (("a", own.a), ("b", own.b))
            for part, tensor in rows.parts().items()
            if not part.startswith("plane")
        )

    def rung_index(self, rung: Rung) -> int:
        """Index of rung `rung`. Raises ValueError naming the rungs there are."""
        if rung not in self.rungs:
            top = self.rungs[-1]
            hint = f"the adapter's rank is {top}" if rung > top else "build the ladder with that rung"
            raise ValueError(f"rung: expected one of {self.rungs}, got {rung}; {hint}")
        return self.rungs.index(rung)

    def with_rungs(self, rungs: Sequence[Rung]) -> Ladder:
        """The same directions with these rungs and the top one, which is always there; nothing is factored again.

        An `svd` ladder has every whole rank; any other has the rungs that it was built with; one of which not all is in
        memory has its own alone. Raises ValueError for a rung that there is not, above the adapter's rank, below 0, or
        named twice.
        """
        top = self.rungs[-1]
        if any(rung > top for rung in rungs):
            raise ValueError(f"rungs: expected ranks up to the adapter's {top}, got {max(rungs)}; leave it out")
        if any(rung < 0 for rung in rungs) or len(set(rungs)) != len(rungs):
            raise ValueError(f"rungs: expected ranks of at least 0, each once, got {tuple(rungs)}; correct the list")
        chosen = checked_rungs(sorted({*rungs, top}))
        if chosen == self.rungs:
            return self
        if self.resident is not None:
            raise ValueError(
                f"rungs: expected {self.rungs}, those of a ladder of which not all is in memory, got {chosen}; load it "
                "whole, or with these rungs"
            )
        if self.kind == SVD:
            fractional = [rung for rung in chosen if rung != int(rung)]
            if fractional:
                raise ValueError(
                    f"rungs: expected whole ranks of an svd ladder, got {fractional}; leave them out, or build a "
                    "ladder in fewer bits with python -m training.ladder"
                )
            bank_of = (*(0 for _ in chosen[:-1]), 1)
            # Modules of an svd ladder have as many directions as the adapter's own factors.
            edges = prefix_edges(chosen, self.rank_table[-1].tolist())
            known = dict(zip(self.rungs, self.scales, strict=True))
            scales = tuple(known.get(rung, 1.0) for rung in chosen)
            return replace(self, rungs=chosen, bank_of=bank_of, edges=edges, scales=scales, quality=())
        if 0 in chosen and 0 not in self.rungs:  # the base model alone needs no directions
            return self._with_none().with_rungs(rungs)
        index = [self.rung_index(rung) for rung in chosen]
        return replace(
            self, rungs=chosen, bank_of=tuple(self.bank_of[j] for j in index), edges=self.edges[index],
            scales=tuple(self.scales[j] for j in index),
            quality=tuple(self.quality[j] for j in index) if self.quality else (),
        )  # fmt: skip

    def _with_none(self) -> Ladder:
        return replace(
            self, rungs=(0, *self.rungs), bank_of=(0, *self.bank_of), scales=(1.0, *self.scales),
            edges=torch.cat([torch.zeros_like(self.edges[:1]), self.edges]), quality=(),
        )  # fmt: skip

    def up_to(self, rung: Rung) -> Ladder:
        """The same ladder with no more in memory than its rungs up to `rung` read; those above are there by name. Up to
        the top it stays as it is.

        Raises ValueError naming the rungs there are, or those in memory.
        """
        index = self.rung_index(rung)
        self.require_resident(index)
        if index == self.highest:
            return self
        held = replace(self, resident=index, whole=self.sample())
        banks = tuple(
            {name: own.keep(n) for (name, own), n in zip(bank.items(), held._needed(number).tolist(), strict=True)}
            for number, bank in enumerate(self.banks)
        )
        return replace(held, banks=banks)

    def require_resident(self, rung: int) -> None:
        """Raise ValueError unless the directions of the rung of this index are in memory."""
        if self.resident is not None and rung > self.resident:
            raise ValueError(
                f"rung: expected at most the resident rung {self.rungs[self.resident]}, got {self.rungs[rung]}; ask "
                "for less, or load the ladder with a higher resident_rung"
            )


def _energy(a: Tensor, b: Tensor) -> float:
    """Squared Frobenius norm of b.T @ a, without forming it."""
    return float(((a @ a.T) * (b @ b.T)).sum())


def _starts(edges: Tensor) -> Tensor:
    """Where the ranges begin that end at edges [..., F]."""
    return torch.cat([torch.zeros_like(edges[..., :1]), edges[..., :-1]], -1)


def prefix_edges(rungs: Sequence[Rung], ranks: Sequence[int]) -> Tensor:
    """[J, M, F] of 16-bit rungs that are the same number of directions of every module that has as many, ranks [M]."""
    table = [[min(int(rung), rank) for rank in ranks] for rung in rungs]
    return torch.tensor(table, dtype=torch.long)[..., None].repeat(1, 1, len(BITS))

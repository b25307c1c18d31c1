"""The ladder's factors and its table: one adapter re-factored so that every rung is a prefix of the next.

    s·B·A = Q_B (s·R_B R_A^T) Q_A^T = U S V^T,   A' = S^1/2 V^T  [R, d_in],   B' = S^1/2 U^T  [R, d_out]

Two thin QRs and an R x R SVD give the singular triples of the d x d product without ever forming it: for R = 64 and
d = 4096 that is about 1/1000 of the work. One contiguous row per direction in both factors makes a rung a slice. The
adapter's own scale s stays baked in: recomputing it from a truncated rank is a bug that many projects had.

A rung is a table, not a rank: directions are ordered so that their bits fall, so a rung reads one contiguous range of
directions per format, and `edges` says where each range ends.

Shape legend: M modules, J rungs, F formats (in the order of `BITS`), R a module's rank.
Source: DESIGN section 3; Eckart-Young for optimality of a prefix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy.limits import refused
from policy.rungs import checked_rungs
from policy.settings import DEFAULT_RUNGS

from ..fingerprint import adapter_fingerprint
from .adapter import Adapter, LoraFactors
from .formats import BITS

SVD = "svd"


@dataclass(frozen=True)
class LadderFactors:
    """One module's ladder: the update at rank r is `b[:r].T @ a[:r]`."""

    a: Tensor
    """[R, d_in] float32"""
    b: Tensor
    """[R, d_out] float32"""
    singular_values: Tensor
    """[R] float32, of s·B·A, descending"""

    def __post_init__(self) -> None:
        shapes = [tuple(x.shape) for x in (self.a, self.b, self.singular_values)]
        if [len(shape) for shape in shapes] != [2, 2, 1] or len({shape[0] for shape in shapes}) != 1:
            raise refused("a, b, singular_values", "shapes [R, d_in], [R, d_out] and [R]", shapes, "save them again")

    @property
    def row_elements(self) -> int:
        """Numbers that one direction costs: d_in + d_out."""
        return self.a.shape[1] + self.b.shape[1]


@dataclass(frozen=True)
class Ladder:
    """The whole adapter's ladder; the top rung reads everything."""

    kind: str
    """How its directions were chosen: `svd`."""
    rungs: tuple[int, ...]
    """Equivalent ranks, ascending; 0 is the base model alone."""
    modules: dict[str, LadderFactors]
    edges: Tensor
    """[J, M, F] long: of module m, rung j reads directions edges[j, m, f - 1] to edges[j, m, f] at format f.

    Never falls along j or f; modules in the order of `modules`.
    """
    adapter: str
    """Fingerprint of the adapter it was made of."""
    base_model: str | None = None
    """Name of the base model, where the adapter told."""

    def __post_init__(self) -> None:
        expected, found = (len(self.rungs), len(self.modules), len(BITS)), tuple(self.edges.shape)
        if found != expected or self.edges.dtype != torch.long:
            got = f"{found} {self.edges.dtype}"
            raise ValueError(f"edges: expected {expected} torch.int64, [J, M, F], got {got}; save the ladder again")
        rows = torch.tensor([len(factors.a) for factors in self.modules.values()], device=self.edges.device)
        if bool((self.edges < 0).any() | (self.edges > rows[:, None]).any()):
            reach = f"[{int(self.edges.min())}, {int(self.edges.max())}]"
            raise ValueError(f"edges: expected 0 to every module's rows, got {reach}; save the ladder again")
        if bool((self.edges.diff(dim=0) < 0).any() | (self.edges.diff(dim=2) < 0).any()):
            raise ValueError("edges: expected none to fall from rung to rung, got some that do; save the ladder again")

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
        return torch.tensor([float(f.row_elements) for f in self.modules.values()])

    def rung_bytes(self) -> Tensor:
        """[J] float64 bytes that every rung reads."""
        directions = self.edges.diff(dim=2, prepend=torch.zeros_like(self.edges[..., :1])).double()
        return torch.einsum("jmf,m,f->j", directions, self.row_elements.double(), torch.tensor(BITS).double() / 8)

    def mean_rank(self) -> Tensor:
        """[J] float32 equivalent rank of every rung: its bytes in 16-bit directions of all modules."""
        return (self.rung_bytes() / (2 * self.row_elements.double().sum())).float()

    def tail_energy(self) -> Tensor:
        """[J] share of the adapter's squared Frobenius norm that a rung leaves out, over all modules."""
        energies = [f.singular_values.double().square() for f in self.modules.values()]
        left_out = [
            sum(float(energy[rank:].sum()) for energy, rank in zip(energies, row.tolist(), strict=True))
            for row in self.rank_table
        ]
        return torch.tensor(left_out) / sum(float(energy.sum()) for energy in energies)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over kind, rungs, table and the adapter it was made of, from which `svd` factors follow.

        Factors themselves are left out: an SVD differs in its last bits, and in signs, from machine to machine.
        """
        identity = {"kind": self.kind, "rungs": self.rungs, "edges": self.edges.tolist(), "adapter": self.adapter}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def rung_index(self, rank: int) -> int:
        """Index of rung `rank`. Raises ValueError naming the rungs there are."""
        if rank not in self.rungs:
            top = self.rungs[-1]
            hint = f"the adapter's rank is {top}" if rank > top else "build the ladder with that rung"
            raise ValueError(f"rung: expected one of {self.rungs}, got {rank}; {hint}")
        return self.rungs.index(rank)

    def with_rungs(self, rungs: Sequence[int]) -> Ladder:
        """The same factors with these rungs and the top one, which is always there; nothing is factored again.

        Raises ValueError for a rung above the adapter's rank, below 0, or named twice.
        """
        top = self.rungs[-1]
        if any(rung > top for rung in rungs):
            raise ValueError(f"rungs: expected ranks up to the adapter's {top}, got {max(rungs)}; leave it out")
        if any(rung < 0 for rung in rungs) or len(set(rungs)) != len(rungs):
            raise ValueError(f"rungs: expected ranks of at least 0, each once, got {tuple(rungs)}; correct the list")
        chosen = checked_rungs(sorted({*rungs, top}))
        return replace(self, rungs=chosen, edges=_prefix_edges(chosen, self.modules))


def _prefix_edges(rungs: Sequence[int], modules: dict[str, LadderFactors]) -> Tensor:
    """[J, M, F]: every rung is the same number of 16-bit directions of every module that has as many."""
    table = [[min(rung, len(factors.a)) for factors in modules.values()] for rung in rungs]
    return torch.tensor(table, dtype=torch.long)[..., None].repeat(1, 1, len(BITS))


def build_ladder(adapter: Adapter, rungs: Sequence[int] | None = None) -> Ladder:
    """Factor an adapter into its `svd` ladder (float32, on the adapter's device).

    `rungs` defaults to those of 2, 4, 6, 8, 12, 16, 24, 32, 48, 64 up to the adapter's rank; its own rank is always
    the top. Raises ValueError for a rung above the adapter's rank, below 0, or named twice, and for an adapter whose
    update overflows float32.
    """
    top = adapter.rank
    modules = {name: _module_factors(name, factors, adapter) for name, factors in adapter.modules.items()}
    edges, fingerprint = _prefix_edges((top,), modules), adapter_fingerprint(adapter)
    whole = Ladder(SVD, (top,), modules, edges, fingerprint, adapter.base_model)
    return whole.with_rungs(tuple(rungs) if rungs is not None else tuple(r for r in DEFAULT_RUNGS if r <= top))


def _module_factors(name: str, factors: LoraFactors, adapter: Adapter) -> LadderFactors:
    try:
        return svd_factors(factors)
    except ValueError as error:
        raise ValueError(f"{adapter.path}: module {name}: {error}") from None


def svd_factors(factors: LoraFactors) -> LadderFactors:
    """Singular directions of `scale * b @ a`, from two thin QRs and an r x r SVD in float32 or better.

    Raises ValueError when that product overflows float32.
    """
    dtype = torch.promote_types(factors.a.dtype, torch.float32)
    q_b, r_b = torch.linalg.qr(factors.b.to(dtype))
    q_a, r_a = torch.linalg.qr(factors.a.to(dtype).T)
    core = factors.scale * (r_b @ r_a.T)
    if not float(core.abs().amax()) <= torch.finfo(torch.float32).max / len(core):  # nor is NaN
        raise ValueError(
            f"expected an update within float32, got one that overflows at scale {factors.scale:g}; lower lora_alpha, "
            "or train the adapter again"
        )
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    root = s.sqrt()[:, None]
    # A module narrower than its rank has fewer directions than rows: the rest are exact zeros, so that the row count
    # still equals the adapter's rank.
    rows = (root * (vt @ q_a.T), root * (u.T @ q_b.T), s)
    a, b, values = (_pad(x, factors.rank).float().contiguous() for x in rows)
    return LadderFactors(a, b, values)


def _pad(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])

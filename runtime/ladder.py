"""The SVD ladder: one adapter re-factored so that every rung is a prefix of the next.

    s·B·A = Q_B (s·R_B R_A^T) Q_A^T = U S V^T,   A' = S^1/2 V^T  [R, d_in],   B' = S^1/2 U^T  [R, d_out]

Two thin QRs and an R x R SVD give the singular triples of the d x d product without ever forming it: for R = 64 and
d = 4096 that is about 1/1000 of the work. One contiguous row per direction in both factors makes a rung a slice. The
adapter's own scale s stays baked in: recomputing it from a truncated rank is a bug that many projects had.

Shape legend: M modules, J rungs, R a module's rank. Source: DESIGN section 3; Eckart-Young for optimality of a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.settings import DEFAULT_RUNGS

from .adapter import Adapter, LoraFactors


@dataclass(frozen=True)
class LadderFactors:
    """One module's ladder: the update at rank r is `b[:r].T @ a[:r]`."""

    a: Tensor
    """[R, d_in] float32"""
    b: Tensor
    """[R, d_out] float32"""
    singular_values: Tensor
    """[R] float32, of s·B·A, descending"""

    @property
    def row_elements(self) -> int:
        """Numbers that one direction costs: d_in + d_out."""
        return self.a.shape[1] + self.b.shape[1]


@dataclass(frozen=True)
class Ladder:
    """The whole adapter's ladder. `rank_table[j, m]` is the rank of module m at rung j; the top row is full."""

    kind: str
    rungs: tuple[int, ...]
    modules: dict[str, LadderFactors]
    rank_table: Tensor
    """[J, M] long, non-decreasing in j; modules in the order of `modules`."""

    @property
    def row_elements(self) -> Tensor:
        """[M] float32: d_in + d_out of every module, the weight of one of its directions in bytes and mean rank."""
        return torch.tensor([float(f.row_elements) for f in self.modules.values()])

    def mean_rank(self) -> Tensor:
        """[J] byte-weighted mean rank of every rung."""
        weights = self.row_elements
        return (self.rank_table.float() * weights).sum(1) / weights.sum()

    def tail_energy(self) -> Tensor:
        """[J] share of the adapter's squared Frobenius norm that a rung leaves out, over all modules."""
        energies = [f.singular_values.double().square() for f in self.modules.values()]
        left_out = [
            sum(float(energy[rank:].sum()) for energy, rank in zip(energies, row.tolist(), strict=True))
            for row in self.rank_table
        ]
        return torch.tensor(left_out) / sum(float(energy.sum()) for energy in energies)

    def rung_index(self, rank: int) -> int:
        """Index of rung `rank`. Raises ValueError naming the rungs there are."""
        if rank not in self.rungs:
            top = self.rungs[-1]
            hint = f"the adapter's rank is {top}" if rank > top else "build the ladder with that rung"
            raise ValueError(f"rung: expected one of {self.rungs}, got {rank}; {hint}")
        return self.rungs.index(rank)


def build_ladder(adapter: Adapter, rungs: Sequence[int] | None = None) -> Ladder:
    """Factor an adapter into its `svd` ladder (float32, on the adapter's device).

    `rungs` defaults to those of 2, 4, 6, 8, 12, 16, 24, 32, 48, 64 up to the adapter's rank; its own rank is always
    the top. Raises ValueError for a rung above the adapter's rank, below 0, or named twice.
    """
    top = adapter.rank
    chosen = tuple(rungs) if rungs is not None else tuple(r for r in DEFAULT_RUNGS if r <= top)
    if any(r > top for r in chosen):
        raise ValueError(f"rungs: expected ranks up to the adapter's {top}, got {max(chosen)}; leave it out")
    if any(r < 0 for r in chosen) or len(set(chosen)) != len(chosen):
        raise ValueError(f"rungs: expected ranks of at least 0, each once, got {chosen}; correct the list")
    chosen = tuple(sorted({*chosen, top}))
    modules = {name: svd_factors(factors) for name, factors in adapter.modules.items()}
    table = [[min(rung, factors.rank) for factors in adapter.modules.values()] for rung in chosen]
    return Ladder("svd", chosen, modules, torch.tensor(table, dtype=torch.long))


def svd_factors(factors: LoraFactors) -> LadderFactors:
    """Singular directions of `scale * b @ a`, from two thin QRs and an r x r SVD in float32 or better."""
    dtype = torch.promote_types(factors.a.dtype, torch.float32)
    q_b, r_b = torch.linalg.qr(factors.b.to(dtype))
    q_a, r_a = torch.linalg.qr(factors.a.to(dtype).T)
    u, s, vt = torch.linalg.svd(factors.scale * (r_b @ r_a.T), full_matrices=False)
    root = s.sqrt()[:, None]
    # A module narrower than its rank has fewer directions than rows: the rest are exact zeros, so that the row count
    # still equals the adapter's rank.
    rows = (root * (vt @ q_a.T), root * (u.T @ q_b.T), s)
    a, b, values = (_pad(x, factors.rank).float().contiguous() for x in rows)
    return LadderFactors(a, b, values)


def _pad(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])

"""From an adapter to directions: its singular ones, and its own factors as they are.

    s·B·A = Q_B (s·R_B R_A^T) Q_A^T = U S V^T,   A' = S^1/2 V^T  [R, d_in],   B' = S^1/2 U^T  [R, d_out]

Two thin QRs and an R x R SVD give the singular triples of the d x d product without ever forming it: for R = 64 and
d = 4096 that is about 1/1000 of the work. One contiguous row per direction in both factors makes a rung a slice. The
adapter's own scale s stays baked in: recomputing it from a truncated rank is a bug that many projects had.

Source: DESIGN section 3; Eckart-Young for optimality of a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from policy.rungs import Rung, rungs_of_rank

from ..fingerprint import adapter_fingerprint
from .adapter import Adapter, LoraFactors
from .banks import DISTILLED, KINDS, MIXED, RANKED, SVD, Bank, Directions, Ladder, Range, prefix_edges
from .formats import wide_rows

__all__ = [
    "DISTILLED", "KINDS", "MIXED", "RANKED", "SVD", "Bank", "Directions", "Ladder", "Range", "build_ladder",
    "exact_bank", "prefix_edges", "svd_factors", "svd_rows",
]  # fmt: skip


def build_ladder(adapter: Adapter, rungs: Sequence[Rung] | None = None) -> Ladder:
    """Factor an adapter into its `svd` ladder (on the adapter's device).

    `rungs` defaults to the whole ranks among the default shares of the adapter's rank; its own rank is always the top.
    Raises ValueError for a rung above the adapter's rank, below 0, fractional, or named twice, and for an adapter whose
    update overflows float32 or whose directions overflow its own dtype.
    """
    top = adapter.rank
    bank = {name: svd_directions(name, factors, adapter) for name, factors in adapter.modules.items()}
    edges = prefix_edges((top,), [factors.rank for factors in adapter.modules.values()])
    whole = Ladder(
        SVD, (top,), (bank, exact_bank(adapter)), (1,), edges, (1.0,), adapter_fingerprint(adapter), adapter.base_model
    )
    return whole.with_rungs(tuple(rungs) if rungs is not None else tuple(r for r in rungs_of_rank(top) if r == int(r)))


def exact_bank(adapter: Adapter) -> Bank:
    """The adapter's factors as they are, its scale in B: in its own dtype where that holds the product exactly, in
    float32, rounded once, where it does not."""
    bank = {}
    for name, own in adapter.modules.items():
        scaled = own.scale * own.b.double()
        narrow = scaled.to(own.b.dtype)
        b = narrow if torch.equal(narrow.double(), scaled) else scaled.float()
        bank[name] = Directions(wide_rows(own.a), wide_rows(b.T.contiguous()))
    return bank


def svd_directions(name: str, factors: LoraFactors, adapter: Adapter) -> Directions:
    """One module's singular directions, as precise as its adapter: beyond bf16 those of a bf16 one would be bytes for
    nothing. Raises ValueError, naming the module, for an overflow."""
    dtype = torch.promote_types(factors.a.dtype, factors.b.dtype)
    halves = [half.to(dtype) for half in svd_rows(name, factors, adapter)]
    if not all(bool(half.isfinite().all()) for half in halves):
        raise ValueError(
            f"{adapter.path}: module {name}: expected directions within {dtype}, got some that overflow; lower "
            "lora_alpha, or save the adapter in float32"
        )
    return Directions(*map(wide_rows, halves))


def svd_rows(name: str, factors: LoraFactors, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A' [R, d_in] and B' [R, d_out] float32 of one module, strongest direction first.

    Raises ValueError, naming the module, for an update that overflows float32.
    """
    try:
        a, b, _ = svd_factors(factors)
    except ValueError as error:
        raise ValueError(f"{adapter.path}: module {name}: {error}") from None
    return a, b


def svd_factors(factors: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Singular directions of `scale * b @ a`, from two thin QRs and an r x r SVD in float32 or better.

    Returns A' [R, d_in], B' [R, d_out] and the singular values [R], descending, float32; R is the rank r, and what the
    module is too narrow for are zeros. Raises ValueError when that product overflows float32.
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
    return a, b, values


def _pad(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])

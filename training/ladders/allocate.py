"""Bits by effect per byte: which direction every rung reads, and how precisely.

Reverse water-filling: a rung minimises the sum over directions of effect times error at its bits, plus a price times
bytes, and the price is the one at which its bytes are what the rung is named after. As the price falls from rung to
rung no direction gets fewer bits, and within a module one of more effect never gets fewer: so a module's directions in
the order of their effect are what a ladder needs.

Shape legend: M modules, J rungs, F formats (in the order of `BITS`), R a module's directions.
Source: DESIGN section 3; Cover and Thomas, Elements of Information Theory, 10.3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from runtime.ladder.formats import BITS, ERRORS, row_bytes

HALF = 0.5
"""Of the exact adapter: the share at which everything is read at 8 bits."""
_HALVINGS = 200


def product_error(bits: int) -> float:
    """Squared error of a rank-one product whose two factors are read at `bits`, over its energy; 0 bits: all of it."""
    if bits == 0:
        return 1.0
    # Scaled by least squares, a factor keeps 1 - e of its energy and the product the square of that.
    return 0.0 if bits == 16 else 1 - (1 - ERRORS[bits]) ** 2


def order_of(effects: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[R] per module: its directions by falling effect, equal ones in the order they had."""
    return {name: own.argsort(descending=True, stable=True) for name, own in effects.items()}


def allocate(
    effects: Mapping[str, Tensor],
    widths: Mapping[str, tuple[int, int]],
    shares: Sequence[float],
    formats: Sequence[int],
) -> Tensor:
    """[J, M, F] long edges of rungs that take these shares of the exact adapter's bytes.

    effects [R] per module in falling order, widths (d_in, d_out) per module, shares ascending and below 1; `formats`
    are the bits to choose from. A share of a half takes everything at 8 bits where that is among them. No rung takes
    more than its bytes, scales included, but that one, whose scales come on top.
    Raises ValueError for a share that the formats cannot fill.
    """
    effect = np.concatenate([own.double().numpy() for own in effects.values()])
    module = np.concatenate([np.full(len(own), m) for m, own in enumerate(effects.values())])
    choices = (0, *sorted(formats))
    price = np.array([[_price(widths[name], bits) for bits in choices] for name in effects])[module]
    error = np.array([product_error(bits) for bits in choices])
    whole = float(sum(2 * sum(widths[name]) * len(own) for name, own in effects.items()))
    rows = []
    for share in shares:
        if share >= HALF and max(formats) == 8:
            if share > HALF:
                raise ValueError(
                    f"rungs: expected at most half of the adapter (everything at 8 bits) below the exact one, got "
                    f"{share:.3g} of it; leave it out"
                )
            bits = np.full(len(effect), 8)
        else:
            bits = np.array(choices)[_fill(effect, error, price, share * whole)]
        rows.append(_edges(bits, module, len(effects)))
    return torch.stack(rows)


def _price(widths: tuple[int, int], bits: int) -> int:
    return 0 if bits == 0 else sum(row_bytes(width, bits) for width in widths)


def _fill(effect: np.ndarray, error: np.ndarray, price: np.ndarray, budget: float) -> np.ndarray:
    """[N] which choice every direction gets: effect [N], error [C], price [N, C] in bytes."""

    def at(log_price: float) -> np.ndarray:
        found: np.ndarray = (effect[:, None] * error + np.exp(log_price) * price).argmin(1)
        return found

    index = np.arange(len(effect))
    low, high = -200.0, 200.0  # too cheap, dear enough that nothing is read
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if price[index, at(middle)].sum() > budget:
            low = middle
        else:
            high = middle
    return at(high)


def _edges(bits: np.ndarray, module: np.ndarray, modules: int) -> Tensor:
    """[M, F]: how many directions of every module are read at each of BITS or finer."""
    return torch.tensor([[int((bits[module == m] >= f).sum()) for f in BITS] for m in range(modules)])

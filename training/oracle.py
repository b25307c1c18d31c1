"""The oracle's choice of rungs: what a policy could gain at most, knowing every rung's damage in advance."""

from __future__ import annotations

from torch import Tensor


def oracle_rungs(damage: Tensor, tokens: Tensor, rung_rank: Tensor, mean_rank: float) -> Tensor:
    """[N] rungs of least damage at a byte-weighted mean rank of at most about `mean_rank`.

    damage [N, J] nats per token, tokens [N]. The trade-off price is found by bisection; the mean rank falls with it.
    """

    def at(price: float) -> Tensor:
        return (damage + price * rung_rank).argmin(1)

    low, high = 0.0, float(damage.max()) / float((rung_rank[1:] - rung_rank[:-1]).min()) + 1e-9
    for _ in range(50):
        middle = (low + high) / 2
        mean = float((rung_rank[at(middle)] * tokens).sum() / tokens.sum())
        low, high = (middle, high) if mean > mean_rank else (low, middle)
    return at(high)

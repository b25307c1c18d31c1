"""The strongest percentile thresholds: which signal, which sign, how wide a band.

Every candidate is tried on tables of validation documents at full-rank trajectories, its knob set to the bytes of the
rung in the middle of those that the verdict is read at; the best by table is what is measured in real runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.contract import Summary
from policy.percentile import CHUNK, COMPLEXITY, TOKEN, PercentilePolicy
from policy.settings import SIGNALS, TOKEN_SIGNALS

SPREADS = (0.25, 0.5, 1.0, 2.0)
"""Half-widths, in rungs, of the band that thresholds move in."""
SIGNS = (1, -1)
STEPS = 24
"""Halvings of the knob's range."""


@dataclass(frozen=True)
class Seen:
    """Chunks of documents, with what every rung would have cost there by tables of uniform runs."""

    features: Tensor
    """[N, F]"""
    damage: Tensor
    """[N, J] nats per scored token"""
    scored: Tensor
    """[N] scored tokens"""

    def kl(self, rung: Tensor) -> float:
        """Mean over scored tokens at rungs [N]."""
        own = self.damage.gather(1, rung[:, None])[:, 0]
        return float((own * self.scored).sum() / self.scored.sum())

    def cost(self, rung: Tensor, cost: Tensor) -> float:
        """Mean over scored tokens of what every rung costs, [J]."""
        return float((cost[rung] * self.scored).sum() / self.scored.sum())


def candidates(features: Tensor, base: PercentilePolicy) -> list[PercentilePolicy]:
    """Thresholds on every signal, of the closed chunk and where there is one of the token to come, both signs, every
    spread; calibrated on features [N, F] of train documents, with the rungs, scales and weights of `base`."""
    summary = Summary.from_features(features)
    weights: dict[str, float] = base.config()["weights"]
    found = []
    for signal in (*SIGNALS, COMPLEXITY):
        for of in (CHUNK, TOKEN) if signal in TOKEN_SIGNALS else (CHUNK,):
            value, known = PercentilePolicy(base.rungs, signal, weights=weights, of=of).value(summary)
            if not bool(known.any()):
                continue
            for spread in SPREADS:
                for sign in SIGNS:
                    found.append(
                        PercentilePolicy.calibrate(
                            value[known], base.rungs, signal, base.scales, spread, weights, sign, of
                        )
                    )
    return found


def best_thresholds(among: Sequence[PercentilePolicy], seen: Seen, cost: Tensor, rung: int) -> PercentilePolicy:
    """The candidate of least KL by table at the cost [J] of `rung`, none of which spends more; of equal ones the first.

    The candidates hold at least one whose band is narrow enough to stay at the rung.
    """
    aimed = float(cost[rung]) * (1 + 1e-6)
    return min(among, key=lambda policy: _kl_within(policy, seen, cost, aimed))


def _kl_within(policy: PercentilePolicy, seen: Seen, cost: Tensor, most: float) -> float:
    """KL by table at the dearest knob that spends at most `most`."""
    summary = Summary.from_features(seen.features)
    value, known = policy.value(summary)
    swing = policy.swing(value, known)
    low, high = policy.knob_range()
    for _ in range(STEPS):
        middle = (low + high) / 2
        spent = seen.cost(policy.rung_of(torch.tensor(middle), swing), cost)
        low, high = (middle, high) if spent <= most else (low, middle)
    return seen.kl(policy.rung_of(torch.tensor(low), swing))

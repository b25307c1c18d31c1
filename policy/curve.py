"""The calibrated map from a budget to a policy's knob.

A budget is a promise about mean cost; what a knob spends depends on the text. So each policy is run over validation
documents at several knobs, mean cost is made monotone by isotonic regression (in `training`), and the result is kept
here as knots.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass


def check_budget(budget: float) -> float:
    """`budget` as a float. Raises ValueError unless it is a number in [0, 1]."""
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not number or not 0 <= budget <= 1:
        raise ValueError(f"budget: expected a share of the full adapter's cost in [0, 1], got {budget!r}")
    return float(budget)


@dataclass(frozen=True)
class KnobCurve:
    """Monotone piecewise-linear: mean cost `budgets[i]` is what knob `knobs[i]` spends.

    Budgets ascend strictly within [0, 1]; knobs run one way, up or down (log lambda falls as the budget grows).
    """

    budgets: tuple[float, ...]
    knobs: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(float(value) for value in self.budgets))
        object.__setattr__(self, "knobs", tuple(float(value) for value in self.knobs))
        if not self.budgets or len(self.budgets) != len(self.knobs):
            got = f"{len(self.budgets)} and {len(self.knobs)}"
            raise ValueError(f"curve: expected as many budgets as knobs, at least one of each, got {got}")
        if not all(math.isfinite(knob) for knob in self.knobs):
            raise ValueError(f"curve.knobs: expected finite numbers, got {self.knobs}")
        inside = all(0 <= budget <= 1 for budget in self.budgets)
        if not inside or any(b <= a for a, b in zip(self.budgets, self.budgets[1:], strict=False)):
            raise ValueError(f"curve.budgets: expected strictly ascending numbers in [0, 1], got {self.budgets}")
        if list(self.knobs) not in (sorted(self.knobs), sorted(self.knobs, reverse=True)):
            raise ValueError(f"curve.knobs: expected a sequence that only rises or only falls, got {self.knobs}")

    def knob(self, budget: float) -> float:
        """The knob for `budget`; outside the knots, that of the nearest end. Raises ValueError outside [0, 1]."""
        budget = check_budget(budget)
        right = bisect_left(self.budgets, budget)
        if right == len(self.budgets):
            return self.knobs[-1]
        if right == 0 or self.budgets[right] == budget:
            return self.knobs[right]
        share = (budget - self.budgets[right - 1]) / (self.budgets[right] - self.budgets[right - 1])
        return (1 - share) * self.knobs[right - 1] + share * self.knobs[right]

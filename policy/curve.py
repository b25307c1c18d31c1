"""The calibrated map from a budget to a policy's knob.

A budget is a promise about mean cost; what a knob spends depends on the text. So each policy is run over validation
documents at several knobs, mean cost is made monotone by isotonic regression (in `training`), and the result is kept
here as knots.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from .limits import Number, Several, check_fields, limited, refused

MOST_KNOTS = 4096


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

    budgets: tuple[float, ...] = field(metadata=limited(Several(Number(0, 1), 1, MOST_KNOTS, distinct=True)))
    knobs: tuple[float, ...] = field(metadata=limited(Several(Number(-1e6, 1e6), 1, MOST_KNOTS)))

    def __post_init__(self) -> None:
        check_fields(self, "curve")
        if len(self.budgets) != len(self.knobs):
            got = f"{len(self.budgets)} and {len(self.knobs)}"
            raise ValueError(f"curve: expected as many budgets as knobs, got {got}; give one knob for each budget")
        if list(self.knobs) not in (sorted(self.knobs), sorted(self.knobs, reverse=True)):
            raise refused("curve.knobs", "numbers that only rise or only fall", self.knobs)

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

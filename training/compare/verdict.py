"""The verdict: what the learned policy gains over the fixed rungs, of what there is to gain, and what is exported.

It is read at the mean rank of the fixed rungs nearest to an eighth, a quarter and three eighths of the adapter, as
`equal_rank` reads the curves:

    headroom = KL(fixed) - KL(oracle),   captured = (KL(fixed) - KL(learned)) / headroom,   averaged over those rungs

with 95 % intervals from resampling test documents. The oracle knows every rung's damage on the test documents ahead and
may also stay at the fixed rung, so its headroom is never negative; where it cannot be told from zero, nothing can be
captured and the share is not given. Nor is a policy's KL over the fixed rungs' given where those lose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import auc

from policy.rungs import Rung

from .curves import Curve
from .equal_rank import EqualRank, Interval, at_equal_rank, interval

VERDICT_SHARES = (1 / 8, 1 / 4, 3 / 8)
"""Of the adapter's bytes: 8, 16 and 24 of rank 64. From a half on a ladder in few bits loses nothing."""
BELOW = 1 / 2
"""Of the rungs there are those below this share are chosen from, where there are any."""
MEASURABLE_NATS = 1e-6
"""A headroom, or a KL to compare with, whose interval reaches below this is none."""


@dataclass(frozen=True)
class Ratio:
    """One number of nats over another, with its 95 % interval."""

    value: float
    interval: Interval

    def describe(self) -> dict[str, Any]:
        """For the summary."""
        return {"ratio": self.value, "interval_95": list(self.interval)}


@dataclass(frozen=True)
class OverFixed:
    """KL of every policy over the fixed rungs' at equal rank; None where a curve does not reach, or fixed is exact."""

    compared: dict[str, Ratio | None]
    """Both averaged over the rungs that the verdict is read at."""
    ranks: tuple[float, ...]
    """Mean rank of every rung but the top."""
    shares: tuple[float, ...]
    """The same over the top's."""
    kl: dict[str, list[float | None]]
    """Each policy's KL at these."""
    ratios: dict[str, list[Ratio | None]]
    """Its KL there over the fixed rung's."""

    def describe(self) -> dict[str, Any]:
        """For the summary."""
        return {
            "compared": {name: None if ratio is None else ratio.describe() for name, ratio in self.compared.items()},
            "mean_rank": list(self.ranks),
            "share": list(self.shares),
            "kl": self.kl,
            "at_rank": {
                name: [None if ratio is None else ratio.describe() for ratio in ratios]
                for name, ratios in self.ratios.items()
            },
        }


@dataclass(frozen=True)
class Verdict:
    """What the comparison says. Numbers are nan-free: where a curve does not reach a rung, the rung is left out."""

    ranks: tuple[Rung, ...]
    """The fixed rungs compared at."""
    kl: dict[str, list[float]]
    """KL of each policy at those mean ranks."""
    headroom: float
    """Mean over them of KL(fixed) - KL(oracle), nats per completion token."""
    headroom_interval: Interval
    captured: float | None
    """Share of the headroom the learned policy captures; None where the headroom cannot be told from zero."""
    captured_interval: Interval | None
    gain: float
    """Mean of KL(fixed) - KL(learned), nats; negative: the fixed rungs are better."""
    gain_interval: Interval
    exported: str
    """`learned` when it beats the fixed rungs beyond chance and percentile at no rung does better, else `fixed`."""
    reason: str
    over_fixed: OverFixed

    @property
    def sentence(self) -> str:
        """What is exported and how far the learned policy is from the fixed rungs, for people."""
        if not self.ranks:
            return f"Fixed rungs are exported: {self.reason}"
        found = self.over_fixed.compared["learned"]
        if found is None:
            return "Fixed rungs are exported: they lose nothing that can be measured"
        sign, word = (1, "higher") if found.value >= 1 else (-1, "lower")
        change, *ends = (100 * sign * (ratio - 1) for ratio in (found.value, *found.interval))
        low, high = (_percent(end) for end in sorted(ends))
        amount = "the same" if _percent(change) == "0" else f"{_percent(change)} % {word}"
        between = f"(95 % interval {low} to {high} %)"
        if self.exported == "learned":
            return f"The learned policy is exported: its KL is {amount} than the fixed rungs' at equal rank {between}"
        said = f"Fixed rungs are exported: the learned policy's KL is {amount} at equal rank"
        if self.gain_interval[1] < 0:
            return f"{said} {between}"
        if self.gain_interval[0] <= 0:
            return f"{said}, within chance {between}"
        return f"{said} {between}, but {self.reason}"

    def metrics(self) -> dict[str, Any]:
        """What a checkpoint carries of it."""
        return {
            "headroom": self.headroom,
            "captured": self.captured,
            "captured_interval_95": self.captured_interval,
            "compared_at": list(self.ranks),
            "kl_at": self.kl,
            "exported": self.exported,
        }

    def describe(self) -> dict[str, Any]:
        """For the summary."""
        captured = self.captured_interval
        return {
            "compared_at": list(self.ranks),
            "kl_at": self.kl,
            "headroom": {"nats": self.headroom, "interval_95": list(self.headroom_interval)},
            "captured": {"share": self.captured, "interval_95": None if captured is None else list(captured)},
            "gain_over_fixed": {"nats": self.gain, "interval_95": list(self.gain_interval)},
            "over_fixed": self.over_fixed.describe(),
            "exported": self.exported,
            "reason": self.reason,
            "verdict": self.sentence,
        }


def judge(
    curves: dict[str, Curve], rungs: Sequence[Rung], rung_rank: np.ndarray, *, resamples: int, seed: int
) -> Verdict:
    """Judge `curves` (fixed, percentile, learned, random, oracle). See the module's docstring."""
    read = at_equal_rank(curves, rung_rank, resamples=resamples, seed=seed)
    wanted = verdict_rungs(rungs)
    ranks = tuple(rung for rung in wanted if not any(np.isnan(kl[rungs.index(rung)]) for kl in read.kl.values()))
    columns = [rungs.index(rung) for rung in ranks]
    kl = {name: values[columns].tolist() for name, values in read.kl.items()}
    over_fixed = _over_fixed(read, columns, float(rung_rank[-1]))
    if not ranks:
        none = (0.0, 0.0)
        reason = "no policy's curve reaches a fixed rung"
        return Verdict((), kl, 0.0, none, None, None, 0.0, none, "fixed", reason, over_fixed)
    (gain, headroom), (gains, rooms) = (_gain_and_headroom(found, columns) for found in (read.kl, read.drawn))
    headroom_interval, (low, high) = interval(rooms), interval(gains)
    captured = _ratio(float(gain), float(headroom), gains, rooms)
    worse = [r for r, mine, other in zip(ranks, kl["learned"], kl["percentile"], strict=True) if mine > other]
    if high < 0:
        reason = f"worse than the fixed rungs: gain [{low:.5f}, {high:.5f}] nats"
    elif low <= 0:
        reason = f"gain over the fixed rungs is within chance: [{low:.5f}, {high:.5f}] nats"
    elif worse:
        reason = f"percentile thresholds do better at mean rank {', '.join(map(str, worse))}"
    else:
        reason = "beats the fixed rungs beyond chance and percentile thresholds everywhere"
    return Verdict(
        ranks=ranks,
        kl=kl,
        headroom=float(headroom),
        headroom_interval=headroom_interval,
        captured=None if captured is None else captured.value,
        captured_interval=None if captured is None else captured.interval,
        gain=float(gain),
        gain_interval=(low, high),
        exported="learned" if low > 0 and not worse else "fixed",
        reason=reason,
        over_fixed=over_fixed,
    )


def verdict_rungs(rungs: Sequence[Rung]) -> list[Rung]:
    """The rungs that a verdict is read at: the nearest to each of `VERDICT_SHARES`, of two as near the lower one."""
    top = rungs[-1]
    among = [rung for rung in rungs[:-1] if rung < BELOW * top] or list(rungs[:-1])
    nearest = [min(among, key=lambda rung: abs(rung - share * top)) for share in VERDICT_SHARES]
    return sorted(set(nearest))


def _gain_and_headroom(kl: dict[str, np.ndarray], columns: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Means over `columns` of KL [..., K]."""
    fixed, learned, oracle = (kl[name][..., columns] for name in ("fixed", "learned", "oracle"))
    return (fixed - learned).mean(-1), (fixed - np.minimum(oracle, fixed)).mean(-1)


def _over_fixed(read: EqualRank, columns: Sequence[int], top: float) -> OverFixed:
    def ratio(name: str, where: Sequence[int]) -> Ratio | None:
        values = (kl[..., where].mean(-1) for found in (read.kl, read.drawn) for kl in (found[name], found["fixed"]))
        part, whole, drawn_part, drawn_whole = values
        return _ratio(float(part), float(whole), drawn_part, drawn_whole)

    return OverFixed(
        compared={name: ratio(name, columns) if columns else None for name in read.kl},
        ranks=tuple(read.ranks.tolist()),
        shares=tuple((read.ranks / top).tolist()),
        kl={name: [None if np.isnan(value) else value for value in kl.tolist()] for name, kl in read.kl.items()},
        ratios={name: [ratio(name, [index]) for index in range(len(read.ranks))] for name in read.kl},
    )


def _ratio(part: float, whole: float, drawn_part: np.ndarray, drawn_whole: np.ndarray) -> Ratio | None:
    """`part / whole` with the interval of its resamples [R]; None where the whole cannot be told from zero.

    The few resamples that have no whole have no ratio to tell of.
    """
    if np.isnan(part) or interval(drawn_whole)[0] <= MEASURABLE_NATS:
        return None
    there = drawn_whole > MEASURABLE_NATS
    return Ratio(part / whole, interval(drawn_part[there] / drawn_whole[there]))


def _percent(value: float) -> str:
    """Two digits, and none behind the third decimal."""
    if abs(value) >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 0.1 else f"{round(value, 3) + 0.0:.1g}"


def areas(curves: dict[str, Curve], rung_rank: np.ndarray) -> dict[str, float]:
    """Area under KL over mean rank, on the range of ranks that all curves cover (scikit-learn's trapezoids)."""
    ranks = {
        name: [p.scores.mean(rung_rank) for p in curve.points] + [float(rung_rank[-1])]
        for name, curve in curves.items()
    }
    low = max(min(values) for values in ranks.values())
    grid = np.linspace(low, float(rung_rank[-1]), 101)
    return {name: float(auc(grid, curve.at(grid, rung_rank))) for name, curve in curves.items()}

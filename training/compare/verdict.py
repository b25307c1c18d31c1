"""The verdict: what the learned policy gains over the fixed rungs, of what there is to gain, and what is exported.

It is read at the fixed rungs nearest to a sixteenth, three thirty-seconds and an eighth of the adapter's bytes, as
`equal_rank` reads the curves:

    headroom = KL(fixed) - KL(oracle),   captured = (KL(fixed) - KL(learned)) / headroom,   averaged over those rungs

with 95 % intervals from resampling test documents and training seeds. The oracle knows every rung's damage on the test
documents ahead, from tables of uniform runs, and is measured in runs that really mix; nothing is floored, so it may
lose, and where its headroom cannot be told from zero nothing can be captured and the share is not given. Nor is a
policy's KL over the fixed rungs' given where those lose nothing. A rung that one policy does not reach is left out for
that policy alone.
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

VERDICT_SHARES = (1 / 16, 3 / 32, 1 / 8)
"""Of the adapter's bytes: 4, 6 and 8 of rank 64. From a quarter on a ladder in few bits loses next to nothing."""
BELOW = 1 / 2
"""Of the rungs there are those below this share are chosen from, where there are any."""
SAME = 1e-6
"""Two numbers of nats this near to each other, relatively, are one: sums in another order."""
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
    """Every policy against the fixed rungs at equal rank; None where a curve does not reach, or fixed is exact."""

    compared: dict[str, Ratio | None]
    """KL over the fixed rungs', both averaged over the rungs that the verdict is read at."""
    ranks: tuple[float, ...]
    """Mean rank of every rung but the top."""
    shares: tuple[float, ...]
    """The same over the top's."""
    kl: dict[str, list[float | None]]
    """Each policy's KL at these."""
    ratios: dict[str, list[Ratio | None]]
    """Its KL there over the fixed rung's."""
    saved: dict[str, list[Ratio | None]]
    """Share of the bytes that it saves where fixed rungs lose as much."""

    def describe(self) -> dict[str, Any]:
        """For the summary."""

        def by_rung(every: dict[str, list[Ratio | None]]) -> dict[str, list[dict[str, Any] | None]]:
            return {name: [None if own is None else own.describe() for own in ratios] for name, ratios in every.items()}

        return {
            "compared": {name: ratio and ratio.describe() for name, ratio in self.compared.items()},
            "mean_rank": list(self.ranks),
            "share": list(self.shares),
            "kl": self.kl,
            "at_rank": by_rung(self.ratios),
            "bytes_saved": by_rung(self.saved),
        }


@dataclass(frozen=True)
class Verdict:
    """What the comparison says. Numbers are nan-free: where a curve does not reach a rung, the rung is left out."""

    ranks: tuple[Rung, ...]
    """The fixed rungs compared at."""
    kl: dict[str, list[float | None]]
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
    saved: Ratio | None
    """Share of the bytes that the learned policy saves where fixed rungs lose as much, averaged over those rungs."""
    exported: str
    """`learned` when it beats the fixed rungs beyond chance, percentile at no rung does better, and deciding costs no
    more time than it saves, where that is known; else `fixed`."""
    reason: str
    over_fixed: OverFixed
    net_ms: float | None = None
    """Milliseconds that a step with the learned policy takes less than one at a fixed rung that loses as much; None
    where the device's table does not tell rungs apart."""

    @property
    def sentence(self) -> str:
        """What is exported and how far the learned policy is from the fixed rungs, for people."""
        if not self.ranks:
            return f"Fixed rungs are exported: {self.reason}"
        if self.saved is None:
            return "Fixed rungs are exported: they lose nothing that can be measured"
        sign, word = (1, "fewer") if self.saved.value >= 0 else (-1, "more")
        change, *ends = (100 * sign * share for share in (self.saved.value, *self.saved.interval))
        low, high = (_percent(end) for end in sorted(ends))
        amount = "as many bytes as" if _percent(change) == "0" else f"{_percent(change)} % {word} bytes than"
        said = f"needs {amount} fixed rungs at equal KL"
        between = f"(95 % interval {low} to {high} %)"
        if self.exported == "learned":
            return f"The learned policy is exported: it {said} {between}"
        said = f"Fixed rungs are exported: the learned policy {said}"
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
            "bytes_saved": None if self.saved is None else self.saved.value,
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
            "bytes_saved": None if self.saved is None else self.saved.describe(),
            "net_ms": self.net_ms,
            "over_fixed": self.over_fixed.describe(),
            "exported": self.exported,
            "reason": self.reason,
            "verdict": self.sentence,
        }


def judge(
    curves: dict[str, Curve], rungs: Sequence[Rung], rung_rank: np.ndarray, *, resamples: int, seed: int,
    timing: Timing | None = None,
) -> Verdict:  # fmt: skip
    """Judge `curves` (fixed, percentile, learned, random, oracle). See the module's docstring."""
    read = at_equal_rank(curves, rung_rank, resamples=resamples, seed=seed)
    wanted = verdict_rungs(rungs)
    ranks = tuple(rung for rung in wanted if not np.isnan(read.kl["learned"][rungs.index(rung)]))
    columns = [rungs.index(rung) for rung in ranks]
    kl = {name: [_known(values[column]) for column in columns] for name, values in read.kl.items()}
    over_fixed = _over_fixed(read, columns, float(rung_rank[-1]))
    if not ranks:
        none = (0.0, 0.0)
        reason = "the learned policy reaches no fixed rung"
        return Verdict((), kl, 0.0, none, None, None, 0.0, none, None, "fixed", reason, over_fixed)
    gain, gains = (_mean_gap(found, "learned", columns) for found in (read.kl, read.drawn))
    # The oracle's own rungs: it may miss one that the learned policy reaches.
    seen = [column for column in columns if not np.isnan(read.kl["oracle"][column])]
    headroom, rooms = (_mean_gap(found, "oracle", seen) for found in (read.kl, read.drawn))
    headroom_interval, (low, high) = interval(rooms), interval(gains)
    captured = _ratio(float(gain), float(headroom), gains, rooms) if seen == columns else None
    exact = read.kl["fixed"][columns].mean() <= MEASURABLE_NATS
    saved = None if exact else _mean_saved(read, "learned", columns)
    worse = [
        rung for rung, mine, other in zip(ranks, kl["learned"], kl["percentile"], strict=True)
        if mine is not None and other is not None and mine > other * (1 + SAME)
    ]  # fmt: skip
    net_ms = None if timing is None else timing.net_ms(curves["learned"], read, columns)
    exported = "fixed"
    if high < 0:
        reason = f"worse than the fixed rungs: gain [{low:.5f}, {high:.5f}] nats"
    elif low <= 0:
        reason = f"gain over the fixed rungs is within chance: [{low:.5f}, {high:.5f}] nats"
    elif exact:
        reason = "fixed rungs lose nothing that can be measured"
    elif worse:
        reason = f"percentile thresholds do better at mean rank {', '.join(map(str, worse))}"
    elif net_ms is not None and net_ms < 0:
        reason = f"deciding costs {-net_ms:.3g} ms a step more than it saves on this device"
    else:
        exported = "learned"
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
        saved=saved,
        exported=exported,
        reason=reason,
        over_fixed=over_fixed,
        net_ms=net_ms,
    )


@dataclass(frozen=True)
class Timing:
    """What the device at hand takes for a step, where its table tells rungs apart."""

    rung_ms: np.ndarray
    """[J] at every rung"""
    rung_rank: np.ndarray
    """[J]"""
    controller_ms: float
    """What deciding adds to a step."""

    def net_ms(self, learned: Curve, read: EqualRank, columns: Sequence[int]) -> float:
        """Milliseconds saved a step against fixed rungs of the same KL, deciding included; mean over `columns`."""
        saved = []
        for point in learned.points:
            if point.rung in columns:
                own = point.scores.mean(self.rung_rank)
                fixed = own / (1 - read.saved["learned"][point.rung])
                saved.append(np.interp(fixed, self.rung_rank, self.rung_ms) - point.scores.mean(self.rung_ms))
        return float(np.mean(saved)) - self.controller_ms


def verdict_rungs(rungs: Sequence[Rung]) -> list[Rung]:
    """The rungs that a verdict is read at: the nearest to each of `VERDICT_SHARES`, of two as near the lower one."""
    top = rungs[-1]
    among = [rung for rung in rungs[:-1] if rung < BELOW * top] or list(rungs[:-1])
    nearest = [min(among, key=lambda rung: abs(rung - share * top)) for share in VERDICT_SHARES]
    return sorted(set(nearest))


def verdict_columns(rungs: Sequence[Rung]) -> list[int]:
    """Their indices."""
    return [rungs.index(rung) for rung in verdict_rungs(rungs)]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean_gap(kl: dict[str, np.ndarray], name: str, columns: Sequence[int]) -> np.ndarray:
    """Mean over `columns` of KL(fixed) - KL(name), [...]; 0 without columns."""
    gap = (kl["fixed"] - kl[name])[..., columns]
    return gap.mean(-1) if len(columns) else np.zeros(gap.shape[:-1])


def _mean_saved(read: EqualRank, name: str, columns: Sequence[int]) -> Ratio:
    return Ratio(float(read.saved[name][columns].mean()), interval(read.saved_drawn[name][:, columns].mean(1)))


def _over_fixed(read: EqualRank, columns: Sequence[int], top: float) -> OverFixed:
    def ratio(name: str, where: Sequence[int]) -> Ratio | None:
        values = (kl[..., where].mean(-1) for found in (read.kl, read.drawn) for kl in (found[name], found["fixed"]))
        part, whole, drawn_part, drawn_whole = values
        return _ratio(float(part), float(whole), drawn_part, drawn_whole)

    def saved(name: str, index: int) -> Ratio | None:
        return None if ratio(name, [index]) is None else _mean_saved(read, name, [index])

    every = range(len(read.ranks))
    return OverFixed(
        compared={name: ratio(name, columns) if columns else None for name in read.kl},
        ranks=tuple(read.ranks.tolist()),
        shares=tuple((read.ranks / top).tolist()),
        kl={name: [_known(value) for value in kl] for name, kl in read.kl.items()},
        ratios={name: [ratio(name, [index]) for index in every] for name in read.kl},
        saved={name: [saved(name, index) for index in every] for name in read.kl},
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


def areas(curves: dict[str, Curve], rung_rank: np.ndarray) -> dict[str, float | None]:
    """Area under KL over mean rank of every policy, over the range of ranks that all curves cover (scikit-learn's
    trapezoids); None of a policy without points."""
    read = {}
    for name, curve in curves.items():
        pairs = sorted((p.scores.mean(rung_rank), p.scores.value("kl")) for p in curve.points)
        read[name] = [*pairs, (float(rung_rank[-1]), 0.0)] if pairs else []
    low = max(pairs[0][0] for pairs in read.values() if pairs)
    grid = np.linspace(low, float(rung_rank[-1]), 101)
    found: dict[str, float | None] = {}
    for name, pairs in read.items():
        ranks, kls = ([pair[i] for pair in pairs] for i in (0, 1))
        found[name] = float(auc(grid, np.interp(grid, ranks, kls))) if pairs else None
    return found

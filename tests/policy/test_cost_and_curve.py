"""Bytes, milliseconds and the map from a budget to a knob."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy import KnobCurve, LatencyTable, adapter_cost

TABLE = LatencyTable("NVIDIA H200", ms=(10.5, 11.0, 13.0, 14.0), ms_base=10.0, spread_ms=0.1)
NOISY = LatencyTable("NVIDIA H200", ms=(4.83, 4.82, 4.86, 4.90), ms_base=4.80, spread_ms=0.05)


def test_cost_is_the_share_of_bytes() -> None:
    cost = adapter_cost(torch.tensor([0.0, 1400.0, 3200.0], dtype=torch.float64))
    assert cost.dtype == torch.float32
    assert cost.tolist() == [0.0, 0.4375, 1.0]


@pytest.mark.parametrize(
    ("rung_bytes", "message"),
    [
        (torch.ones(3, 2), r"expected shape \[J\], got \(3, 2\)"),
        (torch.ones(0), r"expected shape \[J\], got \(0,\)"),
        (torch.tensor([4.0, 2.0]), "expected bytes of at least 0 that never fall"),
        (torch.tensor([-1.0, 2.0]), "expected bytes of at least 0 that never fall"),
        (torch.zeros(2), "the top above 0"),
    ],
)
def test_bad_bytes_are_refused(rung_bytes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter_cost(rung_bytes)


def test_a_resolved_table_gives_cost_and_budget() -> None:
    assert TABLE.resolved
    assert TABLE.cost() == (0.125, 0.25, 0.75, 1.0)
    assert TABLE.budget_for(12.0) == 0.5
    assert TABLE.budget_for(10.5) == 0.125
    assert TABLE.budget_for(14.0) == 1.0


def test_a_step_down_within_noise_costs_nothing() -> None:
    table = LatencyTable("cpu", ms=(10.5, 10.45, 14.0), ms_base=10.0, spread_ms=0.1)
    assert table.resolved
    assert table.cost() == (0.125, 0.125, 1.0)


@pytest.mark.parametrize(
    "table",
    [
        NOISY,
        LatencyTable("cpu", ms=(10.5, 13.0, 12.0, 14.0), ms_base=10.0, spread_ms=0.1),
        LatencyTable("cpu", ms=(9.5, 13.0), ms_base=10.0, spread_ms=0.1),
    ],
)
def test_an_unresolved_table_is_refused(table: LatencyTable) -> None:
    assert not table.resolved
    with pytest.raises(ValueError, match=f"expected rungs that differ by more than noise on {table.device}, got .* ms"):
        table.budget_for(table.ms[0])
    with pytest.raises(ValueError, match="use budget"):
        table.cost()


def test_what_the_clock_says_is_said() -> None:
    falls = LatencyTable("cpu", ms=(10.5, 13.0, 12.0, 14.0), ms_base=10.0, spread_ms=0.1, batch=32)
    assert TABLE.says == "rungs differ by more than noise"
    assert NOISY.says == "rungs do not differ by more than noise"
    assert falls.says == "a rung takes 1.000 ms less than the one below it, which reads less"
    with pytest.raises(ValueError, match=r"on cpu at batch 32, got 10.000 ms .*\(a rung takes 1.000 ms less .*\); use"):
        falls.budget_for(11.0)


@pytest.mark.parametrize("latency_ms", [10.4, 14.1, -1.0, float("nan")])
def test_a_latency_out_of_reach_is_refused(latency_ms: float) -> None:
    with pytest.raises(ValueError, match=r"expected 10.500 to 14.000 ms, the reachable range on NVIDIA H200, got"):
        TABLE.budget_for(latency_ms)


@pytest.mark.parametrize("ms", [(), (1.0, float("nan")), (-1.0,)])
def test_a_bad_latency_table_is_refused(ms: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"latency\.ms(\[\d\])?: expected .* number in \[0, 1e\+09\], got"):
        LatencyTable("cpu", ms, 1.0, 0.1)


def test_the_curve_interpolates_and_holds_its_ends() -> None:
    curve = KnobCurve((0.1, 0.5, 1.0), (2.0, -2.0, -6.0))
    for budget, knob in [(0, 2.0), (0.1, 2.0), (0.3, 0.0), (0.5, -2.0), (0.75, -4.0), (1, -6.0)]:
        assert curve.knob(budget) == pytest.approx(knob)
    assert KnobCurve((0.5,), (3.0,)).knob(0.9) == 3.0
    assert KnobCurve((0.2, 0.4), (1.0, 1.0)).knob(0.3) == 1.0


@given(
    budgets=st.lists(st.floats(0, 1), min_size=1, max_size=8, unique=True).map(sorted),
    steps=st.lists(st.floats(0, 5), min_size=8, max_size=8),
    pair=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    sign=st.sampled_from([1, -1]),
)
def test_the_curve_is_monotone(budgets: list[float], steps: list[float], pair: tuple[float, float], sign: int) -> None:
    knobs = [sign * sum(steps[:i]) for i in range(len(budgets))]
    curve = KnobCurve(tuple(budgets), tuple(knobs))
    low, high = (sign * curve.knob(budget) for budget in sorted(pair))
    # A convex combination may round by an ulp of its largest term, 40.
    assert low <= high + 1e-14 * 40


@pytest.mark.parametrize("budget", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_a_budget_outside_its_range_is_refused(budget: object) -> None:
    with pytest.raises(ValueError, match=r"budget: expected a share of the full adapter's cost in \[0, 1\], got"):
        KnobCurve((0.0, 1.0), (0.0, 1.0)).knob(budget)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("budgets", "knobs", "message"),
    [
        ((), (), "curve.budgets: expected a list of 1 to 4096, strictly ascending"),
        ((0.1, 0.2), (1.0,), "expected as many budgets as knobs, got 2 and 1"),
        ((0.1, 0.1), (1.0, 2.0), "curve.budgets: expected a list of 1 to 4096, strictly ascending"),
        ((0.1, 1.2), (1.0, 2.0), r"curve.budgets\[1\]: expected a number in \[0, 1\], got 1.2"),
        ((0.1, float("nan")), (1.0, 2.0), r"curve.budgets\[1\]: expected a number in \[0, 1\], got nan"),
        ((0.1, 0.2), (1.0, float("inf")), r"curve.knobs\[1\]: expected a number in .*, got inf"),
        ((0.1, 0.2, 0.3), (1.0, 3.0, 2.0), "curve.knobs: expected numbers that only rise or only fall"),
    ],
)
def test_a_bad_curve_is_refused(budgets: tuple, knobs: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnobCurve(budgets, knobs)

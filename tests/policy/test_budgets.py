"""What a saved policy makes of a budget: a knob, a rung, rows of a batch, and other ranks at the same shares."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from policy import (
    FULL_KV,
    PAGE_ACTIONS,
    FixedPolicy,
    KnobCurve,
    LatencyTables,
)
from tests.policy.checkpoints import (
    ALONE,
    COST,
    PRINTS,
    REFERENCE,
    RUNGS,
    SETTINGS,
    TABLE,
    TABLES,
    checkpoint,
)


def test_budget_goes_through_the_curve() -> None:
    learned = checkpoint()
    cheap, dear = learned.policy.knob_range()
    assert learned.knob_for(0.55) == pytest.approx((cheap + dear) / 2)
    assert learned.knob_for() == learned.knob_for(0.4)
    assert learned.knob_for(0) == cheap
    narrow = checkpoint(curve=KnobCurve((0.2, 0.9), (cheap, 0.0)))
    assert narrow.knob_for(1.0) == dear, "the full budget is the top rung, whatever was calibrated"


@pytest.mark.parametrize(("budget", "rung"), [(0, 0), (0.125, 0), (0.2499, 0), (0.25, 1), (0.99, 2), (1.0, 3)])
def test_fixed_takes_the_dearest_rung_within_the_budget(budget: float, rung: int) -> None:
    assert checkpoint("fixed", curve=None).knob_for(budget) == rung


def test_fixed_reaches_a_cost_that_float32_rounded_up() -> None:
    cost = (torch.tensor([8, 24, 48, 96]) / 96).tolist()
    fixed = checkpoint("fixed", curve=None, cost=cost)
    assert [fixed.knob_for(rank / 96) for rank in (8, 24, 48, 96)] == [0, 1, 2, 3]


def test_latency_becomes_a_budget() -> None:
    fixed = checkpoint("fixed", curve=None)
    # Costs are shares of bytes here, so a rung's latency must come back as that rung, not as its share of time.
    assert [fixed.knob_for(latency_budget_ms=ms) for ms in (10.5, 11.0, 13.0, 14.0)] == [0, 1, 2, 3]
    timed = checkpoint(cost=TABLE.cost())
    assert timed.knob_for(latency_budget_ms=12.0) == timed.knob_for(0.5)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"budget": 0.5, "latency_budget_ms": 12.0}, "expected budget or latency_budget_ms, got budget=0.5 and"),
        (
            {"latency": None},
            {"latency_budget_ms": 12.0},
            "expected a policy with a latency table, got none; use budget",
        ),
        (
            {},
            {"latency_budget_ms": 99.0},
            "expected 10.500 to 14.000 ms, the reachable range on NVIDIA H200 at batch 1, got 99.0",
        ),
        ({}, {"budget": -0.1}, r"budget: expected a share of the full adapter's cost in \[0, 1\], got -0.1"),
        ({}, {"budget": float("nan")}, r"budget: expected a share of the full adapter's cost in \[0, 1\], got nan"),
        (
            {"latency": LatencyTables((dataclasses.replace(TABLE, spread_ms=2.0),))},
            {"latency_budget_ms": 12.0},
            "expected rungs that differ by more than noise on NVIDIA H200, got",
        ),
        (
            {"latency": LatencyTables((dataclasses.replace(ALONE, spread_ms=2.0),), 1)},
            {"latency_budget_ms": 12.0},
            "expected rungs that differ by more than noise on NVIDIA H200 at batch 1, got",
        ),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(changes: dict, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint(**changes).knob_for(**arguments)


@pytest.mark.parametrize(
    ("chosen", "rows", "latency_ms"),
    [(1, None, 13.0), (32, None, 28.0), (1, 1, 13.0), (32, 1, 13.0), (1, 17, 28.0), (1, 32, 28.0)],
)
def test_milliseconds_are_those_of_the_bucket_that_the_rows_decode_in(chosen: int, rows: int | None, latency_ms: float):
    """Rung 2 takes 13 ms alone and 28 ms in a batch of 32, and either means the bytes of rung 2."""
    saved = checkpoint(latency=dataclasses.replace(TABLES, batch=chosen))
    assert saved.budget_for(latency_budget_ms=latency_ms, rows=rows) == COST[2]
    with pytest.raises(ValueError, match=r"expected (10.500 to 14|22.000 to 30).000 ms, the reachable range"):
        saved.budget_for(latency_budget_ms=41.0 - latency_ms, rows=rows)


@pytest.mark.parametrize("rows", [2, 16, 33])
def test_a_bucket_that_was_not_measured_is_refused(rows: int) -> None:
    message = (
        rf"latency_budget_ms: expected a batch in a bucket that was measured \(1, 32\), got {rows} rows; use budget"
    )
    with pytest.raises(ValueError, match=message):
        checkpoint().budget_for(latency_budget_ms=13.0, rows=rows)
    assert checkpoint(latency=REFERENCE).budget_for(latency_budget_ms=13.0, rows=rows) == COST[2], (
        "of any batch, as ever"
    )


def test_the_rung_of_a_budget_is_the_dearest_within_it():
    saved = checkpoint()
    assert [saved.rung_for(c) for c in saved.cost] == list(range(len(saved.cost)))
    assert saved.rung_for(0.0) == 0, "the cheapest when none is within"
    assert saved.rung_for((saved.cost[1] + saved.cost[2]) / 2) == 1


def test_rows_of_every_budget_start_within_it_and_only_the_whole_one_keeps_full_pages() -> None:
    saved = checkpoint()
    budgets, adapters = [0.125, 0.3, 1.0, 0.5], [0, 1, 1, 0]
    rows = saved.operating(budgets, adapters)
    assert rows.knob.tolist() == pytest.approx([saved.knob_for(budget) for budget in budgets])
    assert rows.start_rung.tolist() == [0, 1, 3, 2]
    assert rows.adapter.tolist() == adapters
    names = [(PAGE_ACTIONS[hard], PAGE_ACTIONS[easy]) for hard, easy in zip(rows.kv.hard, rows.kv.easy, strict=True)]
    own = (SETTINGS.kv.hard, SETTINGS.kv.easy)
    assert names == [own, own, (FULL_KV.hard, FULL_KV.easy), own]


def test_a_shared_policy_serves_other_ranks_at_the_same_shares() -> None:
    shared = checkpoint(fingerprints=PRINTS | {"shared": True})
    assert shared.rungs_for(16) == RUNGS
    assert shared.rungs_for(64) == (8, 16, 32, 64)
    shared.check(model="m-1", adapter="another", rungs=(8, 16, 32, 64))
    assert shared.rungs_for(12) == (1.5, 3, 6, 12)
    shared.check(model="m-1", adapter="another", rungs=(1.5, 3, 6, 12))
    with pytest.raises(ValueError, match=r"rungs: expected \(2, 4, 8, 16\), got \(8, 32, 48, 64\)"):
        shared.check(model="m-1", adapter="another", rungs=(8, 32, 48, 64))
    assert checkpoint().rungs_for(64) == RUNGS, "one adapter's own rungs stay what they are"


def test_shares_are_the_same_but_for_rounding() -> None:
    """Thirds of a rank have no float; neither has what a user writes of them."""
    shared = checkpoint(
        "fixed", policy=FixedPolicy((1, 2, 3)), curve=None, cost=(1 / 3, 2 / 3, 1), latency=None,
        fingerprints=PRINTS | {"shared": True},
    )  # fmt: skip
    assert shared.rungs_for(8) == (8 / 3, 16 / 3, 8)
    for rungs in ((8 / 3, 16 / 3, 8), (2.666667, 5.333333, 8), (10 / 3, 20 / 3, 10)):
        shared.check(model="m-1", adapter="another", rungs=rungs)
    for rungs in ((2.6667, 5.3334, 8), (8 / 3, 8), (3, 5, 8)):
        with pytest.raises(ValueError, match=r"rungs: expected \(1, 2, 3\), got "):
            shared.check(model="m-1", adapter="another", rungs=rungs)

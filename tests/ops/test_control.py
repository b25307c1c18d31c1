"""The controller's kernel decides what a `Stream` decides, step by step: rung, weight, and all that a row remembers."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from policy import (
    ChunkSettings,
    FixedPolicy,
    LearnedPolicy,
    PercentilePolicy,
    RankPolicy,
    Settings,
)
from policy.difficulty import NEUTRAL
from policy.settings import AGE, LOOKS, PAPER_SIGNALS, SIGNALS
from runtime.engine.control import MOST_HIDDEN, MOST_RUNGS, Controller, Ladders, why_not
from runtime.ops.resolve import Rows
from tests.runtime.reference import drawn_tables

from .driven import (
    FIRST,
    HEADS,
    INF,
    PLACES,
    PROBES,
    RUNGS,
    SECOND,
    VOCABULARY,
    Driver,
    check_untouched,
    fixed,
    learned,
)


@pytest.mark.parametrize(
    ("signals", "hidden", "seed", "window", "steps"),
    [
        ((*SIGNALS, AGE), 48, 22, 13, 60),
        (PAPER_SIGNALS, 5, 36, 3, 12),
        (("attention", "surprisal"), 17, 25, 1, 12),
        (("novelty", "pair"), 63, 17, 100, 12),
        (("entropy", "prior", "difficulty", AGE), 33, 3, 28, 12),
    ],
)
def test_every_step_of_a_learned_policy_is_the_streams(device, signals, hidden, seed, window, steps):
    driver = Driver(learned(signals, hidden, seed), window, device)
    driver.admit(FIRST)
    rungs, second = [], max(4, steps - 16)
    for step in range(steps):
        if step == second:
            driver.admit(SECOND)
        driver.step()
        rungs.append(driver.rows.rung.tolist())
        check_untouched(driver, [3, 6] if step >= second else [1, 2, 3, 6])
    # so that the comparison says something: rows move, and not by their budgets alone
    chosen = [set(own) for own in zip(*rungs[second:], strict=True)]
    assert min(len(chosen[4]), len(chosen[0])) > 1, chosen
    assert min(chosen[4]) < len(RUNGS) - 1, "the top rung's scale is 1 whatever the network says"


def test_a_window_longer_than_a_tile_is_looked_through_to_its_end(device, monkeypatch):
    """A text that repeats itself after 290 tokens, in a window of 300."""
    driver = Driver(learned(("novelty", "entropy")), 300, device)
    text = iter((VOCABULARY * driver.draw(290, 3)).long().repeat(2, 1))

    def repeated(rows: int, *columns: int) -> Tensor:
        return torch.stack([next(text) for _ in range(*columns or (1,))], 1).view(rows, *columns)

    monkeypatch.setattr(driver, "draw_tokens", repeated)
    driver.admit(replace(FIRST, prompts=(320, 320, 320)))
    for _ in range(4):
        driver.step()
    assert not driver.controller.state.gathered[[4, 0, 5], 0, SIGNALS.index("novelty")].any()


def test_the_dear_end_of_the_knob_is_the_top_rung_whatever_was_learned(device):
    policy = learned(("entropy",))
    policy.damage_unit.fill_(1e-6)
    with torch.no_grad():
        policy.damage_head.bias.fill_(-100.0)
    driver = Driver(policy, 8, device)
    driver.admit(replace(FIRST, knobs=(-14.0, -60.0, -13.0), budgets=(INF,) * 3, unread=0))
    driver.step()
    driver.step()
    assert driver.rows.rung[[4, 0]].tolist() == [4, 4]
    assert driver.rows.rung[5] < 4


def test_attention_need_not_be_measured_for_who_does_not_look_at_it(device):
    driver = Driver(learned(("entropy", "novelty", AGE), 12), 8, device)
    driver.admit(SECOND)
    for _ in range(5):
        driver.step(hears=False)
    with pytest.raises(AssertionError, match="who looks at attention is given it"):
        Driver(learned(PAPER_SIGNALS), 8, device).step(hears=False)


def test_a_place_is_taken_again(device):
    """What the row before has left is neither seen nor paid for."""
    driver = Driver(learned(), 11, device)
    driver.admit(FIRST)
    addresses = [getattr(driver.controller.state, f.name).data_ptr() for f in fields(driver.controller.state)]
    for _ in range(6):
        driver.step()
    driver.running.clear()
    again = replace(SECOND, places=(5, 0))
    driver.admit(again)
    # Of a row that has just come the stream has taken in what the model has put out.
    driver.entropy[[5, 0]] = float("nan")
    driver.distant[:, [5, 0]] = float("nan")
    driver.rows.slot[4] = -1
    for _ in range(5):
        driver.step()
        assert driver.rows.weight[4] == 0
    assert driver.controller.state.step.tolist() == [5, 0, 0, 0, 6, 5, 0]
    assert addresses == [getattr(driver.controller.state, f.name).data_ptr() for f in fields(driver.controller.state)]


def test_a_fixed_policy_keeps_budget_and_prompt(device):
    """A start rung of its own for what is left of the prompt, and no more than is in memory or can be paid for."""
    driver = Driver(fixed(), 8, device)
    driver.admit(replace(FIRST, knobs=(2.4, 3.0, 4.0), resident=(4, 4, 3)))
    rungs = []
    for _ in range(32):
        driver.step()
        rungs.append(driver.rows.rung[[4, 0, 5]].tolist())
    capped, paid = [own[0] for own in rungs], {own[1] for own in rungs[3:]}
    assert capped == [3] * 3 + [2] * 29
    assert len(paid) > 1


def test_a_static_row_has_its_rung_without_a_step(device):
    driver = Driver(fixed(), 8, device)
    driver.admit(replace(FIRST, knobs=(2.0, 0.0, 9.0), starts=(2, 0, 4), budgets=(INF,) * 3, unread=0))
    index, stream, found = driver.running[0].index, driver.running[0].stream, []
    assert stream.static == [2, 0, 4]
    for _ in range(2):
        found.append((driver.rows.rung[index].tolist(), driver.rows.weight[index].tolist()))
        driver.controller.step(driver.tokens, driver.entropy, driver.surprisal)
    assert found[0] == found[1]
    expected = fixed().scales[stream.static] * driver.scales.cpu()[[0, 1, 2], stream.static]
    assert found[0] == ([2, 0, 4], expected.tolist())


EACH = {name: 1.0 + i for i, name in enumerate(SIGNALS)}
"""A weight of its own for every signal."""
THIRD = replace(FIRST, prompts=(14, 30, 0), unread=5)
"""Rows that begin pages one after the other, one of them in the prompt that is decoded."""


@pytest.mark.parametrize(
    ("policy", "weights", "steps"),
    [
        (learned(), EACH, 38),
        (learned(("entropy", "novelty")), {"attention": 1.0, "pair": 0.5}, 8),
        (fixed(), EACH, 38),
        (fixed(), None, 20),
        (fixed(), {"surprisal": 2.0, "difficulty": 1.0, "prior": 0.25}, 20),
        (fixed(), {"surprisal": 1.0}, 5),
    ],
)
def test_every_pages_complexity_is_the_streams(device, policy, weights, steps):
    driver = Driver(policy, 13, device, pages=6, weights=weights)
    driver.admit(THIRD)
    second = steps // 2
    for step in range(steps):
        if step == second:
            driver.admit(SECOND)
        driver.step()
        check_untouched(driver, [3, 6] if step >= second else [1, 2, 3, 6])
    # so that the comparison says something
    assert driver.running[0].sums[:, 0].all() == (weights != {"surprisal": 1.0})


def test_pages_of_a_place_that_is_taken_again_go_on_from_what_they_are_given(device):
    driver = Driver(fixed(), 8, device, pages=4)
    driver.admit(THIRD)
    for _ in range(20):
        driver.step()
    # A place that nobody is in stands still, whatever it was.
    driver.rows.slot[0] = -1
    left = driver.complexity[0].clone()
    driver.running.clear()
    driver.admit(replace(THIRD, places=(5, 4, 1)))
    driver.entropy[[5, 4, 1]] = float("nan")
    driver.distant[:, [5, 4, 1]] = float("nan")
    # Beside so much a float32 sum would see no token.
    driver.complexity[[5, 4, 1]] += 2**24
    driver.running[0].sums.add_(2**24)
    for _ in range(4):
        driver.step()
        assert torch.equal(driver.complexity[0], left)
    stream = driver.running[0].stream
    driver.controller.load(driver.running[0].index, stream, driver.rows.slot[[5, 4, 1]].clone())
    assert not driver.complexity[[5, 4, 1]].any(), "given nothing, it begins anew"
    assert torch.equal(driver.complexity[0], left)


def test_nothing_is_added_beyond_the_last_page(device):
    """Which would be the first one of the next row."""
    driver = Driver(fixed(), 8, device, pages=1)
    driver.admit(replace(THIRD, prompts=(14, 12, 15)))
    for _ in range(8):
        driver.step()
        check_untouched(driver, [1, 2, 3, 6])
    assert (driver.running[0].sums[:, 1] > 0).all()


def test_attention_is_needed_where_pages_are_judged_by_it(device):
    driver = Driver(fixed(), 8, device, pages=4, weights={**EACH, "attention": 0.0})
    driver.admit(THIRD)
    for _ in range(4):
        driver.step(hears=False)
    with pytest.raises(AssertionError, match="who looks at attention is given it"):
        Driver(fixed(), 8, device, pages=4).step(hears=False)


STEPS = 6


def traced(device: torch.device, trace: Tensor | None, policy: RankPolicy) -> tuple[Tensor, Tensor, Tensor]:
    """Rungs [STEPS + 2, B], weights and the log [B, STEPS] of a run that goes on for two steps beyond that."""
    guarded = torch.full((PLACES * STEPS + 8,), -5, dtype=torch.int16, device=device)
    log = guarded[: PLACES * STEPS].view(PLACES, STEPS)
    driver = Driver(policy, 8, device, trace=trace, log=log)
    driver.admit(replace(FIRST, places=(6, 0, 5), budgets=(INF, INF, 0.125), unread=0))
    found = []
    for _ in range(STEPS + 2):
        driver.controller.step(driver.tokens, driver.entropy, driver.surprisal, driver.distant)
        driver.entropy[:], driver.distant[:] = driver.draw(PLACES), driver.draw(PROBES, PLACES, HEADS)
        driver.tokens[:], driver.surprisal[:] = driver.draw_tokens(PLACES), driver.draw(PLACES)
        found.append((driver.rows.rung.clone(), driver.rows.weight.clone()))
    assert (guarded[PLACES * STEPS :] == -5).all(), "written beyond the log"
    rungs, weights = (torch.stack(own) for own in zip(*found, strict=True))
    return rungs, weights, log


def test_the_log_has_every_step_and_nothing_beyond(device):
    rungs, _, log = traced(device, None, learned())
    used = [0, 5, 6]
    assert torch.equal(log[used].int(), rungs.T[used, :STEPS])
    assert (log[[1, 2, 3, 4]] == -5).all()
    assert len(log[used].unique()) > 2


def test_a_trace_replaces_what_was_decided_where_it_says_something(device):
    policy = learned()
    free, weights, _ = traced(device, None, policy)
    trace = torch.full((PLACES, STEPS), -1, dtype=torch.int16)
    trace[6, 1], trace[6, 4], trace[0, 0], trace[5, STEPS - 1] = 0, 4, 2, 4
    rungs, forced_weights, log = traced(device, trace.to(device), policy)
    for row in (6, 0):  # without a budget the steps that nothing is said of stay as they were
        expected = torch.where(trace[row] >= 0, trace[row].int(), free[:STEPS, row].cpu())
        assert rungs[:STEPS, row].tolist() == expected.tolist() == log[row].tolist()
        same = (rungs == free)[:, row]
        assert torch.equal(forced_weights[same, row], weights[same, row])
    assert forced_weights[4, 6] == 1, "the top rung has scale 1"
    assert rungs[STEPS - 1, 5] == 4
    assert (rungs[STEPS:] == free[STEPS:])[:, [0, 6]].all()


def test_what_a_trace_reads_is_paid_for(device):
    """At a budget of the least rung's cost one dear token leaves too little of the bucket for others."""
    trace = torch.full((PLACES, STEPS), -1, dtype=torch.int16, device=device)
    driver = Driver(learned(), 8, device, trace=trace)
    driver.admit(replace(FIRST, budgets=(0.125, INF, INF), unread=0))
    trace[4] = 4
    balance = driver.controller.state.balance
    before = balance[4].item()
    for _ in range(2):
        driver.controller.step(driver.tokens, driver.entropy, driver.surprisal, driver.distant)
        driver.entropy[:], driver.distant[:] = 0.5, 0.5
    assert balance[4].item() == before - 2 * (1 - 0.125)


def test_a_slot_is_written_over_by_a_ladder_of_fewer_rungs_and_other_ids(device):
    ladders = Ladders.of(2, 5, len(RUNGS), device)
    long, short = drawn_tables(3, 9), drawn_tables(4, 2, 100)
    for slot, difficulty, scales in ((1, long, [0.5, 0.6, 0.7, 0.8, 1.0]), (1, short, [0.9, 1.0]), (0, long, [1.0])):
        ladders.put(slot, difficulty, torch.tensor(scales))
    assert ladders.token.tolist() == [long.token[:5].tolist(), [*short.token.tolist(), NEUTRAL, NEUTRAL, NEUTRAL]]
    assert torch.equal(ladders.pair[0].cpu(), long.pair)
    assert torch.equal(ladders.pair[1, :100].cpu(), short.pair)
    assert (ladders.pair[1, 100:] == NEUTRAL).all()
    torch.testing.assert_close(ladders.scale.cpu(), torch.tensor([[1.0] * 5, [0.9, 1.0, 1.0, 1.0, 1.0]]))


@pytest.mark.parametrize(
    ("policy", "settings", "clause"),
    [
        (learned(), Settings(), None),
        (learned(PAPER_SIGNALS, MOST_HIDDEN), Settings(), None),
        (fixed(), Settings(), None),
        (PercentilePolicy(RUNGS, "entropy"), Settings(), "it is of the kind percentile, not learned or fixed"),
        (LearnedPolicy(RUNGS, signals=LOOKS, width=4), Settings(), "it looks at the model's hidden states"),
        (learned(), Settings(chunk=ChunkSettings(1, 2)), "its chunks are longer than one token"),
        (fixed(), Settings(chunk=ChunkSettings(4, 4), fade_tokens=4), "its chunks are longer than one token"),
        (LearnedPolicy(RUNGS, MOST_HIDDEN + 1), Settings(), f"its network is wider than {MOST_HIDDEN} units"),
        (FixedPolicy(range(1, MOST_RUNGS + 2)), Settings(), f"it has more than {MOST_RUNGS} rungs"),
    ],
)
def test_what_is_not_covered_is_refused_in_a_clause(device, policy, settings, clause):
    assert why_not(policy, settings) == clause
    rows = Rows(*(torch.zeros(1, dtype=kind, device=device) for kind in (torch.int32, torch.int32, torch.float32)))
    ladders = Ladders.of(1, 4, len(policy.rungs), device)
    if clause is None:
        Controller(policy, settings, rows, ladders)
        return
    with pytest.raises(ValueError, match=f"policy: expected one that the fast path covers.*{clause}"):
        Controller(policy, settings, rows, ladders)

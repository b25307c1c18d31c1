"""Percentile thresholds: what a percentile is, of which value, and which rung follows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from policy import SIGNALS, TOKEN_SIGNALS, PercentilePolicy
from tests.policy.summaries import DEFAULT_RUNGS, RUNGS, summary


def test_percentile_of_continuous_values_is_their_rank() -> None:
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)) ** 3
    policy = PercentilePolicy.calibrate(values, DEFAULT_RUNGS, "entropy")
    probe = torch.tensor([-1.0, 0.001, 0.1, 0.5, 2.0])
    expected = torch.stack([(values < value).float().mean() for value in probe])
    # Between two of 101 quantiles the distribution is taken as straight: at most one step of 0.01 off.
    torch.testing.assert_close(policy.percentile(probe), expected, atol=0.01, rtol=0)


def test_percentile_of_tied_values_is_the_middle_of_the_tie() -> None:
    policy = PercentilePolicy.calibrate(torch.tensor([0.0] * 60 + [1.0] * 40), DEFAULT_RUNGS, "prior")
    below, zero, one, above = policy.percentile(torch.tensor([-0.1, 0.0, 1.0, 1.1])).tolist()
    assert (below, above) == (0, 1)
    assert zero == pytest.approx(0.3, abs=0.01)
    assert one == pytest.approx(0.8, abs=0.01)
    constant = PercentilePolicy.calibrate(torch.full((9,), 0.25), DEFAULT_RUNGS, "prior")
    assert constant.percentile(torch.tensor([0.25])).tolist() == [0.5]


@given(values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
@examples(max_examples=50, deadline=None, derandomize=True)
def test_percentile_never_falls(values: list[float]) -> None:
    policy = PercentilePolicy.calibrate(torch.tensor(values), DEFAULT_RUNGS, "entropy")
    percentile = policy.percentile(torch.linspace(-0.1, 1.1, 200))
    assert bool((percentile.diff() >= 0).all())
    assert 0 <= float(percentile.min()) <= float(percentile.max()) <= 1


def test_percentile_reads_its_signal_or_the_weighted_mean_of_the_known_ones() -> None:
    weights = dict(zip(SIGNALS, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), strict=True))
    whole = summary(3)
    whole.valid[:] = torch.tensor([[True] * 7, [True, False, True, *[False] * 4], [False] * 7])
    mean = whole.stats[..., 0]
    value, known = PercentilePolicy(DEFAULT_RUNGS, "complexity", weights=weights).value(whole)
    expected = torch.stack([(mean[0] * torch.arange(1, 8)).sum() / 28, (mean[1, 0] + 3 * mean[1, 2]) / 4])
    torch.testing.assert_close(value[:2], expected)
    assert known.tolist() == [True, True, False]
    value, known = PercentilePolicy(DEFAULT_RUNGS, SIGNALS[2]).value(whole)
    assert torch.equal(value[:2], mean[:2, 2])
    assert known.tolist() == [True, True, False]


def test_complexity_is_by_default_that_of_the_four_signals_of_the_paper() -> None:
    whole = summary(8)
    whole.valid[:] = True
    columns = [SIGNALS.index(name) for name in ("entropy", "attention", "novelty", "prior")]
    value, _ = PercentilePolicy(DEFAULT_RUNGS, "complexity").value(whole)
    torch.testing.assert_close(value, whole.stats[:, columns, 0].mean(1))


@pytest.mark.parametrize("signal", SIGNALS)
@given(seed=st.integers(0, 999))
@examples(max_examples=20)
def test_the_other_sign_mirrors_the_band(signal: str, seed: int) -> None:
    """About a knob in the middle of a scale without ends, rungs above it become as many below."""
    wide, values = [*range(1, 1000)], torch.rand(500, generator=torch.Generator().manual_seed(seed)) ** 2
    up, down = (PercentilePolicy.calibrate(values, wide, signal, spread=300.0, sign=sign) for sign in (1, -1))
    whole, knob = summary(64, seed), torch.full((64,), 500.0)
    above, below = up.decide(whole, knob).rung - 500, down.decide(whole, knob).rung - 500
    assert torch.equal(above, -below)
    known = whole.valid[:, SIGNALS.index(signal)]
    assert bool((above[~known] == 0).all())
    assert float(above[known].float().std()) > 50
    assert torch.equal(up.swing(*up.value(whole)), -down.swing(*down.value(whole)))
    assert up.knob_range() == down.knob_range()


@pytest.mark.parametrize("signal", TOKEN_SIGNALS)
def test_percentile_of_the_token_takes_its_own_value(signal: str) -> None:
    whole, own = summary(50), TOKEN_SIGNALS.index(signal)
    policy = PercentilePolicy(DEFAULT_RUNGS, signal, spread=3.0, of="token")
    # Nothing but the token itself, which is always known.
    blank = dataclasses.replace(
        whole, stats=torch.full_like(whole.stats, float("nan")), valid=torch.zeros_like(whole.valid),
        first=torch.full_like(whole.first, float("nan")),
    )  # fmt: skip
    blank.first[:, own] = whole.first[:, own]
    value, known = policy.value(blank)
    assert bool(known.all())
    assert torch.equal(value, whole.first[:, own])
    # Without calibration the percentile is the value itself.
    expected = (4 + 3 * (2 * whole.first[:, own] - 1)).round().long()
    for asked in (whole, blank):
        assert policy.decide(asked, torch.full((50,), 4.0)).rung.tolist() == expected.tolist()
    assert expected.unique().numel() > 5


@pytest.mark.parametrize("signal", [name for name in (*SIGNALS, "complexity") if name not in TOKEN_SIGNALS])
def test_a_token_has_no_value_yet_of_what_the_model_puts_out(signal: str) -> None:
    message = f"^of: expected chunk: {signal} is not known of a token before it is processed, got 'token'; correct it$"
    for make in (PercentilePolicy, lambda *args, **kwargs: PercentilePolicy.calibrate(torch.ones(3), *args, **kwargs)):
        with pytest.raises(ValueError, match=message):
            make(DEFAULT_RUNGS, signal, of="token")


@given(low=st.floats(0, 1, width=32), high=st.floats(0, 1, width=32), knob=st.floats(0, RUNGS - 1))
def test_percentile_gives_a_harder_chunk_no_lower_rung(low: float, high: float, knob: float) -> None:
    policy = PercentilePolicy(DEFAULT_RUNGS, "entropy", spread=3.0)
    whole = summary(2)
    whole.valid[:] = True
    whole.stats[:, SIGNALS.index("entropy"), 0] = torch.tensor(sorted((low, high)))
    easy, hard = policy.decide(whole, torch.full((2,), knob)).rung.tolist()
    assert easy <= hard
    whole.stats[:, SIGNALS.index("entropy"), 0] = torch.tensor([0.1, 0.9])
    easy, hard = policy.decide(whole, torch.full((2,), 4.0)).rung.tolist()
    assert easy < 4 < hard


def test_percentile_leaves_the_knob_alone_where_nothing_is_known() -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(7)) ** 2
    policy, whole = PercentilePolicy.calibrate(values, DEFAULT_RUNGS, "complexity", spread=2.5), summary(4)
    whole.valid[:] = False
    assert policy.decide(whole, torch.full((4,), 4.0)).rung.tolist() == [4] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PercentilePolicy(DEFAULT_RUNGS, "luck"), "signal: expected one of entropy, .*complexity, got 'luck'"),
        (
            lambda: PercentilePolicy(DEFAULT_RUNGS, "prior", spread=-1),
            r"spread: expected a number in \[0, 1024\]",
        ),
        (
            lambda: PercentilePolicy(DEFAULT_RUNGS, "prior", torch.ones(3)),
            "grid: expected 101 ascending finite numbers",
        ),
        (lambda: PercentilePolicy(DEFAULT_RUNGS, "prior", torch.linspace(1, 0, 101)), "grid: expected 101 ascending"),
        (
            lambda: PercentilePolicy.calibrate(torch.ones(0), DEFAULT_RUNGS, "prior"),
            "values: expected at least one finite",
        ),
        (
            lambda: PercentilePolicy(DEFAULT_RUNGS, "age"),
            "signal: expected one of entropy, .*complexity, got 'age'",
        ),
        (lambda: PercentilePolicy(DEFAULT_RUNGS, "prior", sign=0), "sign: expected one of 1, -1, got 0"),
        (lambda: PercentilePolicy(DEFAULT_RUNGS, "prior", of="page"), "of: expected one of chunk, token, got 'page'"),
    ],
)
def test_bad_arguments_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

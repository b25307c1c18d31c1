"""The learned policy: what holds by construction, and that it can learn a rule that the signals carry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from policy import LearnedPolicy, Summary
from policy.rungs import rungs_of_rank

DEFAULT_RUNGS = rungs_of_rank(64)
RUNGS = len(DEFAULT_RUNGS)
COST = torch.tensor(DEFAULT_RUNGS) / 64


def noise(policy: LearnedPolicy, size: float) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter), alpha=size)


def planted(count: int) -> tuple[Tensor, Tensor]:
    """Features, and damage that grows a hundredfold as the mean entropy goes from 0 to 1."""
    features = torch.rand(count, Summary.FEATURES)
    return features, 0.005 * 100 ** features[:, :1] * (1 / COST - 1)


def test_a_few_thousand_parameters() -> None:
    assert 2000 < sum(parameter.numel() for parameter in LearnedPolicy(DEFAULT_RUNGS).parameters()) < 6000


def test_it_starts_as_the_best_policy_that_ignores_the_text() -> None:
    torch.manual_seed(0)
    policy = LearnedPolicy(DEFAULT_RUNGS)
    features, damage = planted(500)
    policy.calibrate(features, damage)
    for log_lambda in (-6.0, -3.0, 0.0, 1.0):
        logits, scale = policy.logits(features, torch.full((500,), log_lambda))
        best = (damage.mean(0) + math.exp(log_lambda) * COST).argmin()
        assert bool((logits.argmax(1) == best).all())
        assert bool((scale == 1).all())


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_the_top_rung_is_exact_and_scales_stay_in_range(size: float) -> None:
    torch.manual_seed(1)
    policy = LearnedPolicy(DEFAULT_RUNGS, scale_range=0.2)
    noise(policy, size)
    log_lambda = torch.linspace(-50, 50, 64)
    features = torch.rand(64, Summary.FEATURES)
    damage, scale = policy.predict(features, log_lambda)
    logits, same = policy.logits(features, log_lambda)
    assert damage.shape == scale.shape == logits.shape == (64, RUNGS)
    assert bool(logits.isfinite().all())
    assert torch.equal(scale, same)
    assert bool((damage[:, -1] == 0).all())
    assert bool((damage.diff(dim=1) <= 0).all())
    assert bool((scale[:, -1] == 1).all())
    assert bool(((scale - 1).abs() <= 0.2 + 1e-6).all())


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_lambda_never_raises_the_expected_cost(seed: int) -> None:
    torch.manual_seed(seed)
    policy = LearnedPolicy(DEFAULT_RUNGS)
    noise(policy, 0.5)
    with torch.no_grad():
        policy.trunk[0].weight[:, -1] = 0
    features = torch.rand(32, Summary.FEATURES)
    previous = torch.full((32,), 2.0, dtype=torch.float64)
    for log_lambda in torch.linspace(-15, 8, 100).tolist():
        with torch.no_grad():
            logits, _ = policy.logits(features, torch.full((32,), log_lambda))
        expected = (logits.double().softmax(1) * COST.double()).sum(1)
        # 1e-5: logits are float32, and at the dear end their size is of the order of 1e7.
        assert bool((expected <= previous + 1e-5).all())
        previous = expected


def test_the_dear_end_is_the_top_rung_whatever_was_learned() -> None:
    torch.manual_seed(2)
    policy = LearnedPolicy(DEFAULT_RUNGS)
    noise(policy, 5.0)
    features = torch.randn(500, Summary.FEATURES) * 3
    policy.damage_unit.fill_(1e-12)
    logits, _ = policy.logits(features, torch.full((500,), policy.knob_range()[1]))
    assert bool((logits.argmax(1) == RUNGS - 1).all())


def test_it_learns_a_planted_rule() -> None:
    torch.manual_seed(3)
    policy = LearnedPolicy(DEFAULT_RUNGS)
    features, damage = planted(2000)
    log_lambda = torch.empty(2000).uniform_(-5, 1)
    policy.calibrate(features, damage, log_lambda)
    optimiser = torch.optim.Adam(policy.parameters(), lr=1e-2)

    def objective(log_lambda: Tensor) -> Tensor:
        logits, scale = policy.logits(features, log_lambda)
        # A scale of 1.1 takes a tenth off the damage of a truncated rung.
        helped = damage * (0.9 + 10 * (scale - 1.1) ** 2)
        return (logits.softmax(1) * (helped + log_lambda.exp()[:, None] * COST)).sum(1) / log_lambda.exp()

    price = log_lambda.exp()[:, None]
    least = ((0.9 * damage + price * COST) / price).min(1).values.mean().item()
    before = objective(log_lambda).mean().item()
    for _ in range(150):
        optimiser.zero_grad()
        objective(log_lambda).mean().backward()
        optimiser.step()
    after = objective(log_lambda).mean().item()
    assert after - least < 0.2 * (before - least), "four fifths of what can be gained"

    fresh, fresh_damage = planted(1000)
    for value in (-3.0, -1.0):
        with torch.no_grad():
            logits, scale = policy.logits(fresh, torch.full((1000,), value))
        rung = logits.argmax(1, keepdim=True)
        total = 0.9 * fresh_damage + math.exp(value) * COST
        blind, best = total.mean(0).min(), total.min(1).values.mean()
        chosen = total.gather(1, rung).mean()
        assert float(chosen - best) < 0.2 * float(blind - best), "the same on text it has not seen"
        assert float((scale.gather(1, rung)[rung < RUNGS - 1] - 1.1).abs().mean()) < 0.05


def test_calibration_takes_constant_features_and_damage_that_rises() -> None:
    policy = LearnedPolicy(DEFAULT_RUNGS)
    features, damage = planted(50)
    features[:, 12:16] = 1
    damage[:, 3] = damage[:, 2] + 1
    policy.calibrate(features, damage, torch.linspace(-4, 2, 50))
    assert bool((policy.feature_std[12:16] == 1).all())
    assert bool((policy.damage_unit > 0).all())
    assert float(policy.log_lambda_centre) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden": 0}, r"hidden: expected a whole number in \[1, 8192\], got 0"),
        ({"scale_range": 1.0}, r"scale_range: expected a number in \[0, 1\), got 1.0"),
        ({"log_lambda_range": (1, 0)}, r"log_lambda_range: expected a list of 2, strictly ascending, .*, got \(1, 0\)"),
        ({"cost": torch.ones(2)}, r"cost: expected 9 ascending numbers in \[0, 1\] ending in 1"),
        ({"cost": torch.linspace(1, 0, RUNGS)}, r"cost: expected 9 ascending numbers in \[0, 1\] ending in 1"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedPolicy(DEFAULT_RUNGS, **kwargs)


def test_one_rung_is_no_choice() -> None:
    with pytest.raises(
        ValueError, match=r"rungs: expected at least two to choose from, got \(8,\); use a fixed policy"
    ):
        LearnedPolicy((8,))


def test_bad_training_data_is_refused() -> None:
    policy = LearnedPolicy(DEFAULT_RUNGS)
    features, damage = planted(5)
    with pytest.raises(ValueError, match=r"expected \[N, 18\] and \[N, 9\], got \(5, 18\) and \(5, 8\)"):
        policy.calibrate(features, damage[:, 1:])
    damage[0, 0] = float("nan")
    with pytest.raises(ValueError, match="features, damage: expected finite numbers"):
        policy.calibrate(features, damage)

"""The learned policy: what holds by construction, and that it can learn a rule that the signals carry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from policy import SIGNALS, FixedPolicy, LearnedPolicy, Summary
from policy.contract import feature_columns
from policy.difficulty import PAIRS, Difficulty
from policy.rungs import rungs_of_rank
from policy.settings import AGE, LOOKS, PAPER_SIGNALS

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


def seeing(width: int = 6) -> LearnedPolicy:
    """One that looks at the model's states, no longer blind."""
    torch.manual_seed(2)
    policy = LearnedPolicy(DEFAULT_RUNGS, signals=LOOKS, width=width)
    noise(policy, 0.3)
    return policy


def test_states_are_looked_at_by_direction_and_only_where_asked() -> None:
    policy, blind = seeing(), LearnedPolicy(DEFAULT_RUNGS)
    noise(blind, 0.3)
    features = torch.rand(5, Summary.FEATURES + 12)
    other = features.clone()
    other[:, Summary.FEATURES :] = torch.randn(5, 12)
    longer = features.clone()
    longer[:, Summary.FEATURES :] *= 3  # normalised: how long a state is says nothing
    assert not torch.allclose(policy.damage(features), policy.damage(other))
    torch.testing.assert_close(policy.damage(features), policy.damage(longer), rtol=1e-3, atol=1e-6)
    assert torch.equal(blind.damage(features), blind.damage(other))


def test_a_state_that_is_not_there_yet_is_finite() -> None:
    policy = seeing()
    assert bool(policy.damage(torch.zeros(2, Summary.FEATURES + 12)).isfinite().all())
    assert policy.wants_hidden
    assert not LearnedPolicy(DEFAULT_RUNGS).wants_hidden


@pytest.mark.parametrize(("signals", "width"), [(LOOKS, 0), ((*SIGNALS, AGE), 6)])
def test_states_have_a_width_and_nothing_else_has(signals: tuple[str, ...], width: int) -> None:
    with pytest.raises(ValueError, match="width: expected"):
        LearnedPolicy(DEFAULT_RUNGS, signals=signals, width=width)


def test_normalisers_are_set_with_states_beside_them() -> None:
    features, damage = planted(40)
    wide = torch.cat([features, torch.randn(40, 12)], 1)
    policy, blind = seeing(), LearnedPolicy(DEFAULT_RUNGS)
    for own in (policy, blind):
        own.calibrate(wide, damage)
        torch.testing.assert_close(own.feature_mean, features[:, own.columns].mean(0))
    with pytest.raises(ValueError, match=rf"expected \[N, {Summary.FEATURES + 12}\]"):
        policy.calibrate(features, damage)


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
    features[:, 21:28] = 1
    damage[:, 3] = damage[:, 2] + 1
    policy.calibrate(features, damage, torch.linspace(-4, 2, 50))
    assert bool((policy.feature_std[21:28] == 1).all())
    assert bool((policy.damage_unit > 0).all())
    assert float(policy.log_lambda_centre) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden": 0}, r"hidden: expected a whole number in \[1, 8192\], got 0"),
        ({"scale_range": 1.0}, r"scale_range: expected a number in \[0, 1\), got 1.0"),
        ({"log_lambda_range": (1, 0)}, r"log_lambda_range: expected a list of 2, strictly ascending, .*, got \(1, 0\)"),
        ({"signals": ()}, r"signals: expected a list of some of entropy, .*, each once, got \(\)"),
        ({"signals": ("entropy", "luck")}, r"signals: expected a list of some of .*, got \('entropy', 'luck'\)"),
        ({"vocabulary": -1}, r"vocabulary: expected a whole number in \[0, 16777216\], got -1"),
        ({"vocabulary": 1.0}, r"vocabulary: expected a whole number in \[0, 16777216\], got 1.0"),
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
    with pytest.raises(ValueError, match=r"expected \[N, 33\] and \[N, 9\], got \(5, 33\) and \(5, 8\)"):
        policy.calibrate(features, damage[:, 1:])
    damage[0, 0] = float("nan")
    with pytest.raises(ValueError, match="features, damage: expected finite numbers"):
        policy.calibrate(features, damage)


SUBSETS = [*((name,) for name in (*SIGNALS, AGE)), PAPER_SIGNALS, ("age", "pair", "entropy")]


@pytest.mark.parametrize("signals", SUBSETS)
def test_what_it_does_not_look_at_changes_nothing(signals: tuple[str, ...]) -> None:
    torch.manual_seed(4)
    policy = LearnedPolicy(DEFAULT_RUNGS, signals=signals)
    features, damage = planted(200)
    others = [column for column in range(Summary.FEATURES) if column not in feature_columns(signals)]
    changed = features.clone()
    changed[:, others] = torch.randn(200, len(others))
    policy.calibrate(features, damage)
    mean, std = policy.feature_mean.clone(), policy.feature_std.clone()
    policy.calibrate(changed, damage)
    assert torch.equal(policy.feature_mean, mean)
    assert torch.equal(policy.feature_std, std)

    noise(policy, 1.0)
    changed[:, others] = float("nan")
    log_lambda = torch.linspace(-5, 2, 200)
    for one, other in zip(policy.logits(features, log_lambda), policy.logits(changed, log_lambda), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(policy.damage(features), policy.damage(changed))
    hidden = policy.decide(Summary.from_features(changed), log_lambda)
    assert torch.equal(policy.decide(Summary.from_features(features), log_lambda).rung, hidden.rung)


@pytest.mark.parametrize("signals", SUBSETS)
def test_everything_it_looks_at_counts(signals: tuple[str, ...]) -> None:
    torch.manual_seed(5)
    policy = LearnedPolicy(DEFAULT_RUNGS, signals=signals)
    noise(policy, 1.0)
    features, _ = planted(1)
    for column in feature_columns(signals):
        changed = features.clone()
        changed[:, column] += 1
        assert not torch.equal(policy.damage(features), policy.damage(changed)), column


def test_its_signals_are_kept_in_one_order() -> None:
    one, other = (LearnedPolicy((1, 2), signals=names) for names in (("age", "pair"), ["pair", "age"]))
    assert one.config() == other.config()
    assert one.config()["signals"] == ("pair", "age")
    assert LearnedPolicy((1, 2)).config()["signals"] == (*SIGNALS, AGE)


def test_mean_damage_is_that_of_the_data_and_what_it_predicts_before_training() -> None:
    torch.manual_seed(6)
    policy = LearnedPolicy(DEFAULT_RUNGS)
    features, damage = planted(500)
    policy.calibrate(features, damage)
    # float32 against float64, sums of 8 numbers
    torch.testing.assert_close(policy.mean_damage(), damage.double().mean(0).float(), rtol=1e-5, atol=1e-6)
    assert float(policy.mean_damage()[-1]) == 0
    # The floor below what is learned adds twice exp(-14) of the cost.
    expected = policy.mean_damage().expand(500, -1)
    torch.testing.assert_close(policy.damage(features), expected, rtol=1e-5, atol=2.1 * math.exp(-14))


def test_damage_is_at_no_lambda_in_particular() -> None:
    torch.manual_seed(7)
    policy = LearnedPolicy(DEFAULT_RUNGS, log_lambda_range=(-6, 2))
    noise(policy, 0.5)
    features, _ = planted(20)
    assert torch.equal(policy.damage(features), policy.predict(features, torch.full((20,), -2.0))[0])
    assert not torch.equal(policy.damage(features), policy.predict(features, torch.full((20,), 1.0))[0])


@pytest.mark.parametrize("trained", [False, True])
def test_scales_that_are_set_are_those_of_every_rung_whatever_the_text(trained: bool) -> None:
    torch.manual_seed(8)
    policy = LearnedPolicy(DEFAULT_RUNGS, scale_range=0.4)
    if trained:
        noise(policy, 1.0)
    scales = torch.cat([torch.linspace(0.65, 1.35, RUNGS - 1), torch.ones(1)])
    policy.set_scales(scales)
    features, _ = planted(30)
    _, found = policy.predict(features, torch.linspace(-9, 3, 30))
    # tanh of atanh, in float32
    torch.testing.assert_close(found, scales.expand(30, -1), rtol=0, atol=1e-6)


def test_scales_beyond_the_range_are_its_ends_and_without_a_range_they_stay_1() -> None:
    scales = torch.cat([torch.tensor([0.5, 2.0, 1.0]), torch.linspace(0.8, 1.2, RUNGS - 4), torch.ones(1)])
    features, _ = planted(3)
    policy = LearnedPolicy(DEFAULT_RUNGS, scale_range=0.2)
    policy.set_scales(scales)
    _, found = policy.predict(features, torch.zeros(3))
    torch.testing.assert_close(found, scales.clamp(0.8, 1.2).expand(3, -1), rtol=0, atol=1e-6)
    fixed = LearnedPolicy(DEFAULT_RUNGS, scale_range=0)
    fixed.set_scales(scales)
    assert bool((fixed.predict(features, torch.zeros(3))[1] == 1).all())


def test_it_carries_the_difficulty_that_it_was_given() -> None:
    generator = torch.Generator().manual_seed(9)
    given = Difficulty.of(*(torch.rand(size, generator=generator) + 0.5 for size in (7, PAIRS)))
    policy = LearnedPolicy(DEFAULT_RUNGS, vocabulary=7)
    neutral = policy.difficulty()
    assert neutral is not None
    assert (neutral.token.unique().tolist(), neutral.pair.unique().tolist()) == ([127], [127])
    policy.set_difficulty(given)
    found = policy.difficulty()
    assert found is not None
    assert torch.equal(found.token, given.token)
    assert torch.equal(found.pair, given.pair)
    # Codes stay codes whatever the weights become.
    half = policy.to(torch.bfloat16).difficulty()
    assert half is not None
    assert half.token.dtype == half.pair.dtype == torch.uint8


def test_without_a_vocabulary_it_carries_none() -> None:
    assert LearnedPolicy(DEFAULT_RUNGS).difficulty() is None
    assert not [name for name in LearnedPolicy(DEFAULT_RUNGS).state_dict() if "difficulty" in name]
    assert FixedPolicy(DEFAULT_RUNGS).difficulty() is None

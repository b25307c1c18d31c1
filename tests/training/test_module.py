"""The objective the policy is trained on, and that what is drawn for it depends on nothing but seed, epoch and step."""

import pytest
import torch

from policy import LearnedPolicy
from tests.training.synthetic import RANKS, RUNGS, SCALES, chunk_samples
from training.learn.module import PolicyFit, interpolate_scale, loader

GRID = torch.tensor(SCALES)
RUNG_MS = torch.linspace(1, 2, len(RANKS))


@pytest.mark.parametrize("grid", [(1.0,), (0.8, 1.0, 1.2), (0.7, 0.9, 1.0, 1.1, 1.3)])
def test_interpolation_is_exact_where_it_was_measured(grid):
    damage = torch.rand(4, 7, len(grid), generator=torch.Generator().manual_seed(0))
    for g, scale in enumerate(grid):
        found = interpolate_scale(damage, torch.full((4, 7), scale), torch.tensor(grid))
        torch.testing.assert_close(found, damage[..., g])


def parabola(scale):
    return 0.3 + 4 * (scale - 1.07) ** 2


def test_a_parabola_is_met_between_the_scales_and_its_ends_stand_outside():
    grid = torch.tensor([0.8, 1.0, 1.2])
    scale = torch.tensor([[0.8, 0.93, 1.07, 1.15, 1.2, 0.5, 9.0]], requires_grad=True)
    found = interpolate_scale(parabola(grid).expand(1, 7, 3), scale, grid)
    torch.testing.assert_close(found, parabola(scale.clamp(0.8, 1.2)))
    found.sum().backward()
    slope = 8 * (scale.detach() - 1.07)
    slope[:, -2:] = 0
    torch.testing.assert_close(scale.grad[:, 1:4], slope[:, 1:4], rtol=1e-3, atol=1e-4)
    assert not scale.grad[:, -2:].any()


@pytest.fixture
def module():
    torch.manual_seed(0)
    policy = LearnedPolicy(RUNGS, hidden=8, scale_range=0.2, log_lambda_range=(-5.0, 1.0), cost=RANKS / RANKS[-1])
    for parameter in policy.parameters():  # heads start at zero, where half of the gradients vanish
        torch.nn.init.normal_(parameter, std=0.3)
    policy.log_temperature.data.fill_(-2.0)
    return PolicyFit(policy, SCALES, RANKS, RUNG_MS, learning_rate=1e-3, seed=3)


@pytest.fixture
def batch():
    samples = chunk_samples(torch.maximum, 9, seed=4)
    log_lambda = torch.linspace(-4, 0, 9)
    return samples.features, samples.damage, samples.tokens, log_lambda


@torch.no_grad()
def test_the_objective_is_expected_kl_over_lambda_plus_expected_cost(module, batch):
    features, damage, tokens, log_lambda = batch
    parts = module.objective(*batch)
    expected = dict.fromkeys(parts, 0.0)
    logits, scale = module.policy.logits(features, log_lambda)
    for n in range(len(tokens)):
        share = float(tokens[n] / tokens.sum())
        for j, probability in enumerate(logits[n].softmax(0).tolist()):
            at_scale = interpolate_scale(damage[n : n + 1, j : j + 1], scale[n : n + 1, j : j + 1], GRID)
            kl, cost = float(at_scale), float(module.policy.cost[j])
            weight = share * probability
            expected["loss"] += weight * (kl / float(log_lambda[n].exp()) + cost)
            expected["kl"] += weight * kl
            expected["cost"] += weight * cost
            expected["mean_rank"] += weight * float(RANKS[j])
            expected["latency_ms"] += weight * float(RUNG_MS[j])
    for name, value in expected.items():
        assert float(parts[name]) == pytest.approx(value, rel=1e-4), name


def test_the_gradient_is_that_of_the_objective(module, batch):
    """Against central differences along a random direction through all parameters."""
    parameters = list(module.policy.parameters())
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator) for p in parameters]
    module.objective(*batch)["loss"].backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))
    step, values = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * step * d
            values.append(float(module.objective(*batch)["loss"]))
            for p, d in zip(parameters, directions, strict=True):
                p -= sign * step * d
    # fp32 losses of order 1 at a step of 1e-3: the difference carries an error of about 1e-4 of the slope's size.
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2)


class Recording(PolicyFit):
    """Keeps the log lambda of every step."""

    def objective(self, features, damage, tokens, log_lambda):
        self.drawn.append(log_lambda)
        return super().objective(features, damage, tokens, log_lambda)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_lambda_depends_on_seed_epoch_and_step_alone(module, make_trainer):
    def draws(samples, global_seed, seed=3):
        recording = Recording(module.policy, SCALES, RANKS, RUNG_MS, learning_rate=1e-3, seed=seed)
        recording.drawn = []
        torch.manual_seed(global_seed)
        make_trainer(max_epochs=2).fit(recording, loader(samples, 16, seed=0))
        return torch.stack(recording.drawn)

    samples, others = chunk_samples(torch.maximum, 48, seed=1), chunk_samples(torch.minimum, 48, seed=2)
    first = draws(samples, global_seed=0)
    assert first.shape == (6, 16)  # 2 epochs of 3 batches
    assert torch.equal(first, draws(others, global_seed=99))
    assert len(first.unique(dim=0)) == 6, "every epoch and step draws anew"
    low, high = module.policy.log_lambda_range
    assert low <= float(first.min()) < float(first.max()) <= high
    assert not torch.isin(first, draws(samples, global_seed=0, seed=4)).any()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_what_is_logged_of_an_epoch_is_the_mean_over_its_chunks(module, make_trainer):
    """Batches of 16, 16 and 8: each weighs by its chunks."""

    class Keeping(PolicyFit):
        def objective(self, *batch):
            parts = super().objective(*batch)
            self.kept.append((float(parts["kl"].detach()), len(batch[0])))
            return parts

    keeping = Keeping(module.policy, SCALES, RANKS, RUNG_MS, learning_rate=1e-2, seed=0)
    keeping.kept = []
    trainer = make_trainer(max_epochs=2)
    trainer.fit(keeping, loader(chunk_samples(torch.maximum, 40, seed=1), 16, seed=0))
    last = keeping.kept[-3:]
    assert sorted(size for _, size in last) == [8, 16, 16]
    mean = sum(kl * size for kl, size in last) / 40
    assert float(trainer.callback_metrics["train/kl"]) == pytest.approx(mean, rel=1e-5)
    assert mean != pytest.approx(sum(kl for kl, _ in last) / 3, rel=1e-5), "otherwise sizes do not matter"


def test_batches_are_shuffled_by_seed_and_epoch_alone():
    samples = chunk_samples(torch.maximum, 40, seed=0)

    def order(epoch, global_seed, seed=7):
        torch.manual_seed(global_seed)
        batches = loader(samples, 16, seed=seed)
        batches.sampler.set_epoch(epoch)
        return torch.cat([features for features, _, _ in batches])

    assert torch.equal(order(0, 0), order(0, 1))
    assert not torch.equal(order(0, 0), order(1, 0))
    assert not torch.equal(order(0, 0), order(0, 0, seed=8))
    assert torch.equal(order(0, 0).sort(0).values, samples.features.sort(0).values)


def test_validation_sees_all_chunks_in_one_batch_in_order():
    samples = chunk_samples(torch.maximum, 40, seed=0)
    ((features, damage, tokens),) = list(loader(samples, 16))
    assert torch.equal(features, samples.features)
    assert torch.equal(damage, samples.damage)
    assert torch.equal(tokens, samples.tokens)

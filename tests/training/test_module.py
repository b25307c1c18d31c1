"""The objectives a policy is trained on; what is drawn for them depends on nothing but seed, epoch and step."""

import math
from dataclasses import replace

import pytest
import torch

from policy import LearnedPolicy
from tests.training.synthetic import RANKS, RUNGS, SCALES, chunk_samples
from training.learn.module import DAMAGE, LATENCY, OBJECTIVES, PolicyFit, interpolate_scale, loader

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


def make_module(objective: str, **options) -> PolicyFit:
    torch.manual_seed(0)
    policy = LearnedPolicy(RUNGS, hidden=8, scale_range=0.2, log_lambda_range=(-5.0, 1.0), cost=RANKS / RANKS[-1])
    for parameter in policy.parameters():  # heads start at zero, where half of the gradients vanish
        torch.nn.init.normal_(parameter, std=0.3)
    policy.log_temperature.data.fill_(-2.0)
    if objective == DAMAGE:
        policy.scale_head.weight.data.zero_()  # as they are set, whatever the text
    return PolicyFit(policy, SCALES, RANKS, RUNG_MS, learning_rate=1e-3, seed=3, objective=objective, **options)


@pytest.fixture
def module():
    return make_module(LATENCY)


@pytest.fixture
def batch():
    samples = chunk_samples(torch.maximum, 9, seed=4)
    log_lambda = torch.linspace(-4, 0, 9)
    return samples.features, samples.damage, samples.tokens, log_lambda


def unmeasured(batch, every: int):
    """The batch with every so manyth rung of a chunk left unmeasured, one rung but twice measured, one that loses 0."""
    features, damage, tokens, log_lambda = batch
    damage, below = damage.clone(), len(RANKS) - 1
    number = torch.arange(len(tokens))[:, None] * below + torch.arange(below)
    damage[:, :-1][number % every == 0] = torch.nan
    damage[2:, 3] = torch.nan
    damage[4, 5] = 0.0
    return features, damage, tokens, log_lambda


def naive_parts(module, features, damage, tokens, log_lambda):
    """What is logged beside the loss, chunk by chunk and rung by rung; what was not measured is as predicted."""
    logits, scale = module.policy.logits(features, log_lambda)
    predicted = module.policy.damage(features)
    expected = dict.fromkeys(("kl", "cost", "mean_rank", "latency_ms"), 0.0)
    for n in range(len(tokens)):
        share = float(tokens[n] / tokens.sum())
        for j, probability in enumerate(logits[n].softmax(0).tolist()):
            at_scale = interpolate_scale(damage[n : n + 1, j : j + 1], scale[n : n + 1, j : j + 1], GRID)
            kl = float(predicted[n, j]) if damage[n, j].isnan().any() else float(at_scale)
            weight = share * probability
            expected["kl"] += weight * kl
            expected["cost"] += weight * float(module.policy.cost[j])
            expected["mean_rank"] += weight * float(RANKS[j])
            expected["latency_ms"] += weight * float(RUNG_MS[j])
    return expected


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
@torch.no_grad()
def test_what_is_logged_are_expectations_under_the_policys_own_choice(batch, objective, whole):
    module, batch = make_module(objective), batch if whole else unmeasured(batch, 7)
    parts, expected = module.objective(*batch), naive_parts(module, *batch)
    assert set(parts) == {"loss", *expected}
    for name, value in expected.items():
        assert float(parts[name]) == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_the_latency_objective_is_expected_kl_over_lambda_plus_expected_cost(module, batch, whole):
    """Over the chunks of which every rung was measured."""
    features, damage, tokens, log_lambda = batch if whole else unmeasured(batch, 30)
    logits, scale = module.policy.logits(features, log_lambda)
    total = weights = 0.0
    for n in range(len(tokens)):
        if damage[n].isnan().any():
            continue
        weights += float(tokens[n])
        for j, probability in enumerate(logits[n].softmax(0).tolist()):
            at_scale = interpolate_scale(damage[n : n + 1, j : j + 1], scale[n : n + 1, j : j + 1], GRID)
            price = float(at_scale) / float(log_lambda[n].exp()) + float(module.policy.cost[j])
            total += float(tokens[n]) * probability * price
    assert weights > 0
    assert (weights < tokens.sum()) != whole
    found = module.objective(features, damage, tokens, log_lambda)["loss"]
    assert float(found) == pytest.approx(total / weights, rel=1e-4)


@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_the_damage_objective_is_the_deviance_of_what_was_measured(batch, whole):
    """Of Poisson counts, in units of every rung's mean; each rung has the same say, and each token within a rung."""
    module = make_module(DAMAGE)
    features, damage, tokens, log_lambda = batch if whole else unmeasured(batch, 7)
    predicted, mean = module.policy.damage(features), module.policy.mean_damage()
    scale = module.policy.logits(features, log_lambda)[1]
    per_rung = []
    for j in range(len(RANKS) - 1):
        total = weights = 0.0
        for n in range(len(tokens)):
            if damage[n, j].isnan().any():
                continue
            y = float(interpolate_scale(damage[n : n + 1, j : j + 1], scale[n : n + 1, j : j + 1], GRID))
            q, weight = float(predicted[n, j]), float(tokens[n])
            total += weight * (q - y + (y * math.log(y / q) if y > 0 else 0.0)) / float(mean[j])
            weights += weight
        per_rung.append(total / weights if weights else 0.0)
    found = module.objective(features, damage, tokens, log_lambda)["loss"]
    assert float(found) == pytest.approx(sum(per_rung) / len(per_rung), rel=1e-4)


@torch.no_grad()
def test_deviance_is_zero_where_all_is_as_predicted_and_nowhere_less(batch):
    module = make_module(DAMAGE)
    features, _, tokens, log_lambda = batch
    predicted = module.policy.damage(features)[..., None].expand(-1, -1, len(SCALES))
    assert float(module.objective(features, predicted, tokens, log_lambda)["loss"]) == pytest.approx(0, abs=1e-6)
    for factor in (0.0, 0.5, 0.9, 1.1, 2.0):
        assert float(module.objective(features, factor * predicted, tokens, log_lambda)["loss"]) > 1e-3


@pytest.mark.parametrize("measured", [1.0, 0.4])
def test_deviance_is_least_at_the_mean_however_long_the_tail(measured):
    """Damage of two kinds of chunk, its mean three times its median, some of it unmeasured: both means are found."""
    generator, count = torch.Generator().manual_seed(0), 8000
    samples = chunk_samples(torch.maximum, count, seed=0)
    kind = (torch.arange(count) % 2).bool()
    features = torch.where(kind[:, None], 0.9, 0.1).expand_as(samples.features)
    tail = torch.exp(1.5 * torch.randn(count, 1, generator=generator))
    damage = torch.where(kind[:, None], 2.0, 0.2) / RANKS**2 * tail
    damage[:, -1] = 0
    known = torch.rand(damage.shape, generator=generator) < measured
    weight = samples.tokens[:, None] * known
    damage = torch.where(known, damage, torch.nan)[..., None]
    torch.manual_seed(0)
    policy = LearnedPolicy(RUNGS, hidden=8)
    policy.calibrate(features, damage.nan_to_num(0.0)[..., 0] / measured)
    module = PolicyFit(policy, (1.0,), RANKS, RUNG_MS, learning_rate=1e-2, seed=0)
    optimizer, log_lambda = module.configure_optimizers(), torch.zeros(count)
    for _ in range(300):
        optimizer.zero_grad()
        module.objective(features, damage, samples.tokens, log_lambda)["loss"].backward()
        optimizer.step()
    predicted = policy.damage(features).detach()
    for own in (kind, ~kind):
        mean = (damage[own][..., 0].nan_to_num(0.0) * weight[own]).sum(0) / weight[own].sum(0)
        median = damage[own][..., 0].nanmedian(0).values
        assert (mean[:-1] > 2 * median[:-1]).all(), "otherwise this says nothing"
        assert (mean.diff() < 0).all(), "of rungs that rise with rank no prediction can be right"
        torch.testing.assert_close(predicted[own][0, :-1], mean[:-1], rtol=0.03, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_was_not_measured_has_no_part_in_a_gradient(batch, objective):
    """Nor has what lost nothing an infinite one."""
    features, damage, tokens, log_lambda = unmeasured(batch, 7)
    whole = damage.isfinite().all(2)
    kept = whole if objective == DAMAGE else whole.all(1, keepdim=True).expand_as(whole)
    found = []
    for other in (damage, torch.where(kept[..., None], damage, torch.nan)):
        module = make_module(objective)
        module.objective(features, other, tokens, log_lambda)["loss"].backward()
        found.append([p.grad for p in module.policy.parameters() if p.requires_grad and p.grad is not None])
    assert found[0]
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_by_damage_nothing_is_trained_but_what_predicts_it(make_trainer):
    """Not the scales, nor the softness of a choice, nor what the prediction would make of lambda."""
    samples = chunk_samples(torch.maximum, 64, seed=1)
    policy = LearnedPolicy(RUNGS, hidden=8, scale_range=0.2, log_lambda_range=(-5.0, 1.0))
    policy.calibrate(samples.features, samples.damage[..., SCALES.index(1.0)])
    policy.set_scales(torch.tensor([1.05] * (len(RUNGS) - 1) + [1.0]))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    module = PolicyFit(policy, SCALES, RANKS, RUNG_MS, learning_rate=1e-2, seed=0, objective=DAMAGE, weight_decay=0.1)
    module.objective(samples.features, samples.damage, samples.tokens, torch.zeros(64))["loss"].backward()
    with_gradient = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {"damage_head.weight", "damage_head.bias"}, "heads start at 0: the trunk's turn is next"
    make_trainer(max_epochs=2).fit(module, loader(samples, 16, seed=0), loader(samples, 16))
    moved = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{part}.{own}" for part in ("trunk.0", "trunk.2", "damage_head") for own in ("weight", "bias")}
    assert not policy.trunk[0].weight[:, -1].any()
    # and the other objective trains all of it again
    module = PolicyFit(policy, SCALES, RANKS, RUNG_MS, learning_rate=1e-2, seed=0, objective=LATENCY)
    make_trainer(max_epochs=1).fit(module, loader(samples, 16, seed=0), loader(samples, 16))
    trained = {name for name, _ in policy.named_parameters()}
    assert trained <= {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_optimizer_decays_the_weights_that_are_trained(objective):
    module = make_module(objective, weight_decay=0.03)
    optimizer = module.configure_optimizers()
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.03)
    still = [*module.policy.scale_head.parameters(), module.policy.log_temperature]
    frozen = {id(p) for p in still} if objective == DAMAGE else set()
    assert {id(p) for p in group["params"]} == {id(p) for p in module.policy.parameters()} - frozen


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_is_that_of_the_objective(batch, objective):
    """Against central differences along a random direction through all parameters that are trained."""
    module = make_module(objective)
    parameters = [p for p in module.policy.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator) for p in parameters]
    module.objective(*batch)["loss"].backward()
    pairs = zip(parameters, directions, strict=True)
    slope = sum(float((p.grad * d).sum()) for p, d in pairs if p.grad is not None)
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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_chunk_of_known_lambda_keeps_it_and_the_others_draw_what_they_would(objective, make_trainer):
    """In training and in validation alike."""
    samples = chunk_samples(torch.maximum, 48, seed=1)
    known = replace(samples, log_lambda=torch.where(torch.arange(48) % 3 == 0, torch.linspace(-4, 0, 48), torch.nan))

    def seen(samples):
        recording = Recording(
            make_module(objective).policy, SCALES, RANKS, RUNG_MS, learning_rate=1e-3, seed=3, objective=objective
        )
        recording.drawn = []
        make_trainer(max_epochs=1).fit(recording, loader(samples, 16, seed=0), loader(samples, 16))
        order = torch.cat([own for *_, own in loader(samples, 16, seed=0)])
        return recording.drawn, [*order.split(16), samples.log_lambda]

    (with_known, lambdas), (without, _) = seen(known), seen(samples)
    assert [len(own) for own in with_known] == [16, 16, 16, 48]
    for own, drawn, stored in zip(with_known, without, lambdas, strict=True):
        assert stored.isfinite().any()
        assert torch.equal(own, torch.where(stored.isfinite(), stored, drawn))


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
        return torch.cat([features for features, *_ in batches])

    assert torch.equal(order(0, 0), order(0, 1))
    assert not torch.equal(order(0, 0), order(1, 0))
    assert not torch.equal(order(0, 0), order(0, 0, seed=8))
    assert torch.equal(order(0, 0).sort(0).values, samples.features.sort(0).values)


def test_validation_sees_all_chunks_in_one_batch_in_order():
    samples = replace(chunk_samples(torch.maximum, 40, seed=0), log_lambda=torch.rand(40))
    ((features, damage, tokens, log_lambda),) = list(loader(samples, 16))
    assert torch.equal(features, samples.features)
    assert torch.equal(damage, samples.damage)
    assert torch.equal(tokens, samples.tokens)
    assert torch.equal(log_lambda, samples.log_lambda)

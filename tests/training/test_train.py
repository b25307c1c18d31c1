"""Training stops when validation documents gain nothing more, keeps the best, and goes on where it was killed."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from policy import LatencyTable, Settings, Summary
from policy.difficulty import PAIRS, Difficulty
from policy.settings import HIDDEN, SIGNAL_SETS
from runtime.ladder import Adapter, LoraFactors, build_ladder
from tests.training.synthetic import RANKS, RUNGS, SCALES, chunk_samples, shuffled
from training.amounts import Amounts
from training.documents import Corpus
from training.learn import train as rounds
from training.learn.module import DAMAGE, LATENCY, OBJECTIVES
from training.learn.train import BestWeights, Learning, new_policy, served_start, train_policies, train_round
from training.targets.damage import Trajectory
from training.targets.paths import Calibrated
from training.targets.samples import LaterDamage
from training.targets.token_difficulty import FoldedDifficulty
from training.task import AdapterTask, FitContext, Targets, task_cost

# Of the ladder only the bytes of its rungs matter here: one module of rank 64.
LADDER = build_ladder(Adapter(Path("made"), None, {"m": LoraFactors(*torch.zeros(2, 64, 64), 1.0)}))
NEUTRAL = FoldedDifficulty(Difficulty.neutral(8, PAIRS), (), ())
TASK = AdapterTask("made", LADDER, Corpus([], [], []), Targets([], {}, NEUTRAL))
CALIBRATED = Calibrated(Settings(), torch.tensor([1.05] * 8 + [1.0]), LaterDamage((0.0,) * len(RUNGS), 0, 0))
LATENCY_TABLE = LatencyTable("none", (1.0,) * len(RUNGS), 1.0, 0.0)
AMOUNTS = Amounts(epochs=30, patience=4, batch_chunks=32, learning_rate=1e-2, hidden=8)


@pytest.fixture(scope="module")
def parts():
    """Few chunks to train on and others to stop by: the first are soon learned by heart."""
    return chunk_samples(torch.maximum, 64, seed=1, noise=0.4), chunk_samples(torch.maximum, 200, seed=2, noise=0.4)


class Killed(Exception):
    pass


class Watch(L.Callback):
    """Notes the loss and the weights of every epoch, and kills the fit in the middle of epoch `until`."""

    def __init__(self, until: int | None = None) -> None:
        self.until, self.losses, self.weights = until, [], []

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        if trainer.current_epoch == self.until and index == 1:
            raise Killed

    def on_validation_end(self, trainer, module) -> None:
        self.losses.append(float(trainer.callback_metrics["eval/loss"]))
        self.weights.append({name: value.clone() for name, value in module.policy.state_dict().items()})


@pytest.fixture
def context(make_trainer, tmp_path):
    """`context(watch, seed, folder, **amounts)`: of fits without a model, each in its own folder unless named."""
    folders = (tmp_path / str(number) for number in range(100))

    def make(watch=None, seed=0, folder=None, **amounts) -> FitContext:
        def trainer(**options):
            callbacks = [*options.pop("callbacks"), *([] if watch is None else [watch])]
            return make_trainer(**{**options, "enable_checkpointing": True, "callbacks": callbacks})

        own = replace(AMOUNTS, **amounts)
        return FitContext(None, "model", own, seed, folder or next(folders), trainer, lambda message: None)

    return make


@pytest.fixture
def run(context):
    """`run(samples, held_out, ...)`: the state of a policy after one round, its folder, and what was watched."""

    def play(samples, held_out, until=None, folder=None, objective=DAMAGE, seed=0, **amounts):
        watch, number = Watch(until), (0, 0)
        own = context(watch, seed, folder, **amounts)
        learning = Learning(SIGNAL_SETS["default"], objective)
        # from the same weights at every seed
        policy = new_policy(replace(own, seed=0), [TASK], samples, CALIBRATED, learning, task_cost([TASK]))
        torch.manual_seed(len(watch.losses) + (until or 50))  # what stands in the global generator must not matter
        try:
            train_round(own, [TASK], policy, samples, held_out, LATENCY_TABLE, learning, number)
        except Killed:
            assert until is not None
        return policy.state_dict(), own.root, watch

    return play


def same(one, other) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_training_stops_when_held_out_chunks_gain_no_more_and_keeps_the_best_epoch(run, parts):
    state, _, watch = run(*parts)
    best = min(range(len(watch.losses)), key=watch.losses.__getitem__)
    assert 0 < best < AMOUNTS.epochs - AMOUNTS.patience - 1, "otherwise this says nothing"
    assert len(watch.losses) == best + 1 + AMOUNTS.patience
    assert same(state, watch.weights[best])
    assert not same(state, watch.weights[-1])


def test_where_every_epoch_gains_all_of_them_are_made(run, parts):
    state, _, watch = run(*parts, epochs=3, patience=1, learning_rate=1e-3)
    assert watch.losses == sorted(watch.losses, reverse=True)
    assert len(watch.losses) == 3
    assert same(state, watch.weights[-1])


def test_the_best_epoch_is_by_held_out_chunks_and_not_by_those_trained_on(run, parts):
    samples, held_out = parts
    _, _, watch = run(samples, held_out)
    _, _, other = run(samples, shuffled(held_out, 0))
    assert watch.losses != other.losses
    assert same(watch.weights[0], other.weights[0]), "they say when to stop, and nothing else"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("where", ["first", "before the best", "behind the best", "stopped"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_round_ends_where_the_uninterrupted_one_does(run, parts, objective, where):
    """Bit for bit, whether the best epoch was still to come or not; one that had stopped makes no further epoch."""
    whole, folder, watch = run(*parts, objective=objective)
    best = min(range(len(watch.losses)), key=watch.losses.__getitem__)
    assert 1 < best < len(watch.losses) - 2, "otherwise this says nothing"
    until = {"first": 1, "before the best": best, "behind the best": best + 2, "stopped": None}[where]
    if until is not None:
        killed, folder, before = run(*parts, until=until, objective=objective)
        assert before.losses == watch.losses[:until]
        assert not same(killed, whole)
    resumed, _, after = run(*parts, folder=folder, objective=objective)
    assert same(resumed, whole)
    assert after.losses == watch.losses[len(watch.losses) if until is None else until :]


def test_weights_of_the_best_epoch_come_back_through_a_checkpoint():
    torch.manual_seed(0)
    module = L.LightningModule()
    module.layer = torch.nn.Linear(2, 2)

    trainer, best, kept = SimpleNamespace(), BestWeights("eval/loss"), None
    for loss in (3.0, 1.0, 2.0):
        torch.nn.init.normal_(module.layer.weight)
        trainer.callback_metrics = {"eval/loss": torch.tensor(loss)}
        best.on_validation_end(trainer, module)
        kept = module.layer.weight.clone() if loss == 1.0 else kept
    other = BestWeights("eval/loss")
    other.load_state_dict(best.state_dict())
    other.on_validation_end(trainer, module)  # 2 is no better than 1
    other.restore(module)
    assert torch.equal(module.layer.weight, kept)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("changed", ["samples", "held out", "lambda", "objective", "patience", "weight decay", "seed"])
def test_a_round_goes_on_with_its_own_checkpoint_alone(run, parts, changed):
    """One that was trained otherwise in the same folder is another round."""
    samples, held_out = parts
    options, others = {"epochs": 3}, {"epochs": 3}
    before = [samples, held_out]
    if changed == "samples":
        before[0] = shuffled(samples, 1)
    elif changed == "held out":
        before[1] = shuffled(held_out, 1)
    elif changed == "lambda":
        before[0] = replace(samples, log_lambda=torch.zeros(len(samples)))
        options["objective"] = others["objective"] = LATENCY
    elif changed == "objective":
        others["objective"] = LATENCY
    else:
        others[changed.replace(" ", "_")] = {"patience": 1, "weight decay": 0.5, "seed": 1}[changed]
    _, folder, _ = run(*before, **others)
    found, _, watch = run(*parts, folder=folder, **options)
    expected, _, _ = run(*parts, **options)
    assert len(watch.losses) == 3
    assert same(found, expected)


def test_a_round_learns_by_the_objective_it_was_given(run, parts):
    """By damage the scales stay what they were set to; by latency they are learned."""
    states = [run(*parts, objective=objective, epochs=2)[0] for objective in (DAMAGE, LATENCY)]
    assert not states[0]["scale_head.weight"].any()
    assert states[1]["scale_head.weight"].any()


@pytest.mark.parametrize(
    ("objective", "spread_ms", "batch", "by_time"),
    [(LATENCY, 0.1, 32, True), (LATENCY, 4.0, 32, False), (LATENCY, 0.1, None, False), (DAMAGE, 0.1, 32, False)],
)
def test_lambda_is_a_price_of_milliseconds_where_those_are_learned_by_and_told_apart(
    context, task, objective, spread_ms, batch, by_time
):
    """Rungs of 3, 4, ... 11 ms, the base model of 2: in the policy, in the penalty of its loss and in where a knob
    starts; budgets stay shares of bytes. Of the reference path, whose table has no batch, they never are."""
    ms = tuple(float(3 + rung) for rung in range(len(RUNGS)))
    table, given = LatencyTable("here", ms, 2.0, spread_ms, batch), []

    def own_paths(context, task, policy, calibrated, samples, rung_bytes, learning, number):
        given.append(rung_bytes)
        return dict(enumerate(task.found().paths[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "own_paths", own_paths)
        learning = Learning(SIGNAL_SETS["default"], objective)
        (policy,) = train_policies(context(rounds=1, epochs=1), [task], CALIBRATED, table, learning)
    share = [(rung + 1) / len(RUNGS) for rung in range(len(RUNGS))]
    own_bytes = task_cost([task])
    assert not torch.allclose(torch.tensor(share), own_bytes), "otherwise this says nothing"
    expected = torch.tensor(share) if by_time else own_bytes
    torch.testing.assert_close(policy.cost, expected)
    assert [own.tolist() for own in given] == [own_bytes.tolist()]


def test_weight_decay_is_what_amounts_say(run, parts):
    states = [run(*parts, epochs=2, weight_decay=decay)[0] for decay in (0.0, 0.0, 5.0)]
    assert same(states[0], states[1])
    norms = [float(state["damage_head.weight"].norm()) for state in states]
    assert norms[2] < norms[0]


@pytest.fixture
def task(make_example):
    """Documents with made trajectories and tables, of which a fit without own trajectories needs no model."""
    generator = torch.Generator().manual_seed(0)
    documents = [make_example(30, 4, seed=number) for number in range(6)]
    tables, paths = [], {}
    for _ in documents:
        table = torch.exp(-0.05 * RANKS)[:, None] * torch.rand(30, 1, 1, generator=generator)
        tables.append((table * torch.ones(len(SCALES))).clone())
        tables[-1][:, -1] = 0
    for block in (1, Settings().block_tokens):
        paths[block] = [
            Trajectory(torch.arange(30), torch.rand(30, Summary.FEATURES, generator=generator), torch.rand(30))
            for _ in documents
        ]
    found = Targets(tables, paths, NEUTRAL)
    return AdapterTask("made", LADDER, Corpus(documents[:4], documents[4:], []), found)


@pytest.fixture
def train(context, task):
    """`train(seeds, seed)`: the states of the policies of a fit."""

    def run(seeds: int, seed: int = 0):
        own = context(seed=seed, seeds=seeds, rounds=0, epochs=3)
        learning = Learning(SIGNAL_SETS["default"], DAMAGE)
        torch.manual_seed(100 + seeds)  # must not matter
        policies = train_policies(own, [task], CALIBRATED, LATENCY_TABLE, learning)
        return [policy.state_dict() for policy in policies], own.root

    return run


def test_seeds_give_policies_apart_and_the_same_seed_the_same_one(train):
    three, folder = train(3)
    again, _ = train(3)
    (alone,), _ = train(1)
    (another,), _ = train(1, seed=1)
    assert len(three) == 3
    assert all(same(one, other) for one, other in zip(three, again, strict=True))
    assert same(three[0], alone), "what further policies there are changes nothing for the first"
    states = [*three, another]
    for i, one in enumerate(states):
        for other in states[i + 1 :]:
            assert not torch.equal(one["trunk.0.weight"], other["trunk.0.weight"])
            assert not torch.equal(one["damage_head.weight"], other["damage_head.weight"])
            assert torch.equal(one["feature_mean"], other["feature_mean"]), "the data are the same"
    names = {path.name.rsplit("-", 1)[0] for path in (folder / "checkpoints").iterdir()}
    assert names == {"round-0", "seed-1-round-0", "seed-2-round-0"}


def test_every_policy_starts_from_its_own_weights(context, parts):
    def weights(number: int, seed: int = 0):
        torch.manual_seed(number)  # must not matter
        learning = Learning(SIGNAL_SETS["default"], DAMAGE)
        own = new_policy(context(seed=seed), [TASK], parts[0], CALIBRATED, learning, task_cost([TASK]), number)
        return own.trunk[0].weight

    assert torch.equal(weights(0), weights(0))
    starts = [weights(0), weights(1), weights(2), weights(0, seed=1)]
    assert len({tuple(own.flatten().tolist()) for own in starts}) == len(starts)


@pytest.mark.parametrize(
    ("name", "width"), [(name, n) for name, own in SIGNAL_SETS.items() for n in (0, 3) if n or HIDDEN not in own]
)
def test_a_policy_looks_at_the_signals_it_was_told_to(context, task, name, width):
    """Trajectories may tell of the model's states, here of three numbers: who looks at them needs them."""
    generator, looks = torch.Generator().manual_seed(1), HIDDEN in SIGNAL_SETS[name]
    found = {}
    for block, paths in task.targets.paths.items():
        states = [torch.randn(30, 2 * width, generator=generator) for _ in paths]
        found[block] = [
            replace(path, features=torch.cat([path.features, own], 1)) for path, own in zip(paths, states, strict=True)
        ]
    told = replace(task, targets=replace(task.targets, paths=found))
    own = context(rounds=0, epochs=2)
    (policy,) = train_policies(own, [told], CALIBRATED, LATENCY_TABLE, Learning(SIGNAL_SETS[name], DAMAGE))
    assert tuple(policy.config()["signals"]) == SIGNAL_SETS[name]
    assert policy.config()["width"] == (width if looks else 0)
    features = found[1][0].features
    other = features.clone()
    other[:, Summary.FEATURES :] += torch.randn(30, 2 * width, generator=generator)
    assert torch.equal(policy.damage(features), policy.damage(other)) != looks


def test_it_starts_at_the_scales_that_were_calibrated_and_keeps_them(context, task):
    own = context(rounds=0, epochs=2)
    (policy,) = train_policies(own, [task], CALIBRATED, LATENCY_TABLE, Learning(SIGNAL_SETS["default"], DAMAGE))
    features = torch.rand(5, Summary.FEATURES)
    scales = policy.predict(features, torch.zeros(5))[1]
    torch.testing.assert_close(scales.detach(), CALIBRATED.scales.expand(5, -1))


@pytest.mark.parametrize("most", [7, 64, 1000])
def test_where_a_knob_starts_is_found_on_chunks_evenly_spread(context, parts, monkeypatch, most):
    """The first and the last among them; on all where there are no more. By hand on those alone, by scored tokens."""
    samples = replace(parts[0], scored=torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 4)
    price = torch.linspace(0.1, 1, len(RUNGS))  # of milliseconds, say: what a budget is of are bytes
    policy = new_policy(context(), [TASK], samples, CALIBRATED, Learning(SIGNAL_SETS["default"], LATENCY), price)
    torch.manual_seed(0)
    torch.nn.init.normal_(policy.damage_head.weight, std=8.0)
    monkeypatch.setattr("training.learn.train.START_CHUNKS", most)
    count, cost = min(most, 64), task_cost([TASK]).tolist()
    knobs = torch.linspace(*policy.log_lambda_range, 60)

    def by_hand(some, weights) -> list[int]:
        summary, found = Summary.from_features(samples.features[some]), []
        for knob in knobs:
            rungs = policy.decide(summary, knob.expand(count)).rung.tolist()
            pairs = list(zip(rungs, weights[some].double().tolist(), strict=True))
            spent = sum(cost[rung] * weight for rung, weight in pairs) / sum(weight for _, weight in pairs)
            found.append(max([0, *(rung for rung, own in enumerate(cost) if own <= spent + 1e-6)]))
        return found

    some = sorted({int(number * 63 / (count - 1)) for number in range(count)})
    assert (len(some), some[0], some[-1]) == (count, 0, 63)
    expected = by_hand(some, samples.scored)
    assert expected != by_hand(some, samples.tokens), "otherwise this says little"
    assert (expected != by_hand(list(range(count)), samples.scored)) == (most < 64)
    assert served_start(policy, samples, knobs, task_cost([TASK])).tolist() == expected

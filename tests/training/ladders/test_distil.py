"""What is trained is what is served, from the documents it may see, and only where it helps."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from runtime.ladder import load_ladder, save_ladder
from runtime.ladder.formats import CODED
from training.documents import make_batch
from training.ladders import distil as stage
from training.ladders.distil import Distillation, Schedule, distil
from training.ladders.quality import measure
from training.learn.train import quiet_lightning

LOW = [0, 1, 2]
"""Rungs 0.5, 0.75 and 1 of rank 8."""


@pytest.fixture
def module(tiny_llama, exact, measured, mixed, split):
    """As training starts, from KLs of 0.1, 0.2 and 0.4."""
    scales = [mixed.scales[j] for j in LOW]
    schedule = Schedule(steps=8, tokens=100, seed=3)
    return Distillation(tiny_llama, exact, measured, mixed.edges[LOW], [0.1, 0.2, 0.4], scales, split.train, schedule)


def moved(module, seed=0):
    """The same with factors and scales a good way off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for stack in module.stacks:
            stack.moved.copy_(0.3 * torch.randn(stack.moved.shape, generator=generator))
        module.log_scales.add_(torch.tensor([0.1, -0.2, 0.05]))
    return module


def stored(module, ladder):
    scales = module.log_scales.detach().exp().tolist()
    return stage._with_bank(ladder, module.bank(), dict(zip(LOW, scales, strict=True)))


@pytest.mark.parametrize("far", [False, True])
def test_what_is_trained_is_what_is_stored_bit_for_bit(far, module, mixed, tmp_path):
    module = moved(module) if far else module
    served = stored(module, mixed)
    if far:
        served = load_ladder(save_ladder(served, tmp_path / "ladder"))
    readings, formats = module.readings(), set()
    for m, name in enumerate(served.modules):
        for j in LOW:
            ends = [0, *served.edges[j, m].tolist()]
            for side in (0, 1):
                own = readings[name][side][j].detach()
                assert torch.equal(own[: ends[-1]], served.update(name, j)[side])
                assert not own[ends[-1] :].any()
            formats |= {f for f, (a, b) in zip((16, 8, 4, 2), pairwise(ends), strict=True) if b > a}
    assert formats == set(CODED), "otherwise this says little"


def test_at_the_start_it_is_the_mixed_ladder(module, mixed):
    for name, pair in module.readings().items():
        for j in LOW:
            for half, own in zip(mixed.update(name, j), pair, strict=True):
                torch.testing.assert_close(own[j, : len(half)].detach(), half, rtol=1e-6, atol=0)


def test_divergences_are_what_measuring_the_stored_ladder_finds(module, mixed, tiny_llama, exact, split):
    served = stored(moved(module), mixed)
    batch = make_batch(split.train[:4])
    found = module.divergences(batch, batch.scored)[0].detach()
    expected = measure(tiny_llama, exact, [stage._candidate(served, j) for j in LOW], split.train[:4])
    assert found.tolist() == pytest.approx([own.kl for own in expected], rel=1e-4)
    assert len(set(found.tolist())) == 3


def test_gradients_reach_the_factors_that_some_rung_reads_as_if_nothing_were_rounded(module):
    stack = moved(module)._stacks[0]
    weights = torch.randn(stack.readings().shape, generator=torch.Generator().manual_seed(1))
    (stack.readings() * weights).sum().backward()
    reading = stack.read.sum(2)[..., None]
    assert set(reading.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(stack.moved.grad, stack.unit * (reading * weights).sum(1))


def test_the_models_loss_reaches_factors_and_scales_and_not_the_model(module, tiny_llama, split):
    batch = make_batch(split.train[:2])
    with stage.frozen(tiny_llama):
        module.divergences(batch, batch.scored)[0].sum().backward()
    assert all(float(own.moved.grad.abs().max()) > 0 for own in module.stacks)
    assert bool((module.log_scales.grad != 0).all())
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    assert not any("model" in name for name in module.state_dict())


def sparse(split, prompt=20):
    """Documents of which two tokens are completion."""
    return [{**own, "input_ids": own["input_ids"][: prompt + 2], "prompt_tokens": prompt} for own in split.train]


def test_prompt_tokens_make_up_for_missing_completion(split):
    documents = sparse(split, 18)[:3]
    batch = make_batch(documents)
    beside = stage.prompt_beside(batch)
    assert int(batch.scored.sum()) == 6
    assert int(beside.sum()) == 60 // 4 - 6
    assert not (beside & batch.scored.bool()).any()
    assert beside.sum(1).tolist() == [3, 3, 3], "evenly spread"
    assert not beside[:, 17:].any(), "what predicts a completion token is not counted twice"
    plenty = [{**own, "prompt_tokens": 4} for own in documents]
    assert not stage.prompt_beside(make_batch(plenty)).any()


def test_divergences_of_prompt_tokens_are_those_of_the_stored_ladder(
    module, mixed, tiny_llama, exact, split, monkeypatch
):
    """All prompt tokens count, so that the mean over them follows from what is measured with and without them."""
    monkeypatch.setattr(stage, "SCORED_SHARE", 1)
    documents = sparse(split)[:3]
    served = stored(moved(module), mixed)
    batch = make_batch(documents)
    found = module.divergences(batch, batch.scored, stage.prompt_beside(batch))
    completion, prompt = (own.detach() for own in found)
    rungs = [stage._candidate(served, j) for j in LOW]
    every = measure(tiny_llama, exact, rungs, [{**own, "prompt_tokens": 1} for own in documents])
    scored, tokens = (
        int(make_batch(docs).scored.sum()) for docs in (documents, [{**d, "prompt_tokens": 1} for d in documents])
    )
    together = (completion * scored + prompt * (tokens - scored)) / tokens
    assert together.tolist() == pytest.approx([own.kl for own in every], rel=1e-4)


def test_the_loss_of_a_rung_is_over_what_it_lost_before(module, split, monkeypatch):
    found = [[], [torch.tensor([2.0, 4, 8])], [torch.tensor([1.0, 1, 2])], [torch.tensor([2.0, 4, 8])]]

    def divergences(batch, *places):
        prompt = found.pop(0)
        for place, expected in zip(places, [batch.scored, stage.prompt_beside(batch)][: 1 + len(prompt)], strict=True):
            assert torch.equal(place, expected)
        return [torch.tensor([0.05, 0.2, 0.1]), *prompt]

    monkeypatch.setattr(module, "divergences", divergences)
    monkeypatch.setattr(module, "log_dict", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "_set_rate", lambda step: None)
    monkeypatch.setattr(Distillation, "current_epoch", 0)
    completion = (0.5 + 1 + 0.25) / 3
    assert float(module.training_step(0, 0)) == pytest.approx(completion)
    monkeypatch.setattr(module, "drawn", lambda step: sparse(split, 18)[:3])
    assert float(module.training_step(0, 1)) == pytest.approx(completion + 1)
    assert float(module.training_step(0, 2)) == pytest.approx(completion + (0.5 + 0.25 + 0.25) / 3)
    monkeypatch.setattr(stage, "SCORED_SHARE", 9 / 60)
    assert float(module.training_step(0, 3)) == pytest.approx(completion + 1 / 2), "three beside six count half"


def test_documents_of_a_step_follow_from_seed_step_and_process(module, split, monkeypatch):
    monkeypatch.setattr(Distillation, "global_rank", 0, raising=False)
    drawn = [module.drawn(step) for step in range(20)]
    assert drawn == [module.drawn(step) for step in range(20)]
    assert {own["id"] for documents in drawn for own in documents} == {own["id"] for own in split.train}
    for documents in drawn:
        longest = max(len(own["input_ids"]) for own in documents)
        assert longest * len(documents) <= 100
        assert documents
    monkeypatch.setattr(Distillation, "global_rank", 1, raising=False)
    assert drawn != [module.drawn(step) for step in range(20)]
    module.schedule = replace(module.schedule, tokens=1)
    assert len(module.drawn(0)) == 1, "a document longer than a step is a step"


class Tape:
    """Who was shown which documents, at which learning rate."""

    def __init__(self, patch):
        self.measured, self.trained, self.rates = [], [], []
        original, batch, rate = stage.measure, stage.make_batch, Distillation._set_rate

        def measuring(model, exact, candidates, documents, *, name):
            self.measured.append((name, [own.name for own in candidates], list(documents)))
            return original(model, exact, candidates, documents, name=name)

        def training(documents):
            self.trained.append(list(documents))
            return batch(documents)

        def rating(module, step):
            rate(module, step)
            self.rates.append((step, module.optimizers().param_groups[0]["lr"]))

        patch.setattr(stage, "measure", measuring)
        patch.setattr(stage, "make_batch", training)
        patch.setattr(Distillation, "_set_rate", rating)


@pytest.fixture
def run(mixed, measured, split, tiny_llama_factory, make_trainer):
    """`run(steps, folder=None)`: distil the mixed ladder."""

    def trainer(**options):
        return make_trainer(**{"enable_checkpointing": False, **options})

    def start(steps, folder=None, ladder=mixed, model=None, validation=split.validation, rate=0.02):
        schedule = Schedule(steps, 120, rate, seed=5)
        model = tiny_llama_factory() if model is None else model
        with quiet_lightning():
            return distil(ladder, measured, model, split.train, validation, schedule, trainer, folder)

    return start


def test_a_few_steps_lower_the_kl_of_every_trained_rung_and_leave_the_others(
    run, mixed, split, exact, tiny_llama, monkeypatch, unchanged, tmp_path
):
    check, tape = unchanged(tiny_llama), Tape(monkeypatch)
    # judged where it is trained: that it learns is what is asked here
    found = run(25, model=tiny_llama, validation=split.train)
    check()
    assert found.kind == "distilled"
    assert found.rungs == mixed.rungs
    assert torch.equal(found.edges, mixed.edges)
    assert found.rung_bytes().tolist() == mixed.rung_bytes().tolist()
    assert found.bank_of == (0, 0, 0, 1, 1, 2)
    assert found.scales[3:] == mixed.scales[3:]
    before, after = (
        measure(tiny_llama, exact, [stage._candidate(own, j) for j in LOW], split.train) for own in (mixed, found)
    )
    assert all(new.kl < 0.9 * old.kl for old, new in zip(before, after, strict=True))
    for name in mixed.modules:
        for j in (3, 4, 5):
            for own, old in zip(found.update(name, j), mixed.update(name, j), strict=True):
                assert torch.equal(own, old)
        # of the new bank no more is kept than its rungs read
        counts = found.edges[LOW, list(found.modules).index(name)].amax(0)
        assert found.banks[0][name].a.counts() == {16: 0, 8: counts[1], 4: counts[2], 2: counts[3]}
    again = load_ladder(save_ladder(found, tmp_path / "ladder"))
    assert again.fingerprint == found.fingerprint != mixed.fingerprint
    assert len(tape.trained) == 25


def test_it_trains_on_train_documents_and_is_judged_on_validation(run, split, monkeypatch):
    tape = Tape(monkeypatch)
    run(4)
    assert [(name, rungs) for name, rungs, _ in tape.measured] == [
        ("rungs before", ["0.5", "0.75", "1"]), ("rungs after", ["0.5", "0.75", "1"])
    ]  # fmt: skip
    assert all(documents == split.validation for *_, documents in tape.measured)
    assert len(tape.trained) == 4
    assert all(own in split.train for documents in tape.trained for own in documents)


def test_what_is_judged_is_the_mixed_ladder_and_then_the_trained_one(run, mixed, split, monkeypatch):
    seen = []
    original = stage.measure

    def measuring(model, exact, candidates, documents, *, name):
        seen.append([own.pairs() for own in candidates])
        return original(model, exact, candidates, documents, name=name)

    monkeypatch.setattr(stage, "measure", measuring)
    found = run(10, validation=split.train)
    assert found.bank_of[:3] == (0, 0, 0)
    for name in mixed.modules:
        for j in LOW:
            for ladder, judged in ((mixed, seen[0]), (found, seen[1])):
                assert all(map(torch.equal, judged[j][name], ladder.update(name, j)))


@pytest.mark.parametrize("worse", [(1,), (0, 2), (0, 1, 2), ()])
def test_a_rung_that_got_worse_on_validation_stays_as_it_was(worse, run, mixed, monkeypatch):
    original = stage.measure

    def measuring(model, exact, candidates, documents, *, name):
        found = original(model, exact, candidates, documents, name=name)
        kls = [1.0] * 3 if name == "rungs before" else [1.5 if j in worse else 0.5 for j in LOW]
        return [replace(own, kl=kl) for own, kl in zip(found, kls, strict=True)]

    monkeypatch.setattr(stage, "measure", measuring)
    found = run(3)
    assert found.kind == "distilled"
    assert torch.equal(found.edges, mixed.edges)
    shift = 0 if len(worse) == 3 else 1
    assert found.bank_of == (*(shift if j in worse else 0 for j in LOW), shift, shift, shift + 1)
    for j in range(len(found.rungs)):
        same = [
            torch.equal(own, old)
            for name in mixed.modules
            for own, old in zip(found.update(name, j), mixed.update(name, j), strict=True)
        ]
        assert all(same) == (j not in LOW or j in worse)
        assert (found.scales[j] == mixed.scales[j]) == (j not in LOW or j in worse)


def test_a_rung_that_only_kept_its_loss_stays_as_it_was(run, mixed, monkeypatch):
    """With nothing learned there is nothing to write twice."""
    assert run(2, rate=1e-12).bank_of in ((0, 0, 0, 0, 0, 1), (0, 0, 0, 1, 1, 2))
    original = stage.measure
    monkeypatch.setattr(stage, "measure", lambda *a, **k: [replace(own, kl=1.0) for own in original(*a, **k)])
    assert run(2).bank_of == mixed.bank_of


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_there_are_as_many_steps_as_asked_and_the_rate_rises_once_and_falls(steps, run, monkeypatch, tmp_path):
    tape = Tape(monkeypatch)
    monkeypatch.setattr(stage, "STEPS_PER_EPOCH", 3)
    monkeypatch.setattr(stage, "WARMUP", 0.25)
    run(steps, tmp_path / "checkpoints")
    assert [step for step, _ in tape.rates] == list(range(steps))
    rates = [rate for _, rate in tape.rates]
    top = max(rates)
    assert rates[: rates.index(top) + 1] == sorted(rates[: rates.index(top) + 1])
    assert rates[rates.index(top) :] == sorted(rates[rates.index(top) :], reverse=True)
    assert top <= 0.02
    expected = [
        0.02 * min(1, (s + 1) / max(1, steps / 4)) * (0.02 + 0.98 * (1 + math.cos(math.pi * s / steps)) / 2)
        for s in range(steps)
    ]
    assert rates == pytest.approx(expected)


def same(one, other) -> bool:
    """The same ladder to the last bit."""
    rows = [
        torch.equal(own, old)
        for name in one.modules
        for j in range(len(one.rungs))
        for own, old in zip(one.update(name, j), other.update(name, j), strict=True)
    ]
    return all(rows) and one.scales == other.scales and one.bank_of == other.bank_of


def test_a_stopped_run_ends_where_an_uninterrupted_one_does(run, split, monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "STEPS_PER_EPOCH", 2)
    whole = run(7, validation=split.train)
    assert whole.bank_of[:3] == (0, 0, 0), "otherwise nothing was learned"
    tape, step = Tape(monkeypatch), Distillation.training_step

    def stopping(module, batch, index):
        if module.current_epoch == 2:
            raise ConnectionError("pulled")
        return step(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "training_step", stopping)
        with pytest.raises(ConnectionError):
            run(7, tmp_path / "checkpoints", validation=split.train)
    first = len(tape.trained)
    assert first == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last"]
    resumed = run(7, tmp_path / "checkpoints", validation=split.train)
    assert [step for step, _ in tape.rates[first:]] == [4, 5, 6]
    assert same(resumed, whole)
    # and one that has ended trains no more
    assert same(run(7, tmp_path / "checkpoints", validation=split.train), whole)
    assert len(tape.trained) == 7


def test_without_a_rung_low_enough_it_is_refused_before_anything_is_run(run, mixed):
    with pytest.raises(ValueError, match=r"^rungs: expected one up to 1, an eighth of the adapter, .* got \(2, 4, 8\)"):
        run(2, ladder=mixed.with_rungs([2, 4]))

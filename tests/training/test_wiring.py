"""What each stage of a fit is given: one real fit with recorders at the seams, and a test for every wire.

An outcome can look right when a wire is wrong: knobs set on test documents, a round trained on validation, an oracle
told the opposite. So nothing here looks at how good a policy is, only at who was handed what. The recorders call
through; the fit is the public one.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from policy import PolicyCheckpoint, Settings, Summary
from policy.difficulty import PAIRS, Difficulty
from policy.rungs import rungs_of_rank
from runtime.ladder import load_ladder
from tests.training.tape import (
    AMOUNTS,
    AT_ONCE,
    BLOCK,
    MEMBERS,
    alike,
    document_of,
    documents_of,
    equal,
    moved,
    own_name,
    rounds_of,
    samples_of,
    splits,
)
from training.learn import train
from training.learn.calibrate import best_scales, calibrated_settings
from training.targets.context import REACH
from training.targets.samples import Samples
from training.targets.token_difficulty import FOLDS, fit_difficulty
from training.task import scale_grid, task_cost


def test_the_ladder_is_built_of_train_documents_alone(wired, case):
    tape, folder, _ = wired
    ((args, kwargs),) = tape.built
    kind, adapter, model, documents, rungs = args
    assert (kind, adapter.path, model, rungs) == ("mixed", case.adapter, tape.stages["build_ladders"][0][0].model, None)
    assert [example["input_ids"] for example in documents] == [e["input_ids"] for e in tape.task.corpus.train]
    assert splits(tape, documents) == {"train"}
    assert kwargs["seed"] == 0
    saved = load_ladder(folder / "ladder")
    assert (saved.kind, saved.rungs) == ("mixed", rungs_of_rank(8))
    assert saved.fingerprint == tape.task.ladder.fingerprint


def test_the_svd_ladder_is_scored_on_test_documents_as_it_is(wired):
    tape, _, _ = wired
    entries = [entry for entry in tape.measured if entry["stage"] == "svd"]
    assert [splits(tape, entry["documents"]) for entry in entries] == [{"test"}] * 4
    assert {entry["policy"].rungs for entry in entries} == {(1, 2, 3, 4, 8)}
    assert all((entry["policy"].scales == 1).all() for entry in entries)
    assert [entry["start"] for entry in entries] == [entry["knob"] for entry in entries] == [0, 1, 2, 3]


def test_settings_and_scales_are_set_from_train_documents_alone(wired):
    tape, _, calibrated = wired
    train_documents = tape.task.corpus.train
    (paths,) = tape.calibrated
    assert paths == tape.paths["trajectory-uncalibrated"]
    assert [len(path.complexity) for path in paths] == [len(example["input_ids"]) for example in train_documents]
    runs = [p for p in tape.passes if p["name"] == "trajectory-uncalibrated"]
    assert [row for p in runs for row in p["rows"]] == [example["input_ids"] for example in train_documents]
    assert all(p["settings"] == Settings(block_tokens=BLOCK) for p in runs)
    assert calibrated.settings == calibrated_settings(Settings(block_tokens=BLOCK), paths)
    samples, _ = samples_of(tape, calibrated, "trajectory-full-1")
    ((damage, tokens, grid),) = tape.scaled
    assert torch.equal(damage, samples.damage)
    assert torch.equal(tokens, samples.tokens)
    assert torch.equal(calibrated.scales, moved(best_scales(damage, tokens, grid)))


def test_full_rank_trajectories_are_those_of_decode_and_of_the_blocks_of_prefill_and_own_ones_of_decode(wired):
    """With the calibrated settings, of every train and validation document once; own ones of the first train documents
    and all of validation."""
    tape, _, calibrated = wired
    assert AMOUNTS.own_documents < len(tape.task.corpus.train), "otherwise this says nothing"
    blocks = {"trajectory-full-1": 1, f"trajectory-full-{BLOCK}": BLOCK, **{own_name(member): 1 for member in MEMBERS}}
    assert set(tape.paths) == {*blocks, "trajectory-uncalibrated", "trajectory-test"}
    top = len(tape.task.ladder.rungs) - 1
    for name, block in blocks.items():
        runs = [p for p in tape.passes if p["name"] == name]
        assert all(p["settings"] == replace(calibrated.settings, block_tokens=block) for p in runs)
        texts = [tape.task.labelled[i]["input_ids"] for i in documents_of(tape, name)]
        assert [row for p in runs for row in p["rows"]] == texts
        assert max(len(p["rows"]) for p in runs) == AT_ONCE
        assert {p["policy"].kind for p in runs} == {"fixed" if "full" in name else "learned"}
        if "full" in name:
            assert {own for p in runs for own in (*p["knob"], *p["start"])} == {top}
        ages = torch.cat([path.features[:, -1] for path in tape.paths[name]])
        assert bool(ages.any()) == (block > 1), "in decode nothing is older than the token before"


def test_the_first_round_trains_on_train_documents_and_stops_by_validation(wired):
    """At both ways to process a text, decode first."""
    tape, _, calibrated = wired
    blocks = [samples_of(tape, calibrated, f"trajectory-full-{block}") for block in (1, BLOCK)]
    for member in MEMBERS:
        first, _ = rounds_of(tape, member)
        assert equal(first["samples"], Samples.concatenate([train for train, _ in blocks]))
        assert equal(first["held_out"], Samples.concatenate([validation for _, validation in blocks]))
        assert first["samples"].log_lambda.isnan().all(), "no learned policy ran there"
        assert first["samples"].damage.isfinite().all()


def test_the_own_round_adds_every_documents_own_path_with_what_was_measured_in_it(wired):
    tape, _, calibrated = wired
    for member in MEMBERS:
        first, own = rounds_of(tape, member)
        added, unseen = samples_of(tape, calibrated, own_name(member))
        assert equal(own["samples"], Samples.concatenate([first["samples"], added]))
        assert equal(own["held_out"], Samples.concatenate([first["held_out"], unseen]))
        assert not torch.equal(added.features, first["samples"].features[: len(added)])


def test_a_few_rungs_of_every_token_are_measured_in_its_own_run(wired):
    """The top one, which is exact, and as many probes; near the one it ran at."""
    tape, _, _ = wired
    rungs = len(tape.task.ladder.rungs)
    for name, paths in tape.paths.items():
        if "own" not in name:
            assert all(path.damage is None for path in paths)
            continue
        runs = [p for p in tape.passes if p["name"] == name]
        records = [(p["record"], row) for p in runs for row in range(len(p["rows"]))]
        for path, (record, row) in zip(paths, records, strict=True):
            length = len(path.complexity)
            assert path.damage.shape == (length, rungs, 1)
            known = path.damage[..., 0].isfinite()
            assert (known.sum(1) == AMOUNTS.probes + 1).all()
            assert not path.damage[:, -1].any()
            for chosen, measured in zip(record["rung"][row].tolist(), known[:, :-1], strict=False):
                near = sorted(range(rungs - 1), key=lambda rung, chosen=chosen: abs(rung - chosen))[: 2 * REACH + 1]
                assert set(measured.nonzero()[:, 0].tolist()) <= set(near)
            assert path.damage[..., 0][known].max() > 0


def test_own_trajectories_are_the_policys_at_many_lambdas_from_where_they_are_served(wired):
    tape, _, _ = wired
    every = set()
    for member in MEMBERS:
        own = [p for p in tape.passes if p["name"] == own_name(member)]
        knobs, starts = [k for p in own for k in p["knob"]], [s for p in own for s in p["start"]]
        assert {p["stage"] for p in own} == {"train_policies"}
        assert len(set(knobs)) == len(tape.paths[own_name(member)])
        assert len(set(starts)) > 1, "not all from one rung"
        assert all(p["kv"].is_full for p in own)
        # a larger lambda spends less, so it starts no higher
        ordered = [start for _, start in sorted(zip(knobs, starts, strict=True))]
        assert ordered == sorted(starts, reverse=True)
        policy, served = served_by(wired, member)
        assert train.served_start(policy, served, torch.tensor(knobs), task_cost([tape.task])).tolist() == starts
        every |= set(knobs)
    assert len(every) == len(MEMBERS) * len(tape.paths[own_name(0)]), "every policy draws its own"
    assert tape.served
    assert all(equal(own, served) for own in tape.served), "train documents, as decode goes, at the full rank"


def served_by(wired, member):
    """Policy `member` as it was when its trajectories were collected, and the chunks that say what a knob spends."""
    tape, _, calibrated = wired
    policy = copy.deepcopy(tape.stages["train_policies"][1][member])
    policy.load_state_dict(rounds_of(tape, member)[1]["state"])
    return policy, samples_of(tape, calibrated, "trajectory-full-1")[0]


def test_the_lambda_of_own_trajectories_is_stored_and_used(wired):
    tape, _, _ = wired
    for name, paths in tape.paths.items():
        found = torch.tensor([path.log_lambda for path in paths])
        knobs = torch.tensor([knob for p in tape.passes if p["name"] == name for knob in p["knob"]])
        expected = knobs if "own" in name else torch.full_like(found, torch.nan)
        assert alike(found, expected), name
    for entry in tape.rounds:
        count = len(tape.rounds[0]["samples"])
        known = entry["samples"].log_lambda[count:]
        assert known.isfinite().all()
        assert len(known) == 0 or len(known.unique()) == AMOUNTS.own_documents
        # what was asked about follows the batch it belongs to
        asked = list(entry["lambda"])
        for features, _, _, stored in (*entry["trained"], *entry["validated"]):
            at = next(i for i, (own, _) in enumerate(asked) if own is features)
            _, log_lambda = asked.pop(at)
            assert log_lambda.isfinite().all()
            there = stored.isfinite()
            assert torch.equal(log_lambda[there], stored[there])
        assert not asked


def rows_of(features, damage, tokens, log_lambda) -> list[tuple]:
    """A row of numbers for every chunk."""
    columns = [features, damage.flatten(1), tokens[:, None], log_lambda[:, None]]
    return [tuple(row) for row in torch.cat(columns, 1).nan_to_num(-99.0).tolist()]


def test_what_is_trained_on_and_stopped_by_is_what_a_round_was_given(wired):
    """Every epoch all of it, in any order; early stopping hears of validation documents alone."""
    tape, _, _ = wired
    for entry in tape.rounds:
        train_rows, unseen_rows = (
            rows_of(own.features, own.damage, own.tokens, own.log_lambda)
            for own in (entry["samples"], entry["held_out"])
        )
        steps = math.ceil(len(train_rows) / AMOUNTS.batch_chunks)
        assert len(entry["trained"]) == AMOUNTS.epochs * steps
        for epoch in range(AMOUNTS.epochs):
            batches = entry["trained"][epoch * steps : (epoch + 1) * steps]
            assert sorted(row for batch in batches for row in rows_of(*batch)) == sorted(train_rows)
        assert [rows_of(*batch) for batch in entry["validated"]] == [unseen_rows] * AMOUNTS.epochs
        assert not set(train_rows) & set(unseen_rows)


def test_policies_are_trained_apart_on_the_same_documents(wired):
    tape, _, _ = wired
    assert [entry["number"] for entry in tape.rounds] == [(m, number) for m in MEMBERS for number in (0, 1)]
    first, second = (rounds_of(tape, member)[0] for member in (0, 1))
    assert equal(first["samples"], second["samples"])
    assert not torch.equal(first["state"]["trunk.0.weight"], second["state"]["trunk.0.weight"])
    assert torch.equal(first["state"]["feature_mean"], second["state"]["feature_mean"])


def test_token_difficulty_is_fitted_on_train_documents_alone(wired):
    tape, folder, _ = wired
    train_documents, found = tape.task.corpus.train, tape.task.targets.difficulty
    tables = tape.tables["tables"][: len(train_documents)]
    whole = fit_difficulty(train_documents, tables, tape.task.ladder.rungs, 256).whole
    assert (whole.token != 127).any(), "otherwise this says nothing"
    learned = tape.stages["train_policies"][1]
    saved = PolicyCheckpoint.load(folder / "learned").policy
    ladders = [tape.task.ladder.difficulty, load_ladder(folder / "ladder").difficulty]
    for other in (found.whole, *ladders, *(policy.difficulty() for policy in (*learned, saved))):
        assert torch.equal(other.token, whole.token)
        assert torch.equal(other.pair, whole.pair)


def test_a_train_document_sees_the_difficulty_that_other_folds_tell_and_the_rest_all_of_it(wired):
    """In every run, row by row: what was fitted on the documents of the other folds, without the code that folds. The
    svd ladder has none: its fixed rungs look at nothing."""
    tape, _, _ = wired
    train_documents = tape.task.corpus.train
    tables, rungs = tape.tables["tables"][: len(train_documents)], tape.task.ladder.rungs

    def fitted(kept) -> Difficulty:
        return fit_difficulty([train_documents[i] for i in kept], [tables[i] for i in kept], rungs, 256).whole

    everyone = range(len(train_documents))
    whole = fitted(everyone)
    others = [fitted([i for i in everyone if i % FOLDS != number % FOLDS]) for number in everyone]
    assert not any(torch.equal(own.token, whole.token) for own in others), "otherwise this says nothing"
    assert len({tuple(own.token.tolist()) for own in others}) == FOLDS
    seen = set()
    for entry in (p for p in tape.passes if p["stage"] != "svd"):
        for row, tokens in enumerate(entry["rows"]):
            part = tape.split_of({"input_ids": tokens})
            if entry["name"] == "trajectory-uncalibrated":
                assert (entry["difficulty"].token[row] == 127).all(), "nothing is known yet"
                continue
            expected = others[document_of(tape, tokens)] if part == "train" else whole
            assert torch.equal(entry["difficulty"].token[row], expected.token), entry["stage"]
            assert torch.equal(entry["difficulty"].pair[row], expected.pair), entry["stage"]
            assert entry["difficulty"].pair[row].shape == (PAIRS,)
            seen.add((entry["stage"], part))
    assert seen >= {
        (stage, part) for stage in ("collect_targets", "train_policies") for part in ("train", "validation")
    }
    assert {part for stage, part in seen if stage not in ("collect_targets", "train_policies")} == {
        "validation",
        "test",
    }


def test_the_policy_starts_with_the_normalisers_of_its_training_samples(wired):
    tape, _, _ = wired
    samples, state = tape.rounds[0]["samples"], tape.rounds[0]["state"]
    torch.testing.assert_close(state["feature_mean"], samples.features.mean(0))
    spread = samples.features.std(0, correction=0)
    moving = spread > 1e-2
    torch.testing.assert_close(state["feature_std"][moving], spread[moving])
    falling = samples.damage[..., scale_grid(AMOUNTS, [tape.task]).index(1.0)].double().mean(0)
    units = (falling[:-1] - falling[1:]).clamp(min=1e-6).float()
    torch.testing.assert_close(state["damage_unit"], units, rtol=1e-4, atol=1e-6)


def test_later_damage_is_measured_on_train_documents(wired):
    tape, _, _ = wired
    assert tape.later
    assert splits(tape, tape.later) == {"train"}


def test_no_test_document_is_run_before_the_comparison(wired):
    tape, _, _ = wired
    early = [p for p in tape.passes if p["stage"] in ("collect_targets", "train_policies")]
    seen = [{"input_ids": row} for p in early for row in p["rows"]]
    assert splits(tape, seen) == {"train", "validation"}
    # nor at given rungs, whole or as far as it is measured
    texts = [row for p in tape.gated if p["stage"] in ("collect_targets", "train_policies") for row in p["rows"]]
    assert texts
    for text in {tuple(row) for row in texts}:
        assert any(tuple(own["input_ids"][: len(text)]) == text for own in tape.task.labelled)


@pytest.mark.parametrize("member", MEMBERS)
def test_own_trajectories_start_at_the_dearest_rung_that_their_spending_buys(wired, member):
    """By hand, as a served row would: what its knob spends on the scored train tokens, and what that affords."""
    tape, _, _ = wired
    policy, samples = served_by(wired, member)
    cost, summary = policy.cost.double().numpy(), Summary.from_features(samples.features)
    own = [p for p in tape.passes if p["name"] == own_name(member)]
    assert own
    for entry in own:
        for knob, start in zip(entry["knob"], entry["start"], strict=True):
            rungs = policy.decide(summary, torch.full((len(samples),), knob)).rung.numpy()
            spent = np.average(cost[rungs], weights=samples.scored.numpy())
            assert start == max([0, *np.flatnonzero(cost <= spent + 1e-6)])


@pytest.mark.parametrize("part", ["samples", "held_out"])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("member", MEMBERS)
def test_every_trained_chunk_carries_the_damage_of_its_own_token(wired, member, number, part):
    """Token by token from the document's own table, or from what its own run measured, without the code that sums it
    up; and what the token does to later ones."""
    tape, _, calibrated = wired
    count = len(tape.task.corpus.train)
    later = torch.tensor(calibrated.later.nats)[:, None]
    assert later[0] > 0
    expected = []
    for name in ("trajectory-full-1", f"trajectory-full-{BLOCK}") if number == 0 else (own_name(member),):
        for i, path in zip(documents_of(tape, name), tape.paths[name], strict=True):
            if (i < count) != (part == "samples"):
                continue
            example, table = tape.task.labelled[i], tape.tables["tables"][i]
            length = len(example["input_ids"])
            assert path.starts.tolist() == list(range(length)), "every token is a chunk"
            for position in range(length - 1):  # the last token predicts nothing
                if position + 1 >= example["prompt_tokens"]:
                    expected.append((table if number == 0 else path.damage)[position] + later)
    found = rounds_of(tape, member)[number][part].damage[-len(expected) :]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5, equal_nan=True)

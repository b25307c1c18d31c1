"""What the comparison of policies is given in a fit, recorded as in test_wiring."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from policy import SIGNALS, PolicyCheckpoint, Summary
from runtime.control.bucket import SLACK_TOKENS
from tests.training.tape import BLOCK, MEMBERS, samples_of, splits
from training.compare.curves import CLOSE, KNOB_POINTS
from training.compare.verdict import verdict_rungs
from training.learn.calibrate import calibrate_knob
from training.targets.samples import document_samples, scored_chunks

IN_BLOCKS = {"fixed in blocks", "learned in blocks"}
IN_STEPS = {"fixed in steps", "in steps"}
COMPARED = {"fixed", "percentile", "learned", "capped", "random", "oracle", "svd"}


def test_held_out_runs_keep_their_pages_in_full_precision_but_as_served(wired):
    tape, _, calibrated = wired
    kv = calibrated.settings.kv
    assert "full" not in (kv.hard, kv.easy)
    runs = [p for p in tape.passes if p["rows"] and not p["name"]]
    assert {p["stage"] for p in runs} == COMPARED | IN_BLOCKS | IN_STEPS
    assert all(p["kv"].is_full for p in runs if p["stage"] in COMPARED)
    for p in runs:
        if p["stage"] in IN_BLOCKS | IN_STEPS:
            assert p["kv"].threshold.tolist() == pytest.approx([kv.threshold] * len(p["knob"]))
            assert not p["kv"].is_full


def test_nobody_is_held_to_a_budget_but_the_learned_policy_as_served(wired):
    """Targets, calibration and the comparison let everybody spend; what serving makes of it has the same knobs."""
    tape, folder, _ = wired
    free = [p for p in tape.passes if p["stage"] != "capped"]
    assert {p["stage"] for p in free} >= {"collect_targets", "train_policies", "percentile", "learned", "random"}
    assert all(math.isinf(budget) for p in free for budget in p["budget"])
    cost = PolicyCheckpoint.load(folder / "learned").cost
    first = tape.stages["train_policies"][1][0]
    on_test = [e for e in tape.measured if e["stage"] == "learned" and splits(tape, e["documents"]) == {"test"}]
    learned = [e for e in on_test if e["policy"] is first]
    capped = [e for e in tape.measured if e["stage"] == "capped"]
    assert capped
    assert [(e["knob"], e["start"]) for e in capped] == [(e["knob"], e["start"]) for e in learned]
    assert all(e["policy"] is first for e in capped)
    assert [splits(tape, e["documents"]) for e in capped] == [{"test"}] * len(capped)
    assert [e["budget"] for e in capped] == pytest.approx([cost[e["start"]] for e in capped], abs=1e-6)
    steps = [e for e in tape.measured if e["stage"] == "in steps"]
    read = {tape.task.ladder.rungs.index(rung) for rung in verdict_rungs(tape.task.ladder.rungs)}
    assert steps
    assert [(e["knob"], e["start"]) for e in steps] == [(e["knob"], e["start"]) for e in learned if e["start"] in read]
    assert all(e["policy"] is first and splits(tape, e["documents"]) == {"test"} for e in steps)
    # and they keep it: with the bucket's slack, on every document
    for entry in capped:
        spent = (entry["scores"].rungs + entry["scores"].prompt_rungs) @ np.array(cost)
        tokens = entry["scores"].rungs.sum(1) + entry["scores"].prompt_rungs.sum(1)
        assert (spent <= entry["budget"] * (tokens + SLACK_TOKENS) + 1e-6).all()


def test_every_policy_is_judged_as_decode_goes_and_two_in_the_blocks_of_prefill(wired):
    tape, _, calibrated = wired
    assert {entry["stage"] for entry in tape.measured} == (COMPARED - {"oracle"}) | IN_BLOCKS | IN_STEPS
    decode = replace(calibrated.settings, block_tokens=1)
    assert calibrated.settings.block_tokens == BLOCK
    for entry in tape.measured:
        assert entry["settings"] == (calibrated.settings if entry["stage"] in IN_BLOCKS else decode)


def curves(tape):
    """(stage, policy, its measurements on validation, those on test) of every policy with a knob."""
    found = {}
    for entry in tape.measured:
        if entry["stage"] in {"percentile", "learned", "random", "learned in blocks"}:
            parts = found.setdefault((entry["stage"], id(entry["policy"])), ([], []))
            parts[splits(tape, entry["documents"]) == {"test"}].append(entry)
    return [(stage, *parts) for (stage, _), parts in found.items()]


def met_knobs(tape, cost, validation):
    """{rung: (knob, what it spent)} of the rungs whose cost was met on validation, from its measurements in order."""
    found = {}
    for entry in validation[KNOB_POINTS:]:
        rung, spent = entry["start"], entry["scores"].mean(cost)
        assert rung not in found, "a rung that is met is not tried again"
        if abs(spent - cost[rung]) <= CLOSE * cost[rung]:
            found[rung] = entry["knob"], spent
    return found


def test_knobs_are_set_on_validation_and_each_rung_that_is_met_is_measured_once_on_test(wired):
    tape, folder, _ = wired
    rungs = tape.task.ladder.rungs
    aims, read = list(range(len(rungs) - 1)), [rungs.index(rung) for rung in verdict_rungs(rungs)]
    cost = np.array(PolicyCheckpoint.load(folder / "learned").cost)
    found, met = curves(tape), 0
    assert [stage for stage, *_ in found] == ["percentile", *["learned"] * len(MEMBERS), "random", "learned in blocks"]
    learned = tape.stages["train_policies"][1]
    policies = [validation[0]["policy"] for stage, validation, _ in found if stage == "learned"]
    assert all(one is other for one, other in zip(policies, learned, strict=True))
    assert found[-1][1][0]["policy"] is learned[0]
    for number, (stage, validation, test) in enumerate(found):
        assert [splits(tape, entry["documents"]) for entry in validation] == [{"validation"}] * len(validation)
        wanted = aims if number == 1 else read
        assert [e["start"] for e in validation[KNOB_POINTS : KNOB_POINTS + len(wanted)]] == wanted, stage
        reached = met_knobs(tape, cost, validation)
        assert [(e["start"], e["knob"]) for e in test] == [(rung, reached[rung][0]) for rung in sorted(reached)]
        met += len(reached)
    assert met > len(found), "otherwise this says little"
    fixed = [entry for entry in tape.measured if entry["stage"] == "fixed"]
    assert [(splits(tape, e["documents"]), e["knob"], e["start"]) for e in fixed] == [
        ({"test"}, float(rung), rung) for rung in aims
    ]


def test_the_learned_checkpoint_has_the_curve_of_its_own_validation_runs(wired):
    tape, folder, _ = wired
    saved = PolicyCheckpoint.load(folder / "learned")
    cost = np.array(saved.cost)
    validation = next(own for stage, own, _ in curves(tape) if stage == "learned")
    coarse = [(entry["knob"], entry["scores"].mean(cost)) for entry in validation[:KNOB_POINTS]]
    points = {coarse[0], coarse[-1], *met_knobs(tape, cost, validation).values()}
    knobs, costs = zip(*sorted(points, reverse=True), strict=True)  # log lambda: from cheap to dear
    expected = calibrate_knob(knobs, costs)
    assert saved.policy.kind == "learned"
    assert saved.curve.budgets == pytest.approx(expected.budgets, abs=1e-6)
    assert saved.curve.knobs == pytest.approx(expected.knobs, abs=1e-5)
    learned = tape.stages["train_policies"][1][0].state_dict()
    assert all(torch.equal(value, saved.policy.state_dict()[name]) for name, value in learned.items())


def test_what_is_saved_is_of_this_model_adapter_and_ladder(wired):
    tape, folder, calibrated = wired
    for name in ("learned", "policy"):
        saved = PolicyCheckpoint.load(folder / name)
        ladder = tape.task.ladder
        assert (saved.fingerprints["adapter"], saved.fingerprints["ladder"]) == (ladder.adapter, ladder.fingerprint)
        assert not saved.fingerprints["shared"]
        assert saved.settings == calibrated.settings


def test_the_fixed_baseline_has_the_best_scale_of_every_rung(wired):
    tape, _, calibrated = wired
    assert torch.equal(tape.fixed_scales, calibrated.scales)
    assert (calibrated.scales[:-1] != 1).any(), "otherwise this says nothing"


def test_the_oracle_knows_the_damage_of_the_test_documents(wired):
    tape, _, calibrated = wired
    ((*known,),) = tape.oracle.known
    documents = tape.task.corpus.test
    own = tape.paths["trajectory-test"], tape.tables["tables-test"]
    expected = document_samples(documents, *own, calibrated.later)
    for hindsight, samples, document, path in zip(known, expected, documents, own[0], strict=True):
        assert torch.equal(hindsight.starts, path.starts[scored_chunks(document, path)])
        assert torch.equal(hindsight.damage, samples.damage[..., 0])
        assert torch.equal(hindsight.scored, samples.scored)
        assert (hindsight.damage >= 0).all()
        assert hindsight.damage[:, 0].sum() > hindsight.damage[:, -1].sum() == 0
    runs = [p for p in tape.passes if p["stage"] == "oracle"]
    rows = {tuple(row) for p in runs for row in p["rows"]}
    assert rows == {tuple(example["input_ids"]) for example in documents}
    assert torch.equal(tape.oracle.scales, calibrated.scales)


def test_a_comparison_runs_no_train_document(wired):
    """What it is told of them are the targets that were collected before."""
    tape, _, _ = wired
    early = ("", "open_tasks", "build_ladders", "collect_targets", "train_policies")
    runs = [p for p in (*tape.passes, *tape.gated) if p["stage"] not in early]
    seen = [{"input_ids": row} for p in runs for row in p["rows"]]
    assert splits(tape, seen) == {"validation", "test"}


def response_decisions(entry, rows):
    """What these rows of a run decided on, and the rungs they took, where no start rung steps in: that caps prompts,
    and stands until the model has put something out."""
    columns = {name: column[rows] for name, column in entry["record"].items()}
    free = columns["held_valid"][..., SIGNALS.index("entropy")] & (
        columns["positions"] >= entry["prompt_tokens"][rows, None]
    )
    chosen = columns["opens"] & columns["real"] & free
    seen = Summary(
        *(columns[name][chosen] for name in ("held", "held_valid", "first", "positions")), age=columns["age"][chosen]
    )
    return seen, columns["rung"][chosen]


def test_percentile_follows_its_signal_in_its_direction(wired):
    """At one knob the rung can only rise with what the thresholds are on, or only fall where high values get less."""
    tape, _, _ = wired
    moved = 0
    runs = [(p, knob) for p in tape.passes if p["policy"].kind == "percentile" for knob in set(p["knob"])]
    for entry, knob in runs:
        seen, rungs = response_decisions(entry, torch.tensor([own == knob for own in entry["knob"]]))
        value, known = entry["policy"].value(seen)
        order = (entry["policy"].sign * value[known]).argsort()
        assert (rungs[known][order].diff() >= 0).all()
        moved += len(rungs[known].unique()) > 1
    assert moved, "otherwise this says nothing"


def test_percentile_has_the_quantiles_of_train_documents_and_the_best_scales(wired):
    tape, _, calibrated = wired
    ((features, base, among),) = tape.candidates
    train_samples, _ = samples_of(tape, calibrated, "trajectory-full-1")
    assert torch.equal(features, train_samples.features)
    summary = Summary.from_features(features)
    for policy in among:
        value, known = policy.value(summary)
        quantiles = np.quantile(value[known].double().numpy(), np.linspace(0, 1, len(policy.grid)))
        assert policy.grid.tolist() == pytest.approx(quantiles.tolist(), abs=1e-6)
        assert torch.equal(policy.scales, calibrated.scales)
        assert policy.config()["weights"] == calibrated.settings.chunk.weights
    assert base.signal == "complexity"


def test_the_percentile_baseline_is_chosen_on_validation_documents(wired):
    """By their tables at full-rank trajectories, every rung at its best scale, at the middle of the verdict's rungs."""
    tape, _, calibrated = wired
    ((among, seen, cost, rung, best),) = tape.chosen
    _, unseen = samples_of(tape, calibrated, "trajectory-full-1")
    assert among is tape.candidates[0][-1]
    assert torch.equal(seen.features, unseen.features)
    assert torch.equal(seen.damage, unseen.damage[..., 0])
    assert torch.equal(seen.scored, unseen.scored)
    read = verdict_rungs(tape.task.ladder.rungs)
    assert tape.task.ladder.rungs[rung] == read[len(read) // 2]
    torch.testing.assert_close(cost, tape.stages["train_policies"][1][0].cost)
    assert {id(e["policy"]) for e in tape.measured if e["stage"] == "percentile"} == {id(best)}


def test_random_has_the_best_scale_of_every_rung(wired):
    tape, _, calibrated = wired
    policies = [entry["policy"] for entry in tape.measured if entry["stage"] == "random"]
    assert policies
    assert all(torch.equal(policy.scales, calibrated.scales) for policy in policies)

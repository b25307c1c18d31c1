"""What each stage of a fit is given: one real fit with recorders at the seams, and a test for every wire.

An outcome can look right when a wire is wrong: knobs set on test documents, a round trained on validation, an oracle
told the opposite. So nothing here looks at how good a policy is, only at who was handed what. The recorders call
through; the fit is the public one.
"""

import copy
import functools
import math
from dataclasses import dataclass, field, fields, replace

import numpy as np
import pytest
import torch

from policy import SIGNALS, PolicyCheckpoint, Settings, Summary
from policy.difficulty import PAIRS, Difficulty
from policy.rungs import rungs_of_rank
from runtime.control.bucket import SLACK_TOKENS
from runtime.control.record import Keep
from runtime.ladder import load_ladder
from runtime.reference.run import AdaptiveRun
from training import fit as fit_module
from training import pipeline
from training.amounts import Amounts
from training.compare import scorer
from training.compare.curves import CLOSE, KNOB_POINTS
from training.compare.hindsight import Oracle
from training.compare.scorer import HeldOut
from training.compare.verdict import verdict_rungs
from training.learn import train
from training.learn.calibrate import best_scales, calibrate_knob, calibrated_settings
from training.learn.module import PolicyFit
from training.targets import damage as in_runs
from training.targets import paths as first_stage
from training.targets import samples as chunks_of
from training.targets.context import REACH
from training.targets.samples import Samples, document_samples, scored_chunks
from training.targets.token_difficulty import FOLDS, fit_difficulty
from training.task import scale_grid, task_cost

AMOUNTS = Amounts(
    train_documents=7, validation_documents=4, test_documents=5, max_tokens=64, min_completion_tokens=16,
    shard_documents=2, later_chunks=3, epochs=2, bootstrap=10, seeds=2, probes=2,
    own_documents=5,
)  # fmt: skip
BLOCK = 32
MEMBERS = range(AMOUNTS.seeds)
SHARD, AT_ONCE = 4, 3
"""Documents of a shard of trajectories, and rows of a pass: several of both, so that each row has to find its own."""


@dataclass
class Tape:
    """Everything that was handed over, in order."""

    stage: str = ""
    """Where the fit is: a stage's name, or the curve under way."""
    built: list[tuple] = field(default_factory=list)
    """What ladders were built of."""
    collecting: str = ""
    """Name of the trajectories under way."""
    passes: list[dict] = field(default_factory=list)
    """Runs of the model under a policy: stage, documents, policy, what the rows could spend and were told of tokens."""
    gated: list[dict] = field(default_factory=list)
    """Passes at given rungs: stage, texts."""
    measured: list[dict] = field(default_factory=list)
    """Measurements of held-out documents."""
    rounds: list[dict] = field(default_factory=list)
    """Rounds of training, with every batch that was trained on or validated."""
    served: list[Samples] = field(default_factory=list)
    """Chunks on which was found what a knob spends."""
    paths: dict[str, list] = field(default_factory=dict)
    """Trajectories by name, in the order of the documents asked for."""
    tables: dict[str, list] = field(default_factory=dict)
    calibrated: list[list] = field(default_factory=list)
    """Paths that settings were calibrated on."""
    scaled: list[tuple] = field(default_factory=list)
    """What the best scales of rungs were set from."""
    later: list[dict] = field(default_factory=list)
    """Documents that later damage was measured on."""
    candidates: list[tuple] = field(default_factory=list)
    """What percentile thresholds were made of, and what came of it."""
    chosen: list[tuple] = field(default_factory=list)
    """What the best of them was told by, and which it was."""
    fixed_scales: torch.Tensor | None = None
    oracle: Oracle | None = None
    task: object = None
    stages: dict[str, tuple] = field(default_factory=dict)

    def split_of(self, example) -> str:
        corpus = self.task.corpus
        names = ("train", "validation", "test")
        return next(n for n in names if any(example["input_ids"] == e["input_ids"] for e in getattr(corpus, n)))


def moved(scales: torch.Tensor) -> torch.Tensor:
    """Away from 1, where those of a ladder that is calibrated are: so that it is seen who has them."""
    return torch.cat([1.05 * scales[:-1], scales[-1:]])


def record(tape: Tape, patch: pytest.MonkeyPatch) -> None:
    """Put recorders around the seams; every one of them calls what it stands in for."""

    def scaled(*args):
        tape.scaled.append(args)
        return moved(best_scales(*args))

    patch.setattr(first_stage, "best_scales", scaled)

    def around(owner, name, note):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            before = tape.stage
            note_after = note(*args, **kwargs)
            result = original(*args, **kwargs)
            if note_after is not None:
                note_after(result)
            tape.stage = before
            return result

        patch.setattr(owner, name, wrapped)

    def stage(name):
        def note(*args, **kwargs):
            tape.stage = name
            return lambda result: tape.stages.__setitem__(name, (args, result))

        return note

    for name in ("open_tasks", "build_ladders", "collect_targets", "train_policies", "compare_policies"):
        around(fit_module, name, stage(name))

    def curve(name, *_):
        tape.stage = name

    around(pipeline, "build", lambda *args, **kwargs: tape.built.append((args, kwargs)))
    around(pipeline, "measure_svd", lambda *_: curve("svd"))
    around(pipeline, "policy_curve", lambda name, *_, **__: curve(name))
    around(pipeline, "percentile_policy", lambda *_: curve("choosing percentile"))
    around(pipeline, "candidates", lambda *args: lambda found: tape.candidates.append((*args, found)))
    around(pipeline, "best_thresholds", lambda *args: lambda found: tape.chosen.append((*args, found)))

    def fixed(policy, settings, test, name="fixed", **_):
        tape.stage = name
        tape.fixed_scales = policy.scales.clone()

    around(pipeline, "fixed_curve", fixed)

    def oracle(settings, oracle, *_):
        tape.stage, tape.oracle = "oracle", oracle

    around(pipeline, "oracle_curve", oracle)
    around(pipeline, "capped_curve", lambda *_: curve("capped"))
    around(pipeline, "same_knobs", lambda name, *_, **__: curve(name))
    # Scoring keeps its rungs alone; here every decision is looked at.
    deciding = functools.partial(scorer.activate, keep=Keep.DECISIONS)
    patch.setattr(scorer, "activate", lambda model, plan, **_: deciding(model, plan))

    def ran(run, tokens, real, stream, kv):
        operating = stream.state.operating
        rows = [row[m.bool()].tolist() for row, m in zip(tokens, real, strict=True)] if real is not None else []
        entry = {
            "stage": tape.stage, "name": tape.collecting, "rows": rows, "policy": run.plan.policy,
            "settings": run.plan.settings, "knob": operating.knob.tolist(), "start": operating.start_rung.tolist(),
            "kv": kv, "budget": operating.budget.tolist(), "difficulty": stream.difficulty,
        }  # fmt: skip
        tape.passes.append(entry)
        if stream.keep is Keep.DECISIONS:
            entry.update(record=stream.columns(), prompt_tokens=stream.prompt_tokens)

    def in_blocks(run, tokens, mask, cache, kept):
        return lambda _: ran(run, tokens, mask, cache.stream, cache.stream.state.operating.kv)

    def whole(run, tokens, real, *args, **kwargs):
        return lambda found: ran(run, tokens, real, found.stream, found.stream.state.operating.kv)

    around(AdaptiveRun, "_run", in_blocks)
    for owner in (scorer, in_runs):
        around(owner, "settled", whole)

    def gated(run, tokens, real, weights, *, streams=None, listen=False):
        length = tokens.shape[1] if streams is None else int(streams.slots.max()) + 1
        texts = [row[m].tolist() for row, m in zip(tokens[:, :length], real[:, :length], strict=True)]
        tape.gated.append({"stage": tape.stage, "rows": texts})

    around(AdaptiveRun, "gated", gated)

    def measure(held_out, policy, settings, operating, name=None):
        documents = [example for scorer in held_out.scorers for example in scorer.examples]
        columns = (operating.knob, operating.start_rung, operating.budget)
        points = zip(*(column.tolist() for column in columns), strict=True)
        entries = [
            {"stage": tape.stage, "policy": policy, "documents": documents, "settings": settings,
             "knob": knob, "start": start, "budget": budget}
            for knob, start, budget in points
        ]  # fmt: skip
        tape.measured.extend(entries)

        def note(found):
            for entry, scores in zip(entries, found, strict=True):
                entry.update(scores=scores)

        return note

    around(HeldOut, "measure", measure)

    def train_round(context, tasks, policy, samples, held_out, latency, learning, number):
        state = {name: value.clone() for name, value in policy.state_dict().items()}
        tape.rounds.append(
            {"number": number, "samples": samples, "held_out": held_out, "state": state, "trained": [],
             "validated": [], "lambda": []}
        )  # fmt: skip

    around(train, "train_round", train_round)
    around(train, "served_start", lambda policy, samples, knob, rung_bytes: tape.served.append(samples))
    around(PolicyFit, "training_step", lambda _, batch, index: tape.rounds[-1]["trained"].append(batch))
    around(PolicyFit, "validation_step", lambda _, batch, index: tape.rounds[-1]["validated"].append(batch))
    around(PolicyFit, "objective", lambda _, *batch: tape.rounds[-1]["lambda"].append((batch[0], batch[-1])))

    def collected(into):
        def note(context, task, name, *args, **kwargs):
            tape.task, tape.collecting = task, name

            def done(found):
                into[name], tape.collecting = found, ""

            return done

        return note

    for owner in (first_stage, train):
        around(owner, "collect_paths", collected(tape.paths))
    for owner in (first_stage, pipeline):
        around(owner, "collect_tables", collected(tape.tables))

    def later(run, example, *_):
        tape.later.append(example)

    around(chunks_of, "later_damage", later)
    around(first_stage, "calibrated_settings", lambda settings, paths: tape.calibrated.append(list(paths)))
    patch.setattr(first_stage, "TRAJECTORY_DOCUMENTS", SHARD)
    patch.setattr(first_stage, "LOGITS_BYTES", AT_ONCE * AMOUNTS.max_tokens * 256 * 4)


@pytest.fixture(scope="module")
def wired(case, tmp_path_factory):
    """The tape of one fit, its output folder, and what its first stage made."""
    tape, folder = Tape(), tmp_path_factory.mktemp("wired") / "out"
    with pytest.MonkeyPatch.context() as patch:
        record(tape, patch)
        fit_module.fit(
            str(case.model), str(case.adapter), str(case.dataset), str(folder), amounts=AMOUNTS,
            trainer={"accelerator": "cpu"},
        )  # fmt: skip
    tape.task = tape.stages["collect_targets"][1][0][0]
    return tape, folder, tape.stages["collect_targets"][1][1]


def splits(tape, examples):
    return {tape.split_of(example) for example in examples}


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def equal(one: Samples, other: Samples) -> bool:
    return all(alike(getattr(one, own.name), getattr(other, own.name)) for own in fields(Samples))


def documents_of(tape, name) -> list[int]:
    """Numbers of the labelled documents that trajectories of this name are of: all, or where they are a policy's own
    the first train documents and all of validation."""
    count, every = len(tape.task.corpus.train), range(len(tape.task.labelled))
    return [i for i in every if "own" not in name or i < AMOUNTS.own_documents or i >= count]


def samples_of(tape, calibrated, name) -> tuple[Samples, Samples]:
    """Those of the train and of the validation documents, from trajectories of this name."""
    numbers = documents_of(tape, name)
    examples, tables = ([column[i] for i in numbers] for column in (tape.task.labelled, tape.tables["tables"]))
    parts = document_samples(examples, tape.paths[name], tables, calibrated.later)
    count = sum(i < len(tape.task.corpus.train) for i in numbers)
    return Samples.concatenate(parts[:count]), Samples.concatenate(parts[count:])


def own_name(member: int) -> str:
    """The trajectories of a policy's own in its only round."""
    return f"trajectory-own-{member}-1"


def rounds_of(tape, member):
    return [entry for entry in tape.rounds if entry["number"][0] == member]


def document_of(tape, row) -> int:
    """Number of the labelled document with this text."""
    return next(i for i, example in enumerate(tape.task.labelled) if example["input_ids"] == row)


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

"""What each stage of a fit is given: one real fit with recorders at the seams, and a test for every wire.

An outcome can look right when a wire is wrong: knobs set on test documents, a round trained on validation, an oracle
told the opposite. So nothing here looks at how good a policy is, only at who was handed what. The recorders call
through; the fit is the public one.
"""

import copy
import functools
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from policy import SIGNALS, PolicyCheckpoint, Summary
from policy.rungs import rungs_of_rank
from runtime.control.bucket import SLACK_TOKENS
from runtime.control.record import Keep
from runtime.ladder import load_ladder
from runtime.reference.run import AdaptiveRun
from training import fit as fit_module
from training import pipeline
from training.amounts import Amounts
from training.compare import scorer
from training.compare.curves import KNOB_POINTS
from training.compare.hindsight import Oracle
from training.compare.scorer import HeldOut
from training.learn import train
from training.learn.calibrate import best_scales, calibrate_knob
from training.targets import paths as first_stage
from training.targets import samples as chunks_of
from training.targets.samples import Samples, document_samples
from training.task import scale_grid

AMOUNTS = Amounts(
    train_documents=6, validation_documents=4, test_documents=5, max_tokens=64, min_completion_tokens=16,
    shard_documents=2, later_chunks=3, epochs=2, bootstrap=10,
)  # fmt: skip


@dataclass
class Tape:
    """Everything that was handed over, in order."""

    stage: str = ""
    """Where the fit is: a stage's name, or the curve under way."""
    built: list[tuple] = field(default_factory=list)
    """What ladders were built of."""
    passes: list[dict] = field(default_factory=list)
    """Runs of the model under a policy: stage, documents, policy, what the rows could spend."""
    measured: list[dict] = field(default_factory=list)
    """Measurements of held-out documents."""
    rounds: list[dict] = field(default_factory=list)
    """Rounds of training."""
    paths: dict[str, list] = field(default_factory=dict)
    """Trajectories by name, in the order of the documents asked for."""
    tables: dict[str, list] = field(default_factory=dict)
    calibrated: list[list] = field(default_factory=list)
    """Paths that settings were calibrated on."""
    later: list[dict] = field(default_factory=list)
    """Documents that later damage was measured on."""
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
    patch.setattr(first_stage, "best_scales", lambda *args: moved(best_scales(*args)))

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

    for name in ("open_tasks", "build_ladders", "collect_targets", "train_policy", "compare_policies"):
        around(fit_module, name, stage(name))

    def curve(name, *_):
        tape.stage = name

    around(pipeline, "build", lambda *args, **kwargs: tape.built.append((args, kwargs)))
    around(pipeline, "measure_svd", lambda *_: curve("svd"))
    around(pipeline, "policy_curve", lambda name, *_: curve(name))
    around(pipeline, "percentile_policy", lambda *_: curve("choosing percentile"))

    def fixed(policy, *_):
        tape.stage, tape.fixed_scales = "fixed", policy.scales.clone()

    around(pipeline, "fixed_curve", fixed)

    def oracle(settings, oracle, *_):
        tape.stage, tape.oracle = "oracle", oracle

    around(pipeline, "oracle_curve", oracle)
    around(pipeline, "capped_curve", lambda *_: curve("capped"))
    # Scoring keeps its rungs alone; here every decision is looked at.
    deciding = functools.partial(scorer.activate, keep=Keep.DECISIONS)
    patch.setattr(scorer, "activate", lambda model, plan, **_: deciding(model, plan))

    def passed(run, tokens, mask, cache, kept):
        operating = cache.stream.state.operating
        rows = [row[m.bool()].tolist() for row, m in zip(tokens, mask, strict=True)] if mask is not None else []
        tape.passes.append(
            {"stage": tape.stage, "rows": rows, "policy": run.plan.policy, "settings": run.plan.settings,
             "knob": operating.knob.tolist(), "start": operating.start_rung.tolist(), "kv": operating.kv,
             "budget": operating.budget.tolist()}
        )  # fmt: skip
        entry, stream = tape.passes[-1], cache.stream
        if stream.keep is not Keep.DECISIONS:
            return None
        return lambda _: entry.update(record=stream.columns(), prompt_tokens=stream.prompt_tokens)

    around(AdaptiveRun, "_run", passed)

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

    def train_round(context, tasks, policy, samples, held_out, latency, number):
        state = {name: value.clone() for name, value in policy.state_dict().items()}
        tape.rounds.append({"samples": samples, "held_out": held_out, "state": state})

    around(train, "train_round", train_round)

    def collected(into):
        def note(context, task, name, *args):
            tape.task = task
            return lambda found: into.__setitem__(name, found)

        return note

    for owner in (first_stage, train):
        around(owner, "collect_paths", collected(tape.paths))
    for owner in (first_stage, pipeline):
        around(owner, "collect_tables", collected(tape.tables))

    def later(run, example, *_):
        tape.later.append(example)

    around(chunks_of, "later_damage", later)
    around(first_stage, "calibrated_settings", lambda settings, paths: tape.calibrated.append(list(paths)))


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


def equal(one: Samples, other: Samples) -> bool:
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("features", "damage", "tokens", "scored"))


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
    assert [len(path.complexity) for path in paths] == [len(example["input_ids"]) for example in train_documents]
    count = len(train_documents)
    own = tape.paths["trajectory-full"][:count], tape.tables["tables"][:count]
    samples = Samples.concatenate(document_samples(train_documents, *own, calibrated.later))
    assert torch.equal(calibrated.scales, moved(best_scales(samples.damage, samples.tokens, (1.0,))))


def test_the_first_round_trains_on_train_documents_and_validates_on_validation(wired):
    tape, _, calibrated = wired
    labelled, count = tape.task.labelled, len(tape.task.corpus.train)
    documents = document_samples(labelled, tape.paths["trajectory-full"], tape.tables["tables"], calibrated.later)
    assert equal(tape.rounds[0]["samples"], Samples.concatenate(documents[:count]))
    assert equal(tape.rounds[0]["held_out"], Samples.concatenate(documents[count:]))


def test_the_own_round_adds_every_documents_own_path_with_its_own_table(wired):
    tape, _, calibrated = wired
    train_documents = tape.task.corpus.train
    own = tape.paths["trajectory-own-1"][: len(train_documents)], tape.tables["tables"][: len(train_documents)]
    added = Samples.concatenate(document_samples(train_documents, *own, calibrated.later))
    assert equal(tape.rounds[1]["samples"], Samples.concatenate([tape.rounds[0]["samples"], added]))
    assert equal(tape.rounds[1]["held_out"], tape.rounds[0]["held_out"])
    assert not torch.equal(added.features, tape.rounds[0]["samples"].features[: len(added.features)])


def test_own_trajectories_are_the_policys_at_many_lambdas_from_where_they_are_served(wired):
    tape, _, _ = wired
    own = [p for p in tape.passes if p["stage"] == "train_policy"]
    assert own
    knobs, starts = [k for p in own for k in p["knob"]], [s for p in own for s in p["start"]]
    assert {p["policy"].kind for p in own} == {"learned"}
    assert len(set(knobs)) == len(tape.task.labelled)
    assert len(set(starts)) > 1, "not all from one rung"
    assert all(p["kv"].is_full for p in own)
    # a larger lambda spends less, so it starts no higher
    ordered = [start for _, start in sorted(zip(knobs, starts, strict=True))]
    assert ordered == sorted(starts, reverse=True)
    policy, samples = copy.deepcopy(tape.stages["train_policy"][1]), tape.rounds[0]["samples"]
    policy.load_state_dict(tape.rounds[1]["state"])  # as it was when the trajectories were collected
    assert train.served_start(policy, samples, torch.tensor(knobs)).tolist() == starts


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


def test_held_out_runs_keep_their_pages_in_full_precision(wired):
    tape, _, calibrated = wired
    assert "full" not in (calibrated.settings.kv.hard, calibrated.settings.kv.easy)
    names = {"fixed", "percentile", "learned", "capped", "random", "oracle", "svd", "choosing percentile"}
    runs = [p for p in tape.passes if p["stage"] in names]
    assert {p["stage"] for p in runs} == names
    assert all(p["kv"].is_full for p in runs)


def test_nobody_is_held_to_a_budget_but_the_learned_policy_as_served(wired):
    """Targets, calibration and the comparison let everybody spend; what serving makes of it has the same knobs."""
    tape, folder, _ = wired
    free = [p for p in tape.passes if p["stage"] != "capped"]
    assert {p["stage"] for p in free} >= {"collect_targets", "train_policy", "percentile", "learned", "random"}
    assert all(math.isinf(budget) for p in free for budget in p["budget"])
    cost = PolicyCheckpoint.load(folder / "learned").cost
    aims = len(cost) - 1
    learned = [e for e in tape.measured if e["stage"] == "learned"][-aims:]
    capped = [e for e in tape.measured if e["stage"] == "capped"]
    assert [(e["knob"], e["start"]) for e in capped] == [(e["knob"], e["start"]) for e in learned]
    assert all(e["policy"] is learned[0]["policy"] for e in capped)
    assert [splits(tape, e["documents"]) for e in capped] == [{"test"}] * aims
    assert [e["budget"] for e in capped] == pytest.approx(cost[:-1], abs=1e-6)
    # and they keep it: with the bucket's slack, on every document
    for entry in capped:
        spent = (entry["scores"].rungs + entry["scores"].prompt_rungs) @ np.array(cost)
        tokens = entry["scores"].rungs.sum(1) + entry["scores"].prompt_rungs.sum(1)
        assert (spent <= entry["budget"] * (tokens + SLACK_TOKENS) + 1e-6).all()


def test_every_policy_is_judged_with_the_calibrated_settings(wired):
    tape, _, calibrated = wired
    assert tape.measured
    assert all(entry["settings"] == calibrated.settings for entry in tape.measured)


def test_knobs_are_swept_on_validation_and_each_aim_is_measured_once_on_test(wired):
    tape, _, _ = wired
    aims = len(tape.task.ladder.rungs) - 1
    for name in ("percentile", "learned", "random"):
        own = [entry for entry in tape.measured if entry["stage"] == name]
        order = [splits(tape, entry["documents"]) for entry in own]
        assert order == [{"validation"}] * (KNOB_POINTS + aims) + [{"test"}] * aims
        assert [entry["start"] for entry in own[-aims:]] == list(range(aims))
    choosing = [entry for entry in tape.measured if entry["stage"] == "choosing percentile"]
    assert [splits(tape, entry["documents"]) for entry in choosing] == [{"validation"}] * len(choosing)
    fixed = [entry for entry in tape.measured if entry["stage"] == "fixed"]
    assert [(splits(tape, e["documents"]), e["knob"], e["start"]) for e in fixed] == [
        ({"test"}, float(rung), rung) for rung in range(aims)
    ]


def test_the_learned_checkpoint_has_the_curve_of_its_own_validation_runs(wired):
    tape, folder, _ = wired
    saved = PolicyCheckpoint.load(folder / "learned")
    own = [e for e in tape.measured if e["stage"] == "learned" and splits(tape, e["documents"]) == {"validation"}]
    cost = np.array(saved.cost)
    costs = {entry["knob"]: entry["scores"].mean(cost) for entry in own}
    knobs = sorted(costs, reverse=True)  # log lambda: from cheap to dear
    expected = calibrate_knob(knobs, [costs[knob] for knob in knobs])
    assert saved.policy.kind == "learned"
    assert saved.curve.budgets == pytest.approx(expected.budgets, abs=1e-6)
    assert saved.curve.knobs == pytest.approx(expected.knobs, abs=1e-5)
    assert all(torch.equal(v, saved.policy.state_dict()[n]) for n, v in own[0]["policy"].state_dict().items())


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
    for hindsight, samples in zip(known, expected, strict=True):
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
    early = [p for p in tape.passes if p["stage"] in ("collect_targets", "train_policy")]
    seen = [{"input_ids": row} for p in early for row in p["rows"]]
    assert splits(tape, seen) == {"train", "validation"}


def response_decisions(entry, rows):
    """What these rows of a run decided on, and the rungs they took, where no start rung steps in: that caps prompts,
    and stands until the model has put something out."""
    columns = {name: column[rows] for name, column in entry["record"].items()}
    free = columns["held_valid"][..., SIGNALS.index("entropy")] & (
        columns["positions"] >= entry["prompt_tokens"][rows, None]
    )
    chosen = columns["opens"] & columns["real"] & free
    seen = Summary(*(columns[name][chosen] for name in ("held", "held_valid", "first", "positions")))
    return seen, columns["rung"][chosen]


def test_percentile_gives_harder_chunks_the_higher_rungs(wired):
    """At one knob the rung can only rise with what the thresholds are on."""
    tape, _, _ = wired
    moved = 0
    runs = [(p, knob) for p in tape.passes if p["policy"].kind == "percentile" for knob in set(p["knob"])]
    for entry, knob in runs:
        seen, rungs = response_decisions(entry, torch.tensor([own == knob for own in entry["knob"]]))
        value, known = entry["policy"].value(seen)
        order = value[known].argsort()
        assert (rungs[known][order].diff() >= 0).all()
        moved += len(rungs[known].unique()) > 1
    assert moved, "otherwise this says nothing"


def test_percentile_has_the_quantiles_of_train_documents_and_the_best_scales(wired):
    tape, _, calibrated = wired
    features = [path.features for path in tape.paths["trajectory-full"][: len(tape.task.corpus.train)]]
    policies = [e["policy"] for e in tape.measured if e["stage"] in ("choosing percentile", "percentile")]
    for policy in policies:
        value, known = policy.value(Summary.from_features(torch.cat(features)))
        quantiles = np.quantile(value[known].double().numpy(), np.linspace(0, 1, len(policy.grid)))
        assert policy.grid.tolist() == pytest.approx(quantiles.tolist(), abs=1e-6)
        assert torch.equal(policy.scales, calibrated.scales)


def test_the_percentile_baseline_is_the_candidate_that_loses_least_for_its_bytes(wired):
    """Over what uniform runs of validation documents lose at as many bytes, by log KL between the rungs."""
    tape, _, _ = wired
    count, validation = len(tape.task.corpus.train), tape.task.corpus.validation
    ranks, total, tokens = tape.task.ladder.mean_rank().double().numpy(), 0.0, 0
    for example, table in zip(validation, tape.tables["tables"][count:], strict=True):
        for position in range(len(example["input_ids"]) - 1):
            if position + 1 >= example["prompt_tokens"]:
                total, tokens = total + table[position].double(), tokens + 1
    kl = (total / tokens).amin(1).clamp(min=1e-9).numpy()
    assert pipeline.validation_kl([tape.task]) == pytest.approx((total / tokens).amin(1).numpy())
    over = {}
    for entry in (e for e in tape.measured if e["stage"] == "choosing percentile"):
        scores = entry["scores"]
        uniform = math.exp(np.interp(scores.mean(ranks), ranks, np.log(kl)))
        over[entry["policy"]] = scores.value("kl") / uniform
    assert len(over) == 10
    (chosen,) = {entry["policy"] for entry in tape.measured if entry["stage"] == "percentile"}
    assert min(over, key=over.get) is chosen


def test_random_has_the_best_scale_of_every_rung(wired):
    tape, _, calibrated = wired
    policies = [entry["policy"] for entry in tape.measured if entry["stage"] == "random"]
    assert policies
    assert all(torch.equal(policy.scales, calibrated.scales) for policy in policies)


def test_own_trajectories_start_at_the_dearest_rung_that_their_spending_buys(wired):
    """By hand, as a served row would: what its knob spends on the scored train tokens, and what that affords."""
    tape, _, _ = wired
    policy, samples = copy.deepcopy(tape.stages["train_policy"][1]), tape.rounds[0]["samples"]
    policy.load_state_dict(tape.rounds[1]["state"])
    cost, summary = policy.cost.double().numpy(), Summary.from_features(samples.features)
    for entry in (p for p in tape.passes if p["stage"] == "train_policy"):
        for knob, start in zip(entry["knob"], entry["start"], strict=True):
            rungs = policy.decide(summary, torch.full((len(samples),), knob)).rung.numpy()
            spent = np.average(cost[rungs], weights=samples.scored.numpy())
            assert start == max([0, *np.flatnonzero(cost <= spent + 1e-6)])


@pytest.mark.parametrize("number", [0, 1])
def test_every_trained_chunk_carries_the_damage_of_its_own_tokens(wired, number):
    """Token by token from the document's own table, without the code that sums it up."""
    tape, _, calibrated = wired
    name = ("trajectory-full", "trajectory-own-1")[number]
    count = len(tape.task.corpus.train)
    triples = zip(tape.task.corpus.train, tape.paths[name][:count], tape.tables["tables"][:count], strict=True)
    expected = []
    for example, path, table in triples:
        length = len(example["input_ids"])
        for start, end in zip(path.starts.tolist(), [*path.starts.tolist()[1:], length], strict=True):
            total = torch.zeros_like(table[0])
            for position in range(start, min(end, length - 1)):  # the last token predicts nothing
                scored = position + 1 >= example["prompt_tokens"]
                total += table[position] * (scored + calibrated.later.ratio)
            expected.append(total / (end - start))
    found = tape.rounds[number]["samples"].damage[-len(expected) :]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)

"""A recorder at every seam of a fit: who was handed what. It calls through; the fit is the public one."""

import functools
from dataclasses import dataclass, field, fields

import pytest
import torch

from runtime.control.record import Keep
from runtime.reference.run import AdaptiveRun
from training import fit as fit_module
from training import pipeline
from training.amounts import Amounts
from training.compare import scorer
from training.compare.hindsight import Oracle
from training.compare.scorer import HeldOut
from training.learn import train
from training.learn.calibrate import best_scales
from training.learn.module import PolicyFit
from training.targets import damage as in_runs
from training.targets import paths as first_stage
from training.targets import samples as chunks_of
from training.targets.samples import Samples, document_samples

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

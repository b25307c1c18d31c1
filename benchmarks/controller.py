"""What each signal, and each way to learn, is worth: bytes saved at equal KL against fixed rungs of the same ladder.

One fit's targets, many policies: every set of signals alone and left out, the four of the paper, the model's states,
chunks of several tokens, the direct objective, targets of uniform runs against those measured in the policy's own
context. Each policy's knob is set on validation documents, and it is measured once on test documents, token by token as
decode goes; intervals are over documents and seeds, as in a fit.

    python -m benchmarks.controller         # the embedded model: 22 policies, 16 minutes on one core
    python -m benchmarks.controller --model M --adapter A --dataset D --amounts train_documents=1000

`--adapter` takes a saved ladder as well, a distilled one for instance. `--own-text 128` measures the default policies
once more, on what the model writes by itself with the exact adapter. With `--folder F` targets lie in F from then on,
and a fit's output folder brings its own, policies included, where all arguments are those of the fit.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from policy.cost import LatencyTable
from policy.fixed import FixedPolicy
from policy.learned import LearnedPolicy
from policy.limits import Whole, refused
from policy.settings import AGE, HIDDEN, LOOKS, PAPER_SIGNALS, SIGNALS, ChunkSettings, Settings
from runtime.command import one_line_errors
from runtime.fingerprint import model_fingerprint
from runtime.ladder.factors import MIXED
from runtime.loading import load_model, load_tokenizer
from runtime.reference.placing import keep_decoded
from training.amounts import AROUND_ONE, Amounts
from training.compare.curves import Curve, fixed_curve, policy_curve, same_knobs
from training.compare.equal_rank import at_equal_rank, interval
from training.compare.scorer import HeldOut, Scorer
from training.compare.verdict import verdict_columns
from training.console import quiet_libraries
from training.fit import BUILT, EMBEDDED, make_trainer
from training.learn.module import DAMAGE, LATENCY
from training.learn.train import Learning, quiet_lightning
from training.lock import locked
from training.pipeline import build_ladders, collect_targets, open_source, open_tasks, train_policies
from training.targets.paths import Calibrated
from training.task import AdapterTask, FitContext, rung_rank, task_cost

from .own_text import HOW, continued
from .printing import default_device, device_slug, finish, header, parse, print_table, result_path, write

DEFAULT = (*SIGNALS, AGE)
STANDARD = "default"
"""The variant that a fit learns where nothing is said."""
RESAMPLES = 1000
COLUMNS = ("bytes_saved", "mean", "mean_interval_95")


@dataclass(frozen=True)
class Variant:
    """One way to learn a policy."""

    signals: tuple[str, ...] = DEFAULT
    objective: str = DAMAGE
    chunk_tokens: int = 1
    rounds: int | None = None
    """Of own trajectories; None: as many as the amounts say."""
    scales: tuple[float, ...] | None = None
    """Among which the policy chooses for every token; None: as a fit does by itself."""


def variants() -> dict[str, Variant]:
    """All that is tried, by name; what is compared signal by signal learns from the targets of uniform runs."""
    found = {
        STANDARD: Variant(),
        "default, targets of uniform runs": Variant(rounds=0),
        "four signals": Variant(PAPER_SIGNALS),
        "hidden": Variant(LOOKS),
        "latency objective": Variant(objective=LATENCY),
        "latency objective, learned scales": Variant(objective=LATENCY, scales=AROUND_ONE),
        "chunks of 4": Variant(chunk_tokens=4, rounds=0),
        "chunks of 16": Variant(chunk_tokens=16, rounds=0),
    }
    for signal in SIGNALS:
        found[f"without {signal}"] = Variant(tuple(own for own in DEFAULT if own != signal), rounds=0)
    for signal in SIGNALS:
        found[f"{signal} alone"] = Variant((signal,), rounds=0)
    return found


def measure(args: argparse.Namespace, root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what it saves) of every variant that is asked for."""
    wanted = {name: own for name, own in variants().items() if not args.only or name in args.only}
    network = load_model(args.model, dtype="float32", device=default_device())
    context = FitContext(
        model=network, model_fingerprint=model_fingerprint(network), amounts=args.amounts, seed=0, root=root,
        make_trainer=functools.partial(make_trainer, root, {}), say=functools.partial(print, flush=True),
        hidden=any(HIDDEN in own.signals for own in wanted.values()),
    )  # fmt: skip
    opened = open_tasks(
        [args.adapter], [open_source(args.adapter)], [args.dataset], load_tokenizer(args.model), args.amounts, 0
    )
    ladders = build_ladders(context, opened, args.ladder, None)
    judge = Judge(network, ladders[0])
    for name, variant in wanted.items():
        learned = learn(context, ladders, name, variant)
        curves = judge.set_knobs(learned)
        yield name, read(judge.fixed(learned), curves, learned.task)
        if name == STANDARD and args.own_text:
            for how in HOW:
                yield f"{name}, the model's own text, {how}", on_own_text(network, learned, curves, args.own_text, how)


@dataclass(frozen=True)
class Learned:
    """Policies of one kind, one for each seed, and what they were learned from."""

    task: AdapterTask
    calibrated: Calibrated
    policies: list[LearnedPolicy]

    @property
    def decode(self) -> Settings:
        """Token by token."""
        return replace(self.calibrated.settings, block_tokens=1)

    def fixed(self, test: HeldOut) -> Curve:
        """The fixed rungs on other documents."""
        return fixed_curve(FixedPolicy(self.task.ladder.rungs, self.calibrated.scales), self.decode, test)


def learn(context: FitContext, ladders: list[AdapterTask], name: str, variant: Variant) -> Learned:
    """The policies of a variant."""
    rounds = context.amounts.rounds if variant.rounds is None else variant.rounds
    scales = context.amounts.scales if variant.scales is None else variant.scales
    context = replace(context, amounts=replace(context.amounts, rounds=rounds, scales=scales))
    chunk = ChunkSettings(variant.chunk_tokens, variant.chunk_tokens)
    tasks, calibrated = collect_targets(context, ladders, Settings(chunk=chunk))
    untimed = LatencyTable("none", tuple(0.0 for _ in tasks[0].ladder.rungs), 0.0, 1.0)
    if name != STANDARD:  # a fit's own lines in TensorBoard stay where they are
        context = replace(context, root=context.root / "variants" / name.replace(" ", "-"))
    learning = Learning(variant.signals, variant.objective)
    return Learned(tasks[0], calibrated, train_policies(context, tasks, calibrated, untimed, learning))


class Judge:
    """Measures every variant on the same documents."""

    def __init__(self, model: PreTrainedModel, task: AdapterTask) -> None:
        self._validation, self._test = (
            Scorer(model, task.ladder, getattr(task.corpus, part), whole=True) for part in ("validation", "test")
        )
        self._fixed: dict[tuple[float, ...], Curve] = {}

    def set_knobs(self, learned: Learned) -> tuple[Curve, ...]:
        """Every policy with its knob set on validation documents, on the test documents."""
        task, cost = learned.task, task_cost([learned.task]).double().numpy()
        validation, test = (HeldOut((own.on(task.ladder),)) for own in (self._validation, self._test))
        aims = verdict_columns(task.ladder.rungs)
        return tuple(
            policy_curve("learned", own, learned.decode, validation, test, cost, aims) for own in learned.policies
        )

    def fixed(self, learned: Learned) -> Curve:
        """The fixed rungs on the test documents; as every other variant's where its scales are the same."""
        scales = tuple(learned.calibrated.scales.tolist())
        if scales not in self._fixed:
            self._fixed[scales] = learned.fixed(HeldOut((self._test,)))
        return self._fixed[scales]


def on_own_text(
    model: PreTrainedModel, learned: Learned, curves: Sequence[Curve], tokens: int, how: str
) -> dict[str, Any]:
    """What the policies save on texts of up to `tokens` that the model writes after the test documents' prompts, with
    the exact adapter; knobs stay as validation documents set them."""
    task = learned.task
    texts = continued(model, task.ladder, task.corpus.test, tokens, how)
    test = HeldOut((Scorer(model, task.ladder, texts, whole=True),))
    moved = [same_knobs("own text", *own, learned.decode, test) for own in zip(curves, learned.policies, strict=True)]
    return read(learned.fixed(test), moved, task)


def read(fixed: Curve, learned: Sequence[Curve], task: AdapterTask) -> dict[str, Any]:
    """Bytes saved at the verdict's rungs, and their mean, with intervals over documents and seeds."""
    curves = {"fixed": fixed, "learned": replace(learned[0], others=tuple(learned[1:]))}
    ranks, columns = rung_rank([task]), verdict_columns(task.ladder.rungs)
    found = at_equal_rank(curves, ranks, resamples=RESAMPLES, seed=0)
    saved, drawn = found.saved["learned"][columns], found.saved_drawn["learned"][:, columns]
    reached = ~np.isnan(saved)
    tokens = fixed.points[0].scores.tokens
    return {
        "seeds": len(learned),
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
        "rungs": [float(ranks[column]) for column in columns],
        "bytes_saved": [_rounded(own) for own in saved],
        "interval_95": [_ends(own) for own in drawn.T],
        "mean": _rounded(saved[reached].mean()) if reached.any() else None,
        "mean_interval_95": _ends(drawn[:, reached].mean(1)) if reached.any() else None,
        "kl": [_rounded(own, 6) for own in found.kl["learned"][columns]],
        "kl_fixed": [_rounded(own, 6) for own in found.kl["fixed"][columns]],
    }


def _rounded(value: float, digits: int = 4) -> float | None:
    return None if np.isnan(value) else round(float(value), digits)


def _ends(drawn: np.ndarray) -> list[float] | None:
    return None if np.isnan(drawn).any() else [round(end, 4) for end in interval(drawn)]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.controller", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(EMBEDDED / "base"), help="base model, folder or hub id")
    parser.add_argument("--adapter", default=str(EMBEDDED / "adapter"), help="PEFT adapter, or a saved ladder")
    parser.add_argument("--dataset", default=str(EMBEDDED / "text"), help="as in training.fit")
    parser.add_argument("--ladder", default=MIXED, help="kind that is built of a PEFT adapter")
    parser.add_argument("--seeds", type=int, default=1, help="policies of each kind")
    parser.add_argument("--only", nargs="*", default=[], choices=[*variants()], help="these alone")
    parser.add_argument("--amounts", nargs="*", default=[], metavar="NAME=VALUE", help="as training.fit's --amounts.*")
    parser.add_argument("--own-text", type=int, default=0, help="tokens of every text that the model writes itself")
    parser.add_argument("--folder", help="where targets and policies lie from then on; default: nowhere")
    parser.add_argument("--output", help="where the record goes")
    args = parse(parser, {"seeds": Whole(1, 100), "own-text": Whole(0, 2**20), "ladder": BUILT})
    args.amounts = replace(parse_amounts(args.amounts), seeds=args.seeds)
    return args


def parse_amounts(given: Sequence[str]) -> Amounts:
    """Amounts of which some are given as NAME=VALUE. Raises ValueError for a name or value that there is not."""
    known = sorted(field.name for field in fields(Amounts))
    values = {}
    for own in given:
        name, equals, value = own.partition("=")
        if name not in known or not equals:
            raise refused("--amounts", f"NAME=VALUE with a NAME of {known}", own)
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            raise refused("--amounts", f"a number behind {name}=", value) from None
    return Amounts(**values)


def main() -> None:
    with one_line_errors():
        run(arguments())


def run(args: argparse.Namespace) -> None:
    """Measure what is asked for and write it down."""
    quiet_libraries()
    device = default_device()
    path = result_path(args.output, f"controller-{Path(args.adapter).name}-{device_slug(device)}")
    named = {name: Path(getattr(args, name)).name for name in ("model", "adapter", "dataset")}
    results: dict[str, Any] = {}
    record = {
        **header("controller", device), **named, "ladder": args.ladder, "amounts": asdict(args.amounts),
        "variants": results,
    }  # fmt: skip
    kept = tempfile.TemporaryDirectory() if args.folder is None else nullcontext(args.folder)
    with kept as folder, locked(Path(folder), print), keep_decoded(), quiet_lightning():
        for name, found in measure(args, Path(folder)):
            results[name] = found
            write(record, path)
            print(f"{name}: {found['bytes_saved']}, mean {found['mean']} {found['mean_interval_95']}", flush=True)
    rows = [[name, *(str(own[key]) for key in COLUMNS)] for name, own in results.items()]
    print_table(["policy", "bytes saved", "mean", "95 % interval"], rows)
    finish(record, path)


if __name__ == "__main__":
    main()

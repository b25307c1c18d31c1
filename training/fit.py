"""`python -m training.fit`: learn how much of an adapter each stretch of text needs, and say what that is worth.

Without arguments it fits the small model, adapter and text that come with the project. A second run with the same
output folder reuses the collected targets; a killed one goes on where it stopped.
"""

from __future__ import annotations

if __name__ == "__main__":
    from .start import prepare, run

    prepare()

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from policy.cost import LatencyTable, LatencyTables
from policy.files import write_whole
from policy.limits import Choice
from policy.settings import HIDDEN, SIGNAL_SETS, ChunkSettings, KVSettings, Settings, SignalSettings
from runtime.command import one_line_errors
from runtime.fingerprint import model_fingerprint
from runtime.ladder.factors import MIXED, RANKED, SVD
from runtime.loading import default_device, device_name, load_model, load_tokenizer
from runtime.reference.placing import keep_decoded

from .amounts import Amounts
from .closing import next_commands
from .compare.latency import measure_latency
from .compare.tradeoff import log_report, write_report
from .compare.verdict import judge
from .console import CommandParser, command_line, is_first_process, quiet_libraries
from .documents import check_context
from .learn.module import DAMAGE, OBJECTIVES
from .learn.train import new_logger, quiet_lightning
from .lock import locked
from .pipeline import (
    Learning,
    build_ladders,
    collect_targets,
    compare_policies,
    open_source,
    open_tasks,
    store_difficulty,
    train_policies,
)
from .summary import candidates, print_verdict, summarise, timing_of
from .task import AdapterTask, FitContext, OpenTask, common_rungs, ladder_folder, rung_rank
from .threads import share_threads
from .timing import GivenLatency

EMBEDDED = Path(__file__).resolve().parent.parent / "checkpoints"
BUILT = Choice((SVD, RANKED, MIXED))
"""Kinds of ladder that a fit builds."""
LIBRARIES = ("torch", "lightning", "transformers", "datasets", "scikit-learn", "safetensors", "tensorboard")


def fit(
    model: str = str(EMBEDDED / "base"),
    adapter: str | list[str] = str(EMBEDDED / "adapter"),
    dataset: str | list[str] = str(EMBEDDED / "text"),
    output: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
    ladder: str = MIXED,
    rungs: list[float] | None = None,
    block_tokens: int = 32,
    prompt_tokens: int = 512,
    fade_tokens: int = 1,
    amounts: Amounts = Amounts(),  # noqa: B008  frozen
    signal_settings: SignalSettings = SignalSettings(),  # noqa: B008
    chunk: ChunkSettings = ChunkSettings(),  # noqa: B008
    kv: KVSettings = KVSettings(),  # noqa: B008
    signals: str = "default",
    objective: str = DAMAGE,
    latency: str | None = None,
    latency_batch: int | None = None,
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fit a rank policy and return the summary that is also written to `summary.json`.

    Args:
        model: Folder or hub id of the base model.
        adapter: PEFT LoRA folder, hub id or saved ladder; several make one policy that all of them share.
        dataset: Folder with train/validation/test .jsonl[.xz], a file, a built-in name or any `datasets` name; one for
            each adapter, or one for all.
        output: Folder for everything this writes; default runs/NAME-OF-ADAPTER.
        seed: Everything random is drawn from it.
        dtype: float32, bfloat16, float16 or auto; what the model computes in.
        ladder: Kind of ladder built of a PEFT adapter: svd (fewer directions), ranked (by what they are worth) or mixed
            (in fewer bits as well); a saved ladder is what it is.
        rungs: Allowed equivalent ranks; default the shares 1/32, 1/16, 3/32, 1/8, 3/16, 1/4, 3/8, 1/2 of the
            adapter's own, of which an svd ladder has the whole ones.
        block_tokens: Tokens per forward pass of a whole text.
        prompt_tokens: Tokens per forward pass of a prompt that is served; nothing that is fitted depends on it.
        fade_tokens: Cross-fade length: 1, 4, 8 or 16.
        amounts: How many documents, epochs, rounds; grids.
        signal_settings: How the signals are measured.
        chunk: When chunks close; thresholds are set from the data.
        kv: What becomes of old KV pages; the threshold is set from the data.
        signals: What the policy looks at: four (the paper's signals), default (surprisal and token difficulty too) or
            hidden (the model's last hidden state and the next embedding too).
        objective: What it learns by: damage (regression of every rung's KL, then least damage + lambda * bytes) or
            latency (expected KL + lambda * cost of its own choice, directly; cost is milliseconds where a table given
            as `latency` tells the rungs apart, else bytes).
        latency: File that `python -m runtime.measure` wrote of this model and ladder; left out, the reference path is
            measured.
        latency_batch: Which of its batch buckets the fit goes by; default the smallest.
        trainer: Arguments of lightning's Trainer (--trainer.devices 2, --trainer.accelerator cpu, ...).
    """
    torch.set_float32_matmul_precision("highest")
    L.seed_everything(seed, verbose=False)
    adapters, datasets = _pairs(adapter, dataset)
    folder = Path("runs") / _run_name(adapters) if output is None else Path(output)
    _check_folder(folder, output)
    learning = Learning(
        SIGNAL_SETS[Choice(tuple(SIGNAL_SETS)).take("signals", signals)],
        Choice(OBJECTIVES).take("objective", objective),
    )
    settings = Settings(
        block_tokens=block_tokens, prompt_tokens=prompt_tokens, fade_tokens=fade_tokens, signals=signal_settings,
        chunk=chunk, kv=kv,
    )  # fmt: skip
    kind = BUILT.take("ladder", ladder)
    given = GivenLatency.read(latency, latency_batch)
    share_threads(_checked_trainer(folder, trainer or {}).num_devices)
    with locked(folder, _say), keep_decoded():
        return _fit_into(
            folder, model, adapters, datasets, kind, rungs, seed, dtype, settings, learning, amounts, given,
            trainer or {},
        )  # fmt: skip


def _fit_into(
    folder: Path, model: str, adapters: list[str], datasets: list[str], kind: str, rungs: list[float] | None,
    seed: int, dtype: str, settings: Settings, learning: Learning, amounts: Amounts, given: GivenLatency | None,
    trainer: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Walk through the stages of `pipeline` and write down what they found."""
    started = time.time()
    sources = [open_source(name) for name in adapters]
    network = load_model(model, dtype=dtype, device=_device(trainer))
    check_context(network, amounts.max_tokens, "amounts.max_tokens")
    context = FitContext(
        model=network, model_fingerprint=model_fingerprint(network), amounts=amounts, seed=seed, root=folder,
        make_trainer=functools.partial(make_trainer, folder, trainer), say=_say,
        hidden=HIDDEN in learning.signals,
    )  # fmt: skip
    opened = open_tasks(adapters, sources, datasets, load_tokenizer(model), amounts, seed)
    if given is not None:
        given.check(context, opened[0].source)
    _introduce(context, opened)

    tasks = build_ladders(context, opened, kind, rungs)
    tables = LatencyTables((_latency(context, tasks[0]),)) if given is None else given.of(context, tasks[0])
    latency = tables.chosen
    tasks, calibrated = collect_targets(context, tasks, settings)
    store_difficulty(context, tasks)
    learned = train_policies(context, tasks, calibrated, latency, learning)
    comparison = compare_policies(context, tasks, calibrated, learned)
    ranks = rung_rank(tasks)
    verdict = judge(
        comparison.curves, common_rungs(tasks), ranks, resamples=amounts.bootstrap, seed=seed,
        timing=timing_of(context, tasks, calibrated, comparison, latency),
    )  # fmt: skip
    checkpoints = candidates(context, tasks, calibrated, comparison, verdict, tables)

    summary = {
        "model": str(model),
        "adapter": adapters[0] if len(adapters) == 1 else adapters,
        "dataset": datasets[0] if len(tasks) == 1 else datasets,
        "seed": seed,
        "signals": list(learning.signals),
        "objective": learning.objective,
        "versions": {name: version(name) for name in LIBRARIES},
        **calibrated.describe(),
        **summarise(tasks, comparison, verdict, checkpoints[verdict.exported], ranks, latency, amounts.bootstrap, seed),
        "seconds": round(time.time() - started, 1),
    }
    if not is_first_process():  # every process measured the same; one writes it down
        return summary
    checkpoints["learned"].save(folder / "learned")  # also when it is not the one to serve: to look at
    checkpoints[verdict.exported].save(folder / "policy")
    figure = write_report(folder, summary)
    # TensorBoard shows the first five by name; what is rarely changed sorts behind as settings.*.
    params = {
        "adapter": _tail(adapters[0]), "block_tokens": settings.block_tokens, "dataset": _tail(datasets[0]),
        "fade_tokens": settings.fade_tokens, "ladder": tasks[0].ladder.kind, "model": _tail(model),
        "objective": learning.objective, "rungs": list(common_rungs(tasks)), "seed": seed,
        "signals": list(learning.signals),
        "settings": {
            "dtype": dtype, "prompt_tokens": settings.prompt_tokens, "amounts": asdict(amounts),
            "signals": asdict(settings.signals), "chunk": asdict(settings.chunk), "kv": asdict(settings.kv),
        },
    }  # fmt: skip
    log_report(new_logger(folder, "", fresh=True), figure, summary, params)
    print_verdict(summary, folder)
    # With the ladders that the policy was fitted to: an adapter by itself is an svd ladder.
    ladders = [str(ladder_folder(folder, number, len(tasks))) for number in range(len(tasks))]
    print(*next_commands(model, ladders, folder / "policy", dtype, verdict.exported), sep="\n", flush=True)
    return summary


def _pairs(adapter: str | list[str], dataset: str | list[str]) -> tuple[list[str], list[str]]:
    """Adapters and the dataset of each. Raises ValueError when they do not pair up."""
    adapters = [adapter] if isinstance(adapter, str) else list(adapter)
    datasets = [dataset] if isinstance(dataset, str) else list(dataset)
    datasets = datasets * len(adapters) if len(datasets) == 1 else datasets
    if not adapters or len(datasets) != len(adapters):
        raise ValueError(
            f"dataset: expected one for all adapters or one for each, got {len(datasets)} for {len(adapters)}"
        )
    return adapters, datasets


def _introduce(context: FitContext, tasks: Sequence[OpenTask]) -> None:
    """Say what there is to do."""
    for task in tasks:
        corpus = task.corpus
        if corpus.leaked:
            context.say(
                f"left out {corpus.leaked} validation and test documents of which half or more is in an earlier split"
            )
        context.say(
            f"{len(corpus.train)} train, {len(corpus.validation)} validation, {len(corpus.test)} test documents; "
            f"output {context.root}"
        )


def _say(message: str) -> None:
    if is_first_process():
        print(f"[fit] {message}", flush=True)


def _tail(path: str) -> str:
    """The end of a path or hub id: enough to tell it from another in a narrow column."""
    return "/".join(Path(path).parts[-2:])


def _device(trainer: dict[str, Any]) -> torch.device:
    return torch.device("cpu") if trainer.get("accelerator") == "cpu" else default_device()


def _check_folder(folder: Path, given: str | None) -> None:
    if given is not None and not given.strip():
        raise ValueError(f"output: expected a folder, got {given!r}; leave it out for {Path('runs')}/NAME-OF-ADAPTER")
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"output: expected a folder, got the file {path}; choose another path")


def _run_name(adapters: Sequence[str]) -> str:
    # The embedded adapter's folder is called just `adapter`.
    paths = [Path(adapter) for adapter in adapters]
    names = ["embedded" if path.resolve() == (EMBEDDED / "adapter").resolve() else path.name for path in paths]
    return "+".join(names)


def make_trainer(folder: Path, arguments: dict[str, Any], **options: Any) -> L.Trainer:
    quiet = {"enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": folder}
    bars = {"enable_progress_bar": False}  # ours are shorter, alike in every stage, and gone at its end
    return L.Trainer(**{**quiet, **bars, **options, **arguments})


def _checked_trainer(folder: Path, arguments: dict[str, Any]) -> L.Trainer:
    """A trainer made before the work, of which there is one for every stage: Lightning checks its arguments."""
    try:
        return make_trainer(folder, arguments, logger=False)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error}") from None


def _latency(context: FitContext, task: AdapterTask) -> LatencyTable:
    """The measured table; a resumed run of the same fit on the same device keeps it, so its curves stay the same."""
    path = context.root / "latency.json"
    key = {**context.identity(task), "device": device_name(context.model.device)}
    if path.is_file():
        record = json.loads(path.read_text())
        if record["key"] == key:
            return LatencyTable(**record["table"])
    measured = measure_latency(context.model, task.ladder)
    context.root.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"key": key, "table": asdict(measured)}).encode())
    return measured


def make_parser() -> ArgumentParser:
    """Flags are `fit`'s arguments; `--config FILE` reads them from YAML, `--print_config` writes them."""
    parser = CommandParser(
        prog="python -m training.fit", description="Learn a rank policy for a LoRA adapter.", allow_abbrev=True
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")
    parser.add_function_arguments(fit, skip={"trainer"})
    owned = {
        "logger", "callbacks", "plugins", "default_root_dir", "max_epochs", "enable_model_summary", "barebones",
        "num_sanity_val_steps", "inference_mode", "log_every_n_steps",
    }  # fmt: skip
    parser.add_class_arguments(L.Trainer, "trainer", skip=owned, instantiate=False, sub_configs=False)
    return parser


def _renamed(argument: str) -> str:
    """A flag as it is called now: `--signals.x` is `--signal_settings.x`, for one release more."""
    return argument.replace("--signals.", "--signal_settings.", 1) if argument.startswith("--signals.") else argument


def main(arguments: list[str] | None = None) -> None:
    resume = "the same command goes on where it stopped"
    with one_line_errors(afterwards=resume, first=is_first_process()), quiet_lightning():
        parser = make_parser()
        parsed: Namespace = parser.parse_args([_renamed(own) for own in command_line(arguments)])
        given = parser.instantiate(parsed)  # builds the settings, which check themselves
        trainer = {k: v for k, v in vars(given.pop("trainer")).items() if v is not None}
        given.pop("config", None)
        quiet_libraries()
        fit(**given.as_dict() if hasattr(given, "as_dict") else vars(given), trainer=trainer)


if __name__ == "__main__":
    run(main)

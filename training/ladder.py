"""`python -m training.ladder`: build an adapter's ladder, and say what every rung loses on held-out documents.

    python -m training.ladder --model MODEL --adapter ADAPTER --dataset DATA --output FOLDER [--kind KIND] [--compare]

The folder is then taken wherever an adapter is. Effects are measured and rungs trained on train documents, what
training did is judged on validation documents, and test documents are looked at once, for the table.
"""

from __future__ import annotations

if __name__ == "__main__":
    from training.start import prepare, run

    prepare()

import functools
import hashlib
import importlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from policy.limits import Choice, Number, Whole
from runtime.command import one_line_errors
from runtime.fingerprint import adapter_fingerprint, model_fingerprint
from runtime.ladder import KINDS, Adapter, Ladder, build_ladder, load_adapter, save_ladder
from runtime.ladder.factors import DISTILLED, MIXED, RANKED, SVD
from runtime.ladder.store import RECORD
from runtime.loading import default_device, load_model, load_tokenizer
from runtime.reference.adaptive import require_servable

from .amounts import COUNT, Amounts
from .console import CommandParser, command_line, is_first_process, quiet_libraries
from .documents import Corpus, check_context, load_corpus
from .ladders.build import Measured, adapter_directions, calibrated, exact_pairs, mixed_ladder, ranked_ladder
from .ladders.compare import LadderComparison, compare, rung_candidates, write_comparison
from .ladders.distil import MakeTrainer, Schedule, distil
from .ladders.quality import Quality, measure
from .learn.train import quiet_lightning
from .lock import locked
from .threads import share_threads

REFERENCE = "peft"
"""The library whose conversion is compared with, where it is installed; nothing here depends on it."""
CPU_TOKENS, GPU_TOKENS = 2048, 6144
"""Tokens of text in a step of distillation."""
ROW = "KL is in nats per completion token, to the exact adapter"


def ladder(
    model: str,
    adapter: str,
    dataset: str,
    output: str,
    kind: str | None = None,
    rungs: list[float] | None = None,
    steps: int = 400,
    step_tokens: int | None = None,
    learning_rate: float = 0.006,
    compare: bool = False,
    train_documents: int = 4000,
    validation_documents: int = 96,
    test_documents: int = 200,
    max_tokens: int = 512,
    min_completion_tokens: int = 8,
    seed: int = 0,
    dtype: str = "float32",
    trainer: dict[str, Any] | None = None,
) -> Ladder:
    """Build a ladder, write it to `output`, and print what every rung loses on held-out documents.

    Args:
        model: Folder or hub id of the base model.
        adapter: PEFT LoRA folder or hub id.
        dataset: Folder with train/validation/test .jsonl[.xz], a file, a built-in name or any `datasets` name.
        output: Folder for the ladder; replaced whole once there is a new one.
        kind: svd, ranked, mixed or distilled; default distilled on a GPU, mixed on a CPU.
        rungs: Equivalent ranks; default 1/32, 1/16, 3/32, 1/8, 3/16, 1/4, 3/8 and 1/2 of the adapter's own, of which
            distilled leaves out 3/16.
        steps: Optimiser steps of distillation.
        step_tokens: Tokens of text in one of them; default 2048 on a CPU, 6144 on a GPU.
        learning_rate: Of distillation, relative to the factors' size.
        compare: Hold it against svd, PEFT's conversion, uniform rounding and LoRAQuant; writes a table and a picture.
        train_documents: Documents to measure effects and to train on.
        validation_documents: Documents that say whether training helped.
        test_documents: Documents that every rung is measured on.
        max_tokens: Documents are cut to this many tokens, prompt included.
        min_completion_tokens: Shorter documents are left out.
        seed: Everything random is drawn from it.
        dtype: float32, bfloat16, float16 or auto; what the model computes in.
        trainer: Arguments of lightning's Trainer (--trainer.devices 2, --trainer.accelerator cpu, ...).
    """
    if kind is not None:
        Choice(KINDS).take("kind", kind)
    Whole(1, 10**9).take("steps", steps)
    Number(0, 1, above=True).take("learning_rate", learning_rate)
    folder = _checked_output(output)
    torch.set_float32_matmul_precision("highest")
    L.seed_everything(seed, verbose=False)
    given = trainer or {}
    device = torch.device("cpu") if given.get("accelerator") == "cpu" else default_device()
    kind = (MIXED if device.type == "cpu" else DISTILLED) if kind is None else kind
    if step_tokens is None:
        step_tokens = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    COUNT.take("step_tokens", step_tokens)
    try:
        amounts = Amounts(
            train_documents=train_documents, validation_documents=validation_documents, test_documents=test_documents,
            max_tokens=max_tokens, min_completion_tokens=min_completion_tokens,
        )  # fmt: skip
    except ValueError as error:  # here they are flags of their own
        raise ValueError(str(error).removeprefix("amounts.")) from None
    make_trainer = functools.partial(_make_trainer, folder, given)
    share_threads(_checked_trainer(make_trainer).num_devices)
    work = folder.with_name(f"{folder.name}.work")
    with locked(work, _say):
        schedule = Schedule(steps, step_tokens, learning_rate, seed)
        built = _build_into(
            folder, work, model, adapter, dataset, kind, rungs, schedule, compare, amounts, seed, dtype, device,
            make_trainer,
        )  # fmt: skip
        if is_first_process():
            shutil.rmtree(work / "checkpoints", ignore_errors=True)
    if is_first_process():
        with suppress(OSError):  # gone with the lock, unless a stopped run left it
            work.rmdir()
    return built


def _checked_output(given: str) -> Path:
    """The folder of a ladder to be, before hours go into it. Raises as `save_ladder` would."""
    folder = Path(given)
    if not given.strip() or not folder.name:
        raise ValueError(f"output: expected a folder of its own, got {given!r}; name a new one")
    older = (folder / RECORD).is_file() or (folder.is_dir() and not any(folder.iterdir()))
    blocked = next((path for path in folder.parents if path.exists() and not path.is_dir()), None)
    if blocked is not None or (folder.exists() and not older):
        raise FileExistsError(
            f"output: expected a new folder or an older ladder, got {blocked or folder}; choose another"
        )
    return folder


def _build_into(
    output: Path, work: Path, model: str, adapter: str, dataset: str, kind: str, rungs: list[float] | None,
    schedule: Schedule, comparing: bool, amounts: Amounts, seed: int, dtype: str, device: torch.device,
    make_trainer: MakeTrainer,
) -> Ladder:  # fmt: skip
    source = load_adapter(adapter)
    network = load_model(model, dtype=dtype, device=device)
    require_servable(network, [build_ladder(source)])
    check_context(network, amounts.max_tokens, "max_tokens")
    corpus = load_corpus(dataset, load_tokenizer(model), amounts, seed)
    counts = ", ".join(f"{len(getattr(corpus, part))} {part}" for part in ("train", "validation", "test"))
    _say(f"{counts} documents; kind {kind}")
    if rungs is None and kind == DISTILLED:
        rungs = distilled_rungs(source.rank)
    measured = None
    if kind != SVD or comparing:
        measured = adapter_directions(source, network, corpus.train, seed=seed)
    origin = _origin(source, network, corpus, kind, rungs, schedule)
    built = _build(
        kind, source, measured, network, corpus, rungs, schedule, make_trainer, work / "checkpoints" / origin
    )
    quality = measure(network, exact_pairs(built), rung_candidates(built), corpus.test)
    built = replace(built, quality=tuple(_record(built, j, own) for j, own in enumerate(quality)))
    found = None
    if comparing:
        found = _comparison(built, source, measured, network, corpus)
    if is_first_process():
        save_ladder(built, output, extra={"origin": origin})
        if found is not None:
            write_comparison(found, f"{Path(adapter).name}, {len(corpus.test)} held-out documents", output)
        _print(built, found)
    return built


def distilled_rungs(rank: int) -> list[float]:
    """Default rungs of a distilled ladder below the exact one.

    Those up to an eighth have directions of their own. A rung just above would have to keep both in memory for little:
    3/16 is left out, so that what is in memory is at most half more than what its highest rung reads.
    """
    return [share * rank for share in (1 / 32, 1 / 16, 3 / 32, 1 / 8, 1 / 4, 3 / 8, 1 / 2)]


def _build(
    kind: str, adapter: Adapter, measured: Measured | None, model: PreTrainedModel, corpus: Corpus,
    rungs: Sequence[float] | None, schedule: Schedule, make_trainer: MakeTrainer, checkpoints: Path,
) -> Ladder:  # fmt: skip
    if kind == SVD:
        return build_ladder(adapter, rungs)
    assert measured is not None, "every kind but svd goes by effects"
    if kind == RANKED:
        return calibrated(ranked_ladder(adapter, measured, rungs), model, corpus.train)
    mixed = calibrated(mixed_ladder(adapter, measured, rungs, model.device), model, corpus.train)
    if kind == MIXED:
        return mixed
    return distil(mixed, measured, model, corpus.train, corpus.validation, schedule, make_trainer, checkpoints)


def _comparison(
    built: Ladder, adapter: Adapter, measured: Measured | None, model: PreTrainedModel, corpus: Corpus
) -> LadderComparison:
    try:
        peft = importlib.import_module(REFERENCE)
    except ImportError:
        peft = None
        _say("peft is not installed: its convert_to_lora is left out of the comparison")
    return compare(built, adapter, measured, model, corpus.test, peft)


def _origin(
    adapter: Adapter, model: PreTrainedModel, corpus: Corpus, kind: str, rungs: Sequence[float] | None,
    schedule: Schedule,
) -> str:  # fmt: skip
    """16 hex digits over all that a ladder is made from: what may go on from another's checkpoints."""
    documents = [[own["input_ids"] for own in part] for part in (corpus.train, corpus.validation)]
    made_from = {
        "adapter": adapter_fingerprint(adapter), "model": model_fingerprint(model), "dtype": str(model.dtype),
        "kind": kind, "rungs": None if rungs is None else list(rungs), "schedule": vars(schedule),
        "documents": documents,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def _record(built: Ladder, index: int, quality: Quality) -> dict[str, float | None]:
    return {
        "rung": built.rungs[index],
        "share": float(built.rung_bytes()[index] / built.rung_bytes()[-1]),
        "bytes": float(built.rung_bytes()[index]),
        "kl": quality.kl,
        "kl_se": quality.kl_se,
        "perplexity": quality.perplexity,
    }


def _print(built: Ladder, found: LadderComparison | None) -> None:
    console = Console()
    table = Table(title=f"{built.kind} ladder: {ROW}", box=SIMPLE)
    for name in ("rung", "bytes", "share", "in memory", "KL", "s.e.", "perplexity"):
        table.add_column(name, justify="right")
    for j, own in enumerate(built.quality):
        held = built.up_to(built.rungs[j]).resident_bytes() / max(float(own["bytes"] or 0), 1.0)
        error = own["kl_se"]
        table.add_row(
            f"{own['rung']:g}", f"{own['bytes']:,.0f}", f"{own['share']:.3f}", f"{held:.2f} x", f"{own['kl']:.3g}",
            "-" if error is None else f"{error:.2g}", f"{own['perplexity']:.3f}",
        )  # fmt: skip
    console.print(table)
    if found is None:
        return
    against = Table(title="what others make of the same adapter, and the mixed ladder at their bytes", box=SIMPLE)
    for name in ("", "bytes", "KL", "mixed"):
        against.add_column(name, justify="left" if not name else "right")
    for kind, rungs in found.ladders.items():
        if kind != built.kind:
            for rung in rungs:
                against.add_row(rung.name, f"{rung.bytes:,.0f}", f"{rung.kl:.3g}", "")
    for pair in found.against:
        against.add_row(
            pair.baseline.name, f"{pair.baseline.bytes:,.0f}", f"{pair.baseline.kl:.3g}", f"{pair.mixed.kl:.3g}"
        )
    console.print(against)


def _make_trainer(folder: Path, arguments: dict[str, Any], **options: Any) -> L.Trainer:
    quiet = {"enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": folder, "logger": False}
    bars = {"enable_progress_bar": False}
    return L.Trainer(**{**quiet, **bars, **options, **arguments})


def _checked_trainer(make_trainer: MakeTrainer) -> L.Trainer:
    """A trainer made before the work: Lightning checks its arguments."""
    try:
        return make_trainer(logger=False)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error}") from None


def _say(message: str) -> None:
    if is_first_process():
        print(f"[ladder] {message}", flush=True)


def make_parser() -> ArgumentParser:
    """Flags are `ladder`'s arguments; `--config FILE` reads them from YAML, `--print_config` writes them."""
    parser = CommandParser(
        prog="python -m training.ladder", description="Build the ladder of a LoRA adapter.", allow_abbrev=True
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")
    parser.add_function_arguments(ladder, skip={"trainer", "compare"})
    parser.add_argument("--compare", action="store_true", help="hold it against others; writes a table and a picture")
    owned = {
        "logger", "callbacks", "plugins", "default_root_dir", "max_epochs", "enable_model_summary", "barebones",
        "num_sanity_val_steps", "inference_mode", "log_every_n_steps", "enable_checkpointing",
        "use_distributed_sampler",
    }  # fmt: skip
    parser.add_class_arguments(L.Trainer, "trainer", skip=owned, instantiate=False, sub_configs=False)
    return parser


def main(arguments: list[str] | None = None) -> None:
    resume = "the same command goes on where it stopped"
    with one_line_errors(afterwards=resume, first=is_first_process()), quiet_lightning():
        parser = make_parser()
        parsed: Namespace = parser.parse_args(command_line(arguments))
        given = parsed.as_dict()
        trainer = {k: v for k, v in (given.pop("trainer") or {}).items() if v is not None}
        given.pop("config", None)
        quiet_libraries()
        ladder(**given, trainer=trainer)


if __name__ == "__main__":
    run(main)

"""`python -m training.fit`: learn how much of an adapter each stretch of text needs, and say what that is worth.

Without arguments it fits the small model, adapter and text that come with the project. A second run with the same
output folder reuses the collected targets; a killed one goes on where it stopped.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace

from policy.checkpoint import PolicyCheckpoint
from policy.contract import RankPolicy
from policy.cost import LatencyTable
from policy.files import write_whole
from policy.settings import ChunkSettings, KVSettings, Settings, SignalSettings
from runtime.adapter import load_adapter
from runtime.command import one_line_errors
from runtime.fingerprint import adapter_fingerprint, model_fingerprint
from runtime.ladder import build_ladder
from runtime.loading import default_device, device_name, load_model, load_tokenizer

from .command import command_line, is_first_process, quiet_libraries
from .compare import Curve, Verdict, areas, judge, table
from .documents import check_context, load_corpus
from .latency import measure_latency
from .pipeline import (
    FitContext,
    Targets,
    collect_targets,
    compare_policies,
    describe_targets,
    new_logger,
    quiet_lightning,
    train_policy,
)
from .report import log_report, write_report
from .settings import FitSettings

EMBEDDED = Path(__file__).resolve().parent.parent / "checkpoints"
LIBRARIES = ("torch", "lightning", "transformers", "datasets", "scikit-learn", "safetensors", "tensorboard")


def fit(
    model: str = str(EMBEDDED / "base"),
    adapter: str = str(EMBEDDED / "adapter"),
    dataset: str = str(EMBEDDED / "text"),
    output: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
    rungs: list[int] | None = None,
    block_tokens: int = 32,
    fade_tokens: int = 1,
    amounts: FitSettings = FitSettings(),  # noqa: B008  frozen
    signals: SignalSettings = SignalSettings(),  # noqa: B008
    chunk: ChunkSettings = ChunkSettings(),  # noqa: B008
    kv: KVSettings = KVSettings(),  # noqa: B008
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fit a rank policy and return the summary that is also written to `summary.json`.

    Args:
        model: Folder or hub id of the base model.
        adapter: PEFT LoRA folder or hub id.
        dataset: Folder with train/validation/test .jsonl[.xz], a file, a built-in name or any `datasets` name.
        output: Folder for everything this writes; default runs/NAME-OF-ADAPTER.
        seed: Everything random is drawn from it.
        dtype: float32, bfloat16, float16 or auto; what the model computes in.
        rungs: Allowed ranks; default 2, 4, 6, 8, 12, 16, 24, 32, 48, 64 up to the adapter's own.
        block_tokens: Tokens per forward pass of prefill.
        fade_tokens: Cross-fade length: 1, 4, 8 or 16.
        amounts: How many documents, epochs, rounds; grids.
        signals: How the four signals are measured.
        chunk: When chunks close; thresholds are set from the data.
        kv: What becomes of old KV pages; the threshold is set from the data.
        trainer: Arguments of lightning's Trainer (--trainer.devices 2, --trainer.accelerator cpu, ...).
    """
    started = time.time()
    say = _say
    torch.set_float32_matmul_precision("highest")
    L.seed_everything(seed, verbose=False)
    folder = Path(output or Path("runs") / _run_name(adapter))
    _check_folder(folder)
    loaded_adapter = load_adapter(adapter)
    ladder = build_ladder(loaded_adapter, rungs)
    if len(ladder.rungs) < 2:
        raise ValueError(f"rungs: expected at least two to choose between, got {list(ladder.rungs)}; add lower ones")
    network = load_model(model, dtype=dtype, device=_device(trainer))
    check_context(network, amounts.max_tokens, "amounts.max_tokens")
    corpus = load_corpus(dataset, load_tokenizer(model), amounts, seed)
    settings = Settings(
        ladder.rungs, block_tokens=block_tokens, fade_tokens=fade_tokens, signals=signals, chunk=chunk, kv=kv
    )
    fingerprints = {"model": model_fingerprint(network), "adapter": adapter_fingerprint(loaded_adapter)}
    identity = {**fingerprints, "dtype": str(network.dtype), "rungs": list(ladder.rungs), "kind": ladder.kind}
    if corpus.leaked:
        say(f"left out {corpus.leaked} validation and test documents whose text is in an earlier split")
    say(
        f"{len(corpus.train)} train, {len(corpus.validation)} validation, {len(corpus.test)} test documents; "
        f"rungs {ladder.rungs}; output {folder}"
    )
    context = FitContext(
        model=network, ladder=ladder, corpus=corpus, fit=amounts, seed=seed, root=folder, identity=identity,
        make_trainer=functools.partial(_make_trainer, folder, trainer or {}), progress=say, device=network.device,
    )  # fmt: skip
    # Hooking the model up once refuses an adapter of another model before anything is written.
    with context.running(None, settings):
        pass
    latency = _latency(folder, context)
    targets = collect_targets(context, settings)
    learned = train_policy(context, targets, latency)
    curves, fixed = compare_policies(context, targets, learned)
    verdict = judge(curves, ladder.rungs, context.rung_rank, resamples=amounts.bootstrap, seed=seed)
    candidates = {
        policy.kind: _checkpoint(context, targets, policy, curves, verdict, latency, fingerprints)
        for policy in (learned, fixed)
    }
    checkpoint = candidates[verdict.exported]
    summary = {
        "model": str(model),
        "adapter": str(adapter),
        "dataset": str(dataset),
        "ladder": {"kind": ladder.kind, "tail_energy": [round(e, 6) for e in ladder.tail_energy().tolist()]},
        "rungs": list(ladder.rungs),
        "versions": {name: version(name) for name in LIBRARIES},
        "seed": seed,
        "documents": {name: len(getattr(corpus, name)) for name in ("train", "validation", "test")},
        "scored_test_tokens": int(curves["fixed"].points[0].scores.tokens.sum()),
        **describe_targets(targets),
        "latency": {**asdict(latency), "resolved": latency.resolved},
        "policies": {name: curve.config for name, curve in curves.items() if curve.config},
        "curves": table(curves, context.rung_rank, np.array(latency.ms)),
        "area": areas(curves, context.rung_rank),
        "compared_at": list(verdict.ranks),
        "kl_at": verdict.kl,
        "headroom": {"nats": verdict.headroom, "interval_95": list(verdict.headroom_interval)},
        "captured": {"share": verdict.captured, "interval_95": verdict.captured_interval},
        "gain_over_fixed": {"nats": verdict.gain, "interval_95": list(verdict.gain_interval)},
        "exported": verdict.exported,
        "reason": verdict.reason,
        "operating_point": _operating_point(curves, checkpoint, context, latency),
        "seconds": round(time.time() - started, 1),
    }
    if not is_first_process():  # every process measured the same; one writes it down
        return summary
    candidates["learned"].save(folder / "learned")  # also when it is not the one to serve: to look at
    checkpoint.save(folder / "policy")
    figure = write_report(folder, summary)
    # TensorBoard shows the first five by name; what is rarely changed sorts behind as settings.*.
    params = {
        "adapter": _tail(adapter), "block_tokens": block_tokens, "dataset": _tail(dataset), "fade_tokens": fade_tokens,
        "model": _tail(model), "rungs": list(ladder.rungs), "seed": seed,
        "settings": {
            "dtype": dtype, "amounts": asdict(amounts), "signals": asdict(signals), "chunk": asdict(chunk),
            "kv": asdict(kv),
        },
    }  # fmt: skip
    log_report(new_logger(folder, "", fresh=True), figure, summary, params)
    _print_verdict(summary, folder)
    return summary


def _say(message: str) -> None:
    if is_first_process():
        print(f"[fit] {message}", flush=True)


def _tail(path: str) -> str:
    """The end of a path or hub id: enough to tell it from another in a narrow column."""
    return "/".join(Path(path).parts[-2:])


def _device(trainer: dict[str, Any] | None) -> torch.device:
    return torch.device("cpu") if (trainer or {}).get("accelerator") == "cpu" else default_device()


def _check_folder(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"output: expected a folder, got the file {path}; choose another path")


def _run_name(adapter: str) -> str:
    # The embedded adapter's folder is called just `adapter`.
    path = Path(adapter)
    return "embedded" if path.resolve() == (EMBEDDED / "adapter").resolve() else path.name


def _make_trainer(folder: Path, arguments: dict[str, Any], **options: Any) -> L.Trainer:
    quiet = {"enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": folder}
    progress = {"enable_progress_bar": sys.stdout.isatty()}
    return L.Trainer(**{**quiet, **progress, **options, **arguments})


def _latency(folder: Path, context: FitContext) -> LatencyTable:
    """The measured table; a resumed run of the same fit on the same device keeps it, so its curves stay the same."""
    path = folder / "latency.json"
    key = {**context.identity, "device": device_name(context.device)}
    if path.is_file():
        record = json.loads(path.read_text())
        if record["key"] == key:
            return LatencyTable(**record["table"])
    measured = measure_latency(context.model, context.ladder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"key": key, "table": asdict(measured)}).encode())
    return measured


def _checkpoint(
    context: FitContext, targets: Targets, policy: RankPolicy, curves: dict[str, Curve], verdict: Verdict,
    latency: LatencyTable, fingerprints: dict[str, str],
) -> PolicyCheckpoint:  # fmt: skip
    """A policy to serve, at the budget of the rung nearest to half of the top one's bytes."""
    cost = context.cost
    middle = int((cost - 0.5).abs().argmin())
    policy.settings = replace(targets.settings, start_rung=middle)
    return PolicyCheckpoint(
        policy=policy,
        curve=curves[policy.kind].knob_curve,
        cost=tuple(cost.tolist()),
        fingerprints={**fingerprints, "ladder": None, "shared": False},  # type: ignore[typeddict-item]
        default_budget=float(cost[middle]),
        latency=latency,
        metrics={
            "headroom": verdict.headroom,
            "captured": verdict.captured,
            "captured_interval_95": verdict.captured_interval,
            "compared_at": list(verdict.ranks),
            "kl_at": verdict.kl,
            "exported": verdict.exported,
        },
    )


def _operating_point(
    curves: dict[str, Curve], checkpoint: PolicyCheckpoint, context: FitContext, latency: LatencyTable
) -> dict[str, float]:
    """KL and milliseconds of the exported policy at its default budget."""
    middle = checkpoint.policy.settings.start_rung
    scores = curves[checkpoint.policy.kind].points[middle].scores
    return {
        "budget": checkpoint.default_budget,
        "mean_rank": scores.mean_rank(context.rung_rank),
        "kl": scores.mean_kl(),
        "latency_ms": float((scores.rungs @ np.array(latency.ms)).sum() / scores.tokens.sum()),
    }


def _print_verdict(summary: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = Table(title="KL to full rank at equal mean rank, nats per completion token, held-out documents")
    shown.add_column("mean rank", justify="right")
    for name in summary["kl_at"]:
        shown.add_column(name, justify="right")
    for i, rank in enumerate(summary["compared_at"]):
        shown.add_row(str(rank), *(f"{values[i]:.4f}" for values in summary["kl_at"].values()))
    console.print(shown)
    captured = summary["captured"]
    share = "the headroom cannot be told from zero"
    if captured["share"] is not None:
        low, high = captured["interval_95"]
        share = f"captured {captured['share']:.0%} (95 % interval {low:.0%} to {high:.0%})"
    console.print(
        f"headroom {summary['headroom']['nats']:.4f} nats, {share}; exported: {summary['exported']} "
        f"({summary['reason']})"
    )
    console.print(f"{folder}/policy written in {summary['seconds']:.0f} s; tensorboard --logdir {folder.parent}")


def make_parser() -> ArgumentParser:
    """Flags are `fit`'s arguments; `--config FILE` reads them from YAML, `--print_config` writes them."""
    parser = ArgumentParser(prog="python -m training.fit", description="Learn a rank policy for a LoRA adapter.")
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")
    parser.add_function_arguments(fit, skip={"trainer"})
    owned = {
        "logger", "callbacks", "plugins", "default_root_dir", "max_epochs", "enable_model_summary", "barebones",
        "num_sanity_val_steps", "inference_mode", "log_every_n_steps",
    }  # fmt: skip
    parser.add_class_arguments(L.Trainer, "trainer", skip=owned, instantiate=False, sub_configs=False)
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    parsed: Namespace = parser.parse_args(command_line(arguments))
    with one_line_errors(), quiet_lightning():
        given = parser.instantiate(parsed)  # builds the settings, which check themselves
        trainer = {k: v for k, v in vars(given.pop("trainer")).items() if v is not None}
        given.pop("config", None)
        quiet_libraries()
        fit(**given.as_dict() if hasattr(given, "as_dict") else vars(given), trainer=trainer)


if __name__ == "__main__":
    main()

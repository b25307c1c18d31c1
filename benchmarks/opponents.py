"""The peers of `benchmarks.decode`'s cases: which are timed, under which name, and to which record they belong.

    plain PyTorch, CUDA graph    no adapter, or one of the case's rank for every row; every uniform case
    transformers, PEFT           eager, as they come; one row, no adapter and the exact one
    the same, compiled           `torch.compile` of the step; transformers over a static cache, which it compiles for

A peer is a static adapter of the rung's rank in 16 bits; none decides, so cases with a controller have none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bench import Bench
from .correctness import peft_missing
from .ladders import RANK
from .peers import Run, generating, graphed, measure, peft_generating
from .shapes import write_adapter

GRAPH, GRAPH_COMPILED = "PyTorch, CUDA graph", "PyTorch, compiled, CUDA graph"
EAGER, STATIC = "transformers, eager", "transformers, static cache, compiled"
PEFT_EAGER, PEFT_STATIC = "PEFT, eager", "PEFT, static cache, compiled"
STEPS = 8
"""Of a run."""


@dataclass(frozen=True)
class Opponent:
    """A peer of one case."""

    name: str
    compiled: bool
    open: Callable[[], AbstractContextManager[Run]]


def add_peers(
    bench: Bench, records: list[dict[str, Any]], repeats: int, *, plain: bool, compiled: bool, read_tb_s: float,
    save: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Time the peers of every record and write them down as its `peer`: by name milliseconds a step, peak bytes and
    `read_tb_s`, what the device reads, as it may be another of its kind than the record's.

    What cannot be timed is named with the reason instead. `save` is called after each of them; those that a record has
    already are left as they are.
    """
    bench.drop()
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(bench.hf, RANK, Path(folder) / "adapter") if peft_missing() is None else None
        for record in records:
            for opponent in opponents(bench, record, adapter):
                known = record["peer"] or {}
                if opponent.name in known or not (compiled if opponent.compiled else plain):
                    continue
                found = _timed(opponent, repeats, bench) | {"read_tb_s": read_tb_s}
                record["peer"] = {**known, opponent.name: found}
                save()
                shown = f"{found['ms_per_step']:.3f} ms" if "ms_per_step" in found else found["failed"]
                print(
                    f"  {record['batch']} x {record['context']}, {record['name']}; {opponent.name}: {shown}", flush=True
                )
    if adapter is None:
        print(f"PEFT is not measured: {peft_missing()}")


def opponents(bench: Bench, record: dict[str, Any], adapter: Path | None) -> Iterator[Opponent]:
    """Those of a case's record; `adapter` is the folder of an exact one, None where there is no PEFT."""
    if record["controller"] or "resident_rung" in record:
        return
    model, batch, context, rank = bench.hf, record["batch"], record["context"], record["rung"]
    yield Opponent(GRAPH, False, lambda: graphed(model, batch, context, rank))
    if rank not in (None, RANK):
        return
    yield Opponent(GRAPH_COMPILED, True, lambda: graphed(model, batch, context, rank, compiled=True))
    if batch > 1:
        return
    if rank is None:
        yield Opponent(EAGER, False, lambda: generating(model, batch, context, static=False))
        yield Opponent(STATIC, True, lambda: generating(model, batch, context, static=True))
    elif adapter is not None:
        yield Opponent(PEFT_EAGER, False, lambda: peft_generating(model, adapter, batch, context, static=False))
        yield Opponent(PEFT_STATIC, True, lambda: peft_generating(model, adapter, batch, context, static=True))


def _timed(opponent: Opponent, repeats: int, bench: Bench) -> dict[str, Any]:
    try:
        found = measure(opponent.open(), STEPS, repeats, bench.model.device)
    except (RuntimeError, MemoryError) as error:  # a peer that fails must not take our own figures with it
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else repr(error)}
    held = found["ms_per_step"]
    return {"ms_per_step": held["median"], "spread": held, "peak_bytes": found["peak_bytes"]}

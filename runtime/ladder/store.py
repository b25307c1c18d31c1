"""A ladder as an artefact: `ladder.safetensors` (its directions and edges) and `ladder.json` (everything else).

Built once, loaded without a QR or an SVD. Of a file no more is read than the rungs up to `resident_rung` need, but all
of it is hashed. A ladder saved with a part of its rungs in memory loads as one: it names the rungs that it lacks, and
its fingerprint is that of the whole. `open_ladder` is what every command does with its `--adapter`: a saved ladder is
loaded, a PEFT folder or hub id becomes an `svd` ladder on the fly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from policy.difficulty import MOST_CODE, Difficulty
from policy.files import new_folder
from policy.limits import Choice, Entries, Maybe, Number, Several, Text, Whole, refused, shown
from policy.reading import Shapes, read_json, read_shapes
from policy.rungs import MOST_RUNGS, RUNG, RUNGS, Rung

from .adapter import Adapter, load_adapter
from .banks import KINDS, SVD, Directions, Ladder
from .factors import build_ladder
from .formats import BITS, PARTS, Rows
from .version1 import VERSION, load_version1, read_schema1

SCHEMA_VERSION = 2
TENSORS = "ladder.safetensors"
RECORD = "ladder.json"
EDGES = "edges"
DIFFICULTY = ("difficulty.token", "difficulty.pair")
"""The tables of token difficulty, where the ladder has them."""
AGAIN = "save the ladder again"
_WIDTH = Whole(1, 2**31 - 1)
_AMOUNT = Number(0, 1e300)
_KL = Number(-1e300, 1e300)
"""Nats; of a rung that loses nothing it may be a rounding below 0."""
_RUNG_QUALITY = Entries(
    {
        "rung": RUNG, "share": _AMOUNT, "bytes": _AMOUNT, "kl": _KL, "kl_se": Maybe(_AMOUNT), "perplexity": _AMOUNT,
    }
)  # fmt: skip
_RECORD = Entries(
    {
        "kind": Choice(KINDS),
        "rungs": RUNGS,
        "bank_of": Several(Whole(0, MOST_RUNGS), 1, MOST_RUNGS),
        "scales": Several(Number(0, 1e6, above=True), 1, MOST_RUNGS),
        "resident": Maybe(Whole(0, MOST_RUNGS)),
        "modules": Several(Text(), 1, 100_000),
        "widths": Several(Several(_WIDTH, 2, 2), 1, 100_000),
        "base_model": Maybe(Text(0)),
        "fingerprints": Entries({"adapter": Text(), "ladder": Text(), "directions": Maybe(Text())}),
        "tensors_sha256": Text(64, 64),
    }
)


def open_ladder(
    source: str | Path | Adapter | Ladder, rungs: Sequence[Rung] | None = None, *, resident_rung: Rung | None = None
) -> Ladder:
    """The ladder of whatever a user calls an adapter: a saved ladder, a PEFT folder, a hub id, or one already read.

    `rungs` are the ones wanted; by default a saved ladder's own, or those of `build_ladder`. No more of it is in memory
    than its rungs up to `resident_rung` read. Raises what `load_ladder`, `load_adapter` and `build_ladder` raise, and
    ValueError for rungs that there are not.
    """
    if isinstance(source, str | Path):
        if (Path(source) / RECORD).is_file():
            return _load(Path(source), rungs, resident_rung)
        source = load_adapter(source)
    if isinstance(source, Adapter):
        source = build_ladder(source, rungs)
    return _wanted(source, rungs, resident_rung)


def _wanted(ladder: Ladder, rungs: Sequence[Rung] | None, resident_rung: Rung | None) -> Ladder:
    ladder = ladder if rungs is None else ladder.with_rungs(rungs)
    return ladder if resident_rung is None else ladder.up_to(resident_rung)


def save_ladder(ladder: Ladder, folder: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Write both files as a new `folder`, replacing an older ladder whole, and return its path.

    Of a ladder of which not all is in memory, what is in memory is written. `extra` goes into the record as it is: how
    the ladder was made. Raises FileExistsError for a path that holds something else than a ladder, and ValueError for
    a record that could not be read again, such as one with a number that is not finite.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / RECORD).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"ladder: expected a new folder or an older ladder, got {folder}; choose another")
    record = {
        **(extra or {}),
        "schema_version": SCHEMA_VERSION,
        "kind": ladder.kind,
        "rungs": ladder.rungs,
        "bank_of": ladder.bank_of,
        "scales": ladder.scales,
        "resident": ladder.resident,
        "modules": list(ladder.modules),
        "widths": [[own.a.width, own.b.width] for own in ladder.modules.values()],
        "bytes": ladder.rung_bytes().tolist(),
        "base_model": ladder.base_model,
        "fingerprints": {"adapter": ladder.adapter, "ladder": ladder.fingerprint, "directions": ladder.sample()},
        "quality": [dict(own) for own in ladder.quality],
    }
    with new_folder(folder, overwrite=True) as scratch:
        save_file(_separate(_tensors(ladder)), scratch / TENSORS, metadata={"format": "pt"})
        record["tensors_sha256"] = _digest(scratch / TENSORS)
        _checked(record)
        try:
            text = json.dumps(record, indent=2, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"extra: expected what JSON can say, got {error}; correct it") from None
        (scratch / RECORD).write_text(text + "\n", encoding="utf-8")
    return folder


def _separate(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """On the CPU, each with memory of its own: a file refuses tensors that share some."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, given in tensors:
        own = given.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != own.nbytes:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


def _tensors(ladder: Ladder) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a ladder that is not empty, by its name in a file."""
    yield EDGES, ladder.edges
    if ladder.difficulty is not None:
        yield from zip(DIFFICULTY, (ladder.difficulty.token, ladder.difficulty.pair), strict=True)
    for number, bank in enumerate(ladder.banks):
        for name, own in bank.items():
            for half, rows in (("a", own.a), ("b", own.b)):
                yield from ((f"{number}.{name}.{half}.{part}", x) for part, x in rows.parts().items() if x.numel())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_ladder(folder: str | Path, resident_rung: Rung | None = None) -> Ladder:
    """Read what `save_ladder` wrote, on the CPU; of its directions no more than the rungs up to `resident_rung` read.

    Raises FileNotFoundError for a missing file, ValueError, naming the file, for anything that is not as `save_ladder`
    writes it, and ValueError for a rung that there is not.
    """
    return _load(Path(folder), None, resident_rung)


def _load(folder: Path, rungs: Sequence[Rung] | None, resident_rung: Rung | None) -> Ladder:
    for name in (RECORD, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"ladder: expected {RECORD} and {TENSORS} in {folder}, got no {name}; save again")
    path = folder / TENSORS
    version, record = _read_record(folder / RECORD)
    shapes = read_shapes(path, "copy or save it again")
    prints = record["fingerprints"]
    with _named(path):
        if _digest(path) != record["tensors_sha256"]:
            raise ValueError(f"expected the file {RECORD} was written with, got another; save both again")
        ladder = load_version1(path, record, shapes) if version == VERSION else _header(path, record, shapes)
        _check_top(ladder)
        if ladder.fingerprint != prints["ladder"]:
            raise ValueError(
                f"expected fingerprint {prints['ladder']}, got {ladder.fingerprint} from what the file says; {AGAIN}"
            )
    ladder = _wanted(ladder, rungs, resident_rung)
    with _named(path):
        if version != VERSION:
            ladder = _read_rows(path, ladder)
        _check_finite(ladder)
        if ladder.resident is None:  # nothing is missing that the sample was taken of
            ladder = replace(ladder, whole=None)
            if ladder.sample() != prints.get("directions"):
                raise ValueError(
                    f"expected directions of which {prints['directions']} is the sample, got {ladder.sample()}; {AGAIN}"
                )
    return ladder


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say of which file a refusal is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_record(path: Path) -> tuple[int, dict[str, Any]]:
    found = read_json(path, AGAIN)
    try:
        version: int = Choice((VERSION, SCHEMA_VERSION)).take("schema_version", found.get("schema_version"))
        if version == VERSION:
            return version, read_schema1(found)
        return version, _checked(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error} or {AGAIN}") from None


def _checked(found: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record is read, within its limits. Raises ValueError for what is not."""
    record: dict[str, Any] = _RECORD.take("", {name: found[name] for name in _RECORD.of if name in found})
    if len(set(record["modules"])) != len(record["modules"]):
        raise refused("modules", "every name once", record["modules"])
    if len(record["widths"]) != len(record["modules"]):
        raise refused("widths", f"{len(record['modules'])} pairs, one for each module", len(record["widths"]))
    sample = record["fingerprints"]["directions"]
    if (sample is None) != (record["kind"] == SVD):
        raise refused("fingerprints.directions", "none of svd, text of any other kind", sample)
    quality = found.get("quality")
    if not isinstance(quality, list | tuple):
        raise refused("quality", "a list of what was measured, a rung after the other", quality)
    record["quality"] = tuple(_RUNG_QUALITY.take(f"quality[{i}]", own) for i, own in enumerate(quality))
    return record


def _header(path: Path, record: dict[str, Any], shapes: Shapes) -> Ladder:
    """The ladder in a file, its directions without values: on the meta device, where they take no memory."""
    expected = (len(record["rungs"]), len(record["modules"]), len(BITS))
    if shapes.get(EDGES) != (expected, torch.int64):
        raise ValueError(f"tensor {EDGES}: expected {expected} torch.int64, got {shown(shapes.get(EDGES))}; {AGAIN}")
    names = {EDGES, *DIFFICULTY}
    banks: list[dict[str, Directions]] = []
    for bank in range(max(record["bank_of"]) + 1):
        banks.append({})
        for name, widths in zip(record["modules"], record["widths"], strict=True):
            prefixes = [f"{bank}.{name}.{half}." for half in "ab"]
            names |= {prefix + part for prefix in prefixes for part in PARTS}
            halves = [_empty(prefix, width, shapes) for prefix, width in zip(prefixes, widths, strict=True)]
            banks[-1][name] = Directions(*halves)
    if shapes.keys() - names:
        raise ValueError(f"tensor {shown(min(shapes.keys() - names))}: expected none, got one; {AGAIN}")
    with safe_open(path, framework="pt") as file:
        edges = file.get_tensor(EDGES)
        difficulty = _difficulty(file, shapes)
    prints = record["fingerprints"]
    return Ladder(
        record["kind"], record["rungs"], tuple(banks), record["bank_of"], edges, record["scales"], prints["adapter"],
        record["base_model"], record["resident"], prints["directions"], record["quality"], difficulty,
    )  # fmt: skip


def _difficulty(file: Any, shapes: Shapes) -> Difficulty | None:
    """The tables of token difficulty in an open file; None where there are none."""
    there = [name for name in DIFFICULTY if name in shapes]
    for name in DIFFICULTY if there else ():
        shape, dtype = shapes.get(name, ((), None))
        if len(shape) != 1 or not shape[0] or dtype != torch.uint8:
            raise ValueError(f"tensor {name}: expected some torch.uint8 codes, got {shown(shapes.get(name))}; {AGAIN}")
    tables = {name: file.get_tensor(name) for name in DIFFICULTY if there}
    for name, table in tables.items():
        if int(table.max()) > MOST_CODE:
            raise ValueError(f"tensor {name}: expected codes up to {MOST_CODE}, got {int(table.max())}; {AGAIN}")
    return Difficulty(*tables.values()) if tables else None


def _empty(prefix: str, width: int, shapes: Shapes) -> Rows:
    """Rows whose parts are those of this prefix, without values. Raises ValueError for one that is no such part."""
    meta = torch.device("meta")
    parts = {}
    for part in PARTS:
        shape, dtype = shapes.get(prefix + part, ((), None))
        if isinstance(dtype, torch.dtype):
            parts[part] = torch.empty(shape, dtype=dtype, device=meta)
        elif dtype is not None:
            raise ValueError(f"tensor {shown(prefix + part)}: expected a dtype of PyTorch's, got {dtype}; {AGAIN}")
    try:
        return Rows.of(width, parts, meta)
    except ValueError as error:
        raise ValueError(f"tensor {prefix}{error}") from None


def _read_rows(path: Path, header: Ladder) -> Ladder:
    """The ladder with the values of the rows that `header` has, which are the first of those in the file."""
    with safe_open(path, framework="pt") as file:

        def read(prefix: str, rows: Rows) -> Rows:
            wanted = {part: len(x) for part, x in rows.parts().items() if len(x)}
            return Rows.of(rows.width, {part: file.get_slice(prefix + part)[:n] for part, n in wanted.items()})

        banks = tuple(
            {
                name: Directions(read(f"{number}.{name}.a.", own.a), read(f"{number}.{name}.b.", own.b))
                for name, own in bank.items()
            }
            for number, bank in enumerate(header.banks)
        )
    return replace(header, banks=banks)


def _check_top(ladder: Ladder) -> None:
    """Raise ValueError unless the top rung reads the whole adapter at 16 bits."""
    table, rows = ladder.edges[-1], [own.counts()[0] for own in ladder.modules.values()]
    exact = bool((table == table[:, :1]).all()) and int(table.max()) == ladder.rungs[-1]
    # Where the top is there by name alone, so are the adapter's rows.
    if not exact or (ladder.resident is None and table[:, 0].tolist() != rows):
        got = f"{shown(table.tolist())} of {shown(rows)} directions at rung {ladder.rungs[-1]}"
        raise ValueError(f"edges: expected a top rung that is the whole adapter at 16 bits, got {got}; {AGAIN}")


def _check_finite(ladder: Ladder) -> None:
    for bank in ladder.banks:
        for name, own in bank.items():
            floats = [x for rows in (own.a, own.b) for x in (rows.wide, *rows.scales)]
            if not all(bool(x.isfinite().all()) for x in floats):
                raise ValueError(f"module {name}: expected finite numbers, got NaN or infinity; {AGAIN}")

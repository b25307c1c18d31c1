"""Documents from files and folders, without a word to the hub.

| given | documents |
| --- | --- |
| `x.jsonl`, `x.json` | one JSON object a line: {prompt, completion}, or another shape that `data.columns` knows |
| `x.txt` | text between blank lines; in a file without blank lines, every line |
| `source.txt:target.txt` | line i of one file with line i of the other |
| a folder | its `train`, `validation` and `test` files of the kinds above (not pairs) |

Every file may be compressed (`.xz`, `.gz`). A single file is one split, `train`.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn

import datasets
from datasets import Dataset

from data.columns import PROMPT_COMPLETION, shape_of, to_documents
from data.parallel import parse_pair, translations

SPLITS = ("train", "validation", "test")
_COMPRESSED = (".xz", ".gz")
_JSON = (".jsonl", ".json")
_TEXT = (".txt",)


def is_local(name: str) -> bool:
    """Whether `name` means a path: it exists, has a known suffix, names two files, or is written as a path."""
    written_as_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    return written_as_path or ":" in name or _kind(Path(name)) in _JSON + _TEXT or Path(name).exists()


def local_splits(name: str) -> tuple[str, ...]:
    """The splits of a local path: those a folder holds, or ("train",) for a file or a pair of files.

    Raises FileNotFoundError for a folder that holds none.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return ("train",)
    found = tuple(split for split in SPLITS if _split_files(folder, split))
    if not found:
        raise FileNotFoundError(
            f"expected train.jsonl, validation.jsonl or test.jsonl in {folder}, got none; do add them"
        )
    return found


def load_local(name: str, split: str, config: str | None) -> Dataset:
    """Documents of a file, a pair of files or a folder. `config` is a language pair, for a pair of files only."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = _folder_file(path, split)
    elif split != "train":
        raise ValueError(
            f"expected split 'train' of {name} (a single file is one split), got {split!r}; do pass a folder with "
            f"{split}.jsonl"
        )
    if ":" in name and not path.exists():
        return _load_pair(name, config)
    if config is not None:
        raise ValueError(f"expected no configuration for {name}, got {config!r}; do leave it out for local files")
    _check_file(path)
    if _kind(path) in _JSON:
        return _load_json(path, split)
    if _kind(path) in _TEXT:
        return _load_text(path)
    raise ValueError(
        f"expected a file ending in .jsonl, .json or .txt (and .xz or .gz if compressed), got {path}; "
        "do rename or convert it"
    )


def _folder_file(folder: Path, split: str) -> Path:
    files = _split_files(folder, split)
    if len(files) > 1:
        names = [file.name for file in files]
        raise ValueError(f"expected one file for split {split!r} in {folder}, got {names}; do keep one of them")
    if not files:
        found = list(local_splits(str(folder)))
        raise ValueError(f"expected a split of {folder}, one of {found}, got {split!r}; do pass one of these")
    return files[0]


def _split_files(folder: Path, split: str) -> list[Path]:
    names = (f"{split}{kind}{packed}" for kind in _JSON + _TEXT for packed in ("", *_COMPRESSED))
    return [folder / name for name in names if (folder / name).is_file()]


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"expected a file or folder at {path}, got nothing there; do check the path")
    if path.stat().st_size == 0:
        raise ValueError(f"expected at least one document in {path}, got an empty file; do check how it was written")


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _load_json(path: Path, split: str) -> Dataset:
    try:
        rows = datasets.load_dataset("json", data_files={split: str(path)}, split=split)
    # The reader raises whatever its JSON parser does, StopIteration for a file without lines included, and without
    # the line number; the file is then read again, slowly, to say which line it is.
    except Exception as error:
        _explain(path, PROMPT_COMPLETION, error)
    assert isinstance(rows, Dataset), "a named split without streaming is a Dataset"
    needed, _ = shape_of(rows.column_names, str(path))
    # A key that a line lacks is read as null, and a number among strings changes the column's type.
    for column in needed:
        text = column == "answers" or getattr(rows.features[column], "dtype", "") in ("string", "large_string")
        if not text or rows.data.column(column).null_count:
            _explain(path, needed, None)
    return to_documents(rows, str(path))


def _explain(path: Path, needed: tuple[str, ...], error: Exception | None) -> NoReturn:
    """Raise the ValueError that names the first line of `path` which is not an object with the `needed` texts."""
    number = 0
    for number, line in enumerate(_lines(path), start=1):
        _check_line(f"{path}, line {number}", line, needed)
    if number == 0:
        raise ValueError(f"expected at least one document in {path}, got no lines; do check how it was written")
    raise ValueError(
        f"expected lines of JSON with the same keys and types in {path}, got {type(error).__name__}: {error}; "
        "do keep only the keys prompt and completion"
    ) from error


def _check_line(place: str, line: str, needed: tuple[str, ...]) -> None:
    wanted = " and ".join(needed)
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        got = f"{line.strip()[:40]!r}" if line.strip() else "a blank line"
        raise ValueError(f"expected a JSON object at {place}, got {got}; do correct or remove the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object at {place}, got {type(row).__name__}; do write {{{wanted}}} a line")
    for key in needed:
        if key not in row:
            raise ValueError(f"expected the keys {wanted} at {place}, got {sorted(row)}; do add {key!r}")
        if key != "answers" and not isinstance(row[key], str):
            raise ValueError(f"expected text in {key!r} at {place}, got {type(row[key]).__name__}; do write a string")


def _load_text(path: Path) -> Dataset:
    lines = [line.rstrip("\r\n") for line in _lines(path)]
    texts = list(_paragraphs(lines))
    if len(texts) == 1:
        texts = texts[0].split("\n")
    return to_documents(Dataset.from_dict({"text": texts}), str(path))


def _paragraphs(lines: list[str]) -> Iterator[str]:
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []


def _load_pair(name: str, config: str | None) -> Dataset:
    parts = name.split(":")
    if len(parts) != 2:
        raise ValueError(f"expected two files as source.txt:target.txt, got {name!r}; do name exactly two")
    pair = parse_pair(config) if config else None
    paths = [Path(part).expanduser() for part in parts]
    for path in paths:
        _check_file(path)
    sources, targets = ([line.rstrip("\r\n") for line in _lines(path)] for path in paths)
    if len(sources) != len(targets):
        raise ValueError(
            f"expected as many lines in {paths[1]} as in {paths[0]}, {len(sources)}, got {len(targets)}; "
            "do align the files"
        )
    return translations(sources, targets, pair, None)


def _lines(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            yield from file
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"expected UTF-8 text in {path}, got {error}; do write the file again") from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")

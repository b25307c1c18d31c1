"""Python's own documentation -> checkpoints/text/{train,validation,test}.jsonl.xz.

What: every line is {"prompt": a one-line header, "completion": the text under it}.  The documents
are the sections of the language reference that `pydoc` carries, and the docstrings of the standard
library's modules, classes, functions and methods.

Why: an adapter needs a task that differs from its base model's text, with held-out documents, in
a few hundred kilobytes and under a licence that allows shipping it.  This text is on every machine
that runs Python (PSF licence).

Trade-off: docstrings are short and repeat themselves.  Documents that mostly repeat paragraphs
already taken are dropped, which keeps one split from leaking into another and costs some text.
A document's split depends only on the name of its source, so parts of one text stay together.

    python checkpoints/recipe/extract.py --output checkpoints/text
"""

import argparse
import hashlib
import importlib
import inspect
import json
import lzma
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

MAX_CHARS = 2500
MIN_CHARS = 80
MIN_PROSE = 0.62  # share of the visible characters that are letters of plain words
MAX_REPEATED = 0.3  # share of a document's characters in paragraphs already taken
HELD_OUT_PERCENT = {"validation": 8, "test": 8}

# Importing these acts (opens a window, prints, needs a display or another system), or they carry
# no text of their own.
SKIPPED_MODULES = frozenset(
    [
        "antigravity",
        "this",
        "idlelib",
        "lib2to3",
        "test",
        "turtle",
        "turtledemo",
        "tkinter",
        "ensurepip",
        "distutils",
        "pydoc_data",
        "msilib",
        "winreg",
        "winsound",
        "nt",
        "__main__",
        "tests",
        "__future__",
    ]
)


@dataclass(frozen=True)
class Source:
    """One original text: where it is from, the header shown above it, its paragraphs."""

    origin: str
    header: str
    paragraphs: list[str]


def reflow(block: str) -> str:
    """Joins the hard-wrapped lines of one paragraph; leaves code, lists and tables as they are."""
    lines = block.split("\n")
    if len(lines) == 1 or ">>>" in block or any(len(line) < 45 for line in lines[:-1]):
        return block
    indents = [len(line) - len(line.lstrip()) for line in lines]
    bullet = re.match(r"\s*([*-]|\d+\.) +", lines[0])
    expected = bullet.end() if bullet else indents[0]
    entry = re.compile(r"\s*[\w.*]+(\(.*\))?\s*(--|-|:|=|\*) |\s*[:@]\w")
    if any(indent != expected for indent in indents[1:]) or any(map(entry.match, lines[1:])):
        return block
    return " ".join([lines[0].rstrip(), *(line.strip() for line in lines[1:])])


def split_paragraphs(text: str) -> list[str]:
    """Paragraphs of a cleaned text, rewrapped, without grammar productions and ASCII rules."""
    text = re.sub(r"[ \t]+\n", "\n", text.expandtabs())
    blocks = [block.strip("\n") for block in re.split(r"\n{2,}", text)]
    return [reflow(b) for b in blocks if b.strip() and "::=" not in b and re.search(r"[A-Za-z]", b)]


def topic_sources() -> Iterator[Source]:
    """Sections of the language reference, titled lines underlined with *, =, - or ~."""
    for name, text in sorted(topics.items()):
        parts = re.split(r"(?m)^(\S.*)\n([*=~-])\2{3,}\n", text)
        # re.split yields: text before the first title, then title, underline, body, title, ...
        for title, body in zip(parts[1::3], parts[3::3], strict=True):
            yield Source(f"topic {name}", title.strip(), split_paragraphs(body))


def public_modules() -> Iterator[types.ModuleType]:
    """Standard library modules and submodules that import without side effects, builtins first."""
    top_level = sorted(sys.stdlib_module_names, key=lambda name: (name != "builtins", name))
    pending = [name for name in top_level if not name.startswith("_")]
    while pending:
        name = pending.pop(0)
        if SKIPPED_MODULES.intersection(name.split(".")):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            print(f"skipped module {name}: {error}", file=sys.stderr)
            continue
        yield module
        children = (info.name for info in pkgutil.iter_modules(getattr(module, "__path__", [])))
        pending += [f"{name}.{child}" for child in sorted(children) if not child.startswith("_")]


def signature(thing: Callable[..., object], drop_first: bool) -> str:
    """`(a, b=1)`, or `(...)` when unknown, long, or dependent on this machine."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError, AttributeError):
        return "(...)"
    parameters = list(found.parameters.values())
    if drop_first and parameters and parameters[0].name in ("self", "cls", "type"):
        found = found.replace(parameters=parameters[1:])
    text = str(found)
    machine_bound = re.search(r"<| at 0x|'/\w", text)
    return "(...)" if len(text) > 100 or machine_bound else text


def docstring(thing: object) -> list[str]:
    """Paragraphs of an object's own docstring; empty when it has none."""
    text = getattr(thing, "__doc__", None)
    return split_paragraphs(inspect.cleandoc(text)) if isinstance(text, str) else []


def class_sources(cls: type, name: str) -> Iterator[Source]:
    """A class's own docstring and those of the members it defines itself."""
    yield Source(name, f"class {name}{signature(cls, False)}", docstring(cls))
    for member_name, member in sorted(vars(cls).items()):
        bound = isinstance(member, (staticmethod, classmethod))
        target = getattr(cls, member_name, None) if bound else member
        if member_name.startswith("_") and not member_name.endswith("__"):
            continue
        if isinstance(member, type) or member_name in ("__doc__", "__class__"):
            continue
        call = signature(target, not bound) if callable(target) else ""
        yield Source(f"{name}.{member_name}", f"{name}.{member_name}{call}", docstring(target))


def module_sources(module: types.ModuleType) -> Iterator[Source]:
    """A module's docstring and those of the public classes and functions that live in it."""
    prefix = "" if module.__name__ == "builtins" else module.__name__ + "."
    yield Source(module.__name__, f"module {module.__name__}", docstring(module))
    for name, thing in sorted(vars(module).items()):
        home = getattr(thing, "__module__", None) or module.__name__
        # Objects re-exported from another public module are taken there.
        foreign = home != module.__name__ and not home.startswith(("_", "posix"))
        if name.startswith("_") or foreign:
            continue
        if isinstance(thing, type):
            yield from class_sources(thing, prefix + name)
        elif inspect.isroutine(thing):
            yield Source(prefix + name, prefix + name + signature(thing, False), docstring(thing))


def is_prose(text: str) -> bool:
    """Whether a document reads as English rather than as code, doctests or a table."""
    visible = len(re.sub(r"\s", "", text))
    words = sum(len(word) for word in re.findall(r"(?<![\w.])[A-Za-z][a-z]*(?![\w(])", text))
    lines = text.split("\n")
    doctest_lines = sum(line.lstrip().startswith((">>>", "...")) for line in lines)
    return words >= MIN_PROSE * visible and doctest_lines <= 0.25 * len(lines)


def documents(source: Source) -> Iterator[dict[str, str]]:
    """Cuts one source at paragraph boundaries into documents of MIN_CHARS to MAX_CHARS."""
    parts = [""]
    for paragraph in source.paragraphs:
        if parts[-1] and len(parts[-1]) + len(paragraph) + 2 > MAX_CHARS:
            parts.append("")
        parts[-1] = f"{parts[-1]}\n\n{paragraph}" if parts[-1] else paragraph
    for index, part in enumerate(parts):
        header = source.header + (" (continued)" if index else "")
        if MIN_CHARS <= len(part) <= 2 * MAX_CHARS and is_prose(part):
            yield {"prompt": header + "\n", "completion": part}


def split_of(origin: str) -> str:
    """train, validation or test: a stable function of the name of the source."""
    percent = int(hashlib.sha256(origin.encode()).hexdigest(), 16) % 100
    for split, share in HELD_OUT_PERCENT.items():
        if percent < share:
            return split
        percent -= share
    return "train"


def collect(sources: Iterable[Source]) -> dict[str, list[dict[str, str]]]:
    """Documents by split; drops those that mostly repeat paragraphs of earlier ones."""
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    taken: set[str] = set()
    for source in sources:
        for document in documents(source):
            paragraphs = document["completion"].split("\n\n")
            keys = [re.sub(r"[^a-z]+", "", paragraph.lower()) for paragraph in paragraphs]
            repeated = sum(len(key) for key in keys if key in taken)
            if repeated <= MAX_REPEATED * sum(map(len, keys)):
                splits[split_of(source.origin)].append(document)
                taken.update(keys)
    return splits


def write_jsonl_xz(path: Path, rows: Iterable[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("checkpoints/text"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    # Deprecated modules warn on import; their text is as good as any other.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from_modules = [s for module in public_modules() for s in module_sources(module)]
    for split, rows in collect([*topic_sources(), *from_modules]).items():
        path = args.output / f"{split}.jsonl.xz"
        write_jsonl_xz(path, rows)
        chars = sum(len(row["prompt"]) + len(row["completion"]) for row in rows)
        print(f"{path}: {len(rows)} documents, {chars:,} characters, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

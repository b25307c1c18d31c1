"""The rules of the house, read from the source: who may import whom, what may not be used, what lies where.

data, policy  import no sibling
runtime       imports policy, and never Lightning, not even through policy
training      may import all three

Within the runtime what is shared (`control`, `ops`, `ladder`, `kv`) knows nothing of the paths that run it
(`reference`, `engine`), `engine` nothing of `reference`, and `control` nothing of transformers. Imports run one way:
there is no circle anywhere.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

ALLOWED_SIBLINGS = {
    "data": set(),
    "policy": set(),
    "runtime": {"policy"},
    "training": {"data", "policy", "runtime"},
}
PACKAGES = sorted(ALLOWED_SIBLINGS)
# In the repository, but not in the distribution.
NOT_INSTALLED = {"benchmarks", "checkpoints", "docs", "tests"}
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
PICKLERS = {"_pickle", "cloudpickle", "dill", "joblib", "pickle", "shelve"}
TORCH_PICKLE = re.compile(r"torch(\.serialization)?\.(load|save)")
LINES_AT_MOST = 450
SHARED_ROOMS = ("control", "ops", "ladder", "kv")
PATHS = ("reference", "engine")
FILES_ON_THE_WAY = 6
REFERENCE_OPS = ROOT / "runtime" / "ops" / "reference"

TOP_LEVEL = (
    set(PACKAGES)
    | NOT_INSTALLED
    | {
        ".ci",
        ".gitignore",
        "LICENSE",
        "Makefile",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
    }
)
# Modules whose distribution goes by another name.
DISTRIBUTIONS = {"huggingface_hub": "huggingface-hub", "sklearn": "scikit-learn"}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields dotted module names and line numbers, late imports and `import_module("name")` included.

    A relative import stays inside its own top-level package (Python refuses to leave it), so it is not reported.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module, node.lineno
            case ast.Call(func=function, args=[ast.Constant(value=str(module)), *_]):
                if ast.unparse(function) in {"__import__", "import_module", "importlib.import_module"}:
                    yield module, node.lineno


def pickling_calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields uses of `torch.load` and `torch.save` under any alias, and `allow_pickle=True`."""
    aliases = {"torch": "torch"}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                aliases |= {alias.asname: alias.name for alias in names if alias.asname}
            case ast.ImportFrom(module=str(module), names=names, level=0):
                aliases |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in names}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names, level=0):
                used = [f"{module}.{alias.name}" for alias in names]
            case ast.Attribute():
                first, *rest = ast.unparse(node).split(".")
                used = [".".join([aliases.get(first, first), *rest])]
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                used = ["allow_pickle=True"]
            case _:
                continue
        yield from ((name, node.lineno) for name in used if TORCH_PICKLE.fullmatch(name) or "allow_pickle" in name)


def violations(package: str, source: str) -> list[str]:
    """What one file of `package` does that the house does not allow, as `line N: …`."""
    tree = ast.parse(source)
    found = []
    for module, line in imported_modules(tree):
        top = module.partition(".")[0]
        if top in (ALLOWED_SIBLINGS.keys() | NOT_INSTALLED) - ALLOWED_SIBLINGS[package] - {package}:
            found.append(f"line {line}: {package} must not import {top}")
        if top in LIGHTNING and package in {"policy", "runtime"}:
            found.append(f"line {line}: {package} must not import Lightning ({module})")
        if top == "peft":
            found.append(f"line {line}: peft is a reference for tests, not a dependency")
        if top in PICKLERS:
            found.append(f"line {line}: nothing is ever pickled ({module})")
    found += [f"line {line}: nothing is ever pickled ({use})" for use, line in pickling_calls(tree)]
    lines = len(source.splitlines())
    if lines > LINES_AT_MOST:
        found.append(f"{lines} lines, at most {LINES_AT_MOST}: look for the seam")
    return found


def module_name(path: Path) -> str:
    """The dotted name of a source file; a package's is that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def edges(late: bool = False) -> dict[str, set[str]]:
    """Which of our modules each one imports when it is imported, by dotted name; what is for type checkers is not.

    `late` counts those too, and what is imported inside functions.
    """
    modules = {module_name(path): path for path in sources()}
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        first = [part for node in tree.body for part in (node.body if isinstance(node, ast.Try) else [node])]
        for part in ast.walk(tree) if late else first:
            if isinstance(part, ast.Import):
                found[name] |= {alias.name for alias in part.names}
            elif isinstance(part, ast.ImportFrom):
                base = package[: len(package) - part.level + 1] if part.level else []
                source = ".".join([*base, *([part.module] if part.module else [])])
                inner = {f"{source}.{alias.name}" for alias in part.names}
                found[name] |= inner & modules.keys() or {source}
    return {name: (targets & modules.keys()) - {name} for name, targets in found.items()}


def steps(graph: dict[str, set[str]], start: str, end: str) -> list[str]:
    """The shortest chain of imports from one module to another."""
    chains, seen = [[start]], {start}
    for chain in chains:
        if chain[-1] == end:
            return chain
        fresh = sorted(graph[chain[-1]] - seen)
        seen |= set(fresh)
        chains += [[*chain, name] for name in fresh]
    raise AssertionError(f"no way from {start} to {end}")


def test_rooms_keep_their_doors():
    for name, imported in edges(late=True).items():
        room = name.split(".")[1] if name.startswith("runtime.") else ""
        if room in SHARED_ROOMS:
            assert not [i for i in imported if i.startswith(tuple(f"runtime.{path}" for path in PATHS))], name
        if room == "engine":
            assert not [i for i in imported if i.startswith("runtime.reference")], name
    control = [path for path in sources() if "control" in path.parts]
    assert control
    for path in control:
        modules = {name for name, _ in imported_modules(ast.parse(path.read_text(encoding="utf-8")))}
        assert not {name for name in modules if name.split(".")[0] == "transformers"}, path


def test_imports_run_one_way():
    graph, done = edges(), set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join([*above, name])}"
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("end", ["runtime.ops.reference.lora", "runtime.reference.gate", "runtime.control.machine"])
def test_a_prompt_reaches_what_it_needs_in_few_files(end):
    assert len(steps(edges(), "runtime.generate.__main__", end)) <= FILES_ON_THE_WAY


def test_every_file_has_a_name_of_its_own():
    """An op and its specification, `ops/x.py` and `ops/reference/x.py`, are one thing twice, and count as one."""
    named = [*sources(), *(ROOT / "benchmarks").glob("*.py")]
    specifications = {path for path in named if path.parent == REFERENCE_OPS and path.parents[1] / path.name in named}
    # two specifications of how few bits hold what they hold: of a page, and of a direction
    # what builds a ladder, and what a decode step is, beside the benchmarks of how fast they are
    # two stores of ladders: on disk, and on the device
    # attention and control as an op, beside the part of a path that looks after them
    shared = ("formats.py", "ladder.py", "decode.py", "store.py", "attention.py", "control.py")
    ignored = {"__init__.py", "__main__.py", *shared}
    names = [path.name for path in named if path.name not in ignored and path not in specifications]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_the_readme_shows_the_rooms_of_the_runtime_and_of_training():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    rooms = [path for package in ("runtime", "training") for path in (ROOT / package).iterdir() if path.is_dir()]
    missing = [path.name for path in rooms if path.name != "__pycache__" and f"{path.name}/" not in tree]
    assert missing == []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_source_keeps_the_rules(path):
    package = path.relative_to(ROOT).parts[0]
    assert violations(package, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("package", "source", "complaint"),
    [
        ("data", "import policy", "data must not import policy"),
        ("policy", "from runtime.generate import generate", "policy must not import runtime"),
        ("runtime", "def late():\n    from data import load", "line 2: runtime must not import data"),
        ("runtime", "import torch, training.fit", "runtime must not import training"),
        ("runtime", "import importlib\nimportlib.import_module('training.fit')", "runtime must not import training"),
        ("training", "from benchmarks import decode", "training must not import benchmarks"),
        ("runtime", "from lightning.pytorch import Trainer", "runtime must not import Lightning"),
        ("policy", "import pytorch_lightning as pl", "policy must not import Lightning"),
        ("training", "from peft import LoraConfig", "peft is a reference"),
        ("training", "import pickle", "nothing is ever pickled"),
        ("data", "import torch\nx = torch.load('f', weights_only=True)", "line 2: nothing is ever pickled"),
        ("data", "import torch as t\nt.save(1, 'f')", "line 2: nothing is ever pickled"),
        ("data", "from torch import load", "nothing is ever pickled"),
        ("data", "from torch import serialization as s\ns.load('f')", "line 2: nothing is ever pickled"),
        ("data", "import numpy\nnumpy.load('f', allow_pickle=True)", "line 2: nothing is ever pickled"),
        ("data", "x = 1\n" * 451, "451 lines, at most 450"),
    ],
)
def test_checker_finds_what_is_planted(package, source, complaint):
    assert any(complaint in line for line in violations(package, source))


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("runtime", "from policy import load\nfrom runtime.kv import pages\nfrom . import generate"),
        ("training", "import data, policy, runtime\nimport lightning.pytorch as pl"),
        ("data", "from safetensors.torch import load, save\nimport json\njson.load(open('f'))\nself.torch.load()"),
        ("data", "x = 1\n" * 450),
    ],
)
def test_checker_is_quiet_about_what_is_allowed(package, source):
    assert violations(package, source) == []


def test_every_package_has_sources():
    assert {path.relative_to(ROOT).parts[0] for path in sources()} == set(PACKAGES)


def test_top_level_is_what_the_readme_shows():
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(git, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip(f"needs a git checkout to tell sources from leftovers: {listing.stderr.strip()}")
    assert {name.partition("/")[0] for name in listing.stdout.splitlines() if (ROOT / name).exists()} == TOP_LEVEL


def test_installed_packages_are_those_on_disk():
    on_disk = {".".join(path.parent.relative_to(ROOT).parts) for path in sources()}
    without_init = sorted(name for name in on_disk if not (ROOT / name.replace(".", "/") / "__init__.py").is_file())
    assert without_init == []
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(on_disk)


def test_every_imported_distribution_is_a_declared_dependency():
    declared = {distribution_name(line) for line in PROJECT["project"]["dependencies"]}
    used = {
        module.partition(".")[0]
        for path in sources()
        for module, _ in imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    }
    third_party = used - set(sys.stdlib_module_names) - set(PACKAGES)
    assert {DISTRIBUTIONS.get(name, name) for name in third_party} - declared == set()


def test_ci_and_make_check_run_the_same_commands():
    def checks(text: str) -> list[tuple[str, str]]:
        """What is set for a command, and the command."""
        wanted = r"^\t?((?:\w+=\w+ )?)(?:\$\(BIN\)/)?((?:ruff|mypy|pytest)\b.*)$"
        return re.findall(wanted, text, flags=re.MULTILINE)

    ci = checks((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert [command.split()[0] for _, command in ci] == ["ruff", "ruff", "mypy", "pytest"]
    assert checks((ROOT / "Makefile").read_text(encoding="utf-8")) == ci


def distribution_name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()

"""The environment is the one that pyproject.toml and constraints.txt describe, and the entry points import cleanly."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
REQUIREMENTS = [requirement for requirement in DECLARED if not requirement.marker or requirement.marker.evaluate()]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_installed_version_is_one_that_is_declared(requirement):
    installed = importlib.metadata.version(requirement.name)
    assert requirement.specifier.contains(installed), f"expected {requirement}, got {installed}: make clean test"


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_tested_version_is_pinned_and_allowed(requirement):
    assert requirement.specifier.contains(pins()[requirement.name])


def test_import_of_the_runtime_warns_of_nothing_and_loads_no_trainer():
    code = (
        "from runtime import generate; import sys; "
        "print(*sorted({'lightning', 'pytorch_lightning', 'peft'} & sys.modules.keys()))"
    )
    assert run_python("-c", code) == ""


@pytest.mark.parametrize("module", ["runtime.generate", "training.fit", "training.evaluate"])
def test_command_prints_its_help_without_warnings(module):
    assert "usage:" in run_python("-m", module, "--help")


def run_python(*arguments: str) -> str:
    """Runs Python with warnings as errors in the repository's root and returns what it printed."""
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hub_cannot_be_reached_from_tests():
    """A warning filter that names a class of Lightning once imported the hub's client before it was taken offline."""
    from huggingface_hub import constants

    assert constants.is_offline_mode()

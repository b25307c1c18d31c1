"""What to do with a verdict: the command that serves what a fit exported, and the one that takes it elsewhere."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

PROMPT = "Your prompt"


def next_commands(model: str, adapters: Sequence[str], policy: Path, dtype: str, exported: str) -> list[str]:
    """Lines to print behind a verdict: shell commands with the arguments of this fit, and what they are for.

    `exported` is the kind of the policy in the folder `policy`.
    """
    lines = ["serve it:"]
    for adapter in adapters:
        arguments = ["--model", model, "--adapter", adapter, "--policy", str(policy), "--dtype", dtype]
        lines.append(_command("runtime.generate", [*arguments, "--prompt", PROMPT]))
    if exported != "fixed":
        return [*lines, "it mixes rungs from token to token, so it is no single adapter that could be exported"]
    lines.append("export the rung that it serves as a PEFT adapter, for any server:")
    for number, adapter in enumerate(adapters):
        output = policy.parent / ("adapter" if len(adapters) == 1 else f"adapter-{number}")
        lines.append(
            _command("runtime.export", ["--adapter", adapter, "--policy", str(policy), "--output", str(output)])
        )
    return lines


def _command(module: str, arguments: Sequence[str]) -> str:
    return shlex.join([_interpreter(), "-m", module, *arguments])


def _interpreter() -> str:
    """`python` where the shell finds this one by that name, else its path; one linked elsewhere has other packages."""
    own, found = Path(sys.executable), shutil.which("python")
    same = found is not None and Path(found).parent == own.parent and Path(found).resolve() == own.resolve()
    return "python" if same else str(own)

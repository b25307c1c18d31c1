"""What the commands of this package share: how flags may be spelled, and libraries that keep quiet."""

from __future__ import annotations

import logging
import sys

import datasets
import transformers
from lightning.pytorch.utilities import rank_zero_only


def command_line(arguments: list[str] | None) -> list[str]:
    """The arguments (default: the process's own) for jsonargparse, which spells flags `--max_tokens`.

    `--max-tokens`, as `runtime.generate` spells it, is the same flag here.
    """
    return [_underscored(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]


def _underscored(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else argument


def is_first_process() -> bool:
    """True in the one process, of all that `devices` and `num_nodes` start, that writes and speaks."""
    return int(getattr(rank_zero_only, "rank", None) or 0) == 0


def quiet_libraries() -> None:
    """No progress bars, advice or log lines of libraries: what a user gets to read is ours."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # It logs a failure as an error before it raises it, and what is raised becomes our one line.
    datasets.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries are not for the user to read

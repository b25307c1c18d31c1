"""What the commands of this package share: how flags may be spelled and refused, and libraries that keep quiet."""

from __future__ import annotations

import logging
import re
import sys
from typing import NoReturn

import datasets
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from runtime import loading
from runtime.command import BAD_INPUT

OF_A_KEY = re.compile(r'Parser key "([^"]+)":\s*')
TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
OF_ONE_TYPE = re.compile(r"Expected an? (.+?)\. Got value: (.*)", re.DOTALL)
OF_A_UNION = re.compile(r"Does not validate .*?Subtypes: \[(.*?)\]\s+Errors:.*Given value: (.*)", re.DOTALL)


class CommandParser(ArgumentParser):
    """jsonargparse's parser, whose complaint is one line instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # one of the library's own, inside another
            super().error(message, ex)
        print(f"error: {plain(message)}; --help lists what there is", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def plain(message: str) -> str:
    """jsonargparse's message as this project would say it: `seed: expected int, got abc`."""
    message = OF_ONE_TYPE.sub(r"expected \1, got \2", TYPE.sub(r"\1", OF_A_KEY.sub(r"\1: ", message)))
    message = OF_A_UNION.sub(r"expected one of \1, got \2", message)
    return " ".join(message.split())


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
    """No progress bars, advice or log lines of libraries, those that load data and train included."""
    loading.quiet_libraries()
    datasets.disable_progress_bars()
    # It logs a failure as an error before it raises it, and what is raised becomes our one line.
    datasets.logging.set_verbosity(logging.CRITICAL)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)

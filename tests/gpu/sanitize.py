"""`python -m tests.gpu.sanitize`: the kernels under NVIDIA's compute-sanitizer, each at least once.

Tensors get memory of their own instead of blocks of PyTorch's cache, which are larger than what is asked for: so an
access beyond a tensor's end is one beyond an allocation. No graph is captured, as that needs the cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

from runtime.command import one_line_errors

SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9
"""Exit status where the sanitizer has found something."""
TESTS = (
    "tests/engine/test_step.py::test_rows_have_adapters_of_their_own",
    "tests/ops/test_attention.py::test_launches_share_a_scratch",
    "tests/ops/test_attention.py::test_scores_far_from_zero",
    "tests/ops/test_control.py::test_the_log_has_every_step_and_nothing_beyond",
    "tests/ops/test_sampling.py::test_many_steps_with_what_they_leave_behind",
    "tests/ops/test_sampling.py::test_only_rows_that_filter_are_stored",
)
"""Whole steps of one row and of several, with ladders in every format, and what is no part of them."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitize", description="Kernels under a sanitizer.")
    parser.add_argument("--tool", choices=TOOLS, default=TOOLS[0])
    parser.add_argument("tests", nargs="*", default=TESTS, help="what pytest is given (default: each kernel once)")
    args = parser.parse_args()
    with one_line_errors():
        found = shutil.which(SANITIZER)
        if found is None:
            raise FileNotFoundError(
                f"{SANITIZER}: expected NVIDIA's tool of that name on the PATH, got none; install the CUDA toolkit, or "
                "add its bin folder"
            )
        command = [
            found, "--tool", args.tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only",
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *args.tests,
        ]  # fmt: skip
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()

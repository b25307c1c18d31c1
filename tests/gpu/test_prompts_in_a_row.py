"""`benchmarks.prefill` times prompts that follow each other, so nothing between them may wait for the device."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ladders import RANK
from benchmarks.prefill import Case, PromptBench
from tests.gpu.engine.serving import no_waits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", [Case(None), Case(RANK), Case(RANK, 32)], ids=lambda case: case.name)
def test_a_prompt_is_not_waited_for(case):
    run = PromptBench("tiny", torch.device("cuda"), 100).prepared(case)
    with no_waits():
        assert run(3) > 0

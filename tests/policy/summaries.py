"""What is known of chunks, drawn at random."""

from __future__ import annotations

import torch

from policy import SIGNALS, TOKEN_SIGNALS, Summary
from policy.rungs import rungs_of_rank

DEFAULT_RUNGS = rungs_of_rank(64)
RUNGS = len(DEFAULT_RUNGS)
ROWS, LENGTH = 64, 200


def summary(rows: int, seed: int = 0) -> Summary:
    generator = torch.Generator().manual_seed(seed)
    return Summary(
        stats=torch.rand(rows, len(SIGNALS), 3, generator=generator),
        valid=torch.rand(rows, len(SIGNALS), generator=generator) < 0.8,
        first=torch.rand(rows, len(TOKEN_SIGNALS), generator=generator),
        position=torch.randint(LENGTH, (rows,), generator=generator),
        row=torch.arange(rows),
        age=torch.rand(rows, generator=generator),
        hidden=torch.zeros(rows, 0),
    )

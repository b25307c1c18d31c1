"""Chunk samples whose damage is a known function of the signals."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from policy import SIGNALS, TOKEN_SIGNALS, Summary
from policy.rungs import rungs_of_rank
from training.amounts import AROUND_ONE
from training.targets.samples import Samples

SCALES = AROUND_ONE
BEST_SCALE = 1.05
RUNGS = rungs_of_rank(64)
RANKS = torch.tensor(RUNGS, dtype=torch.float32)


def chunk_samples(hardness: Callable[[Tensor, Tensor], Tensor], count: int, seed: int, noise: float = 0.1) -> Samples:
    """N chunks that need rank 2 * 32^hardness(entropy, attention), hardness in [0, 1].

    Damage falls like exp(-3 rank / needed rank); each chunk's size and each rung's damage carry log-normal noise that
    no signal tells. In the scale it is a parabola with its least value at BEST_SCALE.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = torch.rand(count, len(SIGNALS), generator=generator)
    top = (mean + 0.1 * torch.rand(count, len(SIGNALS), generator=generator)).clamp(max=1)
    last = (mean + 0.1 * torch.randn(count, len(SIGNALS), generator=generator)).clamp(0, 1)
    first = torch.rand(count, len(TOKEN_SIGNALS), generator=generator)
    known = torch.ones(count, len(SIGNALS), dtype=torch.bool)
    summary = Summary(torch.stack([mean, top, last], -1), known, first, torch.arange(count))
    needed = 2 * 32 ** hardness(mean[:, SIGNALS.index("entropy")], mean[:, SIGNALS.index("attention")])
    size = 0.4 * torch.exp(3 * noise * torch.randn(count, 1, generator=generator))
    each = torch.exp(noise * torch.randn(count, len(RANKS), generator=generator))
    damage = size * each * torch.exp(-3 * RANKS / needed[:, None])
    damage[:, -1] = 0
    factors = 1 + 5 * (torch.tensor(SCALES) - BEST_SCALE).square()
    tokens = torch.randint(4, 17, (count,), generator=generator).float()
    unknown = torch.full_like(tokens, torch.nan)
    return Samples(summary.features(), damage[..., None] * factors, tokens, tokens, unknown)


def shuffled(samples: Samples, seed: int) -> Samples:
    """The same chunks with each other's damage."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return replace(samples, damage=samples.damage[order])

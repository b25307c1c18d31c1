"""Milliseconds of one decode step at every rung, on the device at hand."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.cost import LatencyTable
from policy.rungs import Rung
from runtime.ladder import Ladder
from runtime.loading import device_name
from runtime.plan import RunPlan, static_plan
from runtime.reference.adaptive import activate
from runtime.reference.run import AdaptiveCache, AdaptiveRun

from ..progress import with_progress


@torch.no_grad()
def measure_latency(
    model: PreTrainedModel, ladder: Ladder, *, context_tokens: int = 64, rounds: int = 6, steps: int = 4
) -> LatencyTable:
    """Median decode step at batch 1 for every rung and for no adapter; the spread is the largest interquartile range.

    Rungs are timed in turn, round by round, so that a machine that speeds up or slows down does so for all of them; the
    first round only warms up. This is the reference path, launches and controller included: at batch 1 the rungs hardly
    differ, and the table says so (`resolved`) instead of pretending.
    """
    rungs = ladder.rungs
    if 0 not in ladder.rungs:  # the base model alone, through the same code
        ladder = ladder.with_rungs((0, *ladder.rungs))
    tokens = (torch.arange(context_tokens, device=model.device) % model.config.vocab_size)[None]
    times: dict[Rung, list[float]] = {rung: [] for rung in ladder.rungs}
    for number in with_progress(range(rounds + 1), "latency of every rung", rounds + 1):
        for rung in ladder.rungs:
            with activate(model, static_plan(ladder, rung)) as run:
                cache = run.new_cache(1)
                run.logits(tokens, None, cache, keep=1)
                measured = [_step_ms(run, cache, tokens[:, -1:]) for _ in range(steps)]
            times[rung] += measured if number else []
    spread = max(quartiles[2] - quartiles[0] for quartiles in (statistics.quantiles(t, n=4) for t in times.values()))
    ms = {rung: statistics.median(t) for rung, t in times.items()}
    return LatencyTable(device_name(model.device), tuple(ms[rung] for rung in rungs), ms[0], spread)


@torch.no_grad()
def measure_controller(
    model: PreTrainedModel, plan: RunPlan, *, context_tokens: int = 64, rounds: int = 6, steps: int = 4
) -> float:
    """Median milliseconds that deciding adds to a decode step at batch 1: steps of `plan`, which decides, less those of
    the same rung when none decides, round by round in turn."""
    start = plan.ladder.rungs[int(plan.operating.start_rung[0])]
    blind = static_plan(plan.ladder, start)
    tokens = (torch.arange(context_tokens, device=model.device) % model.config.vocab_size)[None]
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):
        for deciding, own in ((True, plan), (False, blind)):
            with activate(model, own) as run:
                cache = run.new_cache(1)
                run.logits(tokens, None, cache, keep=1)
                measured = [_step_ms(run, cache, tokens[:, -1:]) for _ in range(steps)]
            times[deciding] += measured if number else []
    return statistics.median(times[True]) - statistics.median(times[False])


def _step_ms(run: AdaptiveRun, cache: AdaptiveCache, token: Tensor) -> float:
    start = time.perf_counter()
    # Reading one number waits for the device, so that the clock sees the whole step.
    run.logits(token, None, cache)[0, 0, 0].item()
    return 1000 * (time.perf_counter() - start)

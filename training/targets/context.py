"""Damage inside the context that a policy leaves: every rung of a token, measured in the policy's own mixed run.

A uniform run at rung j has a past at rung j; a run that mixes rungs has another, and tables of the one promise more
than the other gives. So each text goes through the model with probes beside it. The first copy runs at the rungs
that the policy chose and leaves the keys and values that serving leaves; a probe is the same tokens once more, each at
some rung, and attends to the first copy for the past and to itself for the present. One pass so gives the damage of one
rung at every position, exact for the token's own, and rungs are drawn anew for every token: of a few near the chosen
one (`docs/architecture.md`, "Damage is measured where it will be done").

Shape legend: B rows, T tokens, P probes, J rungs, G scales, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from policy.difficulty import Difficulty
from policy.operating import Operating
from runtime.reference.adaptive import AdaptiveRun
from runtime.reference.mask import Streams

from ..documents import Batch, positions_within
from .damage import LOGITS_BYTES, Exact, Trajectory, decided, rows_kl

REACH = 2
"""Rungs are drawn from so many below the chosen one to as many above."""


def streams(length: int, probes: int, device: torch.device) -> Streams:
    """A text of `length` and `probes` copies behind it, each of which sees the first one's past and itself."""
    slots = torch.arange(length, device=device).repeat(1 + probes)
    number = torch.arange(1 + probes, device=device).repeat_interleave(length)
    of_first = (number == 0)[None]
    past = slots[None] < slots[:, None]
    own = torch.eye(len(slots), dtype=torch.bool, device=device)
    return Streams(slots, (of_first & ((number == 0)[:, None] | past)) | own)


def drawn_rungs(chosen: Tensor, probes: int, rungs: int, generator: torch.Generator) -> Tensor:
    """[B, P, T] long: different rungs below the top, near `chosen` [B, T]; on the CPU."""
    among = min(2 * REACH + 1, rungs - 1)
    lowest = (chosen.cpu() - REACH).clamp(0, rungs - 1 - among)
    order = torch.rand(*chosen.shape, among, generator=generator).argsort(-1)
    return (lowest[..., None] + order[..., : min(probes, among)]).movedim(-1, 1)


@torch.no_grad()
def context_damage(run: AdaptiveRun, batch: Batch, weights: Tensor, rungs: Tensor, scales: Tensor) -> Tensor:
    """[B, T, J, G] KL against the exact adapter of the rungs [B, P, T] that were drawn, nan elsewhere; on the CPU.

    weights [B, T, J] are those of the mixed run, scales [J, G] what every rung is measured at.
    """
    rows, length, count = weights.shape
    probes, grid = rungs.shape[1], scales.shape[1]
    rungs, scales = rungs.to(weights.device), scales.to(weights)
    exact = Exact.of(run.gated(batch.tokens, batch.real, _top(weights)))
    probe = torch.nn.functional.one_hot(rungs, count)[:, :, None] * scales[rungs].movedim(-1, 2)[..., None]
    gates = torch.cat([weights[:, None], probe.flatten(1, 2).to(weights)], 1).flatten(1, 2)
    copies = 1 + probes * grid
    logits = run.gated(
        batch.tokens.repeat(1, copies), batch.real.repeat(1, copies), gates,
        streams=streams(length, copies - 1, weights.device),
    )  # fmt: skip
    logits = logits[:, length:].unflatten(1, (probes * grid, length))
    found = torch.full((rows, length, count, grid), torch.nan)
    for row in range(rows):
        own = Exact(exact.log_p[row], exact.p[row])
        kl = rows_kl(own, logits[row]).view(probes, grid, length).cpu()
        index = rungs[row].T.cpu()[..., None].expand(-1, -1, grid)
        found[row].scatter_(1, index, kl.permute(2, 0, 1))
    found[:, :, -1] = 0.0  # the top is exact
    return found


def _top(weights: Tensor) -> Tensor:
    top = torch.zeros_like(weights[:, :1])
    top[..., -1] = 1.0
    return top


def measured_paths(
    run: AdaptiveRun, batch: Batch, operating: Operating, scales: Tensor, probes: int, generator: torch.Generator,
    difficulty: Difficulty | None = None,
) -> list[Trajectory]:  # fmt: skip
    """The batch under the run's own policy, with the damage of `probes` rungs of every token inside of that run.

    scales [J, G] are what every rung is measured at; what is drawn depends on the generator alone.
    """
    batch = batch.to(run.model.device)
    ran = decided(run, batch, operating, difficulty)
    rungs = drawn_rungs(ran.record["rung"], probes, ran.weights.shape[2], generator)
    lengths = batch.real.sum(1).tolist()
    copies = 1 + probes * scales.shape[1]
    rows = max(1, positions_within(run.model, LOGITS_BYTES) // (max(lengths) * copies))
    damage: list[Tensor] = []
    for own in torch.arange(len(lengths), device=batch.tokens.device).split(rows):
        damage += context_damage(run, batch.rows(own), ran.weights[own], rungs[own.cpu()], scales)
    paths = ran.trajectories(batch.real)
    return [replace(path, damage=own[:length]) for path, own, length in zip(paths, damage, lengths, strict=True)]

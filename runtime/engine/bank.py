"""All adapters of a run on the device: their directions, and what decides among their rungs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import RunPlan
from .control import Ladders
from .model import Model
from .store import AdapterStore, Table, needed_bytes


def held(model: Model, plan: RunPlan) -> tuple[AdapterStore, Ladders]:
    """The plan's ladders up to their resident rungs; number n of the plan lies in slot n."""
    modules, ladders, rungs = model.modules(), plan.ladders, len(plan.policy.rungs)
    directions = max(1, *(int(own.edges[: own.highest + 1].max()) for own in ladders))
    store = AdapterStore(
        modules, slots=len(ladders), capacity_bytes=needed_bytes(ladders, modules, directions, model.dtype),
        rungs=rungs, directions=directions, dtype=model.dtype, device=model.device,
        banks=max(len(own.banks) for own in ladders),
    )  # fmt: skip
    known = Ladders.of(len(ladders), model.shape.vocabulary, rungs, model.device)
    difficulty = plan.difficulty()
    packed: dict[int, tuple[Table, Tensor]] = {}
    for number, ladder in enumerate(ladders):
        if id(ladder) not in packed:  # the same again is packed once
            packed = {id(ladder): store.packed(ladder)}
        slot = store.put(ladder, *packed[id(ladder)])
        assert slot == number, "slots are taken in order"
        known.put(slot, difficulty.select(torch.tensor(number)), torch.tensor(ladder.scales))
    return store, known

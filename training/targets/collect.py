"""Collect targets through Lightning's predict loop: any number of devices and nodes, shard by shard, resumable.

Each process takes its share of the missing shards and writes each of them whole, so killing any process loses at most
the shard it was working on, and a later run with another world size goes on with what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from runtime.loading import place

from ..progress import Advance, progress_bar
from .shards import ShardStore

NOTHING = -1

Collect = Callable[[int], dict[str, Tensor]]


class _Collector(L.LightningModule):
    """Makes and stores one shard per step.

    The model is no submodule: Lightning would move it back to the CPU at the end, and may not move a quantised one.
    """

    def __init__(self, store: ShardStore, collect: Collect, model: PreTrainedModel, advance: Advance) -> None:
        super().__init__()
        self.store, self.collect, self._model, self.advance = store, collect, [model], advance

    def on_predict_start(self) -> None:
        place(self._model[0], self.device)

    def predict_step(self, batch: Tensor, batch_idx: int) -> int:
        index = int(batch)
        if index != NOTHING:
            self.store.write(index, self.collect(index))
        self.advance(1)
        return index


def collect_shards(
    store: ShardStore,
    collect: Collect,
    model: PreTrainedModel,
    make_trainer: Callable[..., L.Trainer],
    name: str = "targets",
) -> int:
    """Make every missing shard by `collect(index)` and return how many were missing; `name` is that of the bar.

    `make_trainer(logger=False)` builds the trainer whose devices share the work.
    """
    missing = store.missing()
    if missing:
        trainer = make_trainer(logger=False, inference_mode=True)
        # Lightning wants a step for every process; where shards are fewer, the rest have nothing to do.
        work = missing + [NOTHING] * (trainer.world_size - len(missing))
        shards: DataLoader[int] = DataLoader(work, batch_size=None)  # type: ignore[arg-type]  # a list will do
        share = math.ceil(len(work) / trainer.world_size)
        with progress_bar(name, share) as advance:
            trainer.predict(_Collector(store, collect, model, advance), shards, return_predictions=False)
        trainer.strategy.barrier("shards")
    return len(missing)

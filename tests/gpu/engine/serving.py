"""Batches that a prefill has begun, what they hold at any time, what is counted while they go on, and what a row must
put out by the definition of its ladder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from transformers import PreTrainedModel

from runtime.engine.decoder import Decoder
from runtime.generate.fast import FastPath
from runtime.generate.options import Options
from runtime.ladder import Ladder
from runtime.plan import RunPlan
from runtime.reference.adaptive import activate
from tests.engine.tiny import GREEDY
from tests.runtime.reference import definition_hooks

LENGTHS = (30, 5, 17)
"""Of the prompts: one whose next tokens go on to another page, one shorter than a page, one just beyond."""
NEW_TOKENS = 24
"""Of every row, the first by the prefill."""


@dataclass(frozen=True)
class Serving:
    """A batch as a prefill left it, greedy, its first tokens chosen."""

    path: FastPath
    decoder: Decoder
    plan: RunPlan
    options: Options
    prompts: list[Tensor]
    """[T] long of every row, on the host"""

    @property
    def rows(self) -> int:
        return len(self.prompts)

    def slots(self) -> list[int]:
        """Where every row's ladder lies."""
        return [int(own) for own in self.plan.operating.for_rows(self.rows).adapter]

    def tokens(self, row: int) -> Tensor:
        """[T] long: what has gone through the model of a row, its prompt included; the newest token has not."""
        made, count = self.decoder.generated, int(self.decoder.generated.count[row])
        return torch.cat([self.prompts[row], made.log[row, : count - 1].cpu()])


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """The model, which ends no text and never likes padding best, as the paths count that differently."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight[0] = 0
    return model


def asked(model: PreTrainedModel, lengths: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
    """Ids of random prompts of these lengths, padded on the left, and what else `generate` is given."""
    columns, generator = max(lengths), torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (len(lengths), columns), generator=generator)
    mask = (torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]).long()
    options = GREEDY | {"attention_mask": mask.to(model.device), "max_new_tokens": NEW_TOKENS}
    return (ids * mask).to(model.device), options


def served(model: PreTrainedModel, plan: RunPlan, lengths: Sequence[int]) -> Serving:
    """Random prompts of these lengths, and a decoder that goes on from there."""
    ids, given = asked(model, lengths)
    prompts = [own[-length:].cpu() for own, length in zip(ids, lengths, strict=True)]
    with activate(model, plan) as run:
        path = FastPath(model, run)
        options = Options.of(model, ids, given)
        decoder, _ = path.begin(ids, given, options)
    return Serving(path, decoder, plan, options, prompts)


def tensors(*found: Any) -> Iterator[Tensor]:
    """Every tensor in these records, lists and tuples."""
    for own in found:
        if isinstance(own, Tensor):
            yield own
        elif is_dataclass(own):
            yield from tensors(*(getattr(own, field.name) for field in fields(own)))
        elif isinstance(own, list | tuple):
            yield from tensors(*own)


class State:
    """All that a decoder's steps read and write beside weights and adapters, as it was when this was made."""

    def __init__(self, decoder: Decoder) -> None:
        d, controller = decoder, decoder.controller
        parts = (d.buffers, d.pool, d.generated, d.sampling, d.rungs, d.lanes.entropy, d.lanes.surprisal, d._scratch)
        kept = tensors(*parts, None if controller is None else controller.state)
        self._kept = [(own, own.clone()) for own in kept]

    def restore(self) -> None:
        for own, was in self._kept:
            own.copy_(was)


def outputs(serving: Serving) -> list[Tensor]:
    """What rows in use show of the latest step, copied: logits, newest tokens, and what the controller hears."""
    d, rows = serving.decoder, serving.rows
    own = d.lanes
    shown = (d.buffers.logits[:rows], own.generated.tokens[:rows], own.entropy[:rows], own.surprisal[:rows],
             d.rungs[:rows], own.rows.weight[:rows])  # fmt: skip
    return [own.clone() for own in shown]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Bit by bit, and numbers."""
    for number, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert bool(own.isfinite().all()), f"{what}: output {number}"
        assert torch.equal(own, other), f"{what}: output {number}"


@torch.no_grad()
def by_definition(exact: PreTrainedModel, ladder: Ladder, tokens: Tensor, rungs: Sequence[int]) -> Tensor:
    """[V] float64: logits behind tokens [T] that ran at these rungs, scale as the ladder has it; all on the host."""
    weights = torch.nn.functional.one_hot(torch.tensor(rungs), len(ladder.rungs)).double()
    with definition_hooks(exact, ladder, weights[None]):
        return exact(tokens[None]).logits[0, -1]


@contextmanager
def no_waits() -> Iterator[None]:
    """Whatever makes the host wait for the device raises RuntimeError."""
    with warnings.catch_warnings():
        # PyTorch says that this mode is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by "capture" with every graph that is captured, and by a kernel's name with every variant of it
    that was not there."""
    found: list[str] = []

    class Capture(torch.cuda.graph):
        def __enter__(self):
            found.append("capture")
            return super().__enter__()

    def compiled(*, fn: Any, **_: Any) -> None:
        found.append(fn.name)

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", compiled)
    return found

"""Engine and reference path fed the same tokens: logits of every step beside those of the same weights in float32.

The tokens are those that the reference path chooses by itself. What both make of them step by step is compared with one
pass of the reference path in float32, at the same rungs, over the whole text.

Shape legend: B rows, T columns of a prompt, N steps, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.rungs import Rung
from runtime.generate.fast import FastPath, why_not
from runtime.generate.options import Options
from runtime.ladder import Ladder
from runtime.plan import static_plan
from runtime.reference.adaptive import activate


@dataclass(frozen=True)
class Text:
    """A prompt and the number of the ladder that it is continued with."""

    ladder: int
    ids: list[int]


@dataclass(frozen=True)
class Found:
    """What was found at every step of every row, [B, N] each."""

    agree: Tensor
    """bool: both would go on with the same token"""
    gap: Tensor
    """float32: by how much the best logit in float32 is above the next"""
    reference: Tensor
    """float64: mean square over V of the reference's error to float32"""
    engine: Tensor
    """float64: of the engine's"""
    right_reference: Tensor
    """bool: the reference would go on as float32 does"""
    right_engine: Tensor
    """bool: the engine would"""

    @classmethod
    def of(cls, engine: Tensor, reference: Tensor, exact: Tensor) -> Found:
        """From logits [B, N, V] of both, and in float32."""
        best = exact.topk(2, dim=-1).values
        own, other = ((logits.double() - exact.double()).square().mean(-1) for logits in (engine, reference))
        ours, theirs, right = (logits.argmax(-1) for logits in (engine, reference, exact))
        gap = best[..., 0] - best[..., 1]
        return cls(*(x.cpu() for x in (ours == theirs, gap, other, own, theirs == right, ours == right)))

    def rows(self, index: Sequence[int]) -> Found:
        """Those of these rows."""
        return Found(*(getattr(self, field.name)[list(index)] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Found]) -> Found:
        """Those of several batches, as rows of one."""
        return cls(*(torch.cat([getattr(own, field.name) for own in parts]) for field in fields(cls)))


class Path:
    """One model inside the reference path, and the engine on it; rows may change their rungs and ladders."""

    def __init__(self, model: PreTrainedModel, ladders: Sequence[Ladder], undo: ExitStack) -> None:
        """Raises ValueError for a model that the engine cannot run."""
        self.model, self.ladders = model, ladders
        plan = static_plan(ladders, [own.rungs[own.highest] for own in ladders], range(len(ladders)))
        reason = why_not(model, plan)
        if reason is not None:
            raise ValueError(f"model: expected one that the engine runs, got one that it does not: {reason}")
        self.run = undo.enter_context(activate(model, plan, checked=False))
        self.engine = FastPath(model, self.run)

    def use(self, texts: Sequence[Text], rungs: Sequence[Rung]) -> None:
        """The rows to come are these, `rungs` those of every ladder."""
        numbers = [text.ladder for text in texts]
        plan = static_plan(self.ladders, [rungs[own] for own in numbers], numbers)
        self.run.plan = replace(self.run.plan, operating=plan.operating)

    def chosen(self, ids: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Tokens [B, N] that the reference path chooses, and the logits [B, N, V] that it chooses each from."""
        out = self.model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)  # type: ignore[operator]
        return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)

    def fed(self, ids: Tensor, options: dict[str, Any], tokens: Tensor) -> Tensor:
        """Logits [B, N, V] of the engine behind each of tokens [B, N], which are processed one after the other."""
        decoder, _ = self.engine.begin(ids, options, Options.of(self.model, ids, options))
        found, rows = [], len(ids)
        for step in range(tokens.shape[1]):
            decoder.buffers.tokens[:rows] = tokens[:, step]
            decoder.run()
            found.append(decoder.buffers.logits[:rows].clone())
        return torch.stack(found, 1)

    def whole(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """Logits [B, N, V] of the reference path behind each of tokens [B, N], in one pass."""
        rows, steps = tokens.shape
        every = torch.cat([mask, mask.new_ones(rows, steps)], 1)
        return self.run.logits(torch.cat([ids, tokens], 1), every, self.run.new_cache(rows), steps).float()


@contextmanager
def both(model: PreTrainedModel, ladders: Sequence[Ladder]) -> Iterator[tuple[Path, Path]]:
    """A model in its own dtype and a copy of its weights in float32; both never end a text by themselves."""
    model.generation_config.eos_token_id = None
    exact: Any = copy.deepcopy(model).float()
    with ExitStack() as undo:
        yield Path(model, ladders, undo), Path(exact, ladders, undo)


def columns(texts: Sequence[Text], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T] long of texts, padded on the left."""
    width = max(len(own.ids) for own in texts)
    ids = [[0] * (width - len(own.ids)) + own.ids for own in texts]
    mask = [[0] * (width - len(own.ids)) + [1] * len(own.ids) for own in texts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def compare(
    own: Path, exact: Path, texts: Sequence[Text], rungs: Sequence[Rung], steps: int
) -> tuple[Found, list[int], list[int]]:
    """One batch: what is found at its `steps` steps; by row how many tokens the engine has in common with the reference
    path when both go on by themselves, in the model's dtype and in float32, of `steps` + 1."""
    ids, mask = columns(texts, own.model.device)
    options: dict[str, Any] = {
        "attention_mask": mask, "do_sample": False, "pad_token_id": 0, "max_new_tokens": steps + 1,
    }  # fmt: skip
    for path in (own, exact):
        path.use(texts, rungs)
    tokens, reference = own.chosen(ids, options)
    # The first is chosen from the prompt, which only the reference path processes.
    fed = tokens[:, :-1]
    found = Found.of(own.fed(ids, options, fed), reference[:, 1:], exact.whole(ids, mask, fed))
    free = own.engine.generate(ids, options)[:, ids.shape[1] :]
    exactly = exact.engine.generate(ids, options)[:, ids.shape[1] :]
    # A text is greedy where each of its tokens is the likeliest behind those before it.
    likeliest = exact.whole(ids, mask, exactly[:, :-1]).argmax(-1)
    return found, _common(free, tokens), [1 + count for count in _common(exactly[:, 1:], likeliest)]


def _common(found: Tensor, expected: Tensor) -> list[int]:
    """By row how many tokens [B, N] are the same up to the first that is not."""
    own: list[int] = (found == expected).long().cumprod(1).sum(1).tolist()
    return own

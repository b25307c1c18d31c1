"""What a direction does to the loss, squared and to first order: what its bits are worth.

For a token x and the gradient g of -log p with respect to what the linear puts out, direction k of a module changes the
loss by (g·b_k)(a_k·x). Its mean square over tokens, with the text's next tokens replaced by tokens drawn from the model
itself, is the diagonal of the Fisher information along that direction: the KL that leaving it out costs, to second
order, times two. One backward pass gives it for all directions of all modules; no optimiser step is taken.
Source: DESIGN section 3; Kunstner et al. 2019 on sampled against empirical Fisher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..documents import Batch, Example, batches
from ..progress import with_progress
from .updates import Pair, frozen, low_rank, updated

TOKENS_PER_STEP = 2048


def measure_effects(
    model: PreTrainedModel, exact: Mapping[str, Pair], directions: Mapping[str, Pair], documents: Sequence[Example], *,
    seed: int, tokens_per_step: int = TOKENS_PER_STEP,
) -> dict[str, Tensor]:  # fmt: skip
    """Mean squared first-order effect of every direction on a completion token's loss, nats squared.

    exact are the adapter's own factors by module, directions what is to be measured, each (a [R, d_in], b [R, d_out]);
    all documents are passed once. Returns [R] float64 per module, on the CPU. Drawn from `seed`. Raises ValueError
    when the documents have no completion token.
    """
    work = list(batches(documents, len(documents), tokens_per_step)) if documents else []
    taps = {name: _Tap(*(half.to(model.device).float() for half in pair)) for name, pair in directions.items()}
    generator = torch.Generator(device=model.device).manual_seed(seed)
    scored = 0
    with ExitStack() as undo:
        undo.enter_context(frozen(model))
        undo.enter_context(updated(model, low_rank(exact, model)))
        for name, tap in taps.items():
            undo.callback(model.get_submodule(name).register_forward_hook(tap.listen).remove)
        undo.callback(model.get_input_embeddings().register_forward_hook(_as_leaf).remove)
        for _, batch in with_progress(work, "effects", len(work)):
            scored += _backward(model, batch.to(model.device), generator)
    if scored == 0:
        raise ValueError("documents: expected completion tokens to measure effects on, got none; give longer text")
    return {name: (tap.total / scored).cpu() for name, tap in taps.items()}


def enough(documents: Sequence[Example], completion_tokens: int, most_tokens: int) -> list[Example]:
    """The first documents, until they have so many completion tokens, or `most_tokens` altogether.

    Completion tokens are what is measured; where they are few in much text, the text has its limit too.
    """
    chosen: list[Example] = []
    scored = held = 0
    for document in documents:
        if scored >= completion_tokens or held >= most_tokens:
            break
        chosen.append(document)
        held += len(document["input_ids"])
        scored += len(document["input_ids"]) - max(document["prompt_tokens"], 1)
    return chosen


def _as_leaf(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Embeddings that ask for a gradient: with frozen weights nothing else would."""
    return output.detach().requires_grad_(True)


def _backward(model: PreTrainedModel, batch: Batch, generator: torch.Generator) -> int:
    """Backpropagate -log p of a token drawn at every scored position; returns how many there are."""
    if not bool(batch.scored.any()):
        return 0
    logits = model(input_ids=batch.tokens, attention_mask=batch.real.long(), use_cache=False).logits[batch.scored]
    log_p = logits.float().log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    (-log_p.gather(1, drawn).sum()).backward()
    return len(drawn)


class _Tap:
    """Sums the squared effects of one module's directions, a token at a time."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.total = torch.zeros(len(a), dtype=torch.float64, device=a.device)

    def listen(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        read = args[0].detach()
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(read, gradient))

    def _add(self, x: Tensor, gradient: Tensor) -> None:
        reads = x.flatten(0, -2).to(self.a) @ self.a.T
        writes = gradient.flatten(0, -2).to(self.b) @ self.b.T
        self.total += (reads * writes).square().sum(0).to(self.total)

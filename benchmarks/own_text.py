"""Texts that a model writes by itself with the exact adapter: what surprises it there differs from people's text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from runtime.ladder import Ladder
from runtime.plan import static_plan
from runtime.reference.adaptive import activate, end_tokens
from training.documents import Example

HOW = GREEDY, SAMPLED = "greedy", "sampled"
FIRST_TOKENS = 24
"""Of a document without a prompt, or with one of a begin-of-text token alone, so many tokens are one."""
ROWS = 64


def continued(
    model: PreTrainedModel, ladder: Ladder, documents: Sequence[Example], tokens: int, how: str, seed: int = 0
) -> list[Example]:
    """The documents' prompts with up to `tokens` tokens that the model continues them with, to its end-of-text token.

    `how`, one of `HOW`, is the likeliest token, or one drawn at temperature 1 from all of them. Continuations of less
    than two tokens are left out: nothing is decided in them.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        parts = [documents[first : first + ROWS] for first in range(0, len(documents), ROWS)]
        return [text for part in parts for text in _continued(model, ladder, part, tokens, how)]


def _continued(
    model: PreTrainedModel, ladder: Ladder, documents: Sequence[Example], tokens: int, how: str
) -> list[Example]:
    prompts = [
        own["input_ids"][: own["prompt_tokens"] if own["prompt_tokens"] > 1 else FIRST_TOKENS] for own in documents
    ]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(own)) + own for own in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts], device=model.device)
    draw = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if how == SAMPLED else {"do_sample": False}
    with activate(model, static_plan(ladder, ladder.rungs[-1])):
        output: torch.Tensor = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0, **draw
        )  # type: ignore[operator]
    written = output[:, width:].tolist()
    ends = end_tokens(model, {})
    texts = []
    for document, prompt, own in zip(documents, prompts, written, strict=True):
        end = next((place + 1 for place, token in enumerate(own) if token in ends), len(own))
        if end > 1:
            texts.append({"id": document["id"], "input_ids": prompt + own[:end], "prompt_tokens": len(prompt)})
    return texts

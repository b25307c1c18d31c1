"""Encoded documents to padded batches.

Shapes: B documents, T tokens of the longest one. Right padding suits scoring and training, left padding generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Side = Literal["right", "left"]


def completion_mask(
    lengths: Tensor, prompt_tokens: Tensor, *, total_tokens: int | None = None, side: Side = "right"
) -> Tensor:
    """[B, T] bool: True where the token is a real one (not padding) and belongs to the completion.

    `lengths` and `prompt_tokens` are [B] integers, tokens without padding and those of the prompt among them; T is
    `total_tokens`, or the longest length. The mask is over tokens: the logits that predict token t are those at t - 1.
    """
    _check_side(side)
    total = int(lengths.max()) if total_tokens is None else total_tokens
    position = torch.arange(total, device=lengths.device).unsqueeze(0)
    if side == "left":
        position = position - (total - lengths).unsqueeze(1)
    return (position >= prompt_tokens.unsqueeze(1)) & (position < lengths.unsqueeze(1))


def collate(examples: Sequence[Mapping[str, Any]], pad_token_id: int, *, side: Side = "right") -> dict[str, Tensor]:
    """Rows of `encode` or `pack` to one batch, on the CPU.

    Gives `input_ids` [B, T] int64, `attention_mask` [B, T] int64 (1 for real tokens), `completion_mask` [B, T] bool
    and `prompt_tokens` [B] int64 (without padding, on either side). A row's own `completion_mask`, where it has one,
    is taken over. A tokenizer without a padding token can lend any id, EOS for instance, since padding is masked.
    Raises ValueError for no examples, a missing id or an unknown side.
    """
    _check_side(side)
    if not examples:
        raise ValueError("expected at least one example, got none; do leave empty batches out")
    if pad_token_id is None:
        raise ValueError("expected pad_token_id as an integer, got None; do pass eos_token_id: padding is masked")
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    prompt_tokens = torch.tensor([int(example["prompt_tokens"]) for example in examples])
    total = int(lengths.max())
    input_ids = torch.full((len(examples), total), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(examples), total), dtype=torch.int64)
    completion = completion_mask(lengths, prompt_tokens, total_tokens=total, side=side)
    for row, example in enumerate(examples):
        ids = torch.as_tensor(example["input_ids"], dtype=torch.int64)
        real = slice(0, len(ids)) if side == "right" else slice(total - len(ids), total)
        input_ids[row, real] = ids
        attention_mask[row, real] = 1
        if "completion_mask" in example:
            completion[row, real] = torch.as_tensor(example["completion_mask"], dtype=torch.bool)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion,
        "prompt_tokens": prompt_tokens,
    }


def _check_side(side: str) -> None:
    if side not in ("right", "left"):
        raise ValueError(f"expected side 'right' or 'left', got {side!r}; do pass one of these")

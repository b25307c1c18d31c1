"""Encoded documents to blocks of one length, for perplexity over running text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, Sequence, Value

_FEATURES = Features({"input_ids": Sequence(Value("int32")), "completion_mask": Sequence(Value("bool"))})


def pack(encoded: Dataset, block_tokens: int) -> Dataset:
    """The documents one after another, cut every `block_tokens` tokens: `input_ids` int32, `completion_mask` bool.

    Documents keep their order and their BOS and EOS, and may straddle blocks. The tail that does not fill a block is
    DROPPED, fewer than `block_tokens` tokens in all. Raises ValueError when there are not enough tokens for one block.
    """
    if block_tokens < 2:
        raise ValueError(f"expected block_tokens of at least 2, got {block_tokens}; one token alone predicts nothing")
    total = sum(len(ids) for ids in encoded["input_ids"])
    if total < block_tokens:
        raise ValueError(f"expected at least {block_tokens} tokens for one block, got {total}; do lower block_tokens")
    blocks = Dataset.from_generator(
        _blocks, features=_FEATURES, gen_kwargs={"encoded": encoded, "block_tokens": block_tokens}
    )
    assert isinstance(blocks, Dataset), "from_generator without streaming gives a Dataset"
    return blocks


def _blocks(encoded: Dataset, block_tokens: int) -> Iterator[dict[str, Any]]:
    ids: list[int] = []
    mask: list[bool] = []
    for row in encoded:
        ids += row["input_ids"]
        mask += [False] * row["prompt_tokens"] + [True] * (len(row["input_ids"]) - row["prompt_tokens"])
        full = len(ids) - len(ids) % block_tokens
        for start in range(0, full, block_tokens):
            yield {
                "input_ids": ids[start : start + block_tokens],
                "completion_mask": mask[start : start + block_tokens],
            }
        del ids[:full], mask[:full]

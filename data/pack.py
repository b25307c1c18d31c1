"""Encoded documents to blocks of one length, for perplexity over running text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, Sequence, Value

_FEATURES = Features(
    {
        "id": Value("string"),
        "input_ids": Sequence(Value("int32")),
        "prompt_tokens": Value("int32"),
        "completion_mask": Sequence(Value("bool")),
    }
)


def pack(encoded: Dataset, block_tokens: int) -> Dataset:
    """The documents one after another, cut every `block_tokens` tokens: rows for `collate`, the last one shorter.

    Documents keep their order and their BOS and EOS, and may straddle blocks, so `completion_mask` says token by token
    what is to be predicted and `prompt_tokens` is 0. A tail of a single token is dropped: nothing predicts it. Blocks
    lie on disk, in the cache of `datasets`. Raises ValueError when there are not enough tokens for one block of two.
    """
    if block_tokens < 2:
        raise ValueError(f"expected blocks of at least 2 tokens, got {block_tokens}; one token alone predicts nothing")
    total = sum(len(ids) for ids in encoded["input_ids"])
    if total < 2:
        raise ValueError(f"expected at least 2 tokens of text, got {total}; do give more text")
    blocks = Dataset.from_generator(
        _blocks, features=_FEATURES, gen_kwargs={"encoded": encoded, "block_tokens": block_tokens}
    )
    assert isinstance(blocks, Dataset), "from_generator without streaming gives a Dataset"
    return blocks


def _blocks(encoded: Dataset, block_tokens: int) -> Iterator[dict[str, Any]]:
    ids: list[int] = []
    mask: list[bool] = []
    number = 0
    for row in encoded:
        ids += row["input_ids"]
        mask += [False] * row["prompt_tokens"] + [True] * (len(row["input_ids"]) - row["prompt_tokens"])
        full = len(ids) - len(ids) % block_tokens
        for start in range(0, full, block_tokens):
            part = slice(start, start + block_tokens)
            yield _block(number, ids[part], mask[part])
            number += 1
        del ids[:full], mask[:full]
    if len(ids) > 1:
        yield _block(number, ids, mask)


def _block(number: int, ids: list[int], mask: list[bool]) -> dict[str, Any]:
    return {"id": f"block-{number}", "input_ids": ids, "prompt_tokens": 0, "completion_mask": mask}

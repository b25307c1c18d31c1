"""Batches and blocks: every real token is where it should be, exactly once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from data import collate, completion_mask, encode, load_documents, pack

ENCODED = Dataset.from_dict(
    {"id": ["a", "b", "c"], "input_ids": [[1, 5, 6, 7, 2], [1, 8], [1, 3, 4]], "prompt_tokens": [3, 1, 3]}
)


def test_right_and_left_hold_the_same_tokens() -> None:
    right = collate(list(ENCODED), 0)
    left = collate(list(ENCODED), 0, side="left")
    assert right["input_ids"].tolist() == [[1, 5, 6, 7, 2], [1, 8, 0, 0, 0], [1, 3, 4, 0, 0]]
    assert left["input_ids"].tolist() == [[1, 5, 6, 7, 2], [0, 0, 0, 1, 8], [0, 0, 1, 3, 4]]
    assert right["completion_mask"].int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert left["completion_mask"].int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    for batch in (right, left):
        assert {key: value.dtype for key, value in batch.items()} == {
            "input_ids": torch.int64,
            "attention_mask": torch.int64,
            "completion_mask": torch.bool,
            "prompt_tokens": torch.int64,
        }
        assert batch["prompt_tokens"].tolist() == [3, 1, 3]
        for row, example in enumerate(ENCODED):
            assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == example["input_ids"]
            completion = batch["input_ids"][row][batch["completion_mask"][row]].tolist()
            assert completion == example["input_ids"][example["prompt_tokens"] :]


def test_padding_with_a_real_token_stays_masked() -> None:
    batch = collate(list(ENCODED), 2)
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 3]
    assert batch["completion_mask"].sum(1).tolist() == [2, 1, 0]


def test_completion_mask_to_a_given_width() -> None:
    lengths, prompts = torch.tensor([2]), torch.tensor([1])
    assert completion_mask(lengths, prompts, total_tokens=4).tolist() == [[False, True, False, False]]
    assert completion_mask(lengths, prompts, total_tokens=4, side="left").tolist() == [[False, False, False, True]]


def test_collate_errors() -> None:
    with pytest.raises(ValueError, match="expected at least one example"):
        collate([], 0)
    with pytest.raises(ValueError, match="expected side 'right' or 'left', got 'top'"):
        collate(list(ENCODED), 0, side="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected pad_token_id as an integer, got None; do pass eos_token_id"):
        collate(list(ENCODED), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("block_tokens", [2, 3, 4, 7, 10, 99])
def test_pack_keeps_every_token_that_another_predicts(block_tokens: int) -> None:
    blocks = pack(ENCODED, block_tokens)
    ids = [token for row in ENCODED for token in row["input_ids"]]
    mask = [i >= row["prompt_tokens"] for row in ENCODED for i in range(len(row["input_ids"]))]
    kept = len(ids) - (len(ids) % block_tokens == 1)
    assert [len(block) for block in blocks["input_ids"]][:-1] == [block_tokens] * (len(blocks) - 1)
    assert [token for block in blocks["input_ids"] for token in block] == ids[:kept]
    assert [real for block in blocks["completion_mask"] for real in block] == mask[:kept]


def test_blocks_collate_with_their_own_mask() -> None:
    for side in ("right", "left"):
        batch = collate(list(pack(ENCODED, 4)), 0, side=side)  # type: ignore[arg-type]
        real = [
            row[keep].tolist() for row, keep in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        ]
        assert real == [[1, 5, 6, 7], [2, 1, 8, 1], [3, 4]]
        scored = [row[keep].tolist() for row, keep in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
        assert scored == [[7], [2, 8], []]


def test_pack_errors() -> None:
    with pytest.raises(ValueError, match="expected at least 2 tokens of text, got 1"):
        pack(Dataset.from_dict({"id": ["a"], "input_ids": [[1]], "prompt_tokens": [0]}), 11)
    with pytest.raises(ValueError, match="expected blocks of at least 2 tokens, got 1"):
        pack(ENCODED, 1)


def test_pack_of_a_cached_file_is_deterministic(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    path = str(write_jsonl([{"prompt": "The", "completion": f" fox {n}"} for n in range(20)]))
    first = pack(encode(load_documents(path), tokenizer, max_tokens=64), 16)
    second = pack(encode(load_documents(path), tokenizer, max_tokens=64), 16)
    assert second.cache_files == first.cache_files

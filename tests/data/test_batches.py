"""Batches, blocks and splits: every real token is where it should be, exactly once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerFast

from data import collate, completion_mask, encode, load_documents, pack, split_documents

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


@pytest.mark.parametrize("block_tokens", [2, 3, 4, 10])
def test_pack_loses_only_the_tail(block_tokens: int) -> None:
    blocks = pack(ENCODED, block_tokens)
    ids = [token for row in ENCODED for token in row["input_ids"]]
    mask = [i >= row["prompt_tokens"] for row in ENCODED for i in range(len(row["input_ids"]))]
    kept = len(ids) - len(ids) % block_tokens
    assert len(blocks) == len(ids) // block_tokens
    assert [token for block in blocks["input_ids"] for token in block] == ids[:kept]
    assert [real for block in blocks["completion_mask"] for real in block] == mask[:kept]


def test_pack_errors() -> None:
    with pytest.raises(ValueError, match="expected at least 11 tokens for one block, got 10; do lower block_tokens"):
        pack(ENCODED, 11)
    with pytest.raises(ValueError, match="expected block_tokens of at least 2, got 1"):
        pack(ENCODED, 1)


def test_pack_of_a_cached_file_is_deterministic(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    path = str(write_jsonl([{"prompt": "The", "completion": f" fox {n}"} for n in range(20)]))
    first = pack(encode(load_documents(path), tokenizer, max_tokens=64), 16)
    second = pack(encode(load_documents(path), tokenizer, max_tokens=64), 16)
    assert second.cache_files == first.cache_files


def numbered(count: int) -> Dataset:
    names = [f"doc-{n}" for n in range(count)]
    return Dataset.from_dict({"id": names, "prompt": [f"p{n % 7}" for n in range(count)], "completion": names})


def test_splits_are_disjoint_complete_and_near_their_fractions() -> None:
    documents = numbered(1000)
    parts = split_documents(documents)
    assert list(parts) == ["train", "validation", "test"]
    ids = [name for part in parts.values() for name in part["id"]]
    assert sorted(ids) == sorted(documents["id"])
    # Binomial: 100 expected, standard deviation below 10, four of them allowed.
    assert all(abs(len(parts[part]) - 100) < 40 for part in ("validation", "test"))
    assert split_documents(documents, seed=1)["test"]["id"][:] != parts["test"]["id"][:]


def test_splits_do_not_move_when_documents_are_added_or_reordered() -> None:
    small, large = split_documents(numbered(200)), split_documents(numbered(400).shuffle(seed=3))
    for part in small:
        assert set(small[part]["id"]) <= set(large[part]["id"])


def test_groups_and_copies_stay_together() -> None:
    parts = split_documents(numbered(500), group="prompt", fractions=(0.4, 0.3, 0.3), seed=5)
    prompts = [set(part["prompt"]) for part in parts.values()]
    assert sum(map(len, prompts)) == 7
    documents = numbered(100)
    copies = documents.remove_columns("id").add_column("id", [f"copy-{n}" for n in range(100)])
    doubled = concatenate_datasets([documents, copies.select_columns(documents.column_names)])
    for part in split_documents(doubled, group=None).values():
        texts = part["completion"][:]
        assert len(texts) == 2 * len(set(texts))


def test_split_errors() -> None:
    assert len(split_documents(numbered(50), fractions=(1.0, 0.0, 0.0))["train"]) == 50
    with pytest.raises(ValueError, match=r"expected three fractions, not negative, with sum 1, got \(0.5, 0.1, 0.1\)"):
        split_documents(numbered(50), fractions=(0.5, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"expected group to be one of .*, got 'title'"):
        split_documents(numbered(50), group="title")
    with pytest.raises(ValueError, match=r"expected documents in '\w+' \(fraction 0.1 of 1\), got none"):
        split_documents(numbered(1))

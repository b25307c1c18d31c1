"""Token ids: the exact boundary, special tokens, truncation, dropping and caching."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import encode, load_documents
from data.encode import leading_special_tokens

DOCUMENTS = Dataset.from_dict(
    {
        "id": ["a", "b", "c"],
        "prompt": ["The quick brown", "", "Paris is the capital of France. " * 5],
        "completion": [" fox jumps", "How much", " yes"],
    }
)


def bare(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_boundary_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(DOCUMENTS, tokenizer, max_tokens=10_000)
    assert encoded.column_names == ["id", "input_ids", "prompt_tokens"]
    for document, row in zip(DOCUMENTS, encoded, strict=True):
        ids, boundary = row["input_ids"], row["prompt_tokens"]
        assert ids[:boundary] == [1, *bare(tokenizer, document["prompt"])]
        assert ids[boundary:] == [*bare(tokenizer, document["completion"]), 2]
        assert tokenizer.decode(ids[boundary:-1]) == document["completion"]
        assert ids.count(1) == 1


def test_truncation_on_the_right_and_dropping(tokenizer: PreTrainedTokenizerFast) -> None:
    full = encode(DOCUMENTS, tokenizer, max_tokens=10_000)
    cut = full[0]["prompt_tokens"] + 2
    short = encode(DOCUMENTS, tokenizer, max_tokens=cut)
    assert short["id"][:] == ["a", "b"]
    assert short[0]["input_ids"] == full[0]["input_ids"][:cut]
    assert max(map(len, short["input_ids"])) <= cut
    kept = encode(DOCUMENTS, tokenizer, max_tokens=cut, min_completion_tokens=3)
    assert kept["id"][:] == ["b"]
    exact = len(full[0]["input_ids"])
    assert encode(DOCUMENTS, tokenizer, max_tokens=exact)[0]["input_ids"][-1] == 2
    assert encode(DOCUMENTS, tokenizer, max_tokens=exact - 1)[0]["input_ids"] == full[0]["input_ids"][:-1]


def test_tokenizer_without_bos_or_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer))
    plain.backend_tokenizer.post_processor = None
    assert leading_special_tokens(plain) == []
    encoded = encode(DOCUMENTS, plain, max_tokens=10_000)
    assert encoded[1]["prompt_tokens"] == 0
    assert encoded[1]["input_ids"] == bare(plain, "How much")


def test_real_tokenizers(datapack: Path) -> None:
    for name in ("stories260K", "base-16m"):
        real = AutoTokenizer.from_pretrained(datapack / "models" / name)
        assert leading_special_tokens(real) == [real.bos_token_id]
        encoded = encode(DOCUMENTS, real, max_tokens=512)
        assert encoded[0]["input_ids"][encoded[0]["prompt_tokens"] :] == [
            *bare(real, " fox jumps"),
            real.eos_token_id,
        ]
    squad = load_documents(str(datapack / "tasks" / "squad.dev.jsonl.xz"), limit=50)
    for document, row in zip(squad, encode(squad, real, max_tokens=1024), strict=True):
        # With the space in the completion, a byte-level tokenizer gives what it gives for the whole text.
        assert row["input_ids"][:-1] == real(document["prompt"] + document["completion"])["input_ids"]


def test_files_are_encoded_once(tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]) -> None:
    path = str(write_jsonl([{"prompt": "The", "completion": " fox"}, {"prompt": "", "completion": "dog"}]))
    first = encode(load_documents(path), tokenizer, max_tokens=64)
    assert first.cache_files
    written = [Path(file["filename"]).stat().st_mtime_ns for file in first.cache_files]
    second = encode(load_documents(path), tokenizer, max_tokens=64)
    assert second.cache_files == first.cache_files
    assert [Path(file["filename"]).stat().st_mtime_ns for file in second.cache_files] == written
    assert second.to_dict() == first.to_dict()
    assert encode(load_documents(path), tokenizer, max_tokens=63).cache_files != first.cache_files


def test_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        ValueError, match=r"expected a document with 1 completion tokens within 2 tokens, got none of 1"
    ):
        encode(DOCUMENTS.select([2]), tokenizer, max_tokens=2)
    with pytest.raises(ValueError, match="at least 1, got 0 and 1"):
        encode(DOCUMENTS, tokenizer, max_tokens=0)
    with pytest.raises(ValueError, match=r"expected columns id, prompt and completion, got \['id', 'prompt'\]"):
        encode(DOCUMENTS.remove_columns("completion"), tokenizer, max_tokens=8)

"""The documents of a fit: train, validation and test, never sharing a group, as token ids.

Train teaches the policy, validation sets every knob, test is looked at once, by the comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data import collate, encode, load_documents, split_names

from .settings import FitSettings

Example = dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """Encoded documents: `id`, `input_ids`, `prompt_tokens` each."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Batch:
    """Right-padded documents. `scored[b, t]` says that logits at t predict a completion token."""

    tokens: Tensor
    """[B, T] long"""
    real: Tensor
    """[B, T] bool"""
    scored: Tensor
    """[B, T] bool"""
    prompt_tokens: Tensor
    """[B] long"""

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device) for x in (self.tokens, self.real, self.scored, self.prompt_tokens)))


def load_corpus(dataset: str, tokenizer: PreTrainedTokenizerBase, fit: FitSettings, seed: int) -> Corpus:
    """Read, split and encode a dataset.

    A dataset with train, validation and test splits keeps them; one without is split by text (scikit-learn's grouped
    split), so that no document, nor an exact copy of it, lies on both sides. Raises ValueError when a part would be
    empty.
    """
    names = split_names(dataset)
    if {"train", "validation", "test"} <= set(names):
        parts = [load_documents(dataset, name) for name in ("train", "validation", "test")]
    else:
        parts = _grouped_split(load_documents(dataset, names[0]), fit, seed)
    amounts = (fit.train_documents, fit.validation_documents, fit.test_documents)
    return Corpus(*(_encode(p, n, tokenizer, fit, seed) for p, n in zip(parts, amounts, strict=True)))


def _grouped_split(documents: datasets.Dataset, fit: FitSettings, seed: int) -> list[datasets.Dataset]:
    different = len(set(_texts(documents)))
    if different < 3:
        raise ValueError(f"dataset: expected at least 3 different documents to split, got {different}; give more text")
    wanted = (fit.train_documents, fit.validation_documents, fit.test_documents)
    held_out = (wanted[1] + wanted[2]) / sum(wanted)
    train, rest = _split_once(documents, held_out, seed)
    validation, test = _split_once(rest, wanted[2] / (wanted[1] + wanted[2]), seed)
    return [train, validation, test]


def _split_once(documents: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    split = GroupShuffleSplit(n_splits=1, test_size=share, random_state=seed)
    texts = _texts(documents)
    try:
        first, second = next(split.split(range(len(documents)), groups=texts))
    except ValueError:  # scikit-learn's way of saying that one side would be empty
        raise ValueError(
            f"dataset: expected enough different documents to split, got {len(set(texts))} for one part; give more text"
        ) from None
    return documents.select(sorted(first)), documents.select(sorted(second))


def _texts(documents: datasets.Dataset) -> list[str]:
    """What makes two documents the same one: ids tell exact copies apart."""
    return [f"{p}\n{c}" for p, c in zip(documents["prompt"], documents["completion"], strict=True)]


def _encode(
    documents: datasets.Dataset, amount: int, tokenizer: PreTrainedTokenizerBase, fit: FitSettings, seed: int
) -> list[Example]:
    # A sample of a large dataset need not be encoded whole: eight documents for each one wanted leave enough after
    # the short ones are dropped, and when they do not, all of it is taken.
    shuffled = documents.shuffle(seed=seed)
    limits = {"max_tokens": fit.max_tokens, "min_completion_tokens": fit.min_completion_tokens}
    some = shuffled.select(range(min(len(shuffled), 8 * amount)))
    encoded = encode(some, tokenizer, **limits)
    if len(encoded) < amount and len(some) < len(shuffled):
        encoded = encode(shuffled, tokenizer, **limits)
    return [dict(row) for row in encoded.select(range(min(amount, len(encoded))))]


def make_batch(examples: Sequence[Example]) -> Batch:
    """Right-padded batch of encoded documents, on the CPU."""
    columns = collate(examples, pad_token_id=0)
    completion, real = columns["completion_mask"], columns["attention_mask"].bool()
    scored = torch.zeros_like(completion)
    scored[:, :-1] = completion[:, 1:]
    return Batch(columns["input_ids"], real, scored, columns["prompt_tokens"])


def batches(examples: Sequence[Example], rows: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of at most `rows` documents of like length, with the documents' indices in `examples`."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i]["input_ids"]), i))
    for start in range(0, len(order), rows):
        index = order[start : start + rows]
        yield index, make_batch([examples[i] for i in index])

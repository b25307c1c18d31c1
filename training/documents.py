"""The documents of a fit: train, validation and test, never sharing a group, as token ids.

Train teaches the policy, validation sets every knob, test is looked at once, by the comparison. What an earlier part
has, or has most of, is left out of a later one (`leaks`): it would be judged on what it was taught.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data import collate, encode, load_documents, split_names
from runtime.loading import context_limit

from .amounts import Amounts
from .leaks import leaked

Example = dict[str, Any]

PARTS = ("train", "validation", "test")
ALL = "all"
HELD_OUT = 0.5
"""Share of the groups that a fit does not train on, where it divides one split."""
TEST_OF_HELD_OUT = 0.5
FEW_ROWS = 4
MOST_PADDING = 0.2
"""A batch is closed before padding costs more than this of its real tokens: the model computes padding in full."""
TEXTS_AT_ONCE = 1000
"""Documents read together; one at a time takes ten times as long."""


@dataclass(frozen=True)
class Corpus:
    """Encoded documents: `id`, `input_ids`, `prompt_tokens` each."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    leaked: int = 0
    """Documents left out of validation and test because an earlier part has their text, or at least half of it."""


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

    def prompt(self) -> Tensor:
        """[B, T] bool: the prompt's tokens."""
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return self.real & (steps < self.prompt_tokens[:, None])

    def rows(self, index: Tensor) -> Batch:
        """The rows `index` [N] long."""
        return Batch(*(x[index] for x in (self.tokens, self.real, self.scored, self.prompt_tokens)))

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device) for x in (self.tokens, self.real, self.scored, self.prompt_tokens)))


def load_corpus(dataset: str, tokenizer: PreTrainedTokenizerBase, amounts: Amounts, seed: int) -> Corpus:
    """Read, split and encode a dataset.

    A dataset with train, validation and test splits keeps them; of any other, train, or else the first split, is
    divided in three (see `_divide`). Either way validation loses its copies and near copies of train, and test those of
    train and validation (see `without_leaks`). Raises ValueError when a part would be empty.
    """
    names = split_names(dataset)
    if set(PARTS) <= set(names):
        parts = {name: load_documents(dataset, name) for name in PARTS}
    else:
        parts = _divide(load_documents(dataset, _first(names)), seed)
    kept = {name: _without_earlier(parts, name) for name in PARTS}
    wanted = (amounts.train_documents, amounts.validation_documents, amounts.test_documents)
    train, validation, test = (
        _encode(kept[name], count, tokenizer, amounts, seed) for name, count in zip(PARTS, wanted, strict=True)
    )
    return Corpus(train, validation, test, leaked=sum(len(parts[name]) - len(kept[name]) for name in PARTS))


def load_split(dataset: str, split: str, seed: int = 0) -> datasets.Dataset:
    """Documents of one split as `load_corpus` would take them, all of it and not encoded.

    So `test` holds nothing that a fit with this seed has seen, nor a near copy. Of a split that a fit divides there are
    the three parts, any other loses what leaked from what a fit trains on and sets its knobs on; `all` is everything
    there is. Raises ValueError for another name, and all that `load_documents` and `without_leaks` raise.
    """
    names = split_names(dataset)
    if split == ALL and ALL not in names:
        return datasets.concatenate_datasets([load_documents(dataset, name) for name in names])
    given = set(PARTS) <= set(names)
    own = names if given else tuple(name for name in names if name != _first(names))
    if split in own:
        # What a fit trains on and sets its knobs on, whole: a later split does not hang on what an earlier one lost.
        seen = PARTS[:-1] if given else (_first(names),)
        before = seen[: seen.index(split)] if split in seen else seen
        return without_leaks(load_documents(dataset, split), [load_documents(dataset, name) for name in before], split)
    known = tuple(dict.fromkeys((*PARTS, *own)))
    if split not in PARTS:
        raise ValueError(f"split: expected one of {[*known, ALL]} of {dataset}, got {split!r}; do pass one of these")
    return _without_earlier(_divide(load_documents(dataset, _first(names)), seed), split)


def _first(names: Sequence[str]) -> str:
    """The split that a fit divides when the three it needs are not all there."""
    return "train" if "train" in names else names[0]


def without_leaks(
    documents: datasets.Dataset, earlier: Sequence[datasets.Dataset], split: str = "test"
) -> datasets.Dataset:
    """The documents that the `earlier` splits have neither word for word nor half of or more.

    Half of its distinct runs of eight words, prompt and completion together, case folded. Runs that many of all these
    documents share, such as a prompt template, do not count; a document without any that count is left out as an exact
    copy only (see `leaks.leaked`). Raises ValueError when that leaves nothing.
    """
    if not earlier:
        return documents
    leaks = leaked(list(_texts(documents)), (text for part in earlier for text in _texts(part)))
    kept = [row for row, leak in enumerate(leaks) if not leak]
    if not kept:
        raise ValueError(
            f"dataset: expected documents in {split!r} that no earlier split has half of, got none of "
            f"{len(documents)}; do give other text"
        )
    return documents if len(kept) == len(documents) else documents.select(kept)


def _without_earlier(parts: Mapping[str, datasets.Dataset], name: str) -> datasets.Dataset:
    """One of the three parts, without what leaked from those before it, which are given whole."""
    return without_leaks(parts[name], [parts[earlier] for earlier in PARTS[: PARTS.index(name)]], name)


def _divide(documents: datasets.Dataset, seed: int) -> dict[str, datasets.Dataset]:
    """Train, validation and test by scikit-learn's grouped split: what shares a group lies on one side.

    The group is the first line of the prompt, which is the context where several questions are about one. A first
    line that makes fewer than three groups of everything is a template; then, and without a prompt, the text is its own
    group, so that at least no exact copy lies on both sides. Near copies may, and are the caller's to leave out. The
    shares are constants: the parts depend on the documents and the seed alone, whatever amounts a fit takes from them.
    """
    texts = list(_texts(documents))
    heads = [p.split("\n", 1)[0] if p.strip() else t for p, t in zip(documents["prompt"], texts, strict=True)]
    groups = heads if len(set(heads)) >= len(PARTS) else texts
    different = len(set(groups))
    if different < len(PARTS):
        raise ValueError(f"dataset: expected at least 3 different documents to split, got {different}; give more text")
    train, rest = _divide_once(range(len(documents)), groups, HELD_OUT, seed)
    validation, test = _divide_once(rest, groups, TEST_OF_HELD_OUT, seed)
    return {name: documents.select(rows) for name, rows in zip(PARTS, (train, validation, test), strict=True)}


def _divide_once(rows: Sequence[int], groups: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """`rows` in two, in order; the second has `share` of the groups."""
    split = GroupShuffleSplit(n_splits=1, test_size=share, random_state=seed)
    first, second = next(split.split(rows, groups=[groups[row] for row in rows]))
    return [rows[i] for i in sorted(first)], [rows[i] for i in sorted(second)]


def _texts(documents: datasets.Dataset) -> Iterator[str]:
    """What makes two documents the same one: ids tell exact copies apart."""
    for some in documents.select_columns(["prompt", "completion"]).iter(TEXTS_AT_ONCE):
        yield from (f"{p}\n{c}" for p, c in zip(some["prompt"], some["completion"], strict=True))


def check_context(model: PreTrainedModel, max_tokens: int, name: str = "max_tokens") -> None:
    """Raise ValueError when documents of `max_tokens` would not fit the model's context."""
    context = context_limit(model)
    if context is not None and max_tokens > context:
        raise ValueError(f"{name}: expected at most the model's context of {context}, got {max_tokens}; lower it")


def _encode(
    documents: datasets.Dataset, count: int, tokenizer: PreTrainedTokenizerBase, amounts: Amounts, seed: int
) -> list[Example]:
    # A sample of a large dataset need not be encoded whole: eight documents for each one wanted leave enough after
    # the short ones are dropped, and when they do not, all of it is taken.
    shuffled = documents.shuffle(seed=seed)
    limits = {"max_tokens": amounts.max_tokens, "min_completion_tokens": amounts.min_completion_tokens}
    some = shuffled.select(range(min(len(shuffled), 8 * count)))
    encoded = encode(some, tokenizer, **limits)
    if len(encoded) < count and len(some) < len(shuffled):
        encoded = encode(shuffled, tokenizer, **limits)
    return [dict(row) for row in encoded.select(range(min(count, len(encoded))))]


def scored_tokens(example: Example) -> Tensor:
    """[T] bool: the tokens whose logits predict a completion token; the last predicts nothing that is there."""
    positions = torch.arange(1, len(example["input_ids"]) + 1)
    return (positions >= max(1, example["prompt_tokens"])) & (positions < len(positions))


def make_batch(examples: Sequence[Example]) -> Batch:
    """Right-padded batch of encoded documents, on the CPU."""
    columns = collate(examples, pad_token_id=0)
    completion, real = columns["completion_mask"], columns["attention_mask"].bool()
    scored = torch.zeros_like(completion)
    scored[:, :-1] = completion[:, 1:]
    return Batch(columns["input_ids"], real, scored, columns["prompt_tokens"])


def batches(
    examples: Sequence[Example], rows: int, positions: int | None = None, copies: int = 1
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of documents of like length, with the documents' indices in `examples`, which may lie on disk.

    Every document comes `copies` times; the index of copy c of document d is d * copies + c. A batch has at most `rows`
    documents, from `FEW_ROWS` on no more padding than `MOST_PADDING` of its tokens, and at most `positions` tokens with
    padding, unless one document alone has more.
    """
    lengths = [len(example["input_ids"]) for example in examples for _ in range(copies)]
    index: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Ascending: with this document the whole batch would have its length.
        padded, real = (len(index) + 1) * lengths[i], tokens + lengths[i]
        too_large = positions is not None and padded > positions
        too_sparse = len(index) >= FEW_ROWS and padded - real > MOST_PADDING * real
        if index and (len(index) == rows or too_large or too_sparse):
            yield index, make_batch([examples[j // copies] for j in index])
            index, tokens = [], 0
        index.append(i)
        tokens += lengths[i]
    if index:
        yield index, make_batch([examples[j // copies] for j in index])


GPU_SHARE = 1 / 16
"""Of a GPU's memory the logits of one pass may take this much, where that is more than what is asked for."""


def positions_within(model: PreTrainedModel, logits_bytes: int) -> int:
    """How many positions' float32 logits fit into `logits_bytes`, or into a GPU's share: at least 1."""
    if model.device.type == "cuda":
        memory = torch.cuda.get_device_properties(model.device).total_memory
        logits_bytes = max(logits_bytes, int(GPU_SHARE * memory))
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    return max(1, logits_bytes // (4 * vocabulary))

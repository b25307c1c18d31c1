"""Token difficulty, learned from damage tables: shrunken means by token id and by pair, fitted out of fold.

A token's difficulty is what low rungs lose at it over what they lose on average. What training documents see must not
come from themselves, or a rare token's own damage would be its feature: so each sees tables fitted on the documents of
the other folds, and everybody else those fitted on all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy.difficulty import PAIRS, Difficulty, hashed_pairs
from policy.rungs import Rung, rung_shares

from ..documents import Example, scored_tokens

FOLDS = 5
MOST_SHARE = 1 / 4
"""Rungs up to this share of the adapter are averaged: those above lose too little to tell tokens apart."""
STRENGTH_TOKENS = 8.0
"""A mean is shrunk as if so many average tokens had been seen beside its own."""


@dataclass(frozen=True)
class FoldedDifficulty:
    """The tables fitted on all train documents, and those that each of these documents may see."""

    whole: Difficulty
    folds: tuple[Difficulty, ...]
    fold: tuple[int, ...]
    """Of every train document, which of `folds` was fitted without it."""

    def of(self, document: int) -> Difficulty:
        """What document number `document` sees, train documents first."""
        return self.folds[self.fold[document]] if document < len(self.fold) else self.whole

    def reordered(self, documents: Sequence[int]) -> FoldedDifficulty:
        """The same for these documents, in this order, train documents first."""
        return replace(self, fold=tuple(self.fold[own] for own in documents if own < len(self.fold)))

    def rows(self, documents: Sequence[int]) -> Difficulty:
        """The tables of these documents, a row each."""
        return Difficulty.stack([self.of(document) for document in documents])


def fit_difficulty(
    examples: Sequence[Example], tables: Sequence[Tensor], rungs: Sequence[Rung], vocabulary: int
) -> FoldedDifficulty:
    """From train documents and their damage tables [T, J, G], the best scale of every rung taken."""
    folds = min(FOLDS, len(examples))

    def fitted(documents: Sequence[int]) -> Difficulty:
        own = [examples[document] for document in documents]
        return _fit(own, [tables[document] for document in documents], rungs, vocabulary)

    fold = tuple(i % folds for i in range(len(examples)))
    others = [[i for i, own in enumerate(fold) if own != number] for number in range(folds)]
    return FoldedDifficulty(fitted(range(len(examples))), tuple(map(fitted, others)), fold)


def _ratios(examples: Sequence[Example], tables: Sequence[Tensor], rungs: Sequence[Rung]) -> list[Tensor]:
    """[T] of every document: damage over that of the average token, nan where a token is not scored."""
    low = [j for j, share in enumerate(rung_shares(rungs)) if share <= MOST_SHARE] or [0]
    scale = torch.cat(list(tables)).mean(0).argmin(1)[low]
    damage = [table[:, low, scale].double() for table in tables]
    scored = [scored_tokens(example) for example in examples]
    mean = torch.cat([own[at] for own, at in zip(damage, scored, strict=True)]).mean(0).clamp(min=1e-12)
    ratios = [(own / mean).mean(1) for own in damage]
    return [torch.where(at, own, torch.nan) for own, at in zip(ratios, scored, strict=True)]


def _fit(examples: Sequence[Example], tables: Sequence[Tensor], rungs: Sequence[Rung], vocabulary: int) -> Difficulty:
    """The tables of these documents, and of nothing that others have lost."""
    if not examples:
        return Difficulty.neutral(vocabulary, PAIRS)
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    tokens, ratio = torch.cat(ids), torch.cat(_ratios(examples, tables, rungs))
    before = torch.cat([torch.cat([torch.tensor([-1]), own[:-1]]) for own in ids])
    known = ratio.isfinite()
    token = _shrunken_means(tokens[known], ratio[known], vocabulary)
    # The pair says what its second token alone does not.
    paired = known & (before >= 0)
    rest = ratio[paired] / token[tokens[paired]]
    pair = _shrunken_means(hashed_pairs(before[paired], tokens[paired], PAIRS), rest, PAIRS)
    return Difficulty.of(token, pair)


def _shrunken_means(index: Tensor, values: Tensor, entries: int) -> Tensor:
    """[entries] mean of `values` [N] at each index [N], shrunk towards 1."""
    total = torch.full((entries,), STRENGTH_TOKENS, dtype=torch.float64).index_add_(0, index, values)
    count = torch.full((entries,), STRENGTH_TOKENS, dtype=torch.float64).index_add_(0, index, torch.ones_like(values))
    return total / count

"""Which texts earlier ones already have, word for word or for the most part.

Two texts are compared by their n-grams of words, case folded, as contamination is usually found (GPT-3, Brown et al.
2020, appendix C). What many texts share is a template that says nothing about copies, so it does not count. An n-gram
is 64 bits computed from CRC-32 of its words: the same in every process, and a false match is one in billions.

Only the n-grams of the texts that are asked about are held, some 40 bytes each; the earlier ones pass by one at a time.
Text without spaces between words has hardly any n-grams: of it only exact copies are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

NGRAM_WORDS = 8
"""Long enough that two texts hardly share one by chance."""
SHARE = 0.5
"""A text is a near copy when the earlier ones have at least this share of its distinct n-grams."""
TEMPLATE_SHARE = 0.02
"""An n-gram in more than this share of all texts is a template's: part of a prompt, or a stock phrase."""
TEMPLATE_TEXTS = 4
"""Of a few texts, 2 % is not even a pair: a template is in more than these, or in more than half of all."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no word is lost in a product of 64 bits; the golden ratio's digits spread them."""


def leaked(texts: Sequence[str], earlier: Iterable[str]) -> list[bool]:
    """Whether an earlier text equals each of `texts`, or the earlier ones together have `SHARE` of its n-grams.

    What is in more than `TEMPLATE_SHARE` of all texts, earlier or not, does not count. A text of which nothing counts,
    such as one of fewer than `NGRAM_WORDS` words, leaks only as an exact copy.
    """
    own = [ngrams(text) for text in texts]
    known = np.unique(np.concatenate([*own, ngrams("")]))
    places = [np.searchsorted(known, grams) for grams in own]
    here, before = np.zeros(len(known), np.int32), np.zeros(len(known), np.int32)
    for place in places:
        here[place] += 1
    wanted = set(texts)
    copied: set[str] = set()
    number = len(texts)
    for text in earlier:
        before[_find(ngrams(text), known)] += 1
        number += 1
        if text in wanted:
            copied.add(text)
    counts = here + before <= _most_copies(number)
    return [
        text in copied or _is_near_copy(before[place[counts[place]]]) for text, place in zip(texts, places, strict=True)
    ]


def ngrams(text: str) -> NDArray[np.uint64]:
    """[n] the distinct n-grams of a text as 64-bit numbers, ascending; none where it has too few words."""
    words = np.fromiter(map(crc32, map(str.encode, text.casefold().split())), np.uint64)
    number = max(0, len(words) - NGRAM_WORDS + 1)
    grams = np.zeros(number, np.uint64)
    for word in range(NGRAM_WORDS):
        # Wraps at 64 bits.
        grams = grams * _FACTOR + words[word : word + number]
    return np.unique(grams)


def _find(grams: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Where those of `grams` are that `known`, ascending, has."""
    places = np.searchsorted(known, grams)
    inside = places < len(known)
    places, grams = places[inside], grams[inside]
    found: NDArray[np.intp] = places[known[places] == grams]
    return found


def _most_copies(texts: int) -> float:
    """In how many of so many texts an n-gram may be without being a template's."""
    return max(TEMPLATE_SHARE * texts, min(TEMPLATE_TEXTS, texts / 2))


def _is_near_copy(before: NDArray[np.int32]) -> bool:
    """Of the n-grams that count: in how many earlier texts each is."""
    return len(before) > 0 and int(np.count_nonzero(before)) >= SHARE * len(before)

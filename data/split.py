"""Train, validation and test from a source that has one split.

A document's part follows from a hash of its group alone, so it never moves when documents are added, removed or
reordered, and the parts are disjoint in groups. The price: part sizes only approximate the fractions.
"""

from __future__ import annotations

import hashlib
import math

from datasets import Dataset, DatasetDict

from data.columns import content_id

PARTS = ("train", "validation", "test")


def split_documents(
    documents: Dataset,
    *,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    group: str | None = "id",
    seed: int = 0,
) -> DatasetDict:
    """`train`, `validation` and `test` of `documents`, in their order, by a stable hash of `group` and `seed`.

    `group` is the column whose equal values stay together (`prompt`, for instance); None groups by the text itself,
    so that exact copies stay together. A part of fraction 0 is empty. Raises ValueError for fractions that are not
    three shares of 1, an unknown column, and a part that should hold documents but got none.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-9):
        raise ValueError(f"expected three fractions, not negative, with sum 1, got {fractions}; do correct them")
    if group is not None and group not in documents.column_names:
        raise ValueError(f"expected group to be one of {documents.column_names}, got {group!r}; do pass one of these")
    keys = (
        [content_id(prompt, text) for prompt, text in zip(documents["prompt"], documents["completion"], strict=True)]
        if group is None
        else documents[group]
    )
    rows: dict[str, list[int]] = {part: [] for part in PARTS}
    for row, key in enumerate(keys):
        rows[_part(str(key), fractions, seed)].append(row)
    for part, fraction in zip(PARTS, fractions, strict=True):
        if fraction > 0 and not rows[part]:
            raise ValueError(
                f"expected documents in {part!r} (fraction {fraction} of {len(documents)}), got none; "
                "do add documents, enlarge the fraction or change the seed"
            )
    return DatasetDict({part: documents.select(rows[part]) for part in PARTS})


def _part(key: str, fractions: tuple[float, float, float], seed: int) -> str:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < fractions[0]:
        return "train"
    # A position at the very end of the range must not fall into a part of fraction 0.
    return "validation" if position < fractions[0] + fractions[1] or fractions[2] == 0 else "test"

"""WikiText rows to articles.

On the hub a row of WikiText is one line of one article. Perplexity is reported over the lines joined by blank lines,
so the articles here are cut from exactly that string: their texts, concatenated, are `"\\n\\n".join(rows["text"])`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from datasets import Dataset

# ` = Title = `; sections are ` = = Name = = ` and deeper.
_TITLE = re.compile(r" = [^=\s](?:.*[^=\s])? = \s*")
_JOIN = "\n\n"


def articles(rows: Dataset) -> Dataset:
    """Rows `text` (one line each) to rows `text` (one article each); the text before the first title goes with it."""
    built = Dataset.from_generator(_articles, gen_kwargs={"rows": rows})
    assert isinstance(built, Dataset), "from_generator without streaming gives a Dataset"
    return built


def _articles(rows: Dataset) -> Iterator[dict[str, str]]:
    lines: list[str] = []
    titled = False
    for row in rows:
        line = row["text"]
        if _TITLE.fullmatch(line):
            if titled:
                yield {"text": _JOIN.join(lines) + _JOIN}
                lines = []
            titled = True
        lines.append(line)
    if lines:
        yield {"text": _JOIN.join(lines)}

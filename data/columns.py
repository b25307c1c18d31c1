"""From the columns a dataset happens to have to documents: `id`, `prompt`, `completion` (and `answers`).

Rows are mapped one by one with pure functions, so that `datasets` can cache the result by fingerprint. Columns beyond
these are dropped: documents of different sources can then be concatenated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset, Features, Sequence, Value

Row = dict[str, Any]

PROMPT_COMPLETION = ("prompt", "completion")
UNANSWERABLE = "unanswerable"


def content_id(prompt: str, completion: str) -> str:
    """Sixteen hexadecimal digits of the text itself: the same on every machine and in every order of the rows."""
    return hashlib.sha256(f"{len(prompt)}:{prompt}{completion}".encode()).hexdigest()[:16]


def question_prompt(question: str, context: str | None = None) -> str:
    """`Context: ...`, `Question: ...`, `Answer:` on lines of their own; the completion then starts with a space."""
    head = f"Context: {context}\n" if context is not None else ""
    return f"{head}Question: {question.strip()}\nAnswer:"


def _as_is(row: Row) -> Row:
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _squad(row: Row) -> Row:
    answers = _answer_texts(row["answers"])
    return {
        "prompt": question_prompt(row["question"], row["context"]),
        "completion": f" {answers[0] if answers else UNANSWERABLE}",
    }


def _question_answer(row: Row) -> Row:
    return {"prompt": question_prompt(row["question"]), "completion": f" {row['answer']}"}


def _text(row: Row) -> Row:
    return {"prompt": "", "completion": row["text"]}


# In order of preference; the columns named must all be there.
_SHAPES: tuple[tuple[tuple[str, ...], Callable[[Row], Row]], ...] = (
    (PROMPT_COMPLETION, _as_is),
    (("question", "context", "answers"), _squad),
    (("question", "answer"), _question_answer),
    (("text",), _text),
)


def shape_of(columns: list[str], where: str) -> tuple[tuple[str, ...], Callable[[Row], Row]]:
    """The first known shape that `columns` satisfy, or a ValueError that names the columns found."""
    for needed, convert in _SHAPES:
        if set(needed) <= set(columns):
            return needed, convert
    known = " or ".join("+".join(needed) for needed, _ in _SHAPES)
    raise ValueError(
        f"expected columns {known} in {where}, got {sorted(columns)}; do rename them with "
        "datasets.Dataset.rename_columns and save with to_json as a local .jsonl file"
    )


def to_documents(rows: Dataset, where: str) -> Dataset:
    """Documents of any dataset whose columns have a known shape.

    Known shapes: prompt+completion as they are; question+context+answers (SQuAD, also keeps `answers` as a list of
    strings, empty when unanswerable); question+answer; text (empty prompt, blank rows dropped). An `id` column is kept
    as text, otherwise `content_id`; a repeated id gets `#2`, `#3`, ... Raises ValueError for other columns, for values
    that are not text and for a source without documents.
    """
    _, convert = shape_of(rows.column_names, where)
    features = {name: Value("string") for name in ("id", *PROMPT_COMPLETION)}
    if "answers" in rows.column_names:
        features["answers"] = Sequence(Value("string"))
    documents = rows.map(
        _document,
        fn_kwargs={"convert": convert, "where": where},
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features(features),
    )
    if convert is _text:
        documents = documents.filter(_not_blank, input_columns="completion")
    if len(documents) == 0:
        raise ValueError(f"expected at least one document in {where}, got none; do check the file or the split")
    return with_unique_ids(documents).select_columns(list(features))


def with_unique_ids(documents: Dataset) -> Dataset:
    """The same documents; the second, third, ... document of one id is renamed `id#2`, `id#3`, ..."""
    ids = list(documents["id"])
    if len(set(ids)) == len(ids):
        return documents
    return documents.remove_columns("id").add_column("id", list(_numbered(ids)))


def _numbered(ids: list[str]) -> Iterator[str]:
    taken = set(ids)
    seen: dict[str, int] = {}
    for name in ids:
        seen[name] = seen.get(name, 0) + 1
        if seen[name] == 1:
            yield name
            continue
        # A source may already hold an id of the form `a#2`.
        while f"{name}#{seen[name]}" in taken:
            seen[name] += 1
        taken.add(f"{name}#{seen[name]}")
        yield f"{name}#{seen[name]}"


def _document(row: Row, index: int, convert: Callable[[Row], Row], where: str) -> Row:
    document = convert(row)
    for key, value in document.items():
        if not isinstance(value, str):
            raise ValueError(
                f"expected text in {key!r} of row {index} of {where}, got {type(value).__name__}; "
                "do write prompt and completion as plain strings"
            )
    own_id = row.get("id")
    document["id"] = str(own_id) if own_id is not None else content_id(document["prompt"], document["completion"])
    if "answers" in row:
        document["answers"] = _answer_texts(row["answers"])
    return document


def _answer_texts(answers: Any) -> list[str]:
    """SQuAD's `{"text": [...], "answer_start": [...]}` or a plain list, as a list of strings."""
    texts = answers["text"] if isinstance(answers, dict) else answers
    if texts is not None and not isinstance(texts, list):
        raise ValueError(f"expected answers as a list of strings, got {type(texts).__name__}; do write [answer]")
    return [str(text) for text in texts or ()]


def _not_blank(completion: str) -> bool:
    return bool(completion.strip())

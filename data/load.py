"""One call for every source of text: a built-in name, any other hub dataset, or a local path.

Built-in names are looked up first, then paths, and what is left is taken for a hub name.
"""

from __future__ import annotations

from datasets import Dataset

from data.hub import hub_splits, load_hub, load_source
from data.local import is_local, load_local, local_splits
from data.sources import SOURCES


def load_documents(name: str, split: str = "train", *, config: str | None = None, limit: int | None = None) -> Dataset:
    """The documents of one split: `id` (unique, stable), `prompt` (may be empty), `completion`, all strings.

    `name` is built in (`wikitext` is WikiText-2, `wikitext-103`, `squad_v2`, `flores`, `ntrex`), a hub dataset, or a
    local file, `source.txt:target.txt` pair or folder (see `data.local`). `config` is the hub configuration, or the
    language pair (`eng_Latn-deu_Latn`, `eng-deu`) of parallel text; `limit` keeps the first documents. SQuAD-like
    sources also have `answers`: a list of strings, empty when the question is unanswerable. `validation` and `test`
    of FLORES+ are its `dev` and `devtest`.

    Raises ValueError (split, configuration, columns, a bad line, nothing in it), FileNotFoundError (no such path or
    hub dataset) or ConnectionError (the hub is out of reach), each one line: expected, got, what to do.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"expected limit of at least 1 document, got {limit}; do leave it out for all of them")
    if name in SOURCES:
        documents = load_source(name, SOURCES[name], split, config)
    elif is_local(name):
        documents = load_local(name, split, config)
    else:
        documents = load_hub(name, split, config)
    return documents if limit is None else documents.select(range(min(limit, len(documents))))


def split_names(name: str, *, config: str | None = None) -> tuple[str, ...]:
    """The splits `load_documents` can give for `name`, at least one.

    Only a hub dataset that is not built in is asked from the hub. Raises FileNotFoundError for a folder without any.
    """
    if name in SOURCES:
        return SOURCES[name].splits
    return local_splits(name) if is_local(name) else hub_splits(name, config)

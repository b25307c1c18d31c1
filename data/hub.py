"""Datasets of the Hugging Face Hub, with the loader's failures turned into one line each.

The loader of `datasets` does the work, cache and offline mode included; nothing here opens a connection itself.
"""

from __future__ import annotations

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetsError

from data.columns import to_documents
from data.parallel import has_script, match_language, parse_pair, translations
from data.sources import Source
from data.wikitext import articles

# What `datasets` raises for a dataset it cannot find, reach or build; anything else is no user's mistake and passes.
_LOADER_ERRORS = (FileNotFoundError, ConnectionError, TimeoutError, ValueError, RuntimeError, DatasetsError)


def load_hub(name: str, split: str, config: str | None) -> Dataset:
    """Documents of any hub dataset whose columns `data.columns` knows."""
    return to_documents(_rows(name, split, config), name)


def load_source(name: str, source: Source, split: str, config: str | None) -> Dataset:
    """Documents of a built-in source. `config` overrides the hub configuration, or names the language pair."""
    split = source.hub_split(split, name)
    config = config or source.config
    if source.layout == "languages":
        return _from_languages(source.hub_id, split, config or "")
    rows = _rows(source.hub_id, split, None if source.layout == "columns" else config)
    if source.layout == "columns":
        return from_columns(rows, source.hub_id, split, config or "")
    return to_documents(articles(rows) if source.layout == "articles" else rows, name)


def hub_splits(name: str, config: str | None) -> tuple[str, ...]:
    """The split names of a hub dataset, asked from the hub."""
    try:
        return tuple(datasets.get_dataset_split_names(name, config))
    except _LOADER_ERRORS as error:
        raise _one_line(error, name) from error


def from_columns(rows: Dataset, where: str, split: str, config: str) -> Dataset:
    """Translation documents from a table with one column per language (NTREX-128)."""
    source, target = (match_language(code, rows.column_names, where) for code in parse_pair(config))
    ids = [f"{split}-{row}" for row in range(len(rows))]
    return translations(rows[source], rows[target], (source, target), ids)


def join_languages(sources: Dataset, targets: Dataset, pair: tuple[str, str], split: str) -> Dataset:
    """Translation documents from two tables `id`, `text` with the same ids (FLORES+), in the order of the first."""
    by_id = dict(zip(targets["id"], targets["text"], strict=True))
    ids = list(sources["id"])
    if set(ids) != set(by_id):
        differing = len(set(ids) ^ set(by_id))
        raise ValueError(
            f"expected the same sentence ids for {pair[0]} and {pair[1]}, got {differing} that only one of them has; "
            "do choose another pair"
        )
    texts = [by_id[key] for key in ids]
    return translations(sources["text"], texts, pair, [f"{split}-{key}" for key in ids])


def _from_languages(hub_id: str, split: str, config: str) -> Dataset:
    source, target = (_language_config(hub_id, code) for code in parse_pair(config))
    return join_languages(_rows(hub_id, split, source), _rows(hub_id, split, target), (source, target), split)


def _language_config(hub_id: str, code: str) -> str:
    if has_script(code):
        return code
    try:
        available = datasets.get_dataset_config_names(hub_id)
    except _LOADER_ERRORS as error:
        raise _one_line(error, hub_id) from error
    return match_language(code, available, hub_id)


def _rows(hub_id: str, split: str, config: str | None) -> Dataset:
    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except _LOADER_ERRORS as error:
        raise _one_line(error, hub_id) from error
    assert isinstance(rows, Dataset), "a named split without streaming is a Dataset"
    return rows


def _one_line(error: Exception, hub_id: str) -> Exception:
    """The error to raise for a failure of the loader, which is one of `_LOADER_ERRORS`."""
    got = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(
            f"expected a dataset called {hub_id!r} on the hub, got: {got}; do check the name, run `hf auth login` "
            "if it is private or gated, or pass the path of a local file or folder"
        )
    if isinstance(error, OSError):
        return ConnectionError(
            f"expected to reach the hub for {hub_id!r}, got: {got}; do check the network, set HF_DATASETS_CACHE to a "
            "cache that holds it, or pass the path of a local file or folder"
        )
    return ValueError(f"expected {hub_id!r} to load, got: {got}; do correct the configuration or the split")

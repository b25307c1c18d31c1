"""The built-in dataset names: which hub repository each one is, and how its rows are laid out.

A table, so that a repository that moves is one line here. All of them hold plain data files (parquet), since
`datasets` no longer runs loading scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Layout = Literal["articles", "rows", "languages", "columns"]


@dataclass(frozen=True)
class Source:
    """One built-in name. `config` is the hub configuration, or the default language pair for parallel text."""

    hub_id: str
    layout: Layout
    """articles: lines of WikiText; rows: one document a row; languages: one configuration per language, joined by
    `id`; columns: one column per language."""
    splits: tuple[str, ...]
    config: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    """(usual name, name on the hub) for splits that are called otherwise."""

    def hub_split(self, split: str, name: str) -> str:
        """The hub's name for `split`; ValueError names the splits there are."""
        resolved = dict(self.aliases).get(split, split)
        if resolved not in self.splits:
            raise ValueError(
                f"expected a split of {name!r}, one of {list(self.splits)}, got {split!r}; do pass one of these"
            )
        return resolved


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "wikitext": Source(
            "Salesforce/wikitext", "articles", ("train", "validation", "test"), config="wikitext-2-raw-v1"
        ),
        "wikitext-103": Source(
            "Salesforce/wikitext", "articles", ("train", "validation", "test"), config="wikitext-103-raw-v1"
        ),
        "squad_v2": Source("rajpurkar/squad_v2", "rows", ("train", "validation")),
        # Gated: its terms are accepted once on the hub, then `hf auth login`.
        "flores": Source(
            "openlanguagedata/flores_plus",
            "languages",
            ("dev", "devtest"),
            config="eng_Latn-deu_Latn",
            aliases=(("validation", "dev"), ("test", "devtest")),
        ),
        "ntrex": Source("mteb/NTREX", "columns", ("test",), config="eng_Latn-deu_Latn"),
    }
)
"""Built-in name -> source. A built-in name wins over a folder of the same name; write `./wikitext` for the folder."""

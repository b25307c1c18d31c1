"""Parallel text: language pairs, and the translation prompt.

A pair is written `source-target` with ISO 639-3 codes, with or without the script: `eng_Latn-deu_Latn`, `eng-deu`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from datasets import Dataset, Features, Value

from data.columns import content_id, with_unique_ids

Pair = tuple[str, str]

_CODE = r"[a-z]{3}(?:-[A-Z]{2})?(?:_[A-Z][a-z]{3}(?:_[a-z0-9]+)?)?"
_PAIR = re.compile(f"({_CODE})-({_CODE})")

# Names for the prompt; a language that is not listed appears by its code.
_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "arb": "Arabic",
        "ben": "Bengali",
        "ces": "Czech",
        "cmn": "Chinese",
        "dan": "Danish",
        "deu": "German",
        "ell": "Greek",
        "eng": "English",
        "fin": "Finnish",
        "fra": "French",
        "heb": "Hebrew",
        "hin": "Hindi",
        "hun": "Hungarian",
        "ind": "Indonesian",
        "ita": "Italian",
        "jpn": "Japanese",
        "kor": "Korean",
        "nld": "Dutch",
        "pol": "Polish",
        "por": "Portuguese",
        "ron": "Romanian",
        "rus": "Russian",
        "spa": "Spanish",
        "swe": "Swedish",
        "tur": "Turkish",
        "ukr": "Ukrainian",
        "vie": "Vietnamese",
        "zho": "Chinese",
    }
)


def parse_pair(config: str) -> Pair:
    """`eng_Latn-deu_Latn` or `eng-deu` to its two codes; ValueError otherwise."""
    found = _PAIR.fullmatch(config)
    if found is None:
        raise ValueError(f"expected a language pair, got {config!r}; do write it like 'eng_Latn-deu_Latn' or 'eng-deu'")
    return found.group(1), found.group(2)


def has_script(code: str) -> bool:
    """Whether `code` names its script (`eng_Latn`) and so needs no look-up."""
    return "_" in code


def match_language(code: str, available: Sequence[str], where: str) -> str:
    """The one of `available` that `code` names, exactly or without its script; ValueError if none or several do."""
    if code in available:
        return code
    matches = sorted(name for name in available if name.startswith(f"{code}_"))
    if len(matches) == 1:
        return matches[0]
    near = matches or sorted(name for name in available if name[:3] == code[:3]) or sorted(available)[:5]
    raise ValueError(f"expected one language of {where} for {code!r}, got {len(matches)}; do name one such as {near}")


def language_name(code: str) -> str:
    """The name of a language for a prompt: `deu_Latn` -> `German`; the code itself where no name is listed."""
    return _NAMES.get(code[:3], code)


def translations(
    sources: Sequence[str], targets: Sequence[str], pair: Pair | None, ids: Sequence[str] | None
) -> Dataset:
    """Documents `English: ...` / `German:` with the translation, after a space, as completion.

    Without `pair` the two sides are called Source and Target. `ids` default to `content_id`. The two sequences are
    aligned: the caller has checked that their lengths agree.
    """
    source, target = ("Source", "Target") if pair is None else (language_name(pair[0]), language_name(pair[1]))
    prompts = [f"{source}: {text}\n{target}:" for text in sources]
    completions = [f" {text}" for text in targets]
    if ids is None:
        ids = [content_id(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    columns = {"id": list(ids), "prompt": prompts, "completion": completions}
    documents = Dataset.from_dict(columns, features=Features({name: Value("string") for name in columns}))
    return with_unique_ids(documents).select_columns(list(columns))

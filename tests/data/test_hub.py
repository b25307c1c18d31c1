"""Hub sources: the mappings on small datasets of the hub's schema, and the loader's failures, without a network."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from data import load_documents, split_names
from data.columns import to_documents
from data.hub import from_columns, join_languages
from data.parallel import parse_pair
from data.sources import SOURCES
from data.wikitext import articles


def test_squad_v2_schema() -> None:
    rows = Dataset.from_dict(
        {
            "id": ["a1", "b2"],
            "title": ["T", "T"],
            "context": ["The sky is blue.", "The sky is blue."],
            "question": [" What colour is the sky?", "What is the sea?"],
            "answers": [
                {"text": ["blue", "Blue"], "answer_start": [11, 11]},
                {"text": [], "answer_start": []},
            ],
        }
    )
    documents = to_documents(rows, "squad_v2")
    assert documents.column_names == ["id", "prompt", "completion", "answers"]
    assert documents["id"][:] == ["a1", "b2"]
    assert documents["prompt"][0] == "Context: The sky is blue.\nQuestion: What colour is the sky?\nAnswer:"
    assert documents["completion"][:] == [" blue", " unanswerable"]
    assert documents["answers"][:] == [["blue", "Blue"], []]


def test_text_and_question_answer_schemas() -> None:
    text = to_documents(Dataset.from_dict({"text": ["one", "  \n", "two"], "url": ["", "", ""]}), "t")
    assert (text["prompt"][:], text["completion"][:]) == (["", ""], ["one", "two"])
    maths = to_documents(Dataset.from_dict({"question": ["1+1?"], "answer": ["2"]}), "m")
    assert (maths["prompt"][:], maths["completion"][:]) == (["Question: 1+1?\nAnswer:"], [" 2"])


def test_unknown_columns_and_conversations_are_named() -> None:
    with pytest.raises(ValueError, match=r"in some/set, got \['label', 'messages'\]; do rename them"):
        to_documents(Dataset.from_dict({"messages": ["x"], "label": [1]}), "some/set")
    chat = Dataset.from_dict({"prompt": [[{"role": "user", "content": "x"}]], "completion": ["y"]})
    with pytest.raises(ValueError, match="expected text in 'prompt' of row 0 of some/set, got list"):
        to_documents(chat, "some/set")


def test_wikitext_articles_concatenate_to_the_joined_text() -> None:
    lines = [
        "",
        " = First = \n",
        "",
        " Body = with signs = \n",
        " = = Section = = \n",
        "",
        " = Second One = \n",
        " x \n",
        "",
    ]
    whole = articles(Dataset.from_dict({"text": lines}))
    assert "".join(whole["text"]) == "\n\n".join(lines)
    assert len(whole) == 2
    assert whole["text"][1].startswith(" = Second One = ")
    documents = to_documents(whole, "wikitext")
    assert documents["completion"][:] == whole["text"][:]


def test_wikitext_real_text(datapack: Path) -> None:
    joined = (datapack / "text" / "wikitext2.test.txt").read_text(encoding="utf-8")
    rows, rest = [], joined
    while rest:
        row, _, after = ("", "", rest) if rest.startswith("\n\n") else rest.partition("\n")
        rows.append(f"{row}\n" if row else "")
        rest = after.removeprefix("\n\n")
    whole = articles(Dataset.from_dict({"text": rows}))
    assert "".join(whole["text"]).strip() == joined.strip()
    # WikiText-2's test split has 60 articles; a few table rows look like titles.
    assert 60 <= len(whole) <= 66


def test_flores_schema_is_joined_by_id() -> None:
    english = Dataset.from_dict({"id": [1, 2], "iso_639_3": ["eng"] * 2, "text": ["Yes.", "No."]})
    german = Dataset.from_dict({"id": [2, 1], "iso_639_3": ["deu"] * 2, "text": ["Nein.", "Ja."]})
    documents = join_languages(english, german, ("eng_Latn", "deu_Latn"), "dev")
    assert documents["id"][:] == ["dev-1", "dev-2"]
    assert documents["prompt"][0] == "English: Yes.\nGerman:"
    assert documents["completion"][:] == [" Ja.", " Nein."]
    with pytest.raises(ValueError, match="expected the same sentence ids for eng_Latn and deu_Latn, got 1 that"):
        join_languages(english, german.select([0]), ("eng_Latn", "deu_Latn"), "dev")


def test_ntrex_schema_has_a_column_per_language() -> None:
    rows = Dataset.from_dict({"eng_Latn": ["Yes."], "deu_Latn": ["Ja."], "srp_Cyrl": ["Да."], "srp_Latn": ["Da."]})
    documents = from_columns(rows, "NTREX", "test", "eng-deu")
    assert documents[0] == {"id": "test-0", "prompt": "English: Yes.\nGerman:", "completion": " Ja."}
    assert from_columns(rows, "NTREX", "test", "deu_Latn-srp_Cyrl")["prompt"][0] == "German: Ja.\nsrp_Cyrl:"
    with pytest.raises(ValueError, match=r"one language of NTREX for 'srp', got 2; do name one .*srp_Cyrl.*srp_Latn"):
        from_columns(rows, "NTREX", "test", "eng-srp")
    with pytest.raises(ValueError, match="for 'fra', got 0"):
        from_columns(rows, "NTREX", "test", "eng-fra")


@pytest.mark.parametrize("config", ["eng_Latn-deu_Latn", "eng-deu", "eng-GB_Latn-deu", "cat_Latn_vale1240-deu_Latn"])
def test_language_pairs(config: str) -> None:
    assert "-".join(parse_pair(config)) == config


def test_built_in_splits_need_no_hub() -> None:
    assert split_names("wikitext") == ("train", "validation", "test")
    assert SOURCES["flores"].hub_split("test", "flores") == "devtest"
    with pytest.raises(ValueError, match=r"one of \['train', 'validation'\], got 'test'; do pass one of these"):
        load_documents("squad_v2", "test")
    with pytest.raises(ValueError, match=r"\['test'\], got 'train'; do pass one of these"):
        load_documents("ntrex")


@pytest.mark.parametrize(
    ("name", "split"), [("squad_v2", "train"), ("some/dataset", "train"), ("flores", "validation")]
)
def test_no_network_is_one_line(name: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"expected to reach the hub for .*; do check the network") as caught:
        load_documents(name, split)
    assert "\n" not in str(caught.value)
    if name == "some/dataset":
        with pytest.raises(ConnectionError, match="expected to reach the hub"):
            split_names(name)


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("gated\ndataset"),
            FileNotFoundError,
            "got: gated dataset; .*auth login",
        ),
        (ValueError("Unknown split 'dev'. Should be one of ['train']."), ValueError, "got: Unknown split 'dev'"),
        (RuntimeError("Dataset scripts are no longer supported"), ValueError, "got: Dataset scripts are no longer"),
    ],
)
def test_loader_failures_are_one_line(
    raised: Exception, expected: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(expected, match=message):
        load_documents("some/dataset")

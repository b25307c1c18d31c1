"""Files and folders: what they become, and one clear line for everything that can be wrong with them."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from data import load_documents, split_names

ROWS = [{"prompt": "Q: a\nA:", "completion": " one"}, {"prompt": "", "completion": "two ü"}]
COLUMNS = ["id", "prompt", "completion"]


def test_jsonl_keeps_text_and_order(write_jsonl: Callable[..., Path]) -> None:
    documents = load_documents(str(write_jsonl(ROWS)))
    assert documents.column_names == COLUMNS
    assert [{key: row[key] for key in ROWS[0]} for row in documents] == ROWS
    assert len(set(documents["id"])) == 2


@pytest.mark.parametrize(("opener", "suffix"), [(lzma.open, ".xz"), (gzip.open, ".gz")])
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_compressed_equals_plain(write_jsonl: Callable[..., Path], opener, suffix: str, kind: str) -> None:
    plain = write_jsonl(ROWS, f"plain{kind}")
    packed = plain.with_name(f"packed{kind}{suffix}")
    with opener(packed, "wb") as file:
        file.write(plain.read_bytes())
    assert load_documents(str(packed)).to_dict() == load_documents(str(plain)).to_dict()


def test_a_rewritten_file_is_read_again(write_jsonl: Callable[..., Path]) -> None:
    assert load_documents(str(write_jsonl(ROWS)))["completion"][0] == " one"
    assert load_documents(str(write_jsonl([{"prompt": "", "completion": "new"}])))["completion"][:] == ["new"]


def test_ids_follow_the_text_and_are_unique(write_jsonl: Callable[..., Path]) -> None:
    ids = load_documents(str(write_jsonl(ROWS)))["id"][:]
    reordered = load_documents(str(write_jsonl([ROWS[1], ROWS[0], ROWS[1]], "again.jsonl")))["id"][:]
    assert reordered == [ids[1], ids[0], f"{ids[1]}#2"]


def test_own_ids_and_answers_are_kept(write_jsonl: Callable[..., Path]) -> None:
    rows = [{**ROWS[0], "id": 7, "answers": ["one", "1"]}, {**ROWS[1], "id": 8, "answers": []}]
    documents = load_documents(str(write_jsonl(rows)))
    assert documents["id"][:] == ["7", "8"]
    assert documents["answers"][:] == [["one", "1"], []]


def test_answers_that_are_all_empty(write_jsonl: Callable[..., Path]) -> None:
    documents = load_documents(str(write_jsonl([{**ROWS[0], "answers": []}])))
    assert documents["answers"][:] == [[]]


def test_extra_columns_are_dropped_and_limit_keeps_the_first(write_jsonl: Callable[..., Path]) -> None:
    documents = load_documents(str(write_jsonl([{**row, "note": 1} for row in ROWS])), limit=1)
    assert documents.column_names == COLUMNS
    assert documents["completion"][:] == [" one"]
    assert len(load_documents(str(write_jsonl(ROWS, "other.jsonl")), limit=99)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree\n\n\n  \nfour", ["one\ntwo", "three", "four"]),
        ("one\ntwo\nthree\n", ["one", "two", "three"]),
        ("\none\ntwo\n\n", ["one", "two"]),
    ],
)
def test_text_is_cut_at_blank_lines_or_else_at_lines(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    documents = load_documents(str(path))
    assert documents["completion"][:] == expected
    assert set(documents["prompt"]) == {""}
    with lzma.open(tmp_path / "a.txt.xz", "wt", encoding="utf-8") as file:
        file.write(text)
    assert load_documents(str(tmp_path / "a.txt.xz")).to_dict() == documents.to_dict()


def test_two_aligned_files(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("Good day.\nYes.\n", encoding="utf-8")
    (tmp_path / "t.txt").write_text("Guten Tag.\nJa.\n", encoding="utf-8")
    name = f"{tmp_path}/s.txt:{tmp_path}/t.txt"
    named = load_documents(name, config="eng-deu_Latn")
    assert named["prompt"][0] == "English: Good day.\nGerman:"
    assert named["completion"][:] == [" Guten Tag.", " Ja."]
    assert load_documents(name)["prompt"][1] == "Source: Yes.\nTarget:"
    (tmp_path / "t.txt").write_text("Guten Tag.\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected as many lines in .*t\.txt as in .*s\.txt, 2, got 1; do align"):
        load_documents(name)
    with pytest.raises(ValueError, match=r"expected two files as source.txt:target.txt"):
        load_documents(f"{name}:third.txt")
    with pytest.raises(FileNotFoundError, match=r"expected a file or folder at .*none\.txt"):
        load_documents(f"{tmp_path}/s.txt:{tmp_path}/none.txt")
    with pytest.raises(ValueError, match="expected a language pair, got 'english'"):
        load_documents(name, config="english")


def test_folder_of_splits(write_jsonl: Callable[..., Path]) -> None:
    folder = write_jsonl(ROWS, "set/train.jsonl").parent
    with lzma.open(folder / "test.jsonl.xz", "wt") as file:
        file.write('{"prompt": "", "completion": "held out"}\n')
    assert split_names(str(folder)) == ("train", "test")
    assert len(load_documents(str(folder))) == 2
    assert load_documents(str(folder), "test")["completion"][:] == ["held out"]
    with pytest.raises(ValueError, match=r"expected a split of .*set, one of \['train', 'test'\], got 'validation'"):
        load_documents(str(folder), "validation")
    write_jsonl(ROWS, "set/test.jsonl")
    with pytest.raises(
        ValueError, match=r"expected one file for split 'test' in .*got \['test.jsonl', 'test.jsonl.xz'\]"
    ):
        load_documents(str(folder), "test")


GOOD = '{"prompt": "p", "completion": "c"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{GOOD}oops\n", "expected a JSON object at .*, line 2, got 'oops'; do correct or remove the line"),
        (f"{GOOD}\n{GOOD}[1]\n", "line 2, got a blank line"),
        (f"{GOOD}[1, 2]\n", "line 2, got list"),
        (
            f'{GOOD}{{"prompt": "p"}}\n',
            r"expected the keys prompt and completion at .*line 2, got \['prompt'\]; do add",
        ),
        (f'{GOOD}{{"prompt": "p", "completion": null}}\n', "expected text in 'completion' at .*line 2, got NoneType"),
        (f'{GOOD}{{"prompt": 5, "completion": "c"}}\n', "expected text in 'prompt' at .*line 2, got int"),
        ('{"prompt": 5, "completion": "c"}\n', "expected text in 'prompt' at .*line 1, got int"),
        ('{"prompt": ["p"], "completion": "c"}\n', "expected text in 'prompt' at .*line 1, got list"),
        (f'{GOOD}{{"prompt": "p", "completi', "line 2, got"),
        (
            '{"chosen": "p", "rejected": "c"}\n',
            r"expected columns prompt\+completion or .*got \['chosen', 'rejected'\]",
        ),
        ('{"prompt": "p"}\n', r"expected columns prompt\+completion or .*got \['prompt'\]; do rename"),
        ('{"prompt": "", "completion": "c", "answers": "c"}\n', "expected answers as a list of strings, got str"),
        ("", "expected at least one document in .*, got an empty file"),
        ("\n", "line 1, got a blank line"),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_documents(str(path))
    assert "\n" not in str(caught.value)
    if content:
        packed = tmp_path / "bad.jsonl.xz"
        packed.write_bytes(lzma.compress(content.encode()))
        with pytest.raises(ValueError, match=message):
            load_documents(str(packed))


def test_bad_paths_and_arguments(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    for name in (f"{tmp_path}/none.jsonl", "none.jsonl.xz", "./none", "none.txt"):
        with pytest.raises(FileNotFoundError, match=r"expected a file or folder at .*none.*, got nothing there"):
            load_documents(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected train.jsonl, validation.jsonl or test.jsonl in .*empty"):
        load_documents(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"expected train.jsonl, validation.jsonl or test.jsonl in .*empty"):
        split_names(str(tmp_path / "empty"))
    path = str(write_jsonl(ROWS))
    assert split_names(path) == ("train",)
    with pytest.raises(ValueError, match=r"a single file is one split\), got 'test'; do pass a folder with test.jsonl"):
        load_documents(path, "test")
    with pytest.raises(ValueError, match=r"expected no configuration for .*, got 'main'"):
        load_documents(path, config="main")
    with pytest.raises(ValueError, match="expected limit of at least 1 document, got 0"):
        load_documents(path, limit=0)
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"expected a file ending in .jsonl, .json or .txt .*table.csv"):
        load_documents(str(tmp_path / "table.csv"))
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"expected at least one document in .*blank.txt, got none"):
        load_documents(str(tmp_path / "blank.txt"))
    (tmp_path / "broken.jsonl.xz").write_bytes(lzma.compress(GOOD.encode())[:-8])
    with pytest.raises(ValueError, match=r"expected UTF-8 text in .*broken.jsonl.xz"):
        load_documents(str(tmp_path / "broken.jsonl.xz"))


def test_real_files(datapack: Path) -> None:
    squad = load_documents(str(datapack / "tasks" / "squad.dev.jsonl.xz"))
    assert squad.column_names == [*COLUMNS, "answers"]
    assert len(squad) == 1370
    assert sum(not answers for answers in squad["answers"]) == 695
    assert len(load_documents(str(datapack / "tasks" / "gsm8k.dev.jsonl.xz"))) == 1319
    text = datapack / "text"
    pairs = load_documents(f"{text}/newstest2019-src.eng.txt:{text}/newstest2019-ref.deu.txt", config="eng-deu")
    assert len(pairs) == 1997
    assert pairs["prompt"][0].startswith("English: ")

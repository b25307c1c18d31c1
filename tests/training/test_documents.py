"""Documents of a fit: parts that never share one or most of one, and a mask that scores completions alone."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import training.documents
from runtime import load_tokenizer
from training.amounts import Amounts
from training.documents import FEW_ROWS, MOST_PADDING, PARTS, batches, load_corpus, load_split, make_batch
from training.leaks import NGRAM_WORDS, SHARE, TEMPLATE_SHARE, TEMPLATE_TEXTS, leaked, ngrams

FIT = Amounts(train_documents=12, validation_documents=6, test_documents=6, max_tokens=40, min_completion_tokens=8)


@pytest.fixture(scope="module")
def tokenizer(case):
    return load_tokenizer(case.model)


def ids_of(part):
    return {example["id"] for example in part}


def text_of(part):
    return {tuple(example["input_ids"]) for example in part}


def write(path, count):
    rows = ({"prompt": f"the {n}", "completion": " rank of a page is" * 3 + f" rung {n}"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_file_is_split_by_document(tmp_path, tokenizer, seed):
    corpus = load_corpus(write(tmp_path / "all.jsonl", 40), tokenizer, FIT, seed)
    parts = (corpus.train, corpus.validation, corpus.test)
    assert [len(part) for part in parts] == [12, 6, 6]
    assert len(set().union(*map(ids_of, parts))) == len(set().union(*map(text_of, parts))) == 24


def test_the_split_follows_the_seed(tmp_path, tokenizer):
    path = write(tmp_path / "all.jsonl", 40)
    first, again, other = (load_corpus(path, tokenizer, FIT, seed) for seed in (0, 0, 1))
    assert first == again
    assert ids_of(first.test) != ids_of(other.test)


def test_copies_of_a_document_stay_on_one_side(tmp_path, tokenizer):
    path = tmp_path / "copies.jsonl"
    once = write(path, 24)
    path.write_text(path.read_text() * 3)
    corpus = load_corpus(once, tokenizer, FIT, seed=0)
    parts = [text_of(part) for part in (corpus.train, corpus.validation, corpus.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_a_datasets_own_splits_are_kept(case, tokenizer):
    corpus = load_corpus(str(case.dataset), tokenizer, FIT, seed=0)
    for name in ("train", "validation", "test"):
        own = [json.loads(line) for line in (case.dataset / f"{name}.jsonl").read_text().splitlines()]
        prompts = {document["prompt"] for document in own}
        for example in getattr(corpus, name):
            prompt = tokenizer.decode(example["input_ids"][: example["prompt_tokens"]], skip_special_tokens=True)
            assert prompt in prompts


def numbered(numbers):
    return [{"prompt": f"the {n}", "completion": " rank of a page is" * 3 + f" rung {n}"} for n in numbers]


@pytest.fixture
def folder(tmp_path):
    """`folder(**splits)`: a dataset of these documents."""

    def make(**splits):
        for name, rows in splits.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path)

    return make


def test_given_splits_lose_what_an_earlier_one_has(folder, tokenizer):
    path = folder(train=numbered(range(20)), validation=numbered(range(15, 30)), test=numbered([0, 1, *range(25, 40)]))
    corpus = load_corpus(path, tokenizer, replace(FIT, validation_documents=50, test_documents=50), seed=0)
    parts = [text_of(part) for part in (corpus.train, corpus.validation, corpus.test)]
    assert [len(part) for part in parts] == [12, 10, 10]
    assert len(set.union(*parts)) == 32
    assert corpus.leaked == 5 + 2 + 5
    assert load_split(path, "validation")["prompt"][:] == [f"the {n}" for n in range(20, 30)]
    assert load_split(path, "test")["prompt"][:] == [f"the {n}" for n in range(30, 40)]
    assert load_split(path, "train")["prompt"][:] == [f"the {n}" for n in range(20)]
    assert len(load_split(path, "all")) == 20 + 15 + 17


def test_a_test_split_that_is_all_in_train_is_refused_in_one_line(folder, tokenizer):
    path = folder(train=numbered(range(20)), validation=numbered(range(20, 30)), test=numbered(range(5)))
    with pytest.raises(
        ValueError, match="expected documents in 'test' that no earlier split has half of, got none of 5"
    ):
        load_corpus(path, tokenizer, FIT, seed=0)


TEMPLATE = "Below is a question about a page; read all of it, and say in one word which rung it needs.\n"


def own(number, words=24):
    """Words of one document that no other has."""
    return [f"{number}.{word}" for word in range(words)]


def document(words):
    return {"prompt": TEMPLATE, "completion": " ".join(words)}


def near_copy(number):
    """Document `number` with the last half of its words replaced."""
    return document([*own(number)[:12], *(f"not-{word}" for word in own(number)[12:])])


def fresh(numbers):
    return [document(own(number)) for number in numbers]


@given(words=st.integers(16, 60), number=st.integers(0, 29), template=st.sampled_from([TEMPLATE, ""]))
def test_who_has_half_of_an_earlier_text_leaks_and_who_has_its_template_does_not(words, number, template):
    """Behind a template every word ends a run of eight that no other text has; without one the first seven do not."""
    earlier = [template + " ".join(own(number, words)) for number in range(30)]
    first = 0 if template else NGRAM_WORDS - 1
    half = first + (words - first + 1) // 2
    less, enough = (
        template + " ".join([*own(number, words)[:kept], *own("else", words)[kept:]]) for kept in (half - 1, half)
    )
    alone = template + " ".join(own("alone", words))
    assert leaked([alone, enough, alone.upper()], earlier) == [False, True, False]
    assert leaked([enough.upper(), less], earlier) == [True, False]


def by_the_book(texts, earlier):
    """What `leaked` says, from the words themselves."""
    runs = [
        {tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)}
        for words in (text.casefold().split() for text in (*texts, *earlier))
    ]
    number = len(runs)
    held = Counter(run for some in runs for run in some)
    taken = set().union(*runs[len(texts) :])
    most = max(TEMPLATE_SHARE * number, min(TEMPLATE_TEXTS, number / 2))
    counted = [{run for run in some if held[run] <= most} for some in runs[: len(texts)]]
    return [
        text in earlier or (len(some) > 0 and len(some & taken) >= SHARE * len(some))
        for text, some in zip(texts, counted, strict=True)
    ]


pieces = st.tuples(st.integers(0, 30), st.integers(0, 14), st.booleans()).map(
    lambda piece: " ".join(f"{'Straße' if piece[2] else 'STRASSE'}{i}" for i in range(piece[0], piece[0] + piece[1]))
)
texts_of_pieces = st.lists(st.lists(pieces, max_size=3).map("\n".join), max_size=9)


@given(texts_of_pieces, texts_of_pieces, st.integers(1, 6), st.integers(1, 6))
def test_leaks_are_those_of_the_words_themselves(texts, earlier, own_copies, copies):
    """Any overlap of any length, nothing at all, exact copies, and what becomes a template by its number."""
    texts = texts[:1] * own_copies + texts[1:]
    earlier = earlier[:1] * copies + earlier[1:]
    assert leaked(texts, iter(earlier)) == by_the_book(texts, earlier)


@pytest.mark.parametrize(("number", "most"), [(4, 2), (40, 4), (400, 8)])
def test_what_many_texts_share_is_a_template(number, most):
    """More than half of a few texts, more than four of some, more than 2 % of many; whichever side they are on."""
    shared = " ".join(own("shared"))
    for copies in (most, most + 1):
        texts = [" ".join([shared, *own(n)[:5]]) if n < copies else " ".join(own(n)) for n in range(number)]
        assert leaked(texts[:1], texts[1:]) == [copies == most]
        assert leaked(texts[:-1], [shared])[0] == (copies < most)


def test_short_texts_leak_as_exact_copies_only():
    short = "the rank of a page is four"
    assert len(short.split()) == NGRAM_WORDS - 1
    assert leaked([short, short.upper(), short + " bits"], [short, "nothing"]) == [True, False, False]


def test_ngrams_are_the_same_in_every_process():
    text = " ".join(own("straße")) + "\u3000İ"
    script = f"from training.leaks import ngrams; print(ngrams({text!r}).tolist())"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
        assert json.loads(found.stdout) == ngrams(text).tolist()


EVERYTHING = Amounts(
    train_documents=999, validation_documents=999, test_documents=999, max_tokens=4000, min_completion_tokens=1
)


def numbers_of(part):
    return [completion.split(".")[0] for completion in part["completion"]]


def test_near_copies_of_every_earlier_split_are_left_out_and_counted(folder, tokenizer):
    """Of train and of validation, for test; of train alone, for validation, whatever test has."""
    path = folder(
        train=fresh(range(30)),
        validation=[near_copy(0), *fresh(range(30, 40)), document(own(50))],
        test=[near_copy(1), near_copy(30), document(own(2)), *fresh(range(50, 60)), near_copy(51)],
    )
    kept = {name: load_split(path, name) for name in PARTS}
    assert numbers_of(kept["train"]) == [str(n) for n in range(30)]
    assert numbers_of(kept["validation"]) == [str(n) for n in (*range(30, 40), 50)]
    assert numbers_of(kept["test"]) == [str(n) for n in (*range(51, 60), 51)]
    corpus = load_corpus(path, tokenizer, EVERYTHING, seed=0)
    assert corpus.leaked == 1 + 4
    for name in PARTS:
        assert ids_of(getattr(corpus, name)) == set(kept[name]["id"]), name


def test_test_is_judged_by_the_splits_as_they_were_read(folder, tokenizer):
    """A near copy of what validation lost, which shares seven words with train, is left out by both ways in."""
    path = folder(
        train=fresh(range(30)),
        validation=[near_copy(0), *fresh(range(30, 40))],
        test=[document([*own("new")[:5], *near_copy(0)["completion"].split()[5:]]), *fresh(range(40, 50))],
    )
    corpus = load_corpus(path, tokenizer, EVERYTHING, seed=0)
    assert numbers_of(load_split(path, "test")) == [str(n) for n in range(40, 50)]
    assert ids_of(corpus.test) == set(load_split(path, "test")["id"])
    assert corpus.leaked == 2


@pytest.mark.parametrize("seed", [0, 1])
def test_parts_of_one_file_lose_near_copies_too(folder, tokenizer, seed):
    """Twins that differ in half of their words: behind a template that all share, each is a group of its own."""
    path = folder(train=[twin for n in range(40) for twin in (document(own(n)), near_copy(n))])
    parts = {name: numbers_of(load_split(path, name, seed)) for name in PARTS}
    taken = [set(numbers) for numbers in parts.values()]
    assert not taken[0] & taken[1]
    assert not (taken[0] | taken[1]) & taken[2]
    corpus = load_corpus(path, tokenizer, EVERYTHING, seed)
    assert corpus.leaked == 80 - sum(map(len, parts.values())) > 0
    for name in PARTS:
        assert ids_of(getattr(corpus, name)) == set(load_split(path, name, seed)["id"]), name


def test_a_test_split_of_near_copies_is_refused_in_one_line(folder, tokenizer):
    path = folder(train=fresh(range(20)), validation=fresh(range(20, 30)), test=[near_copy(n) for n in range(5)])
    for load in (lambda: load_corpus(path, tokenizer, EVERYTHING, seed=0), lambda: load_split(path, "test")):
        with pytest.raises(ValueError, match=r"expected .* 'test' .* got none of 5; do give other text") as caught:
            load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "split", "seen"),
    [
        (("train", "validation", "test"), "test", ["train", "validation"]),
        (("test", "validation", "train"), "validation", ["train"]),
        (("train", "validation", "test", "extra"), "extra", ["train", "validation"]),
        (("train", "test"), "test", ["train"]),
        (("test", "validation"), "validation", ["test"]),
        (("dev", "devtest"), "devtest", ["dev"]),
    ],
)
def test_a_split_is_held_against_what_a_fit_sees(monkeypatch, names, split, seen):
    """What a fit trains on and sets its knobs on: two of three given splits, or all of the one that it divides."""
    texts = {name: Dataset.from_list([{"id": name, **document(own(name))}]) for name in names}
    monkeypatch.setattr(training.documents, "split_names", lambda dataset: names)
    monkeypatch.setattr(training.documents, "load_documents", lambda dataset, name: texts[name])
    given = []
    monkeypatch.setattr(training.documents, "without_leaks", lambda *arguments: given.append(arguments))
    load_split("any", split)
    [(documents, earlier, name)] = given
    assert (documents["id"][0], [part["id"][0] for part in earlier], name) == (split, seen, split)


def test_two_given_splits(folder):
    """A fit divides train in three; a split of another name keeps its documents, less those of train."""
    path = folder(train=numbered(range(20)), test=numbered(range(15, 30)))
    assert load_split(path, "test")["prompt"][:] == [f"the {n}" for n in range(20, 30)]
    parts = [set(load_split(path, name)["prompt"]) for name in ("train", "validation")]
    assert parts[0]
    assert parts[1]
    assert not parts[0] & parts[1]
    with pytest.raises(
        ValueError, match=r"split: expected one of \['train', 'validation', 'test', 'all'\] of .* 'dev'"
    ):
        load_split(path, "dev")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_questions_about_one_context_stay_on_one_side(folder, seed):
    rows = [
        {"prompt": f"Context: page {n // 4}\nQuestion: rung {n}?\nAnswer:", "completion": f" rank {n}"}
        for n in range(80)
    ]
    path = folder(train=rows)
    contexts = [
        {prompt.split("\n")[0] for prompt in load_split(path, name, seed)["prompt"]}
        for name in ("train", "validation", "test")
    ]
    assert [len(part) for part in contexts] == [10, 5, 5]
    assert len(set.union(*contexts)) == 20


def test_a_first_line_that_all_prompts_share_is_no_group(folder):
    rows = [{"prompt": f"Answer the question.\nrung {n % 30}?", "completion": f" rank {n % 30}"} for n in range(60)]
    path = folder(train=rows)
    parts = [set(load_split(path, name)["prompt"]) for name in ("train", "validation", "test")]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30


def test_an_empty_folder_is_refused_in_one_line(tmp_path, tokenizer):
    for load in (lambda: load_corpus(str(tmp_path), tokenizer, FIT, seed=0), lambda: load_split(str(tmp_path), "test")):
        with pytest.raises(FileNotFoundError, match=r"expected train.jsonl, .* got none; do add them") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_documents_are_cut_and_short_ones_left_out(tmp_path, tokenizer):
    path = tmp_path / "mixed.jsonl"
    long, short = " rank of a page" * 40, " a"
    rows = [{"prompt": f"the {n}", "completion": short if n % 2 else long} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(str(path), tokenizer, FIT, seed=0)
    for example in (*corpus.train, *corpus.validation, *corpus.test):
        assert len(example["input_ids"]) == FIT.max_tokens


@pytest.mark.parametrize(("count", "match"), [(2, "at least 3 different documents"), (0, "expected")])
def test_too_little_text_is_refused_in_one_line(tmp_path, tokenizer, count, match):
    with pytest.raises(ValueError, match=match) as caught:
        load_corpus(write(tmp_path / "few.jsonl", count), tokenizer, FIT, seed=0)
    assert "\n" not in str(caught.value)


def test_only_logits_that_predict_completion_tokens_are_scored(make_example):
    examples = [make_example(n, p, seed=n) for n, p in ((9, 4), (6, 0), (7, 1), (5, 5))]
    batch = make_batch(examples)
    for row, example in enumerate(examples):
        length, prompt = len(example["input_ids"]), example["prompt_tokens"]
        for t in range(batch.tokens.shape[1]):
            assert bool(batch.real[row, t]) == (t < length)
            assert bool(batch.scored[row, t]) == (t + 1 < length and t + 1 >= prompt)
            if t < length:
                assert int(batch.tokens[row, t]) == example["input_ids"][t]
    assert batch.prompt_tokens.tolist() == [4, 0, 1, 5]
    assert batch.to(torch.device("cpu")).tokens is batch.tokens


def test_batches_hold_every_document_once_with_like_lengths_together(make_example):
    examples = [make_example(n, 0, seed=i) for i, n in enumerate((9, 30, 8, 31, 7, 29, 10))]
    found = list(batches(examples, 3))
    assert sorted(i for index, _ in found for i in index) == list(range(7))
    assert [len(index) for index, _ in found] == [3, 3, 1]
    assert [batch.tokens.shape[1] for _, batch in found] == [9, 30, 31]
    for index, batch in found:
        for row, i in enumerate(index):
            assert batch.tokens[row, batch.real[row]].tolist() == examples[i]["input_ids"]


def test_batches_keep_to_their_positions_and_one_document_may_exceed_them(make_example):
    examples = [make_example(n, 0, seed=i) for i, n in enumerate((9, 30, 8, 31, 7, 29, 10))]
    found = list(batches(examples, 3, positions=20))
    assert sorted(i for index, _ in found for i in index) == list(range(7))
    assert [tuple(batch.tokens.shape) for _, batch in found] == [(2, 8), (2, 10), (1, 29), (1, 30), (1, 31)]


@given(st.lists(st.integers(1, 160), min_size=1, max_size=60), st.integers(1, 30))
def test_no_batch_pads_much(lengths, rows):
    """Of more than a few rows; a batch of few may, or every odd length would be a batch of its own."""
    examples = [{"id": i, "input_ids": [3] * n, "prompt_tokens": 0} for i, n in enumerate(lengths)]
    seen = []
    for index, batch in batches(examples, rows):
        seen += index
        assert len(index) <= rows
        real = int(batch.real.sum())
        assert batch.real.numel() - real <= MOST_PADDING * real or len(index) <= FEW_ROWS
    assert sorted(seen) == list(range(len(lengths)))

"""Text as tokens come: what is told is what all of it is, nothing of a stop string, and nothing too early."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from runtime.engine.text import UNFINISHED, Text

BYTES = ("a", "b", "c", "ab", "Ġa", "Ċ", "Ã", "©", "c©Ã", "ðŁ", "ĺ", "Ģ", "<end>", "ï¿½", "b©")
"""As byte-level tokenizers write them: Ġ is a space, Ã and © are é, ðŁ, ĺ and Ģ a smiling face."""
WORDS = ("▁a", "b", "▁b", "▁", "c", "<end>")


def tokenizer_of(tokens, decoder):
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=tokens[0]))
    made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def of_bytes():
    return tokenizer_of(BYTES, decoders.ByteLevel())


@pytest.fixture(scope="module")
def of_words():
    return tokenizer_of(WORDS, decoders.Metaspace())


def told(tokenizer, tokens, stop=()):
    """What is shown after every token up to one that stops it, at the end as if it was over, and whether it stopped."""
    text, found = Text(tokenizer, stop), []
    for number, token in enumerate(tokens):
        text.add(token)
        over = text.stopped or number == len(tokens) - 1
        found.append(text.shown(over=over))
        if text.stopped:
            break
    assert all(after.startswith(before) for before, after in itertools.pairwise(found)), "nothing is taken back"
    return found, text.stopped


def numbers(tokens, *names):
    return [tokens.index(name) for name in names]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_pieces_of_every_text_are_the_text(of_bytes, of_words, length):
    """With a stop string that is not there as well: what is held back comes later."""
    for tokenizer, tokens in ((of_bytes, BYTES), (of_words, WORDS)):
        for ids in itertools.product(range(len(tokens)), repeat=length):
            whole = tokenizer.decode(list(ids), skip_special_tokens=True)
            for stop in ((), ("a?", "b??")):
                found, stopped = told(tokenizer, ids, stop)
                assert found[-1] == whole
                assert not stopped


def test_longer_texts(of_words, of_bytes):
    ids = numbers(WORDS, "▁a", "▁b", "b", "▁", "<end>", "▁a", "c", "▁b")
    found, _ = told(of_words, ids)
    assert found == ["a", "a b", "a bb", "a bb ", "a bb ", "a bb  a", "a bb  ac", "a bb  ac b"]
    found, _ = told(of_bytes, numbers(BYTES, "Ġa", "Ã", "©", "ðŁ", "ĺ", "Ģ", "b"))
    assert found == [" a", " a", " aé", " aé", " aé", " aé😀", " aé😀b"]


def test_half_a_character_is_not_told_until_the_end(of_bytes):
    found, _ = told(of_bytes, numbers(BYTES, "a", "ðŁ", "ĺ"))
    assert found[:2] == ["a", "a"]
    assert found[2].startswith("a")
    assert set(found[2][1:]) == {UNFINISHED}


@pytest.mark.parametrize(
    ("names", "stop", "found"),
    [
        (("a", "b", "c"), ("b",), ["a", "a"]),
        (("a", "b", "c"), ("bc",), ["a", "a", "a"]),
        (("ab", "c"), ("bc",), ["a", "a"]),
        (("a", "b", "ab", "c"), ("abc",), ["", "", "ab", "ab"]),
        (("a", "b", "a"), ("bc",), ["a", "a", "aba"]),
        (("a", "b"), ("bc",), ["a", "ab"]),
        (("a", "b", "c"), ("bc", "b"), ["a", "a"]),
        (("ab", "c"), ("c", "ab"), [""]),
        (("c", "ab"), ("b", "a"), ["c", "c"]),
        (("a", "Ã", "©"), ("é",), ["a", "a", "a"]),
        (("a", "b", "Ã"), ("bé", "abb"), ["", "", "ab\ufffd"]),
        (("Ċ", "Ċ"), ("\n\n",), ["", ""]),
    ],
)  # fmt: skip
def test_a_stop_string_and_what_may_become_one(of_bytes, names, stop, found):
    shown, stopped = told(of_bytes, numbers(BYTES, *names), stop)
    assert shown == found
    assert stopped == any(own in of_bytes.decode(numbers(BYTES, *names)) for own in stop)


def test_a_stop_string_before_half_a_character(of_bytes):
    """It is there for good, whatever the character becomes, and when no more of it comes."""
    for names in (("a", "c©Ã"), ("a", "c©Ã", "©"), ("a", "c", "ðŁ")):
        shown, stopped = told(of_bytes, numbers(BYTES, *names), ("c",))
        assert stopped
        assert shown == ["a", "a"]


def test_no_stop_string_is_told_and_nothing_behind_it(of_bytes):
    ids = range(5)
    for tokens in itertools.product(ids, repeat=5):
        whole = of_bytes.decode(list(tokens))
        for stop in (("ca",), ("abc", "bb"), ("a a",)):
            shown, stopped = told(of_bytes, tokens, stop)
            ends = [whole.find(own) for own in stop if own in whole]
            assert stopped == bool(ends)
            assert not any(own in shown[-1] for own in stop)
            assert whole.startswith(shown[-1])
            if not ends:
                assert shown[-1] == whole

"""Tokens of an answer as text, as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""What the bytes of a character that is not complete are decoded to."""


class Text:
    """The text of one answer; `stop` ends it.

    A token's text depends on the tokens before it, so a few of those are decoded again with each new one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._first, self._read = 0, 0
        """From where on tokens are decoded again, and up to where their text is in `_whole`"""
        self._whole = ""
        self.stopped = False

    def add(self, token: int) -> None:
        """One token more."""
        self._tokens.append(token)
        new = self._new()
        # What comes before a character that is not complete is there for good.
        whole = self._whole + new.rstrip(UNFINISHED)
        found = [at for at in (whole.find(own) for own in self._stop) if at >= 0]
        if found:
            self._whole, self.stopped = whole[: min(found)], True
        elif new and not new.endswith(UNFINISHED):
            self._whole += new
            self._first, self._read = self._read, len(self._tokens)

    def shown(self, *, over: bool) -> str:
        """The text so far. What may yet become a stop string is left out until the answer is `over`."""
        if self.stopped:
            return self._whole
        if over:
            return self._whole + self._new()
        ends = (size for own in self._stop for size in range(1, len(own)) if self._whole.endswith(own[:size]))
        return self._whole[: len(self._whole) - max(ends, default=0)]

    def _new(self) -> str:
        """What is there behind `_whole`, the bytes of a character that is not complete included."""
        before, now = self._decoded(self._first, self._read), self._decoded(self._first, len(self._tokens))
        return now[len(before) :]

    def _decoded(self, first: int, end: int) -> str:
        text = self._tokenizer.decode(self._tokens[first:end], skip_special_tokens=True)
        assert isinstance(text, str), "one sequence is one string"
        return text

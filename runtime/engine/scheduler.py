"""Who runs and who waits, on the host: a row for each request that is let in, and an account of units.

How many units are free the device knows, and tells a step late. What has been launched since may have taken some more,
and how many at most follows from lengths, which the host knows: a page begins every 16 tokens of a row, and one that
leaves the window may take units before it gives back its own. So nothing runs dry, and nobody waits to know that.

Shape legend: none; all of this is Python.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass, field

import torch

from policy.settings import PAGE_ACTIONS, PAGE_TOKENS

from ..kv.formats import FORMATS, FULL, INT8
from ..kv.units import Units, pages_for
from .model import Model
from .page_pool import units_needed, units_of
from .request import Answer

FREE_SHARE = 0.9
"""Of the device's free memory, which a pool takes that nobody gives a size."""
LEAST_PAGES = 4
"""Of a pool, in the model's dtype, where rows may ever have so many."""


@dataclass
class Account:
    """How many units are free at least: what was told last, less what launches since then may have taken."""

    free: int
    """As told last"""
    launched: deque[int] = field(default_factory=deque)
    """By step that nobody has told of yet, the oldest first, what it may have taken; of the last one so far"""

    def __post_init__(self) -> None:
        self.launched.append(0)

    @property
    def least(self) -> int:
        return self.free - sum(self.launched)

    def take(self, units: int) -> None:
        """What is launched now may take so many."""
        assert units <= self.least, "nobody takes what may not be there"
        self.launched[-1] += units

    def note(self) -> None:
        """The device will tell how many are free at this point."""
        self.launched.append(0)

    def told(self, free: int) -> None:
        """So many were free at the oldest point noted."""
        self.launched.popleft()
        self.free = free

    def known(self, free: int) -> None:
        """So many are free, and nothing is under way."""
        self.launched = deque([0])
        self.free = free


@dataclass
class Seat:
    """A row of the bucket and the answer that has it: how long it is, as far as steps were launched."""

    answer: Answer
    row: int
    units: Units
    length: int = 0
    """Tokens whose keys and values are there, or under way"""
    settled: int = 0
    """Pages whose format is final, as `turn` and `settle_pages` count them"""
    chosen: int = 0
    """Tokens of the answer that were chosen, or are about to be"""

    def __post_init__(self) -> None:
        kv = self.answer.request.operating.kv
        self._window = int(kv.window_tokens[0])
        codes = {FORMATS.index(PAGE_ACTIONS[int(own[0])]) for own in (kv.hard, kv.easy)}
        self.coded = max(0 if code == FULL else self.units.of(code) for code in codes)
        self._kept = min(self.units.of(code) for code in codes)

    def _due(self, length: int) -> int:
        """Pages behind the settled ones that have left the window."""
        return max(0, (length - self._window) // PAGE_TOKENS - self.settled)

    def prompt_units(self, tokens: int) -> int:
        """What a part of its prompt of so many tokens may take."""
        end = self.length + tokens
        begun = pages_for(end) - pages_for(self.length)
        return self.units.of(FULL) * begun + self.coded * self._due(end)

    def prompted(self, tokens: int) -> None:
        """A part of the prompt was launched."""
        self.length += tokens
        self.settled += self._due(self.length) if self.units.coded else 0

    def to_come(self, part_tokens: int) -> int:
        """What it may need beside what it has until it is as far as is known: through its prompt, in parts of up to so
        many tokens, and through what it had answered when it gave way, of which the last token was not processed."""
        known = len(self.answer.request.prompt) + max(0, len(self.answer.tokens) - 1)
        if self.length >= known:
            return 0
        least = self.units.of(FULL) * (pages_for(self.length) - self.settled) + self._kept * self.settled
        return max(0, units_up_to(known, self, part_tokens) - least)

    def step_units(self) -> int:
        """What a step of decode may take."""
        begins = self.units.of(FULL) if self.length % PAGE_TOKENS == 0 else 0
        return begins + (self.coded if self._due(self.length) else 0)

    def stepped(self) -> None:
        """A step of decode was launched."""
        self.settled += min(1, self._due(self.length))
        self.length += 1
        self.chosen += 1


class Queue:
    """Answers that wait, in the order in which they are let in."""

    def __init__(self) -> None:
        self._waiting: list[Answer] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def first(self) -> Answer | None:
        return self._waiting[0] if self._waiting else None

    def put(self, answer: Answer) -> None:
        bisect.insort(self._waiting, answer, key=lambda own: own.rank)

    def remove(self, answer: Answer) -> bool:
        """Whether it waited."""
        if answer not in self._waiting:
            return False
        self._waiting.remove(answer)
        return True


def units_up_to(tokens: int, seat: Seat, part_tokens: int) -> int:
    """What a row takes at most as long as it has no more than so many tokens.

    A page that gets fewer bits is promised units of both formats, as it has them for a moment, and a sink too. Where
    most pages stay as they are `units_needed` counts no room for that, and a row would give way to itself for ever.
    """
    units, kv = seat.units, seat.answer.request.operating.kv
    needed = units_needed(kv, [tokens], units, part_tokens) + seat.coded * pages_for(part_tokens)
    return min(needed, pages_for(tokens) * (units.of(FULL) + seat.coded))


def most_units(answer: Answer, units: Units, part_tokens: int) -> int:
    """What an answer takes at most if it runs alone. A step is under way when the host learns that it is over."""
    request = answer.request
    return units_up_to(len(request.prompt) + request.max_new_tokens + 1, Seat(answer, 0, units), part_tokens)


def pool_units(model: Model, rows: int, tokens: int, pool_bytes: int | None, *, coded: bool) -> int:
    """How many units a pool has for rows of up to `tokens` tokens: no more than they may ever take, and no more than
    fit into `pool_bytes`, by default most of what is free on a GPU. Raises MemoryError where these are too few."""
    units = units_of(model, coded)
    each = units.bytes * model.shape.layers
    if pool_bytes is None and model.device.type == "cuda":
        pool_bytes = int(FREE_SHARE * torch.cuda.mem_get_info(model.device)[0])
    # A page that gets fewer bits has units of both formats for a moment.
    most = rows * pages_for(tokens) * (units.of(FULL) + (units.of(INT8) if coded else 0))
    count = most if pool_bytes is None else min(most, pool_bytes // each)
    least = min(most, units.of(FULL) * LEAST_PAGES)
    if count < least:
        raise MemoryError(f"pool_bytes: expected at least {least * each}, got {pool_bytes}; give more")
    return count

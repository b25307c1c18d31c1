"""What a row remembers between tokens: every tensor has the rows first, so that rows can be selected and repeated.

The same records, with a token axis behind the rows, hold what is so after each token of a block.

Shape legend: B rows, S signals (in the order of `SIGNALS`), J rungs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from policy.operating import Operating
from policy.settings import SIGNALS

from .bucket import Bucket, Offer

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Smoothed:
    """Running mean of every signal over all tokens so far."""

    mean: Tensor
    """[B, S]"""
    seen: Tensor
    """[B, S] bool: a value of this signal exists."""


@dataclass(frozen=True)
class Gathered:
    """Signals that have become known since the last opening: what the next one will see."""

    total: Tensor
    """[B, S] their sum."""
    peak: Tensor
    """[B, S] their maximum."""
    last: Tensor
    """[B, S] the latest of them."""
    count: Tensor
    """[B, S] how many they are."""


@dataclass(frozen=True)
class Held:
    """What the latest opening saw."""

    stats: Tensor
    """[B, S, 3] mean, max, last."""
    valid: Tensor
    """[B, S] bool"""


@dataclass(frozen=True)
class Chunk:
    """The open chunk, and the one before it, from which its fade comes."""

    start: Tensor
    """[B] long: position of its first token."""
    level: Tensor
    """[B] long: complexity class when it opened."""
    rung: Tensor
    """[B] long: its rung index."""
    scale: Tensor
    """[B] its scale."""
    before_rung: Tensor
    """[B] long: rung index of the chunk before; its own in a row's first chunk, which fades from nothing."""
    before_scale: Tensor
    """[B] the scale of that."""


@dataclass(frozen=True)
class State:
    """Everything a row remembers between tokens."""

    position: Tensor
    """[B] long: index of the next token, from the row's first real one."""
    level: Tensor
    """[B] long: complexity class now."""
    smoothed: Smoothed
    gathered: Gathered
    held: Held
    chunk: Chunk
    bucket: Bucket
    offer: Offer
    """What there is to choose from; no token changes it."""
    operating: Operating
    """What the rows may spend; no token changes it."""

    def select(self, index: Tensor) -> State:
        """The rows `index` [N] long, in that order; rows may repeat."""
        rows = over_tensors(lambda tensor: tensor.index_select(0, index), self)
        return replace(rows, operating=self.operating.select(index))


def over_tensors(function: Callable[..., Tensor], *parts: _Part) -> _Part:
    """`function` over the tensors of equal records; what rows may spend is left as it is."""
    first: Any = parts[0]
    if isinstance(first, Tensor):
        return function(*parts)  # type: ignore[return-value]
    if isinstance(first, Operating):
        return first  # type: ignore[return-value]
    names = [field.name for field in fields(first)]
    return replace(first, **{name: over_tensors(function, *(getattr(part, name) for part in parts)) for name in names})


def initial_state(operating: Operating, offer: Offer, device: torch.device) -> State:
    """The state of `len(operating)` rows, and of what their ladders offer, before the first token: no signal seen, the
    bucket full."""
    operating, offer = operating.to(device), offer.to(device)
    rows, signals = len(operating), len(SIGNALS)
    zeros = torch.zeros(rows, signals, device=device)
    none = torch.zeros(rows, signals, dtype=torch.bool, device=device)
    index, start = torch.zeros(rows, dtype=torch.long, device=device), operating.start_rung
    ones = torch.ones(rows, device=device)
    return State(
        position=index,
        level=index,
        smoothed=Smoothed(zeros, none),
        gathered=Gathered(zeros, zeros, zeros, zeros),
        held=Held(torch.zeros(rows, signals, 3, device=device), none),
        chunk=Chunk(index, index, start, ones, start, ones),
        bucket=Bucket.full(operating.budget, offer.cost),
        offer=offer,
        operating=operating,
    )

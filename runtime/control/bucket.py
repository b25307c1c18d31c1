"""The token bucket that keeps a row's budget, whatever the text: what its rungs may cost, token by token.

It fills by the budget with every token, is emptied by what the token reads of the adapter, holds `SLACK_TOKENS` tokens'
worth and starts full. A chunk opens only at a rung that the bucket can pay for as long as the chunk may last, and its
fade after it; so no chunk changes its rung, and over any n tokens of a row

    bytes spent <= budget * (n + SLACK_TOKENS)

A fade reads both of its rungs: of one bank what the dearer of them reads, of two banks both in full.

Amounts are in the bytes of the row's exact adapter, float64, so that a long text loses nothing to rounding. An infinite
budget is none. Source: DESIGN section 6.

Shape legend: B rows, T tokens of a block, J rungs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy.operating import Operating
from policy.settings import Settings

SLACK_TOKENS = 64
SAME_COST = 1e-6
"""A budget this near to a rung's cost is that cost: shares are written with few digits, and stored in float32."""
ROUNDING = 1e-9
"""What sums of float64 costs may be off by; far less than a byte of any adapter."""


@dataclass(frozen=True)
class Offer:
    """What the ladder of each row offers; no token changes it."""

    cost: Tensor
    """[B, J] float64 per token at every rung, relative to the row's exact adapter: ascending, 1 at the top."""
    bank: Tensor
    """[B, J] long: the bank that every rung reads."""
    resident: Tensor
    """[B] long: index of the highest rung that is in memory."""

    @classmethod
    def of(cls, cost: Tensor, bank: Tensor | None = None, resident: Tensor | None = None) -> Offer:
        """Costs [B, J] of rungs that are all of one bank, and all in memory, unless told."""
        rows, rungs = cost.shape
        one, top = torch.zeros(rows, rungs, dtype=torch.long), torch.full((rows,), rungs - 1)
        return cls(cost, one if bank is None else bank, top if resident is None else resident)

    @property
    def partial(self) -> bool:
        """Whether some row's ladder is not in memory whole."""
        return bool((self.resident < self.cost.shape[1] - 1).any())

    def select(self, index: Tensor) -> Offer:
        """The rows `index` [N] long, in that order; rows may repeat."""
        at = index.to(self.cost.device)
        return Offer(self.cost[at], self.bank[at], self.resident[at])

    def to(self, device: torch.device) -> Offer:
        """On `device`; nobody waits for a GPU."""
        later = device.type == "cuda"
        cost, bank, resident = (own.to(device, non_blocking=later) for own in (self.cost, self.bank, self.resident))
        return Offer(cost, bank, resident)


@dataclass(frozen=True)
class Bucket:
    """What each row has left."""

    balance: Tensor
    """[B] float64: what may be spent beyond the budget of the tokens to come."""
    budget: Tensor
    """[B] float64 per token; infinite: no limit."""

    @classmethod
    def full(cls, budget: Tensor, cost: Tensor) -> Bucket:
        """The bucket before the first token: budget [B], cost [B, J]."""
        gap, nearest = (cost - budget[:, None]).abs().min(1)
        budget = torch.where(gap < SAME_COST, _at(cost, nearest), budget)
        return cls(SLACK_TOKENS * budget, budget)


def pay(
    bucket: Bucket, offer: Offer, held: Tensor, before: Tensor, wish: Tensor, opens: Tensor, positions: Tensor,
    start: Tensor, real: Tensor, settings: Settings,
) -> tuple[Tensor, Bucket]:  # fmt: skip
    """The rungs that chunks opening at each token get, and the bucket after the block.

    held and before [B] long are the rungs of the chunk that is open before the block and of the one before it, wish
    [B, T] long what the policy would choose at every token; opens and real [B, T] bool, positions and start [B, T] long
    of the token and of its chunk. Returns [B, T] long: where a chunk opens the wish, or the dearest rung below it that
    can be paid; the open chunk's elsewhere.
    """
    fade, longest, cost = settings.fade_tokens - 1, settings.chunk.max_tokens, offer.cost
    excess = (cost - bucket.budget[:, None]).clamp(min=0)
    needed = (longest + fade) * excess
    if fade:
        # A rung that is left for one of another bank is read beside that one: it takes nothing off what is paid for it.
        apart = offer.bank[:, :, None] != offer.bank[:, None]
        leaving = fade * torch.where(apart, cost[..., None], excess[..., None])  # [B, from, to]
        needed = longest * excess + leaving[..., 0]  # back to the least rung there must always be a way
    limit, balance, rungs = SLACK_TOKENS * bucket.budget, bucket.balance, []
    first, fading = positions == 0, positions - start < fade
    index = torch.arange(cost.shape[1], device=cost.device)
    for t in range(wish.shape[1]):
        opening = opens[:, t]
        left = balance[:, None] + ROUNDING
        if fade:
            # The chunk before is still read while the new one fades in.
            left = left - leaving.gather(1, held[:, None, None].expand(-1, 1, len(index)))[:, 0].masked_fill(
                first[:, t, None], 0.0
            )
        payable = (left >= needed) & (index <= wish[:, t, None])
        chosen = torch.where(opening, (payable * index).amax(1), held)
        before = torch.where(opening, torch.where(first[:, t], chosen, held), before)
        held = chosen
        spent = _at(cost, held)
        if fade:
            spent = torch.where(fading[:, t], _faded(offer, held, before), spent)
        after = torch.minimum(balance + bucket.budget - spent, limit)
        balance = torch.where(real[:, t], after, balance)
        rungs.append(held)
    return torch.stack(rungs, 1), replace(bucket, balance=balance)


def filled(bucket: Bucket, cost: Tensor, real: Tensor) -> Bucket:
    """The bucket after a block whose tokens it can all pay for: what `pay` leaves, of all tokens at once.

    cost [B, T] float64 of the rung that each token has, real [B, T] bool. A bucket that is full stays full: the balance
    is what has come in since it was full last, or since the block began.
    """
    gained = torch.where(real, bucket.budget[:, None] - cost, 0.0).cumsum(1)
    room = (SLACK_TOKENS * bucket.budget[:, None] - gained).amin(1)
    balance = torch.minimum(bucket.balance, room) + gained[:, -1]
    return replace(bucket, balance=torch.where(bucket.budget.isfinite(), balance, bucket.balance))


def affordable(operating: Operating, offer: Offer) -> bool:
    """Whether every row can pay for its start rung, or the highest in memory below it, for good."""
    offer = offer.to(operating.knob.device)
    start = torch.minimum(operating.start_rung, offer.resident)
    return bool((_at(offer.cost, start) <= operating.budget + SAME_COST).all())


def _faded(offer: Offer, rung: Tensor, before: Tensor) -> Tensor:
    """[B] what a token costs that fades from rung `before` [B] to `rung` [B]."""
    two, one = _at(offer.cost, rung), _at(offer.cost, before)
    apart = _at(offer.bank, rung) != _at(offer.bank, before)
    return torch.where(apart, one + two, torch.maximum(one, two))


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values [B, J] at index [B]."""
    return values.gather(1, index[:, None])[:, 0]

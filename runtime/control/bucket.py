"""The token bucket that keeps a row's budget, whatever the text: what its rungs may cost, token by token.

It fills by the budget with every token, is emptied by what the token reads of the adapter, holds `SLACK_TOKENS` tokens'
worth and starts full. A chunk opens only at a rung that the bucket can pay for as long as the chunk may last, and its
fade after it; so no chunk changes its rung, and over any n tokens of a row

    bytes spent <= budget * (n + SLACK_TOKENS)

Amounts are in the bytes of the row's exact adapter, float64, so that a long text loses nothing to rounding. An infinite
budget is none. Source: DESIGN section 6.

Shape legend: B rows, T tokens of a block, J rungs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy.settings import Settings

SLACK_TOKENS = 64
SAME_COST = 1e-6
"""A budget this near to a rung's cost is that cost: shares are written with few digits, and stored in float32."""
_ROUNDING = 1e-9
"""What sums of float64 costs may be off by; far less than a byte of any adapter."""


@dataclass(frozen=True)
class Bucket:
    """What each row has left, and at what prices."""

    balance: Tensor
    """[B] float64: what may be spent beyond the budget of the tokens to come."""
    budget: Tensor
    """[B] float64 per token; infinite: no limit."""
    cost: Tensor
    """[B, J] float64 per token at every rung, ascending, 1 at the top."""

    @classmethod
    def full(cls, budget: Tensor, cost: Tensor) -> Bucket:
        """The bucket before the first token: budget [B], cost [B, J]."""
        gap, nearest = (cost - budget[:, None]).abs().min(1)
        budget = torch.where(gap < SAME_COST, _at(cost, nearest), budget)
        return cls(SLACK_TOKENS * budget, budget, cost)


def pay(
    bucket: Bucket, held: Tensor, before: Tensor, wish: Tensor, opens: Tensor, positions: Tensor, start: Tensor,
    real: Tensor, settings: Settings,
) -> tuple[Tensor, Bucket]:  # fmt: skip
    """The rungs that chunks opening at each token get, and the bucket after the block.

    held and before [B] long are the rungs of the chunk that is open before the block and of the one before it, wish
    [B, T] long what the policy would choose at every token; opens and real [B, T] bool, positions and start [B, T] long
    of the token and of its chunk. Returns [B, T] long: where a chunk opens the wish, or the dearest rung that can be
    paid; the open chunk's elsewhere.
    """
    fade, longest = settings.fade_tokens - 1, settings.chunk.max_tokens
    excess = (bucket.cost - bucket.budget[:, None]).clamp(min=0)
    needed = (longest + fade) * excess
    limit, balance, rungs = SLACK_TOKENS * bucket.budget, bucket.balance, []
    first, fading = positions == 0, positions - start < fade
    for t in range(wish.shape[1]):
        opening = opens[:, t]
        # The chunk before is still read while the new one fades in.
        leaving = torch.where(first[:, t], 0.0, fade * _at(excess, held))
        payable = (((balance - leaving + _ROUNDING)[:, None] >= needed).sum(1) - 1).clamp(min=0)
        chosen = torch.where(opening, torch.minimum(wish[:, t], payable), held)
        before = torch.where(opening, torch.where(first[:, t], chosen, held), before)
        held = chosen
        active = torch.where(fading[:, t], torch.maximum(held, before), held)
        after = torch.minimum(balance + bucket.budget - _at(bucket.cost, active), limit)
        balance = torch.where(real[:, t], after, balance)
        rungs.append(held)
    return torch.stack(rungs, 1), replace(bucket, balance=balance)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values [B, J] at index [B]."""
    return values.gather(1, index[:, None])[:, 0]

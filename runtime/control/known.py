"""What is known: signals smoothed over all tokens, and gathered since the last opening, for a whole block at once.

Shape legend: B rows, T tokens of a block, S signals (in the order of `SIGNALS`), C some of them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from policy.settings import MODEL_SIGNALS, SIGNALS

from .state import Gathered, Held, Smoothed, over_tensors

# Slices of the signal axis: views, where index lists would copy an index to the device at every block.
MODEL_OUTPUT = slice(0, len(MODEL_SIGNALS))
TOKEN_ONLY = slice(len(MODEL_SIGNALS), len(SIGNALS))


def running_mean(mean: Tensor, seen: Tensor, values: Tensor, alpha: float) -> Tensor:
    """m <- m + alpha (x - m) after every token: mean and seen [B, C] before, values [B, T, C] -> [B, T, C].

    Linear, so each is one weighted sum: x_i counts alpha (1 - alpha) to the power of the tokens behind it. The first
    value ever is taken whole, as if the mean had been there before.
    """
    decay, kept = _decay(values.shape[1], alpha, values.device)
    first = torch.where(seen, mean, values[:, 0])
    return first[:, None] * kept[:, None] + (decay[:, :, None] * values[:, None]).sum(2)


@lru_cache(maxsize=16)
def _decay(length: int, alpha: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """[T, T] what each value of a block counts at each of its tokens, and [T] what the mean before it does."""
    steps = torch.arange(length, device=device)
    behind = steps[:, None] - steps
    decay = alpha * torch.pow(1.0 - alpha, behind.clamp(min=0).float()) * (behind >= 0)
    return decay, torch.pow(1.0 - alpha, (steps + 1).float())


def smoothed_tokens(smoothed: Smoothed, signals: Tensor, alpha: float) -> Smoothed:
    """[B, T, S] after every token of a block with token signals [B, T, 2]; the model's stand still."""
    shape = (*signals.shape[:2], len(MODEL_SIGNALS))
    own = running_mean(smoothed.mean[:, TOKEN_ONLY], smoothed.seen[:, TOKEN_ONLY], signals, alpha)
    mean = torch.cat([smoothed.mean[:, None, MODEL_OUTPUT].expand(shape), own], 2)
    seen = torch.cat([smoothed.seen[:, None, MODEL_OUTPUT].expand(shape), torch.ones_like(own, dtype=torch.bool)], 2)
    return Smoothed(mean, seen)


def gathered_tokens(gathered: Gathered, signals: Tensor, latest: Tensor) -> Gathered:
    """[B, T + 1, 2]: the token signals gathered before each token, and after the last, since the opening before that.

    latest [B, T] is the index of the latest opening at or before each token, -1 for none in this block.
    """
    steps = torch.arange(signals.shape[1] + 1, device=signals.device)
    since = torch.nn.functional.pad(latest, (1, 0), value=-1)[..., None]
    member = (steps[:-1] < steps[:, None]) & (steps[:-1] >= since)
    own, carried = signals[:, None] * member[..., None], since < 0
    before = over_tensors(lambda tensor: tensor[:, None, TOKEN_ONLY], gathered)
    return Gathered(
        total=own.sum(2) + before.total * carried,
        peak=torch.maximum(own.amax(2), before.peak * carried),
        last=torch.cat([before.last, signals], 1),
        count=member.sum(2)[..., None] + before.count * carried,
    )


def would_see(held: Held, gathered: Gathered, tokens: Gathered) -> Held:
    """[B, T, ...]: what an opening at each token sees; `tokens` are `gathered_tokens`.

    What the model has put out is seen by the block's first opening and stands for those behind it.
    """
    length = tokens.total.shape[1] - 1

    def all_signals(carried: Tensor, own: Tensor) -> Tensor:
        return torch.cat([carried[:, None, MODEL_OUTPUT].expand(-1, length, -1), own[:, :-1]], 2)

    known = over_tensors(all_signals, gathered, tokens)
    fresh = known.count > 0
    stats = torch.stack([known.total / known.count.clamp(min=1), known.peak, known.last], -1)
    return Held(torch.where(fresh[..., None], stats, held.stats[:, None]), held.valid[:, None] | fresh)


def left_over(gathered: Gathered, tokens: Gathered, count: Tensor | None, opens: Tensor) -> Gathered:
    """[B, S] what waits for the next opening after a block with `count` [B] real tokens; None: all of them are."""
    taken = opens.any(1, keepdim=True)

    def rest(carried: Tensor, own: Tensor) -> Tensor:
        end = own[:, -1] if count is None else pick(own, count)
        return torch.cat([carried[:, MODEL_OUTPUT].masked_fill(taken, 0.0), end], 1)

    return over_tensors(rest, gathered, tokens)


def at_end(count: Tensor | None, tokens: Tensor, carried: Tensor) -> Tensor:
    """What holds after a block: tokens [B, T, ...] at the last of `count` [B] real ones (None: all of them are), or
    carried [B, ...] where there is none."""
    if count is None:
        return tokens[:, -1]
    some = (count > 0).view(-1, *[1] * (carried.dim() - 1))
    return torch.where(some, pick(tokens, (count - 1).clamp(min=0)), carried)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values [B, N, ...] at index [B] long -> [B, ...]."""
    return values.gather(1, index.view(-1, 1, *[1] * (values.dim() - 2)).expand(-1, 1, *values.shape[2:]))[:, 0]

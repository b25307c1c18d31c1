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
OUTPUTS = slice(0, MODEL_SIGNALS.index("surprisal"))
"""What the model puts out at a token; the surprisal is of the token behind it."""
SURPRISAL = slice(OUTPUTS.stop, MODEL_OUTPUT.stop)


def running_mean(mean: Tensor, seen: Tensor, values: Tensor, alpha: float) -> Tensor:
    """m <- m + alpha (x - m) after every token: mean and seen [B, C] before, values [B, T, C] -> [B, T, C].

    Linear, so each is one weighted sum: x_i counts alpha (1 - alpha) to the power of the tokens behind it. The first
    value ever is taken whole, as if the mean had been there before.
    """
    decay, kept = _decay(values.shape[1], alpha, values.device)
    first = torch.where(seen, mean, values[:, 0])
    return first[:, None] * kept[:, None] + decay @ values


@lru_cache(maxsize=16)
def _decay(length: int, alpha: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """[T, T] what each value of a block counts at each of its tokens, and [T] what the mean before it does."""
    steps = torch.arange(length, device=device)
    behind = steps[:, None] - steps
    decay = alpha * torch.pow(1.0 - alpha, behind.clamp(min=0).float()) * (behind >= 0)
    return decay, torch.pow(1.0 - alpha, (steps + 1).float())


def smoothed_tokens(smoothed: Smoothed, signals: Tensor, alpha: float) -> Smoothed:
    """[B, T, S] after every token of a block with signals [B, T, C], the last C; the first S - C stand still."""
    own, standing = slice(len(SIGNALS) - signals.shape[2], None), slice(0, len(SIGNALS) - signals.shape[2])
    mean = running_mean(smoothed.mean[:, own], smoothed.seen[:, own], signals, alpha)
    shape = (*signals.shape[:2], -1)
    seen = torch.cat([smoothed.seen[:, None, standing].expand(shape), torch.ones_like(mean, dtype=torch.bool)], 2)
    return Smoothed(torch.cat([smoothed.mean[:, None, standing].expand(shape), mean], 2), seen)


def known_before(smoothed: Smoothed, carried: Smoothed) -> Smoothed:
    """[B, T, S] as it is before every token is processed: what the model puts out as of the token before it."""

    def before(after: Tensor, start: Tensor) -> Tensor:
        outputs = torch.cat([start[:, None, MODEL_OUTPUT], after[:, :-1, MODEL_OUTPUT]], 1)
        return torch.cat([outputs, after[..., MODEL_OUTPUT.stop :]], 2)

    return over_tensors(before, smoothed, carried)


def gathered_tokens(gathered: Gathered, signals: Tensor, latest: Tensor, longest: int) -> Gathered:
    """[B, T + 1, C]: the signals [B, T, C], the last C, that are gathered before each token, and after the last, since
    the opening before that.

    latest [B, T] is the index of the latest opening at or before each token, -1 for none in this block; no chunk has
    more than `longest` tokens.
    """
    reach = min(longest, signals.shape[1])
    since = torch.nn.functional.pad(latest, (1, 0), value=-1)[..., None]
    before = over_tensors(lambda tensor: tensor[:, None, len(SIGNALS) - signals.shape[2] :], gathered)
    # Of every token the ones before it as far as a chunk may reach back.
    windows = torch.nn.functional.pad(signals, (0, 0, reach, 0)).unfold(1, reach, 1)  # [B, T + 1, C, reach]
    index = torch.arange(signals.shape[1] + 1, device=signals.device)[:, None] - reach
    index = index + torch.arange(reach, device=signals.device)
    member = (index >= 0) & (index >= since)
    own, carried = windows * member[:, :, None], since < 0
    return Gathered(
        total=own.sum(-1) + before.total * carried,
        peak=torch.maximum(own.amax(-1), before.peak * carried),
        last=torch.cat([before.last, signals], 1),
        count=member.sum(-1, keepdim=True) + before.count * carried,
    )


def would_see(held: Held, gathered: Gathered, tokens: Gathered) -> Held:
    """[B, T, ...]: what an opening at each token sees; `tokens` are `gathered_tokens`.

    What stands still is seen by the block's first opening and stands for those behind it.
    """
    length, standing = tokens.total.shape[1] - 1, len(SIGNALS) - tokens.total.shape[2]

    def all_signals(carried: Tensor, own: Tensor) -> Tensor:
        return torch.cat([carried[:, None, :standing].expand(-1, length, -1), own[:, :-1]], 2)

    known = over_tensors(all_signals, gathered, tokens)
    fresh = known.count > 0
    stats = torch.stack([known.total / known.count.clamp(min=1), known.peak, known.last], -1)
    return Held(torch.where(fresh[..., None], stats, held.stats[:, None]), held.valid[:, None] | fresh)


def left_over(gathered: Gathered, tokens: Gathered, count: Tensor | None, opens: Tensor) -> Gathered:
    """[B, S] what waits for the next opening after a block with `count` [B] real tokens; None: all of them are."""
    taken, standing = opens.any(1, keepdim=True), len(SIGNALS) - tokens.total.shape[2]

    def rest(carried: Tensor, own: Tensor) -> Tensor:
        end = own[:, -1] if count is None else pick(own, count)
        return torch.cat([carried[:, :standing].masked_fill(taken, 0.0), end], 1)

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

"""The complexity signals: pure functions of tensors, causal, in [0, 1], constant work per token.

    entropy    H / log V of the next-token distribution          known once the model has processed the token
    novelty    share of trailing n-grams not seen in a window    known from the tokens alone
    attention  attention mass beyond the most recent pages       known once the model has processed the token
    surprisal  -log p of a token / log V, given what is before it  known once the model has processed the token before
    prior      1 in the prompt, decaying through the response    known from the position alone
    difficulty what a token needs of the adapter, by its id      known from the tokens alone (`policy.difficulty`)
    pair       and by the pair that it ends

Nothing here synchronises with the host. Shape legend: B rows, T tokens of this block, V vocabulary, W window.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS

NGRAMS = (2, 3, 4)
NO_TOKEN = -1


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax of logits [..., V] of any float dtype, float32; what is ruled out with -inf has the least number."""
    # A token that is ruled out adds 0 to the entropy, not 0 * inf.
    return logits.float().log_softmax(-1).clamp_(min=torch.finfo(torch.float32).min)


def next_token_entropy(log_p: Tensor) -> Tensor:
    """Entropy of the next token divided by log V: `log_probabilities` [..., V] -> [...] float32 in [0, 1]."""
    entropy_nats = -torch.linalg.vecdot(log_p.exp(), log_p)
    return (entropy_nats / math.log(log_p.shape[-1])).clamp_(0.0, 1.0)


def surprisal(log_p: Tensor, tokens: Tensor) -> Tensor:
    """-log p of tokens [...] long, divided by log V and cut at 1: `log_probabilities` [..., V] -> [...] float32."""
    index = tokens.clamp(0, log_p.shape[-1] - 1)[..., None]
    return (-log_p.gather(-1, index)[..., 0] / math.log(log_p.shape[-1])).clamp_(0.0, 1.0)


def history_tokens(window: int) -> int:
    """How many past tokens `ngram_novelty` must be given: the window and the longest n-gram's reach before it."""
    return window + max(NGRAMS) - 1


def ngram_novelty(history: Tensor, tokens: Tensor, window: int) -> Tensor:
    """Share of the n-grams (n = 2, 3, 4) ending at each token that do not end at any of the last `window` tokens.

    history [B, history_tokens(window)] and tokens [B, T] are token ids, NO_TOKEN where there is none -> [B, T] float32.
    n-grams that would begin before the row does are left out; a row's first token is wholly novel. Exact: ids are
    compared, not hashed.
    """
    longest = max(NGRAMS)
    sequence = torch.cat([history, tokens], dim=1)
    steps = tokens.shape[1]
    # own[b, t] and earlier[b, t, w]: the `longest` tokens up to token t, and up to each token of its window.
    own = sequence[:, 1 - longest - steps :].unfold(1, longest, 1)
    earlier = sequence.unfold(1, window + longest - 1, 1)[:, :steps].unfold(2, longest, 1)
    same = earlier == own[:, :, None]
    matches, seen = same[..., -1], []
    for length in range(2, longest + 1):
        matches = matches & same[..., -length]
        if length in NGRAMS:
            seen.append(matches)
    exists = torch.stack([own[..., -length] for length in NGRAMS], -1) != NO_TOKEN
    counted = exists.sum(-1)
    missing = (exists & ~torch.stack(seen, -1).any(2)).sum(-1)
    return torch.where(counted > 0, missing / counted.clamp(min=1), 1.0)


def roll_history(history: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """The last `history.shape[1]` tokens of every row after its first `counts` [B] tokens of `tokens` [B, T]."""
    sequence = torch.cat([history, tokens], dim=1)
    index = counts[:, None] + torch.arange(history.shape[1], device=history.device)
    return sequence.gather(1, index)


def positional_prior(positions: Tensor, prompt_tokens: Tensor, decay_tokens: int) -> Tensor:
    """1 in the prompt, exp(-i / decay_tokens) at response token i: positions [B, T], prompt_tokens [B] -> [B, T]."""
    response = (positions - prompt_tokens[:, None]).clamp(min=0).float()
    return torch.exp(-response / decay_tokens)


def distant_attention(weights: Tensor, positions: Tensor, recent_pages: int) -> Tensor:
    """Attention mass on slots before the most recent pages.

    weights [B, T, N] softmax over N slots, averaged over heads; positions [B, T] -> [B, T] float32 in [0, 1]. The page
    of the querying token is the first of the recent ones.
    """
    boundary = (positions // PAGE_TOKENS + 1 - recent_pages) * PAGE_TOKENS
    slots = torch.arange(weights.shape[-1], device=weights.device)
    return weights.masked_fill(slots >= boundary[..., None], 0.0).sum(-1).float().clamp_(0.0, 1.0)

"""Entropy and surprisal at every token of a prompt, in plain PyTorch: what `ops.prompt.outlook` must equal.

Tiles are gone through one by one, on the host's account. Tokens of no tile are left alone.

Shape legend: T tokens, N tiles, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from ...control import signals
from ..prompt.tiles import COUNT, FIRST


def outlook(logits: Tensor, scale: Tensor, tokens: Tensor, tiles: Tensor, entropy: Tensor, surprisal: Tensor) -> None:
    """logits [T, V] times scale [T] -> entropy [T], and surprisal [T] of tokens [T], each at the token before it."""
    for tile in tiles.tolist():
        first, stop = tile[FIRST], tile[FIRST] + tile[COUNT]
        if first == stop:
            continue
        log_p = signals.log_probabilities(logits[first:stop].float() * scale[first:stop, None])
        entropy[first:stop] = signals.next_token_entropy(log_p)
        following = tokens[first + 1 : stop + 1]
        surprisal[first:stop] = 0.0  # at the last of all tokens it stays so
        surprisal[first : first + len(following)] = signals.surprisal(log_p[: len(following)], following)

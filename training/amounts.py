"""How much of everything a fit does. Defaults are sized for the embedded model on two CPU cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WHOLE = 2**31 - 1
"""As many as there are, where an amount is cut by the data anyway."""
BOUNDS = {
    **dict.fromkeys(("train_documents", "validation_documents", "test_documents", "shard_documents"), (1, WHOLE)),
    **dict.fromkeys(("max_tokens", "min_completion_tokens"), (1, WHOLE)),
    **dict.fromkeys(("later_chunks", "later_tokens", "batch_chunks"), (1, WHOLE)),
    "rounds": (0, 100),
    "epochs": (1, 1_000_000),
    "hidden": (1, 65_536),
    "bootstrap": (1, 1_000_000),
}
"""What every integer may be. Upper ends are far beyond use: they catch a slip before it takes days or all memory."""
MOST_SCALES = 32


@dataclass(frozen=True)
class Amounts:
    """Amounts and grids of one fit."""

    train_documents: int = 64
    validation_documents: int = 24
    test_documents: int = 40
    max_tokens: int = 160
    """Documents are cut to this many tokens, prompt included."""
    min_completion_tokens: int = 32
    """Shorter documents are left out: they end before a rung can change."""
    shard_documents: int = 4
    """Documents per forward of target collection, each at every rung and scale, and per resumable shard."""
    scales: tuple[float, ...] = (0.8, 1.0, 1.2)
    """Scale grid on which targets of truncated rungs are measured; the policy interpolates in it."""
    later_chunks: int = 24
    """Random chunks on which damage to later tokens, through the cache, is measured."""
    later_tokens: int = 64
    """How far behind such a chunk later damage is followed."""
    rounds: int = 1
    """Rounds of trajectories collected under the policy learned so far, after the full-rank round."""
    epochs: int = 40
    """Epochs of training after every round of collection."""
    batch_chunks: int = 128
    learning_rate: float = 3e-3
    hidden: int = 48
    bootstrap: int = 1000
    """Resamples of the test documents behind the 95 % interval."""

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"amounts.{name}: expected an integer from {low} to {high}, got {value!r}; correct it")
        if self.max_tokens <= self.min_completion_tokens:
            raise ValueError(
                f"amounts.max_tokens: expected more than min_completion_tokens {self.min_completion_tokens}, "
                f"got {self.max_tokens}; raise it"
            )
        if not _is_number(self.learning_rate) or not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"amounts.learning_rate: expected a number above 0 and up to 1, got {self.learning_rate!r}; correct it"
            )
        object.__setattr__(self, "learning_rate", float(self.learning_rate))
        object.__setattr__(self, "scales", _checked_scales(self.scales))


def _checked_scales(scales: Sequence[float]) -> tuple[float, ...]:
    listed = isinstance(scales, Sequence) and 1 <= len(scales) <= MOST_SCALES and all(map(_is_number, scales))
    found = tuple(map(float, scales)) if listed else ()
    ascending = list(found) == sorted(set(found)) and 1.0 in found and found[0] > 0
    # The policy's own range of scales is symmetric; targets must cover all of it.
    mirrored = all(abs(a + b - 2.0) < 1e-6 for a, b in zip(found, reversed(found), strict=True))
    if not ascending or not mirrored:
        raise ValueError(
            f"amounts.scales: expected 1 to {MOST_SCALES} ascending scales symmetric around 1.0, got {scales!r}; name "
            "others, such as 0.8, 1.0, 1.2"
        )
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

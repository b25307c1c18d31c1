"""How much of everything a fit does. Defaults are sized for the embedded model on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass


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
        object.__setattr__(self, "scales", tuple(float(s) for s in self.scales))
        for name in (
            "train_documents", "validation_documents", "test_documents", "min_completion_tokens", "shard_documents",
            "later_chunks", "later_tokens", "epochs", "batch_chunks", "hidden", "bootstrap",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"amounts.{name}: expected an integer of at least 1, got {getattr(self, name)}")
        if self.rounds < 0:
            raise ValueError(f"amounts.rounds: expected an integer of at least 0, got {self.rounds}")
        if self.max_tokens <= self.min_completion_tokens:
            raise ValueError(
                f"amounts.max_tokens: expected more than min_completion_tokens {self.min_completion_tokens}, "
                f"got {self.max_tokens}"
            )
        ascending = list(self.scales) == sorted(set(self.scales)) and self.scales[0] > 0
        # The policy's own range of scales is symmetric; targets must cover all of it.
        mirrored = all(abs(a + b - 2.0) < 1e-6 for a, b in zip(self.scales, reversed(self.scales), strict=True))
        if not ascending or not mirrored or 1.0 not in self.scales:
            raise ValueError(f"amounts.scales: expected ascending scales symmetric around 1.0, got {self.scales}")

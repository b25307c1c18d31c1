"""How much of everything a fit does. Defaults are sized for the embedded model on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from policy.learned import LearnedPolicy
from policy.limits import Limit, Maybe, Number, Several, Whole, check_fields, limited, refused

# Upper ends are far beyond use: they catch a slip before it takes days or all memory.
COUNT = Whole(1, 2**31 - 1)
"""As many as there are, where an amount is cut by the data anyway."""
SCALES = Several(Number(0, 2, above=True, below=True), 1, 32, distinct=True)
AROUND_ONE = (0.8, 1.0, 1.2)
"""Scales to measure a rung at that is truncated and nothing else."""


def _amount(default: Any, limit: Limit) -> Any:
    return field(default=default, metadata=limited(limit))


@dataclass(frozen=True)
class Amounts:
    """Amounts and grids of one fit."""

    train_documents: int = _amount(128, COUNT)
    validation_documents: int = _amount(24, COUNT)
    test_documents: int = _amount(32, COUNT)
    max_tokens: int = _amount(160, COUNT)
    """Documents are cut to this many tokens, prompt included."""
    min_completion_tokens: int = _amount(32, COUNT)
    """Shorter documents are left out: they end before a rung can change."""
    shard_documents: int = _amount(4, COUNT)
    """Documents per resumable shard of targets, each at every rung and three scales; thrice as many at one."""
    scales: tuple[float, ...] | None = _amount(None, Maybe(SCALES))
    """Scale grid on which targets of truncated rungs are measured and in which the policy interpolates; default 0.8, 1,
    1.2, or 1 alone where the ladder's rungs have scales of their own."""
    later_chunks: int = _amount(24, COUNT)
    """Random chunks on which damage to later tokens, through the cache, is measured."""
    later_tokens: int = _amount(64, COUNT)
    """How far behind such a chunk later damage is followed."""
    rounds: int = _amount(1, Whole(0, 100))
    """Rounds of trajectories collected under the policy learned so far, after the full-rank round."""
    own_documents: int = _amount(96, COUNT)
    """Train documents that such a round goes through, the first ones; and all validation documents."""
    probes: int = _amount(3, Whole(0, 64))
    """Rungs of every token that are measured inside of such a trajectory; with 0 its targets are those of uniform
    runs."""
    epochs: int = _amount(40, Whole(1, 1_000_000))
    """Epochs of training after every round of collection, at most."""
    patience: int = _amount(6, Whole(1, 1_000_000))
    """Epochs without a better loss on validation documents after which training stops; the best is kept."""
    batch_chunks: int = _amount(512, COUNT)
    learning_rate: float = _amount(3e-3, Number(0, 1, above=True))
    weight_decay: float = _amount(1e-2, Number(0, 10))
    hidden: int = _amount(64, LearnedPolicy.CONFIG["hidden"])
    seeds: int = _amount(1, Whole(1, 100))
    """Policies that are trained, each from its own seed; intervals are over these as well."""
    bootstrap: int = _amount(1000, Whole(1, 1_000_000))
    """Resamples of the test documents, and seeds, behind the 95 % interval."""

    def __post_init__(self) -> None:
        check_fields(self, "amounts")
        if self.max_tokens <= self.min_completion_tokens:
            least = f"more than min_completion_tokens {self.min_completion_tokens}"
            raise refused("amounts.max_tokens", least, self.max_tokens, "raise it")
        if self.scales is None:
            return
        # The policy's own range of scales is symmetric; targets must cover all of it.
        mirrored = all(abs(a + b - 2.0) < 1e-6 for a, b in zip(self.scales, reversed(self.scales), strict=True))
        if not mirrored or 1.0 not in self.scales:
            raise refused("amounts.scales", "scales symmetric around 1.0, itself among them", self.scales)

"""What a rank policy is: signals of what is already known in, rung and scale of the opening chunk out.

Every policy has one scalar knob that moves it along its trade-off curve (log lambda for `learned`, a rung for `fixed`,
the centre of the band for `percentile` and `random`), so that one policy is the whole curve and every policy is
calibrated and compared the same way.

Shape legend: B rows, S signals (in the order of `SIGNALS`), F features, J rungs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .difficulty import Difficulty
from .limits import Entries, Limit
from .rungs import Rung, checked_rungs
from .settings import AGE, SIGNALS, STATS, TOKEN_SIGNALS


@dataclass(frozen=True)
class Summary:
    """What is known when a chunk opens.

    The statistics are over the tokens whose signals have become known since the last opening: of a signal that follows
    from the tokens, the chunk just closed; of one that the model puts out, everything completed in between, chunks
    that opened and closed inside one block included. Where nothing new is known, the latest statistics stand.
    """

    stats: Tensor
    """[B, S, 3] mean, max and last value of each signal, in [0, 1]."""
    valid: Tensor
    """[B, S] bool: a value of this signal exists."""
    first: Tensor
    """[B, 4] the signals of the opening chunk's first token that depend on tokens only, in their order."""
    position: Tensor
    """[B] long: index of that token in its row, counted from the row's first real token."""
    row: Tensor | None = None
    """[B] long: which row of the batch it is in, where several tokens of each are asked about; None: one of each."""
    age: Tensor | None = None
    """[B] float32 in [0, 1): 1 - 1 / (1 + n) where the model has put nothing out for n tokens; None: 0 everywhere."""
    hidden: Tensor | None = None
    """[B, 2 d] the model's last hidden state at the latest completed token, zeros before the first, and the embedding
    of the opening chunk's first; None, or d = 0, where nobody looks at it."""

    FEATURES: ClassVar[int] = len(SIGNALS) * len(STATS) + len(SIGNALS) + len(TOKEN_SIGNALS) + 1

    def features(self) -> Tensor:
        """[B, FEATURES + 2 d] float32: statistics, zero where invalid, then validity, the first token's signals, the
        age, and what is hidden."""
        # Masked, not multiplied: whatever stands where a signal is unknown, NaN included, must not be seen.
        stats = self.stats.to(torch.float32).masked_fill(~self.valid[..., None], 0.0)
        age = self.first.new_zeros(len(self.first)) if self.age is None else self.age
        parts = [stats.flatten(1), self.valid.to(torch.float32), self.first.to(torch.float32), age.float()[:, None]]
        if self.hidden is not None:
            parts.append(self.hidden.float())
        return torch.cat(parts, dim=1)

    def rows(self) -> Tensor:
        """[B] long: which row of the batch each token is in."""
        return torch.arange(len(self.position), device=self.position.device) if self.row is None else self.row

    @classmethod
    def from_features(cls, features: Tensor) -> Summary:
        """The summary whose `features()` these are, [N, FEATURES + 2 d]; positions, which they do not tell, count from
        0."""
        sizes = [len(SIGNALS) * len(STATS), len(SIGNALS), len(TOKEN_SIGNALS), 1, features.shape[1] - cls.FEATURES]
        stats, valid, first, age, hidden = features.split(sizes, 1)
        positions = torch.arange(len(features), device=features.device)
        return cls(stats.reshape(-1, len(SIGNALS), len(STATS)), valid.bool(), first, positions, None, age[:, 0], hidden)


def feature_columns(names: Collection[str]) -> list[int]:
    """The columns of `Summary.features()` that follow from the signals of these names, in their order there."""
    signals = [index for index, name in enumerate(SIGNALS) if name in names]
    stats = [index * len(STATS) + stat for index in signals for stat in range(len(STATS))]
    valid = len(SIGNALS) * len(STATS)
    first = valid + len(SIGNALS)
    own = [first + index for index, name in enumerate(TOKEN_SIGNALS) if name in names]
    age = [first + len(TOKEN_SIGNALS)] if AGE in names else []
    return [*stats, *(valid + index for index in signals), *own, *age]


@dataclass(frozen=True)
class Decision:
    """Rung and scale for the chunk that opens."""

    rung: Tensor
    """[B] long, index into the rungs."""
    scales: Tensor
    """[B, J] float32: what multiplies the adapter's output at every rung, also at one that a budget or the start of a
    text puts in the place of `rung`; 1 at the top."""

    @property
    def scale(self) -> Tensor:
        """[B] float32: the scale of `rung`."""
        return self.scales.gather(1, self.rung[:, None])[:, 0]


class RankPolicy(nn.Module, ABC):
    """Maps summaries to decisions. Pure: the same summary and knob always give the same decision.

    `rungs` are the equivalent ranks it chooses among, ascending, the last one the exact adapter; `config` are the
    constructor's other arguments that are JSON values. Raises ValueError for what is not within its limit.
    """

    kind: ClassVar[str]
    wants_hidden: bool = False
    """Whether a decision depends on the model's states, which the run has to hear then."""
    looks: ClassVar[bool] = True
    """Whether a decision depends on the summary; without, a row runs at one rung from its first token to its last."""
    CONFIG: ClassVar[Mapping[str, Limit]] = {}
    """Constructor arguments that are JSON values, each with its limit; tensors belong in the state dict."""
    rungs: tuple[Rung, ...]

    def __init__(self, rungs: Sequence[Rung], **config: Any) -> None:
        super().__init__()
        self.rungs = checked_rungs(rungs)
        self._config: dict[str, Any] = Entries(self.CONFIG).take("", config)

    @abstractmethod
    def decide(self, summary: Summary, knob: Tensor) -> Decision:
        """Choose for every row; `knob` is [B] float32. Must not synchronise with the host."""

    @abstractmethod
    def knob_range(self) -> tuple[float, float]:
        """(cheapest, dearest): knob values that give this policy's least and greatest mean cost."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments of `CONFIG`."""
        return dict(self._config)

    def difficulty(self) -> Difficulty | None:
        """Token difficulty of an adapter that has none of its own: the mean over those it was trained on."""
        return None

    def check_tensors(self) -> None:
        """Raise ValueError unless the tensors, which are loaded behind the constructor's back, are what it allows."""

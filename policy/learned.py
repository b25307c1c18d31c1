"""A few thousand weights that predict what each rung would cost in quality, and weigh that against its bytes.

For a chunk with features x the network predicts the damage q_j (nats of KL per token, against the full rank) of every
rung j, and the policy is

    logits_j = -(q_j(x, log lambda) / lambda + c_j) / t        c_j: cost in [0, 1];  t: learned, at least 0.01

that is, the rung of least `q + lambda c` with a softness measured in cost, so gradients have one size at every lambda.
The network says only by what factor this chunk differs from the average: `q_j = sum_{i >= j} unit_i exp(h_i(x))`, where
`unit` is the average damage of giving up rung i + 1 for rung i. Three things hold by construction:

- The top rung is exact: q_top = 0 and its scale is 1. q never rises with j.
- At initialisation (h = 0, every scale 1) it is the best policy that does not look at the text.
- As long as h does not use log lambda (its input weights start at 0), raising lambda never raises the chosen cost nor
  the expected one: with q falling and c rising in j, d E[c] / d(1/lambda) = -Cov(q, c) / t >= 0.

At the cheap end of the knob a chunk of extreme damage may still be given a better rung; at the dear end every chunk
gets the top rung.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .contract import Decision, RankPolicy, Summary, feature_columns
from .difficulty import MOST_CODE, PAIRS, Difficulty
from .limits import Limit, Number, Several, Whole, refused
from .rungs import Rung
from .settings import AGE, HIDDEN, SIGNALS, SignalNames

MOST_GROWTH = 6.0
"""|h| stays below this: one chunk's damage differs from the average by at most a factor exp(6) = 403."""
PROJECTED = 16
"""Numbers to which the model's states are projected."""
_LEAST_TEMPERATURE = 0.01
_LEAST_UNIT_NATS = 1e-6
_LEAST_STD = 1e-3
"""A feature that moves less than this on training data is constant; dividing by its spread would blow up noise."""


class LearnedPolicy(RankPolicy):
    """MLP over features of a `Summary` and log lambda; the knob is log lambda, lambda in nats per unit of cost.

    `signals` are what it looks at (left out: everything but the model's states), C columns of `Summary.features()`;
    `vocabulary` says how many token ids its table of difficulty has, of which 0 is none, and `width` how wide the
    model's states are, where it looks at them: state and embedding are normalised and projected to `PROJECTED` numbers.

    `cost` is [J], non-decreasing, 1 at the top (left out: rung / top rung); `scale_range` bounds the scale of a rung
    to 1 +- scale_range; `log_lambda_range` is where lambda is kept. Raises ValueError for fewer than two rungs.
    """

    kind: ClassVar[str] = "learned"
    CONFIG: ClassVar[Mapping[str, Limit]] = {
        "hidden": Whole(1, 8192),
        "scale_range": Number(0, 1, below=True),
        "log_lambda_range": Several(Number(-40, 40), 2, 2, distinct=True),
        "signals": SignalNames(),
        "vocabulary": Whole(0, 2**24),
        "width": Whole(0, 2**20),
    }
    cost: Tensor
    feature_mean: Tensor
    feature_std: Tensor
    log_lambda_centre: Tensor
    log_lambda_spread: Tensor
    damage_unit: Tensor
    later: Tensor
    columns: Tensor
    token_difficulty: Tensor
    pair_difficulty: Tensor
    projection: nn.Linear

    def __init__(
        self,
        rungs: Sequence[Rung],
        hidden: int = 48,
        scale_range: float = 0.3,
        log_lambda_range: tuple[float, float] = (-14.0, 7.0),
        cost: Tensor | None = None,
        signals: Sequence[str] = (*SIGNALS, AGE),
        vocabulary: int = 0,
        width: int = 0,
    ) -> None:
        super().__init__(
            rungs, hidden=hidden, scale_range=scale_range, log_lambda_range=log_lambda_range, signals=signals,
            vocabulary=vocabulary, width=width,
        )  # fmt: skip
        count = len(self.rungs)
        if count < 2:
            raise ValueError(f"rungs: expected at least two to choose from, got {self.rungs}; use a fixed policy")
        hidden = self._config["hidden"]
        self.scale_range: float = self._config["scale_range"]
        self.log_lambda_range: tuple[float, float] = self._config["log_lambda_range"]
        low, high = self.log_lambda_range

        ranks = torch.tensor(self.rungs, dtype=torch.float32)
        cost = ranks / ranks[-1] if cost is None else _checked_cost(cost, count)
        self.register_buffer("cost", cost)
        columns = feature_columns(self._config["signals"])
        self.register_buffer("columns", torch.tensor(columns), persistent=False)
        self.register_buffer("feature_mean", torch.zeros(len(columns)))
        self.register_buffer("feature_std", torch.ones(len(columns)))
        self.register_buffer("log_lambda_centre", torch.tensor((low + high) / 2))
        self.register_buffer("log_lambda_spread", torch.tensor((high - low) / 4))
        # Until calibrated: damage about 0.05 (top / rank - 1) nats, the size seen on instruction-tuned adapters.
        guess = 0.05 / cost.clamp(min=1 / 64)
        self.register_buffer("damage_unit", (guess[:-1] - guess[1:]).clamp(min=_LEAST_UNIT_NATS))
        # Sums the steps from rung j up; a matrix, because cumsum has no deterministic CUDA kernel.
        self.register_buffer("later", torch.ones(count - 1, count).tril(), persistent=False)

        if vocabulary:
            neutral = Difficulty.neutral(vocabulary, PAIRS)
            self.register_buffer("token_difficulty", neutral.token)
            self.register_buffer("pair_difficulty", neutral.pair)
        self.wants_hidden = HIDDEN in self._config["signals"]
        if self.wants_hidden != bool(width):
            expected = "at least 1, as the signals name hidden" if self.wants_hidden else "0, as no signal is hidden"
            raise refused("width", expected, width)
        projected = PROJECTED if width else 0
        if width:
            self.projection = nn.Linear(2 * width, projected)
        inputs = len(columns) + projected + 1
        self.trunk = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.damage_head = nn.Linear(hidden, count - 1)
        self.scale_head = nn.Linear(hidden, count - 1)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.1)))
        self._start_blind()

    @torch.no_grad()
    def _start_blind(self) -> None:
        first = self.trunk[0]
        assert isinstance(first, nn.Linear), "the trunk starts with a linear layer"
        first.weight[:, -1] = 0
        for head in (self.damage_head, self.scale_head):
            head.weight.zero_()
            head.bias.zero_()

    @torch.no_grad()
    def calibrate(self, features: Tensor, damage: Tensor, log_lambda: Tensor | None = None) -> None:
        """Set the normalisers from training data; call once, before training.

        `features` [N, FEATURES]; `damage` [N, J], KL of every rung in nats per token (at scale 1); `log_lambda` [N] or
        any other number of the values that training will draw (left out: spread over `log_lambda_range`). Raises
        ValueError for other shapes or values that are not finite.
        """
        features_wide = Summary.FEATURES + 2 * self._config["width"]
        # A policy that does not look at the model's states may be given them.
        wide = features.ndim == 2 and (features.shape[1] == features_wide or not self.wants_hidden)
        fits = wide and features.shape[1] >= features_wide and damage.shape == (len(features), len(self.cost))
        if not fits or len(features) == 0:
            got = f"{tuple(features.shape)} and {tuple(damage.shape)}"
            raise ValueError(f"features, damage: expected [N, {features_wide}] and [N, {len(self.cost)}], got {got}")
        if not bool(features.isfinite().all() and damage.isfinite().all()):
            raise ValueError("features, damage: expected finite numbers, got NaN or infinity; check the labels")
        seen = features[:, self.columns].double()
        mean, std = seen.mean(0), seen.std(0, correction=0)
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(torch.where(std < _LEAST_STD, 1.0, std))
        # Average damage that rises with rank (a plain SVD ladder can) counts as flat.
        falling = damage.double().mean(0).flip(0).cummax(0).values.flip(0)
        self.damage_unit.copy_((falling[:-1] - falling[1:]).clamp(min=_LEAST_UNIT_NATS))
        if log_lambda is not None:
            self.log_lambda_centre.copy_(log_lambda.double().mean())
            self.log_lambda_spread.copy_(log_lambda.double().std(correction=0).clamp(min=_LEAST_STD))

    def predict(self, features: Tensor, log_lambda: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted damage [B, J] in nats per token, and scale [B, J], of every rung; both float32.

        `features` is [B, FEATURES], `log_lambda` [B]; log lambda is kept within `log_lambda_range`.
        """
        log_lambda = log_lambda.float().clamp(*self.log_lambda_range)
        seen = (features[:, self.columns] - self.feature_mean) / self.feature_std
        weight = (log_lambda - self.log_lambda_centre) / self.log_lambda_spread
        inputs = torch.cat([seen.float(), *self._projected(features), weight.float()[:, None]], dim=1)
        hidden = self.trunk(inputs.to(self.damage_head.weight.dtype))
        growth = MOST_GROWTH * torch.tanh(self.damage_head(hidden).float() / MOST_GROWTH)
        # The floor makes the dear end of the knob mean the top rung for every chunk, whatever was learned.
        floor = 2 * math.exp(self.log_lambda_range[0]) * self.cost.float().diff()
        damage = (self.damage_unit.float() * torch.exp(growth) + floor) @ self.later.float()
        scale = 1 + self.scale_range * torch.tanh(self.scale_head(hidden).float())
        return damage, torch.cat([scale, torch.ones_like(scale[:, :1])], dim=1)

    def _projected(self, features: Tensor) -> list[Tensor]:
        """[B, PROJECTED] of the model's states, where it looks at them."""
        if not self.wants_hidden:
            return []
        width: int = self._config["width"]
        pair = features[:, Summary.FEATURES :].view(len(features), 2, width).float()
        # A state that is not there yet is all zeros, and stays so.
        unit = nn.functional.layer_norm(pair, (width,)).flatten(1)
        return [torch.tanh(self.projection(unit.to(self.projection.weight.dtype)).float())]

    def damage(self, features: Tensor) -> Tensor:
        """Predicted damage [B, J] of `features` [B, FEATURES], at no lambda in particular."""
        return self.predict(features, self.log_lambda_centre.expand(len(features)))[0]

    def mean_damage(self) -> Tensor:
        """[J] what an average chunk loses at every rung, as calibrated; 0 at the top."""
        return self.damage_unit.float() @ self.later.float()

    def logits(self, features: Tensor, log_lambda: Tensor) -> tuple[Tensor, Tensor]:
        """Rung logits [B, J] and scale [B, J], float32, of `features` [B, FEATURES] at `log_lambda` [B]."""
        damage, scale = self.predict(features, log_lambda)
        price = torch.exp(-log_lambda.float().clamp(*self.log_lambda_range))[:, None]
        temperature = self.log_temperature.float().exp().clamp(min=_LEAST_TEMPERATURE)
        return -(damage * price + self.cost.float()) / temperature, scale

    @torch.no_grad()
    def decide(self, summary: Summary, knob: Tensor) -> Decision:
        logits, scale = self.logits(summary.features(), knob)
        return Decision(logits.argmax(1), scale)

    @torch.no_grad()
    def set_scales(self, scales: Tensor) -> None:
        """Give every rung a scale [J] that does not depend on the text, within the range of scales."""
        if self.scale_range:
            self.scale_head.weight.zero_()
            share = ((scales[:-1] - 1) / self.scale_range).clamp(-1 + 1e-6, 1 - 1e-6)
            self.scale_head.bias.copy_(torch.atanh(share))

    @torch.no_grad()
    def set_difficulty(self, difficulty: Difficulty) -> None:
        """The tables that it carries, [vocabulary] and [PAIRS]."""
        self.token_difficulty.copy_(difficulty.token)
        self.pair_difficulty.copy_(difficulty.pair)

    def difficulty(self) -> Difficulty | None:
        if not self._config["vocabulary"]:
            return None
        return Difficulty(self.token_difficulty, self.pair_difficulty)

    def knob_range(self) -> tuple[float, float]:
        low, high = self.log_lambda_range
        return high, low

    def check_tensors(self) -> None:
        _checked_cost(self.cost, len(self.rungs))
        for name in ("feature_std", "log_lambda_spread", "damage_unit"):
            values = self.get_buffer(name)
            if not bool((values > 0).all()):
                raise refused(name, "numbers above 0", values.tolist(), "fit it again")
        for name in ("token_difficulty", "pair_difficulty") if self._config["vocabulary"] else ():
            if int(self.get_buffer(name).max()) > MOST_CODE:
                raise refused(name, f"codes up to {MOST_CODE}", int(self.get_buffer(name).max()), "fit it again")


def _checked_cost(cost: Tensor, count: int) -> Tensor:
    """A copy in float32. Raises ValueError unless it is [count], ascending within [0, 1], and ends in 1."""
    cost = cost.detach().to(torch.float32).clone()
    ascending = cost.shape == (count,) and bool(cost.isfinite().all()) and not bool((cost.diff() < 0).any())
    if not ascending or float(cost[0]) < 0 or float(cost[-1]) != 1:
        raise refused("cost", f"{count} ascending numbers in [0, 1] ending in 1", cost.tolist())
    return cost

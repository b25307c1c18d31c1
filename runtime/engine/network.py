"""A learned policy's numbers as the controller's kernel reads them.

Shape legend: C features that the policy looks at, J rungs; F, H and JP are C + 1 (log lambda), the hidden units and J,
filled up to powers of two with zeros, which add nothing to any sum.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from triton import next_power_of_2

from policy.fixed import FixedPolicy
from policy.learned import LearnedPolicy

from ..ops.control import LOG_LAMBDA


@dataclass(frozen=True)
class Network:
    """float32 but for `columns`."""

    by_rung: Tensor
    """[5, JP] biases of damage and scale, unit and floor of the damage (nats), cost; of a fixed policy scales [1, J]"""
    columns: Tensor | None = None
    """[F] int32: of `Summary.features()` those looked at, then `LOG_LAMBDA`; -1 behind them."""
    normal: Tensor | None = None
    """[2, F] mean and standard deviation of the inputs."""
    first: Tensor | None = None
    """[H, F] of outputs and inputs."""
    second: Tensor | None = None
    """[H, H] of inputs and outputs."""
    biases: Tensor | None = None
    """[2, H] of both layers."""
    heads: Tensor | None = None
    """[2, JP, H] of damage and scale; zeros at the top rung, which does no damage and has scale 1."""

    @classmethod
    @torch.no_grad()
    def of(cls, policy: LearnedPolicy | FixedPolicy, device: torch.device) -> Network:
        """The policy's numbers as they are now, on `device`, whatever device the policy is on."""
        policy = deepcopy(policy).to(device)
        if isinstance(policy, FixedPolicy):
            return cls(policy.scales.float()[None].contiguous())
        one, two = policy.trunk[0], policy.trunk[2]
        assert isinstance(one, nn.Linear), "the trunk starts with a linear layer"
        assert isinstance(two, nn.Linear), "and has a second one behind its activation"
        f, h, j = (next_power_of_2(n) for n in (one.in_features, one.out_features, len(policy.rungs)))
        looked = torch.cat([policy.columns, policy.columns.new_tensor([LOG_LAMBDA])])
        mean = torch.cat([policy.feature_mean, policy.log_lambda_centre[None]])
        std = torch.cat([policy.feature_std, policy.log_lambda_spread[None]])
        damage, scale, cost = policy.damage_head, policy.scale_head, policy.cost.float()
        floor = 2 * math.exp(policy.log_lambda_range[0]) * cost.diff()
        by_rung = (damage.bias, scale.bias, policy.damage_unit, floor, cost)
        return cls(
            torch.stack([_filled(values, j) for values in by_rung]),
            pad(looked, (0, f - len(looked)), value=-1).int(),
            torch.stack([_filled(mean, f), pad(std.float(), (0, f - len(std)), value=1.0)]),
            _filled(one.weight, h, f),
            _filled(two.weight.T, h, h),
            torch.stack([_filled(one.bias, h), _filled(two.bias, h)]),
            torch.stack([_filled(damage.weight, j, h), _filled(scale.weight, j, h)]),
        )


def _filled(values: Tensor, *shape: int) -> Tensor:
    """values in a tensor of zeros of this shape, from the first entry of every axis on; float32, contiguous."""
    filled = torch.zeros(shape, device=values.device)
    filled[tuple(slice(size) for size in values.shape)] = values
    return filled

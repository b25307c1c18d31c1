"""From the host to the device, and nobody waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """values of the host on `device`."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def put(tensor: Tensor, values: Any) -> None:
    """Write numbers into a tensor of the device."""
    host = torch.tensor(values, dtype=tensor.dtype)
    tensor.copy_(host.pin_memory() if tensor.is_cuda else host, non_blocking=True)

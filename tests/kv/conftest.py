"""Every test here runs on the CPU and, marked `gpu`, on a CUDA device."""

import pytest
import torch

from runtime.kv import formats


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwritten memory of the pools holds NaN, or the largest code."""

    def poison(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        fill = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        return torch.full(shape, fill, dtype=dtype, device=device)

    monkeypatch.setattr(formats, "blank", poison)

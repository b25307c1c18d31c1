"""Models, adapters and plans for the tests on a CUDA device. Every test here carries the mark `gpu`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from policy.fixed import FixedPolicy
from policy.operating import Operating
from policy.settings import FULL_KV, KVSettings, Settings
from runtime import build_ladder, load_adapter
from runtime.ladder import Ladder
from runtime.plan import RunPlan
from tests.runtime.reference import handmade_ladder

RANK = 8


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory, tiny_llama_factory, make_peft_adapter) -> Path:
    """Rank 8 on all linears of the tiny LLaMA, A and B random."""
    return make_peft_adapter(tiny_llama_factory, tmp_path_factory.mktemp("adapter") / "tiny", r=RANK)


@pytest.fixture(scope="session")
def ladder(tiny_adapter) -> Ladder:
    """On the host, as a user's is when it was read from disk."""
    return build_ladder(load_adapter(tiny_adapter))


@pytest.fixture(scope="session")
def coded(tiny_adapter) -> Ladder:
    """Two banks in 8, 4 and 2 bits beside the exact adapter, every module another mix; on the host too."""
    return handmade_ladder(load_adapter(tiny_adapter))


@pytest.fixture(scope="session")
def fixed_plan(ladder) -> Callable[..., RunPlan]:
    """`fixed_plan(rung=8, kv=FULL_KV, **settings)`: one rung of the tiny adapter for all tokens."""

    def plan(rung: int = RANK, kv: KVSettings = FULL_KV, **options) -> RunPlan:
        index = ladder.rung_index(rung)
        settings = Settings(**({"fade_tokens": 1, "kv": kv} | options))
        return RunPlan((ladder,), FixedPolicy(ladder.rungs), settings, Operating.at(float(index), index, kv))

    return plan


@pytest.fixture(scope="session")
def with_peft() -> Callable[..., torch.nn.Module]:
    """`with_peft(model, folder)`: PEFT's own unmerged model, adapter in the model's dtype."""

    def wrap(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()

    return wrap


@pytest.fixture(scope="session")
def random_ids(device) -> Callable[..., torch.Tensor]:
    """`random_ids(rows, tokens, seed=0)`: ids of the tiny LLaMA on the device, no special ones."""

    def make(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 256, (rows, tokens), generator=generator).to(device)

    return make

"""A small adapter measured once: its directions, a ladder of six rungs, and documents of three splits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from runtime.ladder import Adapter, load_adapter
from training.ladders.build import Measured, adapter_directions, calibrated, exact_pairs, mixed_ladder

RUNGS = (0.5, 0.75, 1, 2, 4)
"""Of rank 8: three rungs up to an eighth, one of a quarter, and the half."""


@dataclass(frozen=True)
class Split:
    """Documents of different lengths, some with a prompt; no two parts share one."""

    train: list[dict]
    validation: list[dict]
    test: list[dict]


@pytest.fixture(scope="session")
def split(make_example) -> Split:
    def part(count: int, seed: int) -> list[dict]:
        return [make_example(24 + 5 * (i % 4), 3 * (i % 3), seed=seed + i) for i in range(count)]

    return Split(part(8, 1000), part(4, 2000), part(4, 3000))


@pytest.fixture(scope="session")
def source(llama_adapter: Path) -> Adapter:
    return load_adapter(llama_adapter)


@pytest.fixture(scope="session")
def measured(source, tiny_llama_factory, split) -> Measured:
    return adapter_directions(source, tiny_llama_factory(), split.train, seed=0)


@pytest.fixture(scope="session")
def mixed(source, measured, tiny_llama_factory, split):
    return calibrated(mixed_ladder(source, measured, RUNGS), tiny_llama_factory(), split.train)


@pytest.fixture(scope="session")
def exact(mixed) -> dict:
    return exact_pairs(mixed)


@pytest.fixture(scope="session")
def merged() -> Callable:
    """`merged(model, adapter)`: the model itself with the adapter in its weights."""

    def merge(model, adapter):
        for name, own in adapter.modules.items():
            weight = model.get_submodule(name).weight
            update = own.scale * own.b.double() @ own.a.double()
            transposed = type(model.get_submodule(name)).__name__ == "Conv1D"
            with torch.no_grad():
                weight += (update.T if transposed else update).to(weight)
        return model

    return merge


def state_of(model) -> list:
    """All that a measurement has to leave as it was."""
    modules = [
        (
            name,
            module.training,
            vars(module).get("forward"),
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]
    weights = [(name, p.requires_grad, p.grad, p.detach().clone()) for name, p in model.named_parameters()]
    return [modules, weights]


@pytest.fixture(scope="session")
def unchanged() -> Callable:
    """`unchanged(model)`: call what it returns to hold the model against what it was."""

    def remember(model):
        before = state_of(model)

        def check() -> None:
            modules, weights = state_of(model)
            assert modules == before[0]
            assert [own[:3] for own in weights] == [own[:3] for own in before[1]]
            assert all(torch.equal(own[3], old[3]) for own, old in zip(weights, before[1], strict=True))

        return check

    return remember

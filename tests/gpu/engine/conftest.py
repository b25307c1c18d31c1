"""A small model with heads that share, three ladders of it, a policy that decides, and batches that go on decoding."""

from __future__ import annotations

import pytest

from runtime import load_adapter
from runtime.plan import plan_run, static_plan
from tests.engine import tiny
from tests.gpu.engine.serving import LENGTHS, Serving, endless, served
from tests.runtime.reference import handmade_ladder


@pytest.fixture(scope="session")
def ladders(tiny_llama_factory, make_peft_adapter, tmp_path_factory):
    """Every rung in other directions, bits and scales, every ladder of another adapter; two are served, one waits."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = [make_peft_adapter(tiny_llama_factory, folder / str(seed), seed=seed) for seed in range(3)]
    return [handmade_ladder(load_adapter(path), seed) for seed, path in enumerate(paths)]


@pytest.fixture(scope="session")
def llama(tiny_llama_factory, device):
    return endless(tiny_llama_factory()).to(device)


@pytest.fixture(scope="session")
def exact(tiny_llama_factory):
    """The same model in float64 on the host."""
    return endless(tiny_llama_factory()).double()


@pytest.fixture(scope="session")
def learned(llama, ladders):
    """A policy for which small differences of the signals count, so that no row stays at a rung for long."""
    made = tiny.checkpoint(llama, ladders[0])
    made.policy.feature_std.fill_(0.3)
    return made


@pytest.fixture(scope="module", params=[1, 3], ids=["one row", "three rows"])
def rows(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def fixed(llama, ladders, rows) -> Serving:
    """Rows at rungs of their own, of the first ladder; the second is there too."""
    rungs = [ladders[0].rungs[own] for own in (2, 5, 4)[:rows]]
    return served(llama, static_plan(ladders[:2], rungs, [0] * rows), LENGTHS[:rows])


@pytest.fixture(scope="module")
def deciding(llama, ladders, learned, rows) -> Serving:
    """Rows of budgets and ladders of their own, which a policy decides for."""
    budgets = list(tiny.BUDGETS[:rows])
    own = [ladders[row % 2] for row in range(rows)]
    plan = plan_run(own, policy=learned, budget=budgets, model_fingerprint=learned.fingerprints["model"])
    return served(llama, plan, LENGTHS[:rows])


@pytest.fixture(scope="module", params=["fixed", "deciding"])
def serving(request, rows) -> Serving:
    """Either of them."""
    return request.getfixturevalue(request.param)

"""What the tests of the engine share: a tiny model, two ladders of it, and a policy that decides among their rungs."""

import pytest

from tests.engine import tiny


@pytest.fixture(scope="module")
def llama(device):
    return tiny.model(device=device)


@pytest.fixture(scope="module")
def ladders(llama):
    return tiny.ladder(llama), tiny.ladder(llama, 1)


@pytest.fixture(scope="module")
def learned(llama, ladders):
    return tiny.checkpoint(llama, ladders[0])

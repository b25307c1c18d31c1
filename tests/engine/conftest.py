"""What the tests of the engine share: a tiny model, two ladders of it, and a policy that decides among their rungs."""

from importlib import import_module

import pytest

from runtime.engine import decoder as decoders
from runtime.ops.shrink import Shares
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


@pytest.fixture
def made(monkeypatch):
    """Every decoder that is made; of kernels fewer programs, each with more to do, as interpreted programs are slow."""
    found = []

    class Kept(decoders.Decoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(import_module("runtime.generate.fast"), "Decoder", Kept)
    monkeypatch.setattr(decoders, "splits_for", lambda *_: 2)
    monkeypatch.setattr(Shares, "of", lambda batch, width, directions: Shares(1, 8, 128, 128))
    return found

"""What `benchmarks.soak` does to an engine, and that it would notice a page that is lost."""

import random

import pytest

from benchmarks import soak
from runtime.engine import decoder
from runtime.engine.serving import Engine
from runtime.ops.shrink import Shares
from tests.engine import tiny

STEPS = 16


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(soak, "PROMPT", (1, 12))
    monkeypatch.setattr(soak, "ANSWER", (6, 10))
    monkeypatch.setattr(soak, "BUDGETS", tiny.BUDGETS)
    # of kernels fewer programs, as interpreted programs are slow
    monkeypatch.setattr(decoder, "splits_for", lambda *_: 1)
    monkeypatch.setattr(Shares, "of", lambda batch, width, directions: Shares(1, 8, 128, 128))
    model = tiny.model()
    ladder = tiny.ladder(model)
    return Engine(model, {"a": ladder}, policy=tiny.checkpoint(model, ladder), rows=2, context=24, pool_bytes=2**16)


def test_rows_are_kept_busy_and_who_is_cancelled_makes_room(engine, monkeypatch):
    for name, value in (("GIVEN_UP", 1.0), ("ROWS", 1), ("WAITING", 1)):
        monkeypatch.setattr(soak, name, value)
    done = soak.Done()
    soak.run(engine, STEPS, random.Random(0), done)
    assert done.cancelled > 2, "more than are there at a time"
    assert done.tokens > STEPS / 2, "rows are at work"
    assert 0 < done.rows <= 2 * STEPS
    assert not engine.busy
    point = soak.point(engine, STEPS, done, 0.0)
    assert (point["lost"], point["dry"], point["requests"]) == (0, 0, done.requests)

    top, stack = engine.pool.free.top, engine.pool.free.stack
    top.sub_(1)
    assert soak.lost(engine) == 1, "one is missing"
    top.add_(1)
    stack[0] = stack[1].clone()
    assert soak.lost(engine) == 2, "one is missing, and another is there twice"

"""Requests join and leave, and pages change their format, without a wait, a capture or a compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from policy import KVSettings
from runtime.engine.request import CANCELLED, LENGTH, Request
from runtime.engine.serving import Engine
from runtime.ops.reference.sampling import Sampling
from tests.engine import tiny
from tests.gpu.engine.serving import counted, no_waits

pytestmark = pytest.mark.gpu

ROWS, NEW_TOKENS = 4, 40
ASKED = [(46, "a", 0.3), (33, "b", 0.9), (5, "a", 1.0), (70, "b", 0.6), (3, "a", 0.6), (17, "b", 0.9)]
"""Tokens of the prompt, adapter and budget"""
PAGES = {name: KVSettings(window_tokens=16, threshold=at, sink_pages=0) for name, at in (("a", 0.0), ("b", 64.0))}
"""By adapter: int8 for all pages that leave the window, or int4"""


@pytest.fixture
def engine(llama, ladders, learned):
    settings = replace(learned.settings, block_tokens=16, prompt_tokens=16, kv=PAGES["a"])
    policy = replace(learned, settings=settings)
    return Engine(
        llama, dict(zip("ab", ladders[:2], strict=True)), policy=policy, rows=ROWS, context=128, part_tokens=32
    )


def requests(engine: Engine, seed: int, sampled: bool) -> list[Request]:
    """One of each kind."""
    return [
        Request(
            tiny.prompts(length, seed=seed + number)[0][0].tolist(),
            engine.operating(name, budget=budget, kv=PAGES[name]),
            sampling=Sampling(temperature=float(sampled), seed=number), max_new_tokens=NEW_TOKENS - number,
        )
        for number, (length, name, budget) in enumerate(ASKED)
    ]  # fmt: skip


def test_who_joins_and_leaves_is_not_waited_for(engine, monkeypatch):
    engine.run(requests(engine, 0, sampled=False))  # what is the same for all is brought to the device once
    own, found = engine.pool.free, counted(monkeypatch)
    assert int(own.top) == len(engine.pool)
    wanted = requests(engine, 10, sampled=True)
    answers, lanes = [], engine._wide.lanes
    formats = torch.zeros_like(lanes.tables.counts)
    with no_waits():
        for step in range(400):
            if step % 7 == 0 and wanted:
                answers.append(engine.add(wanted.pop()))
            if step == 30:
                engine.cancel(answers[1])
            engine.step()
            torch.maximum(formats, lanes.tables.counts, out=formats)
            if not (wanted or engine.busy):
                break
    assert found == []
    assert [own.finished for own in answers] == [LENGTH, CANCELLED, *[LENGTH] * 4]
    assert 0 < len(answers[1].tokens) < NEW_TOKENS
    assert int(formats[:, 1].max()) > 0, "pages went to int8"
    assert int(formats[:, 2].max()) > 0, "and to int4"
    assert int(own.top) == len(engine.pool)
    assert sorted(own.stack.tolist()) == list(range(len(engine.pool)))
    assert int(own.dry) == 0
    assert not any(answer.preempted for answer in answers)

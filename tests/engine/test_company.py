"""Requests that come and go: each is answered as if it were alone, whoever comes, leaves or gives way beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from policy import KVSettings
from runtime import generate
from runtime.engine import decoder as decoders
from runtime.engine import loaded, serving
from runtime.engine.request import CANCELLED, LENGTH, Request
from runtime.engine.serving import Engine
from runtime.ops.reference.sampling import Sampling
from runtime.ops.shrink import Shares
from tests.engine import tiny

CODING = KVSettings(window_tokens=16, threshold=0.6, sink_pages=0)
BLOCK = 16
ASKED = (("a", 6, 30, 0.9), ("b", 3, 32, 0.3), ("a", 20, 8, 0.6), ("b", 40, 4, 0.6))
"""Adapter, prompt, answer and budget"""


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch):
    """Each with more to do, as interpreted programs are slow."""
    monkeypatch.setattr(decoders, "splits_for", lambda *_: 2)
    monkeypatch.setattr(Shares, "of", lambda batch, width, directions: Shares(1, 8, 128, 128))


@pytest.fixture(scope="module")
def coding(llama, ladders):
    own = tiny.checkpoint(llama, ladders[0], kv=CODING)
    return replace(own, settings=replace(own.settings, prompt_tokens=BLOCK))


@pytest.fixture(scope="module")
def alone(llama, ladders, coding):
    """What the reference path answers each of them."""
    found = []
    for adapter, prompt, new, budget in ASKED:
        ids = torch.tensor([ids_of(prompt)], device=llama.device)
        out = generate(
            llama, ladders["ab".index(adapter)], ids, policy=coding, budget=budget, fast=False, max_new_tokens=new,
            **tiny.GREEDY,
        )  # fmt: skip
        found.append(out.sequences[0, prompt:].tolist())
    return found


def ids_of(count: int) -> list[int]:
    return torch.randint(3, tiny.VOCABULARY, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def made(llama, ladders, policy, units=200, rows=3, **options):
    """An engine with a pool of so many units."""
    a, b = ladders
    each = 16 * 8 + 48 if policy is not None else 2 * 16 * 8 * 4
    return Engine(
        llama, {"a": a, "b": b}, policy=policy, rows=rows, context=64, part_tokens=BLOCK, pool_bytes=units * each,
        **options,
    )  # fmt: skip


def requests(engine, asked=ASKED):
    return [
        Request(ids_of(prompt), engine.operating(adapter, budget=budget), max_new_tokens=new)
        for adapter, prompt, new, budget in asked
    ]


def test_each_is_answered_as_alone_though_some_give_way(llama, ladders, coding, alone, monkeypatch):
    """Of two ladders, at budgets of their own, more than there are rows, joining at different steps, in a pool so small
    that one gives way; blocks are the policy's, factors of a prompt are unpacked once, notes are read a step behind."""
    engine = made(llama, ladders, coding, units=34)
    assert engine.pool.units.coded
    blocks, unpacked, order = [], [], []
    run, unpack = engine._prefill.run, loaded.Loaded._unpack
    monkeypatch.setattr(
        engine._prefill, "run",
        lambda ends: (blocks.extend((p.first, p.done, end) for p, end in ends), order.append("launch"), run(ends)),
    )  # fmt: skip
    monkeypatch.setattr(loaded.Loaded, "_unpack", lambda self, fresh: (unpacked.append(fresh), unpack(self, fresh)))
    monkeypatch.setattr(
        decoders.Decoder, "run", lambda self, own=decoders.Decoder.run: (order.append("launch"), own(self))
    )
    read = serving.Engine._read
    monkeypatch.setattr(serving.Engine, "_read", lambda self: (order.append("read"), read(self)))
    wanted = requests(engine)
    answers = [engine.add(own) for own in wanted[:2]]
    for _ in range(3):
        engine.step()
    answers += [engine.add(own) for own in wanted[2:]]
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.live)
    assert [own.tokens for own in answers] == alone
    assert {own.finished for own in answers} == {LENGTH}
    assert sum(own.preempted for own in answers) > 0
    assert 2 <= most <= 3
    assert int(engine.pool.free.top) == len(engine.pool) == 34
    assert sorted(engine.pool.free.stack.tolist()) == list(range(34))
    assert int(engine.pool.free.dry) == 0
    assert {end - start for _, start, end in blocks if end % BLOCK == 0} == {BLOCK}
    assert len(unpacked) < len(blocks)
    assert order.index("read") > 1, "a step is launched before the one before is looked at"


def test_sampled_answers_that_give_way_are_those_alone(llama, ladders):
    """Full pages at a rung, tokens drawn by seeds of their own."""

    def asked(engine):
        return [
            Request(ids_of(n), engine.operating("ab"[n % 2], rung=rung), Sampling(temperature=2.0, seed=n), 30)
            for n, rung in ((3, 4), (6, 8))
        ]  # fmt: skip

    small = made(llama, ladders, None, units=4)
    together = small.run(asked(small))
    assert sum(own.preempted for own in together) > 0
    single = made(llama, ladders, None, units=4, rows=1)
    for own, request in zip(together, asked(single), strict=True):
        assert single.run([request])[0].tokens == own.tokens
    assert together[0].tokens != together[1].tokens


def test_who_is_cancelled_leaves_at_once_and_moves_nobody(llama, ladders, coding, alone):
    """One that waits, one whose prompt is under way, and one that is decoded."""
    engine = made(llama, ladders, coding)
    long, short, other = (requests(engine)[n] for n in (3, 0, 2))
    living, under_way = engine.add(short), None
    engine.step()
    engine.step()
    assert living.tokens
    under_way, kept = engine.add(long), engine.add(other)
    waiting = engine.add(short)
    engine.step()
    assert engine.live == 3
    before = int(engine.pool.free.top)
    engine.cancel(waiting)
    engine.cancel(under_way)
    assert int(engine.pool.free.top) > before
    engine.cancel(living)
    assert engine.live == 1
    while engine.busy:
        engine.step()
    assert {own.finished for own in (waiting, under_way, living)} == {CANCELLED}
    assert kept.tokens == alone[2]
    assert int(engine.pool.free.top) == len(engine.pool)
    found = [token for news in engine.stream(requests(engine)[2]) for token in news.tokens]
    assert found == alone[2]
    for _ in engine.stream(requests(engine)[2]):
        break
    assert engine.live == 0
    assert int(engine.pool.free.top) == len(engine.pool)


@pytest.mark.parametrize(
    ("asks", "error"),
    [
        (lambda e: e.operating("c"), "adapter: expected one of a, b, got 'c'"),
        (lambda e: e.operating("a", budget=0.5), "policy: expected one to spend budget=0.5 by, got none"),
        (lambda e: e.operating("a", rung=3.5), "rung: expected one of"),
        (lambda e: Request([], e.operating("a")), "request.prompt: expected at least one token id"),
        (lambda e: Request([1], e.operating("a"), max_new_tokens=0), "request.max_new_tokens: expected a whole number"),
        (
            lambda e: e.add(Request([99], e.operating("a"), max_new_tokens=4)),
            "request.prompt: expected token ids below 40",
        ),
        (lambda e: e.add(Request([1] * 60, e.operating("a"), max_new_tokens=5)), "expected at most 64 tokens"),
        (
            lambda e: e.add(Request([1], e.operating("a"), max_new_tokens=4, stop=("x",))),
            "expected an engine with a tokenizer",
        ),
        (
            lambda e: e.add(Request([1], e.operating("a", kv=CODING), max_new_tokens=4)),
            "kv: expected pages in the model's own dtype",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(plain, asks, error):
    with pytest.raises(ValueError, match=error) as refused:
        asks(plain)
    assert "\n" not in str(refused.value)


def test_who_would_not_fit_the_pool_alone_is_refused(plain):
    with pytest.raises(MemoryError, match="pool: expected room for"):
        plain.add(Request([1] * 30, plain.operating("a"), max_new_tokens=34))


@pytest.fixture(scope="module")
def plain(llama, ladders):
    return made(llama, ladders, None, units=4)

"""Requests that come and go are answered as each would be alone, whatever happens around them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers import decoders as pieces
from transformers import PreTrainedTokenizerFast

from policy import KVSettings, Operating
from policy.operating import KVRows
from policy.settings import PAGE_ACTIONS
from runtime import generate
from runtime.engine.control import Controller
from runtime.engine.decoder import Decoder
from runtime.engine.model import model_of
from runtime.engine.page_pool import units_of
from runtime.engine.prompts import Prefill
from runtime.engine.request import CANCELLED, END, LENGTH, STOP, Request
from runtime.engine.scheduler import Seat
from runtime.engine.serving import Engine
from runtime.engine.step import Forward
from runtime.kv.formats import FORMATS, FULL
from runtime.ops.reference.sampling import Sampling
from tests.engine import tiny
from tests.engine.company import BLOCK, assert_all_is_free, coding
from tests.ops.ladders import random_adapter
from tests.runtime.reference import drawn_tables, handmade_ladder

pytestmark = pytest.mark.usefixtures("made")

SAMPLED = {"temperature": 2.0, "top_k": 30}


@pytest.fixture(scope="module")
def narrow(llama):
    """Two ladders of two linears alone: for tests of who runs when, which need not wait for all of them."""
    modules = {
        name: own for name, own in model_of(llama, 1).modules().items() if name.endswith(("v_proj", "down_proj"))
    }
    return [handmade_ladder(random_adapter(modules, 8, seed), seed) for seed in range(2)]


def prompt_of(length: int, seed: int) -> list[int]:
    return tiny.prompts(length, seed=seed)[0][0].tolist()


def alone(llama, ladder, request, **options):
    """The reference path's answer."""
    ids = torch.tensor([request.prompt], device=llama.device)
    given = tiny.GREEDY | {"fast": False, "max_new_tokens": request.max_new_tokens} | options
    return generate(llama, ladder, ids, **given).sequences[0, len(request.prompt) :].tolist()


def test_requests_that_join_are_answered_as_alone(llama, ladders, learned, monkeypatch):
    """Five of two adapters in three rows: budgets, pages in few bits beside whole ones, prompts of several blocks."""
    policy, cuts, run = coding(learned), [], Prefill.run
    ladders = [ladders[0], replace(ladders[1], difficulty=drawn_tables(1, tiny.VOCABULARY))]

    def cut(self, ends):
        cuts.append([(prompt, prompt.done, end) for prompt, end in ends])
        run(self, ends)

    monkeypatch.setattr(Prefill, "run", cut)
    engine = Engine(llama, dict(zip("ab", ladders, strict=True)), policy=policy, rows=3, context=64, part_tokens=24)
    asked = [(46, "a", 0.3, 6), (33, "b", 0.9, 8), (5, "a", 1.0, 3), (17, "b", 0.6, 4), (3, "a", 0.6, 1)]
    requests = [
        Request(prompt_of(length, seed), engine.operating(name, budget=budget), max_new_tokens=new)
        for seed, (length, name, budget, new) in enumerate(asked)
    ]
    read = engine._read

    def late():
        assert len(engine._notes) == 2 or not engine.live, "the next step is under way"
        read()

    monkeypatch.setattr(engine, "_read", late)
    answers, most, news = [engine.add(own) for own in requests[:2]], torch.zeros(3), []
    for step in range(100):
        news += engine.step()
        most = most.maximum(engine._wide.lanes.tables.counts.amax(0).cpu())
        assert engine.live <= 3
        assert engine._account.least <= int(engine.pool.free.top)
        check_policies(engine)
        if step in (1, 3):
            answers += [engine.add(own) for own in (requests[2:3] if step == 1 else requests[3:])]
        elif step > 3 and not engine.busy:
            break
    for (_, name, budget, _), request, answer in zip(asked, requests, answers, strict=True):
        ladder = ladders["ab".index(name)]
        assert answer.tokens == alone(llama, ladder, request, policy=policy, budget=budget)
        assert answer.finished == LENGTH
        assert answer.preempted == 0
        own = [one for one in news if one.answer is answer]
        assert [one.tokens for one in own] == [[token] for token in answer.tokens]
        assert [one.finished for one in own] == [None] * (len(own) - 1) + [LENGTH]
    assert most[1] > 0, "pages in int8"
    assert most[2] > 0, "and in int4"
    assert max(map(len, cuts)) > 1, "prompts share a pass"
    blocks = {id(prompt): [] for one in cuts for prompt, _, _ in one}
    for one in cuts:
        for prompt, done, end in one:
            assert done % BLOCK == 0
            assert end in (done + BLOCK, prompt.longest)
            blocks[id(prompt)].append(end)
    assert sorted(own[-1] for own in blocks.values()) == sorted(length for length, *_ in asked)
    assert_all_is_free(engine)


def check_policies(engine):
    """Every row's pages are kept as its own request says."""
    kept = engine._wide.lanes.kept
    for seat in engine._all_seats():
        kv = seat.answer.request.operating.kv
        for own, asked in ((kept.hard, kv.hard), (kept.easy, kv.easy)):
            assert int(own[seat.row]) == FORMATS.index(PAGE_ACTIONS[int(asked[0])])
        assert int(kept.window_tokens[seat.row]) == int(kv.window_tokens[0])
        assert int(kept.sink_pages[seat.row]) == int(kv.sink_pages[0])


def test_who_gives_way_is_answered_as_if_it_had_not(llama, narrow, made, monkeypatch):
    """Drawn tokens, decisions and pages in few bits; the first to come gives way, as the second is worth more.

    The pool has two pages for each of both, and each needs a third before its first is coded.
    """
    policy, given, rungs = coding(tiny.checkpoint(llama, narrow[0])), [], {}
    begin = Decoder.begin

    def spy(self, begun):
        given.append(None if begun.given is None else begun.given.tolist())
        begin(self, begun)

    engine = Engine(
        llama, dict(zip("ab", narrow, strict=True)), policy=policy, rows=2, context=40, part_tokens=BLOCK,
        pool_bytes=34 * units_of(model_of(llama, 1), coded=True).bytes,
    )  # fmt: skip
    assert engine.pool.units.of(FULL) == 8
    requests = [
        Request(
            prompt_of(BLOCK, seed), engine.operating("ab"[seed], budget=(0.6, 0.9)[seed]),
            sampling=Sampling(**SAMPLED, seed=5 + seed), max_new_tokens=18, priority=seed,
        )
        for seed in range(2)
    ]  # fmt: skip
    vacate = engine._vacate

    def kept(seat):
        rungs[seat.answer.number] = engine._wide.rungs[seat.row, :17].tolist()
        vacate(seat)

    monkeypatch.setattr(engine, "_vacate", kept)
    monkeypatch.setattr(Decoder, "begin", spy)
    answers = engine.run(requests)
    assert_all_is_free(engine)
    assert [own.preempted > 0 for own in answers] == [True, False]
    assert given[:2] == [None, None]
    assert given[-1] == [answers[0].tokens[:16]], "it goes the same way again"
    monkeypatch.setattr(Decoder, "begin", begin)
    options = tiny.GREEDY | {"do_sample": True, "fast": True, "max_new_tokens": 18, "policy": policy} | SAMPLED
    ids = torch.tensor([own.prompt for own in requests], device=llama.device)
    together = generate(llama, narrow, ids, budget=[0.6, 0.9], seed=[5, 6], **options)
    assert [own.tokens for own in answers] == together.sequences[:, BLOCK:].tolist()
    assert [rungs[number] for number in range(2)] == made[-1].rungs[:2, :17].tolist()
    assert len({rung for own in rungs.values() for rung in own}) > 1


def test_rungs_of_an_engine_without_a_policy(llama, ladders):
    a, b = ladders
    engine = Engine(llama, {"a": a, "b": b}, rows=3, context=20, part_tokens=8)
    asked = [("a", {"rung": a.rungs[1]}, a, {"rung": a.rungs[1]}), ("b", {}, b, {}), ("a", {"budget": 1}, a, {})]
    requests = [
        Request(prompt_of(9, seed), engine.operating(name, **spent), max_new_tokens=3)
        for seed, (name, spent, _, _) in enumerate(asked)
    ]
    answers = engine.run(requests)
    for (_, _, ladder, options), request, answer in zip(asked, requests, answers, strict=True):
        assert answer.tokens == alone(llama, ladder, request, **options)
        assert answer.text == ""
    assert_all_is_free(engine)


def test_what_is_cancelled_is_free_at_once(llama, narrow):
    """Waiting, between two parts of a prompt, and live: nobody else's answer is another one."""
    engine = Engine(llama, {"a": narrow[0]}, rows=2, context=60, part_tokens=16)
    own, whole = engine.operating("a", rung=narrow[0].rungs[2]), len(engine.pool)

    def add(length, new, seed):
        return engine.add(Request(prompt_of(length, seed), own, max_new_tokens=new))

    stays, half, waits = add(5, 6, 0), add(40, 3, 1), add(4, 2, 2)
    engine.step()
    assert [own.finished for own in (stays, half, waits)] == [None] * 3
    assert int(engine.pool.free.top) == whole - 2
    for answer in (waits, half):
        engine.cancel(answer)
        assert answer.finished == CANCELLED
    assert int(engine.pool.free.top) == whole - 1, "its page is free before another step"
    assert engine.live == 1
    live = add(20, 9, 3)
    engine.step()  # has its first part
    engine.step()
    engine.step()
    assert len(live.tokens) == 1
    news = [one.answer for one in engine.step()]
    assert live in news
    engine.cancel(live)
    engine.cancel(live)
    assert int(engine.pool.free.top) == whole - 1
    count = len(live.tokens)
    while engine.busy:
        assert all(one.answer is stays for one in engine.step())
    assert len(live.tokens) == count == 2
    assert live.finished == CANCELLED
    assert half.tokens == waits.tokens == []
    assert stays.tokens == alone(llama, narrow[0], stays.request, rung=narrow[0].rungs[2])
    engine.cancel(stays)
    assert stays.finished == LENGTH
    assert_all_is_free(engine)


def test_streams_side_by_side(llama, narrow):
    """Each has all news of its own, whoever makes the steps; one that is closed is cancelled."""
    engine = Engine(llama, {"a": narrow[0]}, rows=3, context=30, part_tokens=16)
    requests = [
        Request(prompt_of(4 + seed, seed), engine.operating("a"), max_new_tokens=new)
        for seed, new in enumerate((6, 4, 12))
    ]
    first, second, third = (engine.stream(own) for own in requests)
    assert engine.live == 0
    left = next(third)
    found = [next(first), next(second)]
    assert engine.live == 3
    third.close()
    assert left.answer.finished == CANCELLED
    assert engine.live == 2
    found = [[found[0], *first], [found[1], *second]]
    for request, news in zip(requests, found, strict=False):
        assert [token for one in news for token in one.tokens] == alone(llama, narrow[0], request)
        assert [one.finished for one in news] == [None] * (len(news) - 1) + [LENGTH]
        assert len({id(one.answer) for one in news}) == 1
    while engine.busy:
        engine.step()
    assert_all_is_free(engine)


def test_who_is_worth_more_is_let_in_first(llama, narrow):
    engine = Engine(llama, {"a": narrow[0]}, rows=1, context=30, part_tokens=16)
    answers = [
        engine.add(Request([3 + number], engine.operating("a"), max_new_tokens=1, priority=priority))
        for number, priority in enumerate((0, 1, 1))
    ]
    order = []
    while engine.busy:
        order += [answers.index(one.answer) for one in engine.step()]
        assert engine.live <= 1
    assert order == [1, 2, 0]


def test_a_token_that_ends_texts_ends_an_answer(llama, narrow, monkeypatch):
    """Its row is the next one's, and the row beside it goes on."""
    asked = [Request(prompt_of(5, seed), Operating.at(0.0, 0), max_new_tokens=6) for seed in (2, 1, 3)]
    whole = [alone(llama, narrow[0], own) for own in asked]
    end = whole[1][2]
    assert end not in whole[1][:2]
    monkeypatch.setattr(llama.generation_config, "eos_token_id", [39, end])
    engine = Engine(llama, {"a": narrow[0]}, rows=2, context=20, part_tokens=16)
    answers = engine.run([replace(own, operating=engine.operating("a")) for own in asked])
    for answer, tokens in zip(answers, whole, strict=True):
        count = min((tokens.index(own) + 1 for own in (39, end) if own in tokens), default=6)
        assert answer.tokens == tokens[:count]
        assert answer.finished == (END if tokens[count - 1] in (39, end) else LENGTH)
    assert len(answers[1].tokens) == 3 < len(answers[0].tokens)
    assert_all_is_free(engine)


def letters():
    """A tokenizer whose tokens are two letters each, the second a capital."""
    names = [f"{chr(97 + number % 26)}{chr(65 + number // 26)}" for number in range(tiny.VOCABULARY)]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token=names[0]))
    made.decoder = pieces.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


def test_text_and_stop_strings(llama, narrow):
    """One stops in the middle of a token, one has a beginning of a stop string at its end, one has none."""
    tokenizer = letters()
    engine = Engine(llama, {"a": narrow[0]}, tokenizer=tokenizer, rows=3, context=20, part_tokens=16)
    requests = [Request(prompt_of(5, seed), engine.operating("a"), max_new_tokens=5) for seed in (1, 2, 3)]
    whole = [alone(llama, narrow[0], own) for own in requests]
    texts = [tokenizer.decode(own) for own in whole]
    spans = texts[0][5:7]
    assert texts[0].find(spans) == 5
    stops = [("??", spans), (texts[1][-3:] + "?", "nothing"), ()]
    answers = [engine.add(replace(own, stop=stop)) for own, stop in zip(requests, stops, strict=True)]
    told, news = ["", "", ""], []
    while engine.busy:
        for one in engine.step():
            number = answers.index(one.answer)
            told[number] += one.text
            news.append((number, len(one.answer.tokens), one.finished))
            assert told[number] == one.answer.text
            assert texts[number].startswith(told[number])
            if number == 1 and not one.finished:
                assert not told[1].endswith(texts[1][-3:])
    assert told == [texts[0][:5], texts[1], texts[2]]
    assert [own.finished for own in answers] == [STOP, LENGTH, LENGTH]
    assert [own.tokens for own in answers] == [whole[0][:4], whole[1], whole[2]]
    assert [own[1:] for own in news if own[0] == 0] == [(1, None), (2, None), (3, None), (4, STOP)]
    assert_all_is_free(engine)


def test_what_may_be_spent_is_what_the_policy_says(llama, ladders, learned):
    engine = Engine(llama, dict(zip("ab", ladders, strict=True)), policy=coding(learned), rows=1, context=20)
    for budget in (None, 0.3, 1.0):
        found = engine.operating("b", budget=budget)
        own = coding(learned).operating([learned.default_budget if budget is None else budget], [1])
        for name in ("knob", "start_rung", "budget", "adapter"):
            assert torch.equal(getattr(found, name), getattr(own, name)), name
        assert found.kv.is_full == (budget == 1.0)
    kv = KVSettings("int8", "int4", window_tokens=33)
    assert torch.equal(engine.operating("a", kv=kv).kv.window_tokens, KVRows.of([kv]).window_tokens)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a graph replays what was captured: nothing can be put between")
def test_what_a_bucket_hands_to_another(llama, ladders, learned, monkeypatch):
    """A row's next decision is made by the attention of its latest token, whichever bucket that was processed in."""
    engine = Engine(llama, {"a": ladders[0]}, policy=learned, rows=5, context=20)
    buckets = {own.bucket.rows: own for own in engine._decoders}
    assert sorted(buckets) == [1, 4, 5]
    heard = []
    monkeypatch.setattr(Controller, "step", lambda own, tokens, entropy, surprisal, distant: heard.append(distant))
    monkeypatch.setattr(Forward, "__call__", lambda own: None)
    answer, whole = engine.add(Request([3], engine.operating("a"), max_new_tokens=1)), buckets[5].buffers.distant
    for most in (5, 4, 4, 1, 5, 1, 4):
        expected = torch.rand_like(whole)
        whole.copy_(expected)
        engine._seats = [Seat(answer, row, engine.pool.units, length=5) for row in range(most)]
        engine._decode()
        assert torch.equal(heard[-1], expected[:, :most])
        new = torch.rand_like(heard[-1])
        buckets[most].buffers.distant.copy_(new)
        assert torch.equal(whole[:, :most], new)
        assert torch.equal(whole[:, most:], expected[:, most:])

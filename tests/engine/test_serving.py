"""Requests that come and go are answered as each would be alone, whatever happens around them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers import decoders as pieces
from transformers import PreTrainedTokenizerFast

from policy import KVSettings, Operating, PercentilePolicy
from policy.operating import KVRows
from policy.settings import FULL_KV, PAGE_ACTIONS, SignalSettings
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
from tests.ops.ladders import random_adapter
from tests.runtime.reference import drawn_tables, handmade_ladder

pytestmark = pytest.mark.usefixtures("made")

BLOCK = 16
CODED = KVSettings(window_tokens=16, threshold=0.7, sink_pages=0)
SAMPLED = {"temperature": 2.0, "top_k": 30}


@pytest.fixture(scope="module")
def narrow(llama):
    """Two ladders of two linears alone: for tests of who runs when, which need not wait for all of them."""
    modules = {
        name: own for name, own in model_of(llama, 1).modules().items() if name.endswith(("v_proj", "down_proj"))
    }
    return [handmade_ladder(random_adapter(modules, 8, seed), seed) for seed in range(2)]


def coding(checkpoint, **kv):
    """The policy with pages in few bits, in blocks of whole pages."""
    settings = replace(checkpoint.settings, block_tokens=BLOCK, prompt_tokens=BLOCK, kv=replace(CODED, **kv))
    return replace(checkpoint, settings=settings)


def prompt_of(length: int, seed: int) -> list[int]:
    return tiny.prompts(length, seed=seed)[0][0].tolist()


def alone(llama, ladder, request, **options):
    """The reference path's answer."""
    ids = torch.tensor([request.prompt], device=llama.device)
    given = tiny.GREEDY | {"fast": False, "max_new_tokens": request.max_new_tokens} | options
    return generate(llama, ladder, ids, **given).sequences[0, len(request.prompt) :].tolist()


def assert_all_is_free(engine):
    free = engine.pool.free
    assert int(free.top) == len(engine.pool)
    assert sorted(free.stack.tolist()) == list(range(len(engine.pool)))
    assert int(free.dry) == 0
    assert engine.live == 0
    assert not engine.busy
    assert sorted(engine._free_rows) == list(range(engine.rows))
    assert not engine._texts


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


def refused(call, message, error=ValueError):
    with pytest.raises(error) as found:
        call()
    assert str(found.value).startswith(message), str(found.value)
    assert "\n" not in str(found.value)
    assert "expected" in str(found.value)


def test_requests_that_are_refused(llama, ladders, learned):
    a, b = ladders
    plain = Engine(llama, {"a": a, "b": b}, rows=1, context=20)
    policed = Engine(llama, {"a": a}, policy=coding(learned), rows=1, context=100, pool_bytes=8_000)
    low = Engine(llama, {"a": a}, policy=learned, resident_rung=a.rungs[2], rows=1, context=20)
    own, spent = plain.operating("a"), policed.operating("a", budget=0.3)
    refused(lambda: plain.operating("c"), "adapter: expected one of a, b, got 'c'")
    refused(lambda: plain.operating("a", budget=0.5), "policy: expected one to spend budget=0.5 by")
    refused(lambda: plain.operating("a", rung=3), "rung: expected one of (")
    refused(lambda: policed.operating("a", rung=8), "rung: expected a budget")
    refused(lambda: policed.operating("a", budget=1.5), "budget: expected")
    refused(lambda: low.operating("a", budget=1), "budget: expected less than 1")
    refused(lambda: Request([], own), "request.prompt: expected at least one token id")
    refused(lambda: Request([3, 2.5], own), "request.prompt: expected token ids, got 2.5")
    refused(lambda: Request([True], own), "request.prompt: expected token ids, got True")
    refused(lambda: Request(torch.tensor([3, 4]), own), "request.prompt: expected token ids, got tensor(3)")
    refused(lambda: Request([3], own, max_new_tokens=0), "request.max_new_tokens: expected")
    refused(lambda: Request([3], own, sampling={"top_k": 3}), "request.sampling: expected a Sampling, got {'top_k': 3}")
    refused(lambda: Request([3], own, priority=0.5), "request.priority: expected")
    refused(lambda: Request([3], own, stop="ab"), "request.stop: expected strings")
    refused(lambda: Request([3], own, stop=("",)), "request.stop: expected strings")
    two = Operating.at(torch.zeros(2), torch.zeros(2).long())
    refused(lambda: Request([3], two), "request.operating: expected that of one row, got 2 rows")

    def adding(engine, operating, prompt=(3,), **options):
        return partial(engine.add, Request(list(prompt), operating, **options))

    refused(adding(plain, own, range(3, 13), max_new_tokens=11), "request: expected at most 20 tokens, got 10 and 11")
    one = {"max_new_tokens": 1}
    refused(adding(plain, own, [40], **one), "request.prompt: expected token ids below 40")
    refused(adding(plain, own, [-1], **one), "request.prompt: expected token ids below 40")
    refused(adding(plain, own, max_new_tokens=1, stop=("a",)), "request.stop: expected an engine with a tokenizer")
    refused(adding(plain, plain.operating("a", kv=CODED), **one), "kv: expected pages in the model's own dtype")
    refused(adding(plain, replace(own, adapter=torch.tensor([2])), **one), "adapter: expected a number below 2, got 2")
    moving = replace(own, start_rung=torch.tensor([0]))
    refused(adding(plain, moving, **one), "operating: expected a rung that stays")
    dear = replace(spent, start_rung=torch.tensor([5]))
    refused(adding(policed, dear, **one), "operating: expected a start rung within the budget 0.3, got rung number 5")
    sparse = policed.operating("a", kv=KVSettings(hard="sparse"))
    refused(adding(policed, sparse, **one), "kv: expected pages that the engine keeps, got others: its KV policy makes")
    near = policed.operating("a", kv=KVSettings(window_tokens=0))
    refused(adding(policed, near, **one), "kv: expected pages that the engine keeps, got others: its KV policy keeps a")
    whole = policed.operating("a", kv=FULL_KV)
    refused(adding(policed, whole, [3] * 90, **one), "pool: expected room for", MemoryError)
    with pytest.raises(ValueError, match="below 40"):
        plain.run([Request([3], own, max_new_tokens=1), Request([40], own, max_new_tokens=1)])
    for engine in (plain, policed, low):
        assert_all_is_free(engine)


def test_engines_that_are_refused(llama, ladders, learned, device):
    a, _ = ladders
    engine = partial(Engine, llama, {"a": a})
    refused(lambda: Engine(llama, {}), "adapters: expected at least one by name")
    refused(lambda: engine(rows=0), "rows: expected")
    refused(lambda: engine(rows=129), "rows: expected")
    refused(lambda: engine(context=129), "context: expected at most 128")
    refused(lambda: engine(context=0), "context: expected")
    refused(lambda: engine(part_tokens=0), "part_tokens: expected")
    refused(lambda: engine(context=20, pool_bytes=1000), "pool_bytes: expected at least", MemoryError)
    percentile = replace(learned, policy=PercentilePolicy(learned.policy.rungs, "complexity"))
    cannot = "engine: expected a model and a policy that it covers, got others: "
    refused(lambda: engine(policy=percentile), cannot + "it is of the kind percentile")
    refused(lambda: engine(policy=coding(learned, hard="sparse")), cannot + "its KV policy makes pages sparse")
    far = coding(learned)
    far = replace(far, settings=replace(far.settings, signals=SignalSettings(recent_pages=3)))
    refused(lambda: engine(policy=far), cannot + "its KV policy keeps a window of 16 tokens")
    mistral = tiny.model("mistral", sliding_window=6, device=device)
    own = tiny.ladder(mistral)
    windowed = partial(Engine, mistral, {"a": own}, policy=coding(tiny.checkpoint(mistral, own)))
    refused(windowed, cannot + "its KV policy codes pages, and layers")
    refused(lambda: Engine(tiny.model(device=device).half(), {"a": a}), cannot + "it computes in float16")


def test_an_engine_without_a_gpu_is_refused(llama, ladders, device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("needs a model on the CPU, and kernels run on a GPU here")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"^engine: expected .* is on cpu, and the engine's kernels need a GPU"):
        Engine(llama, {"a": ladders[0]})


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

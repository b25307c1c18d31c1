"""What a decoder is given of a prefill, what it decides from that, and that nothing of the batch before is left."""

from __future__ import annotations

import functools
from dataclasses import fields, replace

import pytest
import torch

from runtime.control.record import Keep
from runtime.control.signals import log_probabilities, next_token_entropy, surprisal
from runtime.engine import decoder as decoders
from runtime.engine.buffers import Buffers
from runtime.engine.decoder import probed_layers, splits_for
from runtime.engine.graph import Graph
from runtime.engine.lanes import Lanes
from runtime.engine.model import model_of
from runtime.engine.page_pool import Pool
from runtime.generate.fast import FastPath
from runtime.generate.options import Options
from runtime.kv.formats import FULL
from runtime.kv.units import pages_for
from runtime.ops.reference.pages import read_row
from runtime.ops.shrink import Shares
from runtime.plan import plan_run
from runtime.reference.adaptive import activate
from tests.engine.tiny import BUDGETS, GREEDY, prompts

GARBAGE = 2**40 + 3


@pytest.fixture(autouse=True)
def begun(monkeypatch):
    """What every decoder was begun with; of kernels fewer programs, as interpreted ones are slow."""
    found = []

    def begin(self, given, own=decoders.Decoder.begin):
        found.append((self, given))
        own(self, given)

    monkeypatch.setattr(decoders.Decoder, "begin", begin)
    monkeypatch.setattr(decoders, "splits_for", lambda *_: 2)
    monkeypatch.setattr(Shares, "of", lambda batch, width, directions: Shares(1, 8, 128, 128))
    return found


def plan_of(llama, ladders, learned, **options):
    return plan_run(list(ladders), policy=learned, model_fingerprint=learned.fingerprints["model"], **options)


def engine(llama, run, ids, mask, **options):
    path = FastPath(llama, run)
    return path, path.generate(ids, GREEDY | {"attention_mask": mask} | options)


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


def test_a_decoder_begins_with_what_the_prefill_left(llama, ladders, device, begun):
    """Rows at fixed rungs of two ladders: slots, weights, pages, books and the first token."""
    a, b = ladders
    ids, mask = on(device, *prompts(3, 18, 7))
    plan = plan_run([a, b, a], rung=[a.rungs[1], b.rungs[4], a.rungs[0]])
    with activate(llama, plan) as run:
        _, out = engine(llama, run, ids, mask, max_new_tokens=1)
        cache = run.new_cache(3)
        cache.next_call_is_prompt = True
        logits = run.logits(ids, mask, cache, 1)[:, -1]
        pages = cache.layers[0].pools[FULL].parts
    ((decoder, given),) = begun
    assert (given.first, given.lengths.tolist()) == (0, [3, 18, 7])
    torch.testing.assert_close(given.logits, logits, rtol=1e-4, atol=1e-4)
    b_, rows = decoder.buffers, decoder.buffers.rows
    assert decoder.bucket == decoders.Bucket(rows=4, pages=2, steps=1, ends=0, decides=False)
    assert rows.slot.tolist() == [0, 1, 0, -1]
    rungs = [plan.ladders[n].rung_index(rung) for n, rung in zip((0, 1, 0), (1, 4, 0.5), strict=True)]
    assert rows.rung.tolist()[:3] == rungs
    scales = [plan.ladders[n].scales[j] for n, j in zip((0, 1, 0), rungs, strict=True)]
    assert len(set(scales)) == 3
    assert rows.weight.tolist() == [*torch.tensor(scales).tolist(), 0]
    tables = b_.tables
    assert tables.lengths.tolist() == [3, 18, 7, 0]
    assert tables.settled.tolist() == [0] * 4
    named = [tables.full[row, : pages_for(length)].flatten() for row, length in enumerate((3, 18, 7))]
    free = decoder.pool.free
    assert sorted([*torch.cat(named).tolist(), *free.stack[: free.top].tolist()]) == list(range(len(decoder.pool)))
    made = decoder.generated
    assert made.tokens[:3].tolist() == out[:, -1].tolist() == logits.argmax(-1).tolist()
    assert made.tokens.data_ptr() == b_.tokens.data_ptr(), "what is chosen is what is processed next"
    assert made.count.tolist()[:3] == [1, 1, 1]
    assert made.log[:3, 0].tolist() == out[:, -1].tolist()
    assert made.ended.tolist() == [0, 0, 0, 1]
    for row in range(3):
        assert made.seen[row].nonzero()[:, 0].tolist() == sorted(set(out[row].tolist()))
    assert not made.seen[3].any()
    log_p = log_probabilities(logits)
    torch.testing.assert_close(decoder.lanes.entropy[:3], next_token_entropy(log_p))
    torch.testing.assert_close(decoder.lanes.surprisal[:3], surprisal(log_p, out[:, -1]))
    for row, length in enumerate((3, 18, 7)):
        kept = read_row(decoder.pool.memory[0], tables, row, decoder.pool.units, torch.float32)
        for name, own in zip(("keys", "values"), kept, strict=True):
            held = pages[name][:, cache.table.index[row].long()].flatten(1, 2)[:, :length]
            torch.testing.assert_close(own.transpose(0, 1), held, rtol=1e-4, atol=1e-4)


def test_every_decision_is_the_streams_whatever_the_batch_before_has_left(
    llama, ladders, learned, device, begun, monkeypatch
):
    """Rungs, weights and what is counted, from tensors full of garbage; of rows behind these nothing is touched."""
    a, b = ladders
    ids, mask = on(device, *prompts(30, 5, 17))
    plan = plan_of(llama, (a, b, a), learned, budget=list(BUDGETS))
    with activate(llama, plan, keep=Keep.DECISIONS) as run:
        expected = llama.generate(ids, attention_mask=mask, **GREEDY, max_new_tokens=4)
        record = run.last.stream.columns()
    with activate(llama, plan) as run:
        with monkeypatch.context() as idle:
            idle.setattr(decoders.Decoder, "run", lambda self: None)
            path, _ = engine(llama, run, ids, mask, max_new_tokens=4)
        decoder = poisoned(begun[0][0])
        tokens = path.generate(ids, GREEDY | {"attention_mask": mask, "max_new_tokens": 4})
    assert begun[1][0] is decoder
    assert tokens.tolist() == expected.tolist()
    assert decoder.rungs[:3, :3].tolist() == record["rung"][:, -3:].tolist()
    assert len(decoder.rungs[:3, :3].unique()) > 1
    last = record["weights"][:, -1].sum(-1)
    rung = record["rung"][:, -1]
    own = torch.stack([torch.tensor(plan.ladders[n].scales) for n in (0, 1, 0)]).to(device)
    torch.testing.assert_close(decoder.buffers.rows.weight[:3], last * own.gather(1, rung[:, None])[:, 0])
    assert decoder.buffers.rows.weight[3] == 0
    assert decoder.buffers.tables.lengths.tolist() == [30 + 3, 5 + 3, 17 + 3, 0]
    for row in range(3):
        assert decoder.generated.seen[row].nonzero()[:, 0].tolist() == sorted(set(tokens[row].tolist()))
    assert decoder.controller.state.step.tolist() == [3, 3, 3, 77]
    assert decoder.controller.state.position.tolist()[:3] == [30 + 3, 5 + 3, 17 + 3]


def poisoned(decoder):
    """The decoder, with garbage in all that a batch before may have left there."""
    b, made, state = decoder.buffers, decoder.generated, decoder.controller.state
    for own in (b.r, b.normed, b.y, b.u, b.query, b.attended, b.inner, b.logits, b.distant, b.rows.weight,
                decoder.lanes.entropy, decoder.lanes.surprisal, state.gathered, state.balance, state.budget, state.cost,
                state.knob):  # fmt: skip
        own.fill_(float("nan"))
    for own in (b.tables.full, b.tables.int8, b.tables.int4):
        own.fill_(2**30)
    for own in (b.tables.lengths, b.tables.settled, b.tables.counts, b.turned.code):
        own.fill_(99)
    b.rows.slot.fill_(1)
    for own in (made.tokens, made.log, made.pad):
        own.fill_(GARBAGE)
    for own in (made.seen, made.ended, made.count, made.given, state.position, state.prompt, state.step, state.history):
        own.fill_(77)
    return decoder


def test_rows_that_have_ended_are_fed_padding_and_move_no_other(llama, ladders, device, begun):
    ids, mask = on(device, *prompts(5, 5))
    ids[1] = ids[0]
    with activate(llama, plan_run(list(ladders), rung=[4, 2])) as run:
        path, free = engine(llama, run, ids, mask, max_new_tokens=3)
        new = free[:, 5:].tolist()
        assert new[0][0] not in new[1]
        asked = {"attention_mask": mask, "max_new_tokens": 3, "eos_token_id": new[0][0], "pad_token_id": 9}
        ended = path.generate(ids, GREEDY | asked)
    assert ended[:, 5:].tolist() == [[new[0][0], 9, 9], new[1]]
    decoder = begun[-1][0]
    assert decoder.generated.ended.tolist() == [1, 0]
    assert decoder.generated.ends.tolist() == [new[0][0]]


def test_cleared_no_row_is_in_use(llama, ladders, device, begun):
    ids, mask = on(device, *prompts(4, 4))
    with activate(llama, plan_run(ladders[0], rung=4)) as run:
        engine(llama, run, ids, mask, max_new_tokens=1)
    decoder, _ = begun[0]
    decoder.clear()
    decoder.run()
    assert decoder.buffers.tables.lengths.tolist() == [0, 0]
    assert decoder.buffers.rows.slot.tolist() == [-1, -1]
    assert decoder.generated.ended.tolist() == [1, 1]
    assert not decoder.buffers.attended.any()


def test_parts_and_pages_and_probes():
    assert [pages_for(tokens) for tokens in (1, 16, 17, 48)] == [1, 1, 2, 3]
    assert [probed_layers(*asked) for asked in ((2, 4), (8, 2), (6, 4))] == [(0, 1), (3, 7), (1, 2, 3, 5)]
    batches = ((1, 8), (1, 32), (8, 8), (128, 8))
    assert [splits_for(*asked, 255, False) for asked in batches] == [16, 8, 4, 1]
    assert [splits_for(*asked, 256, False) for asked in batches] == [16, 16, 8, 1]
    assert [splits_for(*asked, 32, True) for asked in batches] == [32, 32, 16, 1]


@pytest.mark.parametrize("rows", [1, 3])
def test_buffers_are_views_of_what_they_have(llama, rows):
    model = model_of(llama, 16)
    pool = Pool.of(model, 6, coded=False)
    lanes = Lanes.of(model, pool.units, rows, pages=2, steps=3, ends=0)
    buffers = Buffers.of(model, lanes, directions=5, splits=2)
    assert buffers.outputs(7).shape == (rows, 7)
    assert buffers.shrunk(2).shape == (rows, 2, 5)
    assert buffers.outputs(2 * model.shape.inner).data_ptr() == buffers.y.data_ptr()
    assert buffers.shrunk(3).numel() == buffers.u.numel()
    pages = buffers.pages(pool, 0)
    assert pages.memory.data_ptr() == pool.memory[0].data_ptr()
    assert pages.tables is buffers.tables
    assert pool.nbytes == 2 * 6 * 16 * model.shape.kv_heads * model.shape.head_dim * 4
    tensors = [own for field in fields(buffers) if isinstance(own := getattr(buffers, field.name), torch.Tensor)]
    assert {own.device for own in tensors} == {model.device}


def test_a_graph_does_what_it_is_given(device):
    x, y = torch.zeros(3, device=device), torch.zeros(3, device=device)

    def work():
        x.add_(1)
        y.add_(10)
        y.add_(x)

    graph = Graph(work, device)
    x.zero_()
    y.zero_()
    for _ in range(3):
        graph.replay()
    assert x.tolist() == [3] * 3
    assert y.tolist() == [30 + 1 + 2 + 3] * 3


def test_options_settle_as_transformers_does(llama, monkeypatch):
    ids = torch.ones(2, 5, dtype=torch.long)
    of = functools.partial(Options.of, llama, ids)
    assert of({}).new_tokens == 20
    assert of({"max_length": 12}).new_tokens == 7
    assert of({"max_length": 12, "max_new_tokens": 3}).new_tokens == 3
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        of({"max_length": 5})
    assert (of({"eos_token_id": [7, 8], "pad_token_id": 3}).ends, of({"pad_token_id": 3}).pad) == ([7, 8], 3)
    monkeypatch.setattr(llama.generation_config, "pad_token_id", None)
    assert of({"eos_token_id": [7, 8]}).pad == 7
    given = replace(of({"do_sample": True, "seed": 4}).sampling[1], seed=0)
    assert (given.temperature, given.top_k, of({"do_sample": True, "seed": 4}).sampling[1].seed) == (1.0, 50, 5)

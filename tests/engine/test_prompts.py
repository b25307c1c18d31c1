"""Prompts on their way into the engine: however they are cut and whoever shares a pass, each goes as it would alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from policy import Operating
from runtime import adaptive, generate
from runtime.engine import loaded
from runtime.engine.decoder import Decoder
from runtime.engine.prompts import Prefill
from runtime.engine.request import Request
from runtime.engine.serving import Engine
from tests.engine import tiny

pytestmark = pytest.mark.usefixtures("made")

SITES = 4
"""Of a layer: linears that share their input, whose factors are unpacked together."""


@pytest.fixture
def blockwise(learned):
    """The learned policy, with prompts in blocks of four tokens."""
    return replace(learned, settings=replace(learned.settings, prompt_tokens=4))


@pytest.fixture
def seen(monkeypatch):
    """Tokens of every row in every pass, logits [V] behind every prompt, and each time that factors were unpacked."""
    passes, logits, unpacked = [], [], []
    run, begin, unpack = Prefill.run, Decoder.begin, loaded.unpack_layers

    def spy_on_run(self, ends):
        passes.append([sum(prompt.columns(end)) for prompt, end in ends])
        run(self, ends)

    def spy_on_begin(self, begun):
        logits.append(begun.logits[0].clone())
        begin(self, begun)

    def spy_on_unpack(reads, *rest):
        unpacked.append(rest[0])
        unpack(reads, *rest)

    monkeypatch.setattr(Prefill, "run", spy_on_run)
    monkeypatch.setattr(Decoder, "begin", spy_on_begin)
    monkeypatch.setattr(loaded, "unpack_layers", spy_on_unpack)
    return passes, logits, unpacked


def prompt_of(length, seed):
    return tiny.prompts(length, seed=seed)[0][0].tolist()


def first_tokens(engine, *asked):
    """What requests of one new token each are answered: (adapter, rung, prompt)."""
    requests = [Request(prompt, engine.operating(name, rung=rung), max_new_tokens=1) for name, rung, prompt in asked]
    return [own.tokens for own in engine.run(requests)]


def test_prompts_of_several_rows_share_a_pass(llama, ladders, seen):
    """Of other adapters and rungs, one of them cut where the pass is full; then alone, and whole."""
    passes, logits, unpacked = seen
    a, b = ladders
    names = {"a": a, "b": b}
    asked = [
        ("a", a.rungs[2], prompt_of(7, 0)),
        ("b", b.rungs[4], prompt_of(12, 1)),
        ("a", a.rungs[5], prompt_of(3, 2)),
    ]
    together = Engine(llama, names, rows=3, context=20, part_tokens=16)
    tokens = first_tokens(together, *asked)
    assert passes == [[7, 9], [3, 3]]
    found = [logits[0], logits[1], logits[2]]
    assert len(unpacked) == 2 * SITES, "two sets for the first pass, and then the third beside the second"
    for (name, rung, prompt), own, behind in zip(asked, tokens, found, strict=True):
        ids = torch.tensor([prompt], device=llama.device)
        out = generate(llama, names[name], ids, rung=rung, fast=False, max_new_tokens=1, **tiny.GREEDY)
        assert own == out.sequences[0, len(prompt) :].tolist()
        with adaptive(llama, names[name], rung=rung, fast=False), torch.no_grad():
            torch.testing.assert_close(behind, llama(ids).logits[0, -1], atol=2e-5, rtol=1e-4)


def test_a_long_prompt_in_pieces_is_the_whole(llama, ladders, seen):
    passes, logits, _ = seen
    prompt = prompt_of(70, 3)
    for part_tokens, parts in ((16, [[16]] * 4 + [[6]]), (70, [[70]])):
        engine = Engine(llama, {"a": ladders[0]}, rows=1, context=80, part_tokens=part_tokens)
        passes.clear()
        first_tokens(engine, ("a", ladders[0].rungs[3], prompt))
        assert passes == parts
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)


def test_factors_are_unpacked_once_for_all_blocks_of_a_prompt(llama, ladders, blockwise, seen):
    """And again only when others have taken their place."""
    passes, _, unpacked = seen
    engine = Engine(llama, dict(zip("ab", ladders, strict=True)), policy=blockwise, rows=1, context=20, part_tokens=4)

    def answer(name, budget, length):
        unpacked.clear()
        engine.run([Request(prompt_of(length, 4), engine.operating(name, budget=budget), max_new_tokens=1)])
        return len(unpacked)

    assert answer("a", 0.6, 11) == SITES
    assert passes == [[4], [4], [3]]
    assert answer("a", 0.6, 2) == 0
    assert answer("b", 0.6, 2) == SITES
    assert answer("a", 0.6, 2) == SITES, "there was room for one set"


def test_a_start_rung_that_cannot_be_paid_for_moves_within_the_prompt(llama, ladders, blockwise, seen):
    """Between tokens of its last block, in a row beside one that stays."""
    _, logits, _ = seen
    ids, mask = (own.to(llama.device) for own in tiny.prompts(11, 6, seed=5))
    spent = Operating.at(
        torch.tensor([-4.0, -1.0]), torch.tensor([4, 1]), blockwise.settings.kv, torch.tensor([1, 0]),
        torch.tensor([0.066, float("inf")]),
    )  # fmt: skip
    options = tiny.GREEDY | {"attention_mask": mask, "max_new_tokens": 2}
    with adaptive(llama, list(ladders), policy=blockwise, budget=[0.6, 0.6], fast=True) as run:
        run.plan = replace(run.plan, operating=spent)
        tokens, counts = llama.generate(ids, **options), run.last.stream.sums.counts
    with adaptive(llama, list(ladders), policy=blockwise, budget=[0.6, 0.6], fast=False) as run:
        run.plan = replace(run.plan, operating=spent)
        expected = llama.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(counts, run.last.stream.sums.counts)
    assert torch.equal(tokens, expected.sequences)
    torch.testing.assert_close(torch.stack(logits), expected.logits[0], atol=2e-5, rtol=1e-4)
    rungs = (counts[:, 0] > 0).sum(1)
    assert rungs[0] > 1, "the first row has left its start rung"
    assert rungs[1] == 1

"""How many tokens a pass of the reference path takes: a prompt's, an answer's, and those of a text whose every token is
scored."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from policy import ChunkSettings, FixedPolicy, KVSettings
from runtime import build_ladder, load_adapter
from runtime.control.record import Keep
from runtime.plan import static_plan
from runtime.reference import run as run_module
from runtime.reference.adaptive import activate
from tests.runtime.reference import WavyPolicy

TEXT, PROMPT = 4, 7
"""Tokens of a block of a text and of a prompt."""
NEW = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def ladder(llama_adapter):
    return build_ladder(load_adapter(llama_adapter))


@pytest.fixture
def ids():
    return torch.randint(3, 256, (2, 17), generator=torch.Generator().manual_seed(0))


@contextmanager
def passes(model):
    """[passes] columns of every pass through the model meanwhile."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    try:
        yield seen
    finally:
        hook.remove()


def test_a_prompt_goes_in_blocks_of_its_own_and_all_else_in_those_of_a_text(tiny_llama, ladder, make_plan, ids):
    plan = make_plan(ladder, WavyPolicy, 1.6, block_tokens=TEXT, prompt_tokens=PROMPT, chunk=ChunkSettings(1, 5))
    with activate(tiny_llama, plan) as run:
        cache = run.new_cache(2)
        with passes(tiny_llama) as seen:
            first = tiny_llama.generate(ids, **NEW, past_key_values=cache)
        assert seen == [7, 7, 3, 1, 1]
        # the next turn's prompt is what the cache lacks: the token chosen last, and what was said since
        turn = torch.cat([first, ids[:, :9]], 1)
        with passes(tiny_llama) as seen:
            second = tiny_llama.generate(turn, **NEW, past_key_values=cache)
        assert seen == [7, 3, 1, 1]
        with passes(tiny_llama) as seen:
            tiny_llama(torch.cat([second[:, -1:], ids[:, :9]], 1), past_key_values=cache)
        assert seen == [4, 4, 2], "on the same cache: no prompt any more"
        with passes(tiny_llama) as seen:
            tiny_llama(ids)
        assert seen == [4, 4, 4, 4, 1]


def test_a_block_of_a_prompt_is_of_every_rows_own_tokens(tiny_llama, ladder, make_plan, ids):
    plan = make_plan(ladder, WavyPolicy, 1.6, block_tokens=TEXT, prompt_tokens=PROMPT)
    mask = (torch.arange(17) >= torch.tensor([[9], [5]])).long()
    with activate(tiny_llama, plan), passes(tiny_llama) as seen:
        tiny_llama.generate(ids * mask, attention_mask=mask, **NEW)
    assert seen == [7, 5, 1, 1], "twelve tokens of the longer row"


def test_where_nothing_is_decided_blocks_are_never_small(tiny_llama, ladder, ids, monkeypatch):
    monkeypatch.setattr(run_module, "STATIC_BLOCK_TOKENS", 8)
    plan = static_plan(ladder, 4)
    for text, prompt, expected in ((4, 7, ([8, 8, 1], [8, 8, 1])), (4, 12, ([12, 5], [8, 8, 1]))):
        settings = replace(plan.settings, block_tokens=text, prompt_tokens=prompt)
        with activate(tiny_llama, replace(plan, settings=settings)):
            with passes(tiny_llama) as served:
                tiny_llama.generate(ids, **NEW)
            with passes(tiny_llama) as scored:
                tiny_llama(ids)
        assert (served[:-2], scored) == expected
        assert served[-2:] == [1, 1]


def test_a_prompt_in_one_pass_has_the_rungs_and_pages_of_one_in_many(tiny_llama, ladder, make_plan, ids):
    """All of it runs at the start rung, and its pages end in the same formats; what the answer is decided by may
    differ, as a longer pass reads more pages that are whole."""
    kv, found = KVSettings("int8", "int8", sink_pages=0, window_tokens=0), []
    prompt = ids.repeat(1, 3)
    for tokens in (1, 16, 512):
        plan = make_plan(ladder, WavyPolicy, 1.6, kv=kv, start_rung=2, prompt_tokens=tokens, chunk=ChunkSettings(1, 5))
        with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run, passes(tiny_llama) as seen:
            tiny_llama.generate(prompt, **NEW)
            found.append((run.last.stream.columns()["rung"][:, :51], run.last.page_formats()))
        assert len(seen) == -(-51 // tokens) + 2
    for rungs, formats in found:
        assert rungs.unique().tolist() == [2]
        assert torch.equal(formats, found[0][1])


def test_a_prompt_at_a_fixed_rung_with_coded_pages_is_cut_too(tiny_llama, ladder, make_plan, ids):
    """Nothing is chosen, but pages are judged block by block."""
    plan = make_plan(ladder, FixedPolicy, 3.0, kv=KVSettings(), block_tokens=TEXT, prompt_tokens=PROMPT)
    with activate(tiny_llama, plan), passes(tiny_llama) as seen:
        tiny_llama.generate(ids, **NEW)
    assert seen == [7, 7, 3, 1, 1]

"""KV pages of every format on a CUDA device, through real generation of the reference path."""

import pytest
import torch

from policy.settings import FULL_KV, PAGE_TOKENS, KVSettings
from runtime.control.record import Keep
from runtime.reference.adaptive import activate

pytestmark = pytest.mark.gpu

PROMPT, NEW = 150, 60
SEEN = PROMPT + NEW - 1  # the last new token never goes through the model
WINDOW = 32
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def generate(model, plan, ids):
    """New tokens, the cache they filled, and the trace of row 0."""
    with activate(model, plan, keep=Keep.DECISIONS) as run:
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return out[:, ids.shape[1] :], run.last, run.trace(0, SEEN)


def page_names(trace):
    """Format of every page, in order, from the chunks that it holds tokens of."""
    names = {}
    for chunk in trace:
        names |= dict(enumerate(chunk.kv_format, start=chunk.start // PAGE_TOKENS))
    return [names[page] for page in sorted(names)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("action", ["int8", "int4", "sparse", "dropped"])
def test_pages_of_one_format(tiny_llama_factory, fixed_plan, random_ids, device, dtype, action):
    model, ids = tiny_llama_factory().to(device, DTYPES[dtype]), random_ids(2, PROMPT)
    kv = KVSettings(action, action, window_tokens=WINDOW)
    tokens, cache, trace = generate(model, fixed_plan(kv=kv, prompt_tokens=32), ids)
    _, full, _ = generate(model, fixed_plan(prompt_tokens=32), ids)

    names = page_names(trace)
    left_window = (SEEN - WINDOW) // PAGE_TOKENS
    assert len(names) == -(-SEEN // PAGE_TOKENS)
    assert names[0] == dtype, "the sink page stays whole"
    assert set(names[1:left_window]) == {action}
    assert set(names[left_window:]) == {dtype}, "the window stays whole"
    assert cache.kv_bytes_allocated() < full.kv_bytes_allocated()
    assert cache.kv_bytes_full() == full.kv_bytes_full()
    # storage really gone, not only uncounted: what the compressed pages took in full is most of the cache
    assert cache.kv_bytes() < 0.8 * full.kv_bytes()
    assert tokens.shape == (2, NEW)


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_pages_equal_the_default_run(tiny_llama_factory, fixed_plan, random_ids, device, dtype):
    model, ids = tiny_llama_factory().to(device, DTYPES[dtype]), random_ids(2, PROMPT)
    never = KVSettings(window_tokens=10_000)
    tokens, cache, trace = generate(model, fixed_plan(kv=never, prompt_tokens=32), ids)
    expected, _, _ = generate(model, fixed_plan(kv=FULL_KV, prompt_tokens=32), ids)
    assert torch.equal(tokens, expected)
    assert set(page_names(trace)) == {dtype}
    assert cache.kv_bytes() >= cache.kv_bytes_full()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_pages(tiny_llama_factory, fixed_plan, random_ids, device, dtype):
    model, ids = tiny_llama_factory().to(device, DTYPES[dtype]), random_ids(1, PROMPT)
    _, full, _ = generate(model, fixed_plan(prompt_tokens=32), ids)
    complexity = full.stream.columns()["complexity"]
    pages = complexity[0, : SEEN // PAGE_TOKENS * PAGE_TOKENS].view(-1, PAGE_TOKENS).mean(1)
    kv = KVSettings("int8", "int4", threshold=float(pages[1:-3].median()), window_tokens=WINDOW)
    _, cache, trace = generate(model, fixed_plan(kv=kv, prompt_tokens=32), ids)
    assert set(page_names(trace)) == {dtype, "int8", "int4"}
    assert cache.kv_bytes_allocated() < full.kv_bytes_allocated()


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_more_bits_err_less(tiny_llama_factory, fixed_plan, random_ids, device, dtype):
    model, ids = tiny_llama_factory().to(device, DTYPES[dtype]), random_ids(4, 240)
    logits = {}
    for action in ("full", "int8", "int4", "dropped"):
        with activate(model, fixed_plan(kv=KVSettings(action, action, window_tokens=WINDOW), block_tokens=16)):
            logits[action] = model(input_ids=ids).logits[:, 64:].float()
    error = {a: float((x - logits["full"]).norm() / logits["full"].norm()) for a, x in logits.items()}
    assert 0 < error["int8"] < error["int4"] < error["dropped"]


def test_left_padded_rows_keep_their_own_pages(tiny_llama_factory, fixed_plan, random_ids, device):
    model = tiny_llama_factory().to(device)
    long, short = random_ids(1, 150), random_ids(1, 90, seed=1)
    padded = torch.cat([long, torch.cat([torch.zeros_like(long[:, :60]), short], 1)])
    mask = (padded != 0).long()
    plan = fixed_plan(kv=KVSettings("int8", "int8", window_tokens=WINDOW), block_tokens=32)
    with activate(model, plan) as run:
        model(input_ids=padded, attention_mask=mask)
        together = run.last.page_formats()
        model(input_ids=short)
        alone = run.last.page_formats()
    assert torch.equal(together[1, : alone.shape[1]], alone[0])
    assert not together[1, alone.shape[1] :].any()

import gc
import itertools

import pytest
import torch

from policy.operating import KVRows
from policy.settings import FULL_KV, KVSettings
from runtime.reference.pages import PagedCache
from tests.kv.naive import Feed

HEADS, WIDTH, LAYERS = 2, 64, 2


def held_tensors(root: object) -> list[torch.Tensor]:
    """All tensors reachable from an object through its attributes and containers."""
    seen, todo, tensors = set(), [root], []
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, (dict, list, tuple, set)) or type(item).__module__.startswith("runtime."):
            todo += gc.get_referents(item)
    return tensors


def run(
    kv: KVSettings, hard_share: float, tokens: int = 1024, block: int = 32, decoded: int = 80, rows: int = 1
) -> tuple[PagedCache, int]:
    """A cache after `tokens` tokens a row, the last `decoded` one by one, and the most bytes it ever held."""
    cache, peak = PagedCache(KVRows.of([kv])), 0
    # evenly spread hard pages
    pages = torch.arange(-(-tokens // 16))
    hard = ((pages + 1) * hard_share).floor() > (pages * hard_share).floor()
    complexity = hard.float().repeat_interleave(16).expand(rows, -1)
    edges = [*range(0, tokens - decoded, block), *range(tokens - decoded, tokens + 1)]
    for start, end in itertools.pairwise(edges):
        cache.begin(torch.arange(start, end).expand(rows, -1))
        states = torch.zeros(rows, HEADS, end - start, WIDTH, dtype=torch.bfloat16)
        for layer in range(LAYERS):
            cache.update(states, states, layer)
        peak = max(peak, cache.kv_bytes_allocated())
        cache.settle(complexity[:, start:end], torch.arange(start, end).expand(rows, -1))
    return cache, peak


@pytest.mark.parametrize(
    "kv", [FULL_KV, KVSettings(window_tokens=16), KVSettings("sparse", "dropped", window_tokens=0)]
)
def test_bytes_are_those_of_the_storages_really_held(kv, device):
    feed = Feed(kv, rows=3, device=device)
    for counts in [[70, 3, 40], [1, 1, 1], [30, 0, 50]]:
        feed.append(counts)
        feed.settle()
        cache = feed.cache
        storages = {(x.device, x.untyped_storage().data_ptr()): x.untyped_storage() for x in held_tensors(cache)}
        assert cache.kv_bytes_allocated() == sum(storage.nbytes() for storage in storages.values())
        assert cache.kv_bytes() <= min(cache.kv_bytes_allocated(), cache.kv_bytes_full())
    per_token = sum(heads * (dk + dv) * 4 for heads, dk, dv in feed.shapes)
    assert cache.kv_bytes_full() == per_token * sum(cache.lengths)


@pytest.mark.parametrize("decoded", [0, 80])
@pytest.mark.parametrize("rows", [1, 3])
def test_default_settings_save_45_percent_at_1024_tokens(decoded, rows):
    cache, peak = run(KVSettings(), hard_share=0.65, decoded=decoded, rows=rows)
    full = cache.kv_bytes_full()
    assert full == rows * 1024 * LAYERS * HEADS * WIDTH * 2 * 2
    assert cache.kv_bytes_allocated() <= 0.55 * full
    # within a pass, before pages leave the window: those of the block in hand on top
    assert peak <= 0.55 * full + full * 2 / 64


@pytest.mark.parametrize(("hard_share", "at_most"), [(1.0, 0.63), (0.5, 0.53), (0.0, 0.41)])
def test_bytes_by_share_of_hard_pages(hard_share, at_most):
    cache, _ = run(KVSettings(), hard_share)
    assert cache.kv_bytes_allocated() <= at_most * cache.kv_bytes_full()


def test_a_prompt_in_one_large_block_leaves_no_large_pool_behind():
    cache, peak = run(KVSettings(), hard_share=0.5, block=1024, decoded=0)
    assert peak >= cache.kv_bytes_full()
    assert cache.kv_bytes_allocated() <= 0.53 * cache.kv_bytes_full()


def test_dropping_everything_holds_sinks_and_window_only():
    cache, _ = run(KVSettings("dropped", "dropped"), hard_share=0.5, tokens=2048)
    # 9 pages of 128, one spare, and tables
    assert cache.kv_bytes() == cache.kv_bytes_full() * 9 // 128
    assert cache.kv_bytes_allocated() <= cache.kv_bytes_full() * 0.1


def test_full_precision_costs_little_more_than_the_tokens():
    cache, _ = run(FULL_KV, hard_share=1.0)
    assert cache.kv_bytes() == cache.kv_bytes_full()
    assert cache.kv_bytes_allocated() <= 1.04 * cache.kv_bytes_full()


def test_selected_rows_carry_no_slack():
    cache, _ = run(KVSettings(), hard_share=0.5, rows=3)
    branch = cache.select_rows(torch.tensor([1]))
    pools = sum(pool.page_bytes * pool.capacity for layer in branch.layers for pool in layer.pools.values())
    assert pools == branch.kv_bytes() == cache.kv_bytes() // 3


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 150])
def test_what_a_short_text_holds_is_its_tokens_and_not_the_room_around_them(tokens):
    """A page has room for 16 tokens: what is allocated may be 16 times what the text holds."""
    cache, _ = run(FULL_KV, hard_share=1.0, tokens=tokens, decoded=0, block=tokens)
    assert cache.kv_bytes() == cache.kv_bytes_full() == tokens * LAYERS * HEADS * WIDTH * 2 * 2
    assert cache.kv_bytes_allocated() > cache.kv_bytes()


@pytest.mark.parametrize(("format", "key_bits", "value_bits"), [("int8", 9, 8.25), ("int4", 5, 4.25)])
def test_what_a_text_holds_is_counted_in_the_formats_of_its_pages(format, key_bits, value_bits):
    """1 sink page, the rest up to the window in fewer bits, 8 pages of window."""
    cache, _ = run(KVSettings(format, format), hard_share=1.0, tokens=640, decoded=0)
    bits = 16 * LAYERS * HEADS * WIDTH * (9 * 2 * 16 + 31 * (key_bits + value_bits))
    assert cache.kv_bytes() == bits / 8

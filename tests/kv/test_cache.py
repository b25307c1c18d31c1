import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy.operating import KVRows
from policy.settings import FULL_KV, PAGE_ACTIONS, KVSettings
from runtime.kv import FORMATS
from runtime.reference.pages import PagedCache
from tests.kv.naive import Feed

# Ragged passes: blocks with padding, single tokens, rows that rest, rows that start late.
PASSES = [[40, 16, 0], [0, 31, 1], [1, 1, 1], [17, 0, 35], [32, 32, 32], [1, 0, 1], [3, 30, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("hard", "easy"), list(itertools.product(PAGE_ACTIONS, PAGE_ACTIONS)))
@pytest.mark.usefixtures("poisoned")
def test_every_pass_equals_the_loops(hard, easy, dtype, device):
    feed = Feed(KVSettings(hard=hard, easy=easy, window_tokens=20), rows=3, dtype=dtype, device=device)
    for counts in PASSES:
        feed.check(feed.append(counts))
        feed.settle()
    assert feed.cache.lengths == [sum(counts) for counts in zip(*PASSES, strict=True)]
    names = {FORMATS[code] for code in feed.cache.page_formats().flatten().tolist()}
    assert names == {"full", hard, easy, "none"}


@given(
    passes=st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2).filter(any), min_size=1, max_size=8),
    sinks=st.integers(0, 2),
    window=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_formats_are_set_once_and_only_outside_sinks_and_window(passes, sinks, window, seed):
    kv = KVSettings(hard="full", easy="sparse", sink_pages=sinks, window_tokens=window)
    feed = Feed(kv, rows=2, shapes=((1, 4, 4),), seed=seed)
    final = {}
    for counts in passes:
        feed.check(feed.append(counts))
        feed.settle()
        now = feed.cache.page_formats()
        for row, page in itertools.product(range(2), range(now.shape[1])):
            name, start, length = FORMATS[now[row, page]], page * 16, feed.lengths[row]
            left = page >= sinks and start + 16 <= length - window
            assert (name == "none") == (start >= length)
            if not left:
                assert name in ("full", "none")
            elif (row, page) not in final:
                mean = feed.complexity[row, start : start + 16].mean()
                assert name == ("full" if mean >= kv.threshold else "sparse")
                final[row, page] = name
            assert name == final.get((row, page), name)


# 0.7 and 0.9 lie above the nearest float32 number, 0.1 and 0.6 below it; 0.5 is one.
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.6, 0.7, 0.9])
def test_threshold_itself_is_hard(threshold):
    feed = Feed(KVSettings(hard="int8", easy="dropped", threshold=threshold, sink_pages=0, window_tokens=0), rows=1)
    feed.append([32])
    at, below = torch.full((1, 16), threshold), torch.full((1, 16), threshold - 1e-6)
    assert bool((below < at).all())
    feed.cache.settle(torch.cat((at, below), 1), feed.positions)
    assert [FORMATS[code] for code in feed.cache.page_formats()[0]] == ["int8", "dropped"]


MIXED_ROWS = [
    KVSettings("full", "full", threshold=0.0),
    KVSettings(window_tokens=20),
    KVSettings("sparse", "dropped", sink_pages=0, window_tokens=16),
    KVSettings("int4", "sparse", threshold=0.4, sink_pages=2, window_tokens=0),
]
# Rows of 94, 110, 124 and 97 tokens: long enough for pages of every row to leave its window.
MIXED_PASSES = [
    [40, 16, 0, 9],
    [0, 31, 50, 1],
    [1, 1, 1, 1],
    [17, 0, 35, 40],
    [32, 32, 32, 16],
    [1, 0, 1, 0],
    [3, 30, 5, 30],
]


@pytest.mark.parametrize("rows", [[KVSettings(window_tokens=16)] * 4, MIXED_ROWS], ids=["alike", "each its own policy"])
@pytest.mark.usefixtures("poisoned")
def test_rows_of_a_batch_equal_runs_of_their_own(rows, device):
    batch = Feed(rows, rows=4, device=device)
    alone, given = [PagedCache(KVRows.of([kv])) for kv in rows], [torch.zeros(0) for _ in rows]
    for counts in MIXED_PASSES:
        starts = batch.lengths
        together = batch.append(counts)
        batch.settle()
        for row, count in enumerate(counts):
            if count == 0:
                continue
            end = starts[row] + count
            positions = torch.arange(starts[row], end)[None].to(device)
            alone[row].begin(positions)
            for layer, states in enumerate(batch.states):
                pair = (x[None, :, starts[row] :].to(device) for x in states[row])
                keys, values = alone[row].update(*pair, layer)
                assert torch.equal(keys[0, :, :end].cpu(), together[layer][0][row, :, :end])
                assert torch.equal(values[0, :, :end].cpu(), together[layer][1][row, :, :end])
            slots = alone[row].visible().shape[1]
            mass = batch.mass[row, :slots]
            alone[row].add_attention_mass(
                (mass - torch.nn.functional.pad(given[row], (0, slots - len(given[row]))))[None].to(device)
            )
            given[row] = mass
            alone[row].settle(batch.complexity[row : row + 1, starts[row] : end].to(device), positions)
            pages = alone[row].page_formats()[0]
            assert torch.equal(pages, batch.cache.page_formats()[row, : len(pages)])
            assert torch.equal(alone[row].visible()[0].cpu(), batch.cache.visible()[row, :slots].cpu())
    formats = batch.cache.page_formats().tolist()
    for kv in rows:
        reached = {FORMATS[code] for row, own in zip(formats, rows, strict=True) if own == kv for code in row}
        assert reached - {"none"} == {"full", kv.hard, kv.easy}, "every format that a row may have must be compared"
    assert batch.cache.kv_bytes() == sum(cache.kv_bytes() for cache in alone)


def test_rows_of_different_policies_each_keep_their_own_formats():
    rows = [FULL_KV, KVSettings(window_tokens=16), KVSettings("sparse", "dropped", sink_pages=0, window_tokens=48)]
    feed = Feed(rows, rows=3)
    for _ in range(5):
        feed.check(feed.append([32, 32, 32]))
        feed.settle()
    names = [[FORMATS[code] for code in row] for row in feed.cache.page_formats().tolist()]
    assert set(names[0]) == {"full"}
    assert (set(names[1][:1]), set(names[1][1:9]), set(names[1][9:])) == ({"full"}, {"int8", "int4"}, {"full"})
    assert (set(names[2][:7]), set(names[2][7:])) == ({"sparse", "dropped"}, {"full"})
    branch = feed.cache.select_rows(torch.tensor([2, 0]))
    assert [kv.tolist() for kv in (branch.kv.window_tokens, branch.kv.sink_pages)] == [[48, 128], [0, 1]]


def test_policies_of_another_number_of_rows_are_refused():
    cache = PagedCache(KVRows.of([FULL_KV, FULL_KV]))
    with pytest.raises(ValueError, match="kv: expected the policy of 3 rows, or of one for all, got 2"):
        cache.begin(torch.arange(4).expand(3, -1))
    with pytest.raises(ValueError, match=r"sparse_keep: expected one number for all rows of a batch, got \[2, 4\]"):
        KVRows.of([KVSettings(easy="sparse"), KVSettings(easy="sparse", sparse_keep=2)])


@pytest.mark.parametrize("easy", PAGE_ACTIONS)
@pytest.mark.usefixtures("poisoned")
def test_selected_rows_go_on_like_the_original_and_share_nothing(easy, device):
    kv = KVSettings(easy=easy, window_tokens=16)
    feed = Feed(kv, rows=3, device=device)
    for counts in PASSES:
        feed.append(counts)
        feed.settle()
    feed.cache.seen_columns = 77
    rows = [2, 0, 2]
    branch = feed.cache.select_rows(torch.tensor(rows, device=device))
    assert branch.get_seq_length() == 77
    assert branch.lengths == [feed.lengths[row] for row in rows]
    assert torch.equal(branch.page_formats(), feed.cache.page_formats()[rows][:, : branch.page_formats().shape[1]])
    before = feed.cache.kv_bytes_allocated()

    # the branch writes something of its own and settles; the original must not notice
    positions = torch.tensor(branch.lengths)[:, None] + torch.arange(40)
    branch.begin(positions.to(device))
    for layer, (heads, key_width, value_width) in enumerate(feed.shapes):
        shape = (3, heads, 40)
        keys, values = torch.randn(*shape, key_width), torch.randn(*shape, value_width)
        got = branch.update(keys.to(device), values.to(device), layer)
        if layer == 0:
            expected = feed.expected(0)
            for i, row in enumerate(rows):
                end = feed.lengths[row]
                assert torch.equal(got[0][i, :, :end].cpu(), expected[0][row, :, :end])
                assert torch.equal(got[0][i, :, end : end + 40].cpu(), keys[i])
                assert torch.equal(branch.visible()[i, :end].cpu(), feed.expected_visible()[row, :end])
    branch.settle(torch.rand(3, 40, device=device), positions.to(device))
    assert feed.cache.kv_bytes_allocated() == before
    feed.check(feed.append([1, 1, 1]))


def test_positions_on_the_host_serve_a_model_elsewhere(device):
    feed = Feed(FULL_KV, rows=1, shapes=((1, 4, 4),))
    feed.cache.begin(torch.arange(3)[None], device=torch.device(device))
    keys = torch.randn(1, 1, 3, 4, device=device)
    got, _ = feed.cache.update(keys, keys, 0)
    assert got.device == keys.device
    assert torch.equal(got[:, :, :3], keys)
    assert feed.cache.visible().device == keys.device


def test_what_transformers_asks():
    cache = PagedCache(KVRows.of([FULL_KV]))
    assert not cache.is_compileable
    assert (cache.get_seq_length(), cache.get_max_length(), len(cache)) == (0, -1, 0)
    cache.begin(torch.arange(17)[None])
    cache.update(torch.ones(1, 1, 17, 2), torch.ones(1, 1, 17, 2), 1)
    cache.seen_columns = 20
    assert (cache.get_seq_length(), cache.get_seq_length(1), len(cache)) == (20, 20, 2)
    assert cache.get_mask_sizes(1, 0) == (32, 0)
    assert not cache.is_compileable
    assert cache.is_sliding == [False, False]
    layer = cache.layers[1]
    assert (layer.get_seq_length(), layer.get_mask_sizes(1), layer.get_max_length()) == (17, (32, 0), -1)
    cache.reset()
    assert (cache.get_seq_length(), cache.lengths, len(cache)) == (0, [], 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.reorder_cache(torch.tensor([0])), NotImplementedError, "set num_beams=1"),
        (lambda c: c.crop(-1), NotImplementedError, "cannot remove tokens"),
        (lambda c: c.batch_repeat_interleave(2), NotImplementedError, "select_rows"),
        (lambda c: c.batch_select_indices(torch.tensor([0])), NotImplementedError, "select_rows"),
        (lambda c: c.begin(torch.tensor([[4]])), ValueError, "row 0 to go on at 3 without gaps"),
        (lambda c: c.begin(torch.tensor([[3, 5]])), ValueError, "row 0 to go on at 3 without gaps"),
        (lambda c: c.begin(torch.tensor([[3], [3]])), ValueError, r"expected \[1, tokens\], got \[2, 1\]"),
        (lambda c: c.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0), ValueError, "1 rows and 3 tokens"),
        (
            lambda c: c.settle(torch.ones(1, 5), torch.arange(3)[None]),
            ValueError,
            r"expected \[1, tokens\] each, got \[1, 5\] and \[1, 3\]",
        ),
        (
            lambda c: c.update(torch.ones(1, 1, 3, 4, requires_grad=True), torch.ones(1, 1, 3, 4), 0),
            ValueError,
            "torch.no_grad",
        ),
    ],
)
def test_misuse_is_one_clear_line(call, error, message):
    cache = PagedCache(KVRows.of([KVSettings(sink_pages=0, window_tokens=0)]))
    cache.begin(torch.arange(3)[None])
    with pytest.raises(error, match=message) as caught:
        call(cache)
    assert "\n" not in str(caught.value)


def test_update_without_begin_is_refused():
    with pytest.raises(ValueError, match="expected begin"):
        PagedCache(KVRows.of([FULL_KV])).update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("kv", [FULL_KV, KVSettings("int4", "int4", window_tokens=16), KVSettings(window_tokens=16)])
def test_only_choosing_a_format_waits_for_the_device(kv):
    device, cache = torch.device("cuda"), PagedCache(KVRows.of([kv]))
    states = torch.randn(2, 1, 64, 8, device=device)
    on_device = torch.arange(192, device=device).expand(2, -1)
    complexity = torch.rand(2, 64, device=device)
    for start in (0, 64, 128):
        torch.cuda.set_sync_debug_mode("error")
        try:
            positions = torch.arange(start, start + 64).expand(2, -1)
            cache.begin(positions, device=device)
            cache.update(states, states, 0)
            cache.visible()
            if kv.hard == kv.easy:
                cache.settle(complexity, on_device[:, start : start + 64])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if kv.hard != kv.easy:
            cache.settle(complexity, on_device[:, start : start + 64])

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.reference.pages.pool import GROWTH, SHRINK, PageAllocator, PagePool


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=40))
def test_allocator_hands_out_each_page_once_and_pool_content_follows(steps):
    allocator, pool, held = PageAllocator(), PagePool({"x": torch.zeros(1, 0, 1)}), {}
    for serial, (taking, count) in enumerate(steps):
        if taking:
            ids = allocator.take(count)
            pool.grow(allocator.capacity)
            pool.write(torch.tensor(ids), {"x": torch.full((1, count, 1), float(serial))})
            assert not held.keys() & set(ids)
            held |= dict.fromkeys(ids, serial)
        else:
            gone = list(held)[::2][:count]
            allocator.release(gone)
            held = {page: value for page, value in held.items() if page not in gone}
            moves = allocator.shrink()
            if moves is not None:
                pool.compact(allocator.capacity, *(torch.tensor(m, dtype=torch.int64) for m in moves))
                renamed = dict(zip(*moves, strict=True))
                held = {renamed.get(page, page): value for page, value in held.items()}
            assert len(allocator.free) * SHRINK <= max(allocator.capacity, 1)
        assert allocator.used == len(held)
        assert pool.capacity == allocator.capacity
        assert sorted([*allocator.free, *held]) == list(range(allocator.capacity))
        assert all(pool.parts["x"][0, page, 0] == value for page, value in held.items())


def test_growth_is_near_exact():
    allocator = PageAllocator()
    for _ in range(500):
        allocator.take(1)
        assert allocator.capacity <= allocator.used * (1 + 1 / GROWTH)


def test_decoding_with_the_default_window_never_shrinks():
    # sink and window take 9 pages, the page in progress is the tenth
    allocator = PageAllocator()
    allocator.take(10)
    for _ in range(50):
        allocator.release([3])
        assert allocator.shrink() is None
        assert allocator.take(1) == [3]


@pytest.mark.parametrize("pages", [0, 1, 9])
def test_compaction_gives_memory_back(pages):
    pool = PagePool({"x": torch.arange(10.0).view(1, 10, 1)})
    pool.compact(pages, *torch.tensor([[9], [0]])[:, :pages])
    assert pool.capacity == pages
    assert pool.parts["x"].untyped_storage().nbytes() == pages * 4
    assert pool.parts["x"].flatten().tolist() == ([9.0, *range(1, pages)] if pages else [])

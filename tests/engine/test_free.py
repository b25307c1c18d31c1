"""Free stretches of an arena, against a list of what is taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.free import Free

SIZE, ALIGNMENT = 40 * 8, 8


def gaps(taken: dict[int, int]) -> list[tuple[int, int]]:
    """(start, length) of what lies between the stretches taken."""
    found, at = [], 0
    for start, length in sorted([*taken.items(), (SIZE, 0)]):
        if start > at:
            found.append((at, start - at))
        at = start + length
    return found


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 90)), max_size=60))
def test_stretches_never_overlap_and_neighbours_join(steps):
    free, taken, asked = Free(SIZE, ALIGNMENT), {}, {}
    for take, number in steps:
        rounded = -(-number // ALIGNMENT) * ALIGNMENT
        fits = [start for start, length in gaps(taken) if length >= rounded]
        if take and fits:
            start = free.take(number)
            assert start == fits[0]
            taken[start], asked[start] = rounded, number
        elif take:
            with pytest.raises(MemoryError):
                free.take(number)
        elif taken:
            start = sorted(taken)[number % len(taken)]
            free.give(start, asked.pop(start))
            del taken[start]
        assert free.left == SIZE - sum(taken.values())
    for start in taken:
        free.give(start, asked[start])
    assert free.take(SIZE) == 0
    assert free.left == 0


def test_none_is_free_of_nothing():
    free = Free(0, ALIGNMENT)
    assert free.left == 0
    with pytest.raises(MemoryError, match=r"expected 8 bytes in one stretch, got 0 of 0 that are free; evict"):
        free.take(1)
    full = Free(SIZE, ALIGNMENT)
    assert [full.take(80), full.take(80), full.take(160)] == [0, 80, 160]
    full.give(80, 80)
    with pytest.raises(MemoryError, match=r"expected 88 bytes in one stretch, got 80 of 80 that are free"):
        full.take(81)

"""Rungs are equivalent ranks: shares of an adapter, fractional where its rank is small."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy import DEFAULT_SHARES
from policy.rungs import checked_rungs, rung_shares, rungs_at_shares, rungs_of_rank, same_shares


@pytest.mark.parametrize(
    ("rank", "rungs"),
    [
        (64, (2, 4, 6, 8, 12, 16, 24, 32, 64)),
        (32, (1, 2, 3, 4, 6, 8, 12, 16, 32)),
        (8, (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 8)),
        (1, DEFAULT_SHARES),
    ],
)
def test_the_default_rungs_are_the_same_shares_of_every_adapter(rank: int, rungs: tuple) -> None:
    assert rungs_of_rank(rank) == rungs
    assert all(isinstance(rung, int) == (rung == int(rung)) for rung in rungs_of_rank(rank)), "whole ones are ints"
    assert rung_shares(rungs_of_rank(rank)) == DEFAULT_SHARES
    assert same_shares(rungs_of_rank(rank), rungs_of_rank(64))


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        ((), r"rungs: expected a list of 1 to 1024, strictly ascending, each a rank in \[0, 65536\], got \(\)"),
        ((0.5, 0.5), r"rungs: expected a list .*, got \(0.5, 0.5\)"),
        ((1, 1.0), r"rungs: expected a list .*, got \(1, 1.0\)"),
        ((2, 1.5), r"rungs: expected a list .*, got \(2, 1.5\)"),
        ((-0.25, 8), r"rungs\[0\]: expected a rank in \[0, 65536\], got -0.25"),
        ((0.25, float("nan")), r"rungs\[1\]: expected a rank in \[0, 65536\], got nan"),
        ((0.25, float("inf")), r"rungs\[1\]: expected a rank in \[0, 65536\], got inf"),
        ((True, 8), r"rungs\[0\]: expected a rank in \[0, 65536\], got True"),
        (("2", 8), r"rungs\[0\]: expected a rank in \[0, 65536\], got '2'"),
        ((0,), r"rungs: expected a top rank above 0, got \(0,\)"),
    ],
)
def test_what_is_no_rungs_is_refused(rungs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_rungs(rungs)


@given(
    st.lists(st.integers(1, 4096), min_size=2, max_size=12, unique=True).map(sorted),
    st.integers(1, 512),
    st.integers(1, 512),
)
def test_shares_survive_the_way_to_another_rank_and_on(rungs: list[int], rank: int, other: int) -> None:
    there = rungs_at_shares(rungs, rank)
    assert there[-1] == rank
    assert same_shares(there, rungs)
    assert same_shares(rungs_at_shares(there, other), rungs)
    assert rungs_at_shares(rungs, rungs[-1]) == tuple(rungs)
    assert not same_shares(there[1:], rungs)
    assert not same_shares([there[0] * 1.001, *there[1:]], rungs)

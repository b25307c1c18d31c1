"""What rows may spend: values by row, in any order, repeated for copies, and one line for what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from policy import FULL_KV, PAGE_ACTIONS, KVRows, KVSettings, Operating

KVS = [FULL_KV, KVSettings("int8", "sparse", 0.25, 2, 64, 3), KVSettings("int4", "dropped", 0.75, 0, 0)]
BUDGETS = torch.tensor([0.1, float("inf"), 1.0], dtype=torch.float64)
THREE = (torch.tensor([0.5, 1.5, 2.5]), torch.tensor([0, 1, 2]), KVS, torch.tensor([1, 0, 1]), BUDGETS)


def fields(kv: KVRows) -> list[tuple]:
    """By row, what its settings say."""
    parts = (kv.hard, kv.easy, kv.threshold, kv.sink_pages, kv.window_tokens)
    return [
        (PAGE_ACTIONS[hard], PAGE_ACTIONS[easy], threshold, sinks, window)
        for hard, easy, threshold, sinks, window in zip(*(part.tolist() for part in parts), strict=True)
    ]


def expected(*settings: KVSettings) -> list[tuple]:
    return [(kv.hard, kv.easy, kv.threshold, kv.sink_pages, kv.window_tokens) for kv in settings]


def test_numbers_stand_for_every_row() -> None:
    one = Operating.at(1.25, 3)
    assert (one.knob.tolist(), one.start_rung.tolist(), one.adapter.tolist()) == ([1.25], [3], [0])
    assert fields(one.kv) == expected(FULL_KV)
    assert one.budget.tolist() == [float("inf")], "nobody is held to a budget unless told"
    three = Operating.at(torch.tensor([0.0, 1.0, 2.0]), 2, KVS[1], 1)
    assert (three.knob.tolist(), three.start_rung.tolist(), three.adapter.tolist()) == ([0, 1, 2], [2] * 3, [1] * 3)
    assert fields(three.kv) == expected(*[KVS[1]] * 3)
    assert (three.knob.dtype, three.start_rung.dtype, three.adapter.dtype) == (torch.float32, torch.long, torch.long)
    by_kv = Operating.at(0.5, 1, KVS)
    assert (len(by_kv), by_kv.knob.tolist(), by_kv.start_rung.tolist()) == (3, [0.5] * 3, [1] * 3)
    assert fields(by_kv.kv) == expected(*KVS)


@pytest.mark.parametrize("index", [[2, 0], [1, 1, 0, 2], [], [0, 1, 2]])
def test_selected_rows_keep_all_that_is_theirs(index: list[int]) -> None:
    chosen = Operating.at(*THREE).select(torch.tensor(index, dtype=torch.long))
    assert len(chosen) == len(chosen.kv) == len(index)
    found = (chosen.knob, chosen.start_rung, chosen.adapter, chosen.budget)
    for got, whole in zip(found, (*THREE[:2], *THREE[3:]), strict=True):
        assert got.tolist() == [whole[i] for i in index]
        assert got.dtype == whole.dtype
    assert fields(chosen.kv) == expected(*(KVS[i] for i in index))
    assert chosen.kv.sparse_keep == 3


@pytest.mark.parametrize(("rows", "order"), [(3, [0, 1, 2]), (6, [0, 0, 1, 1, 2, 2])])
def test_rows_go_to_sequences_one_by_one_or_to_copies_side_by_side(rows: int, order: list[int]) -> None:
    whole = Operating.at(*THREE).for_rows(rows)
    assert whole.knob.tolist() == [THREE[0][i] for i in order]
    assert whole.start_rung.tolist() == order
    assert whole.adapter.tolist() == [THREE[3][i] for i in order]
    assert whole.budget.tolist() == [BUDGETS[i] for i in order]
    assert fields(whole.kv) == expected(*(KVS[i] for i in order))


def test_one_row_stands_for_any_number() -> None:
    assert Operating.at(1.0, 2).for_rows(4).start_rung.tolist() == [2] * 4


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_that_do_not_divide_are_refused_in_one_line(rows: int) -> None:
    message = rf"input_ids: expected 3 rows \(or a multiple\), one per budget.*, got {rows}; pass as many prompts"
    with pytest.raises(ValueError, match=message) as caught:
        Operating.at(*THREE).for_rows(rows)
    assert "\n" not in str(caught.value)


def test_kv_rows_for_a_batch() -> None:
    one, three = KVRows.of([KVS[1]]), KVRows.of(KVS)
    assert fields(one.for_rows(3)) == expected(*[KVS[1]] * 3)
    assert one.for_rows(3).sparse_keep == 3
    assert fields(three.for_rows(3)) == expected(*KVS)
    # Unlike copies of a prompt, rows of a cache are never shared out.
    for rows in (1, 2, 6):
        with pytest.raises(ValueError, match=f"kv: expected the policy of {rows} rows, .*, got 3; give as many") as e:
            three.for_rows(rows)
        assert "\n" not in str(e.value)


def test_the_threshold_is_rounded_as_complexities_are() -> None:
    """A page all of whose tokens lie at the threshold is hard, also where float32 rounds 0.7 down."""
    threshold = KVRows.of([KVSettings(threshold=0.7)]).threshold
    page = torch.full((16,), 0.7).double().sum() / 16
    assert bool(page >= threshold)


@pytest.mark.parametrize(
    ("rows", "full", "sparse"),
    [
        ([FULL_KV], True, False),
        ([FULL_KV, KVSettings("full", "int8")], False, False),
        ([KVSettings("int8", "full")], False, False),
        ([FULL_KV, KVSettings("sparse", "full")], False, True),
        ([KVSettings("full", "sparse"), FULL_KV], False, True),
        ([KVSettings("dropped", "dropped")], False, False),
    ],
)
def test_what_any_row_may_do_the_batch_may_do(rows: list[KVSettings], full: bool, sparse: bool) -> None:
    kv = KVRows.of(rows)
    assert (kv.is_full, kv.may_be_sparse) == (full, sparse)
    assert [kv.select([i]).is_full for i in range(len(rows))] == [row.is_full for row in rows]


def test_sparse_pages_of_a_batch_keep_one_number_of_tokens() -> None:
    message = r"kv\.sparse_keep: expected one number for all rows of a batch, got \[2, 5\]; use one"
    with pytest.raises(ValueError, match=message) as caught:
        KVRows.of([KVSettings(hard="sparse", sparse_keep=5), KVSettings(easy="sparse", sparse_keep=2)])
    assert "\n" not in str(caught.value)
    # A row that is never sparse has no say in it.
    assert KVRows.of([KVSettings(sparse_keep=5), KVSettings(easy="sparse", sparse_keep=2)]).sparse_keep == 2


@pytest.mark.gpu
def test_tensors_move_and_the_kv_policy_stays_on_the_host() -> None:
    moved: Operating = Operating.at(*THREE).to(torch.device("cuda"))
    tensors: list[Tensor] = [moved.knob, moved.start_rung, moved.adapter, moved.budget]
    assert all(tensor.is_cuda for tensor in tensors)
    chosen = moved.select(torch.tensor([2, 0]))
    assert chosen.knob.tolist() == [2.5, 0.5]
    assert not chosen.kv.hard.is_cuda


@pytest.mark.parametrize("kv", [[FULL_KV, FULL_KV], [FULL_KV] * 4])
def test_values_of_different_numbers_of_rows_are_refused(kv) -> None:
    with pytest.raises(ValueError, match="operating: expected one value a row or one for all, got"):
        Operating.at(torch.zeros(3), 0, kv)
    with pytest.raises(ValueError, match="operating: expected one value a row or one for all, got"):
        Operating.at(torch.zeros(3), torch.zeros(2))

"""Decode attention over pages of all formats, kernel and reference against PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch
import triton

from runtime.control.signals import distant_attention
from runtime.ops import attention as kernels
from runtime.ops.attention import Tiles

from .near import arriving
from .paged import Batch, Row, scratch_of, spoiled

ROWS: tuple[Row, ...] = (("fff", 52), ("", 0), ("", 1), ("", 15), ("f", 0), ("", 17), ("", 63))
MIXED: tuple[Row, ...] = (
    ("ff4-84f48f4", 37), ("", 0), ("f", 1), ("88884888-88", 16), ("44448444f-44", 17), ("---", 5), ("", 33),
)  # fmt: skip
"""Sinks and others that stay in the model's dtype; more pages in int8 than in int4, and fewer; none of either."""
LONG: tuple[Row, ...] = (("8" * 19 + "4" * 3 + "f", 40), ("f" + "4" * 21 + "8", 3))
"""More pages of a format than any step takes."""
TILES = {16: Tiles(16, warps=4, stages=3, coded_pages=8), 64: Tiles(64, warps=4, stages=5, coded_pages=2)}
"""By tokens of a step"""

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
CODED = pytest.mark.parametrize("coded", [False, True], ids=["whole", "coded"])


@DTYPES
@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize(("group", "channels"), [(1, 32), (1, 80), (2, 64), (7, 96)])
def test_rows_of_all_lengths(group, channels, splits, dtype, device):
    batch = Batch.of(ROWS, group, channels, dtype, device, coded=False)
    batch.check(batch.kernel(splits)[0])
    batch.check(batch.reference()[0])


@DTYPES
@pytest.mark.parametrize(
    ("group", "channels", "splits"),
    [
        (1, 20, 1), (1, 64, 3), (1, 96, 8), (1, 32, 32), (2, 80, 1), (2, 20, 3), (4, 32, 3), (7, 96, 1), (7, 32, 8),
        (8, 64, 32),
    ],
)  # fmt: skip
def test_pages_of_all_formats(group, channels, splits, dtype, device):
    batch = Batch.of(MIXED, group, channels, dtype, device, coded=True)
    batch.check(batch.kernel(splits)[0])
    batch.check(batch.reference()[0])


@CODED
@pytest.mark.parametrize(
    ("group", "channels"), [(1, 128), (1, 256), (2, 20), (4, 128), (8, 32), (8, 256), (24, 64)]
)  # fmt: skip
def test_heads_of_all_shapes(group, channels, coded, device):
    rows = (("f84-f48", 18), ("", 17)) if coded else (("", 65), ("", 17))
    batch = Batch.of(rows, group, channels, torch.bfloat16, device, coded=coded, kv_heads=3)
    batch.check(batch.kernel(3)[0])
    batch.check(batch.reference()[0])


@DTYPES
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("settled", ["fffff", "88888", "44444", "8", "4", "-"])
def test_one_format_alone(settled, group, dtype, device):
    batch = Batch.of(((settled, 19), (settled, 1)), group, 64, dtype, device, coded=True)
    for splits in (1, 8):
        batch.check(batch.kernel(splits)[0])
    batch.check(batch.reference()[0])


@CODED
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("tokens", TILES)
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_shares_of_many_steps_and_of_part_of_one(splits, tokens, group, coded, device):
    rows = LONG if coded else (("", 207), ("", 97), ("", 33))
    batch = Batch.of(rows, group, 32, torch.float32, device, coded=coded, kv_heads=2)
    batch.check(batch.kernel(splits, tiles=TILES[tokens])[0])


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("window", [1, 16, 23, 50])
@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_before_the_window_is_read(splits, window, group, device):
    batch = Batch.of(ROWS, group, 32, torch.float32, device, coded=False, window=window)
    batch.check(batch.kernel(splits, tiles=TILES[16])[0])
    batch.check(batch.reference()[0])


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("splits", "recent_pages", "window"), [(1, 1, 0), (3, 2, 0), (8, 3, 0), (3, 0, 0), (3, 2, 50)])
def test_distant_mass_is_that_of_the_signal(splits, recent_pages, window, group, device):
    batch = Batch.of(ROWS, group, 32, torch.float32, device, coded=False, window=window)
    check_distant(batch, splits, recent_pages)


@DTYPES
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("splits", "recent_pages"), [(1, 1), (3, 2), (8, 3), (3, 0)])
def test_all_settled_pages_are_distant(splits, recent_pages, group, dtype, device):
    # One that is recent is live: rows have as many live pages, the last of them with one token.
    live = max(1, 16 * recent_pages - 15)
    rows = (("ff4-84f48", live), ("88884888", live), ("44448444-", live + 15), ("f", live + 35), ("", 0), ("", 5))
    check_distant(Batch.of(rows, group, 32, dtype, device, coded=True), splits, recent_pages)


def check_distant(batch: Batch, splits: int, recent_pages: int) -> None:
    def signal(softmax):
        # It takes the mean over heads first; of each head alone it is the same sum.
        return distant_attention(softmax, batch.pages.tables.lengths[:, None] - 1, recent_pages)

    wanted = signal(batch.eager(torch.float64)[1])
    assert wanted.max() > 0.1
    out, distant = batch.kernel(splits, tiles=TILES[16], recent_pages=recent_pages)
    batch.check(out)
    for found in (distant, batch.reference(recent_pages)[1]):
        if out.dtype == torch.float32:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        else:  # by all heads together: of one PyTorch's may be right by luck
            eager = signal(batch.eager(out.dtype)[1])
            # Where all mass is distant PyTorch's sum is 1; ours is a reciprocal and a product, both rounded.
            rounded = 2 * 2.0**-24 * wanted.norm()
            assert (found - wanted).norm() <= 2 * (eager - wanted).norm() + rounded


@CODED
@pytest.mark.parametrize("group", [1, 4])
def test_launches_share_a_scratch(group, coded, device):
    rows = (("f48", 52), ("888", 3)) if coded else (("", 100), ("", 48))
    batch = Batch.of(rows, group, 32, torch.float32, device, coded=coded, kv_heads=2)
    count, heads, channels = batch.query.shape
    scratch = scratch_of(count, heads, channels, 3, device)
    found = []
    for _ in range(2):
        found.append(batch.kernel(3, recent_pages=1, scratch=spoiled(scratch)))
        assert not scratch.arrived.any()
        # All three shares of all heads are at work, each in a place of its own.
        assert not scratch.sums.isnan().any()
        assert not scratch.softmax.isnan().any()
    for first, again in zip(*found, strict=True):
        torch.testing.assert_close(again, first, rtol=0, atol=0)


@CODED
@pytest.mark.parametrize("group", [1, 2])
def test_a_batch_that_is_not_in_use(group, coded, device):
    batch = Batch.of((("", 0), ("", 0)), group, 32, torch.float32, device, coded=coded)
    for out, distant in (batch.kernel(3, recent_pages=1), batch.reference(1)):
        assert not out.any()
        assert not distant.any()


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("settled", ["8" * 12, "4" * 12])
def test_float32_loses_no_bits_to_zero_points(settled, group, device):
    batch = Batch.of(((settled, 1), (settled, 17)), group, 64, torch.float32, device, coded=True)
    # Of weights that are nearly alike values cancel out, and what they are stored higher by does not.
    batch.query.mul_(0.03)
    batch.check(batch.kernel(1)[0])


@CODED
@pytest.mark.parametrize("group", [1, 4])
def test_scores_far_from_zero(group, coded, device):
    batch = Batch.of(MIXED if coded else ROWS, group, 32, torch.float32, device, coded=coded)
    batch.query.mul_(100)
    # Near 1000 scores are rounded by 1e-4, and weights by as much of themselves.
    torch.testing.assert_close(batch.kernel(3)[0].double(), batch.eager(torch.float64)[0], rtol=1e-3, atol=1e-3)


def test_nothing_is_read_before_the_launch_before_has_ended(device):
    batch = Batch.of((("f48", 20),), 1, 32, torch.float32, device, coded=True)
    with arriving([kernels], batch.query, batch.pages.memory, *vars(batch.pages.tables).values()):
        out, _ = batch.kernel(2)
    batch.check(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group", [2, 3, 4, 7, 8, 12, 16, 24, 32])
def test_steps_of_coded_pages_are_large_enough_for_tensor_cores(group, dtype):
    """Of a product, rows are heads times pages, and columns tokens, of int4 half of them at once; 16 at least."""
    for splits in (1, 8):
        pages = Tiles.of(group, 64, dtype, splits, coded=True).coded_pages
        assert pages & (pages - 1) == 0
        assert pages * triton.next_power_of_2(group) >= 16
        assert pages * 8 >= 16


def test_a_window_over_pages_that_may_be_coded_is_refused(device):
    batch = Batch.of((("", 20),), 1, 32, torch.float32, device, coded=True, window=16)
    for attend in (lambda: batch.kernel(1), batch.reference):
        with pytest.raises(AssertionError, match="a coded page"):
            attend()


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("coded", "units"), [(False, 2**20), (True, 2**22)], ids=["whole", "coded"])
def test_a_pool_of_more_than_31_bits(coded, units, group, device):
    """Of numbers in the dtype and, where they are read as words, of words."""
    rows = (("f84", 20),) if coded else (("", 40),)
    batch = Batch.of(rows, group, 128, torch.bfloat16, device, coded=coded).moved(units)
    assert batch.pages.memory.nbytes > 2**33
    batch.check(batch.kernel(1)[0])

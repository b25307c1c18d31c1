"""Attention of a prompt's tokens over pages of all formats, kernel and reference against PyTorch in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from runtime.ops.prompt import flash as kernels
from runtime.ops.prompt.flash import Steps
from tests.ops.near import arriving
from tests.ops.paged import Batch
from tests.ops.prompt.prompts import Asked, Prompts

FP32, BF16 = torch.float32, torch.bfloat16
SMALL = Steps(16, 16, warps=4, stages=2, coded_stages=2)
"""Many programs and steps of few tokens."""
STEPS = Steps(64, 32, warps=4, stages=3)
"""Of both dtypes: the interpreter takes its time by the step."""

WHOLE: tuple[Asked, ...] = (("", 0, 17), ("", 5, 1), ("", 16, 16), ("", 131, 33), ("ff", 3, 40))
"""From position 0, in the middle of a page, at its first token; what stays full for good is settled too."""
LENGTHS: tuple[Asked, ...] = (("", 0, 127), ("", 64, 128), ("", 37, 129), ("", 250, 1))
MIXED: tuple[Asked, ...] = (
    ("ff4-84f48f4", 37, 19), ("f", 1, 70), ("88884888-88", 0, 16), ("44448444f-44", 16, 1), ("---", 5, 20),
    ("", 33, 17),
)  # fmt: skip
"""Sinks and others that stay in the model's dtype; more pages in int8 than in int4, and fewer; none of either."""
LONG: tuple[Asked, ...] = (("8" * 9 + "4" * 3 + "f", 70, 20), ("f" + "4" * 11 + "8", 3, 40))
"""More pages of a format than any step takes, and steps of live ones behind them."""

DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
HEADS = pytest.mark.parametrize(("group", "channels"), [(1, 32), (2, 20), (7, 16)])
CODED = pytest.mark.parametrize("coded", [False, True], ids=["whole", "coded"])


def check(prompts: Prompts, steps: Steps | None = None) -> None:
    prompts.check(prompts.kernel(steps=steps)[0], prompts.reference()[0])


@DTYPES
@HEADS
def test_parts_from_anywhere(group, channels, dtype, device):
    prompts = Prompts.of(WHOLE, group, channels, dtype, device, coded=False, kv_heads=1 if group == 7 else 2)
    check(prompts, STEPS if group == 7 else None)


@DTYPES
@HEADS
def test_pages_of_all_formats(group, channels, dtype, device):
    prompts = Prompts.of(MIXED, group, channels, dtype, device, coded=True, kv_heads=1 if group == 7 else 2)
    check(prompts, STEPS if group == 7 else None)


@CODED
def test_tiles_that_are_full_and_nearly_so(coded, device):
    check(Prompts.of(LENGTHS, 2, 20, BF16, device, coded=coded))


@CODED
@pytest.mark.parametrize("channels", [64, 80, 96, 128, 256])
def test_heads_of_all_widths(channels, coded, device):
    asked: tuple[Asked, ...] = (("f84-f48", 18, 35), ("", 0, 66)) if coded else (("", 130, 35), ("", 0, 66))
    for dtype in (BF16, FP32):
        check(Prompts.of(asked, 1, channels, dtype, device, coded=coded))


@DTYPES
@pytest.mark.parametrize("settled", ["fffff", "88888", "44444", "8", "4", "-"])
def test_one_format_alone(settled, dtype, device):
    check(Prompts.of(((settled, 0, 17), (settled, 19, 1)), 2, 32, dtype, device, coded=True))


@DTYPES
@CODED
def test_many_steps_of_few_tokens(coded, dtype, device):
    prompts = Prompts.of(LONG if coded else WHOLE, 1, 20, dtype, device, coded=coded)
    check(prompts, steps=SMALL)
    check(prompts, steps=STEPS)


@pytest.mark.parametrize("window", [1, 16, 23, 50])
@pytest.mark.parametrize("tokens", [1, 40, 150])
def test_nothing_before_the_window_is_read(tokens, window, device):
    asked: tuple[Asked, ...] = (("", 0, tokens), ("ff", 70, tokens), ("", 13, tokens))
    prompts = Prompts.of(asked, 1, 20, FP32, device, coded=False, window=window)
    check(prompts, SMALL if tokens < 150 else None)
    check(prompts, Steps(128, 64, warps=8, stages=3))


@DTYPES
@pytest.mark.parametrize(("recent_pages", "window"), [(1, 0), (2, 0), (5, 0), (0, 0), (2, 50)])
def test_distant_mass(recent_pages, window, dtype, device):
    asked: tuple[Asked, ...] = (
        (("", 0, 30), ("", 45, 30), ("", 130, 30))
        if window
        else (("", 0, 17), ("", 5, 1), ("ff", 3, 40), ("", 131, 33))
    )
    check_distant(Prompts.of(asked, 2, 20, dtype, device, coded=False, window=window), recent_pages)


@DTYPES
@pytest.mark.parametrize("recent_pages", [1, 2, 4, 0])
def test_all_settled_pages_are_distant(recent_pages, dtype, device):
    # One that is recent is live: so many tokens there are between what is settled and the part.
    live = max(0, 16 * (recent_pages - 1))
    asked: tuple[Asked, ...] = (
        ("ff4-84f48", live, 20), ("8884", live + 3, 40), ("ff", live + 35, 1), ("", 5, 20), ("--f-", live + 70, 20),
    )  # fmt: skip
    check_distant(Prompts.of(asked, 2, 20, dtype, device, coded=True), recent_pages)


@pytest.mark.parametrize("recent_pages", [1, 4])
def test_pages_that_stay_may_be_settled_at_once(recent_pages, device):
    """Of a row none of whose pages is ever coded: they are distant by where they are."""
    check_distant(Prompts.of((("f" * 9, 0, 20), ("fff", 2, 33)), 1, 20, FP32, device, coded=True), recent_pages)


def check_distant(prompts: Prompts, recent_pages: int) -> None:
    dtype = prompts.query.dtype
    wanted, mass = (prompts.eager(own, recent_pages)[1] for own in (torch.float64, dtype))
    assert wanted.max() > 0.1
    out, distant = prompts.kernel(recent_pages=recent_pages, steps=STEPS)
    prompts.check(out)
    for found in (distant, prompts.reference(recent_pages)[1]):
        if dtype == FP32:
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        else:  # by all tokens and heads together: of one PyTorch's may be right by luck
            # Where all mass is distant PyTorch's sum is 1; ours is a reciprocal and a product, both rounded.
            rounded = 2 * 2.0**-24 * wanted.norm()
            assert (found - wanted).norm() <= 2 * (mass - wanted).norm() + rounded


@CODED
def test_a_pass_that_is_not_in_use(coded, device):
    prompts = Prompts.of((("", 3, 20),), 1, 32, FP32, device, coded=coded)
    prompts.tiles.zero_()
    for own in prompts.kernel(recent_pages=1):
        assert own.isnan().all()
    for own in prompts.reference(1):
        assert not own.any()


@CODED
def test_scores_far_from_zero(coded, device):
    prompts = Prompts.of(LONG if coded else WHOLE, 1, 32, FP32, device, coded=coded)
    prompts.query.mul_(100)
    # Near 1000 scores are rounded by 1e-4, and weights by as much of themselves.
    torch.testing.assert_close(prompts.kernel()[0].double(), prompts.eager(torch.float64)[0], rtol=1e-3, atol=1e-3)


def test_nothing_is_read_before_the_launch_before_has_ended(device):
    prompts = Prompts.of((("f48", 20, 20),), 1, 32, FP32, device, coded=True)
    with arriving([kernels], prompts.query, prompts.pages.memory, prompts.tiles, *vars(prompts.pages.tables).values()):
        out, _ = prompts.kernel()
    prompts.check(out)


def test_a_window_over_pages_that_may_be_coded_is_refused(device):
    prompts = Prompts.of((("", 0, 20),), 1, 32, FP32, device, coded=True)
    windowed = replace(prompts, window=16)
    for attend in (windowed.kernel, windowed.reference):
        with pytest.raises(AssertionError, match="a coded page"):
            attend()


@pytest.mark.gpu
@pytest.mark.parametrize(("coded", "units"), [(False, 2**20), (True, 2**22)], ids=["whole", "coded"])
def test_a_pool_of_more_than_31_bits(coded, units, device):
    """Of numbers in the dtype, and of bytes."""
    asked: tuple[Asked, ...] = (("f84", 4, 40),) if coded else (("", 90, 40),)
    prompts = Prompts.of(asked, 1, 128, BF16, device, coded=coded)
    moved = Batch(prompts.query, prompts.pages, prompts.seen, 0, prompts.scale).moved(units)
    assert moved.pages.memory.nbytes > 2**33
    prompts.check(replace(prompts, pages=moved.pages).kernel()[0])

"""The linear of all rows, kernel and reference against float64; around everything that may be read there is NaN."""

from __future__ import annotations

import pytest
import torch

from runtime.ops import linear as linears
from runtime.ops.linear import Tiles, linear
from runtime.ops.norm import Norm
from runtime.ops.reference import decode as reference
from tests.ops.near import arriving, check_guards, check_near, guarded, poisoned

EPS = 0.1
"""As large as the mean square itself, so that it shows."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 17])
@pytest.mark.parametrize(
    ("inputs", "sizes", "normed", "tiles"),
    [
        (100, (63, 3, 100), True, Tiles(16, 32, 4, 2)),
        (63, (1, 40), False, None),
        (1, (3,), True, None),
        (300, (5, 1, 33), True, None),
    ],
)
def test_linears_that_share_their_input(inputs, sizes, normed, tiles, batch, dtype, device):
    random = torch.Generator().manual_seed(batch)

    def drawn(*shape):
        return guarded(torch.randn(*shape, generator=random).to(device, dtype))

    x, weights = drawn(batch, inputs), [drawn(n, inputs) for n in sizes]
    squares = guarded(torch.rand(batch, 3, generator=random).to(device) * inputs / 15)
    y = poisoned(batch, sum(sizes), device=device)
    norm = Norm(squares, EPS, inputs) if normed else None
    with arriving([linears], x, squares):
        linear(x, tuple(weights), y, norm=norm, tiles=tiles)
    check_guards(y)
    options = {"squares": squares if normed else None, "eps": EPS}
    truth = reference.linear(x.double(), weights, **options)
    check_near(y, reference.linear(x, weights, **options), truth)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("batch", [2, 15, 16, 32, 64, 128, 256])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (4096, 11008), (8191, 64), (8192, 4096), (22016, 4096)])
def test_tiles_fit_shared_memory_and_have_a_step_on_the_way(outputs, inputs, batch, adapters, itemsize):
    tiles = Tiles.of(batch, outputs, inputs, itemsize, adapters)
    step = tiles.inputs * (tiles.outputs + max(16, batch)) * itemsize
    assert tiles.stages >= 2
    assert tiles.stages * step <= 227 * 1024
    large = adapters and itemsize == 2 and batch >= 16 and outputs >= 8192
    assert tiles.outputs == (128 if large else 32)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("inputs", [3, 64, 2048, 4096, 4100, 11008, 12288, 12290, 14336, 18944, 28672])
def test_tiles_of_one_row(inputs, adapters):
    """What unrolled steps ask for ahead must fit 64 registers of a thread."""
    tiles = Tiles.of(1, 4096, inputs, 2, adapters)
    assert (tiles.outputs, tiles.stages) == (1, 1)
    assert tiles.inputs < 2 * inputs
    values, steps = tiles.inputs // (32 * tiles.warps), -(-inputs // tiles.inputs)
    assert values <= 16
    assert steps <= (6 if adapters else 7) or values <= 4

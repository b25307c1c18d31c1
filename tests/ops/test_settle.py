"""Those who consume what linears put out, alone: what they add to it, and what they leave for the norm, against
float64.

What is added is NaN where a row's record says that nothing is, and so are every buffer's surroundings, and what is to
be written before it is. What the kernels before write is not there before the wait (`arriving`).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from policy.settings import PAGE_TOKENS
from runtime.kv.units import Units
from runtime.ops import gated, residual, rotary
from runtime.ops.adapters import Update
from runtime.ops.gated import gate_up
from runtime.ops.packed import ENDS, RECORD, Reads, level_table
from runtime.ops.pages import Pages, PageTables
from runtime.ops.reference import decode as reference
from runtime.ops.residual import add_residual, embed, squares_of
from runtime.ops.rotary import Heads, rotate
from tests.ops.near import arriving, check_guards, check_near, guarded, poisoned

HIDDEN, HEADS, KV_HEADS, CHANNELS = 116, 3, 1, 20
FP32, BF16 = torch.float32, torch.bfloat16
EPS = 0.1
GARBAGE = 2**30
WIDE = 300
"""Channels of which a row takes several programs, the last one not whole."""


class Told:
    """What linears of `widths` put out, and an update whose records say of rows and members if there is any."""

    def __init__(self, widths: list[int], batch: int, device: torch.device):
        self.random, self.device = torch.Generator().manual_seed(batch), device
        # A row reads one of three members at most: what is looked up for one is never right for another.
        read = [[(row - member) % 3 == 0 for member in range(len(widths))] for row in range(batch)]
        records = torch.full((batch, 1 + len(widths), RECORD), GARBAGE, dtype=torch.int32)
        records[:, 1:, ENDS + 3] = torch.tensor(read).int() * 2
        there = torch.tensor(read).repeat_interleave(torch.tensor(widths), 1).to(device)
        self.y = self.drawn(batch, sum(widths))
        more = self.drawn(batch, sum(widths))
        self.total = self.y.double() + more.where(there, 0)
        added, nothing = guarded(more.where(there, torch.nan)), torch.empty(0, device=device)
        reads = Reads(records.to(device), nothing, level_table(device, FP32))
        self.update = Update(nothing, added, reads, 1, 4, nothing, 0)

    def drawn(self, *shape: int) -> Tensor:
        return guarded(torch.randn(*shape, generator=self.random).to(self.device))


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_residual_adds_what_records_tell_of(batch, adapted, device):
    """Without an update nothing says where any adapters lie."""
    told = Told([WIDE], batch, device)
    r, weight = told.drawn(batch, WIDE), told.drawn(WIDE)
    squares = poisoned(batch, squares_of(batch, WIDE), device=device)
    found = guarded(r), poisoned(batch, WIDE, device=device), squares
    assert squares.shape[1] > 1
    with arriving([residual], told.y, told.update.added, found[0]):
        add_residual(told.y, *found, weight, update=told.update if adapted else None)
    check_guards(*found)
    total = told.total if adapted else told.y.double()
    truth = reference.add_residual(total, r, weight, torch.float64)
    eager = reference.add_residual(total.float(), r, weight, FP32)
    for own, near, true in zip((*found[:2], squares.sum(1, keepdim=True)), eager, truth, strict=True):
        check_near(own, near, true)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_gate_and_up_add_what_records_tell_of(batch, adapted, device):
    told = Told([WIDE, WIDE], batch, device)
    h = poisoned(batch, WIDE, device=device)
    with arriving([gated], told.y, told.update.added):
        gate_up(told.y, h, update=told.update if adapted else None)
    check_guards(h)
    total = told.total if adapted else told.y.double()
    check_near(h, *(reference.gate_up(own, own.dtype) for own in (total.float(), total)))


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotary_adds_what_records_tell_of(batch, adapted, device):
    told = Told([HEADS * CHANNELS, CHANNELS, CHANNELS], batch, device)
    angles = told.drawn(5, CHANNELS // 2)
    heads = Heads(guarded(angles.cos()), guarded(angles.sin()))
    units = Units(KV_HEADS, CHANNELS, FP32.itemsize, coded=False)
    tables = PageTables.of(batch, 1, units, device)
    tables.full.copy_(torch.arange(batch)[:, None, None])
    lengths = tables.lengths.fill_(5)
    query = poisoned(batch, HEADS, CHANNELS, device=device)
    memory = poisoned(batch, KV_HEADS, 2, PAGE_TOKENS, CHANNELS, device=device)
    pages = Pages(memory.flatten(2).view(torch.uint8), tables, units)
    with arriving([rotary], told.y, told.update.added, lengths):
        rotate(told.y, query, pages, heads, update=told.update if adapted else None)
    check_guards(query, memory)
    total = told.total if adapted else told.y.double()
    eager, truth = (
        reference.rotate(own, heads.cosine, heads.sine, lengths, (HEADS, KV_HEADS), own.dtype)
        for own in (total.float(), total)
    )
    for own, near, true in zip((query, memory[:, :, 0, 4], memory[:, :, 1, 4]), eager, truth, strict=True):
        check_near(own, near, true)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_step_begins(dtype, device):
    random = torch.Generator().manual_seed(0)
    table, weight = (
        guarded(torch.randn(*shape, generator=random).to(device, dtype)) for shape in ((7, HIDDEN), (HIDDEN,))
    )
    tokens, lengths = torch.tensor([6, 0, 3], device=device), torch.tensor([15, 0, 1], dtype=torch.int32, device=device)
    r, squares = poisoned(3, HIDDEN, device=device), poisoned(3, 7, device=device)
    normed = poisoned(3, HIDDEN, device=device, dtype=dtype)
    wanted = reference.embed(tokens, table.double(), weight, lengths, torch.float64)
    eager = reference.embed(tokens, table, weight, lengths, dtype)
    embed(tokens, table, r, normed, squares, weight, lengths)
    check_guards(r, normed, squares)
    for own, near, true in zip((r, normed, squares.sum(1, keepdim=True)), eager[:3], wanted[:3], strict=True):
        check_near(own, near, true)
    assert lengths.tolist() == eager[3].tolist() == [16, 0, 2]


def test_what_is_left_for_the_norm_makes_one(device):
    """A residual times a weight, and its squares, give a linear what an RMS norm in between would."""
    random = torch.Generator().manual_seed(0)
    y, r, weight, w = (
        torch.randn(*shape, generator=random).double().to(device) for shape in ((3, 20), (3, 20), (20,), (5, 20))
    )
    total, normed, squares = reference.add_residual(y, r, weight, torch.float64)
    wanted = rms_norm(total, (20,), weight, EPS) @ w.T
    torch.testing.assert_close(reference.linear(normed, [w], squares=squares, eps=EPS), wanted)

"""Pages written in fewer bits, bit for bit: the kernel, the reference, and `kv.formats` by the table of `kv.units`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS
from runtime.kv import formats
from runtime.kv.formats import DROPPED, FULL, INT4, INT8, NONE
from runtime.kv.units import Units
from runtime.ops import quantise as kernel
from runtime.ops.pages import FreeUnits, PagePolicy, PageTables, Turned, claim, turn
from runtime.ops.quantise import quantise_turned
from runtime.ops.reference import pages as reference

from .near import arriving

CODES = (INT8, NONE, INT4, FULL, INT4, DROPPED, INT8)
NO_UNIT = 2**31 - 1
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def wide(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Numbers of which some channels and some tokens are much larger than others, and some groups are all 0."""
    x = torch.randn(shape, generator=random)
    x = x * torch.randn(*shape[:-2], 1, shape[-1], generator=random).exp()
    x[..., 3, :], x[..., :, 1] = 0.0, -0.0
    return x


def halves(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Multiples of half a scale: whole ones and a half are as near to one code as to the next. In int8 and int4."""
    most = torch.where(torch.rand(*shape[:-2], 1, 1, generator=random) < 0.5, 127, 7)
    x = (torch.rand(shape, generator=random) * 2 * most).floor() - most + 0.5
    x[..., 0, :], x[..., :, 0] = most[..., 0].float(), -most[..., 0].float()
    return x / 8


def tiny(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Numbers too small to be normal ones, down to the least."""
    return torch.randn(shape, generator=random) * 10.0 ** (-37 - 8 * torch.rand(shape, generator=random)).double()


def huge(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=random) - 0.5) * 6e38


NUMBERS = (wide, halves, tiny, huge)


@dataclass(frozen=True)
class Case:
    """Rows of which some have a page that gets fewer bits, in a pool in which nothing else is a number."""

    units: Units
    dtype: torch.dtype
    pool: Tensor
    turned: Turned
    pages: Tensor
    """[keys and values, L, B, Hkv, 16, D]"""

    @classmethod
    def of(cls, channels: int, heads: int, dtype: torch.dtype, device: torch.device, layers: int = 2) -> Case:
        random = torch.Generator().manual_seed(channels + heads)
        units = Units(heads, channels, dtype.itemsize)
        rows, parts = len(CODES), units.of(FULL)
        shape = (layers, rows, heads, PAGE_TOKENS, channels)
        made = [NUMBERS[row % len(NUMBERS)]((2, *shape), random)[:, :, row].to(dtype) for row in range(rows)]
        pages = torch.stack(made, 2)
        order = torch.randperm(rows * (parts + 2), generator=random, dtype=torch.int32)
        # in bf16 and in float32 a number of such bytes is NaN
        pool = torch.full((layers, len(order), heads, units.head_bytes), 255, dtype=torch.uint8)
        turned = Turned.of(rows, units, torch.device("cpu"))
        turned.code.copy_(torch.tensor(CODES, dtype=torch.int32))
        turned.source.copy_(order[: rows * parts].view(rows, parts))
        turned.target.copy_(order[rows * parts :].view(rows, 2))
        numbers = pool.view(dtype)
        for row, code in enumerate(CODES):
            for part in range(2):
                for token in range(PAGE_TOKENS):
                    unit, slot = divmod(token, units.part_tokens)
                    at = (part * units.part_tokens + slot) * channels
                    numbers[:, turned.source[row, unit], :, at : at + channels] = pages[part, :, row, :, token]
            if code not in (INT8, INT4):
                turned.source[row] = NO_UNIT
            if code != INT8:
                turned.target[row, int(code == INT4) :] = NO_UNIT
        here = Turned(*(own.to(device) for own in (turned.code, turned.source, turned.target)))
        return cls(units, dtype, pool.to(device), here, pages)

    def expected(self) -> Tensor:
        """The pool, on the host, with what `formats` makes of the pages at the places of `units`."""
        pool, width = self.pool.cpu().clone(), self.units.channels
        for row, code in enumerate(CODES):
            if code not in (INT8, INT4):
                continue
            most = formats.CODE_MAX[code]
            for part, scale_at in enumerate((16 * width, 18 * width)):
                group = -2 if part == 0 else -1
                codes, scale = formats.quantise(self.pages[part, :, row], group, most)
                unit = pool[:, int(self.turned.target[row, part if code == INT8 else 0])]
                codes, first = codes.int(), 0
                if code == INT8:
                    lines = codes + 128
                else:
                    lines, first = codes[..., :8, :] + 8 + 16 * (codes[..., 8:, :] + 8), 8 * part
                for number, line in enumerate(lines.unbind(-2), start=first):
                    unit[..., number * width : (number + 1) * width] = line.to(torch.uint8)
                if part == 1:
                    scale = scale[..., [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]]
                raw = scale.contiguous().view(torch.uint8)
                unit[..., scale_at : scale_at + raw.shape[-1]] = raw
        return pool


def check_bytes(found: Tensor, wanted: Tensor) -> None:
    wrong = (found.cpu() != wanted).nonzero()
    assert not len(wrong), f"{len(wrong)} bytes, such as that at (layer, unit, head, byte) {wrong[0].tolist()}"


@DTYPES
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("channels", [8, 20, 64, 128])
def test_codes_and_scales_are_those_of_the_formats(channels, heads, dtype, device):
    case = Case.of(channels, heads, dtype, device)
    expected, pool = case.expected(), case.pool.cpu().clone()
    reference.quantise_turned(pool, Turned(*(own.cpu() for own in vars(case.turned).values())), case.units, dtype)
    check_bytes(pool, expected)
    quantise_turned(case.pool, case.turned, case.units, dtype)
    check_bytes(case.pool, expected)


def test_nothing_is_read_before_the_launch_before_has_ended(device):
    case = Case.of(20, 1, torch.float32, device)
    expected = case.expected()
    with arriving([kernel], case.pool, case.turned.code, case.turned.source, case.turned.target):
        quantise_turned(case.pool, case.turned, case.units, case.dtype)
    check_bytes(case.pool, expected)


def test_a_pool_of_more_bytes_than_int32_counts(device):
    case = Case.of(8, 1, torch.bfloat16, device)
    _, few, heads, head_bytes = case.pool.shape
    count = 2**31 // head_bytes + few
    large = torch.empty(2, count, heads, head_bytes, dtype=torch.uint8, device=device)  # nearly all of it untouched
    large[:, -few:] = case.pool
    first = count - few
    moved = Turned(case.turned.code, case.turned.source + first, case.turned.target + first)
    quantise_turned(large, moved, case.units, case.dtype)
    check_bytes(large[:, -few:], case.expected())


@DTYPES
def test_a_row_sees_its_tokens_whatever_has_become_of_their_pages(dtype, device):
    """Pages begin, are coded and give their units to others, and no token is lost or changed on the way."""
    units, rows, pages = Units(1, 8, dtype.itemsize), 2, 6
    tables, turned = PageTables.of(rows, pages, units, device), Turned.of(rows, units, device)
    free = FreeUnits.of(rows * 6 * units.of(FULL), device)
    policy = PagePolicy.of(rows, pages, device)
    policy.hard.copy_(torch.tensor([INT8, DROPPED]))
    policy.easy.copy_(torch.tensor([INT4, FULL]))
    policy.threshold.fill_(1.0)
    policy.complexity.copy_(16 * torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 0, 1, 1, 0]]))
    policy.sink_pages[1] = 1
    policy.window_tokens[0] = 9
    pool = torch.full((1, len(free.stack), 1, units.head_bytes), 255, dtype=torch.uint8, device=device)
    random = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, rows, pages * PAGE_TOKENS, 1, 8, generator=random).to(dtype)
    kinds: list[dict[int, list[Tensor]]] = [{FULL: [], INT8: [], INT4: [], DROPPED: []} for _ in range(rows)]
    claim(tables, free, *torch.tensor([[0, 1], [1, 1]], dtype=torch.int32, device=device))
    for length in range(1, pages * PAGE_TOKENS):
        if length > 1:
            turn(tables, free, turned, policy)
            quantise_turned(pool, turned, units, dtype)
        tables.lengths.fill_(length)
        for row, code in enumerate(turned.code.tolist()):
            page, slot = divmod(length - 1, PAGE_TOKENS)
            unit, place = divmod(slot, units.part_tokens)
            for part in range(2):
                at = 8 * (part * units.part_tokens + place)
                number = int(tables.full[row, page, unit])
                pool.view(dtype)[0, number, :, at : at + 8] = tokens[part, row, length - 1].to(device)
            if code != NONE:
                first = PAGE_TOKENS * (int(tables.settled[row]) - 1)
                own = tokens[:, row, first : first + PAGE_TOKENS].transpose(1, 2)[:, :, None]
                read = own[..., :0, :]
                if code != DROPPED:
                    read = torch.stack(formats.decode(code, formats.encode(code, *own), (dtype, dtype)))
                kinds[row][code].append(read[:, :, 0].transpose(1, 2))
            live = tokens[:, row, PAGE_TOKENS * int(tables.settled[row]) : length]
            wanted = torch.cat([page for own in kinds[row].values() for page in own] + [live], 1)
            here = PageTables(*(own.cpu() for own in vars(tables).values()))
            found = torch.stack(reference.read_row(pool[0].cpu(), here, row, units, dtype))
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert not free.dry.any()
    assert all(kinds[0][code] for code in (INT8, INT4))
    assert all(kinds[1][code] for code in (FULL, DROPPED))

"""Pages of every format in units of one memory, in plain PyTorch: what the kernels must equal, and how tests and a
prompt's cache put pages there.

Functions that change tables, free units, what has turned or a pool change what they are given, row by row, on the
host's account: they wait for every number that they look at.

Shape legend: B rows, P pages of a row, F units of a page in the model's dtype, U units, L layers, Hkv KV heads, D
channels of a head, N pages, k units of a page, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.settings import PAGE_TOKENS

from ...kv.formats import DROPPED, FULL, INT4, INT8, NONE, Parts, decode, encode
from ...kv.units import CODED, Units, pages_for
from ..pages import FreeUnits, PagePolicy, PageTables, Turned


def turn(tables: PageTables, free: FreeUnits, turned: Turned, policy: PagePolicy) -> None:
    """Open a step, as the kernel does."""
    rows, _, parts = tables.full.shape
    for row in range(rows):
        if int(turned.code[row]) > FULL:
            push(free, turned.source[row])
    turned.code.fill_(NONE)
    for row in range(rows):
        length = int(tables.lengths[row])
        if length == 0 or length % PAGE_TOKENS:
            continue
        if int(free.top) < parts:
            free.dry.add_(1)
        else:
            tables.full[row, length // PAGE_TOKENS] = pop(free, parts)
    room = int(free.top)
    for row in range(rows):
        page, code = int(tables.settled[row]), due(tables, policy, row)
        if code == NONE:
            continue
        wanted = {INT8: 2, INT4: 1}.get(code, 0)
        if wanted > room:
            room = 0  # nobody overtakes a row that waits for units
            continue
        room -= wanted
        turned.code[row] = code
        tables.settled[row] += 1
        there = tables.full[row, page].clone()
        numbers = there if code == FULL else pop(free, wanted)
        if code > FULL:
            turned.source[row], turned.target[row, :wanted] = there, numbers
        if code != DROPPED:
            table, kind = {FULL: (tables.full, 0), INT8: (tables.int8, 1), INT4: (tables.int4, 2)}[code]
            table[row, int(tables.counts[row, kind])] = numbers
            tables.counts[row, kind] += 1


def due(tables: PageTables, policy: PagePolicy, row: int) -> int:
    """The format that the row's page behind the settled ones gets now, or NONE."""
    length, page = int(tables.lengths[row]), int(tables.settled[row])
    if page >= max(0, length - int(policy.window_tokens[row])) // PAGE_TOKENS:
        return NONE
    if page < int(policy.sink_pages[row]):
        return FULL
    mean = policy.complexity[row, page] / PAGE_TOKENS
    return int((policy.hard if bool(mean >= policy.threshold[row]) else policy.easy)[row])


def leave(tables: PageTables, free: FreeUnits, turned: Turned, rows: Sequence[int]) -> None:
    """Give back all that rows have; they are not in use any more."""
    for row in rows:
        for numbers in held(tables, row):
            push(free, numbers.flatten())
        if int(turned.code[row]) > FULL:
            push(free, turned.source[row])
        tables.lengths[row] = tables.settled[row] = tables.counts[row] = 0
        turned.code[row] = NONE


def claim(tables: PageTables, free: FreeUnits, rows: Sequence[int], lengths: Sequence[int]) -> None:
    """Rows grow to `lengths` tokens; one for which too few units are left stays as it is, and is counted as dry."""
    parts = tables.full.shape[2]
    for row, length in zip(rows, lengths, strict=True):
        first, end = pages_for(int(tables.lengths[row])), pages_for(length)
        if (end - first) * parts > int(free.top):
            free.dry.add_(1)
            continue
        for page in range(first, end):
            tables.full[row, page] = pop(free, parts)
        tables.lengths[row] = length


def held(tables: PageTables, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Units of a row's pages: of settled ones in the model's dtype [N, F], in int8 [N, 2] and int4 [N, 1], and of live
    ones [N, F]."""
    full, int8, int4 = tables.counts[row].tolist()
    live = slice(int(tables.settled[row]), pages_for(int(tables.lengths[row])))
    return tables.full[row, :full], tables.int8[row, :int8], tables.int4[row, :int4], tables.full[row, live]


def quantise_turned(pool: Tensor, turned: Turned, units: Units, dtype: torch.dtype) -> None:
    """Write the pages that have got int8 or int4, in all layers of pool [L, U, Hkv, head_bytes] uint8."""
    for row, code in enumerate(turned.code.tolist()):
        if code not in (INT8, INT4):
            continue
        for layer in pool:
            page = unpack_page(FULL, layer[turned.source[row].long(), None], units, dtype)
            parts = encode(code, page["keys"], page["values"])
            coded = pack_page(code, parts, units)
            for own in _places(code, units):
                at = turned.target[row, own.among].long()
                layer[at, :, own.bytes] = coded[own.among, 0, :, own.bytes]


def read_row(
    pool: Tensor, tables: PageTables, row: int, units: Units, dtype: torch.dtype, out: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values [T, Hkv, D] of all that a row sees in a layer, pool [U, Hkv, head_bytes] uint8, of a model in
    `dtype`: of settled pages in that dtype, of those in int8 and in int4, of live ones, each in the order of tokens.

    Read back into `out`, or `dtype`.
    """
    wide = out or dtype
    found = []
    for code, numbers in zip((FULL, INT8, INT4, FULL), held(tables, row), strict=True):
        if code in CODED and not units.coded:
            continue
        parts = unpack_page(code, pool[numbers.long().T], units, dtype)
        found.append([own.to(wide).flatten(1, 2).transpose(0, 1) for own in decode(code, parts, (wide, wide))])
    # What the last page has beyond the row's last token is nobody's.
    live = int(tables.lengths[row]) - PAGE_TOKENS * int(tables.settled[row])
    found[-1] = [own[:live] for own in found[-1]]
    keys, values = (torch.cat(own) for own in zip(*found, strict=True))
    return keys, values


@dataclass(frozen=True)
class _Place:
    """Where a part of a page in some format lies."""

    name: str
    among: slice
    """Its units, of those of the page"""
    bytes: slice
    """Of a head in each of them"""


def _places(code: int, units: Units) -> Iterator[_Place]:
    """Of all parts that `formats.encode` makes of a page: the table of `kv.units`."""
    whole = slice(0, units.of(code))
    if code == FULL:
        half = units.part_tokens * units.channels * units.itemsize
        yield _Place("keys", whole, slice(0, half))
        yield _Place("values", whole, slice(half, 2 * half))
        return
    codes = PAGE_TOKENS * units.channels
    scales = codes + 2 * units.channels
    first, last = slice(0, 1), slice(whole.stop - 1, whole.stop)
    yield _Place("keys", first, slice(0, codes if code == INT8 else codes // 2))
    yield _Place("values", last, slice(0 if code == INT8 else codes // 2, codes))
    yield _Place("keys_scale", first, slice(codes, scales))
    yield _Place("values_scale", last, slice(scales, scales + 2 * PAGE_TOKENS))


def _laid(code: int, name: str, part: Tensor) -> Tensor:
    """A part [Hkv, N, ...] of `formats.encode`, as it lies in memory."""
    if name == "values_scale":
        return part.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
    # int8 is moved up by 128 there, which turns its highest bit over
    return part.view(torch.uint8) ^ 128 if code == INT8 and part.dtype == torch.int8 else part


def _taken_up(code: int, name: str, part: Tensor) -> Tensor:
    """The inverse of `_laid`."""
    if name == "values_scale":
        return part.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2)
    return (part ^ 128).view(torch.int8) if code == INT8 and part.dtype == torch.uint8 else part


def pack_page(code: int, parts: Parts, units: Units) -> Tensor:
    """Pages as they lie in units: parts of `formats.encode` [Hkv, N, ...] -> uint8 [k, N, Hkv, head_bytes], zeros where
    the format has nothing. With unit numbers [k, N], `pool[numbers] = pack_page(...)` puts them there."""
    keys = parts["keys"]
    packed = keys.new_zeros((units.of(code), keys.shape[1], units.heads, units.head_bytes), dtype=torch.uint8)
    for own in _places(code, units):
        raw = _laid(code, own.name, parts[own.name]).contiguous().view(torch.uint8).flatten(2)
        place = packed[own.among, :, :, own.bytes]
        place.copy_(raw.unflatten(2, (len(place), -1)).permute(2, 1, 0, 3))
    return packed


def unpack_page(code: int, packed: Tensor, units: Units, dtype: torch.dtype) -> Parts:
    """The inverse of `pack_page`: uint8 [k, N, Hkv, head_bytes] -> parts of `formats.encode`; full pages in `dtype`."""
    parts = {}
    for own in _places(code, units):
        scale = own.name.endswith("scale")
        kind = torch.bfloat16 if scale else dtype if code == FULL else torch.uint8
        flat = packed[own.among, :, :, own.bytes].permute(2, 1, 0, 3).flatten(2).contiguous().view(kind)
        parts[own.name] = _taken_up(code, own.name, flat if scale else flat.unflatten(2, (-1, units.channels)))
    return parts


def push(free: FreeUnits, numbers: Tensor) -> None:
    top = int(free.top)
    free.stack[top : top + len(numbers)] = numbers
    free.top.add_(len(numbers))


def pop(free: FreeUnits, count: int) -> Tensor:
    """The last `count` units of the stack, the last one first."""
    top = int(free.top)
    free.top.sub_(count)
    return free.stack[top - count : top].flip(0)

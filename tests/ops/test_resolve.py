"""What every row reads of every module: kernel and reference against loops over rows and modules."""

from __future__ import annotations

import pytest
import torch

from runtime.ladder.formats import LEVELS
from runtime.ops.packed import ENDS, PARTS, STARTS_A, STRETCH, WEIGHT, level_table
from runtime.ops.reference import decode as reference
from runtime.ops.resolve import Rows, Tables, reads_for, resolve

GARBAGE = 2**30
UNUSED = -7


@pytest.mark.parametrize("modules", [1, 8, 11])
def test_records(modules, device):
    random = torch.Generator().manual_seed(modules)
    slots, rungs, banks = 5, 4, 3
    empty = Tables.of(slots, rungs, banks, modules, device)
    assert not any(own.any() for own in (empty.edges, empty.bank_of, empty.parts))

    def drawn(most, shape):
        return torch.randint(1, most, shape, generator=random, dtype=torch.int32).to(device)

    tables = Tables(drawn(2**31 - 1, empty.edges.shape), drawn(banks, empty.bank_of.shape) - 1,
                    drawn(2**31 - 1, empty.parts.shape))  # fmt: skip
    uses = [(4, 3, -0.5), (-1, GARBAGE, 0.5), (0, 0, 1.5), (2, 1, 0.0), (3, 2, 1.0)]
    slot, rung, weight = (torch.tensor(own, device=device) for own in zip(*uses, strict=True))
    rows = Rows(slot.int(), rung.int(), weight.float())
    reads = reads_for(len(uses), modules, torch.empty(0, dtype=torch.uint8, device=device), torch.bfloat16)
    assert not reads.records.any()
    assert torch.equal(reads.levels, level_table(device, torch.bfloat16))
    reads.records.fill_(UNUSED)
    resolve(reads, rows, tables)
    ends, parts = reference.resolve(rows.slot, rows.rung, rows.weight, tables.edges, tables.bank_of, tables.parts)
    for row, (own, at, factor) in enumerate(uses):
        used = own >= 0 and factor != 0
        for module, record in enumerate(reads.records[row]):
            wanted = tables.edges[own, at, module].tolist() if used else [0] * 4
            assert record[ENDS : ENDS + 4].tolist() == ends[row, module].tolist() == wanted
            if used:
                wanted = tables.parts[own, tables.bank_of[own, at], module].tolist()
                found = record[STARTS_A : STARTS_A + PARTS].tolist()
                assert found == parts[row, module].tolist() == wanted
                assert float(record[WEIGHT : WEIGHT + 1].view(torch.float32)) == factor
            assert set(record[STARTS_A + PARTS :].tolist()) == {UNUSED}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_levels_lie_in_one_table(dtype, device):
    """In float32 as they are; in bfloat16 stretched, and then nearly what they would be with more bits."""
    found = level_table(device, dtype).cpu().split([16, 4, 6])
    for bits, own, most in ((4, found[0], 0.0011), (2, found[1], 0.00003)):
        if dtype == torch.float32:
            assert torch.equal(own, LEVELS[bits])
            continue
        assert torch.equal(own.bfloat16().float(), own)
        assert ((own / STRETCH[bits] / LEVELS[bits] - 1).abs() <= most).all()

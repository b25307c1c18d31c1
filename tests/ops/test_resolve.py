"""What every row reads of every module: kernel and reference against loops over rows and modules."""

from __future__ import annotations

import pytest
import torch

from runtime.ladder.formats import CODED, LEVELS
from runtime.ops.packed import ENDS, PARTS, STARTS_A, WEIGHT, level_table
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
    reads = reads_for(len(uses), modules, torch.empty(0, dtype=torch.uint8, device=device))
    assert not reads.records.any()
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


def test_levels_of_all_formats_lie_in_one_table(device):
    found = level_table(device).cpu().split([256, 16, 4])
    for bits, own in zip(CODED[::-1], found, strict=True):
        assert torch.equal(own, LEVELS[bits])

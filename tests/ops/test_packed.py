"""What codes are looked up with on a GPU, instruction by instruction on the CPU: every code at every place."""

from __future__ import annotations

import re
import struct

import pytest
import torch

from runtime.ops import packed


def prmt(a: int, b: int, selector: int) -> int:
    """PTX: four bytes of eight; the highest bit of a selector repeats the sign of its byte."""
    source = struct.pack("<II", a, b)
    chosen = []
    for place in range(4):
        own = selector >> 4 * place & 15
        byte = source[own & 7]
        chosen.append((0xFF if byte & 0x80 else 0) if own & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


DOES = {
    "prmt.b32": prmt,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, by: a << by & 0xFFFFFFFF,
    "shr.u32": lambda a, by: a >> by,
}


def executed(assembly: str, outputs: int, given: dict[int, int]) -> list[float]:
    """The outputs $0, $1 and so on, two bfloat16 values each, of what the operands behind them hold."""
    values = {f"${number}": word for number, word in given.items()}

    def value(operand: str) -> int:
        return int(operand, 0) if re.fullmatch("0x[0-9a-f]+|[0-9]+", operand) else values[operand]

    for line in assembly.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, _, rest = line.strip().partition(" ")
        target, *operands = (own.strip() for own in rest.split(","))
        inputs = [value(own) for own in operands]
        if name == "lop3.b32":
            a, b, c, table = inputs
            assert table == 0xF0 ^ (0xCC & 0xAA)
            values[target] = a ^ (b & c)
        else:
            values[target] = DOES[name](*inputs)
    words = torch.tensor([values[f"${number}"] for number in range(outputs)]).to(torch.uint32)
    return words.view(torch.bfloat16).tolist()


@pytest.mark.parametrize(("bits", "assembly", "first"), [(4, packed._FOUR_BITS, 20), (2, packed._TWO_BITS, 24)])
def test_every_code_is_read_as_its_level(bits, assembly, first):
    table = packed.level_table(torch.device("cpu"), torch.bfloat16)
    levels = {4: table[:16], 2: table[16:20]}[bits]
    parts = 8 // bits
    outputs = 2 * parts
    given: dict[int, int] = {}
    # Behind the bytes come the words of levels.
    for number, word in enumerate(table[first : first + bits].view(torch.uint32).tolist()):
        given[outputs + 1 + number] = word
    for start in range(256):
        row = [(start + 67 * place) % 256 for place in range(4)]
        found = executed(assembly.value, outputs, given | {outputs: int.from_bytes(bytes(row), "little")})
        codes = torch.tensor(row) >> bits * torch.arange(parts)[:, None] & 2**bits - 1
        assert found == levels[codes].flatten().tolist()

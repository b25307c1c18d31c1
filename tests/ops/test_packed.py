"""What codes are looked up with on a GPU, instruction by instruction on the CPU: every code at every place."""

from __future__ import annotations

import re
import struct

import pytest
import torch

from runtime.ladder.formats import LEVELS
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


def executed(assembly: str, word: int, outputs: int) -> list[float]:
    """The outputs $0, $1 and so on, float32, of a word that is what comes behind them."""
    values = {f"${outputs}": word}

    def value(operand: str) -> int:
        return int(operand, 0) if re.fullmatch("0x[0-9a-f]+|[0-9]+", operand) else values[operand]

    for line in assembly.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, _, rest = line.strip().partition(" ")
        target, *operands = (own.strip() for own in rest.split(","))
        given = [value(own) for own in operands]
        if name == "lop3.b32":
            a, b, c, table = given
            assert table == 0xF0 ^ (0xCC & 0xAA)
            values[target] = a ^ (b & c)
        else:
            values[target] = DOES[name](*given)
    return [struct.unpack("<f", struct.pack("<I", values[f"${number}"]))[0] for number in range(outputs)]


@pytest.mark.parametrize(("bits", "assembly"), [(4, packed._FOUR_BITS), (2, packed._TWO_BITS)])
def test_every_code_is_read_as_its_level(bits, assembly):
    parts = 8 // bits
    for first in range(256):
        row = [(first + 67 * place) % 256 for place in range(4)]
        found = executed(assembly.value, int.from_bytes(bytes(row), "little"), 4 * parts)
        codes = torch.tensor(row) >> bits * torch.arange(parts)[:, None] & 2**bits - 1
        torch.testing.assert_close(torch.tensor(found), LEVELS[bits][codes].flatten(), rtol=2**-15, atol=0)

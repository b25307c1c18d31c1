"""Codes of a few bits in bytes: any shape along any axis comes back, in the bytes that were promised."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.packing import pack, packed_length, unpack

BITS = (1, 2, 4, 8)


@st.composite
def codes_along(draw):
    """(codes, bits, axis): any shape of up to four axes, empty ones and odd lengths included."""
    bits = draw(st.sampled_from(BITS))
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(0, 2**bits, shape, generator=generator).to(dtype), bits, axis


@given(codes_along())
def test_codes_come_back_from_their_bytes(case):
    codes, bits, axis = case
    before = codes.clone()
    packed = pack(codes, bits, axis)
    expected = list(codes.shape)
    expected[axis] = packed_length(codes.shape[axis], bits)
    assert packed.dtype == torch.uint8
    assert list(packed.shape) == expected
    assert torch.equal(unpack(packed, bits, codes.shape[axis], axis), codes.to(torch.uint8))
    assert torch.equal(codes, before), "what was packed is left as it is"


@given(st.integers(0, 10**6), st.sampled_from(BITS))
def test_no_byte_is_more_than_needed(length, bits):
    nbytes = packed_length(length, bits)
    assert 8 * (nbytes - 1) < length * bits <= 8 * nbytes


@given(codes_along())
def test_lines_are_packed_each_alone(case):
    """What lies beside a line along the axis changes nothing: of a packed factor any rows can be read."""
    codes, bits, axis = case
    packed = pack(codes, bits, axis)
    for other in range(codes.dim()):
        if other in (axis, axis + codes.dim()) or codes.shape[other] == 0:
            continue
        part = codes.narrow(other, codes.shape[other] // 2, 1)
        assert torch.equal(pack(part, bits, axis), packed.narrow(other, codes.shape[other] // 2, 1))


@pytest.mark.parametrize("bits", BITS)
def test_a_byte_holds_the_first_part_lowest(bits):
    """The layout itself, which kernels read: entry i of part p is bits p * bits and up of byte i."""
    parts = 8 // bits
    codes = torch.arange(3 * parts) * 7 % 2**bits
    expected = [sum(int(codes[part * 3 + i]) << part * bits for part in range(parts)) for i in range(3)]
    assert pack(codes, bits).tolist() == expected


@pytest.mark.parametrize("bits", BITS)
def test_what_fills_the_last_byte_is_zero(bits):
    ones = torch.full((2, 13), 2**bits - 1)
    filled = unpack(pack(ones, bits), bits, packed_length(13, bits) * 8 // bits)
    assert not filled[:, 13:].any()
    with pytest.raises(RuntimeError):
        unpack(pack(ones, bits), bits, packed_length(13, bits) * 8 // bits + 1)

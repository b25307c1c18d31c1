import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.kv import formats
from runtime.kv.formats import CODE_MAX, FORMATS, FULL, INT4, INT8, SPARSE
from tests.kv.naive import naive_kept, naive_page, naive_scale

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT_ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def states(shape: tuple[int, ...], dtype: torch.dtype, seed: int, magnitude: float = 1.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=rng) * magnitude).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", [INT8, INT4, SPARSE], ids=lambda code: FORMATS[code])
@pytest.mark.parametrize(("heads", "pages", "width"), [(1, 1, 1), (1, 3, 8), (3, 2, 63), (2, 1, 100)])
def test_round_trip_equals_the_loops(code, heads, pages, width, dtype, device):
    keys = states((heads, pages, 16, width), dtype, seed=1)
    values = states((heads, pages, 16, width + 1), dtype, seed=2)
    keys[0, 0, :, 0], values[0, 0, 3] = 0, 0
    kept = formats.keep_heaviest(torch.rand(pages, 16), 5)
    parts = formats.encode(code, keys.to(device), values.to(device), kept.to(device))
    blank = formats.blank_pages(code, pages, keys.transpose(0, 1), values.transpose(0, 1), 5)
    assert {n: (p.shape, p.dtype) for n, p in parts.items()} == {n: (p.shape, p.dtype) for n, p in blank.items()}
    got = formats.decode(code, parts, (dtype, dtype), kept.to(device))
    for page in range(pages):
        expected = naive_page(FORMATS[code], keys[:, page], values[:, page], kept[page].tolist())
        assert torch.equal(got[0][:, page].cpu(), expected[0])
        assert torch.equal(got[1][:, page].cpu(), expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code_max", [127, 7])
@pytest.mark.parametrize("dim", [-1, -2])
@given(seed=st.integers(0, 2**31), width=st.integers(1, 65), exponent=st.integers(-20, 12))
def test_error_is_at_most_half_a_step(dim, code_max, dtype, seed, width, exponent):
    x = states((2, 1, 16, width), dtype, seed, magnitude=2.0**exponent)
    codes, scale = formats.quantise(x, dim, code_max)
    assert codes.abs().max() <= code_max
    step = scale.double().unsqueeze(dim)
    exact = codes.double() * step
    # the bound derived in `formats.quantise`
    assert ((x.double() - exact).abs() <= step * (0.5 + 2**-17)).all()
    assert (step * code_max <= (1 + 2**-7) * x.double().abs().amax(dim, keepdim=True)).all()
    back = formats.dequantise(codes, scale, dim, dtype)
    assert back.dtype == dtype
    # fp16 has subnormals in this range, whose spacing is 2**-24
    assert (
        (back.double() - exact).abs() <= UNIT_ROUNDOFF[dtype] * exact.abs() + 2.0**-25 * (dtype == torch.float16)
    ).all()


@given(largest=st.floats(0, 2.0**126, width=32), code_max=st.sampled_from([7, 127]))
def test_scale_is_the_smallest_that_suffices(largest, code_max):
    got = formats.group_scale(torch.tensor([largest, 0.0]), 0, code_max)
    assert got.dtype == torch.bfloat16
    assert got.item() == naive_scale(largest, code_max)


def test_zeros_come_back_as_zeros():
    zeros = torch.zeros(1, 2, 16, 8)
    for code in (INT8, INT4):
        keys, values = formats.decode(code, formats.encode(code, zeros, zeros), (torch.float32, torch.float32))
        assert torch.equal(keys, zeros)
        assert torch.equal(values, zeros)


def test_every_pair_of_int4_codes_survives_packing():
    low, high = torch.cartesian_prod(torch.arange(-7, 8), torch.arange(-7, 8)).to(torch.int8).T
    codes = torch.stack((low, high))
    packed = formats.pack_int4(codes)
    assert (packed.shape, packed.dtype) == ((1, 225), torch.uint8)
    assert torch.equal(formats.unpack_int4(packed), codes)


@pytest.mark.parametrize("code", sorted(CODE_MAX), ids=lambda code: FORMATS[code])
def test_neighbours_do_not_disturb_each_other(code):
    # a huge key channel costs other channels nothing, a huge value token costs other tokens nothing
    keys, values = states((1, 1, 16, 8), torch.float32, 3), states((1, 1, 16, 8), torch.float32, 4)
    loud_keys, loud_values = keys.clone(), values.clone()
    loud_keys[..., 5] *= 1e6
    loud_values[:, :, 9] *= 1e6
    kept = torch.arange(16)[None]
    quiet = formats.decode(code, formats.encode(code, keys, values, kept), (torch.float32,) * 2, kept)
    loud = formats.decode(code, formats.encode(code, loud_keys, loud_values, kept), (torch.float32,) * 2, kept)
    channels, tokens = torch.arange(8) != 5, torch.arange(16) != 9
    assert torch.equal(quiet[0][..., channels], loud[0][..., channels])
    assert torch.equal(quiet[1][:, :, tokens], loud[1][:, :, tokens])


@given(
    mass=st.lists(st.lists(st.integers(0, 3), min_size=16, max_size=16), min_size=1, max_size=4),
    keep=st.integers(1, 16),
)
def test_heaviest_slots_are_kept_and_ties_go_to_the_latest(mass, keep):
    got = formats.keep_heaviest(torch.tensor(mass, dtype=torch.float32), keep)
    assert got.tolist() == [naive_kept(row, keep) for row in mass]


def test_full_is_the_identity():
    keys, values = states((1, 1, 16, 8), torch.bfloat16, 5), states((1, 1, 16, 8), torch.bfloat16, 6)
    parts = formats.encode(FULL, keys, values)
    assert formats.decode(FULL, parts, (torch.bfloat16,) * 2) == (keys, values)

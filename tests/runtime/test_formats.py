"""Rows in few bits: what is read is a prefix of bits and of rows, as near as was promised, in the bytes counted."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.ladder import formats
from runtime.ladder.formats import (
    BITS,
    CODED,
    ERRORS,
    LARGEST,
    LEVELS,
    PLANES,
    STRETCHES,
    Rows,
    best_stretch,
    dequantise,
    encode,
    packed,
    quantise,
    row_bytes,
    wide_rows,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BOUNDS = {2: 0.125, 4: 0.0115, 8: 1e-4}
"""Squared error over energy: a mid-rise quantiser of 2 bits, the best uniform grid of 4, and 40 dB, of normal rows."""


def normal_rows(rows, width, seed=0, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def factors(draw):
    """Rows [R, D] of any shape and dtype: zero rows in between, magnitudes that differ from row to row."""
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(DTYPES))
    least, most = (-6, 4) if dtype == torch.float16 else (-30, 30)
    powers = draw(st.lists(st.none() | st.integers(least, most), min_size=rows, max_size=rows))
    values = normal_rows(rows, width, draw(st.integers(0, 2**32)), torch.float64)
    if draw(st.booleans()):
        values = values.pow(3)  # tails far heavier than normal
    scale = torch.tensor([0.0 if power is None else 10.0**power for power in powers], dtype=torch.float64)
    return (
        (values * scale[:, None]).clamp(-6e4, 6e4).to(dtype)
        if dtype == torch.float16
        else (values * scale[:, None]).to(dtype)
    )


def relative_error(rows, found):
    """[R] squared error over energy; of a row of zeros whether anything is there."""
    rows, found = rows.double(), found.double()
    # Of tiny rows the squares would vanish.
    unit = rows.abs().amax(-1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1)
    rows, found = rows / unit, found / unit
    energy = rows.square().sum(-1)
    return (found - rows).square().sum(-1) / torch.where(energy > 0, energy, 1)


@given(factors())
def test_every_row_is_read_nearer_at_more_bits(rows):
    stored = encode(rows)
    errors = [relative_error(rows, stored.read(0, len(rows), bits, torch.float64)) for bits in CODED]
    # Tails may be heavier than any adapter's: at 2 bits they are lost then, and least squares bounds what that costs.
    assert bool((errors[0] < 1).all())
    assert bool((errors[1] < 0.3).all())
    assert bool((errors[2] < 0.003).all())
    # A scale is rounded to 8 bits of mantissa: half a step is 2**-8 of it.
    assert bool((errors[2] <= errors[1] + 2**-16).all())
    assert bool((errors[1] <= errors[0] + 2**-16).all())
    zero = ~rows.any(1)
    assert not stored.read(0, len(rows), 8, torch.float32)[zero].any()


@given(factors(), st.data())
def test_a_range_of_rows_is_a_slice_and_what_was_quantised(rows, data):
    stored = encode(rows)
    codes, scales = quantise(rows, best_stretch(rows))
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    for bits in CODED:
        whole = stored.read(0, len(rows), bits, torch.float32)
        assert torch.equal(stored.read(start, stop, bits, torch.float32), whole[start:stop])
        assert torch.equal(whole, dequantise(codes, scales, bits))
        assert torch.equal(whole, packed(codes, scales).read(0, len(rows), bits, torch.float32))
        for dtype in DTYPES:
            assert torch.equal(stored.read(start, stop, bits, dtype), whole[start:stop].to(dtype))
    given_rows = wide_rows(rows)
    assert torch.equal(given_rows.read(start, stop, 16, rows.dtype), rows[start:stop])


@given(factors())
def test_a_code_of_few_bits_is_the_first_bits_of_a_longer_one(rows):
    stored = encode(rows)
    codes, _ = quantise(rows, best_stretch(rows))
    read = [stored.codes(0, len(rows), bits) for bits in CODED]
    assert torch.equal(read[2], codes)
    assert torch.equal(read[1], codes >> 4)
    assert torch.equal(read[0], codes >> 6)
    assert torch.equal(read[0], read[1] >> 2)


def test_finer_cells_lie_within_coarser_ones_and_levels_within_their_cells():
    for coarse, fine in ((2, 4), (4, 8)):
        fan = 2 ** (fine - coarse)
        inner = LEVELS[fine].view(-1, fan).abs()
        assert bool((inner.diff(dim=1) > 0).all()), "levels ascend within a cell"
        outer = LEVELS[coarse].abs()
        assert bool((inner[:, 0] < outer).all())
        assert bool((inner[:, -1] > outer).all())
    for bits in CODED:
        half = 2 ** (bits - 1)
        assert torch.equal(LEVELS[bits][half:], -LEVELS[bits][:half]), "the highest bit is the sign"


@given(factors(), st.sampled_from(STRETCHES))
def test_a_value_falls_into_the_cell_that_a_search_would_find(rows, stretch):
    codes, _ = quantise(rows, torch.full((len(rows),), stretch))
    unit = rows.float() / rows.float().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rms = unit.square().mean(-1, keepdim=True).sqrt() * stretch
    magnitude = unit.abs() / torch.where(rms > 0, rms, 1)
    starts = torch.tensor(formats._STARTS) / formats._GRID
    assert torch.equal(codes & 127, (torch.bucketize(magnitude, starts, right=True) - 1).to(torch.uint8))
    assert torch.equal(codes >> 7, (rows < 0).to(torch.uint8))


def test_the_cells_are_128_that_ascend():
    starts = torch.tensor(formats._STARTS)
    assert (len(starts), int(starts[0])) == (128, 0)
    assert bool((starts.diff() > 0).all())
    assert 4.1 < float(starts[-1]) / formats._GRID < 4.4


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("width", [64, 1023, 4096])
def test_the_error_of_normal_rows_is_the_one_promised(bits, width):
    rows = normal_rows(64, width)
    error = relative_error(rows, encode(rows).read(0, 64, bits, torch.float32))
    assert float(error.mean()) < BOUNDS[bits]
    # What errors are weighed by; rows of 64 values fit their own scale and unit the better.
    assert float(error.mean()) == pytest.approx(ERRORS[bits], rel=0.25 if width == 64 else 0.1)


@pytest.mark.parametrize("peak", [5, 20, 60])
def test_one_value_far_above_the_others_is_within_the_finest_cells(peak):
    rows = normal_rows(8, 4096)
    rows[:, 7] = peak
    error = relative_error(rows, encode(rows).read(0, 8, 8, torch.float32))
    assert float(error.max()) < (1e-4 if peak == 5 else 4e-3)


def test_heavy_tails_get_a_wider_unit():
    normal, heavy = normal_rows(8, 4096), normal_rows(8, 4096, 1).pow(5)
    assert float(best_stretch(heavy).min()) > float(best_stretch(normal).max())
    stretch = best_stretch(heavy)
    assert all(float(one) in torch.tensor(STRETCHES) for one in stretch)
    for other in STRETCHES:
        codes, scales = quantise(heavy, torch.full((8,), other))
        chosen = quantise(heavy, stretch)
        total = [
            sum(relative_error(heavy, dequantise(*each, bits)) / ERRORS[bits] for bits in CODED)
            for each in ((codes, scales), chosen)
        ]
        assert bool((total[1] <= total[0] * (1 + 1e-5)).all()), "the least error over all formats"


@given(factors(), st.sampled_from(CODED), st.sampled_from([0.99, 1.01]))
def test_scales_are_those_of_least_squares(rows, bits, factor):
    """Any scale off by a hundredth is worse: bf16 is four times nearer than that."""
    codes, scales = quantise(rows, best_stretch(rows))
    own = relative_error(rows, dequantise(codes, tuple(s.double() for s in scales), bits))
    off = relative_error(rows, dequantise(codes, tuple(factor * s.double() for s in scales), bits))
    some = rows.any(1)
    assert bool((off[some] > own[some]).all())


@given(factors())
def test_bytes_are_those_counted(rows):
    stored, (count, width) = encode(rows), rows.shape
    # The scales of the two formats that are not read come on top.
    assert stored.nbytes == count * (row_bytes(width, 8) + 2 * 2)
    for bits in CODED:
        alone = stored.keep({16: 0, 8: 0, 4: 0, 2: 0} | {bits: count})
        assert alone.nbytes == count * row_bytes(width, bits)
    assert wide_rows(rows).nbytes == count * row_bytes(width, 16)
    assert [row_bytes(64, bits) for bits in BITS] == [128, 66, 34, 18]


@given(factors(), st.data())
def test_kept_rows_read_the_same_and_others_are_gone(rows, data):
    stored = encode(rows)
    both = Rows.of(rows.shape[1], stored.parts() | {"wide": rows})
    counts = {bits: data.draw(st.integers(0, len(rows) + 2), label=f"at {bits}") for bits in BITS}
    kept = both.keep(counts)
    assert kept.counts() == {bits: min(count, len(rows)) for bits, count in counts.items()}
    for bits, count in kept.counts().items():
        assert torch.equal(kept.read(0, count, bits, torch.float64), both.read(0, count, bits, torch.float64))
        with pytest.raises(ValueError, match=rf"rows: expected some of the {count} in memory at {bits} bits, got 0 to"):
            kept.read(0, count + 1, bits, torch.float64)
    finest = [max(kept.counts()[bits] for bits in CODED[i:]) for i in range(len(CODED))]
    assert [len(plane) for plane in kept.planes] == finest
    kept_storage = {part.untyped_storage().data_ptr() for part in kept.parts().values() if part.numel()}
    assert not kept_storage & {part.untyped_storage().data_ptr() for part in both.parts().values()}


def test_rows_come_back_from_their_parts_and_from_another_device():
    stored = encode(normal_rows(5, 33))
    for again in (Rows.of(33, stored.parts()), stored.to(torch.device("cpu"))):
        assert all(torch.equal(part, again.parts()[name]) for name, part in stored.parts().items())
    on_meta = stored.to(torch.device("meta"))
    assert on_meta.counts() == stored.counts()
    assert on_meta.nbytes == stored.nbytes


def test_no_rows_at_all():
    none = encode(torch.empty(0, 7))
    assert none.counts() == dict.fromkeys(BITS, 0)
    assert none.nbytes == 0
    for bits in BITS:
        assert none.read(0, 0, bits, torch.float32).shape == (0, 7)


@given(st.sampled_from([1e-38, 1e-30, 1e-10, 1e10, 1e30, LARGEST / 8]))
def test_magnitude_changes_no_code(magnitude):
    rows = normal_rows(4, 50)
    scaled = rows.double() * magnitude
    assert torch.equal(
        encode(scaled).read(0, 4, 8, torch.float64).sign(), encode(rows).read(0, 4, 8, torch.float64).sign()
    )
    error = relative_error(scaled, encode(scaled).read(0, 4, 8, torch.float64))
    assert float(error.max()) < 1e-3
    assert bool(encode(scaled).read(0, 4, 2, torch.float32).isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused_by_its_row(bad, dtype):
    rows = normal_rows(6, 9, dtype=dtype)
    rows[4, 8] = bad
    with pytest.raises(ValueError, match=r"rows: expected finite numbers .*, got others in row 4; ") as error:
        encode(rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float64, 1e300), (torch.float32, 3e38), (torch.bfloat16, 2e37)])
def test_what_no_scale_can_hold_is_refused(dtype, value):
    rows = torch.ones(3, 5, dtype=dtype)
    rows[2] = value
    with pytest.raises(ValueError, match=r"rows: expected finite numbers up to 1e\+37, got others in row 2; "):
        encode(rows)


@pytest.mark.parametrize("ends", [1.0, -1.0])
def test_the_largest_row_there_may_be_is_finite_at_every_format(ends):
    for rows in (torch.full((1, 8), ends * LARGEST), torch.tensor([[ends * LARGEST, *[1e30] * 4000]])):
        stored = encode(rows)
        assert all(bool(stored.read(0, 1, bits, torch.float32).isfinite().all()) for bits in CODED)


@pytest.mark.parametrize(
    "rows", [torch.ones(3), torch.ones(1, 2, 3), torch.ones(2, 0), torch.ones(2, 3, dtype=torch.int32)]
)
def test_what_is_no_factor_is_refused(rows):
    with pytest.raises(ValueError, match=r"rows: expected floats \[R, D\], D at least 1, got .*; give one factor"):
        encode(rows)


def test_reading_at_another_format_or_backwards_is_refused():
    stored = encode(normal_rows(3, 4))
    with pytest.raises(ValueError, match=r"bits: expected one of \(16, 8, 4, 2\), got 3; "):
        stored.read(0, 1, 3, torch.float32)
    for start, stop in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(ValueError, match=rf"rows: expected some of the 3 .* got {start} to {stop}; "):
            stored.read(start, stop, 8, torch.float32)


WRONG = {
    "wide": (torch.ones(3, 9), r"wide: expected \[rows, 10\] of torch.bfloat16 or .*, got \[3, 9\] of torch.float32"),
    "wide of whole numbers": (torch.ones(3, 10, dtype=torch.int8), r"wide: expected .*, got \[3, 10\] of torch.int8"),
    "plane2": (torch.ones(3, 4, dtype=torch.uint8), r"plane2: expected \[rows, 3\] of torch.uint8, got \[3, 4\]"),
    "plane4": (torch.ones(3, dtype=torch.uint8), r"plane4: expected \[rows, 3\] of torch.uint8, got \[3\]"),
    "plane8": (torch.ones(3, 5), r"plane8: expected \[rows, 5\] of torch.uint8, got \[3, 5\] of torch.float32"),
    "scale2": (torch.ones(3, 1, dtype=torch.bfloat16), r"scale2: expected \[rows\] of torch.bfloat16, got \[3, 1\]"),
    "scale8": (torch.ones(3), r"scale8: expected \[rows\] of torch.bfloat16, got \[3\] of torch.float32"),
    "scale4": (
        torch.ones(4, dtype=torch.bfloat16),
        "plane2: expected the 4 rows that have a scale at 2 bits or more, got 3",
    ),
}


@pytest.mark.parametrize(("name", "part", "message"), [(n.split()[0], *case) for n, case in WRONG.items()], ids=WRONG)
def test_parts_that_contradict_each_other_are_refused(name, part, message):
    stored = encode(normal_rows(3, 10))
    with pytest.raises(ValueError, match=message) as error:
        Rows.of(10, stored.parts() | {name: part})
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("; save the ladder again")


def test_planes_add_up_to_their_formats():
    assert [sum(PLANES[: i + 1]) for i in range(len(CODED))] == list(CODED)
    assert tuple(sorted((*CODED, 16), reverse=True)) == BITS

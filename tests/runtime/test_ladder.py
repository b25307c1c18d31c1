"""From an adapter to directions: singular ones, optimal at every prefix, and its own factors bit for bit."""

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy.rungs import rungs_of_rank
from runtime import build_ladder, load_adapter
from runtime.ladder import Adapter, LoraFactors, svd_factors
from runtime.ladder.factors import exact_bank

EPS = torch.finfo(torch.float32).eps
SHAPES = [(64, 64, 8), (160, 64, 8), (1, 7, 1), (7, 1, 1), (63, 100, 33), (5, 100, 16), (100, 5, 16), (3, 3, 8)]
shapes = pytest.mark.parametrize(("d_in", "d_out", "rank"), SHAPES)


def random_factors(d_in, d_out, rank, scale=0.7, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, d_in, generator=generator)
    # directions of very different weight, as trained adapters have them
    b = torch.randn(d_out, rank, generator=generator) * torch.logspace(0, -3, rank)
    return LoraFactors(a.to(dtype), b.to(dtype), scale)


def dense(factors):
    return factors.scale * factors.b.double() @ factors.a.double()


def rounding(factors):
    """QR, SVD and one product are backward stable: a few roundings of ‖sB‖·‖A‖."""
    return 8 * EPS * float(factors.scale * factors.b.double().norm() * factors.a.double().norm())


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_full_product_is_exact_with_the_scale_baked_in(d_in, d_out, rank, dtype):
    factors = random_factors(d_in, d_out, rank, dtype=dtype)
    a, b, _ = svd_factors(factors)
    assert a.shape == (rank, d_in)
    assert b.shape == (rank, d_out)
    assert a.dtype == b.dtype == torch.float32
    assert a.is_contiguous()
    assert b.is_contiguous()
    error = (b.double().T @ a.double() - dense(factors)).norm()
    assert error <= rounding(factors)


@shapes
def test_singular_values_are_those_of_the_dense_product(d_in, d_out, rank):
    factors = random_factors(d_in, d_out, rank)
    expected = torch.linalg.svdvals(dense(factors))[:rank]
    got = svd_factors(factors)[2].double()
    assert (got[: len(expected)] - expected).abs().max() <= rounding(factors)
    assert not got[len(expected) :].any()


@shapes
def test_every_prefix_has_the_least_error_there_is(d_in, d_out, rank):
    """Eckart-Young: the error of rank k is the singular values from k on, in both norms."""
    factors = random_factors(d_in, d_out, rank)
    (a, b, _), product = svd_factors(factors), dense(factors)
    values = torch.linalg.svdvals(product)
    for k in range(rank + 1):
        left = product - b[:k].double().T @ a[:k].double()
        assert abs(left.norm() - values[k:].norm()) <= rounding(factors)
        spectral = values[k] if k < len(values) else 0.0
        assert abs(torch.linalg.matrix_norm(left, ord=2) - spectral) <= rounding(factors)


@shapes
def test_directions_are_orthogonal_and_share_their_weight_evenly(d_in, d_out, rank):
    factors = random_factors(d_in, d_out, rank)
    a, b, values = svd_factors(factors)
    for half in (a, b):
        error = (half.double() @ half.double().T - values.double().diag()).abs().max()
        assert error <= rounding(factors)


@pytest.mark.parametrize("zero", ["a", "b", "columns"])
def test_adapter_of_less_rank_than_it_has_rows(zero):
    factors = random_factors(20, 30, 6)
    if zero == "columns":
        factors.b[:, 2:] = 0
    else:
        getattr(factors, zero).zero_()
    a, b, values = svd_factors(factors)
    assert all(x.isfinite().all() for x in (a, b, values))
    assert (b.double().T @ a.double() - dense(factors)).norm() <= rounding(factors)


@given(st.sets(st.integers(0, 24)), st.lists(st.integers(1, 24), min_size=1, max_size=4))
def test_rank_table(rungs, ranks):
    top = max(ranks)
    rungs = {r for r in rungs if r <= top}
    modules = {f"m{i}": random_factors(24, 30, rank) for i, rank in enumerate(ranks)}
    ladder = build_ladder(Adapter(None, None, modules), sorted(rungs))
    assert ladder.rungs == tuple(sorted({*rungs, top}))
    assert ladder.rank_table.tolist() == [[min(rung, rank) for rank in ranks] for rung in ladder.rungs]
    assert [ladder.rung_index(rung) for rung in ladder.rungs] == list(range(len(ladder.rungs)))


@pytest.mark.parametrize("rank", [1, 2, 5, 8, 64, 100])
def test_default_rungs_are_the_whole_ranks_among_the_shares_of_every_adapter(rank):
    ladder = build_ladder(Adapter(None, None, {"m": random_factors(128, 128, rank)}))
    assert ladder.rungs == tuple(r for r in rungs_of_rank(rank) if r == int(r))
    assert ladder.rungs[-1] == rank
    assert all(isinstance(r, int) for r in ladder.rungs)


def test_default_rungs_by_number():
    for rank, rungs in ((64, (2, 4, 6, 8, 12, 16, 24, 32, 64)), (8, (1, 2, 3, 4, 8)), (5, (5,))):
        assert build_ladder(Adapter(None, None, {"m": random_factors(64, 64, rank)})).rungs == rungs


@pytest.mark.parametrize("rungs", [[9], [4, 64], [-1, 4], [4, 4], [4, 4.0]])
def test_rungs_the_adapter_does_not_have_are_refused(rungs, llama_adapter):
    with pytest.raises(ValueError, match="rungs: expected ranks") as error:
        build_ladder(load_adapter(llama_adapter), rungs)
    assert "\n" not in str(error.value)


def test_half_a_direction_is_refused(llama_adapter):
    with pytest.raises(ValueError, match=r"rungs: expected whole ranks of an svd ladder, got \[2\.5\]; .*training"):
        build_ladder(load_adapter(llama_adapter), [2.5, 4])
    assert build_ladder(load_adapter(llama_adapter), [2.0, 4]).rungs == (2, 4, 8)


@pytest.mark.parametrize("rank", [5, 9, -2, 0.5])
def test_asking_for_a_rung_that_was_not_built(rank, llama_adapter):
    with pytest.raises(ValueError, match=r"rung: expected one of \(1, 2, 3, 4, 8\)"):
        build_ladder(load_adapter(llama_adapter)).rung_index(rank)


def test_mean_rank_bytes_and_lost_energy_are_those_of_the_definition():
    modules = {"wide": random_factors(200, 40, 12, seed=1), "narrow": random_factors(10, 30, 6, scale=2.0, seed=2)}
    ladder = build_ladder(Adapter(None, None, modules), (0, 3, 6, 9))
    total = sum(dense(factors).square().sum() for factors in modules.values())
    lost = ladder.lost_energy()
    assert lost.dtype == torch.float64
    for j, rung in enumerate(ladder.rungs):
        ranks = {name: min(rung, factors.rank) for name, factors in modules.items()}
        elements = 240 * ranks["wide"] + 40 * ranks["narrow"]
        assert ladder.rung_bytes()[j].item() == 2 * elements
        assert ladder.mean_rank()[j].item() == pytest.approx(elements / 280)
        left = sum(torch.linalg.svdvals(dense(f))[ranks[name] :].square().sum() for name, f in modules.items())
        assert lost[j].item() == pytest.approx(float(left / total), abs=1e-6)
    assert lost[-1] == 0


SCALES = [2.0, 0.5, 0.7, 1 / 3, 1.0, -2.0, 16 / 8**0.5, 1e-3]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_top_rung_is_the_adapter_bit_for_bit(scale, dtype):
    factors = random_factors(33, 20, 6, scale=scale, dtype=dtype)
    ladder = build_ladder(Adapter(Path("x"), None, {"m": factors}))
    own = ladder.modules["m"]
    assert own.a.wide.dtype == dtype
    assert torch.equal(own.a.wide, factors.a)
    exact = scale * factors.b.double().T
    # The scale is in B: in the adapter's own dtype where not one number is rounded by that, else rounded to float32.
    stays = dtype in (torch.float32, torch.float64) or torch.equal(exact.to(dtype).double(), exact)
    assert own.b.wide.dtype == (dtype if stays else torch.float32)
    assert own.b.wide.is_contiguous()
    expected = exact if dtype == torch.float64 else exact.float().double()
    assert torch.equal(own.b.wide.double(), expected)
    a, b = ladder.update("m", len(ladder.rungs) - 1, torch.float64)
    assert torch.equal(a, factors.a.double())
    assert torch.equal(b, expected)


def test_a_scale_that_is_no_power_of_two_widens_b_alone():
    bank = exact_bank(Adapter(None, None, {"m": random_factors(8, 8, 4, scale=0.7, dtype=torch.bfloat16)}))
    assert (bank["m"].a.wide.dtype, bank["m"].b.wide.dtype) == (torch.bfloat16, torch.float32)
    assert bank["m"].nbytes == 2 * 4 * 16, "counted at 16 bits all the same"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_directions_are_as_precise_as_their_adapter(dtype):
    factors = random_factors(40, 50, 4, dtype=dtype)
    ladder = build_ladder(Adapter(None, None, {"m": factors}), (4,))
    a, b, _ = svd_factors(factors)
    own = build_ladder(Adapter(None, None, {"m": factors}), (2,)).banks[0]["m"]
    assert (own.a.wide.dtype, own.b.wide.dtype) == (dtype, dtype)
    assert torch.equal(own.a.wide, a.to(dtype))
    assert torch.equal(own.b.wide, b.to(dtype))
    assert ladder.rungs == (4,)


def test_directions_that_overflow_the_adapters_dtype_are_refused():
    factors = LoraFactors(torch.full((1, 4), 6e4).half(), torch.full((4, 1), 6e4).half(), 100.0)
    with pytest.raises(
        ValueError, match=r"x: module m: expected directions within torch\.float16, got some that"
    ) as error:
        build_ladder(Adapter(Path("x"), None, {"m": factors}))
    assert "\n" not in str(error.value)


def test_an_adapter_of_zeros_loses_nothing():
    zeros = LoraFactors(torch.zeros(4, 6), torch.zeros(5, 4), 1.0)
    ladder = build_ladder(Adapter(None, None, {"m": zeros}))
    assert ladder.lost_energy().tolist() == [0.0] * len(ladder.rungs)


@pytest.mark.slow
def test_factoring_is_twenty_times_faster_than_the_dense_svd():
    factors = random_factors(4096, 4096, 64)
    product = (factors.scale * factors.b) @ factors.a
    started = time.perf_counter()
    expected = torch.linalg.svdvals(product)[:64]
    dense_seconds = time.perf_counter() - started
    started = time.perf_counter()
    values = svd_factors(factors)[2]
    assert 20 * (time.perf_counter() - started) < dense_seconds
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=0)

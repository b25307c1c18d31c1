"""The SVD ladder: exact at the top, optimal at every prefix, refused outside the adapter's rank."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy import DEFAULT_RUNGS
from runtime import build_ladder, load_adapter
from runtime.ladder import svd_factors
from runtime.ladder.adapter import Adapter, LoraFactors

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
    ladder = svd_factors(factors)
    assert ladder.a.shape == (rank, d_in)
    assert ladder.b.shape == (rank, d_out)
    assert ladder.a.dtype == ladder.b.dtype == torch.float32
    assert ladder.a.is_contiguous()
    assert ladder.b.is_contiguous()
    error = (ladder.b.double().T @ ladder.a.double() - dense(factors)).norm()
    assert error <= rounding(factors)


@shapes
def test_singular_values_are_those_of_the_dense_product(d_in, d_out, rank):
    factors = random_factors(d_in, d_out, rank)
    expected = torch.linalg.svdvals(dense(factors))[:rank]
    got = svd_factors(factors).singular_values.double()
    assert (got[: len(expected)] - expected).abs().max() <= rounding(factors)
    assert not got[len(expected) :].any()


@shapes
def test_every_prefix_has_the_least_error_there_is(d_in, d_out, rank):
    """Eckart-Young: the error of rank k is the singular values from k on, in both norms."""
    factors = random_factors(d_in, d_out, rank)
    ladder, product = svd_factors(factors), dense(factors)
    values = torch.linalg.svdvals(product)
    for k in range(rank + 1):
        left = product - ladder.b[:k].double().T @ ladder.a[:k].double()
        assert abs(left.norm() - values[k:].norm()) <= rounding(factors)
        spectral = values[k] if k < len(values) else 0.0
        assert abs(torch.linalg.matrix_norm(left, ord=2) - spectral) <= rounding(factors)


@shapes
def test_directions_are_orthogonal_and_share_their_weight_evenly(d_in, d_out, rank):
    factors = random_factors(d_in, d_out, rank)
    ladder = svd_factors(factors)
    for half in (ladder.a, ladder.b):
        error = (half.double() @ half.double().T - ladder.singular_values.double().diag()).abs().max()
        assert error <= rounding(factors)


@pytest.mark.parametrize("zero", ["a", "b", "columns"])
def test_adapter_of_less_rank_than_it_has_rows(zero):
    factors = random_factors(20, 30, 6)
    if zero == "columns":
        factors.b[:, 2:] = 0
    else:
        getattr(factors, zero).zero_()
    ladder = svd_factors(factors)
    assert all(x.isfinite().all() for x in (ladder.a, ladder.b, ladder.singular_values))
    assert (ladder.b.double().T @ ladder.a.double() - dense(factors)).norm() <= rounding(factors)


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
def test_default_rungs_end_in_the_adapters_own_rank(rank):
    ladder = build_ladder(Adapter(None, None, {"m": random_factors(128, 128, rank)}))
    assert ladder.rungs == (*(r for r in DEFAULT_RUNGS if r < rank), rank)


@pytest.mark.parametrize("rungs", [[9], [4, 64], [-1, 4], [4, 4]])
def test_rungs_the_adapter_does_not_have_are_refused(rungs, llama_adapter):
    with pytest.raises(ValueError, match="rungs: expected ranks") as error:
        build_ladder(load_adapter(llama_adapter), rungs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rank", [3, 9, -2])
def test_asking_for_a_rung_that_was_not_built(rank, llama_adapter):
    with pytest.raises(ValueError, match=r"rung: expected one of \(2, 4, 6, 8\)"):
        build_ladder(load_adapter(llama_adapter)).rung_index(rank)


def test_mean_rank_and_tail_energy_are_those_of_the_definition():
    modules = {"wide": random_factors(200, 40, 12, seed=1), "narrow": random_factors(10, 30, 6, scale=2.0, seed=2)}
    ladder = build_ladder(Adapter(None, None, modules), (0, 3, 6, 9))
    total = sum(dense(factors).square().sum() for factors in modules.values())
    for j, rung in enumerate(ladder.rungs):
        ranks = {name: min(rung, factors.rank) for name, factors in modules.items()}
        mean = (240 * ranks["wide"] + 40 * ranks["narrow"]) / 280
        assert ladder.mean_rank()[j].item() == pytest.approx(mean)
        left = sum(torch.linalg.svdvals(dense(f))[ranks[name] :].square().sum() for name, f in modules.items())
        assert ladder.tail_energy()[j].item() == pytest.approx(float(left / total), abs=1e-6)


@pytest.mark.slow
def test_factoring_is_twenty_times_faster_than_the_dense_svd():
    factors = random_factors(4096, 4096, 64)
    product = (factors.scale * factors.b) @ factors.a
    started = time.perf_counter()
    expected = torch.linalg.svdvals(product)[:64]
    dense_seconds = time.perf_counter() - started
    started = time.perf_counter()
    ladder = svd_factors(factors)
    assert 20 * (time.perf_counter() - started) < dense_seconds
    torch.testing.assert_close(ladder.singular_values, expected, rtol=1e-4, atol=0)

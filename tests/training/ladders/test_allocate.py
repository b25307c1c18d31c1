"""Bits per direction: within their bytes, as good as any at the price, and in an order that a ladder can hold."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.ladder.formats import BITS, CODED, row_bytes
from training.ladders.allocate import allocate, order_of, product_error

# of a product of two factors, by the errors of one: 1 - (1 - e)^2
ERROR = {0: 1.0, 2: 0.22154671, 4: 0.01930591, 8: 0.0000999975, 16: 0.0}


def bits_of(edges, effects):
    """[R] per module: the finest format whose range holds a direction."""
    found = {}
    for (name, own), ends in zip(effects.items(), edges.tolist(), strict=True):
        finest = [[b for b, end in zip(BITS, ends, strict=True) if k < end] for k in range(len(own))]
        found[name] = [max(formats, default=0) for formats in finest]
    return found


def bytes_of(bits, widths):
    return sum(row_bytes(width, b) for name, own in bits.items() for b in own if b for width in widths[name])


def lost(bits, effects):
    return sum(float(e) * ERROR[b] for name, own in bits.items() for e, b in zip(effects[name], own, strict=True))


@st.composite
def problems(draw):
    """Random effects over ten orders of magnitude: distinct, as measured ones are."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    effects, widths = {}, {}
    for m in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 6))
        logs = 20 * torch.rand(count, generator=generator, dtype=torch.float64) - 15
        effects[str(m)] = logs.exp().sort(descending=True).values
        widths[str(m)] = (draw(st.integers(1, 90)), draw(st.integers(1, 90)))
    shares = sorted(draw(st.sets(st.floats(0, 0.499), min_size=1, max_size=4)))
    return effects, widths, shares


@given(problems(), st.booleans())
def test_a_rung_takes_its_bytes_and_bits_fall_with_effect_but_not_with_rungs(problem, half):
    effects, widths, shares = problem
    shares = [*shares, 0.5] if half else shares
    edges = allocate(effects, widths, shares, CODED)
    assert (edges.dtype, tuple(edges.shape)) == (torch.long, (len(shares), len(effects), len(BITS)))
    assert bool((edges.diff(dim=2) >= 0).all()), "a coarser format ends later"
    assert bool((edges[..., 0] == 0).all())
    whole = sum(2 * sum(widths[name]) * len(own) for name, own in effects.items())
    dearest = max(sum(row_bytes(width, 8) for width in pair) for pair in widths.values())
    rows = [bits_of(own, effects) for own in edges]
    for share, bits in zip(shares, rows, strict=True):
        everything = all(b == 8 for own in bits.values() for b in own)
        if share == 0.5:
            assert everything
            continue
        assert bytes_of(bits, widths) <= share * whole
        assert everything or bytes_of(bits, widths) > share * whole - dearest
    for bits in rows:
        for own in bits.values():
            assert own == sorted(own, reverse=True)
    for lower, upper in itertools.pairwise(rows):
        assert all(a <= b for name in effects for a, b in zip(lower[name], upper[name], strict=True))


@given(st.integers(0, 10**6), st.floats(0.02, 0.49), st.tuples(*[st.integers(6, 80)] * 4))
def test_nothing_better_costs_as_little(seed, share, sides):
    generator = torch.Generator().manual_seed(seed)
    logs = -8 * torch.rand(2, 2, generator=generator, dtype=torch.float64)
    effects = {str(m): own.exp().sort(descending=True).values for m, own in enumerate(logs)}
    widths = {"0": sides[:2], "1": sides[2:]}
    found = bits_of(allocate(effects, widths, [share], CODED)[0], effects)
    price, loss = bytes_of(found, widths), lost(found, effects)
    for choice in itertools.product((0, *CODED), repeat=4):
        other = {"0": choice[:2], "1": choice[2:]}
        if bytes_of(other, widths) <= price:
            assert lost(other, effects) >= loss - 1e-12


@given(problems())
def test_at_16_bits_directions_go_by_effect_per_byte(problem):
    effects, widths, shares = problem
    edges = allocate(effects, widths, [*shares, 0.75], (16,))
    assert bool((edges == edges[..., :1]).all())
    worth = [(float(e) / sum(widths[n]), n, k) for n, own in effects.items() for k, e in enumerate(own)]
    whole = sum(2 * sum(widths[name]) * len(own) for name, own in effects.items())
    for share, ends in zip([*shares, 0.75], edges[..., 0].tolist(), strict=True):
        counts = dict.fromkeys(effects, 0)
        spent = 0
        for _, name, _ in sorted(worth, reverse=True):
            spent += 2 * sum(widths[name])
            if spent > share * whole:
                break
            counts[name] += 1
        assert ends == list(counts.values())


@pytest.mark.parametrize("formats", [CODED, (8,)])
@pytest.mark.parametrize("share", [0.51, 0.99])
def test_more_than_a_half_is_refused(share, formats):
    effects, widths = {"m": torch.tensor([2.0, 1.0])}, {"m": (8, 8)}
    with pytest.raises(ValueError, match=rf"^rungs: expected at most half of the adapter .* got {share}"):
        allocate(effects, widths, [0.25, share], formats)


def test_what_has_no_effect_gets_no_bits_below_the_half():
    effects, widths = {"m": torch.tensor([2.0, 0.0, 0.0])}, {"m": (32, 32)}
    first, half = allocate(effects, widths, [0.49, 0.5], CODED)
    assert bits_of(first, {"m": effects["m"]}) == {"m": [8, 0, 0]}
    assert bits_of(half, {"m": effects["m"]}) == {"m": [8, 8, 8]}


@pytest.mark.parametrize("bits", ERROR)
def test_error_of_a_product_is_that_of_its_two_factors(bits):
    assert product_error(bits) == pytest.approx(ERROR[bits], abs=1e-9)


def test_order_is_by_falling_effect_and_stable():
    found = order_of({"one": torch.tensor([1.0, 3.0, 2.0, 3.0]), "other": torch.tensor([0.0])})
    assert {name: own.tolist() for name, own in found.items()} == {"one": [1, 3, 2, 0], "other": [0]}

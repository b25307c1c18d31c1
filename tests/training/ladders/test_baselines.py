"""Static compressors: what they read back, held against naive loops, and the bytes that they say it takes."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.ladder import Adapter, LoraFactors, load_adapter
from tests.training.ladders.naive import (
    naive_groups,
    naive_ranged,
    naive_rows,
    naive_signs,
    naive_symmetric,
)
from training.ladders import baselines
from training.ladders.baselines import converted, leading, loraquant, plain_svd, uniform

# d_in, d_out, r, scale; 200 and 130 are no multiple of a group, 24 is narrower than one
SHAPES = {"even": (128, 256, 8, 2.0), "uneven": (200, 130, 12, 0.25), "narrow": (24, 40, 4, 1.0)}
COMPRESSORS = {
    "svd 3": lambda adapter: plain_svd(adapter, 3),
    "int8": lambda adapter: uniform(adapter, 8),
    "int4": lambda adapter: uniform(adapter, 4),
    "int3": lambda adapter: uniform(adapter, 3),
    "loraquant 2@0.8": lambda adapter: loraquant(adapter, energy=0.8, high_bits=2, refine_steps=20),
    "loraquant 3@0.95": lambda adapter: loraquant(adapter, energy=0.95, high_bits=3, refine_steps=20),
}


def made(shapes=SHAPES, dtype=torch.float32) -> Adapter:
    """Random factors whose singular values fall by a fifth from one to the next, as real ones do."""
    generator = torch.Generator().manual_seed(5)

    def factors(d_in, d_out, rank, scale):
        a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        falling = 0.8 ** torch.arange(rank) / math.sqrt(d_in * d_out)
        return LoraFactors(a.to(dtype), (b * falling).to(dtype), scale)

    return Adapter(Path("made"), None, {name: factors(*shape) for name, shape in shapes.items()})


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return made()


def exact(factors: LoraFactors) -> torch.Tensor:
    return factors.scale * factors.b.double() @ factors.a.double()


def product(pair) -> torch.Tensor:
    a, b = pair
    return b.double().T @ a.double()


def error(adapter, compressed) -> float:
    """Share of the adapter's Frobenius norm, over all modules."""
    wanted = {name: exact(factors) for name, factors in adapter.modules.items()}
    off = sum(float((wanted[name] - product(pair)).square().sum()) for name, pair in compressed.modules.items())
    return math.sqrt(off / sum(float(w.square().sum()) for w in wanted.values()))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_comes_back_is_the_adapter_or_nearly(name, adapter):
    before = {n: (f.a.clone(), f.b.clone()) for n, f in adapter.modules.items()}
    compressed = COMPRESSORS[name](adapter)
    assert compressed.name == name
    assert list(compressed.modules) == list(adapter.modules)
    for module, (a, b) in compressed.modules.items():
        factors = adapter.modules[module]
        assert a.dtype == b.dtype == torch.float32
        assert (a.shape[1], b.shape[1]) == (factors.a.shape[1], factors.b.shape[0])
        assert len(a) == len(b) <= factors.rank
        assert bool(a.isfinite().all() & b.isfinite().all())
        assert torch.equal(factors.a, before[module][0])
        assert torch.equal(factors.b, before[module][1])
    # an unrelated update would be off by 1.4, a scale forgotten by a half
    assert error(adapter, compressed) < 0.8
    assert compressed.bytes < sum(2 * (f.a.numel() + f.b.numel()) for f in adapter.modules.values())


@pytest.mark.parametrize("name", COMPRESSORS)
def test_scale_of_the_adapter_is_in_what_comes_back(name, adapter):
    # a power of two, so that no rounding differs
    louder = Adapter(adapter.path, None, {n: LoraFactors(f.a, f.b, 4 * f.scale) for n, f in adapter.modules.items()})
    plain, loud = COMPRESSORS[name](adapter), COMPRESSORS[name](louder)
    for module in SHAPES:
        expected = 4 * product(plain.modules[module])
        torch.testing.assert_close(product(loud.modules[module]), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_module_does_not_depend_on_the_others(name, adapter):
    together = COMPRESSORS[name](adapter)
    alone = [COMPRESSORS[name](Adapter(adapter.path, None, {n: f})) for n, f in adapter.modules.items()]
    assert together.bytes == sum(own.bytes for own in alone)
    for own in alone:
        for module, (a, b) in own.modules.items():
            torch.testing.assert_close(together.modules[module][0], a)
            torch.testing.assert_close(together.modules[module][1], b)


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("nothing", ["b", "a column"])
def test_an_untrained_factor_reads_back_as_nothing(name, nothing, adapter):
    factors = adapter.modules["even"]
    b = torch.zeros_like(factors.b)
    if nothing == "a column":
        b[:, 0] = factors.b[:, 0]
    compressed = COMPRESSORS[name](Adapter(adapter.path, None, {"even": LoraFactors(factors.a, b, factors.scale)}))
    got = product(compressed.modules["even"])
    assert bool(got.isfinite().all())
    assert bool(got.any()) == (nothing == "a column")


@pytest.mark.parametrize("name", COMPRESSORS)
def test_half_precision_adapters_are_read_in_float32(name):
    half = made(dtype=torch.bfloat16)
    wide = replace(half, modules={n: LoraFactors(f.a.float(), f.b.float(), f.scale) for n, f in half.modules.items()})
    with torch.inference_mode():
        got = COMPRESSORS[name](half)
    expected = COMPRESSORS[name](wide)
    assert got.bytes == expected.bytes
    for module, (a, b) in expected.modules.items():
        assert torch.equal(got.modules[module][0], a)
        assert torch.equal(got.modules[module][1], b)


def test_plain_svd_is_the_best_of_its_rank(adapter):
    compressed = plain_svd(adapter, 6)
    for name, factors in adapter.modules.items():
        u, s, vt = torch.linalg.svd(exact(factors), full_matrices=False)
        best = (u[:, :6] * s[:6]) @ vt[:6]
        torch.testing.assert_close(product(compressed.modules[name]), best, rtol=0, atol=1e-6 * float(s[0]))
    # `narrow` has four directions, and is stored with four
    assert compressed.bytes == 2 * (6 * (128 + 256) + 6 * (200 + 130) + 4 * (24 + 40))


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_uniform_rounds_each_value_to_the_nearest_level(bits, adapter):
    compressed = uniform(adapter, bits)
    for name, factors in adapter.modules.items():
        a, b = compressed.modules[name]
        stored = naive_rows(factors.a, naive_symmetric(bits)), naive_rows(factors.b, naive_symmetric(bits))
        assert torch.equal(a, stored[0])
        assert torch.equal(b, factors.scale * stored[1].T)
        for rows, read in zip((factors.a, factors.b), stored, strict=True):
            for row, own in zip(rows, read, strict=True):
                for part, levels in zip(naive_groups(row), naive_groups(own), strict=True):
                    # half a step: a bf16 scale is off by 2^-8 at most, which at 127 steps is less than half of one
                    step = part.abs().max() / (2 ** (bits - 1) - 1)
                    assert float((part - levels).abs().max()) <= float(step) / 2 * (1 + 2**-7)
                    assert len(levels.unique()) <= 2**bits - 1


def test_fewer_bits_are_further_off_by_what_theory_says(adapter):
    off = {bits: error(adapter, uniform(adapter, bits)) for bits in (8, 4, 3)}
    assert 0 < off[8] < off[4] < off[3] < 1
    # errors of a step's uniform distribution, so they go with the step: 127 / 7 and 7 / 3, from factors and not sums
    assert off[4] / off[8] == pytest.approx(127 / 7, rel=0.1)
    assert off[3] / off[4] == pytest.approx(7 / 3, rel=0.1)


def test_bytes_of_uniform_counted_by_hand():
    adapter = made({"one": (200, 256, 8, 1.0)})
    # A is 8 rows of 200, in two groups each; B is 256 rows of 8, one group each
    codes, scales = 8 * 200 + 256 * 8, 8 * 2 + 256
    assert uniform(adapter, 4).bytes == codes / 2 + 2 * scales
    assert uniform(adapter, 3).bytes == codes * 3 / 8 + 2 * scales
    assert uniform(adapter, 8, group=64).bytes == codes + 2 * (8 * 4 + 256)
    assert uniform(adapter, 8, group=4).bytes == codes + 2 * (8 * 50 + 256 * 2)


def test_smaller_groups_follow_the_values_closer():
    adapter = made({"one": (512, 256, 16, 1.0)})
    adapter.modules["one"].a[:, :8] *= 30
    off = [error(adapter, uniform(adapter, 4, group=group)) for group in (512, 128, 32)]
    assert off == sorted(off, reverse=True)


@pytest.mark.parametrize(
    ("share", "count"), [(0.01, 1), (0.64, 1), (0.65, 2), (0.8, 2), (0.81, 3), (0.96, 3), (0.97, 4), (1.0, 4)]
)
def test_leading_directions_are_the_fewest_that_hold_the_share(share, count):
    # squares 16, 4, 4, 1 and 0, of 25 together
    assert leading(torch.tensor([4.0, 2.0, 2.0, 1.0, 0.0]), share) == count


@given(
    values=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=12),
    shares=st.tuples(st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True)),
)
def test_leading_grows_with_the_share_and_stays_within_the_rank(values, shares):
    ordered = torch.tensor(sorted(values, reverse=True))
    low, high = (leading(ordered, share) for share in sorted(shares))
    assert 1 <= low <= high <= len(values)


def leads(adapter, energy):
    """By module: h, the first h singular pairs and the others."""
    whole = plain_svd(adapter, 12).modules
    values = {name: torch.linalg.svdvals(exact(factors)).float() for name, factors in adapter.modules.items()}
    return {name: (leading(values[name], energy), *whole[name]) for name in whole}


@pytest.mark.parametrize(("energy", "bits"), [(0.8, 2), (0.9, 3), (1.0, 2)])
def test_loraquant_reads_back_what_naive_rounding_does(energy, bits, adapter):
    compressed = loraquant(adapter, energy=energy, high_bits=bits, refine_steps=0)
    for name, (h, *sides) in leads(adapter, energy).items():
        for side, read in zip(sides, compressed.modules[name], strict=True):
            assert torch.equal(read[:h], naive_rows(side[:h], naive_ranged(bits)))
            if h < len(side):
                assert torch.equal(read[h:], naive_rows(side[h:], naive_signs))


def test_levels_of_a_group_are_as_many_as_its_bits_allow(adapter):
    compressed = loraquant(adapter, energy=0.8, high_bits=2, refine_steps=30)
    seen = set()
    for name, (h, *_) in leads(adapter, 0.8).items():
        assert 0 < h < adapter.modules[name].rank
        for read in compressed.modules[name]:
            for number, row in enumerate(read):
                for part in naive_groups(row):
                    levels = part.unique()
                    if number < h:
                        assert len(levels) <= 4
                        steps = levels / levels.diff().min()
                        torch.testing.assert_close(steps, steps.round())
                    else:
                        assert len(levels) == 2
                        assert float(levels.sum()) == 0
                    seen.add(len(levels))
    assert 4 in seen


def test_a_zero_is_one_of_two_levels():
    assert baselines._signs(torch.tensor([[[0.0, -3.0, 1.5, 1.5]]])).tolist() == [[[1.5, -1.5, 1.5, 1.5]]]


def direction_errors(compressed, adapter, energy):
    """Of each leading direction of every module, ||b a^T - what is read back||_F."""
    found = []
    for name, (h, a, b) in leads(adapter, energy).items():
        read_a, read_b = compressed.modules[name]
        found += [
            float((torch.outer(b[i], a[i]) - torch.outer(read_b[i], read_a[i])).double().norm()) for i in range(h)
        ]
    return torch.tensor(found)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.75), (3, 0.92)])
def test_refinement_lowers_the_error_of_every_direction(bits, share, adapter):
    plain, refined = (
        loraquant(adapter, energy=0.9, high_bits=bits, refine_steps=steps) for steps in (0, baselines.REFINE_STEPS)
    )
    before, after = (direction_errors(own, adapter, 0.9) for own in (plain, refined))
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.square().sum().sqrt() / before.square().sum().sqrt()) < share
    assert error(adapter, refined) < error(adapter, plain)
    assert refined.bytes == plain.bytes


def test_more_steps_never_end_further_off(adapter, monkeypatch):
    # so large a step jumps about its best
    monkeypatch.setattr(baselines, "REFINE_RATE", 0.1)
    runs = (loraquant(adapter, energy=0.9, high_bits=2, refine_steps=steps) for steps in range(10))
    off = torch.stack([direction_errors(run, adapter, 0.9) for run in runs])
    assert bool((off.diff(dim=0) <= 1e-4 * off[0]).all())
    assert bool((off[-1] < off[0]).any())


@pytest.mark.parametrize("bits", [2, 3])
def test_refinement_is_gradient_descent_through_the_scales(bits, monkeypatch):
    """One pair, by autograd: rounding has no derivative there either, so only the scale passes one on."""
    # as precise scales as the naive loop's
    monkeypatch.setattr(baselines, "_stored", lambda scale: scale)
    adapter = made({"one": (300, 130, 1, 1.0)})
    exact_a, exact_b = (side.double() for side in plain_svd(adapter, 1).modules["one"])
    a, b = exact_a.clone().requires_grad_(), exact_b.clone().requires_grad_()
    norm = float((exact_b.T @ exact_a).norm())
    off = []
    for _ in range(41):
        read = [naive_rows(side, naive_ranged(bits, lambda scale: scale)) for side in (a, b)]
        distance = torch.linalg.norm(exact_b.T @ exact_a - read[1].T @ read[0])
        off.append(float(distance.detach()) / norm)
        slopes = torch.autograd.grad(distance, (a, b))
        with torch.no_grad():
            for side, slope in zip((a, b), slopes, strict=True):
                side -= 0.01 * slope
    for steps in (0, 1, 2, 5, 10, 20, 40):
        refined = loraquant(adapter, energy=1.0, high_bits=bits, refine_steps=steps)
        # float32 against float64: a value at the edge between two codes may fall to either side
        assert error(adapter, refined) == pytest.approx(min(off[: steps + 1]), rel=1e-4)
    assert off[0] > 1.1 * min(off)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_group_of_one_sign_is_read_with_a_zero_point_among_its_codes(bits):
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(2, 128, generator=generator) + torch.tensor([[0.5], [-1.5]])
    assert torch.equal(baselines._read(rows, bits, 128), naive_rows(rows, naive_ranged(bits)))


def test_more_energy_reads_more_directions_finely(adapter):
    sweep = [loraquant(adapter, energy=energy, high_bits=3, refine_steps=0) for energy in (0.3, 0.6, 0.9, 0.99)]
    assert [own.bytes for own in sweep] == sorted({own.bytes for own in sweep})
    off = [error(adapter, own) for own in sweep]
    assert off == sorted(off, reverse=True)


def test_bytes_of_loraquant_counted_by_hand():
    adapter = made({"one": (200, 384, 8, 1.0)})
    (h, *_) = leads(adapter, 0.8)["one"]
    assert 1 < h < 8
    # two groups of A's rows and three of B's columns; a scale each, and where the range is kept a zero point
    high = h * ((200 + 384) * 2 / 8 + 5 * (2 + 2 / 8))
    low = (8 - h) * ((200 + 384) / 8 + 5 * 2)
    assert loraquant(adapter, energy=0.8, high_bits=2, refine_steps=0).bytes == high + low
    # 200 in seven groups of 32 and less, 384 in twelve
    high, low = h * ((200 + 384) * 3 / 8 + 19 * (2 + 3 / 8)), (8 - h) * ((200 + 384) / 8 + 19 * 2)
    assert loraquant(adapter, energy=0.8, high_bits=3, refine_steps=0, group=32).bytes == high + low


def test_batches_of_directions_change_nothing(adapter, monkeypatch):
    whole = loraquant(adapter, energy=0.9, high_bits=2, refine_steps=20)
    monkeypatch.setattr(baselines, "BATCH_VALUES", 1)
    single = loraquant(adapter, energy=0.9, high_bits=2, refine_steps=20)
    for name, (a, b) in whole.modules.items():
        torch.testing.assert_close(single.modules[name][0], a)
        torch.testing.assert_close(single.modules[name][1], b)


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        (lambda adapter: plain_svd(adapter, 0), "rank: expected a whole number in .* got 0"),
        (lambda adapter: uniform(adapter, 1), r"bits: expected a whole number in \[2, 8\], got 1"),
        (lambda adapter: uniform(adapter, 4, group=0), "group: expected a whole number in .* got 0"),
        (lambda adapter: loraquant(adapter, energy=0.0, high_bits=2), r"energy: expected a number in \(0, 1\], got 0"),
        (lambda adapter: loraquant(adapter, energy=1.1, high_bits=2), "energy: .* got 1.1"),
        (lambda adapter: loraquant(adapter, energy=0.9, high_bits=1), r"high_bits: .*\[2, 8\], got 1"),
        (lambda adapter: loraquant(adapter, energy=0.9, high_bits=2, refine_steps=-1), "refine_steps: .* got -1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(ask, line, adapter):
    with pytest.raises(ValueError, match=line):
        ask(adapter)


@pytest.fixture(params=["llama", "gpt2"])
def real_case(request, make_peft_adapter, tiny_llama_factory, tiny_gpt2_factory, tmp_path):
    """A model and a folder; GPT-2's linears hold their weights transposed."""
    factory = {"llama": tiny_llama_factory, "gpt2": tiny_gpt2_factory}[request.param]
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}} if request.param == "llama" else {}
    return factory(), make_peft_adapter(factory, tmp_path / "adapter", r=6, **patterns)


def state_of(model):
    modules = [(name, id(module), type(module), module.training) for name, module in model.named_modules()]
    weights = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    return modules, weights, sorted(vars(model)), model.generation_config.to_dict(), model.config.to_dict()


def test_converted_is_plain_svd_and_leaves_the_model_alone(real_case):
    import peft

    model, folder = real_case
    model.train()
    before = state_of(model)
    compressed = converted(model, folder, 2, peft=peft)
    after = state_of(model)
    assert [entry[:3] for entry in before[1]] == [entry[:3] for entry in after[1]]
    assert all(torch.equal(old[3], new[3]) for old, new in zip(before[1], after[1], strict=True))
    assert (before[0], before[2:]) == (after[0], after[2:])
    assert not any("lora" in name for name, _ in model.named_modules())

    adapter = load_adapter(folder)
    expected = plain_svd(adapter, 2)
    assert compressed.name == "convert_to_lora 2"
    assert compressed.bytes == expected.bytes
    assert compressed.modules.keys() == expected.modules.keys()
    for name, pair in compressed.modules.items():
        assert [side.shape for side in pair] == [side.shape for side in expected.modules[name]]
        wanted = product(expected.modules[name])
        # two singular values close to each other turn rounding into a rotation: the gap is that of random factors
        torch.testing.assert_close(product(pair), wanted, rtol=0, atol=1e-4 * float(wanted.norm()))


def test_peft_before_the_conversion_is_refused_in_one_line(tiny_llama, tmp_path):
    old = SimpleNamespace(__version__="0.17.0")
    with pytest.raises(ValueError, match=r"^peft: expected a release with convert_to_lora, got 0\.17\.0; upgrade it$"):
        converted(tiny_llama, tmp_path, 2, peft=old)


def test_real_adapter_keeps_the_order_of_the_methods(datapack, base_model_path, load_model):
    import peft

    folder = datapack / "adapters" / "medquad-r8qv"
    adapter = load_adapter(folder)
    theirs = converted(load_model(base_model_path), folder, 4, peft=peft)
    ours = plain_svd(adapter, 4)
    assert theirs.bytes == ours.bytes
    for name, pair in ours.modules.items():
        wanted = product(pair)
        torch.testing.assert_close(product(theirs.modules[name]), wanted, rtol=0, atol=1e-4 * float(wanted.norm()))
    off = {bits: error(adapter, uniform(adapter, bits)) for bits in (8, 4, 3)}
    assert off[8] < 0.01 < off[4] < 0.15 < off[3] < 0.35
    raw, refined = (loraquant(adapter, energy=0.9, high_bits=2, refine_steps=steps) for steps in (0, 300))
    assert error(adapter, refined) < 0.75 * error(adapter, raw)

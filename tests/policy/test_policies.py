"""One contract over all policies, then what is particular to the simple ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from policy import (
    FixedPolicy,
    LearnedPolicy,
    OraclePolicy,
    PercentilePolicy,
    RandomPolicy,
    RankPolicy,
    Summary,
)
from policy.random import uniform_hash
from tests.policy.summaries import DEFAULT_RUNGS, LENGTH, ROWS, RUNGS, summary

SCALES = torch.cat([torch.linspace(1.2, 1.05, RUNGS - 1), torch.ones(1)])
KINDS = (
    "fixed", "percentile", "percentile-entropy", "percentile-token", "learned", "learned-trained", "random", "oracle",
)  # fmt: skip


def scrambled(policy: LearnedPolicy, seed: int = 0) -> LearnedPolicy:
    """Weights far from initialisation, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.4)
    return policy


def build(kind: str) -> RankPolicy:
    generator = torch.Generator().manual_seed(7)
    if kind == "fixed":
        return FixedPolicy(DEFAULT_RUNGS, SCALES)
    if kind.startswith("percentile"):
        values = torch.rand(1000, generator=generator) ** 2
        if kind.endswith("token"):
            return PercentilePolicy.calibrate(values, DEFAULT_RUNGS, "pair", SCALES, spread=2.5, sign=-1, of="token")
        signal = "entropy" if kind.endswith("entropy") else "complexity"
        return PercentilePolicy.calibrate(values, DEFAULT_RUNGS, signal, SCALES, spread=2.5)
    if kind == "random":
        return RandomPolicy(DEFAULT_RUNGS, seed=3, scales=SCALES)
    if kind == "oracle":
        rung = torch.randint(RUNGS, (ROWS, LENGTH), generator=generator)
        return OraclePolicy(DEFAULT_RUNGS, rung, SCALES)
    torch.manual_seed(0)
    policy = LearnedPolicy(DEFAULT_RUNGS)
    return scrambled(policy) if kind == "learned-trained" else policy


def rows_of(whole: Summary, rows: Tensor | slice) -> Summary:
    return Summary(*(getattr(whole, field.name)[rows] for field in dataclasses.fields(Summary)))


def middle(policy: RankPolicy, rows: int) -> Tensor:
    cheap, dear = policy.knob_range()
    return torch.full((rows,), (cheap + dear) / 2)


@pytest.fixture(params=KINDS)
def policy(request: pytest.FixtureRequest) -> RankPolicy:
    return build(request.param)


@pytest.mark.parametrize("rows", [1, 2, 63])
def test_a_decision_has_one_rung_and_one_scale_per_row(policy: RankPolicy, rows: int) -> None:
    cheap, dear = policy.knob_range()
    for knob in np.linspace(cheap, dear, 7):
        decision = policy.decide(summary(rows), torch.full((rows,), float(knob)))
        assert decision.rung.shape == decision.scale.shape == (rows,)
        assert decision.rung.dtype == torch.long
        assert decision.scale.dtype == torch.float32
        assert not decision.scale.requires_grad
        assert 0 <= int(decision.rung.min()) <= int(decision.rung.max()) < RUNGS
        assert bool((decision.scale > 0).all())
        assert bool((decision.scale[decision.rung == RUNGS - 1] == 1).all())


def test_the_same_question_has_the_same_answer(policy: RankPolicy) -> None:
    knob = middle(policy, 32)
    first, second = policy.decide(summary(32), knob), policy.decide(summary(32), knob)
    assert torch.equal(first.rung, second.rung)
    assert torch.equal(first.scale, second.scale)


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(2, 16), kept=st.integers(0, 15), seed=st.integers(0, 999))
@examples(max_examples=25, deadline=None, derandomize=True)
def test_a_row_does_not_depend_on_the_others(kind: str, rows: int, kept: int, seed: int) -> None:
    policy, kept = build(kind), kept % rows
    one, other = summary(rows, seed), summary(rows, seed + 1000)
    cheap, dear = policy.knob_range()
    share = torch.rand(2, rows, generator=torch.Generator().manual_seed(seed))
    knobs = cheap + (dear - cheap) * share
    for name in ("stats", "valid", "first", "position", "age"):
        getattr(other, name)[kept] = getattr(one, name)[kept]
    knobs[1, kept] = knobs[0, kept]
    # What an unused row of a padded batch may hold.
    for values in (other.stats, other.first, other.age):
        values[(kept + 1) % rows] = float("nan")
    first, second = policy.decide(one, knobs[0]), policy.decide(other, knobs[1])
    assert first.rung[kept] == second.rung[kept]
    assert first.scale[kept] == second.scale[kept]


def test_a_shorter_batch_gets_the_decisions_of_its_rows(policy: RankPolicy) -> None:
    whole, knob = summary(ROWS), middle(policy, ROWS)
    decision, part = policy.decide(whole, knob), policy.decide(rows_of(whole, slice(0, 5)), knob[:5])
    assert torch.equal(decision.rung[:5], part.rung)
    # A matrix product may round differently for another number of rows.
    torch.testing.assert_close(decision.scale[:5], part.scale, rtol=1e-6, atol=1e-6)


def test_unknown_signals_are_not_seen(policy: RankPolicy) -> None:
    whole, knob = summary(32), middle(policy, 32)
    hidden = dataclasses.replace(whole, stats=whole.stats.masked_fill(~whole.valid[..., None], float("nan")))
    first, second = policy.decide(whole, knob), policy.decide(hidden, knob)
    assert torch.equal(first.rung, second.rung)
    assert torch.equal(first.scale, second.scale)


def test_nothing_known_and_nothing_finite_still_gives_a_rung(policy: RankPolicy) -> None:
    whole = summary(8)
    blank = Summary(
        torch.full_like(whole.stats, float("nan")), torch.zeros_like(whole.valid), whole.first, whole.position
    )
    for knob in (middle(policy, 8), torch.full((8,), float("nan"))):
        rung = policy.decide(blank, knob).rung
        assert 0 <= int(rung.min()) <= int(rung.max()) < RUNGS


def test_deciding_never_reads_a_value_back(policy: RankPolicy) -> None:
    # Tensors on the meta device have no values, so whatever would synchronise raises.
    whole = summary(4)
    empty = Summary(*(getattr(whole, field.name).to("meta") for field in dataclasses.fields(Summary)))
    decision = policy.to("meta").decide(empty, torch.zeros(4, device="meta"))
    assert decision.rung.shape == decision.scale.shape == (4,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_of_signals_and_weights(policy: RankPolicy, dtype: torch.dtype) -> None:
    whole = summary(16)
    cast = dataclasses.replace(whole, **{name: getattr(whole, name).to(dtype) for name in ("stats", "first", "age")})
    for candidate in (policy, policy.to(dtype)):
        decision = candidate.decide(cast, middle(policy, 16))
        assert decision.scale.dtype == torch.float32
        assert 0 <= int(decision.rung.min()) <= int(decision.rung.max()) < RUNGS


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "oracle"])
@given(seed=st.integers(0, 99))
@examples(max_examples=20, deadline=None, derandomize=True)
def test_a_dearer_knob_never_costs_less(kind: str, seed: int) -> None:
    policy = build(kind)
    if kind == "learned-trained":
        assert isinstance(policy, LearnedPolicy)
        scrambled(policy, seed)
        # The guarantee holds while the damage does not depend on log lambda itself.
        with torch.no_grad():
            policy.trunk[0].weight[:, -1] = 0
    cheap, dear = policy.knob_range()
    whole, previous = summary(32, seed), torch.zeros(32, dtype=torch.long)
    for knob in np.linspace(cheap, dear, 40):
        rung = policy.decide(whole, torch.full((32,), float(knob))).rung
        assert bool((rung >= previous).all())
        previous = rung
    assert bool((previous == RUNGS - 1).all()), "the dear end is the top rung for every chunk"


@pytest.mark.parametrize("kind", ["fixed", "percentile", "percentile-token", "random"])
def test_the_cheap_end_is_the_lowest_rung(kind: str) -> None:
    policy = build(kind)
    decision = policy.decide(summary(64), torch.full((64,), policy.knob_range()[0]))
    assert bool((decision.rung == 0).all())


@pytest.mark.parametrize("kind", ["fixed", "percentile", "percentile-token", "random"])
def test_each_rung_has_its_scale(kind: str) -> None:
    policy = build(kind)
    decision = policy.decide(summary(64), middle(policy, 64))
    assert torch.equal(decision.scale, SCALES[decision.rung])


@pytest.mark.parametrize(
    ("knob", "rung"), [(-3.0, 0), (0.4, 0), (3.6, 4), (99.0, RUNGS - 1), (float("nan"), RUNGS - 1)]
)
def test_fixed_takes_the_nearest_rung(knob: float, rung: int) -> None:
    assert FixedPolicy(DEFAULT_RUNGS).decide(summary(1), torch.tensor([knob])).rung.tolist() == [rung]


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (torch.ones(3), r"scales: expected shape \(9,\), one per rung, got \(3,\)"),
        (torch.cat([torch.zeros(1), torch.ones(8)]), "scales: expected positive finite numbers"),
        (torch.full((9,), 1.1), "scales: expected 1 at the top rung, which is exact, got 1.1"),
    ],
)
def test_bad_scales_are_refused(scales: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FixedPolicy(DEFAULT_RUNGS, scales)


def test_the_hash_is_uniform_and_takes_every_argument() -> None:
    row, position = (grid.flatten() for grid in torch.meshgrid(torch.arange(200), torch.arange(500), indexing="ij"))
    draw = uniform_hash(11, row, position)
    assert 0 <= float(draw.min()) <= float(draw.max()) < 1
    counts = torch.histc(draw, bins=20, min=0, max=1)
    # 100,000 draws in 20 bins of 5,000: chi-square of 19 degrees of freedom stays below 43.8 with p = 0.999.
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 43.8
    table = torch.stack([draw, uniform_hash(12, row, position), draw.roll(1), draw.roll(500)])
    # Correlations of n independent draws have a standard deviation of 1 / sqrt(n) = 0.0032.
    assert float(torch.corrcoef(table).triu(1).abs().max()) < 0.016


def test_a_band_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"spread: expected a number in \[0, 1024\]"):
        RandomPolicy(DEFAULT_RUNGS, 0, spread=float("nan"))


def test_random_covers_its_band_evenly() -> None:
    policy = RandomPolicy(DEFAULT_RUNGS, seed=1, spread=1.5)
    rung = policy.decide(summary(3000), torch.full((3000,), 5.0)).rung
    assert rung.unique().tolist() == [4, 5, 6]
    # Each has probability 1/3, hence a standard deviation of 0.0086.
    assert ((rung == 5).float().mean() - 1 / 3).abs() < 0.043


def test_oracle_replays_its_schedule_by_row_and_position() -> None:
    rung = torch.tensor([[0, 1, 2], [3, 4, RUNGS - 1]])
    policy = OraclePolicy(DEFAULT_RUNGS, rung, SCALES)
    whole = dataclasses.replace(summary(2), position=torch.tensor([1, 70]))
    decision = policy.decide(whole, torch.zeros(2))
    assert decision.rung.tolist() == [1, RUNGS - 1]
    assert torch.equal(decision.scale, SCALES[[1, -1]])
    # Several tokens of a row at once, as a block asks.
    several = dataclasses.replace(summary(3), position=torch.tensor([0, 2, 0]), row=torch.tensor([0, 0, 1]))
    assert policy.decide(several, torch.zeros(3)).rung.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("rung", "message"),
    [
        (torch.zeros(2, 0).long(), r"rung: expected a non-empty schedule \[B, N\], got shape \(2, 0\)"),
        (torch.full((1, 1), RUNGS), r"rung: expected indices in \[0, 8\], got 9 to 9"),
    ],
)
def test_a_bad_schedule_is_refused(rung: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OraclePolicy(DEFAULT_RUNGS, rung)


def test_a_decision_carries_the_scale_of_every_rung(policy: RankPolicy) -> None:
    decision = policy.decide(summary(16), middle(policy, 16))
    assert decision.scales.shape == (16, RUNGS)
    assert torch.equal(decision.scale, decision.scales[torch.arange(16), decision.rung])
    assert bool((decision.scales[:, -1] == 1).all())
    if not isinstance(policy, LearnedPolicy):
        assert torch.equal(decision.scales, SCALES.expand(16, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_decision_replays_as_on_the_cpu(kind: str) -> None:
    policy, whole, knob = build(kind), summary(16), middle(build(kind), 16)
    expected = policy.decide(whole, knob)
    on_gpu = Summary(*(getattr(whole, field.name).cuda() for field in dataclasses.fields(Summary)))
    policy, knob = policy.cuda(), knob.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        policy.decide(on_gpu, knob)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A synchronisation inside a capture is an error.
    with torch.cuda.graph(graph):
        captured = policy.decide(on_gpu, knob)
    graph.replay()
    assert captured.rung.tolist() == expected.rung.tolist()
    torch.testing.assert_close(captured.scale.cpu(), expected.scale, rtol=1e-5, atol=1e-5)

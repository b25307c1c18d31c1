"""What a ladder is made of: whose directions, which documents, which scale, and that the top stays the adapter."""

from dataclasses import replace

import pytest
import torch

from policy.rungs import rungs_of_rank
from runtime.ladder import build_ladder, load_adapter, load_ladder, save_ladder
from runtime.ladder.formats import encode
from training.ladders import build as stage
from training.ladders.build import adapter_directions, build, calibrated, lowest, mixed_ladder, pairs_of, ranked_ladder
from training.ladders.quality import Quality

RUNGS = (0.5, 0.75, 1, 2, 4)
KINDS = ("svd", "ranked", "mixed")


@pytest.fixture(scope="module")
def made(source, tiny_llama_factory, split):
    """By kind, of the default rungs."""
    return {kind: build(kind, source, tiny_llama_factory(), split.train) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_rungs_are_shares_of_the_adapters_bytes(kind, made, source):
    found = made[kind]
    expected = rungs_of_rank(8) if kind != "svd" else tuple(r for r in rungs_of_rank(8) if r == int(r))
    assert (found.kind, found.rungs) == (kind, expected)
    whole = found.rung_bytes()[-1]
    for rung, spent in zip(found.rungs[:-1], found.rung_bytes().tolist(), strict=False):
        if kind == "mixed" and rung == 4:
            # everything at 8 bits: half of the values' bytes, and the scales on top
            assert spent == whole / 2 + 2 * 2 * 8 * len(found.modules)
        else:
            assert spent <= rung / 8 * whole
            assert spent > rung / 8 * whole - 2 * 224


@pytest.mark.parametrize("kind", KINDS)
def test_the_top_is_the_adapter_itself(kind, made, source):
    for name, own in source.modules.items():
        a, b = made[kind].update(name, len(made[kind].rungs) - 1)
        assert torch.equal(a, own.a)
        assert torch.equal(b, (own.scale * own.b.double()).float().T)
    assert made[kind].scales[-1] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_read_back(kind, made, tmp_path):
    again = load_ladder(save_ladder(made[kind], tmp_path / kind))
    assert again.fingerprint == made[kind].fingerprint
    for j in range(len(again.rungs)):
        for name in again.modules:
            for own, old in zip(again.update(name, j), made[kind].update(name, j), strict=True):
                assert torch.equal(own, old)


@pytest.mark.parametrize("kind", ["ranked", "mixed"])
def test_it_follows_from_the_seed(kind, made, source, tiny_llama_factory, split):
    assert build(kind, source, tiny_llama_factory(), split.train).fingerprint == made[kind].fingerprint
    other = build(kind, source, tiny_llama_factory(), split.train, seed=1)
    assert other.fingerprint != made[kind].fingerprint


def test_svd_asks_no_text(source):
    assert build("svd", source, None, [], [2]).fingerprint == build_ladder(source, [2]).fingerprint


def test_a_rung_reads_the_measured_directions_at_its_bits(mixed, measured):
    bits = mixed.bits()
    for m, (name, (a, b)) in enumerate(measured.pairs.items()):
        rows = encode(a), encode(b)
        for j in range(len(RUNGS)):
            expected = torch.zeros(b.shape[1], a.shape[1])
            for k, own in enumerate(bits[j, m].tolist()):
                if own:
                    read = [half.read(k, k + 1, own, torch.float32)[0] for half in rows]
                    expected += mixed.scales[j] * torch.outer(read[1], read[0])
            own_a, own_b = mixed.update(name, j)
            torch.testing.assert_close(own_b.T @ own_a, expected)


def test_directions_are_the_singular_ones_by_falling_effect(measured, source):
    for name, own in source.modules.items():
        assert bool((measured.effects[name].diff() <= 0).all())
        a, b = measured.pairs[name]
        torch.testing.assert_close(b.T @ a, own.scale * own.b @ own.a, rtol=1e-4, atol=1e-5)
        values, expected = a.norm(dim=1) * b.norm(dim=1), torch.linalg.svdvals(own.scale * own.b @ own.a)[:8]
        torch.testing.assert_close(values.sort(descending=True).values, expected, rtol=1e-4, atol=1e-5)
        overlap = a @ a.T
        torch.testing.assert_close(overlap, overlap.diagonal().diag(), rtol=0, atol=1e-4)
    assert any((own[0].norm(dim=1).diff() > 0).any() for own in measured.pairs.values()), "by effect, not by size"


def test_effects_are_measured_at_the_adapter_on_the_first_documents_with_enough_text(
    source, tiny_llama, split, monkeypatch
):
    tape = []
    original = stage.measure_effects
    monkeypatch.setattr(stage, "measure_effects", lambda *a, **k: tape.append((a, k)) or original(*a, **k))
    monkeypatch.setattr(stage, "EFFECT_TOKENS", 60)
    adapter_directions(source, tiny_llama, split.train, seed=11)
    ((model, exact, directions, documents), kwargs), *_ = tape
    # 23 + 26 + 28 completion tokens
    assert documents == split.train[:3]
    assert model is tiny_llama
    assert kwargs == {"seed": 11}
    for name, own in source.modules.items():
        assert torch.equal(exact[name][0], own.a)
        torch.testing.assert_close(exact[name][1], own.scale * own.b.T)
        torch.testing.assert_close(directions[name][1].T @ directions[name][0], own.scale * own.b @ own.a)


class Parabola:
    """Stands in for `measure`: KL of a candidate is least at its rung's own scale."""

    def __init__(self, ladder, best):
        self.ladder, self.best, self.calls = ladder, best, []

    def __call__(self, model, exact, candidates, documents, *, name):
        self.calls.append((model, exact, candidates, documents))
        module = next(iter(self.ladder.modules))
        found = []
        for own in candidates:
            rung = next(j for j, r in enumerate(self.ladder.rungs) if own.name.startswith(f"{r} "))
            a, b = own.pairs()[module]
            plain = self.ladder.update(module, rung)
            assert torch.equal(a, plain[0])
            scale = float(b.abs().sum() / plain[1].abs().sum())
            found.append(Quality(own.name, 0.0, 1 + (scale - self.best[rung]) ** 2, None, 1.0))
        return found


def test_every_rung_below_a_half_gets_the_scale_of_its_own_least_kl(source, measured, tiny_llama, split, monkeypatch):
    ladder = mixed_ladder(source, measured, RUNGS)
    best = (0.97, 1.0, 1.05, 1.11)
    parabola = Parabola(ladder, best)
    monkeypatch.setattr(stage, "measure", parabola)
    monkeypatch.setattr(stage, "SCALE_TOKENS", 30)
    found = calibrated(ladder, tiny_llama, split.train)
    assert found.scales == pytest.approx((*best, 1.0, 1.0), abs=1e-4)
    assert found.scales[4:] == (1.0, 1.0), "the half and the exact one are left alone"
    ((model, exact, candidates, documents),) = parabola.calls
    assert (model, documents) == (tiny_llama, split.train[:2])
    assert len(candidates) == 4 * 3
    for name, own in source.modules.items():
        assert torch.equal(exact[name][0], own.a)


def test_a_scale_is_relative_to_the_one_that_the_rung_has(source, measured, tiny_llama, split, monkeypatch):
    ladder = replace(mixed_ladder(source, measured, [1, 2]), scales=(1.1, 1.2, 1.0))
    monkeypatch.setattr(stage, "measure", Parabola(ladder, (1.05, 1.05)))
    assert calibrated(ladder, tiny_llama, split.train).scales == pytest.approx((1.155, 1.26, 1.0), abs=1e-4)


def test_scales_of_a_real_ladder_are_within_their_limits(mixed):
    assert all(stage.LEAST_SCALE <= scale <= stage.MOST_SCALE for scale in mixed.scales[:4])
    assert any(scale != 1 for scale in mixed.scales[:4])
    assert mixed.scales[4:] == (1.0, 1.0)


@pytest.mark.parametrize(
    ("kl", "scale"),
    [
        (lambda x: (x - 1.05) ** 2, 1.05),
        (lambda x: (x - 1.0) ** 2 + 3, 1.0),
        (lambda x: (x - 0.5) ** 2, 0.94),
        (lambda x: (x - 2.0) ** 2, 1.18),
        # no lowest point: the best of the three
        (lambda x: -((x - 1.05) ** 2), 1.12),
        (lambda x: -((x - 1.07) ** 2), 1.0),
        (lambda x: 0 * x, 1.0),
    ],
    ids=["inside", "at an end", "below", "above", "hill", "other hill", "flat"],
)
def test_lowest_is_the_vertex_within_its_limits(kl, scale):
    found = lowest(kl(torch.tensor(stage.SCALES, dtype=torch.float64)))
    assert found == pytest.approx(scale, abs=1e-6)


def test_pairs_of_a_rung_carry_its_scale_and_one_more(mixed):
    name = next(iter(mixed.modules))
    a, b = mixed.update(name, 1)
    found = pairs_of(mixed, 1, 1.5)()[name]
    assert torch.equal(found[0], a)
    torch.testing.assert_close(found[1], 1.5 * b)
    plain = mixed.banks[0][name].read(0, 1, int(mixed.bits()[1, 0, 0]))
    torch.testing.assert_close(b[:1], mixed.scales[1] * plain[1])


@pytest.mark.parametrize(
    ("rungs", "says"),
    [
        ([1, 5], "rungs: expected at most half of the adapter"),
        ([9], "rungs: expected ranks up to the adapter's 8, got 9"),
        ([-1], r"rungs\[0\]: expected a rank in \[0, 65536\], got -1"),
    ],
)
def test_rungs_that_there_cannot_be_are_refused(rungs, says, source, measured):
    with pytest.raises(ValueError, match=says):
        mixed_ladder(source, measured, rungs)


def test_ranked_has_rungs_above_a_half_and_a_rung_of_nothing(source, measured, tiny_llama, split):
    found = calibrated(ranked_ladder(source, measured, [0, 2.5, 6]), tiny_llama, split.train)
    assert found.rungs == (0, 2.5, 6, 8)
    assert bool((found.edges == found.edges[..., :1]).all())
    assert int(found.edges[0].sum()) == 0
    assert found.scales[0] == found.scales[2] == 1
    assert found.rung_bytes()[2] <= 0.75 * found.rung_bytes()[-1]


def test_modules_of_other_ranks_keep_their_own(make_peft_adapter, tiny_llama_factory, split, tmp_path):
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}}
    source = load_adapter(make_peft_adapter(tiny_llama_factory, tmp_path / "adapter", **patterns))
    found = build("mixed", source, tiny_llama_factory(), split.train, [1, 4])
    for m, own in enumerate(source.modules.values()):
        assert found.edges[-1, m].tolist() == [own.rank] * 4
        assert found.edges[1, m].tolist() == [0] + [own.rank] * 3

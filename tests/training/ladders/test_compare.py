"""A ladder beside the others: the same documents for everybody, and a mixed rung of no more bytes for each."""

import json

import pytest
import torch

from runtime.ladder import build_ladder
from training.ladders import compare as stage
from training.ladders.build import pairs_of, ranked_ladder
from training.ladders.compare import compare, rung_candidates, write_comparison
from training.ladders.quality import Candidate, measure


@pytest.fixture(scope="module")
def taped(mixed, source, measured, tiny_llama_factory, split):
    """A comparison with PEFT, and what `measure` was given for it."""
    import peft

    tape = []
    with pytest.MonkeyPatch.context() as patch:

        def measuring(model, exact, candidates, documents, *, name):
            tape.append((exact, candidates, documents))
            return measure(model, exact, candidates, documents, name=name)

        patch.setattr(stage, "measure", measuring)
        found = compare(mixed, source, measured, tiny_llama_factory(), split.test, peft)
    return found, tape


def test_everything_is_measured_once_on_the_documents_given(taped, split, exact):
    _, ((own, candidates, documents),) = taped
    assert documents == split.test
    assert all(map(torch.equal, own[name], exact[name]) for name in exact)
    names = [candidate.name for candidate in candidates]
    assert len(set(names)) == len(names)


def test_every_baseline_is_held_against_a_mixed_rung_of_its_bytes(taped, source):
    found, _ = taped
    names = [own.baseline.name for own in found.against]
    assert [name for name in names if name.startswith("int")] == ["int8", "int4", "int3"]
    assert sum(name.startswith("loraquant") for name in names) == 3
    assert names[-1] == "convert_to_lora 2"
    whole = sum(2 * 8 * (own.a.shape[1] + own.b.shape[0]) for own in source.modules.values())
    for own in found.against:
        assert own.mixed.name == f"mixed at {own.baseline.name}"
        assert own.mixed.bytes <= own.baseline.bytes
        if own.baseline.bytes < whole / 2:
            # a direction of 64 + 160 values at 8 bits, and its scales
            assert own.mixed.bytes > own.baseline.bytes - 228
        assert own.baseline.kl > 0


def test_names_and_bytes_belong_to_what_was_measured(taped, mixed, source, tiny_llama, split, exact):
    found, _ = taped
    svd = build_ladder(source)
    for kind, ladder in (("mixed", mixed), ("svd", svd)):
        own = found.ladders[kind]
        assert [quality.name for quality in own] == [f"{kind} {rung:g}" for rung in ladder.rungs[:-1]]
        assert [quality.bytes for quality in own] == ladder.rung_bytes().tolist()[:-1]
        candidates = [Candidate("", pairs_of(ladder, j)) for j in range(len(ladder.rungs) - 1)]
        expected = measure(tiny_llama, exact, candidates, split.test)
        assert [quality.kl for quality in own] == [quality.kl for quality in expected]
    assert set(found.ladders) == {"svd", "mixed"}
    truncated = next(own for own in found.ladders["svd"] if own.name == "svd 2")
    conversion = found.against[-1].baseline
    assert (conversion.bytes, conversion.kl) == (truncated.bytes, pytest.approx(truncated.kl, rel=1e-3))
    eight = found.against[0].baseline
    assert eight.kl < 1e-2 < found.against[-1].baseline.kl


def test_candidates_of_a_ladder_are_its_rungs_scale_included(mixed):
    candidates = rung_candidates(mixed)
    assert [own.name for own in candidates] == ["mixed 0.5", "mixed 0.75", "mixed 1", "mixed 2", "mixed 4", "mixed 8"]
    assert [own.bytes for own in candidates] == mixed.rung_bytes().tolist()
    for j, own in enumerate(candidates):
        for name, pair in own.pairs().items():
            assert all(map(torch.equal, pair, mixed.update(name, j)))
    assert [own.name for own in rung_candidates(mixed, [3])] == ["mixed 2"]


@pytest.fixture
def quick(monkeypatch):
    """One baseline alone: the others are tested above."""
    monkeypatch.setattr(stage, "INTEGERS", (4,))
    monkeypatch.setattr(stage, "LORAQUANT", ())


def test_without_peft_its_conversion_is_left_out(quick, mixed, source, measured, tiny_llama, split):
    found = compare(mixed, source, measured, tiny_llama, split.test[:2])
    assert [own.baseline.name for own in found.against] == ["int4"]


def test_a_ladder_of_another_kind_has_the_mixed_one_beside_it(quick, source, measured, tiny_llama, split):
    """At its own rungs, but those that a mixed ladder cannot have."""
    ranked = ranked_ladder(source, measured, [1, 6])
    found = compare(ranked, source, measured, tiny_llama, split.test[:2])
    assert {kind: [own.name for own in rungs] for kind, rungs in found.ladders.items()} == {
        "svd": ["svd 1", "svd 2", "svd 3", "svd 4"],
        "ranked": ["ranked 1", "ranked 6"],
        "mixed": ["mixed 1"],
    }


def test_without_effects_nothing_is_held_against_a_rung(quick, source, tiny_llama, split):
    found = compare(build_ladder(source, [2]), source, None, tiny_llama, split.test[:2])
    assert (list(found.ladders), found.against) == (["svd"], [])
    assert [own.name for own in found.ladders["svd"]] == ["svd 2"], "its own rungs"


def test_a_table_and_a_picture_are_written(taped, tmp_path):
    found, _ = taped
    write_comparison(found, "made", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "ladder.png"]
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")

    def none(name):
        raise AssertionError(f"{name} is no JSON")

    record = json.loads((tmp_path / "compare.json").read_text(), parse_constant=none)
    assert {kind: [own["kl"] for own in rungs] for kind, rungs in record["ladders"].items()} == {
        kind: [own.kl for own in rungs] for kind, rungs in found.ladders.items()
    }
    assert [own["mixed"]["bytes"] for own in record["against"]] == [own.mixed.bytes for own in found.against]
    assert [own["baseline"]["name"] for own in record["against"]] == [own.baseline.name for own in found.against]


def test_the_picture_shows_every_ladder_and_every_baseline(taped):
    found, _ = taped
    (axes,) = stage.ladder_figure(found, "made").axes
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert lines["mixed ladder"] == [own.bytes for own in found.ladders["mixed"] if own.kl > 0]
    assert lines["svd ladder"] == [own.bytes for own in found.ladders["svd"]]
    assert {"uniform rounding", "LoRAQuant", "PEFT convert_to_lora"} <= lines.keys()
    marks = [x for line in axes.lines if line.get_linestyle() == "None" for x in line.get_xdata()]
    assert marks == [own.baseline.bytes for own in found.against]

"""What a ladder is worth: the svd ladder of the same adapter beside it, and the bytes at which the two are as good."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from policy import DEFAULT_SHARES, Settings
from runtime import build_ladder, load_adapter
from runtime.plan import static_plan
from tests.training.made_curves import DOCUMENTS, FIXED, RUNG_RANK, curve
from training.compare.curves import Curve, Point
from training.compare.scorer import HeldOut, Scorer, Scores
from training.compare.worth import (
    SvdCurve,
    compare_with_svd,
    describe,
    headline,
    measure_svd,
    svd_ladder,
    svd_ladders,
)


def svd_of(points: dict[float, float]) -> SvdCurve:
    """Fixed rungs of these ranks and KL, the last one exact."""
    tokens, found = np.full(DOCUMENTS, 10.0), []
    for number, kl in enumerate([*points.values()][:-1]):
        rungs = np.zeros((DOCUMENTS, len(points)))
        rungs[:, number] = 10.0
        own = Scores({"kl": kl * tokens, "perplexity": tokens}, tokens, rungs, rungs)
        found.append(Point(float(number), own, number))
    return SvdCurve(Curve("svd", tuple(found)), np.array([*points], dtype=float))


def test_an_svd_rung_is_looked_up_between_fixed_rungs_in_log_kl():
    """The fixed rungs lose 0.8, 0.4, 0.2, 0.1 at ranks 4, 8, 16, 24."""
    found = compare_with_svd(FIXED, RUNG_RANK, svd_of({8: 0.9, 16: 0.4, 24: 0.4 / 2**0.5, 32: 0.1, 48: 0.05, 64: 0}))
    assert [own.rank for own in found] == [8, 16, 24, 32], "rung 48 is better than every fixed one"
    assert [own.at for own in found] == pytest.approx([4, 8, 12, 24])
    assert [own.fewer for own in found] == pytest.approx([2, 2, 2, 32 / 24])
    assert [own.beyond for own in found] == [True, False, False, False]


def test_where_kl_rises_with_rank_the_first_rung_that_is_as_good_counts():
    bumpy = curve("fixed", [(4, 0.8), (8, 0.2), (16, 0.4), (24, 0.1)])
    (found,) = compare_with_svd(bumpy, RUNG_RANK, svd_of({16: 0.4, 64: 0}))
    assert (found.at, found.beyond) == (pytest.approx(6), False)


def test_nothing_is_said_of_what_loses_nothing():
    nothing = curve("fixed", [(rank, 0.0) for rank in (4, 8, 16, 24)])
    assert compare_with_svd(nothing, RUNG_RANK, svd_of({16: 0.0, 32: 1e-9, 64: 0})) == []
    assert describe([], "mixed", 64) == {"over_svd": [], "fewer_bytes": None, "worth": None}
    (found,) = compare_with_svd(nothing, RUNG_RANK, svd_of({16: 0.1, 64: 0}))
    assert (found.at, found.beyond) == (4, True)


def test_the_base_model_alone_is_no_number_of_times_fewer():
    ranks = np.array([0.0, 8.0, 16.0, 24.0, 64.0])
    found = compare_with_svd(FIXED, ranks, svd_of({8: 0.9, 16: 0.6, 64: 0}))
    assert [own.rank for own in found] == [16]
    assert found[0].at == pytest.approx(8 * np.log(0.8 / 0.6) / np.log(2))


def test_the_sentence_is_of_the_svd_rung_at_a_quarter_of_the_bytes():
    found = compare_with_svd(FIXED, RUNG_RANK, svd_of({8: 0.9, 16: 0.4, 24: 0.3, 64: 0}))
    assert headline(found, 64).sentence("mixed") == (
        "KL of svd at rank 16 (0.4) is reached by the mixed ladder at rank 8: 2 times fewer bytes"
    )
    assert headline(found, 32).sentence("ranked") == (
        "KL of svd at rank 8 (0.9) is reached by the ranked ladder at rank 4 already: at least 2 times fewer bytes"
    )
    told = describe(found, "mixed", 64)
    assert told["worth"] == headline(found, 64).sentence("mixed")
    assert told["fewer_bytes"] == pytest.approx(2)
    assert told["over_svd"][0] == {
        "rank": 8, "share": 1 / 8, "kl": pytest.approx(0.9), "reached_at": 4, "fewer_bytes": 2, "at_least": True,
    }  # fmt: skip


def test_the_svd_ladder_of_an_adapter_is_found_again_in_what_a_ladder_holds(llama_adapter, mixed_ladder):
    expected = build_ladder(load_adapter(llama_adapter))
    found = svd_ladder(mixed_ladder)
    assert (found.kind, found.rungs) == ("svd", expected.rungs) == ("svd", (1, 2, 3, 4, 8))
    assert found.fingerprint == expected.fingerprint
    for name in expected.modules:
        for rung in range(len(expected.rungs)):
            (a, b), (c, d) = (ladder.update(name, rung) for ladder in (found, expected))
            torch.testing.assert_close(b.T @ a, d.T @ c, atol=1e-5, rtol=1e-4)


def test_svd_ladders_of_several_adapters_have_the_shares_that_are_whole_ranks_of_all(
    mixed_ladder, ladder, make_peft_adapter, tiny_llama_factory, tmp_path
):
    assert svd_ladders([ladder]) == [], "it is the one in use"
    (one,) = svd_ladders([mixed_ladder])
    assert one.rungs == tuple(8 * share for share in DEFAULT_SHARES if (8 * share).is_integer()) == (1, 2, 3, 4, 8)
    wide = build_ladder(load_adapter(make_peft_adapter(tiny_llama_factory, tmp_path / "wide", r=16)))
    both = svd_ladders([replace(wide, kind="ranked"), mixed_ladder])
    assert [own.rungs for own in both] == [(2, 4, 6, 8, 16), (1, 2, 3, 4, 8)]
    thin = build_ladder(load_adapter(make_peft_adapter(tiny_llama_factory, tmp_path / "thin", r=1)), [0])
    assert svd_ladders([replace(thin, kind="mixed")]) == [], "no rank between none and all"


def test_fixed_svd_rungs_are_scored_beside_any_other_ladder(tiny_llama, ladder, mixed_ladder, make_example):
    examples = [make_example(n, p, seed=n) for n, p in ((31, 6), (18, 0))]
    assert measure_svd(HeldOut((Scorer(tiny_llama, ladder, examples),)), Settings()) is None
    found = measure_svd(HeldOut((Scorer(tiny_llama, mixed_ladder, examples),)), Settings())
    assert found.curve.name == "svd"
    assert found.rung_rank == pytest.approx([1, 2, 3, 4, 8])
    scorer = Scorer(tiny_llama, ladder, examples)
    for number, rung in ((1, 2), (3, 4)):
        scores = found.curve.points[number].scores
        (expected,) = scorer.score(static_plan(ladder, rung))
        assert scores.sums["kl"] == pytest.approx(expected.sums["kl"], rel=1e-3)
        assert scores.mean(found.rung_rank) == pytest.approx(rung)

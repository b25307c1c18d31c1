"""The ladder of a fit: built once for what was asked, taken as it is where one was saved."""

import json

import pytest

from policy import PolicyCheckpoint
from runtime import load_ladder, save_ladder
from tests.training.fitting import POLICIES, RUNGS, SHORT, summary_of
from training import fit as fit_module
from training import pipeline
from training.fit import main


class Interrupted(Exception):
    """What ends a fit behind the ladder."""


@pytest.fixture
def ladders_built(monkeypatch):
    """`ladders_built(arguments)`: what a fit that ends behind its ladders has built; saved ones lie in its folder."""
    built, original = [], pipeline.build

    def noted(*args, **kwargs):
        built.append(args)
        return original(*args, **kwargs)

    def interrupted(*_):
        raise Interrupted

    monkeypatch.setattr(pipeline, "build", noted)
    monkeypatch.setattr(fit_module, "collect_targets", interrupted)

    def run(arguments):
        built.clear()
        with pytest.raises(Interrupted):
            main(arguments)
        return list(built)

    return run


def test_a_ladder_of_another_origin_is_not_taken_for_this_ones(ladders_built, case, tmp_path):
    record, found = tmp_path / "out" / "ladder" / "ladder.json", []
    changes = (
        {}, {"seed": 1}, {"ladder": "ranked"}, {"rungs": "[0.5,2]"}, {"amounts.train_documents": 5},
        {"dtype": "bfloat16"}, {},
    )  # fmt: skip
    for change in changes:
        arguments = case.arguments(tmp_path / "out", **{**SHORT, **change})
        assert len(ladders_built(arguments)) == 1
        found.append(record.read_bytes())
        assert ladders_built(arguments) == [], "it is the same fit, gone on with"
        assert record.read_bytes() == found[-1]
    assert len(set(found)) == len(changes) - 1
    assert found[0] == found[-1], "drawn from the seed alone"


@pytest.mark.parametrize(
    ("kind", "rungs"), [("svd", (1, 2, 3, 4, 8)), ("ranked", tuple(RUNGS)), ("mixed", tuple(RUNGS))]
)
def test_the_kind_of_ladder_is_a_choice(kind, rungs, ladders_built, case, tmp_path):
    ladders_built(case.arguments(tmp_path / "out", ladder=kind, **SHORT))
    ladder = load_ladder(tmp_path / "out" / "ladder")
    assert (ladder.kind, ladder.rungs) == (kind, rungs)


def test_a_saved_ladder_is_what_it_is(case, ladders_built, tmp_path, mixed_ladder):
    """Whatever kind is asked for: its directions and its rungs, or some of them."""
    saved = save_ladder(mixed_ladder, tmp_path / "saved", extra={"note": "mine"})
    for rungs, expected in ((None, (0.5, 1, 2, 4, 8)), ("[1,4]", (1, 4, 8))):
        output = tmp_path / f"out-{rungs}"
        assert ladders_built(case.arguments(output, adapter=saved, ladder="svd", rungs=rungs, **SHORT)) == []
        ladder = load_ladder(output / "ladder")
        assert (ladder.kind, ladder.rungs) == ("mixed", expected)
        assert ladder.fingerprint == mixed_ladder.with_rungs(expected).fingerprint
    assert json.loads((saved / "ladder.json").read_text())["note"] == "mine", "it is left as it is"
    own = saved.rename(tmp_path / "ladder")
    ladders_built(case.arguments(tmp_path, adapter=own, rungs="[1,4]", **SHORT))
    assert load_ladder(own).rungs == (0.5, 1, 2, 4, 8), "also where it is the output's own"


def test_a_fit_of_an_svd_ladder_has_nothing_to_set_beside_it(case, tmp_path):
    main(case.arguments(tmp_path / "out", ladder="svd", **SHORT))
    summary = summary_of(tmp_path / "out")
    assert tuple(summary["curves"]) == POLICIES
    assert summary["ladder"].keys() == {"kind", "bytes", "lost_energy"}
    assert PolicyCheckpoint.load(tmp_path / "out" / "policy").policy.rungs == (1, 2, 3, 4, 8)

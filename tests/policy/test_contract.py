"""What a summary hands to a policy, column by column, and which columns follow from which signal."""

from __future__ import annotations

import itertools

import pytest
import torch

from policy import SIGNALS, TOKEN_SIGNALS, Summary
from policy.contract import feature_columns
from policy.settings import AGE, PAPER_SIGNALS

EVERY = (*SIGNALS, AGE)
FEATURES = [
    *("entropy mean", "entropy max", "entropy last"),
    *("attention mean", "attention max", "attention last"),
    *("surprisal mean", "surprisal max", "surprisal last"),
    *("novelty mean", "novelty max", "novelty last"),
    *("prior mean", "prior max", "prior last"),
    *("difficulty mean", "difficulty max", "difficulty last"),
    *("pair mean", "pair max", "pair last"),
    *("entropy known", "attention known", "surprisal known"),
    *("novelty known", "prior known", "difficulty known", "pair known"),
    *("novelty first", "prior first", "difficulty first", "pair first"),
    "age",
]
"""What every column holds."""
OF_THE_PAPER = [
    *("entropy mean", "entropy max", "entropy last"),
    *("attention mean", "attention max", "attention last"),
    *("novelty mean", "novelty max", "novelty last"),
    *("prior mean", "prior max", "prior last"),
    *("entropy known", "attention known", "novelty known", "prior known"),
    *("novelty first", "prior first"),
]
"""The 18 features that there were when these were all the signals."""


def named(columns: list[int]) -> list[str]:
    return [FEATURES[column] for column in columns]


def random_summary(rows: int) -> Summary:
    generator = torch.Generator().manual_seed(0)
    return Summary(
        torch.rand(rows, len(SIGNALS), 3, generator=generator) + 0.1,
        torch.rand(rows, len(SIGNALS), generator=generator) < 0.6,
        torch.rand(rows, len(TOKEN_SIGNALS), generator=generator), torch.arange(rows),
        age=torch.rand(rows, generator=generator),
    )  # fmt: skip


def test_every_column_holds_what_it_is_named() -> None:
    rows = 20
    summary = random_summary(rows)
    features = summary.features()
    assert features.shape == (rows, Summary.FEATURES) == (rows, len(FEATURES)) == (rows, 33)
    assert features.dtype == torch.float32
    for name, column in zip(FEATURES, features.unbind(1), strict=True):
        signal, _, part = name.partition(" ")
        if name == "age":
            expected = summary.age
        elif part == "first":
            expected = summary.first[:, TOKEN_SIGNALS.index(signal)]
        else:
            known = summary.valid[:, SIGNALS.index(signal)]
            values = summary.stats[:, SIGNALS.index(signal)]
            expected = known.float()
            if part != "known":
                expected = torch.where(known, values[:, ("mean", "max", "last").index(part)], 0.0)
        assert torch.equal(column, expected), name


def test_an_age_that_is_left_out_is_0() -> None:
    summary = random_summary(4)
    without = Summary(summary.stats, summary.valid, summary.first, summary.position)
    assert without.features()[:, -1].tolist() == [0] * 4
    assert torch.equal(without.features()[:, :-1], summary.features()[:, :-1])


def test_a_summary_comes_back_from_its_features() -> None:
    summary = random_summary(9)
    back = Summary.from_features(summary.features())
    assert torch.equal(back.features(), summary.features())
    assert torch.equal(back.valid, summary.valid)
    assert torch.equal(back.first, summary.first)
    assert torch.equal(back.age, summary.age)
    assert torch.equal(back.stats[back.valid], summary.stats[summary.valid])
    assert back.position.tolist() == list(range(9))


@pytest.mark.parametrize("name", EVERY)
def test_columns_of_a_signal_are_all_that_follow_from_it(name: str) -> None:
    expected = [index for index, feature in enumerate(FEATURES) if feature.partition(" ")[0] == name]
    assert feature_columns([name]) == expected
    # And nothing else moves when it does.
    summary = random_summary(50)
    before = summary.features()
    if name in SIGNALS:
        summary.stats[:, SIGNALS.index(name)] += 1
        summary.valid[:, SIGNALS.index(name)] ^= True
    if name in TOKEN_SIGNALS:
        summary.first[:, TOKEN_SIGNALS.index(name)] += 1
    if name == AGE:
        summary.age.add_(1)
    moved = (summary.features() != before).any(0).nonzero()[:, 0].tolist()
    assert moved == expected


def test_the_four_of_the_paper_are_the_features_of_old_in_their_order() -> None:
    assert named(feature_columns(PAPER_SIGNALS)) == OF_THE_PAPER


def test_columns_are_in_the_order_of_the_features_whatever_that_of_the_names() -> None:
    assert feature_columns(EVERY) == list(range(Summary.FEATURES))
    for count in range(len(EVERY) + 1):
        for names in itertools.combinations(EVERY, count):
            columns = feature_columns(names)
            assert columns == sorted(columns)
            assert columns == feature_columns(names[::-1])
            assert sorted(itertools.chain(*(feature_columns([name]) for name in names))) == columns

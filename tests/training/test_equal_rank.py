"""KL at equal bytes, bytes at equal KL, beside a reference that goes draw by draw; what their intervals cover."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from training.compare import equal_rank
from training.compare.curves import Curve, Point
from training.compare.equal_rank import LEAST_NATS, FixedLine, at_equal_rank, interval
from training.compare.scorer import Scores

RANKS = np.array([2.0, 4.0, 6.0, 8.0, 64.0])
TOKENS = np.array([10.0, 30.0, 20.0, 5.0, 25.0, 15.0, 40.0])
EVERYTHING = np.ones((1, len(TOKENS)))


def point(aim: int, kl, rank=None, tokens=TOKENS) -> Point:
    """Documents of `tokens` that lose `kl` nats a token at a mean rank of `rank`, a number or one for each."""
    rank = np.broadcast_to(RANKS[aim] if rank is None else rank, tokens.shape)
    left = np.clip(np.searchsorted(RANKS, rank, side="right") - 1, 0, len(RANKS) - 2)
    share = (rank - RANKS[left]) / (RANKS[left + 1] - RANKS[left])
    counts = np.zeros((len(tokens), len(RANKS)))
    rows = np.arange(len(tokens))
    counts[rows, left], counts[rows, left + 1] = (1 - share) * tokens, share * tokens
    sums = {"kl": np.broadcast_to(kl, tokens.shape) * tokens, "perplexity": tokens}
    return Point(0.0, Scores(sums, tokens, counts, counts), aim)


def draws(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=count).astype(float)


def wild(factor: float, seed: int, aims=range(4), off: float = 0.0) -> Curve:
    """KL about `factor` times one that halves with every two ranks, and mean ranks about the rungs', by documents."""
    generator = np.random.default_rng(seed)
    found = []
    for aim in aims:
        kl = factor * 2 ** (-RANKS[aim] / 2) * generator.gamma(4.0, 0.25, len(TOKENS))
        rank = RANKS[aim] * (1 + off * generator.uniform(-1, 1, len(TOKENS)))
        found.append(point(aim, kl, np.clip(rank, RANKS[0], None)))
    return Curve("learned", tuple(found))


def naive_line(fixed: Curve, draw: np.ndarray) -> list[tuple[float, float]]:
    """(rank, log KL) of every fixed rung on one draw, cheapest first, none above a cheaper one's."""
    found, least = [], math.inf
    for own in fixed.points:
        tokens = sum(draw * own.scores.tokens)
        least = min(least, sum(draw * own.scores.sums["kl"]) / tokens)
        found.append((float(RANKS[own.rung]), math.log(max(least, LEAST_NATS))))
    return [*found, (float(RANKS[-1]), math.log(LEAST_NATS))]


def naive_log_kl(line: list[tuple[float, float]], rank: float) -> float:
    for number in range(len(line) - 1):
        (r0, y0), (r1, y1) = line[number : number + 2]
        if rank < r1 or number == len(line) - 2:
            return y0 + (y1 - y0) * (rank - r0) / (r1 - r0)
    raise AssertionError


def naive_rank(line: list[tuple[float, float]], kl: float) -> float:
    wanted = math.log(max(kl, LEAST_NATS))
    if wanted > line[0][1]:
        (r0, y0), (r1, y1) = line[:2]
        along = r0 - (wanted - y0) * (r1 - r0) / (y0 - y1) if y1 < y0 else -math.inf
        return max(along, RANKS[0] / 2)
    for (r0, y0), (r1, y1) in itertools.pairwise(line):
        if y0 == wanted:
            return r0
        if y0 > wanted >= y1:
            return r0 + (r1 - r0) * (y0 - wanted) / (y0 - y1)
    raise AssertionError


def naive_point(own: Point, line: list[tuple[float, float]], draw: np.ndarray) -> tuple[float, float]:
    """KL at the rung's own bytes and share of bytes saved, on one draw."""
    tokens = sum(draw * own.scores.tokens)
    rank = sum(draw[d] * own.scores.rungs[d] @ RANKS for d in range(len(draw))) / tokens
    kl = sum(draw * own.scores.sums["kl"]) / tokens
    moved = math.exp(naive_log_kl(line, float(RANKS[own.rung])) - naive_log_kl(line, rank))
    return kl * moved, 1 - rank / naive_rank(line, kl)


def test_the_line_is_exact_where_kl_falls_exponentially():
    """Between the measured rungs and below the cheapest, on any draw: all documents fall alike."""
    size = np.random.default_rng(0).gamma(2.0, 0.5, len(TOKENS))
    fixed = Curve("fixed", tuple(point(aim, 3.0 * size * np.exp(-0.4 * RANKS[aim])) for aim in range(4)))
    drawn = draws(50, len(TOKENS))
    line = FixedLine.of(fixed, RANKS, drawn)
    mean = (drawn @ (size * TOKENS)) / (drawn @ TOKENS)
    for rank in (1.0, 1.5, 2.0, 3.1, 4.0, 5.9, 6.0, 7.7, 8.0):
        expected = np.log(3.0 * mean) - 0.4 * rank
        assert line.log_kl_at(np.full(50, rank)) == pytest.approx(expected, abs=1e-12)
        assert line.rank_at(np.exp(expected)) == pytest.approx(np.full(50, rank), abs=1e-9)


def test_the_line_never_rises_and_has_the_exact_top():
    """A rung that loses more than a cheaper one counts as that; of equal ones the cheaper is what a KL needs."""
    fixed = Curve("fixed", tuple(point(aim, kl) for aim, kl in enumerate([0.4, 0.1, 0.3, 0.05])))
    line = FixedLine.of(fixed, RANKS, EVERYTHING)
    assert np.exp(line.log_kl[0]) == pytest.approx([0.4, 0.1, 0.1, 0.05, LEAST_NATS])
    assert np.exp(line.log_kl_at(np.array([4.0, 5.0, 6.0, 64.0]))) == pytest.approx([0.1, 0.1, 0.1, LEAST_NATS])
    assert [line.rank_at(np.array([kl]))[0] for kl in (0.1, 0.2, 0.05, 0.0)] == pytest.approx([4, 3, 8, 64])
    read = at_equal_rank({"fixed": fixed, "learned": fixed}, RANKS, resamples=5, seed=0)
    assert read.saved["learned"] == pytest.approx([0, 0, 1 - 6 / (2 + 2 * math.log(4 / 3) / math.log(4)), 0])


@pytest.mark.parametrize("kl", [[0.4, 0.2, 0.1, 0.05], [0.4, 0.4, 0.1, 0.05]], ids=["falling", "flat"])
def test_what_is_far_worse_than_every_rung_saves_no_bytes(kl):
    """The line does not go on to nothing, or below: half of the cheapest rung's bytes is where it ends."""
    fixed = Curve("fixed", tuple(point(aim, own) for aim, own in enumerate(kl)))
    bad = Curve("learned", (point(0, 30.0), point(1, 0.41)))
    read = at_equal_rank({"fixed": fixed, "learned": bad}, RANKS, resamples=5, seed=0)
    assert read.saved["learned"][0] == pytest.approx(-1)
    needed = 2 - 2 * math.log(0.41 / 0.4) / math.log(2) if kl[1] < kl[0] else 1
    assert read.saved["learned"][1] == pytest.approx(1 - 4 / needed)
    assert read.saved["fixed"] == pytest.approx([0, 0 if kl[1] < kl[0] else 1 - 4 / 2, 0, 0])


def test_every_draw_is_read_as_a_reference_reads_it(monkeypatch):
    """Several policies, one of three seeds and one that misses a rung; documents and seeds drawn side by side."""
    seeds = [wild(0.9, 10 + seed, off=0.01) for seed in range(3)]
    curves = {
        "fixed": wild(1.0, 0),
        "learned": replace(seeds[0], others=tuple(seeds[1:])),
        "percentile": wild(1.1, 20, aims=(1, 3), off=0.02),
        "oracle": wild(0.5, 30, off=0.05),
    }
    prepared = {size: draws(40, size, seed=size) for size in (1, 3, len(TOKENS))}
    monkeypatch.setattr(equal_rank, "_draws", lambda generator, count, size: prepared[size][:count])
    read = at_equal_rank(curves, RANKS, resamples=40, seed=0)
    documents = np.concatenate([EVERYTHING, prepared[len(TOKENS)]])
    for name, curve in curves.items():
        members = (curve, *curve.others)
        weights = np.concatenate([np.ones((1, len(members))), prepared[len(members)]])
        for r, draw in enumerate(documents):
            line = naive_line(curves["fixed"], draw)
            kl, saved = np.full(4, np.nan), np.full(4, np.nan)
            for number, own in enumerate(curve.points):
                found = [naive_point(member.points[number], line, draw) for member in members]
                pairs = list(zip(weights[r], found, strict=True))
                kl[own.rung], saved[own.rung] = (
                    sum(weight * pair[which] for weight, pair in pairs) / len(members) for which in (0, 1)
                )
            for got, expected in ((read.kl, kl), (read.saved, saved)) if r == 0 else ():
                assert got[name] == pytest.approx(expected, rel=1e-9, nan_ok=True)
            for got, expected in ((read.drawn, kl), (read.saved_drawn, saved)) if r else ():
                assert got[name][r - 1] == pytest.approx(expected, rel=1e-9, nan_ok=True)
    assert [np.isnan(own).tolist() for own in (read.kl["percentile"], read.saved["percentile"])] == [
        [True, False, True, False]
    ] * 2


def test_a_policy_that_loses_as_much_at_five_per_cent_fewer_bytes_saves_five_per_cent():
    """On every draw, and whatever it was aimed at; its KL at the rung's own bytes is lower by what these buy."""
    size = np.random.default_rng(1).gamma(2.0, 0.5, len(TOKENS))
    fixed = Curve("fixed", tuple(point(aim, size * np.exp(-0.3 * RANKS[aim])) for aim in range(4)))
    cheaper = Curve(
        "learned", tuple(point(aim, size * np.exp(-0.3 * RANKS[aim]), 0.95 * RANKS[aim]) for aim in range(1, 4))
    )
    read = at_equal_rank({"fixed": fixed, "learned": cheaper}, RANKS, resamples=60, seed=0)
    assert read.saved["learned"][1:] == pytest.approx(np.full(3, 0.05))
    assert read.saved_drawn["learned"][:, 1:] == pytest.approx(np.full((60, 3), 0.05))
    mean = (size * TOKENS).sum() / TOKENS.sum()
    assert read.kl["learned"][1:] == pytest.approx(mean * np.exp(-0.3 * 1.05 * RANKS[1:4]))
    assert read.saved["fixed"] == pytest.approx(np.zeros(4))


def test_a_point_a_little_off_its_rung_is_moved_along_the_fixed_rungs():
    """Neither the bytes that it spent more nor those that it spent less are its gain."""
    fixed = Curve("fixed", tuple(point(aim, np.exp(-0.3 * RANKS[aim])) for aim in range(4)))
    for off in (0.99, 1.0, 1.01):
        own = Curve("learned", tuple(point(aim, np.exp(-0.3 * off * RANKS[aim]), off * RANKS[aim]) for aim in (1, 2)))
        read = at_equal_rank({"fixed": fixed, "learned": own}, RANKS, resamples=5, seed=0)
        assert read.kl["learned"][1:3] == pytest.approx(read.kl["fixed"][1:3])
        assert read.saved["learned"][1:3] == pytest.approx([0, 0], abs=1e-12)


def spread_of(fixed: Curve, curve: Curve, resamples: int = 4000) -> np.ndarray:
    read = at_equal_rank({"fixed": fixed, "learned": curve}, RANKS, resamples=resamples, seed=0)
    return read.drawn["learned"][:, 1]


def test_an_interval_is_the_middle_of_the_draws():
    assert interval(np.random.default_rng(0).permutation(np.arange(1001.0))) == (25, 975)


ONE, MANY = np.array([100.0]), np.full(12, 100.0)


def test_with_one_document_the_interval_is_as_wide_as_the_seeds():
    levels = np.array([0.20, 0.22, 0.27, 0.31])
    fixed = Curve("fixed", tuple(point(aim, kl, tokens=ONE) for aim, kl in enumerate([0.6, 0.3, 0.2, 0.1])))
    seeds = [Curve("learned", (point(1, kl, tokens=ONE),)) for kl in levels]
    drawn = spread_of(fixed, replace(seeds[0], others=tuple(seeds[1:])))
    expected = np.random.default_rng(5).choice(levels, (4000, 4)).mean(1)
    assert interval(drawn) == pytest.approx(interval(expected), abs=0.003)
    assert drawn.std() == pytest.approx(levels.std() / 2, rel=0.05)
    assert spread_of(fixed, seeds[0]).std() < 1e-12, "nothing is left to chance of one document and one seed"


def test_with_one_seed_the_interval_is_as_wide_as_the_documents():
    levels = np.random.default_rng(3).gamma(4.0, 0.05, 12)
    fixed = Curve("fixed", tuple(point(aim, kl, tokens=MANY) for aim, kl in enumerate([0.6, 0.3, 0.2, 0.1])))
    own = Curve("learned", (point(1, levels, tokens=MANY),))
    expected = np.random.default_rng(5).choice(levels, (4000, 12)).mean(1)
    for curve in (own, replace(own, others=(own, own))):
        drawn = spread_of(fixed, curve)
        assert interval(drawn) == pytest.approx(interval(expected), abs=0.003), "seeds that agree add nothing"
        assert drawn.std() == pytest.approx(levels.std() / math.sqrt(12), rel=0.05)


def test_the_interval_covers_documents_and_seeds_together():
    levels = np.random.default_rng(3).gamma(4.0, 0.05, 12)
    factors = np.array([0.7, 0.9, 1.1, 1.3])
    fixed = Curve("fixed", tuple(point(aim, kl, tokens=MANY) for aim, kl in enumerate([0.6, 0.3, 0.2, 0.1])))
    seeds = [Curve("learned", (point(1, factor * levels, tokens=MANY),)) for factor in factors]
    drawn = spread_of(fixed, replace(seeds[0], others=tuple(seeds[1:])))
    by_documents, by_seeds = levels.var() / 12, levels.mean() ** 2 * factors.var() / 4
    assert drawn.var() == pytest.approx(by_documents + by_seeds + by_documents * factors.var() / 4, rel=0.08)
    assert min(by_documents, by_seeds) > 0.3 * max(by_documents, by_seeds), "otherwise one of them does not show"


def test_a_rung_that_one_seed_misses_is_read_for_none():
    """A mean over seeds is of all of them."""
    fixed = Curve("fixed", tuple(point(aim, kl) for aim, kl in enumerate([0.6, 0.3, 0.2, 0.1])))
    whole = Curve("learned", (point(1, 0.25), point(2, 0.15)))
    read = at_equal_rank(
        {"fixed": fixed, "learned": replace(whole, others=(replace(whole, points=whole.points[1:]),))},
        RANKS, resamples=5, seed=0,
    )  # fmt: skip
    assert np.isnan(read.kl["learned"]).tolist() == [True, True, False, True]

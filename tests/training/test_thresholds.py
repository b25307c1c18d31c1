"""The strongest thresholds are found by table: the planted signal, sign and spread, at no more bytes than allowed."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from policy import SIGNALS, PercentilePolicy, Summary
from policy.percentile import CHUNK, COMPLEXITY, TOKEN
from policy.settings import TOKEN_SIGNALS
from training.compare.hindsight import oracle_rungs, table_oracle
from training.compare.thresholds import SPREADS, Seen, best_thresholds, candidates

RUNGS = (2, 4, 6, 8, 12, 16, 24, 32, 64)
COST = torch.tensor(RUNGS, dtype=torch.float32) / RUNGS[-1]
MIDDLE = 3
SCALES = torch.tensor([0.9, 0.95, 0.97, 0.98, 1.0, 1.0, 1.0, 1.0, 1.0])
WEIGHTS = {"entropy": 0.7, "novelty": 0.3}
BASE = PercentilePolicy(RUNGS, COMPLEXITY, scales=SCALES, weights=WEIGHTS)


def chunks(count: int, seed: int, unknown=()) -> torch.Tensor:
    """[N, F] features of chunks whose signals have nothing to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    stats = torch.rand(count, len(SIGNALS), 3, generator=generator)
    valid = torch.rand(count, len(SIGNALS), generator=generator) > 0.1
    for name in unknown:
        valid[:, SIGNALS.index(name)] = False
    first = torch.rand(count, len(TOKEN_SIGNALS), generator=generator)
    return Summary(stats, valid, first, torch.arange(count)).features()


TRAIN, HELD_OUT = chunks(1500, 0), chunks(500, 1)
KEYS = [
    (signal, of)
    for signal in (*SIGNALS, COMPLEXITY)
    for of in ((CHUNK, TOKEN) if signal in TOKEN_SIGNALS else (CHUNK,))
]


@pytest.fixture(scope="module")
def among() -> list[PercentilePolicy]:
    return candidates(TRAIN, BASE)


def described(policy: PercentilePolicy) -> tuple[str, str, float, int]:
    return policy.signal, policy.of, policy.spread, policy.sign


def test_every_signal_spread_and_sign_is_a_candidate(among):
    expected = [(*key, spread, sign) for key in KEYS for spread in (0.25, 0.5, 1.0, 2.0) for sign in (1, -1)]
    assert [described(policy) for policy in among] == expected
    summary = Summary.from_features(TRAIN)
    for policy in among:
        assert torch.equal(policy.scales, SCALES)
        assert {name: weight for name, weight in policy.config()["weights"].items() if weight} == WEIGHTS
        value, known = policy.value(summary)
        assert known.all() if policy.of == TOKEN else not known.all()
        quantiles = np.quantile(value[known].double().numpy(), np.linspace(0, 1, len(policy.grid)))
        assert policy.grid.numpy() == pytest.approx(quantiles, abs=1e-6), "of train documents, where it is known"


def test_a_signal_that_is_never_known_is_no_candidate():
    found = candidates(chunks(200, 2, unknown=("attention", "prior")), BASE)
    assert len(found) == (len(KEYS) - 2) * len(SPREADS) * 2
    left = {(policy.signal, policy.of) for policy in found}
    assert {*KEYS} - left == {("attention", CHUNK), ("prior", CHUNK)}, "a token's own value needs no closed chunk"


def planted(own: PercentilePolicy) -> Seen:
    """Held-out chunks, each of which loses a nat for every rung that it is away from where the planted thresholds put
    it; the noise is what no signal tells."""
    swing = own.swing(*own.value(Summary.from_features(HELD_OUT)))
    wanted = own.rung_of(torch.tensor(float(MIDDLE)), swing)
    generator = torch.Generator().manual_seed(7)
    scored = torch.randint(1, 9, (len(HELD_OUT),), generator=generator).float()
    damage = (torch.arange(len(RUNGS)) - wanted[:, None]).abs().float()
    return Seen(HELD_OUT, damage + 0.3 * torch.rand(damage.shape, generator=generator), scored)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("spread", SPREADS[2:])
@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_the_planted_signal_sign_and_spread_win(among, key, spread, sign):
    """A band of half a rung or less has a rung's bytes only where it stays at it: nothing is planted with one."""
    (own,) = [policy for policy in among if described(policy) == (*key, spread, sign)]
    assert best_thresholds(among, planted(own), COST, MIDDLE) is own


@dataclass(frozen=True)
class Watched(Seen):
    """Notes what every candidate that is judged spends, and loses."""

    judged: list[tuple[float, float]] = field(default_factory=list)

    def kl(self, rung):
        found = super().kl(rung)
        self.judged.append((float((COST.double()[rung] * self.scored).sum() / self.scored.sum()), found))
        return found


@pytest.mark.parametrize("rung", range(len(RUNGS) - 1))
def test_no_candidate_spends_more_than_the_rung_and_none_much_less(among, rung):
    """Every byte is worth having here, so whoever may spend more would win by that."""
    damage = (1 - COST).expand(len(HELD_OUT), -1).clone()
    scored = torch.randint(1, 9, (len(HELD_OUT),), generator=torch.Generator().manual_seed(3)).float()
    seen = Watched(HELD_OUT, damage, scored)
    best_thresholds(among, seen, COST, rung)
    assert len(seen.judged) == len(among)
    spent = np.array([cost for cost, _ in seen.judged])
    assert spent.max() <= float(COST[rung]) * (1 + 1e-5)
    for policy, cost in zip(among, spent, strict=True):
        # A narrow band moves all chunks at once, and those of unknown value always move together.
        if policy.spread >= 1 and policy.of == TOKEN and policy.signal != "prior" and rung > 0:
            assert cost > 0.97 * float(COST[rung]), described(policy)
    for cost, kl in seen.judged:
        assert kl == pytest.approx(1 - cost, abs=1e-5)


def test_where_no_signal_tells_anything_the_band_stays_at_the_rung(among):
    damage = (torch.arange(len(RUNGS)) - MIDDLE).abs().float().expand(len(HELD_OUT), -1)
    seen = Watched(HELD_OUT, damage, torch.ones(len(HELD_OUT)))
    best = best_thresholds(among, seen, COST, MIDDLE)
    assert best.spread <= 0.5
    assert min(kl for _, kl in seen.judged) == 0


def test_of_equal_candidates_the_first_is_taken(among):
    flat = Seen(HELD_OUT, torch.zeros(len(HELD_OUT), len(RUNGS)), torch.ones(len(HELD_OUT)))
    assert best_thresholds(among, flat, COST, MIDDLE) is among[0]
    assert best_thresholds(among[5:], flat, COST, MIDDLE) is among[5]


def test_the_mean_of_chunks_is_over_scored_tokens():
    seen = Seen(HELD_OUT[:2], torch.tensor([[4.0, 1.0], [8.0, 2.0]]), torch.tensor([3.0, 1.0]))
    assert seen.kl(torch.tensor([0, 1])) == pytest.approx((3 * 4 + 2) / 4)
    assert seen.cost(torch.tensor([0, 1]), torch.tensor([0.25, 1.0])) == pytest.approx((3 * 0.25 + 1) / 4)


RANKS = torch.tensor([1.0, 2.0, 4.0, 8.0])


def best_mixtures(parts: list[torch.Tensor]) -> list[tuple[float, float]]:
    """(mean rank, KL) of the assignments of rungs to parts [t, J] that are best at some price of rank, cheapest first:
    the lower hull of all assignments there are."""
    tokens = sum(len(part) for part in parts)
    found = sorted(
        (
            sum(len(part) * float(RANKS[rung]) for part, rung in zip(parts, rungs, strict=True)) / tokens,
            sum(float(part[:, rung].double().sum()) for part, rung in zip(parts, rungs, strict=True)) / tokens,
        )
        for rungs in itertools.product(range(len(RANKS)), repeat=len(parts))
    )
    hull: list[tuple[float, float]] = []
    for rank, kl in found:
        if hull and (kl >= hull[-1][1] or rank == hull[-1][0]):
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (rank - x1) < (kl - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((rank, kl))
    return hull


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_the_table_oracle_is_the_best_of_all_assignments(tokens, seed):
    """Of documents whose last choice is for fewer tokens; a choice never spans two documents."""
    generator = torch.Generator().manual_seed(seed)
    lengths = {1: (4, 2), 2: (7, 3), 3: (8, 7)}[tokens]
    tables = []
    for length in lengths:
        damage = torch.rand(length, len(RANKS), generator=generator).sort(1, descending=True).values
        damage[:, -1] = 0
        tables.append(damage)
    parts = [table[at : at + tokens] for table in tables for at in range(0, len(table), tokens)]
    hull = best_mixtures(parts)
    aims = [1.0, 1.73, 2.53, 4.0, 5.53, 8.0]
    found = table_oracle(tables, RANKS, aims, tokens)
    for aim, kl in zip(aims, found, strict=True):
        expected = [own for rank, own in hull if rank <= aim + 1e-6]
        assert kl == pytest.approx(expected[-1], abs=1e-5)
    assert len({round(kl, 6) for kl in found}) > 3, "otherwise this says nothing"


def test_finer_choices_lose_less_and_all_of_one_loses_what_a_rung_does():
    generator = torch.Generator().manual_seed(0)
    lengths, aims = [64, 48, 16, 80] * 8, [2.0, 4.0]
    tables = [torch.rand(n, len(RANKS), generator=generator).sort(1, descending=True).values for n in lengths]
    by_size = {tokens: table_oracle(tables, RANKS, aims, tokens) for tokens in (1, 4, 16)}
    for finer, coarser in itertools.pairwise(by_size.values()):
        assert all(one < other for one, other in zip(finer, coarser, strict=True))
    one = [torch.stack([tables[0].mean(0)] * 64)]
    assert table_oracle(one, RANKS, aims, 1) == pytest.approx([float(tables[0][:, rung].mean()) for rung in (1, 2)])


def test_the_oracle_meets_its_mean_rank_with_the_least_damage():
    generator = torch.Generator().manual_seed(0)
    damage = torch.rand(6, 4, generator=generator).sort(dim=1, descending=True).values
    damage[:, -1] = 0
    ranks, tokens = torch.tensor([2.0, 4.0, 8.0, 16.0]), torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    rungs = oracle_rungs(damage, tokens, ranks, 8.0)
    mean = float((ranks[rungs] * tokens).sum() / tokens.sum())
    assert mean <= 8.0
    mine = float((damage.gather(1, rungs[:, None])[:, 0] * tokens).sum())
    choices = torch.cartesian_prod(*[torch.arange(4)] * 6)
    means = (ranks[choices] * tokens).sum(1) / tokens.sum()
    totals = (damage[torch.arange(6), choices] * tokens).sum(1)
    # No assignment of at most the mean rank it ended at does better.
    assert mine <= float(totals[means <= mean + 1e-6].min()) + 1e-5

"""Whose tables of difficulty a token is looked up in: its adapter's own, or else the policy's, or else none."""

from dataclasses import replace

import pytest
import torch

from policy import FULL_KV, ChunkSettings, LearnedPolicy, Operating, PercentilePolicy, Settings
from policy.difficulty import PAIRS, Difficulty
from runtime import adaptive, build_ladder, load_adapter, save_ladder
from runtime.control.bucket import Offer
from runtime.control.record import Keep
from runtime.control.stream import Stream
from runtime.plan import RunPlan
from runtime.reference.adaptive import activate
from tests.runtime.reference import drawn_tables, naive_difficulty, row_of

OWN, OTHER, POLICYS = drawn_tables(1), drawn_tables(2, 100, PAIRS // 2), drawn_tables(3, 150)
"""What two adapters know of tokens, the second one of some alone, and what a policy knows."""
AVERAGE = Difficulty.neutral()
ADAPTERS = (0, 1, 2, 1, 0)
TABLES = [(OWN, OTHER, POLICYS)[number] for number in ADAPTERS]


@pytest.fixture(scope="module")
def ladder(llama_adapter):
    return build_ladder(load_adapter(llama_adapter), (2, 4, 6, 8))


@pytest.fixture(scope="module")
def ladders(ladder):
    """Of three adapters, the last of which knows nothing of tokens."""
    return replace(ladder, difficulty=OWN), replace(ladder, difficulty=OTHER), ladder


@pytest.fixture(scope="module")
def batch():
    """Ids and mask of five rows of 30, 11, 24, 1 and 17 tokens, padded on the left."""
    lengths = torch.tensor([30, 11, 24, 1, 17])
    ids = torch.randint(3, 256, (5, 30), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(30) >= 30 - lengths[:, None]).long()
    return ids * mask, mask


class ByDifficulty(PercentilePolicy):
    """Harder tokens get the higher rungs; it carries tables of its own."""

    def __init__(self, rungs):
        super().__init__(rungs, "difficulty", spread=2.0, of="token")

    def difficulty(self):
        return POLICYS


def plan_of(ladders, policy, adapters=(0,)):
    settings = Settings(block_tokens=4, chunk=ChunkSettings(1, 3), kv=FULL_KV)
    return RunPlan(tuple(ladders), policy, settings, Operating.at(1.6, 3, adapter=torch.tensor(adapters)))


def assert_seen(record, rows, tables):
    """That every token of the rows' ids was looked up in the row's tables."""
    for row, (tokens, own) in enumerate(zip(rows, tables, strict=True)):
        expected = naive_difficulty(tokens.tolist(), own.token.tolist(), own.pair.tolist())
        torch.testing.assert_close(row_of(record, row)["first"][:, 2:], torch.tensor(expected), atol=1e-6, rtol=0)


def rows_of(batch):
    return [row[own.bool()] for row, own in zip(*batch, strict=True)]


def test_tables_that_nobody_gave_are_made_on_the_device(monkeypatch):
    """What is brought there from the host is waited for."""
    meta, brought, to = torch.device("meta"), [], Difficulty.to
    monkeypatch.setattr(Difficulty, "to", lambda own, device: brought.append(own.token.device) or to(own, device))
    offer = Offer.of(torch.tensor([[0.5, 1.0]], dtype=torch.float64))
    Stream(Settings(), LearnedPolicy((2, 4)).to(meta), Operating.at(0.0, 0), offer, meta)
    assert brought == [meta]


def test_an_adapters_own_tables_come_before_those_of_the_policy(ladders):
    policy = LearnedPolicy(ladders[0].rungs, vocabulary=150)
    policy.set_difficulty(POLICYS)
    for ladder, expected in zip(ladders, (OWN, OTHER, POLICYS), strict=True):
        found = plan_of([ladder], policy).difficulty()
        assert torch.equal(found.token, expected.token[None])
        assert torch.equal(found.pair, expected.pair[None])


def test_without_any_tables_every_token_is_average(ladder, ladders):
    for policy in (LearnedPolicy(ladder.rungs), PercentilePolicy(ladder.rungs, "entropy")):
        found = plan_of([ladder], policy).difficulty()
        tokens = torch.arange(300)[None]
        assert (found.values(tokens.roll(1, 1), tokens) == 0.5).all()
        both = plan_of([ladders[1], ladder], policy).difficulty()
        assert torch.equal(both.token[0], OTHER.token)
        assert (both.select(torch.tensor([1])).values(tokens.roll(1, 1), tokens) == 0.5).all()


@pytest.mark.parametrize("several", [True, False], ids=["three adapters", "one of them"])
def test_every_row_sees_the_tables_of_its_own_adapter(tiny_llama, ladders, batch, several):
    ids, mask = batch
    policy = ByDifficulty(ladders[0].rungs)
    plan = plan_of(ladders, policy, ADAPTERS) if several else plan_of(ladders[1:2], policy)
    with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run:
        logits, record = tiny_llama(ids, attention_mask=mask).logits, run.last.stream.columns()
    assert_seen(record, rows_of(batch), TABLES if several else [OTHER] * 5)
    for row, number in enumerate(ADAPTERS if several else ()):
        with activate(tiny_llama, plan_of([ladders[number]], policy), keep=Keep.DECISIONS) as run:
            alone = tiny_llama(ids[row][mask[row].bool()][None]).logits[0]
            single = row_of(run.last.stream.columns(), 0)
        assert torch.equal(row_of(record, row)["rung"], single["rung"])
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, atol=2e-5, rtol=1e-5)


def test_tables_stay_with_their_rows(tiny_llama, ladders, batch):
    """In branches of a cache, in one that begins anew, and where a caller brings tables of his own."""
    ids, mask = batch
    more = torch.tensor([[7, 99, 101, 7], [200, 7, 99, 101], [7, 99, 101, 7]])
    index = torch.tensor([2, 0, 4])
    rows = rows_of(batch)
    with activate(tiny_llama, plan_of(ladders, ByDifficulty(ladders[0].rungs), ADAPTERS), keep=Keep.DECISIONS) as run:
        cache = run.new_cache(5)
        tiny_llama(ids, attention_mask=mask, past_key_values=cache)
        branch = cache.select_rows(index)
        tiny_llama(more, past_key_values=branch)
        for row, source in enumerate(index.tolist()):
            text, own = [*rows[source].tolist(), *more[row].tolist()], TABLES[source]
            expected = naive_difficulty(text, own.token.tolist(), own.pair.tolist())[-4:]
            found = branch.stream.columns()["first"][row, :, 2:]
            torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
        cache.reset()
        tiny_llama(ids, attention_mask=mask, past_key_values=cache)
        assert_seen(cache.stream.columns(), rows, TABLES)
        brought = run.new_cache(5, difficulty=Difficulty.stack([POLICYS, OWN, AVERAGE, OTHER, OWN]))
        tiny_llama(ids, attention_mask=mask, past_key_values=brought)
        assert_seen(brought.stream.columns(), rows, [POLICYS, OWN, AVERAGE, OTHER, OWN])


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_tables_of_another_number_of_rows_are_refused(tiny_llama, ladder, rows):
    tables = Difficulty.stack([OWN] * rows)
    with (
        activate(tiny_llama, plan_of([ladder], ByDifficulty(ladder.rungs))) as run,
        pytest.raises(ValueError, match=rf"^difficulty: expected the tables of 5 rows, got {rows}; give as many$"),
    ):
        run.new_cache(5, difficulty=tables)


def test_a_saved_ladder_is_served_with_its_tables(tiny_llama, ladders, batch, tmp_path):
    """As far as it is in memory, at a fixed rung too, where nobody looks but the trace."""
    folder = save_ladder(ladders[0], tmp_path / "ladder")
    for asked in ({"rung": 4}, {"rung": 2, "resident_rung": 4}, {}):
        with adaptive(tiny_llama, folder, keep_record=True, **asked) as run:
            tiny_llama(batch[0], attention_mask=batch[1])
            assert_seen(run.last.stream.columns(), rows_of(batch), [OWN] * 5)

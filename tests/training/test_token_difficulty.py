"""Token difficulty is a shrunken mean of what low rungs lose, and no document's own is part of what it sees."""

import math

import pytest
import torch

from policy.difficulty import NEUTRAL, PAIRS, hashed_pairs
from training.targets.token_difficulty import FOLDS, fit_difficulty

RUNGS = (1, 2, 3, 8)
"""Of which two are at most a quarter of the top one."""
VOCABULARY = 12
STRENGTH = 8


def document(ids, prompt_tokens=0):
    return {"id": "-", "input_ids": list(ids), "prompt_tokens": prompt_tokens}


@pytest.fixture
def corpus():
    """Seven documents of a few tokens that repeat, with tables of two scales; token 11 is in the last one alone."""
    generator = torch.Generator().manual_seed(0)
    examples = [
        document(torch.randint(0, 10, (length,), generator=generator).tolist(), prompt_tokens)
        for length, prompt_tokens in ((9, 0), (12, 4), (5, 1), (14, 6), (10, 10), (8, 2))
    ]
    examples.append(document([3, 11, 4, 11, 3, 5], 1))
    tables = [torch.rand(len(own["input_ids"]), len(RUNGS), 2, generator=generator) for own in examples]
    # every rung has its own best scale
    factors = torch.tensor([[1.0, 3.0], [3.0, 1.0], [1.0, 3.0], [1.0, 1.0]])
    return examples, [table * factors for table in tables]


def code(ratio: float) -> int:
    return round(254 * min(max(0.5 + math.log(ratio) / 8, 0), 1))


def naive_difficulty(examples, tables):
    """Codes by token id and by pair of ids, of what was seen: damage of rungs 1 and 2 at the scale of least damage."""
    columns = []
    for rung in (0, 1):
        total = [sum(float(table[t, rung, g]) for table in tables for t in range(len(table))) for g in (0, 1)]
        columns.append(total.index(min(total)))
    seen = []  # token before, token, damage at both rungs
    for example, table in zip(examples, tables, strict=True):
        ids = example["input_ids"]
        for t in range(len(ids) - 1):  # the last predicts nothing
            if t + 1 >= example["prompt_tokens"]:
                before = ids[t - 1] if t else None
                seen.append((before, ids[t], [float(table[t, rung, columns[rung]]) for rung in (0, 1)]))
    mean = [sum(damage[rung] for *_, damage in seen) / len(seen) for rung in (0, 1)]
    ratios = [
        (before, token, sum(own / m for own, m in zip(damage, mean, strict=True)) / 2) for before, token, damage in seen
    ]

    def shrunken(values):
        return (STRENGTH + sum(values)) / (STRENGTH + len(values))

    token = {own: shrunken([ratio for _, t, ratio in ratios if t == own]) for own in {t for _, t, _ in ratios}}
    pairs = {(before, t) for before, t, _ in ratios if before is not None}
    pair = {own: shrunken([ratio / token[t] for before, t, ratio in ratios if (before, t) == own]) for own in pairs}
    return {own: code(value) for own, value in token.items()}, {own: code(value) for own, value in pair.items()}


def same(difficulty, examples, tables) -> None:
    token, pair = naive_difficulty(examples, tables)
    assert len(set(token.values())) > 3, "otherwise this says nothing"
    assert difficulty.token.tolist() == [token.get(own, NEUTRAL) for own in range(VOCABULARY)]
    entries = {int(hashed_pairs(*torch.tensor(own)[:, None], PAIRS)): own for own in pair}
    assert len(entries) == len(pair), "no two of these few share an entry"
    expected = torch.full((PAIRS,), NEUTRAL, dtype=torch.uint8)
    for entry, own in entries.items():
        expected[entry] = pair[own]
    assert torch.equal(difficulty.pair, expected)


def test_tables_are_shrunken_means_of_what_low_rungs_lose(corpus):
    """Token by token from the definition; what was not seen is average."""
    same(fit_difficulty(*corpus, RUNGS, VOCABULARY).whole, *corpus)


def test_a_document_sees_what_the_other_folds_are_fitted_on(corpus):
    examples, tables = corpus
    found = fit_difficulty(*corpus, RUNGS, VOCABULARY)
    assert len(found.folds) == FOLDS
    for number in range(len(examples)):
        others = [i for i in range(len(examples)) if i % FOLDS != number % FOLDS]
        same(found.of(number), [examples[i] for i in others], [tables[i] for i in others])
    for number in (len(examples), len(examples) + 5):
        assert found.of(number) is found.whole, "who is no train document sees all of them"
    rows = found.rows([6, 0, 7])
    for row, number in enumerate((6, 0, 7)):
        assert torch.equal(rows.token[row], found.of(number).token)
        assert torch.equal(rows.pair[row], found.of(number).pair)


def test_in_another_order_every_document_still_sees_what_is_its_own(corpus):
    """Some of the train documents, then others, which see all of it."""
    found = fit_difficulty(*corpus, RUNGS, VOCABULARY)
    other = found.reordered([1, 6, 4, 9, 8])
    for number, own in enumerate((1, 6, 4)):
        assert other.of(number) is found.of(own)
    for number in (3, 4, 5):
        assert other.of(number) is found.whole


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_what_a_document_lost_changes_nothing_that_it_sees(corpus, factor):
    """At its own rare token or anywhere: but everybody else sees it."""
    examples, tables = corpus
    own, rare = len(examples) - 1, 11
    before = fit_difficulty(*corpus, RUNGS, VOCABULARY)
    changed = [table.clone() for table in tables]
    changed[own][1] *= factor  # the first of the rare ones
    after = fit_difficulty(examples, changed, RUNGS, VOCABULARY)
    assert torch.equal(after.of(own).token, before.of(own).token)
    assert torch.equal(after.of(own).pair, before.of(own).pair)
    assert after.of(own).token[rare] == NEUTRAL
    higher = after.whole.token[rare] > before.whole.token[rare]
    assert bool(higher) == (factor > 1)
    assert after.whole.token[rare] != before.whole.token[rare]
    assert after.of(0).token[rare] != before.of(0).token[rare]


def test_what_a_document_says_changes_nothing_that_it_sees(corpus):
    examples, tables = corpus
    before = fit_difficulty(*corpus, RUNGS, VOCABULARY)
    other = [*examples[:3], document([1] * 14, 6), *examples[4:]]
    after = fit_difficulty(other, tables, RUNGS, VOCABULARY)
    assert torch.equal(after.of(3).token, before.of(3).token)
    assert torch.equal(after.of(3).pair, before.of(3).pair)
    assert not torch.equal(after.whole.token, before.whole.token)


def test_prompt_tokens_do_not_count(corpus):
    """Nor does the last token, which predicts nothing; the last of a prompt predicts the first of the completion."""
    examples, tables = corpus
    before = fit_difficulty(*corpus, RUNGS, VOCABULARY).whole
    changed = [table.clone() for table in tables]
    for example, table in zip(examples, changed, strict=True):
        table[: max(0, example["prompt_tokens"] - 1)] *= 2.0
        table[-1] *= 2.0
    after = fit_difficulty(examples, changed, RUNGS, VOCABULARY).whole
    assert torch.equal(after.token, before.token)
    assert torch.equal(after.pair, before.pair)
    changed[3][5] *= 50.0  # where its prompt of six tokens ends
    moved = fit_difficulty(examples, changed, RUNGS, VOCABULARY).whole
    token = examples[3]["input_ids"][5]
    assert moved.token[token] > before.token[token]


def test_rungs_above_a_quarter_do_not_count_unless_there_is_no_other(corpus):
    examples, tables = corpus
    before = fit_difficulty(*corpus, RUNGS, VOCABULARY).whole
    changed = [table.clone() for table in tables]
    for table in changed:
        table[:, 2:] = torch.rand(table[:, 2:].shape, generator=torch.Generator().manual_seed(1))
    after = fit_difficulty(examples, changed, RUNGS, VOCABULARY).whole
    assert torch.equal(after.token, before.token)
    # of rungs that are all above it the lowest counts
    high = fit_difficulty(examples, tables, (4, 5, 6, 8), VOCABULARY).whole
    alone = fit_difficulty(examples, [table[:, [0, 3]] for table in tables], (4, 8), VOCABULARY).whole
    assert torch.equal(high.token, alone.token)
    assert not torch.equal(high.token, before.token)


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_folds_are_by_number_and_the_same_every_time(corpus, count):
    """Of fewer documents than folds there are fewer; a single one sees nothing."""
    examples, tables = (own[:count] for own in corpus)
    found, again = (fit_difficulty(examples, tables, RUNGS, VOCABULARY) for _ in range(2))
    assert len(found.folds) == min(FOLDS, count)
    for number in range(count):
        assert found.of(number) is found.folds[number % FOLDS]
        assert torch.equal(found.of(number).token, again.of(number).token)
        assert torch.equal(found.of(number).pair, again.of(number).pair)
    assert torch.equal(found.whole.token, again.whole.token)
    if count == 1:
        assert (found.of(0).token == NEUTRAL).all()
        assert (found.of(0).pair == NEUTRAL).all()
        assert (found.whole.token != NEUTRAL).any()


def test_a_rare_token_is_nearer_to_the_average_than_a_frequent_one():
    """Both lose ten times as much as the others: one of them twenty times, one twice."""
    ids = ([1, 2, 3, 4] * 100 + [7, 8] * 20)[: 400 + 40] + [9, 0] * 2 + [5]
    table = torch.ones(len(ids), 2, 1)
    table[[own in (7, 9) for own in ids]] = 10.0
    table[:, -1] = 0.0
    found = fit_difficulty([document(ids)], [table], (1, 8), VOCABULARY).whole.token
    assert found[7] > found[9] > NEUTRAL > found[1]
    assert found[5] == found[6] == NEUTRAL, "what comes last predicts nothing"

"""Samples of chunks: what a table, a path and what came later add up to, and what a fit is given of them."""

from dataclasses import replace

import pytest
import torch

from policy import (
    ChunkSettings,
    Settings,
    Summary,
)
from policy.difficulty import PAIRS, Difficulty
from training.amounts import Amounts
from training.documents import Corpus
from training.targets.damage import Trajectory, later_damage
from training.targets.paths import collect_targets
from training.targets.samples import (
    LaterDamage,
    Samples,
    chunk_samples,
    document_samples,
    measure_later_damage,
    scored_chunks,
)
from training.task import AdapterTask, FitContext


def naive_samples(example, path, table, later):
    """[N, J, G] nats per token of the chunks that have scored tokens, and how many tokens and scored ones they have."""
    length, found = len(example["input_ids"]), []
    starts = path.starts.tolist()
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        scored = [t for t in range(start, end) if t + 1 < length and t + 1 >= example["prompt_tokens"]]
        if not scored:
            continue
        damage = torch.full(table.shape[1:], torch.nan, dtype=torch.float64)
        for j in range(table.shape[1]):
            for g in range(table.shape[2]):
                known = [float(table[t, j, g]) for t in scored if not table[t, j, g].isnan()]
                if known:
                    # as if the scored tokens that were not measured lost what the others lose
                    damage[j, g] = sum(known) / len(known) * len(scored) / (end - start) + later[j]
        found.append((damage, end - start, len(scored)))
    damage, tokens, counts = zip(*found, strict=True)
    return torch.stack(damage), list(tokens), list(counts)


NATS_LATER = (0.3, 0.2, 0.1, 0.05, 0.0)


@pytest.mark.parametrize("measured", [1.0, 0.1])
@pytest.mark.parametrize(("length", "prompt_tokens"), [(30, 0), (30, 1), (30, 14), (12, 11)])
def test_chunk_samples_add_up_token_by_token(make_example, length, prompt_tokens, measured):
    """Of whole tables, and of those that know some of the rungs of every token."""
    example, generator = make_example(length, prompt_tokens), torch.Generator().manual_seed(0)
    path = Trajectory(torch.tensor([0, 4, 5, 11]), torch.rand(4, Summary.FEATURES), torch.rand(length), log_lambda=-1.5)
    table = torch.rand(length, 5, 2, generator=generator)
    table[torch.rand(length, 5, generator=generator) > measured] = torch.nan
    samples = chunk_samples(example, path, table, LaterDamage(NATS_LATER, 1, 1))
    damage, tokens, scored = naive_samples(example, path, table, NATS_LATER)
    torch.testing.assert_close(samples.damage.double(), damage, atol=1e-6, rtol=1e-5, equal_nan=True)
    assert bool(damage.isnan().any()) == (measured < 1), "otherwise this says nothing"
    assert samples.tokens.tolist() == tokens
    assert samples.scored.tolist() == scored
    assert samples.log_lambda.tolist() == [-1.5] * len(tokens)
    kept = scored_chunks(example, path)
    assert torch.equal(samples.features, path.features[kept])
    assert kept.tolist() == [
        max(start, prompt_tokens - 1) < min(end, length - 1) for start, end in ((0, 4), (4, 5), (5, 11), (11, length))
    ]


def test_prompt_tokens_are_not_scored(make_example):
    """The last prompt token predicts the first of the completion and is; chunks of those before it are left out."""
    example = make_example(20, prompt_tokens=9)
    path = Trajectory(torch.tensor([0, 4, 8, 9, 15]), torch.rand(5, Summary.FEATURES), torch.rand(20))
    samples = chunk_samples(example, path, torch.ones(20, 3, 1), LaterDamage((0.0,) * 3, 0, 0))
    assert samples.damage[:, 0, 0].tolist() == pytest.approx([1, 1, 4 / 5])
    assert samples.scored.tolist() == [1, 6, 4]
    assert torch.equal(samples.features, path.features[2:])
    only_prompt = chunk_samples(
        make_example(20, prompt_tokens=20), path, torch.ones(20, 3, 1), LaterDamage((0.0,) * 3, 0, 0)
    )
    assert len(only_prompt) == 0
    assert only_prompt.damage.shape == (0, 3, 1)


def test_what_is_behind_a_chunk_adds_to_every_rung_its_own_nats(make_example):
    """Whatever the chunk itself lost, and at every scale alike."""
    example = make_example(20, prompt_tokens=3)
    path = Trajectory(torch.tensor([0, 4, 8, 15]), torch.rand(4, Summary.FEATURES), torch.rand(20))
    table = torch.rand(20, 5, 3, generator=torch.Generator().manual_seed(0))
    table[:, 2] = 0.0
    without = chunk_samples(example, path, table, LaterDamage((0.0,) * 5, 0, 0))
    samples = chunk_samples(example, path, table, LaterDamage(NATS_LATER, 0, 0))
    added = torch.tensor(NATS_LATER)[None, :, None].expand_as(samples.damage)
    torch.testing.assert_close(samples.damage - without.damage, added, atol=1e-6, rtol=0)


def test_samples_concatenate_in_order(make_example):
    path = Trajectory(torch.tensor([0, 5]), torch.rand(2, Summary.FEATURES), torch.rand(10))
    later = LaterDamage((0.1,) * 3, 1, 1)
    parts = [
        chunk_samples(make_example(10), replace(path, log_lambda=float(n)), torch.rand(10, 3, 2), later)
        for n in range(3)
    ]
    whole = Samples.concatenate(parts)
    assert len(whole) == 6
    assert torch.equal(whole.damage[2:4], parts[1].damage)
    assert whole.log_lambda.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_document_has_what_was_measured_in_its_own_run_and_else_its_table(make_example):
    examples = [make_example(10, seed=n) for n in range(2)]
    tables, measured = ([torch.rand(10, 3, 2) for _ in examples] for _ in range(2))
    later = LaterDamage((0.1, 0.05, 0.0), 1, 1)
    plain = Trajectory(torch.tensor([0, 5]), torch.rand(2, Summary.FEATURES), torch.rand(10))
    own = replace(plain, damage=measured[1])
    found = document_samples(examples, [plain, own], tables, later)
    assert torch.equal(found[0].damage, chunk_samples(examples[0], plain, tables[0], later).damage)
    assert torch.equal(found[1].damage, chunk_samples(examples[1], plain, measured[1], later).damage)


def test_later_damage_is_sampled_without_replacement_and_reported(full_rank_run, make_example):
    examples = [make_example(30, 3, seed=n) for n in range(2)]
    starts = ([0, 2, 8, 20], [0, 2, 6, 9])
    paths = [Trajectory(torch.tensor(own), torch.zeros(4, Summary.FEATURES), torch.zeros(30)) for own in starts]
    fit = replace(Amounts(), later_chunks=100, later_tokens=10)
    found = measure_later_damage(full_rank_run, examples, paths, fit, seed=0)
    # The last chunk of a document has nothing behind it, and a prompt runs at the start rung.
    chunks = [(0, 2, 8), (0, 8, 20), (1, 2, 6), (1, 6, 9)]
    sums = [later_damage(full_rank_run, examples[doc], start, end, 10)[1] for doc, start, end in chunks]
    tokens = sum(end - start for _, start, end in chunks)
    expected = [sum(float(own[rung]) for own in sums) / tokens for rung in range(4)]
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.nats[0] > found.nats[-1] == 0
    assert (found.chunks, found.tokens) == (4, 40)
    few = measure_later_damage(full_rank_run, examples, paths, replace(fit, later_chunks=2), seed=0)
    assert few == measure_later_damage(full_rank_run, examples, paths, replace(fit, later_chunks=2), seed=0)
    assert few.chunks == 2
    single = [Trajectory(torch.tensor([0]), torch.zeros(1, Summary.FEATURES), torch.zeros(30))] * 2
    assert measure_later_damage(full_rank_run, examples, single, fit, seed=0) == LaterDamage((0.0,) * 4, 0, 0)


def test_later_damage_of_several_tasks_is_their_mean_rung_by_rung():
    parts = [LaterDamage((0.4, 0.1, 0.0), 3, 30), LaterDamage((0.2, 0.2, 0.0), 1, 7)]
    found = LaterDamage.mean(parts)
    assert found.nats == pytest.approx((0.3, 0.15, 0.0))
    assert (found.chunks, found.tokens) == (4, 37)


@pytest.fixture
def collect(tiny_llama, ladder, make_example, make_trainer, tmp_path):
    """`collect(folder, settings, difficulty, hidden)`: the task of a few documents with its targets, what was set."""
    documents = [make_example(24, 3, seed=number) for number in range(4)]
    amounts = replace(Amounts(), later_chunks=2, scales=(1.0,))

    def run(folder: str, settings: Settings, difficulty: Difficulty | None = None, hidden: bool = False):
        root, say = tmp_path / folder, lambda message: None
        context = FitContext(tiny_llama, "model", amounts, 0, root, make_trainer, say, hidden=hidden)
        task = AdapterTask("made", replace(ladder, difficulty=difficulty), Corpus(documents[:3], documents[3:], []))
        (found,), calibrated = collect_targets(context, [task], settings)
        return found, calibrated

    return run


def test_what_a_ladder_knew_of_tokens_before_has_no_part_in_a_fit(collect):
    """A saved ladder has the difficulty that an earlier fit learned: this one learns its own and nothing from it."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randint(0, 255, (size,), generator=generator, dtype=torch.uint8) for size in (256, PAIRS))
    settings = Settings(block_tokens=8, chunk=ChunkSettings(weights={"difficulty": 1.0, "novelty": 1.0}))
    one, calibrated = collect("without", settings)
    other, again = collect("with", settings, Difficulty(*codes))
    assert (calibrated.settings, calibrated.later) == (again.settings, again.later)
    assert torch.equal(calibrated.scales, again.scales)
    assert torch.equal(one.ladder.difficulty.token, other.ladder.difficulty.token)
    for block in (1, 8):
        for path, same in zip(one.found().paths[block], other.found().paths[block], strict=True):
            assert torch.equal(path.features, same.features)


def test_states_are_collected_where_a_fit_asks_for_them(collect):
    """In the same folder as one that did not: its trajectories are not taken for these."""
    settings = Settings(block_tokens=8)
    one, _ = collect("same", settings)
    other, _ = collect("same", settings, hidden=True)
    for block in (1, 8):
        for path, wide in zip(one.found().paths[block], other.found().paths[block], strict=True):
            assert wide.features.shape == (len(path.features), Summary.FEATURES + 2 * 64)
            assert torch.equal(wide.features[:, : Summary.FEATURES], path.features)
            assert wide.features[:, Summary.FEATURES :].any()

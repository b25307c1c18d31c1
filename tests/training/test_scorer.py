"""Held-out scores come from real runs: at a fixed rung they are PEFT's, and every sum is per document."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from policy import (
    FULL_KV,
    ChunkSettings,
    Decision,
    FixedPolicy,
    KVSettings,
    Operating,
    PercentilePolicy,
    RankPolicy,
    Settings,
    Summary,
)
from policy.rungs import nearest_rung
from runtime.control.record import Keep
from runtime.export import export_rung
from runtime.plan import RunPlan, static_plan
from runtime.reference.adaptive import activate
from training.compare import latency
from training.compare.hindsight import Hindsight, Oracle
from training.compare.scorer import HeldOut, Scorer, Scores
from training.targets.damage import Trajectory, damage_table
from training.targets.samples import LaterDamage, chunk_samples, scored_chunks


@pytest.fixture
def examples(make_example):
    return [make_example(n, p, seed=n) for n, p in ((31, 6), (18, 0), (40, 13), (25, 1), (12, 4))]


@pytest.fixture
def held_out(tiny_llama, ladder, examples):
    return HeldOut((Scorer(tiny_llama, ladder, examples, rows=2),))


@pytest.fixture
def small_settings(ladder):
    return Settings(block_tokens=8, fade_tokens=1)


@torch.no_grad()
def peft_log_p(factory, folder, ids):
    from peft import PeftModel

    return PeftModel.from_pretrained(factory(), folder).eval()(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_a_fixed_rung_scores_what_pefts_adapter_does(
    held_out, ladder, examples, small_settings, tiny_llama_factory, llama_adapter, tmp_path
):
    rung = 1
    (scores,) = held_out.measure(FixedPolicy(ladder.rungs), small_settings, Operating.at(float(rung), rung))
    folder = export_rung(ladder, ladder.rungs[rung], tmp_path / "rung")
    for d, example in enumerate(examples):
        ids, prompt = example["input_ids"], example["prompt_tokens"]
        full, cut = (peft_log_p(tiny_llama_factory, path, ids) for path in (llama_adapter, folder))
        scored = [t for t in range(len(ids) - 1) if t + 1 >= prompt]
        kl = float((full.exp() * (full - cut)).sum(-1)[scored].sum())
        assert scores.sums["kl"][d] == pytest.approx(kl, rel=1e-3, abs=1e-3)
        assert scores.sums["perplexity"][d] == pytest.approx(-sum(float(cut[t, ids[t + 1]]) for t in scored), rel=1e-4)
        assert scores.tokens[d] == len(scored)
        assert scores.rungs[d].tolist() == [0, len(scored), 0, 0]
        assert scores.prompt_rungs[d].tolist() == [0, prompt, 0, 0]
    rung_rank = ladder.mean_rank().double().numpy()
    assert scores.mean(rung_rank) == scores.prompt_mean(rung_rank) == 4
    nll, tokens = scores.sums["perplexity"].sum(), scores.tokens.sum()
    assert scores.value("perplexity") == pytest.approx(math.exp(nll / tokens))


def test_the_top_rung_loses_nothing(held_out, ladder, small_settings):
    (scores,) = held_out.measure(FixedPolicy(ladder.rungs), small_settings, Operating.at(3.0, 3))
    assert scores.value("kl") < 1e-6


def test_perplexity_is_torchmetrics(held_out, ladder, examples, small_settings, tiny_llama):
    from torchmetrics.text import Perplexity

    (scores,) = held_out.measure(FixedPolicy(ladder.rungs), small_settings, Operating.at(1.0, 1))
    metric = Perplexity(-100)
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        with activate(tiny_llama, static_plan(ladder, 4)):
            logits = tiny_llama(ids).logits[:, :-1]
        targets = ids[:, 1:].clone()
        targets[:, : max(0, example["prompt_tokens"] - 1)] = -100
        metric.update(logits.float(), targets)
    assert scores.value("perplexity") == pytest.approx(float(metric.compute()), rel=1e-4)


def test_several_tasks_are_scored_document_after_document(held_out, ladder, examples, small_settings, tiny_llama):
    parts = HeldOut(tuple(Scorer(tiny_llama, ladder, part) for part in (examples[:2], examples[2:])))
    policy, operating = PercentilePolicy(ladder.rungs, "prior", spread=2.0), Operating.at(1.0, 3)
    (whole,), (two,) = (bench.measure(policy, small_settings, operating) for bench in (held_out, parts))
    assert whole.sums["kl"] == pytest.approx(two.sums["kl"], rel=1e-4, abs=1e-4)
    assert (whole.rungs == two.rungs).all()
    assert whole.kv.full == two.kv.full > 0


def test_perplexity_alone_runs_no_full_rank(tiny_llama, ladder, examples):
    scorer = Scorer(tiny_llama, ladder, examples, ["perplexity"])
    assert [scores.sums.keys() for scores in scorer.score(static_plan(ladder, 4))] == [{"perplexity"}]
    assert not scorer._exact


def test_a_policy_that_moves_is_scored_in_the_run_it_takes(held_out, ladder, examples, small_settings, tiny_llama):
    """Every document run alone, KL from its own logits, rungs from its own record: batching changes nothing."""
    policy, operating = PercentilePolicy(ladder.rungs, "prior", spread=2.0), Operating.at(1.0, 3)
    (scores,) = held_out.measure(policy, small_settings, operating)
    top = RunPlan((ladder,), FixedPolicy(ladder.rungs), small_settings, Operating.at(3.0, 3))
    for d, example in enumerate(examples):
        ids, found = torch.tensor([example["input_ids"]]), []
        for plan in (top, RunPlan((ladder,), policy, small_settings, operating)):
            with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run:
                cache = run.new_cache(1, prompt_tokens=torch.tensor([example["prompt_tokens"]]))
                found.append(run.forward(ids, past_key_values=cache).logits[0].double().log_softmax(-1))
        full, mixed = found
        scored = torch.arange(1, ids.shape[1]) >= example["prompt_tokens"]
        kl = (full.exp() * (full - mixed)).sum(-1)[:-1][scored].sum()
        assert scores.sums["kl"][d] == pytest.approx(float(kl), rel=1e-3, abs=1e-4)
        active = cache.stream.columns()["active"][0, :-1][scored]
        assert scores.rungs[d].tolist() == torch.bincount(active, minlength=4).tolist()
    assert (scores.rungs.sum(0) > 0).sum() > 1, "the policy must move for this to say anything"


def test_a_ladder_in_few_bits_is_scored_at_every_rung_and_counted_in_its_bytes(
    tiny_llama, mixed_ladder, examples, small_settings
):
    held_out = HeldOut((Scorer(tiny_llama, mixed_ladder, examples),))
    rungs = torch.arange(len(mixed_ladder.rungs))
    found = held_out.measure(FixedPolicy(mixed_ladder.rungs), small_settings, Operating.at(rungs.float(), rungs))
    rung_bytes = mixed_ladder.rung_bytes().numpy()
    for rung, scores in enumerate(found):
        kl = 0.0
        for example in examples:
            ids = torch.tensor([example["input_ids"]])
            log_p = []
            for own in (8, mixed_ladder.rungs[rung]):
                with activate(tiny_llama, static_plan(mixed_ladder, own)):
                    log_p.append(tiny_llama(ids).logits[0, :-1].double().log_softmax(-1))
            scored = torch.arange(1, ids.shape[1]) >= example["prompt_tokens"]
            kl += float((log_p[0].exp() * (log_p[0] - log_p[1])).sum(-1)[scored].sum())
        assert scores.sums["kl"].sum() == pytest.approx(kl, rel=1e-3, abs=1e-4)
        assert scores.mean(rung_bytes) == rung_bytes[rung]
    assert [scores.value("kl") for scores in found] == sorted((s.value("kl") for s in found), reverse=True)


def test_a_fade_from_bank_to_bank_counts_what_it_reads_of_both(tiny_llama, mixed_ladder, examples):
    """From the exact adapter down to the rung that a fixed policy goes on with: a wider start, for as long as it fades.

    Of a rung to another of the same bank nothing is read beside the dearer one.
    """
    settings = Settings(block_tokens=8, fade_tokens=4, chunk=ChunkSettings(4, 16))
    whole = [{**example, "prompt_tokens": 0} for example in examples if len(example["input_ids"]) > 20]
    held_out = HeldOut((Scorer(tiny_llama, mixed_ladder, whole),))
    policy, top = FixedPolicy(mixed_ladder.rungs), len(mixed_ladder.rungs) - 1
    starts = torch.tensor([top, 3])
    apart, same = held_out.measure(policy, settings, Operating.at(torch.ones(2), starts))
    # A chunk of the greatest length at the start rung, then a fade of which the fourth token is at its end.
    start = settings.chunk.max_tokens
    for document, length in enumerate(apart.tokens):
        assert apart.rungs[document, [1, top]].tolist() == [length - start, start + 3]
        assert same.rungs[document, [1, 3]].tolist() == [length - start - 3, start + 3]
        assert apart.rungs[document].sum() == length + 3


def test_fixed_rungs_are_scored_one_at_a_time(held_out, ladder, examples, small_settings, monkeypatch):
    """A batch reads the directions of every rung in it, for all of its rows."""
    rungs, policy = torch.arange(4), FixedPolicy(ladder.rungs)
    starts, activated = [], activate

    def noted(model, plan, **options):
        starts.append(plan.operating.start_rung.tolist())
        return activated(model, plan, **options)

    monkeypatch.setattr("training.compare.scorer.activate", noted)
    together = held_out.measure(policy, small_settings, Operating.at(rungs.float(), rungs))
    assert all(len(set(own)) == 1 for own in starts)
    assert starts, "otherwise this says nothing"
    for rung, scores in enumerate(together):
        (alone,) = held_out.measure(policy, small_settings, Operating.at(float(rung), rung))
        assert (scores.rungs == alone.rungs).all()
        assert {name: own.tolist() for name, own in scores.sums.items()} == {
            name: own.tolist() for name, own in alone.sums.items()
        }
        assert scores.kv is not None, "its caches were its own"


def test_another_ladder_of_the_adapter_shares_what_is_exact(tiny_llama, ladder, mixed_ladder, examples):
    scorer = Scorer(tiny_llama, mixed_ladder, examples)
    scorer.score(static_plan(mixed_ladder, 4))
    kept = dict(scorer._exact)
    other = scorer.on(ladder)
    (scores,) = other.score(static_plan(ladder, 4))
    (alone,) = Scorer(tiny_llama, ladder, examples).score(static_plan(ladder, 4))
    assert (scorer.ladder, other.ladder) == (mixed_ladder, ladder)
    assert scores.sums["kl"] == pytest.approx(alone.sums["kl"], rel=1e-5)
    assert all(other._exact[document] is exact for document, exact in kept.items())


def test_the_oracle_meets_the_mean_rank_and_beats_the_fixed_rung(held_out, tiny_llama, ladder, examples):
    settings = Settings(block_tokens=1, fade_tokens=1)
    settings = replace(settings, chunk=replace(settings.chunk, min_tokens=1, max_tokens=1))
    scales = torch.ones(len(ladder.rungs))
    with activate(tiny_llama, static_plan(ladder, ladder.rungs[-1])) as run:
        tables = damage_table(run, examples, scales[:, None])
    hindsight = []
    for example, table in zip(examples, tables, strict=True):
        starts = torch.arange(len(example["input_ids"]))
        path = Trajectory(starts, torch.zeros(len(starts), Summary.FEATURES), torch.zeros(len(starts)))
        chunks = chunk_samples(example, path, table, LaterDamage((0.0,) * len(ladder.rungs), 0, 0))
        hindsight.append(Hindsight(starts[scored_chunks(example, path)], chunks.damage[..., 0], chunks.scored))
    oracle = Oracle(held_out, (tuple(hindsight),), scales, ladder.mean_rank())
    rung_rank = ladder.mean_rank().double().numpy()
    scores, dearer = oracle.measure(settings, [4.0, 6.0], start_rungs=[0, 0])
    assert scores.mean(rung_rank) == pytest.approx(4.0, abs=0.15)
    assert dearer.mean(rung_rank) == pytest.approx(6.0, abs=0.25)
    assert dearer.value("kl") < scores.value("kl")
    (fixed,) = held_out.measure(FixedPolicy(ladder.rungs), settings, Operating.at(1.0, 1))
    assert scores.value("kl") < fixed.value("kl")
    without_prompt = [d for d, example in enumerate(examples) if not example["prompt_tokens"]]
    assert not scores.prompt_rungs[without_prompt].any()


def test_points_that_share_batches_score_what_each_does_alone(held_out, ladder, small_settings):
    """Knob, start rung and budget are each row's own."""
    policy = PercentilePolicy(ladder.rungs, "prior", spread=2.0)
    budgets = torch.tensor([math.inf, 0.3, math.inf], dtype=torch.float64)
    operating = Operating.at(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3, 0, 1]), budget=budgets)
    together = held_out.measure(policy, small_settings, operating)
    assert len({tuple(scores.rungs.sum(0)) for scores in together}) == 3, "otherwise this says nothing"
    for point, scores in enumerate(together):
        (alone,) = held_out.measure(policy, small_settings, operating.select(torch.tensor([point])))
        assert (scores.rungs == alone.rungs).all()
        assert (scores.prompt_rungs == alone.prompt_rungs).all()
        assert (scores.tokens == alone.tokens).all()
        assert scores.processed == alone.processed
        for name in ("kl", "perplexity"):
            assert scores.sums[name] == pytest.approx(alone.sums[name], rel=1e-4, abs=1e-4)
        assert alone.kv is not None
        assert scores.kv is None, "the caches were shared"


@pytest.mark.parametrize("kept", [0, 1, 3, 5])
def test_little_memory_changes_no_number(held_out, tiny_llama, ladder, examples, small_settings, monkeypatch, kept):
    """Batches of at most 80 positions, and exact distributions kept of as many documents as there is room for."""
    policy, operating = PercentilePolicy(ladder.rungs, "prior", spread=2.0), Operating.at(1.0, 3)
    (whole,) = held_out.measure(policy, small_settings, operating)
    position_bytes = 4 * tiny_llama.config.vocab_size
    monkeypatch.setattr("training.compare.scorer.LOGITS_BYTES", 80 * position_bytes)
    plan = RunPlan((ladder,), policy, small_settings, operating)
    roomy, small = (Scorer(tiny_llama, ladder, examples) for _ in range(2))
    roomy.score(plan)
    sizes = [exact.nbytes for exact in roomy._exact.values()]
    assert len(sizes) == len(examples)
    monkeypatch.setattr("training.compare.scorer.KEPT_BYTES", sum(sizes[:kept]))
    (first,), (again,) = (small.score(plan) for _ in range(2))
    assert len(small._exact) == kept
    for name in ("tokens", "rungs", "prompt_rungs"):
        assert (getattr(first, name) == getattr(again, name)).all()
        assert getattr(first, name) == pytest.approx(getattr(whole, name))
    for name in ("kl", "perplexity"):
        assert first.sums[name] == pytest.approx(again.sums[name], rel=1e-5, abs=1e-6)
        assert first.sums[name] == pytest.approx(whole.sums[name], rel=1e-4, abs=1e-4)


def same(one: Scores, other: Scores) -> None:
    """All but caches and the clock."""
    for name in ("tokens", "rungs", "prompt_rungs"):
        assert (getattr(one, name) == getattr(other, name)).all(), name
    assert one.processed == other.processed
    for name in ("kl", "perplexity"):
        assert one.sums[name] == pytest.approx(other.sums[name], rel=1e-3, abs=1e-4)


class WavyPolicy(RankPolicy):
    """Its rung swings with every feature, so that one wrong signal shows."""

    kind = "wavy"

    def __init__(self, rungs, seed: int) -> None:
        super().__init__(rungs)
        self.weights = 10 * torch.randn(Summary.FEATURES, generator=torch.Generator().manual_seed(seed))

    def decide(self, summary: Summary, knob: torch.Tensor) -> Decision:
        swing = 1 + torch.sin(knob + summary.features() @ self.weights)
        rung = nearest_rung(swing * (len(self.rungs) - 1) / 2, len(self.rungs))
        return Decision(rung, torch.ones(len(rung), len(self.rungs)))

    def knob_range(self) -> tuple[float, float]:
        return 0.0, 6.0


@pytest.fixture
def stepping_and_whole(tiny_llama, examples):
    """`stepping_and_whole(ladder)`: a scorer that decodes token by token, and one that runs texts as a whole."""

    def make(ladder):
        return Scorer(tiny_llama, ladder, examples, rows=4), Scorer(tiny_llama, ladder, examples, rows=7, whole=True)

    return make


@pytest.mark.parametrize(
    ("bits", "chunk", "fade", "budget"),
    [
        ("svd", (1, 1), 1, math.inf),
        ("svd", (1, 4), 1, math.inf),
        ("mixed", (4, 8), 4, math.inf),
        ("mixed", (1, 1), 1, 0.55),
    ],
    ids=["tokens", "chunks", "fades", "budget"],
)
def test_whole_texts_score_what_stepping_does_point_for_point(
    stepping_and_whole, ladder, mixed_ladder, bits, chunk, fade, budget
):
    """Again with other knobs and another policy of the same kind, which starts from what was put out before."""
    own = ladder if bits == "svd" else mixed_ladder
    stepping, whole = stepping_and_whole(own)
    settings = Settings(block_tokens=1, fade_tokens=fade, chunk=ChunkSettings(*chunk))
    top = len(own.rungs) - 1
    starts = torch.tensor([top, 0, 1])
    for seed, knobs in ((0, [0.0, 2.0, 4.0]), (1, [0.1, 5.0, 3.0])):
        operating = Operating.at(torch.tensor(knobs), starts, budget=torch.full((3,), budget))
        plan = RunPlan((own,), WavyPolicy(own.rungs, seed), settings, operating)
        expected, found = stepping.score(plan), whole.score(plan)
        assert len(found) == 3
        for one, other in zip(expected, found, strict=True):
            same(one, other)
        rungs = np.stack([scores.rungs.sum(0) for scores in expected])
        assert ((rungs > 0).sum(1) > 1).all(), "a policy that never moves shows nothing"


def test_whole_texts_take_a_few_forwards_and_those_that_are_known_take_one(stepping_and_whole, ladder, tiny_llama):
    stepping, whole = stepping_and_whole(ladder)
    forwards = []
    tiny_llama.model.layers[0].register_forward_pre_hook(lambda *_: forwards.append(1))

    def counted(scorer):
        policy = PercentilePolicy(ladder.rungs, "surprisal", torch.linspace(0.5, 0.9, 101), spread=2.0)
        scorer.score(static_plan(ladder, 8))  # what is exact is kept from here on
        forwards.clear()
        scorer.score(RunPlan((ladder,), policy, Settings(block_tokens=1), Operating.at(1.0, 2)))
        return len(forwards)

    stepped, first, again = counted(stepping), counted(whole), counted(whole)
    assert stepped >= 40, "every token is a forward"
    batches = len(list(whole._batches([[0]])))
    assert batches == again < first < stepped / 2


@pytest.mark.parametrize("case", ["blocks", "pages", "fixed"])
def test_what_has_no_whole_is_stepped_all_the_same(stepping_and_whole, ladder, case, monkeypatch):
    """Blocks of prefill, pages in few bits, and a policy that does not look: all are scored, caches and all."""
    monkeypatch.setattr("training.compare.scorer.settled", None)  # not called
    stepping, whole = stepping_and_whole(ladder)
    settings = Settings(block_tokens=8 if case == "blocks" else 1)
    policy = FixedPolicy(ladder.rungs) if case == "fixed" else PercentilePolicy(ladder.rungs, "prior", spread=2.0)
    kv = KVSettings(sink_pages=0, window_tokens=16, threshold=0.0) if case == "pages" else FULL_KV
    plan = RunPlan((ladder,), policy, settings, Operating.at(1.0, 2, kv))
    (expected,), (found,) = (scorer.score(plan) for scorer in (stepping, whole))
    same(expected, found)
    assert found.kv is not None
    assert (found.kv.text < found.kv.full) == (case == "pages")


def test_what_deciding_costs_is_a_step_that_decides_less_one_of_the_same_rung(tiny_llama, ladder, monkeypatch):
    """Steps of 5 ms and of 3 ms; the first round, in which everything is slow, only warms up."""
    timed = []

    def step_ms(run, cache, token):
        timed.append((run.plan.policy.looks, run.plan.operating.start_rung.tolist()))
        return 1000.0 * len(timed) if len(timed) <= 4 else 5.0 if run.plan.policy.looks else 3.0

    monkeypatch.setattr(latency, "_step_ms", step_ms)
    policy = PercentilePolicy(ladder.rungs, "prior", spread=2.0)
    plan = RunPlan((ladder,), policy, Settings(block_tokens=1), Operating.at(1.0, 2))
    assert latency.measure_controller(tiny_llama, plan, rounds=1, steps=2) == 2.0
    assert timed == ([(True, [2])] * 2 + [(False, [2])] * 2) * 2

"""`python -m training.evaluate`: its perplexity is PEFT's, and it is reported token by token and in blocks."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch

import training.documents
from policy import FixedPolicy, KnobCurve, Operating, PercentilePolicy, PolicyCheckpoint, Settings
from runtime import build_ladder, load_adapter, load_model, load_tokenizer, save_ladder
from runtime.control.record import Keep
from runtime.fingerprint import adapter_fingerprint, model_fingerprint
from runtime.plan import RunPlan, plan_run
from runtime.reference.adaptive import activate
from training.amounts import Amounts
from training.documents import batches, load_corpus
from training.evaluate import evaluate, load_examples, main, measure_perplexity


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def base(case):
    return load_model(case.model, dtype="float32", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def examples(case, base):
    return load_examples(str(case.dataset), "test", None, 64, base, load_tokenizer(case.model))


@pytest.fixture(scope="module")
def arguments(case):
    return {
        "model": str(case.model), "adapter": str(case.adapter), "dataset": str(case.dataset), "max_tokens": 64,
        "dtype": "float32",
    }  # fmt: skip


@torch.no_grad()
def plain_perplexity(model, examples):
    """exp of the mean negative log-likelihood of completion tokens, one document and one token at a time."""
    nll, count = 0.0, 0
    for example in examples:
        ids = torch.tensor(example["input_ids"])
        log_p = model(ids[None]).logits[0].double().log_softmax(-1)
        for t in range(max(1, example["prompt_tokens"]), len(ids)):
            nll -= float(log_p[t - 1, ids[t]])
            count += 1
    return float(torch.tensor(nll / count, dtype=torch.float64).exp()), count


@pytest.mark.parametrize("max_tokens", [64, 23])
def test_perplexity_at_the_top_rung_is_that_of_pefts_merged_model(case, base, arguments, max_tokens):
    from peft import PeftModel

    given = {**arguments, "max_tokens": max_tokens}
    found = {run.name: run for run in evaluate(**given)}
    examples = load_examples(given["dataset"], "test", None, max_tokens, base, load_tokenizer(case.model))
    without, count = plain_perplexity(base, examples)
    fresh = load_model(case.model, dtype="float32", device=torch.device("cpu"))
    merged = PeftModel.from_pretrained(fresh, case.adapter).merge_and_unload().eval()
    full, _ = plain_perplexity(merged, examples)
    assert abs(full / without - 1) > 0.01, "the adapter must matter for this to say anything"
    assert found["no adapter"].perplexity == pytest.approx(without, rel=1e-4)
    for name in ("full rank", "block 1", "block 512"):
        assert found[name].perplexity == pytest.approx(full, rel=1e-4)
        assert found[name].mean_rank == 8
        assert (found[name].scored_tokens, found[name].documents) == (count, len(examples))
    assert found["no adapter"].mean_rank == 0


@pytest.fixture
def moving_policy(case, base, tmp_path):
    """A policy that moves between rungs, with 16-token blocks and a compressed KV cache."""
    settings = Settings(block_tokens=16)
    settings = replace(settings, kv=replace(settings.kv, sink_pages=0, window_tokens=16, threshold=0.0))
    fingerprints = {
        "model": model_fingerprint(base), "adapter": adapter_fingerprint(load_adapter(case.adapter)), "ladder": None,
        "shared": False,
    }  # fmt: skip
    policy = PercentilePolicy((2, 4, 6, 8), "prior", spread=1.5)
    curve = KnobCurve((0.25, 0.5, 0.75, 1.0), (0.0, 1.0, 2.0, 3.0))
    PolicyCheckpoint(policy, settings, curve, (0.25, 0.5, 0.75, 1.0), fingerprints, 0.5).save(tmp_path / "policy")
    return str(tmp_path / "policy")


def test_a_policy_is_reported_token_by_token_and_in_its_own_blocks(arguments, moving_policy):
    found = {run.name: run for run in evaluate(**arguments, policy=moving_policy)}
    assert list(found) == ["no adapter", "full rank", "block 1", "block 16"]
    assert [run.block_tokens for run in found.values()][2:] == [1, 16]
    for name in ("block 1", "block 16"):
        run = found[name]
        assert 2 < run.mean_rank < 8
        assert run.prompt_mean_rank is not None
        assert run.kv_bytes < found["full rank"].kv_bytes
        assert run.kv_bytes_full == found["full rank"].kv_bytes_full
        assert run.ms_per_token > 0
    # A block of 16 knows the signals of its own tokens only afterwards: other decisions, other numbers.
    assert found["block 1"].mean_rank != found["block 16"].mean_rank


def test_the_block_can_be_chosen_and_one_is_measured_once(arguments, moving_policy):
    names = [run.name for run in evaluate(**arguments, policy=moving_policy, block_tokens=8, limit=3)]
    assert names[2:] == ["block 1", "block 8"]
    names = [run.name for run in evaluate(**arguments, policy=moving_policy, block_tokens=1, limit=3)]
    assert names[2:] == ["block 1"]


def test_a_budget_moves_the_mean_rank_and_a_rung_fixes_it(arguments, moving_policy):
    low, high = (
        evaluate(**arguments, policy=moving_policy, budget=budget, limit=4)[-1].mean_rank for budget in (0.25, 1.0)
    )
    assert low < high == 8
    assert evaluate(**arguments, rung=4, limit=4)[-1].mean_rank == 4


def test_a_rung_of_a_ladder_in_few_bits_may_be_fractional_and_is_reported_in_bytes(arguments, mixed_ladder, tmp_path):
    folder = save_ladder(mixed_ladder, tmp_path / "ladder")
    given = {**arguments, "adapter": str(folder), "limit": 4}
    found = {run.name: run for run in evaluate(**given, rung=0.5)}
    run, rung_bytes = found["block 512"], mixed_ladder.rung_bytes().tolist()
    assert 0.4 < run.mean_rank <= 0.5
    assert (run.adapter_bytes, run.adapter_share) == pytest.approx((rung_bytes[0], rung_bytes[0] / rung_bytes[-1]))
    assert (found["no adapter"].adapter_bytes, found["no adapter"].mean_rank) == (0, 0)
    assert (found["full rank"].adapter_bytes, found["full rank"].adapter_share) == (rung_bytes[-1], 1)
    assert evaluate(**given, rung=4.0)[-1].adapter_bytes == rung_bytes[-2], "a whole rank, however it is written"


def test_scored_tokens_are_those_of_a_naive_count_and_a_fixed_budget_holds_from_the_first_token(
    base, case, examples, arguments
):
    settings = Settings(block_tokens=8, fade_tokens=1)
    prints = {
        "model": model_fingerprint(base), "adapter": adapter_fingerprint(load_adapter(case.adapter)), "ladder": None,
        "shared": False,
    }  # fmt: skip
    checkpoint = PolicyCheckpoint(FixedPolicy((2, 8)), settings, None, (0.25, 1.0), prints, 0.25)
    (*_, run) = evaluate(**arguments, policy=checkpoint)
    scored = sum(
        t + 1 >= example["prompt_tokens"] for example in examples for t in range(len(example["input_ids"]) - 1)
    )
    assert run.scored_tokens == scored
    assert run.mean_rank == run.prompt_mean_rank == 2


def test_scored_tokens_and_mean_rank_are_those_of_a_naive_count(base, case, examples):
    """The top rung first, the cheapest from the first decision on: every document alone, token by token."""
    ladder = build_ladder(load_adapter(case.adapter), [2, 8])
    settings = Settings(block_tokens=8, fade_tokens=1)
    plan = RunPlan((ladder,), FixedPolicy((2, 8)), settings, Operating.at(0.0, 1))
    found = measure_perplexity("moving", base, plan, examples)
    ranks, prompt_ranks = [], []
    with activate(base, plan, keep=Keep.DECISIONS) as run:
        for example in examples:
            cache = run.new_cache(1, prompt_tokens=torch.tensor([example["prompt_tokens"]]))
            run.forward(torch.tensor([example["input_ids"]]), past_key_values=cache)
            active = [(2, 8)[rung] for rung in cache.stream.columns()["active"][0].tolist()]
            ranks += [rank for t, rank in enumerate(active[:-1]) if t + 1 >= example["prompt_tokens"]]
            prompt_ranks += active[: example["prompt_tokens"]]
    assert found.scored_tokens == len(ranks)
    assert 2 < found.mean_rank < 8
    assert found.mean_rank == pytest.approx(sum(ranks) / len(ranks))
    assert found.prompt_mean_rank == pytest.approx(sum(prompt_ranks) / len(prompt_ranks))


WORDS = ["rank", "rung", "ladder", "page", "token", "chunk", "the", "of", "is", "a", "opens", "closes"]


@pytest.fixture
def running_text(tmp_path):
    """One file of 40 different paragraphs without prompts."""
    source = random.Random(3)
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(source.choices(WORDS, k=source.randint(5, 60))) for _ in range(40)))
    return path


def test_text_without_prompts_is_scored_as_running_text_in_blocks(case, base, arguments, running_text):
    """Hugging Face's way: one long sequence, cut every max_tokens, the mean over all tokens that another predicts."""
    given = {**arguments, "dataset": str(running_text), "split": "all"}
    found = {run.name: run for run in evaluate(**given)}["no adapter"]
    tokenizer = load_tokenizer(case.model)
    ids, starts = [], set()
    for paragraph in running_text.read_text().split("\n\n"):
        before = [] if tokenizer("x")["input_ids"][0] != tokenizer.bos_token_id else [tokenizer.bos_token_id]
        starts |= set(range(len(ids), len(ids) + len(before)))
        ids += [*before, *tokenizer(paragraph, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    nll, count = 0.0, 0
    for start in range(0, len(ids), 64):
        block = torch.tensor(ids[start : start + 64])
        with torch.no_grad():
            log_p = base(block[None]).logits[0].double().log_softmax(-1)
        for t in range(1, len(block)):
            if start + t not in starts:
                nll -= float(log_p[t - 1, block[t]])
                count += 1
    assert len(ids) > 10 * 64
    assert found.packed
    assert found.documents == -(-len(ids) // 64)
    assert found.scored_tokens == count
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert found.prompt_mean_rank is None


def test_less_text_than_one_block_is_one_block(arguments, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("the rank of a page")
    found = evaluate(**{**arguments, "dataset": str(path), "split": "all"})[0]
    assert (found.documents, found.packed) == (1, True)


def test_the_test_part_of_one_file_is_what_a_fit_of_it_never_saw(case, base, running_text):
    """Every document of the file in exactly one part, whatever amounts the fit takes; `all` is the whole file."""
    rows = [{"prompt": f"the {n}", "completion": " rank of a page is" * 3 + f" rung {n}"} for n in range(40)]
    path = running_text.with_name("all.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(case.model)
    ids = {
        split: {example["id"] for example in load_examples(str(path), split, None, 64, base, tokenizer)}
        for split in ("train", "validation", "test", "all")
    }
    assert ids["train"] | ids["validation"] | ids["test"] == ids["all"]
    assert sum(map(len, ids.values())) == 2 * len(ids["all"]) == 80
    for train_documents in (4, 400):
        fit = Amounts(train_documents=train_documents, min_completion_tokens=8)
        corpus = load_corpus(str(path), tokenizer, fit, seed=0)
        assert {example["id"] for example in (*corpus.train, *corpus.validation)} <= ids["train"] | ids["validation"]
        assert {example["id"] for example in corpus.test} <= ids["test"]
    other = {example["id"] for example in load_examples(str(path), "test", None, 64, base, tokenizer, seed=1)}
    assert other != ids["test"]


def test_batches_shrink_with_the_vocabulary(base, examples, case, monkeypatch):
    plan = plan_run(load_adapter(case.adapter))
    whole = measure_perplexity("full rank", base, plan, examples)
    widths = []
    make_batch = training.documents.make_batch
    monkeypatch.setattr(training.documents, "make_batch", lambda rows: widths.append(len(rows)) or make_batch(rows))
    monkeypatch.setattr("training.compare.scorer.LOGITS_BYTES", 2 * 64 * 256 * 4)
    small = measure_perplexity("full rank", base, plan, examples)
    assert max(widths) <= 3
    assert sum(widths) == len(examples)
    assert small.perplexity == pytest.approx(whole.perplexity, rel=1e-5)


def command(arguments, **changes):
    return [f"--{name}={value}" for name, value in {**arguments, **changes}.items()]


def test_the_command_prints_a_table_and_ends_in_json(arguments, moving_policy, capsys):
    main([*command(arguments, policy=moving_policy), "--limit=5", "--max-tokens=40", "--json"])
    *table, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    assert list(result["runs"]) == ["no adapter", "full rank", "block 1", "block 16"]
    assert result["max_tokens"] == 40
    assert all(run["documents"] == 5 for run in result["runs"].values())
    shown = "\n".join(table)
    for run in result["runs"].values():
        assert f"{run['perplexity']:.4f}" in shown


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "/nowhere/model"}, "/nowhere/model"),
        ({"adapter": "/nowhere/adapter"}, "/nowhere/adapter"),
        ({"policy": "/nowhere/policy"}, "/nowhere/policy"),
        ({"dataset": "/nowhere/text.jsonl"}, "/nowhere/text.jsonl"),
        ({"dataset": "no-such/dataset"}, "no-such/dataset"),
        ({"dataset": "wikitext"}, "expected to reach the hub"),
        ({"split": "dev"}, "split"),
        ({"limit": 0}, "limit"),
        ({"rung": 9}, "expected ranks up to the adapter's 8, got 9"),
        ({"rung": 0.5}, "expected whole ranks of an svd ladder, got [0.5]"),
        ({"rung": "two"}, "rung"),
        ({"budget": -0.5}, "budget: expected a share of the full adapter's cost in [0, 1]"),
        ({"budget": 0.5}, "policy: expected one to spend"),
        ({"block_tokens": 0}, "block_tokens: expected"),
        ({"max_tokens": 4096}, "expected at most the model's context of 512, got 4096"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_ends_in_one_line(change, says, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command(arguments, **change))
    errors = capsys.readouterr().err
    assert caught.value.code == 2
    assert len(errors.strip().splitlines()) == 1, errors
    assert says in errors


def test_batches_cover_the_documents(examples):
    assert sorted(i for index, _ in batches(examples, 8) for i in index) == list(range(len(examples)))

"""The engine's generation is the reference path's, token for token; which of the two it is is chosen and said."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, TextStreamer, set_seed

from policy import Operating, PercentilePolicy
from runtime import adaptive, generate
from runtime.engine import decoder as decoders
from tests.engine import tiny
from tests.engine.tiny import BUDGETS, GREEDY, prompts

EQUAL = ("tokens", "kv_bytes", "kv_bytes_full")
NEAR = ("mean_rank", "row_mean_rank", "prompt_mean_rank", "adapter_bytes", "adapter_share")
FAST = {"fast": True, "max_new_tokens": 1}
"""A generation of which the engine chooses one token and decodes none."""


pytestmark = pytest.mark.usefixtures("made")


def completed(model, adapter, given, **options):
    ids, mask = (own.to(model.device) for own in given)
    return generate(model, adapter, ids, attention_mask=mask, **GREEDY | options)


def assert_equal(fast, reference):
    assert fast.path.startswith("fast: ")
    assert reference.path == "reference: fast=False"
    assert fast.sequences.tolist() == reference.sequences.tolist()
    for name in EQUAL:
        assert getattr(fast, name) == getattr(reference, name), name
    for name in NEAR:
        assert getattr(fast, name) == pytest.approx(getattr(reference, name), rel=1e-9, nan_ok=True), name
    assert fast.kv_bytes <= fast.kv_bytes_allocated


def both(model, adapter, given, **options):
    """Both paths' generations, which are equal; the engine's."""
    fast, reference = (completed(model, adapter, given, **options, fast=way) for way in (True, False))
    assert_equal(fast, reference)
    return fast


@pytest.mark.parametrize(
    ("kind", "lengths", "options"),
    [("qwen2", (5,), {"layers": 2}), ("qwen3", (3, 1), {}), ("mistral", (21, 17), {"sliding_window": 6})],
)
def test_the_exact_adapter_on_every_family(device, kind, lengths, options):
    model = tiny.model(kind, device=device, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    assert both(model, tiny.ladder(model), prompts(*lengths), max_new_tokens=3).mean_rank == 8


def test_a_coded_rung_and_an_adapter_of_its_own_for_every_row(llama, ladders, made):
    """Three rows in a bucket of four."""
    a, b = ladders
    out = both(llama, [a, b, a], prompts(9, 2, 16), rung=[1.25, 4, 0.5], max_new_tokens=4)
    (decoder,) = made
    assert decoder.bucket == decoders.Bucket(rows=4, pages=2, steps=4, ends=0, decides=False)
    assert len({out.row_mean_rank[row] for row in range(3)}) == 3


def test_a_learned_policy_decides_for_rows_of_other_budgets_and_adapters(llama, ladders, learned, made):
    a, b = ladders
    out = both(llama, [a, b, a], prompts(18, 4, 25), policy=learned, budget=list(BUDGETS), max_new_tokens=6)
    (decoder,) = made
    assert decoder.bucket.decides
    rungs = decoder.rungs[:3, :5].tolist()
    assert len({rung for row in rungs for rung in row}) >= 3, rungs
    assert max(len(set(row)) for row in rungs) > 1, rungs
    assert len(set(out.row_mean_rank)) == 3


def test_one_row_alone_decides_as_well(llama, ladders, learned, made):
    both(llama, ladders[1], prompts(21), policy=learned, budget=0.45, max_new_tokens=4)
    (decoder,) = made
    assert decoder.bucket.rows == 1
    assert len(decoder.rungs[0, :3].unique()) > 1


def test_no_rung_above_the_resident_one(llama, ladders, learned, made):
    """Of a policy that would choose a higher one."""
    options = {"policy": learned, "budget": 0.9, "resident_rung": ladders[0].rungs[2], "max_new_tokens": 3}
    both(llama, ladders[0], prompts(5, 8), **options)
    (decoder,) = made
    assert decoder.rungs[:2, :2].tolist() == [[2, 2], [2, 2]]


@pytest.mark.filterwarnings("ignore:every token gets rung")
def test_the_resident_rung_is_what_no_policy_means(llama, ladders):
    out = both(llama, ladders[0], prompts(5), resident_rung=ladders[0].rungs[2], max_new_tokens=2)
    assert out.mean_rank == pytest.approx(float(ladders[0].mean_rank()[2]))


def test_rows_end_at_steps_of_their_own(llama, ladders):
    given, options = prompts(7, 4, 5), {"rung": [2, 4, 1.25], "max_new_tokens": 6}
    new = completed(llama, ladders[0], given, **options, fast=False).sequences[:, 7:].tolist()
    ends = [new[0][1], new[1][3], new[2][2]]
    out = both(llama, ladders[0], given, **options | {"eos_token_id": ends})
    assert len(set(out.tokens)) > 1
    assert out.sequences.shape[1] == 7 + max(out.tokens) < 7 + 6
    for row, count in enumerate(out.tokens):
        assert int(out.sequences[row, 7 + count - 1]) in ends
        assert not out.sequences[row, 7 + count :].any()


def test_a_single_new_token_is_chosen_from_the_prefill_alone(llama, ladders, learned):
    out = both(llama, list(ladders), prompts(9, 3), policy=learned, budget=[0.3, 0.9], max_new_tokens=1)
    assert out.tokens == [1, 1]
    assert out.prompt_mean_rank > 0


def test_what_rows_ask_for_changes_without_another_decoder(llama, ladders, learned, made):
    """Adapters change places, and knobs, budgets and start rungs are others; more room means another pool."""
    given = prompts(4, 6)
    ids, mask = (own.to(llama.device) for own in given)
    options = GREEDY | {"attention_mask": mask}
    asked = {"policy": learned, "budget": [0.3, 0.9]}
    own = torch.tensor([-4.0, -1.0]), torch.tensor([4, 1]), learned.settings.kv, torch.tensor([1, 0])
    swapped = Operating.at(*own, torch.tensor([0.02, float("inf")]))

    def pair_of(fast):
        with adaptive(llama, list(ladders), **asked, fast=fast) as run:
            found = []
            for operating in (run.plan.operating, swapped):
                run.plan = replace(run.plan, operating=operating)
                tokens = llama.generate(ids, **options, max_new_tokens=3)
                found.append((tokens.tolist(), run.row_mean_rank(), run.last.kv_bytes()))
            count = len(made)
            # Without a mask padding is none of the text.
            wide = llama.generate(ids.repeat(1, 5), **GREEDY, max_new_tokens=2)
            return [*found, (wide.tolist(), run.row_mean_rank(), run.last.kv_bytes())], count

    (fast, first), (reference, _) = pair_of(True), pair_of(False)
    assert first == 1, "the second generation goes through the first one's graph"
    assert len(made) == 2
    assert made[0].pool is not made[1].pool
    assert fast[0][0] != fast[1][0]
    for got, expected in zip(fast, reference, strict=True):
        assert got[0] == expected[0]
        assert got[1:] == (pytest.approx(expected[1]), expected[2])


SAMPLED = {"do_sample": True, "temperature": 2.0, "top_k": 30}


def test_a_row_draws_by_its_seed_wherever_it_is(llama, ladders):
    ids, mask = prompts(6, 4)
    draw = functools.partial(completed, llama, ladders[0], **SAMPLED, rung=4, fast=True, max_new_tokens=3)
    together = draw((ids, mask), seed=[5, 6]).sequences[:, 6:].tolist()
    turned = draw((ids.flip(0), mask.flip(0)), seed=[6, 5]).sequences[:, 6:].tolist()
    alone = draw((ids[1:, 2:], mask[1:, 2:]), seed=6).sequences[:, 4:].tolist()
    assert turned == together[::-1]
    assert alone == together[1:]
    assert draw((ids[1:, 2:], mask[1:, 2:]), seed=8).sequences[:, 4:].tolist() != alone


def test_seeds_are_drawn_from_pytorchs_where_none_is_given(llama, ladders):
    given, tokens = prompts(*[3] * 8), []
    for seed in (1, 1, 2):
        set_seed(seed)
        out = completed(llama, ladders[0], (given[0][:1].repeat(8, 1), given[1]), **SAMPLED | FAST)
        tokens.append(out.sequences[:, -1].tolist())
    assert tokens[0] == tokens[1] != tokens[2]
    assert len(set(tokens[0])) > 1, "rows of one prompt draw apart"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (GREEDY, {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "penalty": 1}),
        ({"do_sample": True}, {"temperature": 1, "top_k": 50, "top_p": 1, "min_p": 0, "penalty": 1}),
        (
            {"do_sample": True, "temperature": 0.75, "top_k": 7, "top_p": 0.5, "min_p": 0.25},
            {"temperature": 0.75, "top_k": 7, "top_p": 0.5, "min_p": 0.25, "penalty": 1},
        ),
        ({"do_sample": True, "top_k": 0}, {"top_k": 0}),
        ({"repetition_penalty": 1.5}, {"temperature": 0, "penalty": 1.5}),
        ({"do_sample": True, "seed": 11}, {"seed": [11, 12]}),
        ({"do_sample": True, "seed": [3, 2**62]}, {"seed": [3, 2**62]}),
    ],
)
def test_what_is_asked_of_sampling_reaches_the_kernel(llama, ladders, made, options, expected):
    completed(llama, ladders[0], prompts(4, 4), **FAST | options)
    (decoder,) = made
    for name, value in expected.items():
        assert getattr(decoder.sampling, name).tolist() == (value if isinstance(value, list) else [value] * 2), name


def test_a_repetition_penalty_knows_the_prompt(llama, ladders):
    given = prompts(8, 5)
    free = completed(llama, ladders[0], given, fast=False, max_new_tokens=1)
    both(llama, ladders[0], (free.sequences, torch.nn.functional.pad(given[1], (0, 1), value=1)),
         repetition_penalty=50.0, max_new_tokens=3)  # fmt: skip


def test_seeds_that_are_not_one_for_each_row_are_refused(llama, ladders):
    with pytest.raises(ValueError, match="seed: expected one for each of 2 rows, got 3"):
        completed(llama, ladders[0], prompts(4, 4), **SAMPLED | FAST, seed=[1, 2, 3])


def test_on_a_gpu_it_is_the_default_and_elsewhere_it_is_not(llama, ladders, monkeypatch):
    found = [completed(llama, ladders[0], prompts(4), fast=way, max_new_tokens=1).path for way in (None, False, True)]
    assert found[1] == "reference: fast=False"
    assert found[2].startswith("fast: ")
    if llama.device.type == "cuda":
        assert found[0] == found[2]
        return
    assert found[0] == "reference: the model is on cpu, and the engine's kernels need a GPU"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"the model is on cpu, and the engine's kernels need a GPU; leave fast out"):
        completed(llama, ladders[0], prompts(4), **FAST)


def assert_refused(model, adapter, reason, **options):
    with pytest.raises(ValueError, match=f"fast: expected .*: {reason}; leave fast out") as error:
        completed(model, adapter, prompts(4), **FAST | options)
    assert "\n" not in str(error.value)


def test_runs_that_are_not_covered_are_refused_with_the_reason(llama, ladders, learned, device):
    assert_refused(llama, ladders[0], "a record of every decision is asked for", return_trace=True)
    percentile = replace(learned, policy=PercentilePolicy(learned.policy.rungs, "complexity"))
    reason = "of the policy: it is of the kind percentile, not learned or fixed"
    assert_refused(llama, ladders[0], reason, policy=percentile, budget=0.5)
    half = tiny.model(device=device).half()
    assert_refused(half, ladders[0], "it computes in float16, not in bfloat16 or float32")
    assert completed(half, ladders[0], prompts(4), max_new_tokens=1).path.startswith("reference: ")


def test_another_family_is_refused_and_served(tiny_gpt2, tiny_gpt2_factory, make_peft_adapter, tmp_path, device):
    gpt2_adapter = make_peft_adapter(tiny_gpt2_factory, tmp_path)
    tiny_gpt2.to(device)
    assert_refused(tiny_gpt2, gpt2_adapter, "the model is gpt2, not one of llama, mistral, qwen2, qwen3")
    path = completed(tiny_gpt2, gpt2_adapter, prompts(4), max_new_tokens=1).path
    assert path.startswith("reference: the model is ")


class Anything(LogitsProcessor, StoppingCriteria):
    """Changes nothing, and stops nothing."""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 2),
        ("logits_processor", [Anything()]),
        ("stopping_criteria", [Anything()]),
        ("stop_strings", ["a"]),
        ("num_return_sequences", 2),
        ("output_scores", True),
    ],
)
def test_calls_that_are_not_covered_are_refused_with_the_reason(llama, ladders, name, value):
    assert_refused(llama, ladders[0], f"{name} is asked for", **{name: value})


def test_what_the_models_generation_config_asks_for_counts(llama, ladders, monkeypatch):
    monkeypatch.setattr(llama.generation_config, "no_repeat_ngram_size", 2)
    assert_refused(llama, ladders[0], "no_repeat_ngram_size is asked for")


def test_a_seed_on_the_reference_path_is_refused(llama, ladders):
    with pytest.raises(ValueError, match="seed: expected none on the reference path, got 3; use"):
        completed(llama, ladders[0], prompts(4), max_new_tokens=1, fast=False, seed=3)


def test_the_path_is_said_of_every_call_and_generate_comes_back(llama, ladders):
    ids = prompts(4)[0].to(llama.device)
    with adaptive(llama, ladders[0], fast=True) as run:
        assert run.path == ""
        llama.generate(ids, **GREEDY, max_new_tokens=1)
        assert run.path.startswith("fast: ")
        with pytest.raises(ValueError, match="num_beams is asked for"):
            llama.generate(ids, num_beams=2, max_new_tokens=1)
    assert "generate" not in vars(llama)
    recorded = adaptive(llama, ladders[0], keep_record=True, fast=True)
    with pytest.raises(ValueError, match="a record of every decision is asked for"), recorded:
        pass
    assert "generate" not in vars(llama)


class Letters:
    """As much of a tokenizer as a streamer needs: a letter or a space for every token."""

    def decode(self, ids, **options):
        return "".join(" " if token % 3 == 0 else chr(97 + int(token) % 26) for token in ids)


class Pieces(TextStreamer):
    def __init__(self):
        super().__init__(Letters(), skip_prompt=True)
        self.values, self.pieces = [], []

    def put(self, value):
        self.values.append(value.tolist())
        super().put(value)

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append((text, stream_end))


def test_a_streamer_is_given_the_same_pieces(llama, ladders):
    given, options = prompts(5), {"rung": 2, "max_new_tokens": 6}
    end = int(completed(llama, ladders[0], given, **options, fast=False).sequences[0, 5 + 2])
    fast, reference = Pieces(), Pieces()
    for streamer, way in ((fast, True), (reference, False)):
        completed(llama, ladders[0], given, **options | {"eos_token_id": end}, streamer=streamer, fast=way)
    assert fast.values == reference.values
    assert fast.pieces == reference.pieces
    assert fast.pieces[-1][1]
    assert 2 < len(fast.values) < 7, "the prompt, some tokens, and none behind the end"

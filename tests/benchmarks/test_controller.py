"""The controller's benchmark: what every stage is given, what is recorded, and that its folder is gone on from."""

import json

import pytest
import torch

from benchmarks import controller
from benchmarks.own_text import FIRST_TOKENS, GREEDY, SAMPLED, continued
from policy.settings import AGE, HIDDEN, LOOKS, PAPER_SIGNALS, SIGNALS
from runtime import build_ladder, load_adapter
from runtime.plan import static_plan
from runtime.reference.adaptive import activate
from training.documents import make_batch
from training.learn.module import DAMAGE, LATENCY

AMOUNTS = (
    "train_documents=6", "validation_documents=3", "test_documents=4", "max_tokens=48", "later_chunks=2", "epochs=2",
    "own_documents=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs in one folder, the second with more to do: records, what they said, and what stages were given."""
    root, given = tmp_path_factory.mktemp("controller"), {"curve": [], "learn": [], "texts": []}
    with pytest.MonkeyPatch.context() as patch:
        for name, key in (("policy_curve", "curve"), ("train_policies", "learn"), ("continued", "texts")):
            patch.setattr(controller, name, spy(getattr(controller, name), given[key]))
        records, said = [], []
        for number, only in enumerate((["default"], ["default", "four signals", "chunks of 4"])):
            output, lines = root / f"{number}.json", []
            patch.setattr(controller, "print", lambda *text, lines=lines, **_: lines.append(" ".join(map(str, text))),
                          raising=False)  # fmt: skip
            patch.setattr("sys.argv", ["controller", "--folder", str(root / "work"), "--seeds", "2", "--own-text", "8",
                                       "--output", str(output), "--amounts", *AMOUNTS, "--only", *only])  # fmt: skip
            controller.main()
            records.append(json.loads(output.read_text()))
            said.append(lines)
    return records, said, given


def spy(call, into):
    def spied(*args, **kwargs):
        into.append((args, kwargs))
        return call(*args, **kwargs)

    return spied


def test_every_variant_is_recorded_with_what_it_was_measured_on(runs):
    (first, second), _, _ = runs
    own = [f"default, the model's own text, {how}" for how in (GREEDY, SAMPLED)]
    assert [*first["variants"]] == ["default", *own]
    assert [*second["variants"]] == ["default", *own, "four signals", "chunks of 4"]
    assert second["amounts"]["train_documents"] == 6
    assert second["amounts"]["seeds"] == 2
    for name, found in second["variants"].items():
        assert found["seeds"] == 2
        assert found["documents"] == 4
        assert len(found["rungs"]) == len(found["bytes_saved"]) == len(found["interval_95"]) == 3
        assert name not in own or found["tokens"] <= 4 * 8


def test_a_folder_is_gone_on_from(runs):
    (first, second), (_, said), _ = runs
    assert first["variants"]["default"] == second["variants"]["default"]
    collected = [line for line in said if "collected" in line and not line.endswith(" 0 collected")]
    # Of the same chunks nothing is collected twice: what is new is what other policies left, and longer chunks.
    first_new = next(index for index, line in enumerate(said) if line in collected)
    assert said.index(next(line for line in said if line.startswith("default: "))) < first_new


def test_knobs_are_set_on_validation_and_measured_on_test_documents(runs):
    _, _, given = runs
    assert len(given["curve"]) == 2 + 3 * 2
    for (_, _, settings, validation, test, _, _), _ in given["curve"]:
        assert settings.block_tokens == 1
        (few,), (more,) = validation.scorers, test.scorers
        assert (len(few.examples), len(more.examples)) == (3, 4)
        texts = [{tuple(own["input_ids"]) for own in scorer.examples} for scorer in (few, more)]
        assert not texts[0] & texts[1]


def test_a_variant_learns_what_it_is_called(runs):
    _, _, given = runs
    learned = [args[4] for args, _ in given["learn"]]
    assert [own.signals for own in learned] == [
        controller.DEFAULT,
        controller.DEFAULT,
        PAPER_SIGNALS,
        controller.DEFAULT,
    ]
    assert {own.objective for own in learned} == {DAMAGE}
    chunks = [args[2].settings.chunk for args, _ in given["learn"]]
    assert [(own.min_tokens, own.max_tokens) for own in chunks] == [(1, 1)] * 3 + [(4, 4)]
    assert [args[0].amounts.rounds for args, _ in given["learn"]] == [1, 1, 1, 0]


def test_own_text_follows_the_test_documents_prompts(runs):
    _, _, given = runs
    tests = [args[4].scorers[0].examples for args, _ in given["curve"]]
    assert all(args[2] == tests[0] for args, _ in given["texts"])
    assert [args[4] for args, _ in given["texts"]] == [GREEDY, SAMPLED] * 2


def test_variants_leave_out_what_they_say():
    every = controller.variants()
    for signal in SIGNALS:
        assert every[f"{signal} alone"].signals == (signal,)
        assert {*every[f"without {signal}"].signals} == {*SIGNALS, AGE} - {signal}
    assert every["hidden"].signals == LOOKS
    assert HIDDEN in LOOKS
    assert every["latency objective"].objective == every["latency objective, learned scales"].objective == LATENCY
    assert every["latency objective, learned scales"].scales == (0.8, 1.0, 1.2)


@pytest.fixture
def written(tiny_llama_factory, make_peft_adapter, tmp_path):
    """(the model, its ladder, three documents, what is written after their prompts by `how`)."""
    model = tiny_llama_factory()
    ladder = build_ladder(load_adapter(make_peft_adapter(tiny_llama_factory, tmp_path / "adapter", r=4)))
    ids = torch.randint(3, 256, (3, FIRST_TOKENS + 6), generator=torch.Generator().manual_seed(0)).tolist()
    documents = [{"id": str(n), "input_ids": own, "prompt_tokens": (9, 5, 1)[n]} for n, own in enumerate(ids)]
    return model, ladder, documents, lambda how: continued(model, ladder, documents, 12, how)


def likeliest(model, ladder, text):
    """What the exact adapter puts first after every token of a text."""
    batch = make_batch([text])
    with activate(model, static_plan(ladder, ladder.rungs[-1])):
        return model(input_ids=batch.tokens).logits[0].argmax(-1).tolist()


def test_greedy_text_is_the_exact_adapters_likeliest_after_the_prompt(written):
    model, ladder, documents, write = written
    model.generation_config.eos_token_id = None
    found = write(GREEDY)
    assert [own["prompt_tokens"] for own in found] == [9, 5, FIRST_TOKENS]
    for text, document in zip(found, documents, strict=True):
        start = text["prompt_tokens"]
        assert text["input_ids"][:start] == document["input_ids"][:start]
        assert len(text["input_ids"]) == start + 12
        assert text["input_ids"][start:] == likeliest(model, ladder, text)[start - 1 : -1]


def test_a_text_ends_with_the_end_of_text_token_and_is_left_out_without_a_choice(written):
    model, _, _, write = written
    model.generation_config.eos_token_id = None
    texts = write(GREEDY)
    first, second = (own["input_ids"][own["prompt_tokens"] :] for own in texts[:2])
    ends = [second[0], first[3]]
    model.generation_config.eos_token_id = ends
    found = {own["id"]: own["input_ids"][own["prompt_tokens"] :] for own in write(GREEDY)}
    assert "1" not in found
    cut = next(place for place, token in enumerate(first) if token in ends)
    assert 0 < cut < len(first) - 1, "the test needs a text that ends early"
    assert found["0"] == first[: cut + 1]


def test_sampled_text_is_drawn_from_the_seed_alone(written):
    model, ladder, documents, write = written
    model.generation_config.eos_token_id = None
    torch.manual_seed(1)
    once = write(SAMPLED)
    state = torch.random.get_rng_state()
    assert write(SAMPLED) == once != write(GREEDY)
    assert torch.equal(state, torch.random.get_rng_state())
    assert continued(model, ladder, documents, 12, SAMPLED, seed=1) != once

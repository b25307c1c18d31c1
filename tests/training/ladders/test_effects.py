"""Effects held against autograd of a coefficient on one direction at one token."""

import pytest
import torch

from training.ladders.effects import enough, measure_effects

SEED = 7
MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")


def rows_of(examples):
    """Tokens padded on the right, what is real, and by hand where a completion token is predicted."""
    width = max(len(own["input_ids"]) for own in examples)
    tokens = torch.zeros(len(examples), width, dtype=torch.long)
    real, scored = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for i, own in enumerate(examples):
        length = len(own["input_ids"])
        tokens[i, :length], real[i, :length] = torch.tensor(own["input_ids"]), 1
        for t in range(length - 1):
            scored[i, t] = t + 1 >= own["prompt_tokens"]
    return tokens, real, scored


def brute_force(model, pair, name, k, examples):
    """Mean square over completion tokens of d(-log p of a drawn token) / d(direction k at each token)."""
    tokens, real, scored = rows_of(examples)
    a, b = pair
    coefficients = torch.zeros(tokens.shape, requires_grad=True)

    def insert(module, args, output):
        return output + (coefficients * (args[0] @ a[k]))[..., None] * b[k]

    handle = model.get_submodule(name).register_forward_hook(insert)
    log_p = model(tokens, attention_mask=real).logits[scored].float().log_softmax(-1)
    handle.remove()
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    (slope,) = torch.autograd.grad(-log_p.gather(1, drawn).sum(), coefficients)
    return float(slope.double().square().sum() / scored.sum())


@pytest.fixture(scope="module")
def examples(make_example):
    """One batch, in the order of their lengths; 20 and 9 prompt tokens."""
    return [make_example(24, 0, seed=1), make_example(25, 20, seed=2), make_example(28, 9, seed=3)]


@pytest.fixture(scope="module")
def found(tiny_llama_factory, exact, measured, examples):
    directions = {name: measured.pairs[name] for name in MODULES}
    return measure_effects(tiny_llama_factory(), exact, directions, examples, seed=SEED)


@pytest.mark.parametrize("name", MODULES)
def test_effects_are_squared_slopes_at_the_exact_adapter(name, found, tiny_llama, source, measured, examples, merged):
    model = merged(tiny_llama, source)
    assert found[name].dtype == torch.float64
    assert found[name].shape == (8,)
    for k in (0, 1, 7):
        expected = brute_force(model, measured.pairs[name], name, k, examples)
        assert float(found[name][k]) == pytest.approx(expected, rel=2e-3)


def test_prompts_and_padding_are_not_sampled(tiny_llama, exact, measured, examples, monkeypatch):
    """By counting what is drawn: completion tokens alone."""
    drawn = []
    original = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *args, **kw: drawn.append(len(p)) or original(p, *args, **kw))
    measure_effects(tiny_llama, exact, {MODULES[0]: measured.pairs[MODULES[0]]}, examples, seed=SEED)
    assert drawn == [23 + 5 + 19]


def test_it_follows_from_the_seed(tiny_llama, exact, measured, examples, found):
    directions = {name: measured.pairs[name] for name in MODULES}
    again = measure_effects(tiny_llama, exact, directions, examples, seed=SEED)
    other = measure_effects(tiny_llama, exact, directions, examples, seed=SEED + 1)
    for name in MODULES:
        assert torch.equal(again[name], found[name])
        assert not torch.equal(other[name], found[name])


def test_batches_share_the_work(tiny_llama, exact, measured, examples, found):
    """What is drawn differs from batching to batching, and with it the effects, but not by much."""
    directions = {name: measured.pairs[name] for name in MODULES}
    single = measure_effects(tiny_llama, exact, directions, examples, seed=SEED, tokens_per_step=1)
    for name in MODULES:
        assert 0.3 < float(single[name].sum() / found[name].sum()) < 3


def test_the_model_is_as_it_was(tiny_llama, exact, measured, examples, unchanged):
    tiny_llama.train()
    tiny_llama.lm_head.weight.requires_grad_(False)
    check = unchanged(tiny_llama)
    measure_effects(tiny_llama, exact, measured.pairs, examples, seed=SEED)
    check()
    with pytest.raises(RuntimeError):
        measure_effects(tiny_llama, exact, {MODULES[0]: (torch.ones(2, 3), torch.ones(2, 3))}, examples, seed=SEED)
    check()


@pytest.mark.parametrize("documents", [[], [{"id": "0", "input_ids": [5, 6, 7], "prompt_tokens": 3}]])
def test_text_without_a_completion_is_refused_in_one_line(documents, tiny_llama, exact, measured):
    with pytest.raises(ValueError, match=r"^documents: expected completion tokens to measure effects on, got none; .*"):
        measure_effects(tiny_llama, exact, measured.pairs, documents, seed=SEED)


@pytest.mark.parametrize(
    ("completion", "most", "count"),
    [(1, 1000, 1), (9, 1000, 1), (10, 1000, 2), (14, 1000, 2), (15, 1000, 3), (99, 1000, 3), (99, 10, 1), (99, 11, 2),
     (0, 1000, 0)],
)  # fmt: skip
def test_enough_counts_completion_tokens_and_has_a_limit_of_text(completion, most, count):
    # 9, 5 and 3 of them: the first token of a text is never predicted
    lengths = ((10, 0), (10, 5), (10, 7))
    documents = [{"input_ids": list(range(length)), "prompt_tokens": prompt} for length, prompt in lengths]
    assert enough(documents, completion, most) == documents[:count]

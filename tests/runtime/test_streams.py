"""Several copies of a text in one pass: the first is the text, the others ask what one token would be at another rung.

A probe sees the first copy for the past and itself for the present, whatever the model's own rule of attention is.

And streams of the controller that are told what was measured of logits instead of the logits.
"""

from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
)

from policy import FixedPolicy, Operating, Settings
from runtime import load_adapter
from runtime.control.record import Keep
from runtime.control.signals import log_probabilities, next_token_entropy, surprisal
from runtime.control.stream import Stream
from runtime.plan import static_plan
from runtime.reference.adaptive import activate
from runtime.reference.mask import Streams
from tests.runtime.drawn import RUNGS, VOCABULARY, make_stream
from tests.runtime.reference import handmade_ladder, seeded_model

# A copy sums in another order than the text alone: a few fp32 roundings of logits of size 10.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
LENGTHS, PROBES = (24, 17), 3
TOKENS, COPIES = max(LENGTHS), 1 + PROBES
SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]


def configs() -> dict:
    """Made anew for every model: transformers writes into the dicts it is given."""
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return {
        "llama": LlamaConfig(**SHAPE),
        "gpt2": GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2),
        "mistral, window": MistralConfig(**SHAPE, sliding_window=5),
        "gemma3, window in one layer": Gemma3TextConfig(**SHAPE, sliding_window=5, layer_types=list(MIXED)),
        "llama4, chunks": Llama4TextConfig(
            **SHAPE, no_rope_layers=[1, 0], attention_chunk_size=7, intermediate_size_mlp=48, num_local_experts=2,
            num_experts_per_tok=1, interleave_moe_layer_step=2, attn_temperature_tuning=False,
        ),
        "llama, beyond its context": LlamaConfig(**SHAPE, max_position_embeddings=16, rope_parameters=dynamic),
    }  # fmt: skip


def model_of(name: str) -> nn.Module:
    return seeded_model(configs()[name])


@pytest.fixture(scope="module", params=list(configs()))
def run(request, make_peft_adapter, tmp_path_factory):
    """A run of every kind of mask, and of a ladder whose rungs differ in directions, bits and banks."""
    targets = {"gpt2": ["c_attn", "c_fc"]}.get(request.param, ["q_proj", "k_proj", "v_proj", "o_proj"])
    folder = make_peft_adapter(
        lambda: model_of(request.param), tmp_path_factory.mktemp("adapter") / "a", alpha=64, target_modules=targets
    )
    ladder = handmade_ladder(load_adapter(folder))
    with activate(model_of(request.param), static_plan(ladder, ladder.rungs[-1])) as run:
        yield run


@pytest.fixture
def texts():
    """Tokens [B, T], which of them are real, and one more text of the same shape."""
    drawn = torch.randint(3, 128, (2, len(LENGTHS), TOKENS), generator=torch.Generator().manual_seed(0))
    return drawn[0], torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None], drawn[1]


def mixed(run, seed: int, copies: int = 1):
    """[B, copies * T, J] any rung at any scale for every token; every third one fades between two."""
    generator = torch.Generator().manual_seed(seed)
    rungs, shape = len(run.plan.ladder.rungs), (2, len(LENGTHS), copies * TOKENS)
    one, other = torch.nn.functional.one_hot(torch.randint(0, rungs, shape, generator=generator), rungs)
    share = torch.where(torch.arange(shape[2]) % 3 == 1, 0.3, 0.0)[:, None]
    return torch.lerp(one.float(), other.float(), share) * (0.8 + 0.4 * torch.rand(*shape[1:], 1, generator=generator))


def beside() -> Streams:
    """The text and its probes, slot by slot: a token sees itself, and of the first copy what comes before it."""
    places = [(copy, at) for copy in range(COPIES) for at in range(TOKENS)]
    sees = [[one == other or (other[0] == 0 and other[1] < one[1]) for other in places] for one in places]
    return Streams(torch.tensor([at for _, at in places]), torch.tensor(sees))


def of_copies(run, tokens, real, weights):
    """[B, COPIES, T, V] logits of every copy: tokens [B, T] or [B, COPIES * T], weights [B, COPIES * T, J]."""
    tokens = tokens.repeat(1, COPIES) if tokens.shape[1] == TOKENS else tokens
    return run.gated(tokens, real.repeat(1, COPIES), weights, streams=beside()).unflatten(1, (COPIES, TOKENS))


def test_the_first_copy_is_the_text_alone(run, texts):
    tokens, real, _ = texts
    weights = mixed(run, 0, COPIES)
    alone = run.gated(tokens, real, weights[:, :TOKENS])
    found = of_copies(run, tokens, real, weights)
    torch.testing.assert_close(found[:, 0][real], alone[real], **CLOSE)
    assert found.isfinite().all(), "padding too"
    assert all((found[:, copy][real] - alone[real]).abs().max() > 0.1 for copy in range(1, COPIES))


def test_a_probe_at_the_rungs_of_the_text_gives_the_logits_of_the_text(run, texts):
    tokens, real, _ = texts
    weights = mixed(run, 1)
    found = of_copies(run, tokens, real, weights.repeat(1, COPIES, 1))
    for copy in range(COPIES):
        torch.testing.assert_close(found[:, copy][real], found[:, 0][real], **CLOSE)
    torch.testing.assert_close(found[:, 0][real], run.gated(tokens, real, weights)[real], **CLOSE)


def test_a_probe_is_the_text_with_one_token_at_another_rung(run, texts):
    """Every probed token beside a run of its own, in which nothing else has changed."""
    tokens, real, _ = texts
    weights = mixed(run, 2, COPIES)
    found = of_copies(run, tokens, real, weights)
    for at in range(TOKENS):
        for copy in range(1, COPIES):
            changed = weights[:, :TOKENS].clone()
            changed[:, at] = weights[:, copy * TOKENS + at]
            own = run.gated(tokens, real, changed)[:, at]
            torch.testing.assert_close(found[:, copy, at][real[:, at]], own[real[:, at]], **CLOSE)


@pytest.mark.parametrize("at", [0, 9, TOKENS - 1])
def test_a_probe_sees_neither_what_comes_later_nor_other_probes(run, texts, at):
    """Of all that is changed, tokens and rungs, nothing moves the token that is asked about; its past does."""
    tokens, real, other = texts
    tokens, other, real = (x.repeat(1, COPIES) for x in (tokens, other, real))
    weights, others = mixed(run, 3, COPIES), mixed(run, 4, COPIES)
    copy, position = torch.arange(COPIES).repeat_interleave(TOKENS), torch.arange(TOKENS).repeat(COPIES)
    asked = (copy == 2) & (position == at)
    past = (copy == 0) & (position < at)
    there = real[:, asked][:, 0]

    def logits(changed):
        own_tokens = torch.where(changed, other, tokens)
        own_weights = torch.where(changed[:, None], others, weights)
        return run.gated(own_tokens, real, own_weights, streams=beside())

    before = logits(torch.zeros_like(asked))
    unseen = ~asked & ~past
    for changed in (unseen, unseen & (copy == 0), unseen & (copy == 2), unseen & (copy % 2 == 1)):
        torch.testing.assert_close(logits(changed)[:, asked][there], before[:, asked][there], **CLOSE)
    if at:
        moved = logits(past & (position >= at - 2))[:, asked][there] - before[:, asked][there]
        assert moved.abs().max() > 0.1
    # nor does the text see its probes
    of_text = real & (copy == 0)
    torch.testing.assert_close(logits(copy > 0)[of_text], before[of_text], **CLOSE)


def test_padding_of_a_text_is_seen_by_none_of_its_copies(run, texts):
    tokens, real, other = texts
    weights = mixed(run, 5, COPIES)
    found = of_copies(run, tokens, real, weights)
    again = of_copies(run, torch.where(real, tokens, other), real, weights)
    whole = real[:, None].expand(-1, COPIES, -1)
    torch.testing.assert_close(again[whole], found[whole], **CLOSE)


BLOCKS = {
    "full": [(4, 4, 4), (1, 1, 1), (3, 3, 3)],
    "padded": [(4, 2, 1), (1, 3, 2), (2, 2, 3)],
    "some rows without tokens": [(0, 3, 2), (2, 0, 0), (0, 0, 1), (3, 0, 2)],
}
"""Of every block how many tokens each row has."""


def closed_otherwise(stream: Stream, counts: tuple[int, ...], logits, attention, states):
    """`close_block`, told what was measured; whatever of it is of no token is drawn, and of no row NaN."""
    log_p, tokens = log_probabilities(logits), stream._tokens
    real = torch.arange(logits.shape[1]) < torch.tensor(counts)[:, None]
    entropy = torch.where(real, next_token_entropy(log_p), torch.rand(real.shape))
    own = surprisal(log_p[:, :-1], tokens[:, 1:])
    following = torch.where(real[:, 1:], own, torch.rand(own.shape))
    latest = torch.full((len(counts), VOCABULARY), torch.nan)
    for row, count in enumerate(counts):
        if count:
            latest[row] = log_p[row, count - 1]
    return stream.close_outputs(entropy, attention, following, latest, states)


def tensors_of(own) -> list[torch.Tensor]:
    """All that a record holds, whatever records are in it."""
    if isinstance(own, torch.Tensor):
        return [own]
    return [one for field in fields(own) for one in tensors_of(getattr(own, field.name))] if is_dataclass(own) else []


@pytest.mark.parametrize("name", BLOCKS)
def test_what_was_measured_of_logits_says_as_much_as_they_do(name):
    """To the bit: complexities, and all that a stream knows after every block."""
    generator, settings = torch.Generator().manual_seed(0), Settings(block_tokens=4)
    made = [
        make_stream(
            settings, FixedPolicy(RUNGS), Operating.at(1.0, torch.full((3,), 4)), keep=Keep.DECISIONS, hidden=True
        )
        for _ in range(2)
    ]
    for counts in BLOCKS[name]:
        steps = max(counts)
        real = torch.arange(steps) < torch.tensor(counts)[:, None]
        tokens = torch.randint(0, VOCABULARY, (3, steps), generator=generator)
        logits = 3 * torch.randn(3, steps, VOCABULARY, generator=generator)
        attention = torch.rand(3, steps, generator=generator)
        embeddings, states = torch.randn(2, 3, steps, 5, generator=generator)
        for stream in made:
            stream.open_block(tokens, real, full=name == "full", embeddings=embeddings)
        whole, measured = made
        before = whole.expected
        complexity = whole.close_block(logits, attention, states)
        found = closed_otherwise(measured, counts, logits, attention, states)
        assert torch.equal(found[real], complexity[real])
        for one, other in zip(tensors_of(whole.state), tensors_of(measured.state), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(whole.expected, measured.expected)
        assert torch.equal(whole.latest_state, measured.latest_state)
        for row, count in enumerate(counts):
            kept = torch.zeros(VOCABULARY) if before is None else before[row]
            own = log_probabilities(logits[row, count - 1]) if count else kept
            assert torch.equal(measured.expected[row], own)
    one, other = (stream.columns() for stream in made)
    there = one["real"]
    for name, values in one.items():
        assert torch.equal(values[there], other[name][there]), name

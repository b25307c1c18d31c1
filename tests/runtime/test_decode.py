"""`forward` with blocks of one token and step-by-step decode take the same decisions, token for token."""

from dataclasses import replace

import pytest
import torch

from policy import SIGNALS, ChunkSettings, KVSettings, PercentilePolicy
from runtime import build_ladder, load_adapter
from runtime.control.record import Keep
from runtime.reference.adaptive import activate
from tests.runtime.reference import WavyPolicy, drawn_tables, row_of

DOCUMENTS, TOKENS = 50, 96
KV = KVSettings("int8", "int4", threshold=0.5, sink_pages=1, window_tokens=32)


@pytest.fixture(scope="module")
def documents(pack_tokenizer, pack_documents):
    texts = [document["completion"] for document in pack_documents("wikitext", 400)]
    # lengths from 25 tokens or so up to the full 96
    texts = [text[: 100 + 8 * i] for i, text in enumerate(text for text in texts if len(text) > 500)][:DOCUMENTS]
    assert len(texts) == DOCUMENTS
    return pack_tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=TOKENS)


def test_forward_by_single_tokens_equals_decode_on_fifty_documents(
    documents, datapack, base_model_path, load_model, make_plan
):
    ids, mask = documents["input_ids"], documents["attention_mask"]
    assert mask.sum(1).min() < mask.sum(1).max(), "documents of different lengths, padded on the left"
    plan = make_plan(
        build_ladder(load_adapter(datapack / "adapters" / "wikitext")),
        lambda rungs: PercentilePolicy(
            rungs, "entropy", torch.linspace(0, 0.7, 101), scales=torch.linspace(1.3, 1, 9), spread=5.0
        ),
        knob=4.5,
        block_tokens=1,
        chunk=ChunkSettings(2, 8),
        kv=KV,
    )
    model = load_model(base_model_path)
    with activate(model, plan, keep=Keep.DECISIONS) as run:
        whole = model(ids, attention_mask=mask)
        once = run.last.stream.columns()
        cache = run.new_cache(DOCUMENTS)
        steps = [
            model(ids[:, t, None], attention_mask=mask[:, : t + 1], past_key_values=cache).logits for t in range(TOKENS)
        ]
        stepwise = run.last.stream.columns()
    assert once["rung"][once["real"]].unique().numel() == 9, "the policy visits every rung"
    for row in range(DOCUMENTS):
        one, other = row_of(once, row), row_of(stepwise, row)
        assert len(one["rung"]) == mask[row].sum()
        for name in ("positions", "opens", "rung", "scale", "active", "held_valid"):
            assert torch.equal(one[name], other[name]), f"{name} of document {row}"
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[real], whole.logits[real], atol=1e-4, rtol=0)


def by_complexity(rungs):
    return PercentilePolicy(rungs, "complexity", torch.linspace(0.4, 0.8, 101), spread=3.0)


def by_surprisal(rungs):
    return PercentilePolicy(rungs, "surprisal", torch.linspace(0.5, 1, 101), spread=3.0, sign=-1)


def by_pair(rungs):
    return PercentilePolicy(rungs, "pair", spread=3.0, of="token")


@pytest.mark.parametrize(
    ("policy_of", "chunk", "fade"),
    [
        (by_complexity, ChunkSettings(2, 6), 1),
        (by_surprisal, ChunkSettings(), 1),
        (by_pair, ChunkSettings(), 1),
        (WavyPolicy, ChunkSettings(), 1),
        (WavyPolicy, ChunkSettings(1, 5), 1),
        (WavyPolicy, ChunkSettings(4, 16), 4),
    ],
    ids=["complexity", "surprisal", "pair", "every signal", "every signal, chunks", "every signal, faded chunks"],
)
def test_generated_tokens_are_decided_as_forward_decides_them(
    tiny_llama, llama_adapter, make_plan, policy_of, chunk, fade
):
    ladder = replace(build_ladder(load_adapter(llama_adapter)), difficulty=drawn_tables(2))
    plan = make_plan(
        ladder, policy_of, knob=1.6, block_tokens=1, prompt_tokens=1, chunk=chunk, fade_tokens=fade
    )  # fmt: skip
    prompt = torch.randint(3, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run:
        sequences = tiny_llama.generate(prompt, max_new_tokens=40, min_new_tokens=40, do_sample=False)
        generated = run.last.stream.columns()
        cache = run.new_cache(3, prompt_tokens=torch.tensor([17, 17, 17]))
        logits = tiny_llama(sequences[:, :-1], past_key_values=cache).logits
        forward = run.last.stream.columns()
    assert generated["rung"].unique().numel() > 2
    for name in ("positions", "opens", "rung", "scale", "held_valid", "first", "age"):
        assert torch.equal(generated[name], forward[name]), name
    for signal, name in enumerate(SIGNALS):
        assert generated["held_valid"][:, -1, signal].all(), name
        torch.testing.assert_close(generated["held"][:, :, signal], forward["held"][:, :, signal], atol=1e-5, rtol=0)
    # the end of sequence was forbidden in generate
    logits[..., 2] = -torch.inf
    assert torch.equal(logits[:, 16:].argmax(-1), sequences[:, 17:])


@pytest.mark.parametrize("policy_of", [by_complexity, by_surprisal])
@pytest.mark.parametrize("block", [1, 4, 32])
def test_row_of_a_padded_batch_is_generated_as_it_is_alone(tiny_llama, llama_adapter, make_plan, block, policy_of):
    """The shortest prompt waits, seeing only padding, while the longest is still being read."""
    plan = make_plan(
        build_ladder(load_adapter(llama_adapter)),
        policy_of,
        knob=1.6,
        prompt_tokens=block,
        chunk=ChunkSettings(2, 6),
        kv=KVSettings("int8", "int4", sink_pages=1, window_tokens=8),
    )
    ids = torch.randint(3, 20, (3, 37), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(37) >= torch.tensor([0, 34, 15])[:, None]).long()
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run:
        tokens = tiny_llama.generate(ids * mask, attention_mask=mask, **options)
        together = run.last.stream.columns()
        for row in range(3):
            prompt = ids[row][mask[row].bool()][None]
            alone = tiny_llama.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert torch.equal(tokens[row, 37:], alone[0, prompt.shape[1] :])
            one, other = row_of(together, row), row_of(run.last.stream.columns(), 0)
            for name in ("positions", "opens", "rung", "scale", "active", "held_valid"):
                assert torch.equal(one[name], other[name]), name

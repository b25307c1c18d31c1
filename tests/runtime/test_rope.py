"""RoPE whose frequencies depend on the length of the call: those of the whole call, whatever the blocks."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV2Config, Gemma3TextConfig, LlamaConfig, Phi3Config

from policy import KVSettings, Operating
from policy.settings import ChunkSettings
from runtime import adaptive, build_ladder, generate, load_adapter
from runtime.control.record import Keep
from runtime.loading import context_limit
from runtime.plan import STATIC_BLOCK_TOKENS, static_plan
from runtime.reference.adaptive import activate

from .reference import PositionPolicy, seeded_model

ORIGINAL, STRETCHED = 64, 256
LONG = 80
SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": STRETCHED / ORIGINAL, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 1.9, 2.8, 3.7],
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "qkv_proj", "kv_a_proj_with_mqa", "o_proj"]


def configs() -> dict:
    """Made anew for every model: transformers writes into the dicts it is given."""
    return {
        "llama, dynamic": LlamaConfig(**SHAPE, max_position_embeddings=ORIGINAL, rope_parameters=dict(DYNAMIC)),
        "llama, longrope": LlamaConfig(
            **SHAPE, max_position_embeddings=STRETCHED, rope_parameters={**LONGROPE, "factor": STRETCHED / ORIGINAL}
        ),
        "phi3, longrope": Phi3Config(
            **SHAPE, max_position_embeddings=STRETCHED, original_max_position_embeddings=ORIGINAL,
            rope_parameters=dict(LONGROPE),
        ),
        "gemma3, dynamic in its full layers": Gemma3TextConfig(
            **SHAPE, head_dim=8, max_position_embeddings=ORIGINAL, sliding_window=11,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": dict(DYNAMIC),
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        "deepseek, dynamic, complex numbers": DeepseekV2Config(
            **{**SHAPE, "num_key_value_heads": 4}, max_position_embeddings=ORIGINAL, rope_parameters=dict(DYNAMIC),
            q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
            first_k_dense_replace=2,
        ),
    }  # fmt: skip


def model_of(name: str) -> nn.Module:
    return seeded_model(configs()[name])


@pytest.fixture(scope="module", params=list(configs()))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folders(make_peft_adapter, tmp_path_factory):
    """`folders(name)`: an adapter of the attention of that model, made once."""
    made = {}

    def folder(name):
        if name not in made:
            path = tmp_path_factory.mktemp("adapters") / str(len(made))
            made[name] = make_peft_adapter(lambda: model_of(name), path, r=4, target_modules=ATTENTION)
        return made[name]

    return folder


def rows_of(longest: int) -> dict:
    """Rows of `longest`, 23 and `longest` - 23 tokens, padded on the left."""
    ids = torch.randint(3, 128, (3, longest), generator=torch.Generator().manual_seed(longest))
    mask = (torch.arange(longest) >= torch.tensor([0, longest - 23, 23])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def greedy(new: int) -> dict:
    """`new` tokens, none of them the padding: a row is taken to end where that comes."""
    exactly = {"max_new_tokens": new, "min_new_tokens": new}
    return {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [0], **exactly}


def plan_of(folder, block_tokens: int):
    plan = static_plan(build_ladder(load_adapter(folder)), 4)
    return replace(plan, settings=replace(plan.settings, block_tokens=block_tokens, prompt_tokens=block_tokens))


@pytest.fixture(scope="module", params=[LONG, ORIGINAL - 8], ids=["beyond from the start", "crossing on the way"])
def expected(request, name, folders, peft_load):
    """A batch, and PEFT's logits and greedy tokens for it."""
    batch = rows_of(request.param)
    real = batch["attention_mask"].bool()
    reference = peft_load(model_of(name), folders(name))
    with torch.no_grad():
        logits = reference(**batch, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits[real]
    # Phi-3 starts its cache anew at the crossing, as if it had none; some versions of transformers fail to.
    return batch, logits, reference.generate(**batch, **greedy(16), use_cache="phi3" not in name)


@pytest.mark.parametrize("block_tokens", [STATIC_BLOCK_TOKENS, 32, 7])
def test_top_rung_equals_peft_beyond_the_original_context(name, folders, expected, block_tokens):
    batch, logits, tokens = expected
    model = model_of(name)
    with activate(model, plan_of(folders(name), block_tokens)):
        mine = model(**batch).logits[batch["attention_mask"].bool()]
        torch.testing.assert_close(mine, logits, atol=1e-4, rtol=0)
        assert torch.equal(model.generate(**batch, **greedy(16)), tokens)


def test_frequencies_of_a_text_do_not_depend_on_the_texts_before_it(name, folders):
    """Dynamic NTK of transformers keeps those of the longest call: a text of 100 tokens after one of 200 has others."""
    folder, text = folders(name), rows_of(LONG)
    with adaptive(model_of(name), folder) as run:
        expected = run.model(**text).logits
    model = model_of(name)
    with torch.no_grad():
        plain = model(**text).logits
    with adaptive(model, folder):
        model(**rows_of(2 * LONG))
        torch.testing.assert_close(model(**text).logits, expected, atol=1e-5, rtol=0)
        model(**rows_of(2 * LONG))
    with torch.no_grad():
        torch.testing.assert_close(model(**text).logits, plain, atol=1e-5, rtol=0)


def test_a_measured_document_has_the_frequencies_of_its_own_call(name, folders, peft_load):
    """`gated` runs whole documents; what an earlier blockwise call asked for is forgotten."""
    folder, batch = folders(name), rows_of(LONG)
    tokens = batch["input_ids"][:1]
    with activate(model_of(name), plan_of(folder, 32)) as run:
        run.model(**rows_of(2 * LONG))
        weights = torch.zeros(1, LONG, len(run.plan.ladder.rungs))
        weights[..., -1] = 1
        logits = run.gated(tokens, torch.ones_like(tokens, dtype=torch.bool), weights)
    with torch.no_grad():
        expected = peft_load(model_of(name), folder)(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, ORIGINAL),
        ({"rope_type": "linear", "factor": 4.0}, ORIGINAL),
        ({"rope_type": "dynamic", "factor": 4.0}, STRETCHED),
        ({**LONGROPE, "factor": 4.0}, STRETCHED),
        ({**LONGROPE, "original_max_position_embeddings": 16, "factor": 4.0}, ORIGINAL),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}, STRETCHED),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, ORIGINAL),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}, ORIGINAL),
    ],
)  # fmt: skip
def test_context_limit_is_that_of_the_stretched_context(rope, limit):
    config = LlamaConfig(**SHAPE, max_position_embeddings=ORIGINAL, rope_parameters={"rope_theta": 1e4, **rope})
    assert context_limit(AutoModelForCausalLM.from_config(config)) == limit


def test_context_limit_of_rope_by_layer_type():
    assert context_limit(model_of("gemma3, dynamic in its full layers")) == STRETCHED
    assert context_limit(model_of("phi3, longrope")) == STRETCHED


class TestPhi3StartsItsCacheAnew:
    """Its loop drops the cache where the text outgrows the original context, and processes all of it again."""

    NAME = "phi3, longrope"

    @pytest.fixture
    def plan(self, folders, make_plan):
        ladder = build_ladder(load_adapter(folders(self.NAME)), (1, 2, 4))
        plan = make_plan(ladder, PositionPolicy, chunk=ChunkSettings(2, 6), block_tokens=8, prompt_tokens=8)
        kv = [KVSettings(hard, "int4", window_tokens=16) for hard in ("full", "int8", "int8")]
        return replace(plan, operating=Operating.at(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 1, 2]), kv))

    def test_budgets_prompts_and_responses_stay(self, plan):
        batch, model = rows_of(ORIGINAL - 8), model_of(self.NAME)
        with activate(model, plan, keep=Keep.DECISIONS) as run:
            cache = run.new_cache(3)
            tokens = model.generate(**batch, **greedy(24), past_key_values=cache)
            assert run.last is cache
            assert cache.lengths == (batch["attention_mask"].sum(1) + 23).tolist()
            columns, mean_rank = cache.stream.columns(), run.mean_rank()
            # what one prefill of all that there was at the crossing, and decode from there, decide
            same = run.new_cache(3, prompt_tokens=batch["attention_mask"].sum(1))
            mask = torch.cat([batch["attention_mask"], torch.ones(3, 23).long()], 1)
            for start, end in [(0, ORIGINAL + 1), *((at, at + 1) for at in range(ORIGINAL + 1, mask.shape[1]))]:
                model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=same)
            for name, column in same.stream.columns().items():
                assert torch.equal(columns[name], column), name
            assert mean_rank == run.mean_rank()
        assert torch.equal(cache.stream.prompt_tokens, batch["attention_mask"].sum(1))
        assert cache.stream.state.operating.start_rung.tolist() == [0, 1, 2]

    def test_a_row_that_ended_before_is_not_counted_again(self, plan):
        batch, model = rows_of(ORIGINAL - 8), model_of(self.NAME)
        with activate(model, plan) as run:
            end = int(model.generate(**batch, **greedy(24))[1, ORIGINAL - 8 + 2])
            tokens = model.generate(**batch, **{**greedy(24), "min_new_tokens": 0}, eos_token_id=end)
            lengths = [row.index(end) if end in row else 23 for row in tokens[:, ORIGINAL - 8 :].tolist()]
            counts = run.last.stream.sums.counts.sum(2)
        assert lengths[1] <= 2
        assert max(lengths) > 8
        assert counts.tolist() == [
            [prompt, length] for prompt, length in zip([ORIGINAL - 8, 23, ORIGINAL - 31], lengths, strict=True)
        ]

    def test_trace_tells_the_whole_text(self, folders):
        text = rows_of(ORIGINAL - 8)["input_ids"][:1]
        out = generate(model_of(self.NAME), folders(self.NAME), text, return_trace=True, **greedy(24))
        assert sum(chunk.length for chunk in out.trace[0]) == ORIGINAL - 8 + 23
        assert out.mean_rank == out.prompt_mean_rank == 4

    def test_next_turn_that_crosses_counts_its_own_prompt(self, plan):
        batch, model = rows_of(ORIGINAL - 8), model_of(self.NAME)
        with activate(model, plan) as run:
            cache = run.new_cache(3)
            first = model.generate(**batch, **greedy(3), past_key_values=cache)
            turn = torch.cat([first, torch.ones(3, 20).long()], 1)
            mask = torch.cat([batch["attention_mask"], torch.ones(3, 23).long()], 1)
            model.generate(turn, attention_mask=mask, **greedy(3), past_key_values=cache)
        assert torch.equal(cache.stream.prompt_tokens, mask.sum(1))
        assert cache.lengths == (mask.sum(1) + 2).tolist()

    def test_a_turn_without_the_earlier_ones_is_refused_and_loses_nothing(self, plan):
        batch, model = rows_of(20), model_of(self.NAME)
        with activate(model, plan) as run:
            cache = run.new_cache(3)
            model.generate(**batch, **greedy(3), past_key_values=cache)
            before = cache.lengths
            mask = torch.cat([batch["attention_mask"], torch.ones(3, 3 + ORIGINAL).long()], 1)
            new = torch.ones(3, ORIGINAL + 1).long()
            with pytest.raises(ValueError, match="expected the whole text"):
                model.generate(new, attention_mask=mask, **greedy(3), past_key_values=cache)
            assert cache.lengths == before

"""No way in runs past the model's context: prompt and new tokens are counted before anything is generated."""

import pytest
import torch
from transformers import GenerationConfig

from runtime import adaptive, generate

GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture
def limit(tiny_llama):
    """A short context, so that tests are: 32 tokens."""
    tiny_llama.config.max_position_embeddings = 32
    return 32


def padded(columns: int, longest: int) -> dict:
    """Two rows of `columns` columns, padded on the left, the longest of `longest` tokens."""
    mask = (torch.arange(columns) >= torch.tensor([columns - longest, columns - 3])[:, None]).long()
    return {"input_ids": 5 * mask, "attention_mask": mask}


@pytest.fixture(params=["generate", "model.generate"])
def call(request, tiny_llama, llama_adapter):
    """`call(input_ids, attention_mask, **options)` by both ways in."""

    def through_generate(input_ids, attention_mask, **options):
        return generate(tiny_llama, llama_adapter, input_ids, attention_mask=attention_mask, **options).sequences

    def through_model(input_ids, attention_mask, **options):
        with adaptive(tiny_llama, llama_adapter):
            return tiny_llama.generate(input_ids, attention_mask=attention_mask, **options)

    return through_generate if request.param == "generate" else through_model


@pytest.mark.parametrize(
    ("options", "new"),
    [
        ({"max_new_tokens": 13}, 13),
        ({"max_length": 43}, 13),  # 30 columns
        ({"max_new_tokens": 13, "max_length": 31}, 13),  # transformers goes by the new tokens then
        ({"generation_config": GenerationConfig(max_new_tokens=13)}, 13),
        ({"generation_config": GenerationConfig(max_length=43)}, 13),
    ],
)
def test_more_than_the_context_is_refused(tiny_llama, limit, call, options, new):
    with pytest.raises(ValueError, match=rf"context of {limit}, got 20 \+ {new}; shorten the prompt") as error:
        call(**padded(30, 20), **GREEDY, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"max_new_tokens": 12}, {"max_length": 42}])
def test_padding_takes_no_place_in_the_context(limit, call, options):
    assert call(**padded(30, 20), **GREEDY, **options, min_new_tokens=12).shape == (2, 42)


def test_the_models_own_configuration_counts(tiny_llama, limit, call):
    tiny_llama.generation_config.max_length = 43
    with pytest.raises(ValueError, match=r"got 20 \+ 13"):
        call(**padded(30, 20), **GREEDY)
    tiny_llama.generation_config.max_length = None
    tiny_llama.generation_config.max_new_tokens = 13
    with pytest.raises(ValueError, match=r"got 20 \+ 13"):
        call(**padded(30, 20), **GREEDY)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_transformers_own_default_stays_within(limit, call):
    assert call(**padded(30, 30), **GREEDY, min_new_tokens=2).shape == (2, limit)


def test_generation_config_may_come_without_its_name(tiny_llama, llama_adapter, limit):
    with adaptive(tiny_llama, llama_adapter), pytest.raises(ValueError, match=r"got 20 \+ 13"):
        tiny_llama.generate(padded(20, 20)["input_ids"], GenerationConfig(max_new_tokens=13, **GREEDY))


def test_prompt_beyond_the_context_is_refused(limit, call):
    with pytest.raises(ValueError, match=rf"context of {limit}, got 33 \+ 1"):
        call(**padded(33, 33), **GREEDY, max_new_tokens=1)


def test_next_turn_counts_the_tokens_that_the_cache_holds(tiny_llama, llama_adapter, limit):
    with adaptive(tiny_llama, llama_adapter) as run:
        cache = run.new_cache(2)
        first = tiny_llama.generate(
            **padded(10, 10), **GREEDY, max_new_tokens=4, min_new_tokens=4, past_key_values=cache
        )
        mask = torch.cat([padded(10, 10)["attention_mask"], torch.ones(2, 14).long()], 1)
        turn = torch.cat([first, torch.full((2, 10), 5)], 1)
        for ids in (turn, turn[:, -11:]):  # the whole text, or what the cache lacks of it
            with pytest.raises(ValueError, match=r"got 24 \+ 9"):
                tiny_llama.generate(ids, attention_mask=mask, **GREEDY, max_new_tokens=9, past_key_values=cache)
        assert cache.lengths == [13, 6]
        tokens = tiny_llama.generate(turn, attention_mask=mask, **GREEDY, max_new_tokens=8, past_key_values=cache)
        assert tokens.shape[1] <= limit


def test_forward_calls_are_counted_together_and_refused_before_anything_is_lost(tiny_llama, llama_adapter, limit):
    batch = padded(20, 20)
    with adaptive(tiny_llama, llama_adapter) as run:
        cache = run.new_cache(2)
        tiny_llama(**batch, past_key_values=cache)
        with pytest.raises(ValueError, match=rf"context of {limit}, got 20 \+ 13"):
            tiny_llama(torch.full((2, 13), 5), past_key_values=cache)
        assert cache.lengths == [20, 3]
        # the longest row has 12 places left, the other 29: a batch is refused by rows, not by columns
        tiny_llama(torch.full((2, 12), 5), past_key_values=cache)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 12).long(), torch.tensor([[0], [1]])], 1)
        tiny_llama(torch.full((2, 1), 5), attention_mask=mask, past_key_values=cache)
        assert cache.lengths == [32, 16]
        with pytest.raises(ValueError, match=r"got 32 \+ 1"):
            tiny_llama(torch.full((2, 1), 5), past_key_values=cache)

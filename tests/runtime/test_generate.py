"""`model.generate` inside `adaptive` is transformers' own, with all that hangs on it; `runtime.generate` wraps it."""

from itertools import pairwise

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextStreamer,
    set_seed,
)

from policy import (
    FULL_KV,
    SIGNALS,
    ChunkSettings,
    Fingerprints,
    KnobCurve,
    KVSettings,
    PercentilePolicy,
    PolicyCheckpoint,
    Settings,
)
from runtime import adaptive, build_ladder, generate, load_adapter, load_tokenizer
from runtime.control.record import Keep
from runtime.fingerprint import adapter_fingerprint, model_fingerprint
from runtime.reference.adaptive import activate
from tests.runtime.conftest import PACK_ADAPTERS
from tests.runtime.reference import PositionPolicy

GREEDY = {"do_sample": False, "pad_token_id": 0}
DOCUMENTS, PROMPT_TOKENS, NEW_TOKENS = 20, 160, 48


def exactly(count):
    return {"max_new_tokens": count, "min_new_tokens": count}


@pytest.fixture
def prompts():
    """Ids and mask of three prompts of 17, 4 and 11 tokens, padded on the left."""
    ids = torch.randint(3, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(17) >= torch.tensor([0, 13, 6])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def peft_llama(peft_load, tiny_llama_factory, llama_adapter):
    return peft_load(tiny_llama_factory(), llama_adapter)


@pytest.mark.parametrize("name", PACK_ADAPTERS)
def test_top_rung_generates_pefts_tokens(
    name, datapack, base_model_path, load_model, peft_load, pack_tokenizer, pack_documents
):
    """20 dev prompts x 48 tokens in fp32; two of the rows also alone."""
    documents = pack_documents(name, DOCUMENTS)
    texts = [document["prompt"] or document["completion"][: 40 + 20 * i] for i, document in enumerate(documents)]
    assert len(texts) == DOCUMENTS
    batch = pack_tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=PROMPT_TOKENS)
    real = batch["attention_mask"].bool()
    model, folder = load_model(base_model_path), datapack / "adapters" / name
    options = exactly(NEW_TOKENS) | {"do_sample": False, "pad_token_id": pack_tokenizer.pad_token_id}
    with adaptive(model, folder):
        tokens = model.generate(**batch, **options)
        logits = model(**batch).logits
        for row in (0, DOCUMENTS - 1):
            alone = model.generate(batch["input_ids"][row][real[row]][None], **options)
            assert torch.equal(alone[0, -NEW_TOKENS:], tokens[row, -NEW_TOKENS:])
    reference = peft_load(model, folder)
    assert torch.equal(tokens, reference.generate(**batch, **options))
    with torch.no_grad():
        torch.testing.assert_close(logits[real], reference(**batch).logits[real], atol=1e-4, rtol=0)


def test_top_rung_generates_pefts_tokens_on_stories(stories_path, stories_adapter, load_model, peft_load):
    model = load_model(stories_path)
    ids = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(0))
    with adaptive(model, stories_adapter):
        tokens, logits = model.generate(ids, **GREEDY, **exactly(100)), model(ids).logits
    reference = peft_load(model, stories_adapter)
    assert torch.equal(tokens, reference.generate(ids, **GREEDY, **exactly(100)))
    with torch.no_grad():
        torch.testing.assert_close(logits, reference(ids).logits, atol=1e-4, rtol=0)


def test_sampling_with_a_seed_equals_the_merged_adapter(tiny_llama, llama_adapter, peft_llama, prompts):
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "pad_token_id": 0, "num_return_sequences": 3}
    with adaptive(tiny_llama, llama_adapter):
        set_seed(5)
        tokens = tiny_llama.generate(**prompts, **options, **exactly(25))
    set_seed(5)
    assert torch.equal(tokens, peft_llama.merge_and_unload().generate(**prompts, **options, **exactly(25)))
    assert tokens.unique(dim=0).shape[0] == 9


class OnlyEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, -torch.inf)


def test_logits_processor(tiny_llama, llama_adapter, peft_llama, prompts):
    options = GREEDY | {"logits_processor": LogitsProcessorList([OnlyEven()]), "repetition_penalty": 1.3}
    with adaptive(tiny_llama, llama_adapter):
        tokens = tiny_llama.generate(**prompts, **options, **exactly(20))
    assert torch.equal(tokens, peft_llama.generate(**prompts, **options, **exactly(20)))
    assert not (tokens[:, 17:] % 2).any()


class AtLength(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 23)


def test_stopping_criteria(tiny_llama, llama_adapter, prompts):
    with adaptive(tiny_llama, llama_adapter) as run:
        tokens = tiny_llama.generate(**prompts, **GREEDY, max_new_tokens=50, stopping_criteria=[AtLength()])
        assert tokens.shape == (3, 23)
        # the last token was not processed; padding never was
        assert run.last.lengths == [22, 9, 16]


def test_end_of_sequence_stops_a_row(tiny_llama, llama_adapter, peft_llama, prompts):
    with adaptive(tiny_llama, llama_adapter):
        free = tiny_llama.generate(**prompts, **GREEDY, **exactly(12))
        stop = int(free[0, 20])
        tokens = tiny_llama.generate(**prompts, **GREEDY, max_new_tokens=12, eos_token_id=stop)
    assert torch.equal(tokens, peft_llama.generate(**prompts, **GREEDY, max_new_tokens=12, eos_token_id=stop))
    assert (tokens[0, 21:] == 0).all()


def test_text_streamer(stories_path, stories_adapter, load_model, capsys):
    from runtime import load_tokenizer

    model, tokenizer = load_model(stories_path), load_tokenizer(stories_path)
    inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    with adaptive(model, stories_adapter):
        tokens = model.generate(**inputs, **GREEDY, max_new_tokens=30, streamer=streamer)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == tokenizer.decode(new).strip()


def test_generate_returns_what_is_asked_for(tiny_llama, llama_adapter, peft_llama, prompts):
    options = GREEDY | exactly(8) | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    with adaptive(tiny_llama, llama_adapter) as run:
        got = tiny_llama.generate(**prompts, **options)
        assert got.past_key_values is run.last
    expected = peft_llama.generate(**prompts, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


def test_generate_goes_on_from_a_cache_of_its_own(tiny_llama, llama_adapter, prompts):
    with adaptive(tiny_llama, llama_adapter) as run:
        whole = tiny_llama.generate(**prompts, **GREEDY, **exactly(12))
        cache = run.new_cache(3)
        part = tiny_llama.generate(**prompts, **GREEDY, **exactly(5), past_key_values=cache)
        mask = torch.cat([prompts["attention_mask"], torch.ones(3, 5).long()], 1)
        rest = tiny_llama.generate(part, attention_mask=mask, **GREEDY, **exactly(7), past_key_values=cache)
    assert torch.equal(rest, whole)


def test_each_generate_starts_anew(tiny_llama, llama_adapter, prompts):
    with adaptive(tiny_llama, llama_adapter):
        first, second = (tiny_llama.generate(**prompts, **GREEDY, **exactly(9)) for _ in range(2))
    assert torch.equal(first, second)


REFUSED = {
    "beams": ({"num_beams": 2}, "got beams"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "an assistant model"),
    "no cache": ({"use_cache": False}, "use_cache=True"),
    "foreign cache": ({"past_key_values": DynamicCache()}, "got DynamicCache"),
    "embeddings": ({"input_ids": None, "attention_mask": None, "inputs_embeds": torch.zeros(1, 3, 64)}, "input_ids"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_refused_in_one_line(tiny_llama, llama_adapter, prompts, arguments, message):
    with adaptive(tiny_llama, llama_adapter), pytest.raises(ValueError, match=message) as error:
        tiny_llama.generate(**(prompts | GREEDY | {"max_new_tokens": 3} | arguments))
    assert "\n" not in str(error.value)


def test_assistant_and_beams_of_the_configuration_are_refused(tiny_llama, tiny_llama_factory, llama_adapter, prompts):
    from transformers import GenerationConfig

    with adaptive(tiny_llama, llama_adapter):
        with pytest.raises(ValueError, match="assistant model"):
            tiny_llama.generate(**prompts, max_new_tokens=3, assistant_model=tiny_llama_factory())
        with pytest.raises(ValueError, match="got beams"):
            tiny_llama.generate(**prompts, generation_config=GenerationConfig(num_beams=3, max_new_tokens=3))


def test_cache_switched_off_by_training_is_switched_on(tiny_llama, llama_adapter, peft_llama, prompts):
    tiny_llama.generation_config.use_cache = tiny_llama.config.use_cache = False
    with adaptive(tiny_llama, llama_adapter):
        tokens = tiny_llama.generate(**prompts, **GREEDY, **exactly(9))
    assert torch.equal(tokens, peft_llama.generate(**prompts, **GREEDY, **exactly(9)))


def test_parallel_rows_of_sampling_have_their_own_chunks(tiny_llama, llama_adapter, make_plan, prompts):
    plan = make_plan(
        build_ladder(load_adapter(llama_adapter)), PositionPolicy, chunk=ChunkSettings(2, 6), prompt_tokens=8
    )
    options = {"do_sample": True, "num_return_sequences": 2, "pad_token_id": 0}
    with activate(tiny_llama, plan, keep=Keep.DECISIONS) as run:
        set_seed(0)
        tiny_llama.generate(**prompts, **options, **exactly(30))
        for row, length in enumerate([46, 46, 33, 33, 40, 40]):
            assert sum(chunk.length for chunk in run.trace(row, length)) == length


def save_policy(folder, model, adapter_path, kv=FULL_KV, shared=False):
    adapter = load_adapter(adapter_path)
    ladder = build_ladder(adapter, (2, 4, 8))
    settings = Settings(block_tokens=4, prompt_tokens=4, chunk=ChunkSettings(2, 6), kv=kv)
    PolicyCheckpoint(
        PercentilePolicy(ladder.rungs, "complexity", spread=1.0),
        settings,
        KnobCurve((0.3, 0.6, 1.0), (0.0, 1.0, 2.0)),
        (0.25, 0.5, 1.0),
        Fingerprints(
            model=model_fingerprint(model),
            adapter=adapter_fingerprint(adapter),
            ladder=ladder.fingerprint,
            shared=shared,
        ),
        default_budget=0.6,
    ).save(folder)
    return folder


@pytest.fixture
def policy(tiny_llama, llama_adapter, tmp_path):
    return save_policy(tmp_path / "policy", tiny_llama, llama_adapter)


def test_trace_tells_every_chunk(tiny_llama, llama_adapter, tmp_path, prompts):
    kv = KVSettings("int8", "int4", window_tokens=16)
    folder = save_policy(tmp_path / "policy", tiny_llama, llama_adapter, kv)
    out = generate(
        tiny_llama, llama_adapter, prompts["input_ids"], attention_mask=prompts["attention_mask"], policy=folder,
        return_trace=True, **GREEDY, **exactly(60),
    )  # fmt: skip
    assert out.tokens == [60] * 3
    assert out.sequences.shape == (3, 77)
    for chunks, prompt in zip(out.trace, (17, 4, 11), strict=True):
        assert chunks[0].start == 0
        assert all(a.start + a.length == b.start for a, b in pairwise(chunks))
        assert chunks[-1].start + chunks[-1].length == prompt + 59
        assert {chunk.rung for chunk in chunks} <= {2, 4, 8}
        assert chunks[0].signals == dict.fromkeys(SIGNALS)
        assert {chunk.rung for chunk in chunks if chunk.start < prompt} == {4}, "the rung of the default budget"
        assert all(set(chunks[-1].signals[name]) == {"mean", "max", "last"} for name in SIGNALS)
        assert chunks[0].kv_format == ["float32"]
        assert {name for chunk in chunks for name in chunk.kv_format} > {"float32"}
        assert chunks[-1].to_dict()["start"] == chunks[-1].start
    assert 2 <= out.mean_rank <= 8
    assert 2 <= out.prompt_mean_rank <= 8
    assert out.kv_bytes_full == 2 * 2 * 2 * 16 * 4 * sum(p + 59 for p in (17, 4, 11))
    assert 0 < out.kv_bytes <= min(out.kv_bytes_full, out.kv_bytes_allocated)


def test_budget_of_one_is_the_full_adapter_whatever_the_policy(tiny_llama, llama_adapter, policy, prompts):
    ids = prompts["input_ids"][:1]
    plain = generate(tiny_llama, llama_adapter, ids, **GREEDY, **exactly(20))
    top = generate(tiny_llama, llama_adapter, ids, policy=policy, budget=1.0, **GREEDY, **exactly(20))
    low = generate(tiny_llama, llama_adapter, ids, policy=policy, budget=0.3, **GREEDY, **exactly(20))
    default = generate(tiny_llama, llama_adapter, ids, policy=policy, **GREEDY, **exactly(20))
    assert torch.equal(plain.sequences, top.sequences)
    assert plain.mean_rank == top.mean_rank == 8
    assert low.mean_rank < default.mean_rank < 8
    assert plain.trace is None


def test_fixed_rung_and_no_adapter_at_all(tiny_llama, llama_adapter, prompts):
    ids = prompts["input_ids"][:1]
    assert generate(tiny_llama, llama_adapter, ids, rung=3, **GREEDY, **exactly(9)).mean_rank == 3
    bare = generate(tiny_llama, llama_adapter, ids, rung=0, **GREEDY, **exactly(9))
    assert bare.mean_rank == 0
    assert torch.equal(bare.sequences, tiny_llama.generate(ids, **GREEDY, **exactly(9)))


def test_texts_from_paths(stories_path, stories_adapter):
    out = generate(
        stories_path, str(stories_adapter), ["Once upon a time", "The dog"], max_new_tokens=12, dtype="float32"
    )
    assert len(out.texts) == 2
    assert all(out.texts)
    one = generate(stories_path, stories_adapter, "The dog", max_new_tokens=12, dtype="float32")
    assert one.texts == out.texts[1:]


def test_new_tokens_count_up_to_the_end_of_sequence(tiny_llama, llama_adapter, prompts):
    free = generate(tiny_llama, llama_adapter, prompts["input_ids"][:1], **GREEDY, **exactly(12))
    tiny_llama.generation_config.eos_token_id = int(free.sequences[0, 20])
    first = free.sequences[0, 17:].tolist().index(tiny_llama.generation_config.eos_token_id) + 1
    out = generate(tiny_llama, llama_adapter, prompts["input_ids"][:1], **GREEDY, max_new_tokens=12, return_trace=True)
    assert out.tokens == [first]
    assert sum(chunk.length for chunk in out.trace[0]) == 17 + first - 1


BAD = {
    "negative budget": ({"budget": -0.1}, r"budget: expected a share of the full adapter's cost in \[0, 1\]"),
    "budget above one": ({"budget": 1.5}, "budget: expected"),
    "budget without a policy": ({"budget": 0.5}, "policy: expected one to spend budget=0.5 by"),
    "latency without a policy": ({"latency_budget_ms": 5.0}, "policy: expected one to spend latency_budget_ms=5.0 by"),
    "rung and budget": ({"rung": 2, "budget": 1.0}, "rung: expected a fixed rung alone"),
    "rung above the rank": ({"rung": 9}, "up to the adapter's 8, got 9"),
    "negative rung": ({"rung": -1}, "rung"),
    "no prompt": ({"prompts": []}, "prompts: expected"),
    "empty prompt": ({"prompts": ["a", ""]}, "prompts: expected"),
    "unknown dtype": ({"dtype": "float8"}, "dtype: expected one of"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_end_in_one_line(arguments, message, stories_path, stories_adapter):
    with pytest.raises(ValueError, match=message) as error:
        generate(**({"model": stories_path, "adapter": stories_adapter, "prompts": "Once"} | arguments))
    assert "\n" not in str(error.value)


def test_policy_of_another_model_or_adapter_is_refused(
    tiny_llama, llama_adapter, policy, make_peft_adapter, tiny_llama_factory, tmp_path, prompts
):
    ids = prompts["input_ids"][:1]
    other = make_peft_adapter(tiny_llama_factory, tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="adapter: expected fingerprint"):
        generate(tiny_llama, other, ids, policy=policy)
    with pytest.raises(ValueError, match="drop one"):
        generate(tiny_llama, llama_adapter, ids, policy=policy, rung=4)
    with pytest.raises(ValueError, match="expected a policy with a latency table"):
        generate(tiny_llama, llama_adapter, ids, policy=policy, latency_budget_ms=5.0)
    with pytest.raises(FileNotFoundError, match="policy: expected a folder"):
        generate(tiny_llama, llama_adapter, ids, policy=tmp_path / "nothing")
    with torch.no_grad():
        tiny_llama.lm_head.weight.add_(1)
    with pytest.raises(ValueError, match="model: expected fingerprint"):
        generate(tiny_llama, llama_adapter, ids, policy=policy)


def test_the_stop_token_of_the_call_ends_the_count(tiny_llama, llama_adapter, prompts):
    free = generate(tiny_llama, llama_adapter, prompts["input_ids"], **prompt_mask(prompts), **GREEDY, **exactly(20))
    first = free.sequences[0, prompts["input_ids"].shape[1] :].tolist()
    stop = first[3]
    expected = first.index(stop) + 1
    for options in ({"eos_token_id": stop}, {"generation_config": GenerationConfig(eos_token_id=stop)}):
        out = generate(
            tiny_llama, llama_adapter, prompts["input_ids"], **prompt_mask(prompts), **GREEDY, **options,
            max_new_tokens=20, return_trace=True,
        )  # fmt: skip
        assert out.tokens[0] == expected
        last = out.trace[0][-1]
        assert last.start + last.length == int(prompts["attention_mask"][0].sum()) + expected - 1


def prompt_mask(prompts):
    return {"attention_mask": prompts["attention_mask"]}


def test_a_cache_whose_rows_were_fed_padding_is_refused_for_the_next_turn(tiny_llama, llama_adapter, prompts):
    with adaptive(tiny_llama, llama_adapter) as run:
        cache = run.new_cache(3)
        tiny_llama.generate(**prompts, **GREEDY, **exactly(5), past_key_values=cache)
        columns = prompts["input_ids"].shape[1] + 4
        mask = torch.ones(3, columns + 6).long()
        mask[:, : prompts["input_ids"].shape[1]] = prompts["attention_mask"]
        mask[0, columns - 2 : columns] = 0  # row 0 ended early: what followed was padding
        with pytest.raises(ValueError, match="start a new cache"):
            tiny_llama(torch.ones(3, 6).long(), attention_mask=mask, past_key_values=cache)


def test_the_next_turn_is_prompt_again(tiny_llama, llama_adapter, prompts):
    with adaptive(tiny_llama, llama_adapter) as run:
        cache = run.new_cache(3)
        part = tiny_llama.generate(**prompts, **GREEDY, **exactly(5), past_key_values=cache)
        mask = torch.cat([prompts["attention_mask"], torch.ones(3, 9).long()], 1)
        turn = torch.cat([part, torch.ones(3, 4).long()], 1)
        tiny_llama.generate(turn, attention_mask=mask, **GREEDY, **exactly(3), past_key_values=cache)
        assert torch.equal(cache.stream.prompt_tokens, mask.sum(1))


@pytest.mark.parametrize("option", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}])
def test_caches_and_prefill_pieces_of_others_are_refused(tiny_llama, llama_adapter, prompts, option):
    with adaptive(tiny_llama, llama_adapter), pytest.raises(ValueError, match="leave it out"):
        tiny_llama.generate(**prompts, **GREEDY, **exactly(3), **option)


def test_stop_strings_stop(stories_path, load_model, make_peft_adapter, tmp_path):
    model = load_model(stories_path)
    tokenizer = load_tokenizer(stories_path)
    adapter = make_peft_adapter(lambda: load_model(stories_path), tmp_path / "adapter", r=4, alpha=4)
    out = generate(model, adapter, "Once upon a time", tokenizer=tokenizer, max_new_tokens=60, stop_strings=["."])
    assert out.texts[0].rstrip().endswith(".")
    assert out.tokens[0] < 60

"""`model(...)` inside `adaptive`: the same numbers whatever the padding, the split and the neighbours in the batch."""

import itertools

import pytest
import torch
from transformers import DynamicCache

from policy import ChunkSettings, FixedPolicy, KVSettings, PercentilePolicy
from runtime import adaptive, build_ladder, export_rung, load_adapter
from runtime.control.record import Keep
from runtime.control.stream import Stream
from runtime.reference.adaptive import activate
from tests.runtime.reference import FeaturePolicy, PositionPolicy, row_of

# Rows of one batch sum in another order than alone: a few fp32 roundings of logits of size 10.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
DECIDED = ("positions", "opens", "rung", "scale", "active", "held_valid")
LENGTHS = (37, 5, 61, 1, 48)


def texts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (length,), generator=generator) for length in lengths]


def padded(rows, side, width=None):
    width = width or max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, part], mask[i, part] = row, 1
    return ids, mask


@pytest.fixture(scope="module")
def ladder(llama_adapter):
    return build_ladder(load_adapter(llama_adapter), (0, 2, 4, 8))


@pytest.fixture
def plan(ladder, make_plan):
    """`plan(policy_of=..., **settings)`: chunks of 4 to 6 tokens, fades of 4, blocks of 8."""

    def make(policy_of=PositionPolicy, knob=0.0, **settings):
        defaults = {"chunk": ChunkSettings(4, 6), "block_tokens": 8, "fade_tokens": 4}
        return make_plan(ladder, policy_of, knob, **(defaults | settings))

    return make


def by_entropy(rungs):
    return PercentilePolicy(rungs, "entropy", spread=4.0)


def by_surprisal(rungs):
    return PercentilePolicy(rungs, "surprisal", torch.linspace(0.5, 1, 101), spread=4.0)


COMPRESSED = KVSettings("int8", "int4", threshold=0.5, sink_pages=1, window_tokens=8)
SPARSE = KVSettings("sparse", "dropped", threshold=0.5, sink_pages=1, window_tokens=8)


@pytest.mark.parametrize(
    ("side", "policy_of", "kv"),
    [
        ("left", PositionPolicy, None),
        ("right", by_entropy, None),
        ("left", by_entropy, COMPRESSED),
        ("right", PositionPolicy, SPARSE),
        ("left", by_surprisal, None),
    ],
    ids=["left", "right", "left compressed", "right sparse", "left by surprisal"],
)
def test_padded_row_in_a_batch_equals_the_row_alone(tiny_llama, plan, side, policy_of, kv):
    rows = texts()
    settled = plan(policy_of, 1.4, **({} if kv is None else {"kv": kv}))
    with activate(tiny_llama, settled, keep=Keep.DECISIONS) as run:
        ids, mask = padded(rows, side, width=64)
        together = tiny_llama(ids, attention_mask=mask).logits
        record, formats = run.last.stream.columns(), run.last.page_formats()
        for i, row in enumerate(rows):
            alone = tiny_llama(row[None]).logits[0]
            torch.testing.assert_close(together[i][mask[i].bool()], alone, **CLOSE)
            own, single = row_of(record, i), row_of(run.last.stream.columns(), 0)
            assert all(torch.equal(own[name], single[name]) for name in DECIDED)
            for name in ("held", "first", "age"):
                torch.testing.assert_close(own[name], single[name], **CLOSE)
            pages = run.last.page_formats()
            assert torch.equal(formats[i, : pages.shape[1]], pages[0])
        assert together.isfinite().all()


def test_tokens_of_one_batch_each_run_at_their_own_rung(tiny_llama, plan, tmp_path, peft_load, tiny_llama_factory):
    """Rows at different fixed rungs equal PEFT with each rung's exported adapter."""
    settled = plan(ChangingOnce, torch.arange(4.0), fade_tokens=1, start_rung=0, chunk=ChunkSettings(4, 4))
    rows = texts((40,) * 4)
    with activate(tiny_llama, settled):
        logits = tiny_llama(torch.stack(rows)).logits
    for j, rung in enumerate(settled.ladder.rungs):
        model = tiny_llama_factory()
        if rung:
            model = peft_load(model, export_rung(settled.ladder, rung, tmp_path / str(rung)))
        # the first block has no signal yet and runs at the start rung: give it as the base model computes it
        with torch.no_grad():
            cache = DynamicCache()
            tiny_llama(rows[j][None, :8], past_key_values=cache)
            expected = model(rows[j][None, 8:], past_key_values=cache).logits
        torch.testing.assert_close(logits[j, 8:], expected[0], atol=1e-4, rtol=0)


class ChangingOnce(PositionPolicy):
    """The rung is the row's knob."""

    def decide(self, summary, knob):
        decision = super().decide(summary, knob)
        return type(decision)(knob.long(), torch.ones_like(decision.scales))


@pytest.mark.parametrize("policy_of", [PositionPolicy, FeaturePolicy])
def test_prefill_in_two_calls_equals_one(tiny_llama, plan, policy_of):
    """Calls of whole blocks; the mask covers what the cache holds, padding included."""
    ids, mask = padded(texts((48, 48)), "left")
    with activate(tiny_llama, plan(policy_of), keep=Keep.DECISIONS) as run:
        whole, record = tiny_llama(ids).logits, run.last.stream.columns()
        cache = run.new_cache(2)
        parts = [
            tiny_llama(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache).logits
            for part in (slice(0, 16), slice(16, 40), slice(40, 48))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
        again = run.last.stream.columns()
    assert all(torch.equal(record[name], again[name]) for name in DECIDED)


@pytest.mark.parametrize("block", [3, 16, 512])
def test_block_size_changes_nothing_at_a_fixed_rung(tiny_llama, llama_adapter, ladder, make_plan, block):
    rows = texts()
    ids, mask = padded(rows, "left")
    with adaptive(tiny_llama, llama_adapter, rung=4):
        expected = tiny_llama(ids, attention_mask=mask).logits
    settled = make_plan(ladder, FixedPolicy, 2.0, block_tokens=block, start_rung=2)
    with activate(tiny_llama, settled):
        torch.testing.assert_close(tiny_llama(ids, attention_mask=mask).logits, expected, **CLOSE)


@pytest.mark.parametrize(("block", "kv"), [(8, None), (1, COMPRESSED)], ids=["blocks", "tokens, compressed"])
def test_the_future_changes_no_earlier_decision_of_a_real_model(tiny_llama, plan, block, kv):
    row = texts((41,))[0]
    settled = plan(FeaturePolicy, block_tokens=block, **({} if kv is None else {"kv": kv}))
    with activate(tiny_llama, settled, keep=Keep.DECISIONS) as run:
        before, decided = tiny_llama(row[None]).logits[0], row_of(run.last.stream.columns(), 0)
        for change in (1, 16, 33):
            other = row.clone()
            other[change:] = (row[change:] + 50) % 250
            after = tiny_llama(other[None]).logits[0]
            again = row_of(run.last.stream.columns(), 0)
            for name in decided:
                assert torch.equal(decided[name][:change], again[name][:change]), (name, change)
            torch.testing.assert_close(after[:change], before[:change], **CLOSE)


def test_attention_signal_is_the_models_own_attention(tiny_llama_factory, llama_adapter, plan, monkeypatch):
    heard = []
    close = Stream.close_block

    def listen(self, logits, attention, states):
        heard.append(attention)
        return close(self, logits, attention, states)

    monkeypatch.setattr(Stream, "close_block", listen)
    row = texts((61,))[0][None]
    model = tiny_llama_factory()
    with activate(model, plan(ChangingOnce, 0.0, start_rung=0)):
        model(row)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(model(row, output_attentions=True).attentions).mean((0, 2))[0]
    got = torch.cat(heard, 1)[0]
    for t in range(61):
        boundary = max(0, (t // 16 - 1) * 16)
        assert got[t].item() == pytest.approx(float(weights[t, :boundary].sum()), abs=1e-5)
    assert got[:32].max() == 0
    assert got[32:].min() > 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_labels_give_the_models_own_loss(tiny_llama, llama_adapter, peft_load, tiny_llama_factory, implementation):
    ids, mask = padded(texts(), "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :20] = -100
    tiny_llama.set_attn_implementation(implementation)
    with adaptive(tiny_llama, llama_adapter):
        got = tiny_llama(ids, attention_mask=mask, labels=labels)
    with torch.no_grad():
        expected = peft_load(tiny_llama_factory(), llama_adapter)(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=0)
    assert got.logits.shape == expected.logits.shape


@pytest.mark.parametrize("keep", [1, 3, 61, 200, torch.tensor([0, 5, 60])])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_to_keep(tiny_llama, plan, keep, side):
    ids, mask = padded(texts(), side)
    with activate(tiny_llama, plan()):
        whole = tiny_llama(ids, attention_mask=mask).logits
        kept = tiny_llama(ids, attention_mask=mask, logits_to_keep=keep).logits
    assert torch.equal(kept, whole[:, keep] if isinstance(keep, torch.Tensor) else whole[:, -keep:])


def test_return_values_as_asked_for(tiny_llama, llama_adapter):
    ids = texts((9,))[0][None]
    with adaptive(tiny_llama, llama_adapter) as run:
        output = tiny_llama(ids)
        assert output.past_key_values is run.last
        assert tiny_llama(ids, use_cache=False).past_key_values is None
        logits, cache = tiny_llama(ids, return_dict=False)
        assert torch.equal(logits, output.logits)
        assert cache is run.last
        assert torch.equal(tiny_llama(input_ids=ids, output_attentions=False, cache_position=None).logits, logits)
        assert not output.logits.requires_grad


def test_branches_of_a_cache_go_on_independently(tiny_llama, plan):
    rows = texts((40, 40))
    more = texts((6, 6, 6), seed=1)
    with activate(tiny_llama, plan(by_entropy, 1.4, kv=COMPRESSED), keep=Keep.DECISIONS, hidden=True) as run:
        cache = run.new_cache(2)
        tiny_llama(torch.stack(rows), past_key_values=cache)
        latest = run.states[:, -1]
        branches = cache.select_rows(torch.tensor([1, 0, 1]))
        together = tiny_llama(torch.stack(more), past_key_values=branches).logits
        assert cache.lengths == [40, 40]
        seen = branches.stream.columns()["hidden"][:, 0, :64]
        assert torch.equal(seen, latest[[1, 0, 1]]), "the state of the row that was copied"
        for i, source in enumerate([1, 0, 1]):
            alone = cache.select_rows(torch.tensor([source]))
            torch.testing.assert_close(together[i], tiny_llama(more[i][None], past_key_values=alone).logits[0], **CLOSE)


REFUSED = {
    "embeddings": ({"inputs_embeds": torch.zeros(1, 4, 64)}, "input_ids: expected token ids"),
    "foreign cache": ({"input_ids": torch.ones(1, 4).long(), "past_key_values": DynamicCache()}, "got DynamicCache"),
    "attentions": ({"input_ids": torch.ones(1, 4).long(), "output_attentions": True}, "got output_attentions"),
    "hidden states": ({"input_ids": torch.ones(1, 4).long(), "output_hidden_states": True}, "output_hidden_states"),
    "4-D mask": ({"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask"),
    "no column": ({"input_ids": torch.ones(1, 0).long()}, "at least one token"),
    "padding alone": (
        {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4)},
        "at least one real token",
    ),
    "short mask": ({"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 3)}, "at least 4"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_blockwise_forward_cannot_give_is_refused(tiny_llama, llama_adapter, arguments, message):
    with adaptive(tiny_llama, llama_adapter), pytest.raises(ValueError, match=message) as error:
        tiny_llama(**arguments)
    assert "\n" not in str(error.value)


def test_attention_that_cannot_be_heard_is_refused(tiny_llama, llama_adapter):
    tiny_llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation"), adaptive(tiny_llama, llama_adapter):
        pass


def test_adapter_of_another_model_is_refused(tiny_llama, tiny_gpt2, llama_adapter, gpt2_adapter):
    for model, adapter in ((tiny_llama, gpt2_adapter), (tiny_gpt2, llama_adapter)):
        with pytest.raises(ValueError, match="of another model"), adaptive(model, adapter):
            pass
    tiny_llama.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 32)
    with pytest.raises(ValueError, match=r"up_proj with \(in, out\) \(64, 160\), the model's is \(64, 32\)"):
        adaptive(tiny_llama, llama_adapter).__enter__()
    tiny_llama.model.layers[1].mlp.up_proj = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="to be a linear layer, got Bilinear"):
        adaptive(tiny_llama, llama_adapter).__enter__()


def snapshot(model):
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    return vars(model).keys(), hooks, model.config._attn_implementation, list(model.state_dict())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("ending", ["normal", "exception", "refused adapter", "refused nesting"])
def test_model_is_afterwards_as_before(tiny_llama, llama_adapter, gpt2_adapter, implementation, ending):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tiny_llama.set_attn_implementation(implementation)
    ids = texts((20,))[0][None]
    before, functions = snapshot(tiny_llama), set(ALL_ATTENTION_FUNCTIONS)
    with torch.no_grad():
        expected = tiny_llama(ids).logits
    attempts = {
        "normal": lambda: tiny_llama(ids),
        "exception": lambda: 1 / 0,
        "refused adapter": lambda: adaptive(tiny_llama, gpt2_adapter).__enter__(),
        "refused nesting": lambda: adaptive(tiny_llama, llama_adapter).__enter__(),
    }
    raises = {"exception": (ZeroDivisionError, "division"), "refused adapter": (ValueError, "adaptive|another model")}
    raises["refused nesting"] = (ValueError, "not adaptive yet")
    if ending == "normal":
        with adaptive(tiny_llama, llama_adapter):
            attempts[ending]()
    else:
        kind, message = raises[ending]
        with pytest.raises(kind, match=message), adaptive(tiny_llama, llama_adapter):
            attempts[ending]()
    assert snapshot(tiny_llama) == before
    assert set(ALL_ATTENTION_FUNCTIONS) == functions
    with torch.no_grad():
        assert torch.equal(tiny_llama(ids).logits, expected)


def test_trace_needs_a_forward_first(tiny_llama, llama_adapter):
    with adaptive(tiny_llama, llama_adapter) as run, pytest.raises(ValueError, match="run the model first"):
        run.mean_rank()


def test_mean_rank_is_that_of_the_record(tiny_llama, plan):
    ids, mask = padded(texts(), "left")
    with activate(tiny_llama, plan(fade_tokens=1), keep=Keep.DECISIONS) as run:
        tiny_llama(
            ids, attention_mask=mask, past_key_values=run.new_cache(5, prompt_tokens=torch.tensor([9, 0, 30, 1, 4]))
        )
        record, (response, prompt) = run.last.stream.columns(), run.mean_rank()
    ranks, prompts = torch.tensor(run.plan.ladder.rungs).float(), [9, 0, 30, 1, 4]
    sums = {"response": [], "prompt": []}
    for i in range(5):
        own = row_of(record, i)
        for t in range(len(own["rung"])):
            sums["prompt" if t < prompts[i] else "response"].append(float(ranks[own["rung"][t]]))
    assert response == pytest.approx(sum(sums["response"]) / len(sums["response"]))
    assert prompt == pytest.approx(sum(sums["prompt"]) / len(sums["prompt"]))


@pytest.mark.parametrize("probed", [1, 2, 3, 5, 8])
def test_probed_layers_are_evenly_spaced_and_end_in_the_last(probed):
    from runtime.reference.attention import AttentionProbe

    for layers in range(1, 40):
        chosen = sorted(AttentionProbe(layers, probed, 2).layers)
        assert chosen[-1] == layers - 1
        assert len(chosen) == min(probed, layers)
        gaps = [b - a for a, b in itertools.pairwise(chosen)]
        assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_chosen_logits_are_those_of_the_whole(tiny_llama, plan, side):
    """Row after row, in the order of the input's columns, from deciding runs in blocks over padded rows."""
    ids, mask = padded(texts(), side)
    wanted = mask.bool() & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4)
    with activate(tiny_llama, plan()) as run:
        whole = run.logits(ids, mask, run.new_cache(len(ids)))
        chosen = run.logits_at(ids, mask, run.new_cache(len(ids)), wanted)
    assert torch.equal(chosen, whole[wanted])

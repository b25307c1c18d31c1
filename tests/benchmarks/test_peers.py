"""The peers do what they are measured for: the tokens of transformers and PEFT, one a step, at the context named."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks.correctness import peft_model, random_tokens
from benchmarks.fused import SITES, fuse, random_updates, updates
from benchmarks.graphed import GraphedPeer
from benchmarks.peers import generating, graphed, measure, peft_generating
from benchmarks.shapes import build_model, write_adapter
from runtime.ladder.adapter import load_adapter

CPU = torch.device("cpu")
compiles = pytest.mark.filterwarnings("default")  # PyTorch's compiler warns of PyTorch
PROMPT, NEW = 9, 24
CONTEXT = PROMPT + NEW - 1


def tiny(device=CPU, dtype=torch.float32, **config):
    return build_model("tiny", dtype, device, initializer_range=0.1, **config)


def generated(model, prompt):
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "do_sample": False}
    return model.generate(input_ids=prompt, **options)[:, PROMPT:]


def decoded(peer, prompt):
    """The peer's greedy tokens [B, NEW]; the prompt too goes through its decode step, and nothing else is read."""
    for half in (half for layer in peer.kv for half in layer):
        half.fill_(torch.nan)
    tokens = []
    for position in range(CONTEXT):
        if position < PROMPT:
            peer.tokens.copy_(prompt[:, position])
        peer.decode(position)
        tokens.append(peer.tokens.clone())
    return torch.stack(tokens[PROMPT - 1 :], 1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4, "attention_bias": True},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 64},
    ],
    ids=["grouped", "heads", "yarn"],
)
def test_graphed_chooses_the_tokens_of_generate(batch, config):
    model = tiny(**config)
    prompt = random_tokens(model, batch, PROMPT)
    assert torch.equal(decoded(GraphedPeer(model, batch, CONTEXT), prompt), generated(model, prompt))


@pytest.mark.parametrize("batch", [1, 3])
def test_graphed_gives_every_row_its_own_adapter(batch, tmp_path, make_peft_adapter):
    model = tiny()
    folders = [make_peft_adapter(tiny, tmp_path / str(row), r=5, seed=row) for row in range(batch)]
    rows = [load_adapter(folder).modules for folder in folders]
    adapters = {
        name: (
            torch.stack([row[name].a for row in rows]).float(),
            torch.stack([row[name].scale * row[name].b for row in rows]).float(),
        )
        for name in rows[0]
    }
    own = updates(model, adapters)
    for ours, theirs in zip(own, random_updates(model, batch, 5), strict=True):
        assert [*ours] == [*theirs] == [*SITES]
        assert all(mine.a.shape == theirs[site].a.shape for site, mine in ours.items())
    prompt = random_tokens(model, batch, PROMPT)
    ours = decoded(GraphedPeer(model, batch, CONTEXT, own), prompt)
    for row, folder in enumerate(folders):
        with peft_model(model, folder) as peft:
            assert torch.equal(ours[row : row + 1], generated(peft, prompt[row : row + 1]))


def test_fused_weights_are_the_models_own_and_stay_so():
    model = tiny(attention_bias=True)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    fused = fuse(model)
    for layer, own in enumerate(fused):
        for site, names in SITES.items():
            linears = [model.model.layers[layer].get_submodule(name) for name in names]
            assert torch.equal(own[site].weight, torch.cat([linear.weight for linear in linears]))
            assert all(
                linear.weight.untyped_storage().data_ptr() == own[site].weight.untyped_storage().data_ptr()
                for linear in linears
            )
    again = fuse(model)
    assert all(
        one[site].weight.data_ptr() == two[site].weight.data_ptr()
        for one, two in zip(fused, again, strict=True)
        for site in SITES
    )
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_a_site_that_is_adapted_in_part_is_refused():
    model = tiny()
    some = {"model.layers.0.self_attn.q_proj": (torch.zeros(1, 2, 128), torch.zeros(1, 128, 2))}
    with pytest.raises(ValueError, match=r"adapters: expected all linears of qkv or none, got 1; give all"):
        updates(model, some)


def same_tokens(device, dtype, batch, compiled):
    """True when steps are decodes at the last slot of the context, for peers of the same random numbers."""
    model = tiny(device, dtype)
    adapters = random_updates(model, batch, 4)
    stepping = GraphedPeer(model, batch, CONTEXT, adapters, compiled=compiled)
    decoding = GraphedPeer(model, batch, CONTEXT, adapters)
    for ours, theirs in zip(decoding.kv, stepping.kv, strict=True):
        for own, other in zip(ours, theirs, strict=True):
            own.copy_(other)
    decoding.tokens.copy_(stepping.tokens)
    same = []
    for _ in range(6):
        stepping.step()
        decoding.decode(CONTEXT - 1)
        same.append(torch.equal(stepping.tokens, decoding.tokens))
    stepping.close()
    return all(same)


@compiles
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_decodes_at_the_last_slot(compiled):
    assert same_tokens(CPU, torch.float32, 2, compiled)


@pytest.mark.gpu
@compiles
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_replays_decode_at_the_last_slot(batch, compiled):
    assert same_tokens(torch.device("cuda"), torch.float32, batch, compiled)


def ways(model, folder, context):
    """Every peer by name, not set up yet."""
    return {
        "plain": lambda: graphed(model, 2, context),
        "adapters": lambda: graphed(model, 2, context, 4),
        "static": lambda: generating(model, 2, context, static=True),
        "dynamic": lambda: generating(model, 2, context, static=False),
        "peft, static": lambda: peft_generating(model, folder, 2, context, static=True),
        "peft, dynamic": lambda: peft_generating(model, folder, 2, context, static=False),
    }


@pytest.mark.parametrize("name", [name for name in ways(None, None, 0) if name not in ("plain", "adapters")])
def test_generating_takes_single_tokens_up_to_the_context(name, tmp_path):
    model, calls = tiny(), []

    def note(module, args, kwargs):
        calls.append((kwargs["input_ids"].shape[1], int(kwargs["past_key_values"].get_seq_length())))

    model.register_forward_pre_hook(note, with_kwargs=True)
    with ways(model, write_adapter(model, 4, tmp_path), 40)[name]() as run:
        for steps in (2, 5):
            calls.clear()
            assert run(steps) > 0
            assert calls == [(1, position) for position in range(40 - steps - 1, 40)]


def sized(size):
    """All tensors that there are with a side of this size."""
    return [own for own in gc.get_objects() if type(own) is torch.Tensor and size in own.shape]


@pytest.mark.parametrize("name", ways(None, None, 0))
def test_measure_says_what_a_step_takes_and_leaves_nothing(name, tmp_path):
    context = 53  # the size of nothing else here; what others keep is there before
    model, before = tiny(), {id(own): own for own in sized(context)}
    record = measure(ways(model, write_adapter(model, 4, tmp_path), context)[name](), steps=3, repeats=2, device=CPU)
    assert 0 < record["ms_per_step"]["min"] <= record["ms_per_step"]["median"]
    assert record["ms_per_step"]["runs"] == 2
    assert record["peak_bytes"] is None
    assert [own.shape for own in sized(context) if id(own) not in before] == []


@pytest.mark.gpu
@compiles
@pytest.mark.parametrize("name", ways(None, None, 0))
def test_measure_leaves_the_device_as_it_was(name, tmp_path):
    device = torch.device("cuda")
    model = tiny(device, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    peer = ways(model, write_adapter(model, 4, tmp_path), 2**18)[name]
    record = measure(peer(), steps=4, repeats=2, device=device)
    assert record["peak_bytes"] > before + 2**28  # the KV cache
    assert torch.cuda.memory_allocated() < before + 2**26  # what libraries keep

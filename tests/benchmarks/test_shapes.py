"""The shapes are what they are called, and the engine covers them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ladders import RANK, random_ladder
from benchmarks.shapes import SHAPES, build_model, kv_token_bytes, lora_bytes, weight_bytes
from runtime.engine.model import model_of, why_not
from runtime.engine.store import Module

META = torch.device("meta")


@pytest.mark.parametrize(
    ("shape", "parameters", "kv_bytes"), [("llama-7b", 6_738_415_616, 2**19), ("llama-3.1-8b", 8_030_261_248, 2**17)]
)
def test_a_shape_has_the_parameters_of_its_model(shape, parameters, kv_bytes):
    model = build_model(shape, torch.bfloat16, META)
    assert sum(own.numel() for own in model.parameters()) == parameters
    assert weight_bytes(model) == 2 * (parameters - model.config.vocab_size * model.config.hidden_size)
    assert kv_token_bytes(model) == kv_bytes


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_covers_it(shape):
    assert why_not(build_model(shape, torch.bfloat16, META)) is None


def test_an_exact_adapter_reads_what_is_counted_for_it():
    model = build_model("llama-3.1-8b", torch.bfloat16, META, num_hidden_layers=1)
    modules = {name: Module(own.inputs, own.outputs, own.columns) for name, own in model_of(model, 8).modules().items()}
    ladder = random_ladder(modules, torch.bfloat16, torch.device("cpu"))
    assert int(ladder.rung_bytes()[-1]) == lora_bytes(model, RANK)


def test_rotary_frequencies_of_llama_3_do_not_depend_on_the_length():
    small = {"num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8, "hidden_size": 256, "head_dim": 128,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    model = build_model("llama-3.1-8b", torch.float32, torch.device("cpu"), **small)
    rotary, like = model.model.rotary_emb, torch.zeros(1)
    short, _ = rotary(like, torch.arange(16)[None])
    long, _ = rotary(like, torch.arange(16384)[None])
    again, _ = rotary(like, torch.arange(16)[None])
    assert torch.equal(short, long[:, :16])
    assert torch.equal(short, again)
    plain = build_model("llama-3.1-8b", torch.float32, torch.device("cpu"), **small,
                        rope_parameters={"rope_type": "default", "rope_theta": 500000.0})  # fmt: skip
    assert not torch.equal(short, plain.model.rotary_emb(like, torch.arange(16)[None])[0])

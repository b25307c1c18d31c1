"""A decode step against the Hugging Face model in float64: logits, with adapters by their definition or without any."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from policy.settings import PAGE_TOKENS
from runtime.control.signals import distant_attention
from runtime.engine.buffers import Buffers
from runtime.engine.lanes import Lanes
from runtime.engine.model import DOWN, MEMBERS, model_of, why_not
from runtime.engine.page_pool import Pool
from runtime.engine.step import Forward
from runtime.engine.store import AdapterStore
from runtime.ladder import Ladder
from runtime.ops.ready import X
from runtime.ops.resolve import reads_for
from runtime.ops.shrink import Shares
from tests.ops.ladders import RANK, mixed_ladder, random_adapter, stored
from tests.ops.near import check_near
from tests.ops.watched import makers
from tests.runtime.reference import definition_hooks, handmade_ladder, seeded_model

FP32, BF16 = torch.float32, torch.bfloat16
SHAPE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 72, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
ROPE = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": ("llama", {
        "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2, "rope_parameters": {
            "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE,
        },
    }),
    "mistral of a window": ("mistral", {"sliding_window": 7, "num_key_value_heads": 1}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "yarn", **ROPE}}),
    "qwen3": ("qwen3", {"num_key_value_heads": 4}),
}  # fmt: skip
PROMPTS, STEPS = (15, 0, 4), 2
"""Tokens of every row that are there already, one of them not in use; the first goes on to a second page."""
RECENT_PAGES = 1

Use = tuple[int, int, float]
"""Of a row in one step its slot, rung and what multiplies the rung's scale."""
NONE: Use = (-1, 0, 0.0)


def tiny(name: str, dtype: torch.dtype = FP32, **options: Any) -> PreTrainedModel:
    """A random model whose biases and norms are random as well."""
    kind, own = MODELS[name]
    model = seeded_model(CONFIG_MAPPING[kind](**(SHAPE | own | options)))
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return model.to(dtype)


@dataclass
class Peer:
    """What the Hugging Face model makes of a row's tokens [T], and of what adapters add at each."""

    model: PreTrainedModel
    tokens: Tensor
    ladder: Ladder | None = None
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[1, T, J] of the ladder's rungs"""

    @torch.no_grad()
    def run(self, model: PreTrainedModel, count: int) -> Any:
        """Its output for the first `count` tokens."""
        with ExitStack() as undo:
            if self.ladder is not None:
                undo.enter_context(definition_hooks(model, self.ladder, self.weights[:, :count]))
            return model(self.tokens[None, :count], use_cache=True, output_attentions=True)


class Batch:
    """Rows of a model that go on from their prompts, whose keys and values the Hugging Face model has made."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[int], device: torch.device, store: AdapterStore | None = None,
        uses: Sequence[Sequence[Use]] = (), splits: int = 1,
    ) -> None:  # fmt: skip
        random = torch.Generator().manual_seed(0)
        self.uses, self.plain, self.exact = uses, model, deepcopy(model).double()
        self.model = model_of(deepcopy(model).to(device), 64)
        self.peers = []
        for row, length in enumerate(prompts):
            peer = Peer(model, torch.randint(3, 50, (length + STEPS,), generator=random))
            self.peers.append(peer)
            slot = uses[row][0][0] if uses else -1
            if store is not None and slot >= 0 and length:
                peer.ladder = store.ladders[slot]
                peer.weights = torch.zeros(1, length + STEPS, len(peer.ladder.rungs), dtype=torch.float64)
                peer.weights[:, :length, 1] = 0.9
                for step, (_, rung, weight) in enumerate(uses[row]):
                    peer.weights[:, length + step, rung] = weight
        self.store = store
        pool = Pool.of(self.model, 2 * len(prompts), coded=False)
        b = Buffers.of(self.model, Lanes.of(self.model, pool.units, len(prompts), 2, 1, 0), RANK, splits)
        reads = None if store is None else reads_for(len(prompts), len(store.modules), store.arena, self.plain.dtype)
        last = self.model.shape.layers - 1
        self.forward = Forward(
            self.model, None if store is None else store.tables, reads, pool, b,
            splits, (last,), RECENT_PAGES,
        )  # fmt: skip
        b.tables.lengths.copy_(torch.tensor(prompts))
        b.tables.full.copy_(torch.arange(2 * len(prompts)).flip(0).view(-1, 2, 1))
        for row, length in enumerate(prompts):
            self.prefill(row, length)
        for own in (b.r, b.normed, b.squares, b.y, b.added, b.u, b.query, b.attended, b.inner, b.logits, b.distant):
            own.fill_(torch.nan)

    def prefill(self, row: int, length: int) -> None:
        """A row's prompt in its pages; a cache of a window has the last tokens alone."""
        if not length:
            return
        cache = self.peers[row].run(self.plain, length).past_key_values
        pool, (heads, channels) = self.forward.pool, (self.model.shape.kv_heads, self.model.shape.head_dim)
        # Of a page the keys, and behind them the values.
        memory = pool.memory.view(self.plain.dtype).view(-1, len(pool), heads, 2, PAGE_TOKENS, channels)
        for layer, own in enumerate(cache.layers):
            for part, found in enumerate((own.keys, own.values)):
                for back in range(found.shape[2]):
                    page, slot = divmod(length - 1 - back, PAGE_TOKENS)
                    unit = int(self.forward.buffers.tables.full[row, page])
                    memory[layer, unit, :, part, slot] = found[0, :, -1 - back]

    def check_step(self, step: int) -> None:
        b = self.forward.buffers
        for row, peer in enumerate(self.peers):
            b.tokens[row] = peer.tokens[len(peer.tokens) - STEPS + step]
            if self.uses:
                slot, rung, weight = self.uses[row][step]
                b.rows.slot[row], b.rows.rung[row] = slot, rung
                b.rows.weight[row] = weight * peer.ladder.scales[rung] if peer.ladder is not None else weight
        self.forward()
        # All of u was there, and no earlier site is taken for another.
        last = len(MEMBERS) * (self.model.shape.layers - 1) + DOWN
        counted = torch.zeros_like(b.ready)
        if self.uses:
            shares = Shares.of(len(self.peers), self.model.shape.inner, RANK)
            counted[last, :, 0] = makers(self.forward.reads, last, shares)
            counted[last, :, X] = len(self.peers) > 1
        assert torch.equal(b.ready, counted)
        for row, peer in enumerate(self.peers):
            count = len(peer.tokens) - STEPS + step + 1
            if count == step + 1:
                assert not b.tables.lengths[row]
                continue
            truth, near = peer.run(self.exact, count), peer.run(self.plain, count)
            check_near(b.logits[row : row + 1].cpu(), near.logits[:, -1].float(), truth.logits[:, -1])
            assert int(b.tables.lengths[row]) == count
            window = self.model.layers[-1].window
            softmax = truth.attentions[-1][0, :, -1]
            wanted = distant_attention(softmax, torch.full((len(softmax),), count - 1), RECENT_PAGES)
            assert window or count <= PAGE_TOKENS or wanted.max() > 0.1
            tolerance = 1e-5 if self.plain.dtype == FP32 else 2e-2
            torch.testing.assert_close(b.distant[0, row].cpu(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "prompts", "dtype"),
    [
        ("llama with biases", PROMPTS[:1], FP32),
        ("llama with biases", PROMPTS, BF16),
        ("mistral of a window", PROMPTS[:1], BF16),
        ("mistral of a window", PROMPTS, FP32),
        ("qwen2, tied", PROMPTS[:1], FP32),
        ("qwen3", PROMPTS[:1], FP32),
        ("qwen3", PROMPTS, FP32),
    ],
    ids=str,
)
def test_models_without_adapters(name, prompts, dtype, device):
    batch = Batch(tiny(name, dtype), prompts, device, splits=2)
    for step in range(STEPS):
        batch.check_step(step)


@pytest.mark.parametrize(
    ("name", "uses"),
    [
        ("llama with biases", [[(1, 2, 1.1)]]),
        ("qwen2, tied", [[(0, 5, 1.0), NONE]]),
        ("qwen3", [[(0, 3, 0.7), (0, 1, 1.2)], [NONE, NONE], [(1, 3, 1.0), (1, 0, 0.9)]]),
    ],
    ids=str,
)
def test_rows_have_adapters_of_their_own(name, uses, device):
    model = tiny(name)
    modules = model_of(model, 1).modules()
    assert all(type(model.get_submodule(own)) is nn.Linear for own in modules)
    ladders = [handmade_ladder(random_adapter(modules, 8, 0)), mixed_ladder(modules, 1)]
    store = stored(ladders, modules, model.dtype, device)
    batch = Batch(model, PROMPTS[: len(uses)], device, store, uses)
    for step in range(len(uses[0])):
        batch.check_step(step)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_engine_runs(name):
    assert why_not(tiny(name)) is None
    assert why_not(tiny(name, BF16)) is None


def wrapped() -> PreTrainedModel:
    config = peft.LoraConfig(target_modules=["v_proj"])
    return peft.get_peft_model(tiny("llama with biases"), config).base_model.model


def on_two_devices() -> PreTrainedModel:
    model = tiny("llama with biases")
    model.lm_head.to("meta")
    return model


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", **ROPE}}


@pytest.mark.parametrize(
    ("make", "clause"),
    [
        (lambda: tiny("qwen3", torch.float16), "it computes in float16, not in bfloat16 or float32"),
        (lambda: tiny("qwen3", **DYNAMIC), "its rotary embedding is dynamic, whose frequencies depend on the length"),
        (lambda: tiny("qwen3", hidden_act="gelu"), "its activation is gelu, not silu"),
        (lambda: tiny("qwen3", intermediate_size=70), "its widths (36, 70, 12) are not multiples of 4"),
        (lambda: tiny("qwen3", head_dim=10), "its widths (36, 72, 10) are not multiples of 4"),
        (wrapped, "model.layers.0.self_attn.v_proj is a Linear, not a plain linear layer"),
        (on_two_devices, "its layers lie on several devices"),
    ],
)
def test_what_it_does_not_run(make, clause):
    assert why_not(make()).startswith(clause)


def test_another_family_is_not_run(tiny_gpt2):
    assert why_not(tiny_gpt2) == "the model is gpt2, not one of llama, mistral, qwen2, qwen3"

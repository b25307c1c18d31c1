"""The cache under a real model: greedy decoding with masks made from `visible` equals transformers' own cache."""

import copy

import pytest
import torch
from transformers import DynamicCache

from policy.operating import KVRows
from policy.settings import FULL_KV, KVSettings
from runtime.reference.pages import PagedCache

PROMPTS = [[5, 6, 7], list(range(20, 57)), list(range(100, 116))]
NEW_TOKENS = 40


@torch.no_grad()
def forward(model, cache, ids, positions):
    """Logits [B, T, V] of one pass; ids, positions [B, T], position -1 for padding."""
    cache.begin(positions)
    visible, reach = cache.visible(), positions.clamp(min=0)
    seen = visible[:, None, None, :] & (torch.arange(visible.shape[1], device=ids.device) <= reach[:, None, :, None])
    # additive, because eager attention adds it
    mask = torch.where(seen, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    return model(input_ids=ids, attention_mask=mask, position_ids=reach, past_key_values=cache).logits


def generate(model, cache, prompts, block):
    """Greedy tokens and their logits, [B, NEW_TOKENS] and [B, NEW_TOKENS, V], prompts in blocks per row."""
    device, lengths = model.device, [len(prompt) for prompt in prompts]
    last = [None] * len(prompts)
    for start in range(0, max(lengths), block):
        ids, positions = torch.zeros(len(prompts), block, dtype=torch.long), torch.full((len(prompts), block), -1)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + block]
            ids[row, : len(piece)] = torch.tensor(piece, dtype=torch.long)
            positions[row, : len(piece)] = torch.arange(start, start + len(piece))
        logits = forward(model, cache, ids.to(device), positions.to(device))
        for row, length in enumerate(lengths):
            if start < length <= start + block:
                last[row] = logits[row, length - 1 - start]
        cache.settle(torch.ones(positions.shape, device=device), positions.to(device))
    steps = [torch.stack(last)]
    for step in range(NEW_TOKENS - 1):
        positions = torch.tensor(lengths)[:, None] + step
        logits = forward(model, cache, steps[-1].argmax(-1)[:, None], positions.to(device))
        cache.settle(torch.ones(positions.shape, device=device), positions.to(device))
        steps.append(logits[:, -1])
    logits = torch.stack(steps, 1)
    return logits.argmax(-1), logits


@torch.no_grad()
def generate_dynamic(model, prompt):
    cache, ids, steps = DynamicCache(), torch.tensor([prompt], device=model.device), []
    for _ in range(NEW_TOKENS):
        steps.append(model(input_ids=ids, past_key_values=cache).logits[:, -1])
        ids = steps[-1].argmax(-1)[:, None]
    logits = torch.stack(steps, 1)
    return logits.argmax(-1), logits


@pytest.mark.parametrize("block", [1, 7, 16, 64])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.usefixtures("poisoned")
def test_full_precision_equals_dynamic_cache(tiny_llama, block, implementation, device):
    # a copy with its own config, which the factory shares between models
    model = copy.deepcopy(tiny_llama).to(device)
    model.set_attn_implementation(implementation)
    tokens, logits = generate(model, PagedCache(KVRows.of([FULL_KV])), PROMPTS, block)
    for row, prompt in enumerate(PROMPTS):
        expected_tokens, expected_logits = generate_dynamic(model, prompt)
        assert torch.equal(tokens[row], expected_tokens[0])
        # different block sizes sum in another order: a few fp32 roundings of numbers of size 10
        torch.testing.assert_close(logits[row], expected_logits[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kv", [KVSettings("int8", "int8", window_tokens=16), KVSettings("dropped", "dropped")])
@pytest.mark.usefixtures("poisoned")
def test_ragged_batch_equals_rows_alone(tiny_llama, kv, device):
    model = tiny_llama.to(device)
    tokens, logits = generate(model, PagedCache(KVRows.of([kv])), PROMPTS, 8)
    for row, prompt in enumerate(PROMPTS):
        alone_tokens, alone_logits = generate(model, PagedCache(KVRows.of([kv])), [prompt], 8)
        assert torch.equal(tokens[row], alone_tokens[0])
        torch.testing.assert_close(logits[row], alone_logits[0], atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("poisoned")
def test_coarser_formats_lie_further_from_full_precision(tiny_llama, device):
    model, prompt = tiny_llama.to(device), [list(range(3, 200))]
    ids, positions = torch.tensor(prompt, device=device), torch.arange(197, device=device)[None]

    def last_logits(name):
        cache = PagedCache(KVRows.of([KVSettings(name, name, window_tokens=16)]))
        forward(model, cache, ids[:, :196], positions[:, :196])
        cache.settle(torch.ones(1, 196, device=device), positions[:, :196])
        return forward(model, cache, ids[:, 196:], positions[:, 196:])[0, -1]

    reference = last_logits("full")
    error = [((last_logits(name) - reference).norm() / reference.norm()).item() for name in ("int8", "int4", "dropped")]
    assert 0 < error[0] < error[1] < error[2]

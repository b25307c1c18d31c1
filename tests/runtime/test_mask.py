"""Masks over a row-relative cache: the model's own rule at our positions, and what is not kept is hidden."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from policy import KVSettings
from policy.fixed import FixedPolicy
from runtime import build_ladder, load_adapter
from runtime.reference.adaptive import activate
from runtime.reference.mask import RowMask, Streams

RULES = {
    "causal": (causal_mask_function, lambda query, slot: slot <= query),
    "window of 3": (sliding_window_causal_mask_function(3), lambda query, slot: query - 3 < slot <= query),
    "chunks of 4": (
        chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
        lambda query, slot: slot <= query and slot // 4 == query // 4,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "naive"), RULES.values(), ids=RULES.keys())
def test_mask_is_the_rule_at_every_rows_own_positions(rule, naive, dtype):
    positions = torch.tensor([[9, 10, 11], [5, 6, -1]])
    visible = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) > 0.3
    visible[0, 9] = False  # a query that its own page has lost still sees itself
    mask = RowMask()
    mask.begin(positions, visible)
    made = mask(mask_function=rule, dtype=dtype, batch_size=2, q_length=3, kv_length=16)
    assert made.shape == (2, 1, 3, 16)
    assert made.dtype == dtype
    for row in range(2):
        for t, position in enumerate(positions[row].tolist()):
            query = max(position, 0)
            sees = [slot for slot in range(16) if slot == query or (naive(query, slot) and visible[row, slot])]
            assert (made[row, 0, t] == 0).nonzero().flatten().tolist() == sees
            assert (made[row, 0, t][made[row, 0, t] != 0] == torch.finfo(dtype).min).all()


@pytest.mark.parametrize(("rule", "naive"), RULES.values(), ids=RULES.keys())
def test_mask_of_copies_is_the_rule_at_their_positions_for_whom_they_may_see(rule, naive):
    """Slots are no positions then: two copies of a text, one of them back to front, each sees what it is told to."""
    slots = [*range(7), *reversed(range(7))]
    generator = torch.Generator().manual_seed(0)
    sees = torch.rand(14, 14, generator=generator) > 0.3
    real = torch.rand(2, 14, generator=generator) > 0.2
    mask = RowMask()
    mask.begin(torch.where(real, torch.tensor(slots), -1), real, Streams(torch.tensor(slots), sees))
    made = mask(mask_function=rule, dtype=torch.float32, batch_size=2, q_length=14, kv_length=14)
    assert made.shape == (2, 1, 14, 14)
    for row in range(2):
        for query in range(14):
            found = (made[row, 0, query] == 0).tolist()
            assert found[query], "itself"
            if real[row, query]:
                allowed = [naive(slots[query], own) for own in slots]
                told = (real[row] & sees[query]).tolist()
                assert found == [k == query or (allowed[k] and told[k]) for k in range(14)]
    # and the next pass is one of a text alone again
    mask.begin(torch.arange(3)[None], torch.ones(1, 3, dtype=torch.bool))
    alone = mask(mask_function=rule, dtype=torch.float32, batch_size=1, q_length=3, kv_length=3)
    assert torch.equal(alone[0, 0] == 0, torch.ones(3, 3).tril().bool())


def test_tokens_of_dropped_pages_are_seen_by_nobody(make_peft_adapter, peft_load, make_plan, tmp_path):
    """The last 16 tokens see one page of the past, as if the text began there: with one layer keys know no past."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        initializer_range=0.1,
    )  # fmt: skip

    def make():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    folder = make_peft_adapter(make, tmp_path / "adapter", r=2)
    kv = KVSettings("dropped", "dropped", sink_pages=0, window_tokens=16)
    plan = make_plan(build_ladder(load_adapter(folder)), FixedPolicy, 1.0, kv=kv, block_tokens=16)
    text = torch.randint(3, 128, (1, 80), generator=torch.Generator().manual_seed(0))
    model = make()
    with activate(model, plan):
        logits = model(text).logits[:, -16:]
    with torch.no_grad():
        expected = peft_load(make(), folder)(input_ids=text[:, -32:]).logits[:, -16:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

"""The reference path on a CUDA device against PEFT itself: top rung, truncated rungs, mixed rungs, padding."""

import json
import lzma

import pytest
import torch

from policy import ChunkSettings, Operating, Settings
from runtime import export_rung, generate, load_tokenizer
from runtime.control.record import Keep
from runtime.plan import RunPlan, static_plan
from runtime.reference.adaptive import activate, adaptive
from tests.runtime.reference import PositionPolicy

pytestmark = pytest.mark.gpu

NEW_TOKENS = 32


def greedy(model, ids, mask=None, **options):
    """New tokens alone, as many for every row."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def relative_error(logits, exact):
    return float((logits.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_top_rung_equals_peft_in_float32(tiny_llama_factory, tiny_adapter, with_peft, random_ids, device, attention):
    model = tiny_llama_factory().to(device)
    model.set_attn_implementation(attention)
    ids = random_ids(2, 70)
    with adaptive(model, tiny_adapter):
        tokens, logits = greedy(model, ids), model(input_ids=ids).logits
    peft = with_peft(model, tiny_adapter)
    assert torch.equal(tokens, greedy(peft, ids))
    torch.testing.assert_close(logits, peft(input_ids=ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_top_rung_errs_no_more_than_twice_as_peft_in_bfloat16(
    tiny_llama_factory, tiny_adapter, with_peft, random_ids, device
):
    ids = random_ids(4, 96)
    model = tiny_llama_factory().to(device, torch.bfloat16)
    # the same rounded weights, then no rounding at all
    exact = with_peft(tiny_llama_factory().to(device, torch.bfloat16).float(), tiny_adapter)(input_ids=ids).logits
    with adaptive(model, tiny_adapter):
        ours = relative_error(model(input_ids=ids).logits, exact)
    theirs = relative_error(with_peft(model, tiny_adapter)(input_ids=ids).logits, exact)
    assert ours <= 2 * theirs, f"relative error {ours:.2e}, PEFT's {theirs:.2e}"


@pytest.mark.parametrize("name", ["medquad", "multi30k"])
@torch.no_grad()
def test_real_adapter_equals_peft(datapack, base_model_path, load_model, with_peft, device, name):
    adapter = datapack / "adapters" / name
    with lzma.open(datapack / "tasks" / f"{name}.dev.jsonl.xz", "rt", encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line, _ in zip(lines, range(3), strict=False)]
    tokenizer = load_tokenizer(base_model_path)
    inputs = [tokenizer(prompt, return_tensors="pt").input_ids.to(device) for prompt in prompts]
    model = load_model(base_model_path).to(device)
    with adaptive(model, adapter):
        ours = [greedy(model, ids) for ids in inputs]
    peft = with_peft(model, adapter)
    for mine, ids in zip(ours, inputs, strict=True):
        assert torch.equal(mine, greedy(peft, ids))


@pytest.mark.parametrize("name", ["medquad", "multi30k"])
@torch.no_grad()
def test_real_adapter_in_bfloat16(datapack, base_model_path, load_model, with_peft, device, name):
    adapter = datapack / "adapters" / name
    text = (datapack / "text" / "wikitext2.test.txt").read_text(encoding="utf-8")[:4000]
    ids = load_tokenizer(base_model_path)(text, return_tensors="pt").input_ids[:, :512].to(device)
    exact = with_peft(load_model(base_model_path).to(device), adapter)(input_ids=ids).logits
    model = load_model(base_model_path, torch.bfloat16).to(device)
    with adaptive(model, adapter):
        ours = relative_error(model(input_ids=ids).logits, exact)
    theirs = relative_error(with_peft(model, adapter)(input_ids=ids).logits, exact)
    assert ours <= 2 * theirs, f"relative error {ours:.2e}, PEFT's {theirs:.2e}"


@pytest.mark.parametrize("rung", [2, 4, 6])
@torch.no_grad()
def test_truncated_rung_equals_its_export(
    tiny_llama_factory, tiny_adapter, ladder, with_peft, random_ids, device, tmp_path, rung
):
    model, ids = tiny_llama_factory().to(device), random_ids(2, 50)
    with adaptive(model, tiny_adapter, rung=rung):
        logits = model(input_ids=ids).logits
    peft = with_peft(model, export_rung(ladder.with_rungs((rung,)), rung, tmp_path / "rung"))
    torch.testing.assert_close(logits, peft(input_ids=ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rung", range(6))
@torch.no_grad()
def test_every_rung_in_few_bits_is_what_it_is_on_the_cpu(tiny_llama_factory, coded, random_ids, device, rung):
    model, ids, found = tiny_llama_factory(), random_ids(2, 50), []
    for place in ("cpu", device):
        with activate(model.to(place), static_plan(coded, coded.rungs[rung])):
            found.append(model(input_ids=ids.to(place)).logits.cpu())
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("fade", [1, 4])
@torch.no_grad()
def test_tokens_at_every_rung_in_few_bits_are_what_they_are_on_the_cpu(
    tiny_llama_factory, coded, random_ids, device, fade
):
    settings = Settings(block_tokens=5, fade_tokens=fade, chunk=ChunkSettings(4, 7))
    plan = RunPlan((coded,), PositionPolicy(coded.rungs, 1), settings, Operating.at(torch.tensor([0.0, 3.0]), 5))
    model, ids, found = tiny_llama_factory(), random_ids(2, 90), []
    for place in ("cpu", device):
        with activate(model.to(place), plan, keep=Keep.DECISIONS) as run:
            logits = model(input_ids=ids.to(place)).logits.cpu()
            found.append((logits, run.last.stream.columns()["rung"].cpu(), run.adapter_bytes()))
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].unique().numel() == 6
    assert found[0][2] == found[1][2]
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_device_holds_the_packed_ladder_and_decodes_the_active_rung(tiny_llama_factory, coded, device):
    """Bytes by PyTorch's own count: what activation and a pass allocate and keep."""
    model, ids = tiny_llama_factory().to(device, torch.bfloat16), torch.tensor([[5]], device=device)
    for rung, rows in ((1.25, 2), (4, 4)):
        ladder = coded.up_to(rung)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with activate(model, static_plan(ladder, rung)) as run:
            packed = torch.cuda.memory_allocated() - before
            run.gated(ids, torch.ones_like(ids).bool(), torch.eye(6, device=device)[None, None, rows])
            decoded = torch.cuda.memory_allocated() - before - packed
        # PyTorch allocates in blocks of 512 bytes: of every part of a module's two halves in two banks, and the table
        parts = 2 * 2 * 6 * len(ladder.modules)
        assert packed <= ladder.resident_bytes() + 512 * parts + 2**18
        index = ladder.rung_index(rung)
        wanted = sum(
            2 * sum(map(len, ranges)) * (own.a.width + own.b.width)
            for own, ranges in zip(ladder.modules.values(), ladder.ranges([index]), strict=True)
        )
        assert decoded <= wanted + 512 * 2 * len(ladder.modules) + 2**18


@torch.no_grad()
def test_rows_at_different_rungs_equal_rows_alone(tiny_llama_factory, fixed_plan, random_ids, device):
    model, ids = tiny_llama_factory().to(device), random_ids(3, 60)
    knobs = torch.tensor([0.0, 2.0, 3.0])
    # the rung changes after the first block, and fades
    plan = fixed_plan(block_tokens=8, fade_tokens=4, chunk=ChunkSettings(4, 16))
    with activate(model, plan) as run:
        together = model(input_ids=ids, past_key_values=run.new_cache(3, operating=Operating.at(knobs, 3))).logits
        for row, knob in enumerate(knobs):
            alone = model(
                input_ids=ids[row : row + 1], past_key_values=run.new_cache(1, operating=Operating.at(float(knob), 3))
            ).logits
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_left_padding_changes_nothing(tiny_llama_factory, tiny_adapter, random_ids, device):
    model = tiny_llama_factory().to(device)
    long, short = random_ids(1, 45), random_ids(1, 19, seed=1)
    padded = torch.cat([long, torch.cat([torch.zeros_like(long[:, :26]), short], 1)])
    mask = torch.ones_like(padded)
    mask[1, :26] = 0
    with adaptive(model, tiny_adapter):
        together = greedy(model, padded, mask)
        assert torch.equal(together[:1], greedy(model, long))
        assert torch.equal(together[1:], greedy(model, short))


def test_generate_takes_prompts_on_the_host(tiny_llama_factory, tiny_adapter, random_ids, device):
    model, ids = tiny_llama_factory().to(device), random_ids(1, 20)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    out = generate(
        model, tiny_adapter, ids.cpu(), attention_mask=torch.ones_like(ids).cpu(), return_trace=True, **options
    )
    assert out.sequences.device.type == device.type
    with adaptive(model, tiny_adapter):
        assert torch.equal(out.sequences[:, 20:], greedy(model, ids, max_new_tokens=8))
    assert {chunk.rung for chunk in out.trace[0]} == {8}

"""What the runtime's tests share: PEFT as the reference, real prompts of the data pack, and plans made by hand."""

import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from policy import FULL_KV, Operating, RankPolicy, Settings
from runtime import Ladder, build_ladder, load_adapter
from runtime.plan import RunPlan

PACK_ADAPTERS = ("gsm8k", "medquad", "multi30k", "squad", "wikitext")


@pytest.fixture(scope="session")
def peft_load() -> Callable[[nn.Module, Path], nn.Module]:
    """`peft_load(model, folder)`: PEFT's own model around `model`, in eval mode."""
    from peft import PeftModel

    return lambda model, folder: PeftModel.from_pretrained(model, folder).eval()


@pytest.fixture(scope="session")
def llama_adapter(make_peft_adapter, tiny_llama_factory, tmp_path_factory) -> Path:
    """r=8 on every linear of `tiny_llama`."""
    return make_peft_adapter(tiny_llama_factory, tmp_path_factory.mktemp("adapters") / "llama")


@pytest.fixture(scope="session")
def gpt2_adapter(make_peft_adapter, tiny_gpt2_factory, tmp_path_factory) -> Path:
    """r=8 on every Conv1D of `tiny_gpt2`."""
    return make_peft_adapter(tiny_gpt2_factory, tmp_path_factory.mktemp("adapters") / "gpt2")


@pytest.fixture(scope="session")
def stories_adapter(make_peft_adapter, load_model, stories_path, tmp_path_factory) -> Path:
    """r=8 on every linear of `stories260K`."""
    return make_peft_adapter(lambda: load_model(stories_path), tmp_path_factory.mktemp("adapters") / "stories")


@pytest.fixture(scope="session")
def pack_tokenizer(base_model_path):
    from runtime import load_tokenizer

    return load_tokenizer(base_model_path)


@pytest.fixture(scope="session")
def pack_documents(datapack) -> Callable[..., list[dict]]:
    """`pack_documents(task, count)`: the first `count` dev documents of a task."""

    def read(task: str, count: int) -> list[dict]:
        with lzma.open(datapack / "tasks" / f"{task}.dev.jsonl.xz", "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]

    return read


@pytest.fixture(scope="session")
def varied_ladder() -> Callable[..., Ladder]:
    """`varied_ladder(folder, rungs, seed=0)`: the adapter's ladder with ranks that differ from module to module."""

    def make(folder: Path, rungs: tuple[int, ...], seed: int = 0) -> Ladder:
        ladder = build_ladder(load_adapter(folder), rungs)
        generator = torch.Generator().manual_seed(seed)
        full = ladder.edges[-1]
        share = torch.rand(len(ladder.rungs) - 1, len(full), 1, generator=generator).sort(0).values
        return replace(ladder, edges=torch.cat([(share * (full + 1)).long(), full[None]]))

    return make


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., RunPlan]:
    """`make_plan(ladder, policy_of, knob, **settings)`: a plan from the top rung in full-precision KV unless told."""

    def make(
        ladder: Ladder,
        policy_of: Callable[[tuple[int, ...]], RankPolicy],
        knob: float | Tensor = 0.0,
        kv=FULL_KV,
        start_rung: int | None = None,
        **settings,
    ) -> RunPlan:
        start = len(ladder.rungs) - 1 if start_rung is None else start_rung
        chosen = Settings(**settings, kv=kv)
        return RunPlan((ladder,), policy_of(ladder.rungs), chosen, Operating.at(knob, start, kv))

    return make

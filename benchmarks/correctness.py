"""No speed without correctness: what must hold before `benchmarks.reference` times anything.

Tokens, where the arithmetic allows it: on a tiny model in float32 the reference path and PEFT must choose the same
greedy tokens. Errors, where it does not: bf16 has many legitimate evaluation orders, so on the measured shape the
logits may be off from a float32 model with the adapter merged by at most twice what PEFT's own bf16 logits are.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime import adaptive
from runtime.ladder.adapter import load_adapter
from runtime.plan import RunPlan
from runtime.reference.adaptive import activate

from .shapes import build_model, write_adapter

ERROR_RATIO = 2.0
GATE_TOKENS = 128


def peft_missing() -> str | None:
    """Why PEFT cannot be compared with, or None when it can."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        return f"PEFT is not installed ({error})"
    return None


@contextmanager
def peft_model(model: PreTrainedModel, folder: Path) -> Iterator[Any]:
    """PEFT's own model around `model`, unmerged, adapter in the model's dtype; `model` is plain again afterwards."""
    from peft import PeftModel

    # PEFT would widen a bf16 adapter to float32: slower to run, and no longer the same-dtype comparison.
    wrapped = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()
    try:
        yield wrapped
    finally:
        wrapped.unload()


def random_tokens(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    """Token ids [batch, tokens] on the model's device, the same at each call, no special ones."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def same_greedy_tokens(device: torch.device, new_tokens: int = 48) -> bool:
    """True when the reference path and PEFT agree on every token of two prompts: tiny shape, float32."""
    # Wider than the usual 0.02, so that a random model's logits differ clearly from token to token.
    model: Any = build_model("tiny", torch.float32, device, initializer_range=0.1)
    prompts = random_tokens(model, 2, 24)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": new_tokens}
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(model, 64, Path(folder))
        with adaptive(model, path, fast=False):
            ours = model.generate(input_ids=prompts, do_sample=False, **options)
        with peft_model(model, path) as peft:
            theirs = peft.generate(input_ids=prompts, do_sample=False, **options)
    return torch.equal(ours, theirs)


@torch.no_grad()
def logit_errors(model: PreTrainedModel, plan: RunPlan, folder: Path, *, with_peft: bool) -> dict[str, float]:
    """Relative error of the logits on `GATE_TOKENS` random tokens against float32: `reference` and, perhaps, `peft`."""
    ids = random_tokens(model, 1, GATE_TOKENS)
    exact = merged_logits(model, folder, ids)
    errors = {}
    with activate(model, plan):
        errors["reference"] = relative_error(model(input_ids=ids).logits, exact)
    if with_peft:
        with peft_model(model, folder) as peft:
            errors["peft"] = relative_error(peft(input_ids=ids).logits, exact)
    return errors


def merged_logits(model: PreTrainedModel, folder: Path, ids: Tensor) -> Tensor:
    """Logits of a float32 copy of the model with the adapter added to its weights; the copy is gone afterwards."""
    exact = copy.deepcopy(model).float()
    for name, factors in load_adapter(folder).modules.items():
        weight = exact.get_submodule(name).weight
        a, b = (half.to(weight.device, torch.float32) for half in (factors.a, factors.b))
        weight += factors.scale * (b @ a)
    return exact(input_ids=ids).logits


def relative_error(logits: Tensor, exact: Tensor) -> float:
    """||logits - exact|| / ||exact||; never passes for NaN."""
    return float((logits.float() - exact).norm() / exact.norm())


def check(
    model: PreTrainedModel, plan: RunPlan, folder: Path, device: torch.device, missing: str | None
) -> dict[str, Any]:
    """Run and print the gate. `missing` says why PEFT is left out; then only a loose bound on the error remains.

    Raises SystemExit with status 1 when it does not hold.
    """
    errors = logit_errors(model, plan, folder, with_peft=missing is None)
    record: dict[str, Any] = {"relative_logit_error": errors, "greedy_tokens_equal_peft_float32": None}
    # Without PEFT: 8 bits of mantissa, some hundred roundings deep.
    bound = ERROR_RATIO * errors["peft"] if missing is None else 0.05
    passed = errors["reference"] <= bound
    name = "2 x PEFT" if missing is None else "rough"
    print(f"gate: logits off by {errors['reference']:.2e}, at most {bound:.2e} ({name})")
    if missing is None:
        record["greedy_tokens_equal_peft_float32"] = same = same_greedy_tokens(device)
        passed = passed and same
        print(f"gate: greedy tokens {'equal' if same else 'DIFFER FROM'} PEFT's (tiny shape, float32)")
    else:
        print(f"gate: no comparison with PEFT: {missing}")
    if not passed:
        print("gate: FAILED, nothing is timed")
        raise SystemExit(1)
    return record | {"passed": passed}

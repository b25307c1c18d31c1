"""Write any rung of a ladder, or what a `fixed` policy serves, as a plain PEFT adapter for any other server.

`alpha = rank` makes PEFT's scale exactly 1; the adapter's own scale is already in the factors. Servers that drop
`rank_pattern` silently need one rank for all modules: `uniform=True` pads with zero directions up to the largest.

    python -m runtime.export --adapter FOLDER --policy FOLDER --budget 0.5 --output FOLDER
    python -m runtime.export --adapter FOLDER --rung 16 --output FOLDER
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from policy.checkpoint import PolicyCheckpoint
from policy.files import new_folder
from policy.fixed import FixedPolicy
from policy.limits import Number

from ..ladder import Ladder
from ..ladder.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from ..plan import AdapterSource, ladder_for

SCALE = Number(0, 1e6, above=True)


def served_rung(
    policy: str | Path | PolicyCheckpoint, adapter: AdapterSource, budget: float | None = None
) -> tuple[Ladder, int, float]:
    """What a `fixed` policy serves at `budget` (default: its own): the ladder, the rung in it, and the rung's scale.

    Raises ValueError for a policy that mixes rungs, a budget outside [0, 1], or an adapter that the policy was not
    fitted to, and all that reading either raises.
    """
    checkpoint = policy if isinstance(policy, PolicyCheckpoint) else PolicyCheckpoint.load(policy)
    if not isinstance(checkpoint.policy, FixedPolicy):
        raise ValueError(
            f"policy: expected a fixed one, got {checkpoint.policy.kind}, which mixes rungs within a text; write one "
            "rung of the adapter with --rung, or serve the policy with runtime.generate"
        )
    index = int(checkpoint.operating([checkpoint.budget_for(budget)], [0]).start_rung)
    # The model is the server's business; that the adapter and its rungs are the policy's own is checked.
    ladder = ladder_for(checkpoint, adapter, checkpoint.fingerprints["model"])
    return ladder, ladder.rungs[index], float(checkpoint.policy.scales[index])


def export_policy(
    policy: str | Path | PolicyCheckpoint,
    adapter: AdapterSource,
    output: str | Path,
    *,
    budget: float | None = None,
    uniform: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write what a `fixed` policy serves at `budget` (default: its own), scale included, as a PEFT folder.

    Raises what `served_rung` and `export_rung` raise.
    """
    ladder, rung, scale = served_rung(policy, adapter, budget)
    return export_rung(ladder, rung, output, base_model=ladder.base_model, scale=scale, uniform=uniform, dtype=dtype)


def export_rung(
    ladder: Ladder,
    rung: int,
    output: str | Path,
    *,
    base_model: str | None = None,
    scale: float = 1.0,
    uniform: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write rung `rung` (a rank of `ladder.rungs`) as a PEFT folder and return its path.

    `scale` multiplies the update (a policy's scale for that rung). Raises ValueError for a rung the ladder does not
    have or rank 0 and for a scale at which `dtype` cannot hold the update, FileExistsError when `output` exists:
    nothing is overwritten, and in any of these cases nothing is written.
    """
    ranks = dict(zip(ladder.modules, ladder.rank_table[ladder.rung_index(rung)].tolist(), strict=True))
    scale = SCALE.take("scale", scale)
    largest = max(ranks.values())
    if largest == 0:
        raise ValueError("rung: expected a rank above 0, got 0; rank 0 is the base model without an adapter")
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"output: expected a folder that does not exist, got {output}; choose another")
    kept = {name: rank for name, rank in ranks.items() if rank > 0}
    tensors: dict[str, Tensor] = {}
    for name, rank in kept.items():
        factors = ladder.modules[name]
        rows = largest if uniform else rank
        halves = (factors.a, scale * factors.b)
        a, b = (_rows(x, rank, rows).to(dtype) for x in halves)
        _check_written(name, (a, b), scale * float(factors.singular_values[0]))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.T.cpu().contiguous()
    pattern = {} if uniform else {name: rank for name, rank in kept.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(kept),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    with new_folder(output) as folder:
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    return output


def _check_written(name: str, halves: tuple[Tensor, Tensor], norm: float) -> None:
    """Raise ValueError where numbers, or the update that they give, overflow, or where an update has become none."""
    dtype = halves[0].dtype
    whole = all(bool(half.isfinite().all()) for half in halves) and norm <= torch.finfo(dtype).max
    if not whole or (norm > 0 and not all(bool(half.any()) for half in halves)):
        raise ValueError(
            f"scale: expected one at which {dtype} holds the update of {name}, got an update of norm {norm:g}; choose "
            "one nearer to 1"
        )


def _rows(factor: Tensor, rank: int, rows: int) -> Tensor:
    return torch.cat([factor[:rank], factor.new_zeros(rows - rank, factor.shape[1])])

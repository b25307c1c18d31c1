"""Write any rung of a ladder back as a plain PEFT adapter, for servers that know nothing of ladders.

`alpha = rank` makes PEFT's scale exactly 1; the adapter's own scale is already in the factors. Servers that drop
`rank_pattern` silently need one rank for all modules: `uniform=True` pads with zero directions up to the largest.

    python -m runtime.export --adapter FOLDER --rung 16 --output FOLDER
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from policy.files import new_folder

from ..ladder import Ladder
from ..ladder.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME


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
    have or rank 0, FileExistsError when `output` exists: nothing is overwritten.
    """
    ranks = dict(zip(ladder.modules, ladder.rank_table[ladder.rung_index(rung)].tolist(), strict=True))
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: expected a positive number, got {scale}; correct it")
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
        a, b = (_rows(x, rank, rows) for x in (factors.a, scale * factors.b))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.to(dtype).cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.T.to(dtype).cpu().contiguous()
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


def _rows(factor: Tensor, rank: int, rows: int) -> Tensor:
    return torch.cat([factor[:rank], factor.new_zeros(rows - rank, factor.shape[1])])

"""Write any rung of a ladder, or what a `fixed` policy serves, for another server or as a folder of its own.

A plain PEFT adapter is what any server takes. Rungs in fewer bits are decoded for it, so it is as large as the number
of its directions says; `alpha = rank` makes PEFT's scale exactly 1, the adapter's own scale and the rung's are already
in the factors. The top rung leaves as the adapter itself. Servers that drop `rank_pattern` silently need one rank for
all modules: `uniform=True` pads with zero directions up to the largest.

Packed, the bits stay as they are: a ladder folder, of one rung or whole, which this runtime takes for an adapter.

    python -m runtime.export --adapter FOLDER --policy FOLDER --budget 0.5 --output FOLDER
    python -m runtime.export --adapter FOLDER --rung 16 --output FOLDER
    python -m runtime.export --adapter FOLDER --rung 16 --packed --output FOLDER
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from policy.checkpoint import PolicyCheckpoint
from policy.files import new_folder
from policy.fixed import FixedPolicy
from policy.limits import Number
from policy.rungs import Rung

from ..ladder import Ladder, save_ladder
from ..ladder.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from ..ladder.formats import WIDE_DTYPES
from ..plan import AdapterSource, ladder_for

SCALE = Number(0, 1e6, above=True)


def served_rung(
    policy: str | Path | PolicyCheckpoint, adapter: AdapterSource, budget: float | None = None
) -> tuple[Ladder, Rung, float]:
    """What a `fixed` policy serves at `budget` (default: its own): the ladder, the rung in it, and the policy's scale
    for that rung, which comes on top of the ladder's own.

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
    dtype: torch.dtype | None = None,
) -> Path:
    """Write what a `fixed` policy serves at `budget` (default: its own), scale included, as a PEFT folder.

    Raises what `served_rung` and `export_rung` raise.
    """
    ladder, rung, scale = served_rung(policy, adapter, budget)
    return export_rung(ladder, rung, output, base_model=ladder.base_model, scale=scale, uniform=uniform, dtype=dtype)


def export_rung(
    ladder: Ladder,
    rung: Rung,
    output: str | Path,
    *,
    base_model: str | None = None,
    scale: float = 1.0,
    uniform: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write rung `rung` (one of `ladder.rungs`), decoded, as a PEFT folder and return its path.

    A module's rank is the number of directions that the rung reads of it. `scale` multiplies the update, beside the
    ladder's scale for that rung. `dtype` is that of the tensors; by default the adapter's own where it holds every
    number exactly, else float32.

    Raises ValueError for a rung that the ladder does not have or that is not in memory, for one without directions,
    and for a scale at which `dtype` cannot hold the update; FileExistsError when `output` exists: nothing is
    overwritten, and in any of these cases nothing is written.
    """
    scale = SCALE.take("scale", scale)
    index = _readable(ladder, rung)
    output = _absent(output)
    updates = {name: _update(ladder, name, index) for name in ladder.modules}
    # A scale may take every number to 0, so that nothing would be left to hold against it.
    norms = {name: scale * _norm(a, b) for name, (a, b) in updates.items()}
    kept = {name: (a, scale * b) for name, (a, b) in updates.items() if len(a)}
    dtype = _exact_dtype(ladder, kept.values()) if dtype is None else dtype
    ranks = {name: len(a) for name, (a, _) in kept.items()}
    largest = max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in kept.items():
        rows = largest if uniform else len(a)
        halves = a.to(dtype), b.to(dtype)
        _check_written(name, halves, norms[name])
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _padded(halves[0], rows).cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _padded(halves[1], rows).T.cpu().contiguous()
    pattern = {} if uniform else {name: rank for name, rank in ranks.items() if rank != largest}
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


def export_packed(ladder: Ladder, output: str | Path, *, rung: Rung | None = None, scale: float = 1.0) -> Path:
    """Write a ladder in its own bits, whole or one rung alone, as a folder that `open_ladder` takes; return its path.

    Of one rung nothing else is in the file. It is a ladder of which that rung is in memory, and the exact adapter is
    known by name. `scale` multiplies the rung's update, beside the ladder's own.

    Raises ValueError for a rung that the ladder does not have or that is not in memory, for one without directions,
    for the exact adapter, which is packed as it is, and for a scale of the whole; FileExistsError when `output` exists.
    """
    scale = SCALE.take("scale", scale)
    if rung is not None:
        index = _readable(ladder, rung)
        if index == len(ladder.rungs) - 1:
            raise ValueError(
                f"rung: expected one below {rung} to pack, got the adapter itself, which has no fewer bits; write it "
                "unpacked"
            )
        ladder = ladder.with_rungs((rung,)).up_to(rung)
        ladder = replace(ladder, scales=(scale * ladder.scales[0], 1.0))
    elif scale != 1:
        raise ValueError(f"scale: expected 1 for a whole ladder, got {scale:g}; name a rung, or leave it out")
    return save_ladder(ladder, _absent(output))


def folder_bytes(folder: Path) -> int:
    """Size of a written folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def _readable(ladder: Ladder, rung: Rung) -> int:
    """The index of a rung that has directions, all of them in memory. Raises ValueError for any other."""
    index = ladder.rung_index(rung)
    ladder.require_resident(index)
    if not bool(ladder.rank_table[index].any()):
        raise ValueError(
            f"rung: expected one with directions, got {rung}, the base model without an adapter; name a higher one"
        )
    return index


def _absent(output: str | Path) -> Path:
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"output: expected a folder that does not exist, got {output}; choose another")
    return output


def _update(ladder: Ladder, name: str, rung: int) -> tuple[Tensor, Tensor]:
    """a [n, d_in] and b [n, d_out] of a module at the rung of this index, as precise as the ladder holds them."""
    return ladder.update(name, rung, torch.promote_types(ladder.modules[name].b.wide.dtype, torch.float32))


def _exact_dtype(ladder: Ladder, halves: Iterable[tuple[Tensor, Tensor]]) -> torch.dtype:
    """The narrowest dtype of the adapter's that holds every number, float32 where none does."""
    numbers = [x for pair in halves for x in pair]
    own = {rows.wide.dtype for factors in ladder.modules.values() for rows in (factors.a, factors.b)}
    fitting = (d for d in WIDE_DTYPES if d in own and all(torch.equal(x.to(d).to(x.dtype), x) for x in numbers))
    return next(fitting, torch.float32)


def _norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of b.T @ a."""
    a, b = a.double(), b.double()
    return float(((a @ a.T) * (b @ b.T)).sum().clamp_min(0).sqrt())


def _check_written(name: str, halves: tuple[Tensor, Tensor], norm: float) -> None:
    """Raise ValueError where numbers, or the update that they give, overflow, or where an update has become none."""
    dtype = halves[0].dtype
    whole = all(bool(half.isfinite().all()) for half in halves) and norm <= torch.finfo(dtype).max
    if not whole or (norm > 0 and not all(bool(half.any()) for half in halves)):
        raise ValueError(
            f"scale: expected one at which {dtype} holds the update of {name}, got an update of norm {norm:g}; choose "
            "one nearer to 1"
        )


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])

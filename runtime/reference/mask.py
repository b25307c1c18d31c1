"""The attention mask of one block over a row-relative cache.

Slot s of a row is its token s, so causality is `s <= position`; a slot whose token is not kept (dropped, sparsified,
never written) is hidden. Models with a sliding window see only the slots inside it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def block_mask(
    config: PretrainedConfig, positions: Tensor, visible: Tensor, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Additive mask [B, 1, T, N] of `dtype` for queries at positions [B, T] (-1: padding) and visible [B, N] slots.

    A dict by layer type for models that mix full and sliding layers, as transformers takes it. Raises ValueError for a
    layer type that is neither.
    """
    slots = torch.arange(visible.shape[1], device=visible.device)
    query = positions.clamp(min=0)[..., None]  # padding looks at the first token: finite, and never read
    causal = (slots <= query) & visible[:, None]
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    unknown = kinds - {FULL, SLIDING}
    if unknown:
        raise ValueError(f"model: expected full or sliding attention layers, got {sorted(unknown)}; not supported")
    if not kinds:
        # Older configurations name a window without layer types; some carry one and switch it off.
        kinds = {SLIDING if window is not None and getattr(config, "use_sliding_window", True) else FULL}
    masks = {}
    for kind in kinds:
        allowed = causal & (slots > query - window) if kind == SLIDING and window is not None else causal
        # Every query keeps at least itself; a fully hidden row would turn its softmax into NaN.
        allowed = allowed | (slots == query)
        masks[kind] = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )[:, None]
    return masks if len(masks) > 1 else next(iter(masks.values()))

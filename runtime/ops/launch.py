"""How a kernel follows the one before it.

A decode step is a few hundred short kernels in a row. Launched the ordinary way each waits until the one before has
wholly drained. With programmatic dependent launch (Hopper and newer) a kernel's programs start while the last programs
of the one before still run, fetch what does not depend on them, and wait only then:

    release(PDL)                  # the one behind may start
    weights = tl.load(...)        # nothing of this step writes them
    wait(PDL)                     # the kernel before has finished and its writes can be seen
    x = tl.load(...)              # what the kernel before wrote
    ...

Some program of every kernel of a step waits, whether it needs to or not, so what has been finished once stays so for
all behind. Only those that open a step, `decide`, `resolve` and `embed`, wait before they release, so that whoever
comes behind may read at once what was resolved: what releases late holds up every launch behind it (docs/log.md).

What is not needed yet can be on its way as well: `fetch` brings memory as far as the L2 cache and holds no register.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in Triton's interpreter, which knows no assembly."""


@triton.jit
def dot(a, b, sums):
    """sums + a @ b in float32. Triton's interpreter multiplies the bit patterns of bfloat16, so it is given floats."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def fetch(pointer, size, PDL: tl.constexpr):
    """Have `size` bytes, a multiple of 16, from `pointer` on, aligned alike, brought to the L2 cache; nobody waits, one
    thread asks for all. The memory must exist; what is in it may still change."""
    if PDL:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
            " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [pointer.to(tl.int64, bitcast=True), size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def release(PDL: tl.constexpr):
    """The next kernel may start; what it reads of this one it waits for itself."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Go on when the kernel before this one has finished."""
    if PDL:
        gdc_wait()


@lru_cache(maxsize=16)
def dependent(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch on `device`: the constexpr `PDL`, and what makes Triton launch that way.

    Products are fused with sums whatever the release: Triton 3.10 will only do so when told to, and 3.9 warns of that.
    """
    if device.type != "cuda":
        return {"PDL": False}
    able = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": able, "launch_pdl": able, "enable_fp_fusion": True}

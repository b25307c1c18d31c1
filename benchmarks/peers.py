"""What the decode engine is measured against: the same greedy steps at the same context, by other means.

    graphed           plain PyTorch in one CUDA graph, compiled or not; no adapter, or one for every row
    generating        transformers' own loop: over a static cache, which it compiles for, or eager over a dynamic one
    peft_generating   the same around PEFT's model, adapter not merged

A merged adapter costs what none costs. No peer prefills: a KV cache is filled with random numbers, and the last step
that is timed reads `context` tokens of it. Every peer is a context manager of a `Run`, and what it allocated is free
when it is left; `measure` does it all.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from .correctness import peft_model, random_tokens
from .fused import random_updates
from .graphed import GraphedPeer
from .printing import spread, synchronise
from .reference import Clock

Run = Callable[[int], float]
"""Number of decode steps of all rows -> mean milliseconds of one."""


def measure(peer: AbstractContextManager[Run], steps: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """ms_per_step (median and range of `repeats` runs after a warm-up) and peak_bytes, None without a GPU.

    The peak is of all that is allocated on the device, the model included, from the set-up of the peer on.
    """
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with peer as run:
        run(steps)
        times = [run(steps) for _ in range(repeats)]
    del run
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    release(device)
    return {"ms_per_step": spread(times), "peak_bytes": peak}


def release(device: torch.device) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ms_per_step(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Mean milliseconds of `step`, called `steps` times in a row without waiting in between; the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return 1000 * (time.perf_counter() - start) / steps
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    synchronise(device)
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / steps


@contextmanager
def graphed(
    model: PreTrainedModel, batch: int, context: int, rank: int | None = None, *, compiled: bool = False
) -> Iterator[Run]:
    """Plain PyTorch in one CUDA graph; with a rank, every row has a random adapter of its own."""
    updates = random_updates(model, batch, rank) if rank else None
    peer = GraphedPeer(model, batch, context, updates, compiled=compiled)
    del updates
    try:
        yield lambda steps: ms_per_step(peer.step, steps, model.device)
    finally:
        peer.close()


@contextmanager
def generating(model: Any, batch: int, context: int, *, static: bool) -> Iterator[Run]:
    """transformers' `generate`, of a model or of PEFT's around one, the last steps up to `context` tokens.

    On a GPU `generate` compiles the forward pass of one token, with CUDA graphs, wherever the cache is static.
    """
    cache = filled_cache(model, batch, context, static=static)

    def run(steps: int) -> float:
        # The first new token comes from an uncompiled pass, even when a single token is left to process.
        prompt = random_tokens(model, batch, context - steps)
        _rewind(cache, context, steps + 1)
        clock = Clock()
        model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, streamer=clock,
            max_new_tokens=steps + 1, do_sample=False, eos_token_id=None,
        )  # fmt: skip
        return clock.decode_ms()

    try:
        yield run
    finally:
        cache.layers.clear()
        if static:
            torch.compiler.reset()


@contextmanager
def peft_generating(model: PreTrainedModel, folder: Path, batch: int, context: int, *, static: bool) -> Iterator[Run]:
    """`generating` with PEFT's adapter from `folder` on all rows, not merged."""
    with peft_model(model, folder) as wrapped, generating(wrapped, batch, context, static=static) as run:
        yield run


def filled_cache(model: Any, batch: int, context: int, *, static: bool) -> Cache:
    """A cache that holds `context` random tokens; a static one has room for no more."""
    config = model.config
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    cache = StaticCache(config=config, max_cache_len=context) if static else DynamicCache(config=config)
    for index in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, index)
    return cache


def _rewind(cache: Cache, context: int, tokens: int) -> None:
    """Forget the last `tokens` of `context`."""
    if isinstance(cache, StaticCache):
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(context - tokens)
    else:
        cache.crop(-tokens)

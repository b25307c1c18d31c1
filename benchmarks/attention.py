"""Which of PyTorch's own implementations of attention reads a KV cache fastest for one token a row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

PREFERRED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Where none was measured. Flash attention splits the context of a few rows over the whole GPU; it knows no float32."""
CANDIDATES = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
LAYERS = 8
"""Read one after the other, so that none comes from the cache."""


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where all peers warm up and are captured: cuBLAS keeps a workspace for good for every stream that it has seen."""
    return torch.cuda.Stream(device)


@torch.no_grad()
def fastest(query: Tensor, kv: Sequence[Tensor]) -> list[SDPBackend]:
    """The fastest at query [B, Hkv, G, D] over keys and values kv [2, B, Hkv, S, D] of several layers, in a graph as it
    will be used; behind it those preferred, for what it refuses. Needs a GPU."""
    times: dict[SDPBackend, float] = {}
    for backend in CANDIDATES:
        try:
            times[backend] = _milliseconds(backend, query, kv[:LAYERS])
        except RuntimeError:  # it does not do this dtype or shape
            torch.cuda.synchronize(query.device)
    best = sorted(times, key=lambda backend: times[backend])[:1]
    return [*best, *(own for own in PREFERRED if own not in best)]


def _milliseconds(backend: SDPBackend, query: Tensor, kv: Sequence[Tensor]) -> float:
    def run() -> None:
        for own in kv:
            scaled_dot_product_attention(query, own[0], own[1])

    with warnings.catch_warnings(), sdpa_kernel(backend):
        warnings.simplefilter("ignore")  # a refusal is explained in warnings
        aside = side_stream(query.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(3):
        graph.replay()
    end.record()
    end.synchronize()
    graph.reset()
    return begin.elapsed_time(end)

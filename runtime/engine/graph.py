"""A step as one launch: a CUDA graph of everything that it does, replayed token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UPS = 2
"""Runs before the capture: kernels are compiled in the first, and nothing may be compiled while a graph is captured."""


class Graph:
    """`step` captured on `device`; without a GPU it is run instead."""

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step, self._graph = step, None
        if device.type != "cuda":
            return
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            step()

    def replay(self) -> None:
        """Run the step once; the host goes on at once."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

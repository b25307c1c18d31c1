"""A step as one launch: a CUDA graph of everything that it does, replayed token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UPS = 2
"""Runs before the capture: kernels are compiled in the first, and nothing may be compiled while a graph is captured."""


class Branches:
    """Launches that need not wait for each other: branches of a graph; without a GPU one goes behind the other."""

    def __init__(self, device: torch.device, count: int) -> None:
        """For up to `count` of them."""
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(count - 1)] if device.type == "cuda" else []

    def run(self, *works: Callable[[], object]) -> None:
        """All of them; whoever is launched next waits for all."""
        if not self._streams:
            for work in works:
                work()
            return
        here = torch.cuda.current_stream(self._device)
        for stream, work in zip(self._streams, works[1:], strict=False):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                work()
        works[0]()
        for stream in self._streams[: len(works) - 1]:
            here.wait_stream(stream)


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

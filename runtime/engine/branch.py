"""Work beside other work: a second stream, which a captured graph keeps as a branch of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Branch:
    """A stream beside the current one of `device`; without a GPU things are done one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self, work: Callable[[], None]) -> Iterator[None]:
        """Do `work` while the block is done; what comes behind the block sees both."""
        if self._stream is None:
            work()
            yield
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        yield
        current.wait_stream(self._stream)

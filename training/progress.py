"""A progress bar on whatever takes longer than two seconds, on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

PATIENCE_SECONDS = 2.0

_Item = TypeVar("_Item")


def with_progress(
    items: Iterable[_Item], name: str, total: int, size: Callable[[_Item], int] = lambda _: 1
) -> Iterator[_Item]:
    """The items; on a terminal with a progress bar once they have taken longer than two seconds.

    `total` is the sum of `size` over the items, by default their number.
    """
    started = time.perf_counter()
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True)
    task = bar.add_task(name, total=total)
    try:
        for item in items:
            yield item
            bar.advance(task, size(item))
            slow = time.perf_counter() - started > PATIENCE_SECONDS
            if slow and console.is_terminal and not bar.live.is_started:
                bar.start()
    finally:
        if bar.live.is_started:
            bar.stop()

"""A progress bar on whatever takes longer than two seconds, on a terminal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import lightning as L
from rich.console import Console
from rich.progress import Progress

from .console import is_first_process

PATIENCE_SECONDS = 2.0

Advance = Callable[[int], None]

_Item = TypeVar("_Item")


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Advance]:
    """Yield what moves the bar by some of `total` steps; it shows after two seconds, on a terminal, until the end."""
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True)
    task = bar.add_task(name, total=total)
    # A first step of minutes should not leave the terminal empty until it is over.
    patience = threading.Timer(PATIENCE_SECONDS, bar.start)
    patience.daemon = True
    try:
        if console.is_terminal and is_first_process():
            patience.start()
        yield lambda steps: bar.advance(task, steps)
    finally:
        patience.cancel()
        if patience.ident is not None:
            patience.join()
        if bar.live.is_started:
            bar.stop()


def with_progress(
    items: Iterable[_Item], name: str, total: int, size: Callable[[_Item], int] = lambda _: 1
) -> Iterator[_Item]:
    """The items, under a `progress_bar`; `total` is the sum of `size` over the items, by default their number."""
    with progress_bar(name, total) as advance:
        for item in items:
            yield item
            advance(size(item))


class BatchBar(L.Callback):
    """A `progress_bar` over the batches of all epochs that a trainer's fit has ahead of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._open = ExitStack()
        self._advance: Advance | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        epochs = (trainer.max_epochs or 0) - trainer.current_epoch
        self._advance = self._open.enter_context(progress_bar(self.name, epochs * int(trainer.num_training_batches)))

    def on_train_batch_end(self, *_: Any) -> None:
        assert self._advance is not None, "Lightning starts before it trains"
        self._advance(1)

    def on_train_end(self, *_: Any) -> None:
        self._open.close()

    def on_exception(self, *_: Any) -> None:
        self._open.close()

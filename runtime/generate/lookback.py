"""Tokens as the host sees them while the device goes on."""

from __future__ import annotations

import torch
from transformers.generation.streamers import BaseStreamer

from ..engine.decoder import Decoder


class Lookback:
    """The newest tokens of the first `rows` rows, copied step by step: nothing on the device waits for it, and the host
    looks a step behind."""

    def __init__(self, decoder: Decoder, rows: int, steps: int, streamer: BaseStreamer | None) -> None:
        g, self._cuda, self._streamer = decoder.generated, decoder.model.device.type == "cuda", streamer
        self._newest = g.tokens[:rows], g.ended[:rows]
        # All at once: pinning memory waits for the device.
        self._tokens, self._over = (
            torch.empty(steps, rows, dtype=own.dtype, pin_memory=self._cuda) for own in self._newest
        )
        self._events: list[torch.cuda.Event | None] = []
        self._read = 0
        self._ended = False

    def note(self) -> None:
        """Have the newest tokens copied."""
        step, event = len(self._events), None
        for kept, own in zip((self._tokens, self._over), self._newest, strict=True):
            kept[step].copy_(own, non_blocking=True)
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
        self._events.append(event)

    def all_ended(self) -> bool:
        """Whether all rows had ended a step ago."""
        self._look(len(self._events) - 1)
        return self._ended

    def finish(self) -> int:
        """Look at what is left; how many columns there are up to the last row's end."""
        self._look(len(self._events))
        if self._streamer is not None:
            self._streamer.end()
        return self._read

    def _look(self, count: int) -> None:
        while self._read < count and not self._ended:
            event = self._events[self._read]
            if event is not None:
                event.synchronize()
            if self._streamer is not None:
                self._streamer.put(self._tokens[self._read])
            self._ended = bool(self._over[self._read].all())
            self._read += 1

"""Tokens as the host sees them while the device goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..engine.decoder import Decoder


class Lookback:
    """The newest tokens of the first `rows` rows, copied step by step: nothing on the device waits for it, and the host
    looks a step behind."""

    def __init__(self, decoder: Decoder, rows: int, streamer: BaseStreamer | None) -> None:
        self._generated, self._rows, self._streamer = decoder.generated, rows, streamer
        self._cuda = decoder.model.device.type == "cuda"
        self._notes: list[tuple[Tensor, Tensor, Any]] = []
        self._read = 0
        self._ended = False

    def note(self) -> None:
        """Have the newest tokens copied."""
        g, event = self._generated, None
        if self._cuda:
            tokens, ended = (torch.empty(self._rows, dtype=own.dtype, pin_memory=True) for own in (g.tokens, g.ended))
            tokens.copy_(g.tokens[: self._rows], non_blocking=True)
            ended.copy_(g.ended[: self._rows], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            tokens, ended = g.tokens[: self._rows].clone(), g.ended[: self._rows].clone()
        self._notes.append((tokens, ended, event))

    def all_ended(self) -> bool:
        """Whether all rows had ended a step ago."""
        self._look(len(self._notes) - 1)
        return self._ended

    def finish(self) -> int:
        """Look at what is left; how many columns there are up to the last row's end."""
        self._look(len(self._notes))
        if self._streamer is not None:
            self._streamer.end()
        return self._read

    def _look(self, count: int) -> None:
        while self._read < count and not self._ended:
            tokens, ended, event = self._notes[self._read]
            if event is not None:
                event.synchronize()
            if self._streamer is not None:
                self._streamer.put(tokens)
            self._ended = bool(ended.all())
            self._read += 1

"""What rows spent, as running sums of fixed size, and on request everything that was decided.

The sums are always kept: tokens by active rung, prompt and response apart, so that a generation of any length says
what it cost in the same few numbers. The record grows with the text: scoring asks for the rungs, collection and
`return_trace` for every decision (`Keep`).

Shape legend: B rows, T tokens of a block, N tokens so far, S signals, J rungs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from policy.rungs import Rung
from policy.settings import SIGNALS, STATS

from .signals import NO_TOKEN

PROMPT, RESPONSE = 0, 1
NO_RUNG = -1


@dataclass(frozen=True)
class Block:
    """What one block decided; tensors stay on the device."""

    positions: Tensor
    """[B, T] long"""
    real: Tensor
    """[B, T] bool"""
    opens: Tensor
    """[B, T] bool: a chunk opens here."""
    rung: Tensor
    """[B, T] long: the chunk's rung index."""
    scale: Tensor
    """[B, T] the chunk's scale."""
    active: Tensor
    """[B, T] long: highest rung index with any weight."""
    weights: Tensor
    """[B, T, J] float32 over rungs, scales folded in."""
    held: Tensor
    """[B, T, S, 3] statistics that the latest decision saw."""
    held_valid: Tensor
    """[B, T, S] bool"""
    first: Tensor
    """[B, T, 4] the signals that follow from the token itself."""
    age: Tensor
    """[B, T] float32 as in `Summary`."""
    hidden: Tensor
    """[B, T, 2 d] as in `Summary`; d = 0 where nobody asks."""


class Keep(IntEnum):
    """What a stream keeps of every token, each step with all that comes before it; all but the first grow with the
    text."""

    SUMS = 0
    """Nothing: sums alone."""
    RUNGS = 1
    """The highest active rung."""
    DECISIONS = 2
    """Signals, chunks, rungs and scales."""


class Record:
    """What was decided and heard since the first token, as far as it was asked for."""

    def __init__(self) -> None:
        self.active: list[Tensor] = []
        self.blocks: list[Block] = []
        self.complexities: list[Tensor] = []

    def columns(self) -> dict[str, Tensor]:
        """By column of processing, [B, N, ...]: the fields of `Block`, and `complexity` [B, N]."""
        joined = {f.name: torch.cat([getattr(block, f.name) for block in self.blocks], 1) for f in fields(Block)}
        return {**joined, "complexity": torch.cat(self.complexities, 1)}


def count_rungs(active: Tensor, counted: Tensor, rungs: int) -> Tensor:
    """[B, J] float64: how many of the `counted` [B, T] tokens had active rung j, active [B, T] long."""
    counts = torch.zeros(len(active), rungs, dtype=torch.float64, device=active.device)
    return counts.scatter_add_(1, active, counted.double())


def mean_rank(counts: Tensor, rung_rank: Tensor, beside: Tensor | None = None) -> float:
    """Byte-weighted mean active rank of counts [B, J] at equivalent ranks [B, J], or mean of whatever else every rung
    costs; nan where nothing was counted. `beside` [B, J] counts what tokens read beside the rung they are counted at.
    """
    read = counts if beside is None else counts + beside
    return float((read * rung_rank).sum() / counts.sum())


class Sums:
    """Tokens by active rung since the first token, prompt and response apart.

    Rows that have ended are fed padding while others go on: `expect` tells by which tokens to know them, and their
    padding is not counted.
    """

    def __init__(self, rows: int, rungs: int, device: torch.device) -> None:
        self.counts = torch.zeros(rows, 2, rungs, dtype=torch.float64, device=device)
        """[B, 2, J]: every token at its highest active rung"""
        self.beside = torch.zeros_like(self.counts)
        """[B, 2, J]: what fades from bank to bank at its other rung too, which it reads beside the highest"""
        none = torch.zeros(rows, rungs, dtype=torch.float64, device=device)
        self._latest = [none, none]
        """What the latest block added to the response of both."""
        self._ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self._ends = torch.zeros(0, dtype=torch.long, device=device)
        self._pad = NO_TOKEN
        self._expecting = False

    def expect(self, ends: list[int], pad: int | None) -> None:
        """A response ends with one of the tokens `ends`, or else where `pad` follows it."""
        self._ends = torch.tensor(ends, dtype=torch.long, device=self.counts.device)
        self._pad = NO_TOKEN if pad is None or pad in ends else pad
        self._ended, self._expecting = torch.zeros_like(self._ended), True

    def add(self, tokens: Tensor, real: Tensor, response: Tensor, active: Tensor, beside: Tensor | None = None) -> None:
        """Count a block: tokens [B, T], real and response [B, T] bool, active and beside [B, T] long, the latter
        `NO_RUNG` where a token reads no second bank; without it none does."""
        counted = real & ~(self._ended[:, None] & response)
        if self._expecting and tokens.shape[1] == 1:  # decode: one token at a time
            generated = (real & response)[:, 0] & ~self._ended
            padded = generated & (tokens[:, 0] == self._pad)
            # What another criterion stopped went through the model once more before its padding came.
            self.counts[:, RESPONSE] -= self._latest[0] * padded[:, None]
            if beside is not None:
                self.beside[:, RESPONSE] -= self._latest[1] * padded[:, None]
            self._ended = self._ended | padded | (generated & torch.isin(tokens[:, 0], self._ends))
            counted = real & ~(self._ended[:, None] & response)
        self._latest[0] = _count(self.counts, active, counted, response)
        if beside is not None:
            self._latest[1] = _count(self.beside, beside.clamp(min=0), counted & (beside != NO_RUNG), response)

    def select(self, index: Tensor) -> Sums:
        """The rows `index` [N] long, in that order; rows may repeat."""
        other = Sums(len(index), self.counts.shape[2], self.counts.device)
        other.counts, other.beside = self.counts[index], self.beside[index]
        other._latest, other._ended = [latest[index] for latest in self._latest], self._ended[index]
        other._ends, other._pad, other._expecting = self._ends, self._pad, self._expecting
        return other

    def restarted(self) -> Sums:
        """Sums before the first token of the same rows; a response that has ended is not counted again."""
        other = self.select(torch.arange(len(self.counts), device=self.counts.device))
        for sums, own in ((other.counts, self.counts), (other.beside, self.beside)):
            sums.zero_()
            sums[:, RESPONSE] = own[:, RESPONSE] * self._ended[:, None]
        return other


def _count(sums: Tensor, rung: Tensor, counted: Tensor, response: Tensor) -> Tensor:
    """Add the `counted` [B, T] tokens to sums [B, 2, J]; returns what the response gained, [B, J]."""
    gained = count_rungs(rung, counted & response, sums.shape[2])
    sums[:, RESPONSE] += gained
    sums[:, PROMPT] += count_rungs(rung, counted & ~response, sums.shape[2])
    return gained


@dataclass(frozen=True)
class ChunkTrace:
    """One chunk as it was decided."""

    start: int
    """Position of its first token, from the row's first real token."""
    length: int
    signals: dict[str, dict[str, float] | None]
    """Per signal mean, max and last value that the decision saw; None before the first one exists."""
    rung: Rung
    """Equivalent rank."""
    scale: float
    kv_format: list[str]
    """Format of every KV page that holds tokens of this chunk, oldest first, as of when the trace was taken."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def trace(
    columns: dict[str, Tensor], length: int, rungs: tuple[Rung, ...], page_formats: list[str], page_tokens: int
) -> list[ChunkTrace]:
    """The chunks of one row up to `length` tokens.

    columns are the row's of `Record.columns`, [N, ...]; `page_formats` are those of its KV pages, oldest first.
    """
    row = {name: value.cpu() for name, value in columns.items()}
    order = [i for i in row["real"].nonzero()[:, 0].tolist() if row["positions"][i] < length]
    starts = [i for i in order if row["opens"][i]]
    positions = [int(row["positions"][i]) for i in starts]
    ends = [*positions[1:], length]
    chunks = []
    for i, start, end in zip(starts, positions, ends, strict=True):
        pages = page_formats[start // page_tokens : (end - 1) // page_tokens + 1]
        signals = {
            name: dict(zip(STATS, row["held"][i, s].tolist(), strict=True)) if row["held_valid"][i, s] else None
            for s, name in enumerate(SIGNALS)
        }
        rung, scale = rungs[int(row["rung"][i])], float(row["scale"][i])
        chunks.append(ChunkTrace(start, end - start, signals, rung, scale, pages))
    return chunks

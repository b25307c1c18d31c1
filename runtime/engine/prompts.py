"""Prompts on their way into the engine: what is decided for their tokens, the passes that process them, their pages.

A row's prompt goes through the model in blocks, as its policy says; one that nothing is decided for goes whole, or in
whatever pieces a pass has room for. Before a block its pages are claimed, behind it those that have left the window
get their formats. Signals and decisions are those of `control.stream`, the prompt's rung is its start rung, and each
token's scale its own. The host waits for nothing.

Shape legend: n rows that a stream decides for, T tokens of a pass, C columns of a block, V vocabulary, J rungs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

from policy.operating import Operating
from policy.settings import PAGE_TOKENS, Settings

from ..control.bucket import Offer
from ..control.signals import log_probabilities
from ..control.stream import Stream
from ..kv.units import pages_for
from ..ops.pages import Turned, claim
from ..ops.prompt.settling import give_back, settle_pages
from ..ops.prompt.tiles import FIELDS, Part, tiles_of
from ..ops.quantise import quantise_turned
from ..sending import put, to_device
from .control import Ladders
from .decoder import probed_layers
from .graph import Graph
from .lanes import Lanes
from .loaded import Key, Loaded
from .model import Model
from .page_pool import Pool, set_policy
from .prompt_pass import PassBuffers, PromptPass, Room
from .store import AdapterStore


class Prompt:
    """Rows that follow each other in the bucket and share a stream, on their way through the model."""

    def __init__(
        self, first: int, prompts: Sequence[Sequence[int]], stream: Stream, operating: Operating, offer: Offer,
        slots: Sequence[int], *, blocks: int | None, device: torch.device,
    ) -> None:  # fmt: skip
        """`first` is the number of the first of them. `operating` and `offer` are the stream's, on the host; `slots`
        say where their ladders lie. `blocks` tokens make a block; None: nothing depends on how the prompt is cut."""
        self.first, self.stream, self.operating, self.slots, self.blocks = first, stream, operating, list(slots), blocks
        self.counts = [len(own) for own in prompts]
        self.longest, self.done = max(self.counts), 0
        ids = torch.zeros(len(prompts), self.longest, dtype=torch.long)
        for row, own in enumerate(prompts):
            ids[row, : len(own)] = torch.tensor(own, dtype=torch.long)
        self.tokens = to_device(ids, device)
        """[n, longest] long, padding trailing"""
        self.lengths = to_device(torch.tensor(self.counts, dtype=torch.int32), device)
        """[n] int32"""
        self.scales: Tensor | None = None
        """[n, 1, J] float32: the ladders' own; None where there are none"""
        self.logits: Tensor | None = None
        """[n, V] float32 behind the last token of every row, as far as they are there"""
        stream.prompt_tokens = stream.state.position + self.lengths
        self.start = stream.static or torch.minimum(operating.start_rung, offer.resident).tolist()
        """The rung of every row as long as its bucket can pay for it"""
        self.moves = stream.static is None and not stream.affordable

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def over(self) -> bool:
        """Whether all of it has been processed."""
        return self.done == self.longest

    def upto(self, tokens: int) -> int:
        """The column that a pass with room for `tokens` more tokens of every row ends at; `done` where it has none for
        a block."""
        if self.blocks is None:
            return min(self.longest, self.done + tokens)
        end = min(self.longest, self.done + self.blocks)
        return end if end - self.done <= tokens else self.done

    def columns(self, end: int) -> list[int]:
        """Of every row its tokens from `done` up to column `end`."""
        return [max(0, min(count, end) - self.done) for count in self.counts]


@dataclass(frozen=True)
class Taken:
    """Tokens of a row that a pass processes."""

    prompt: Prompt
    row: int
    """Of the prompt's"""
    done: int
    """Position of the first of them"""
    tokens: int
    weights: Tensor
    """[tokens] float32: what multiplies their updates"""
    runs: list[tuple[int, int]]
    """Rung and number of tokens, of those that follow each other at one rung"""


Heard = tuple[int, Tensor, Tensor, Tensor, Tensor]
"""A row of a prompt and what its tokens have brought: entropy, distant attention and surprisal of the token behind,
[tokens] each, and the logits [V] of the last one"""


def runs_of(rungs: Sequence[int]) -> list[tuple[int, int]]:
    """Each rung and how often it is there, where it changes."""
    return [(rung, len(list(same))) for rung, same in groupby(rungs)]


@dataclass(frozen=True)
class Workroom:
    """What passes need of memory beside weights and pages: for whichever rows, one pass after the other."""

    room: Room
    buffers: PassBuffers
    loaded: Loaded | None

    @classmethod
    def of(cls, model: Model, store: AdapterStore | None, settings: Settings, room: Room) -> Workroom:
        heard = len(probed_layers(model.shape.layers, settings.signals.attention_layers)) if room.listens else 0
        buffers = PassBuffers.of(model, room, 1 if store is None else store.directions, heard)
        return cls(room, buffers, None if store is None else Loaded(model, store, room.sets))


class Prefill:
    """Passes over prompts of the rows of `lanes`.

    Rows have lengths of their own here as long as their prompts are under way: decode takes them for rows that are not
    in use.
    """

    def __init__(
        self, model: Model, pool: Pool, workroom: Workroom, ladders: Ladders | None, lanes: Lanes, settings: Settings
    ) -> None:
        self.model, self.pool, self.room, self.settings = model, pool, workroom.room, settings
        self.buffers, self._loaded = workroom.buffers, workroom.loaded
        self._ladders, self._lanes = ladders, lanes
        self.tables = replace(lanes.tables, lengths=torch.zeros_like(lanes.tables.lengths))
        self._graphs: dict[tuple[int, int], Graph] = {}
        """By tokens and rows of a pass"""
        entries = pages_for(self.room.tokens) + self.room.parts
        self._settled = Turned.of(entries, pool.units, model.device)

    @torch.no_grad()
    def capture(self) -> None:
        """Make the graphs of all passes, of which each else is made when it is first needed."""
        for size in self.room.sizes():
            for parts in {self.room.rows(parts) for parts in range(1, self.room.parts + 1)}:
                self._graph(size, parts)

    def begin(self, prompt: Prompt) -> None:
        """Nothing of the rows' pages is there yet, and none is judged."""
        rows = slice(prompt.first, prompt.first + len(prompt))
        for own in (self.tables.lengths, self.tables.settled, self.tables.counts, self._lanes.kept.complexity):
            own[rows].zero_()
        set_policy(self._lanes.kept, prompt.operating.kv, prompt.first)
        if self._ladders is not None:
            slots = to_device(torch.tensor(prompt.slots), prompt.tokens.device)
            prompt.scales = self._ladders.scale[slots.clamp(min=0)][:, None]

    @torch.no_grad()
    def run(self, ends: Sequence[tuple[Prompt, int]]) -> None:
        """Process prompts, each named once, up to these columns, all in one pass; that has room for their tokens, and
        the pool for their pages."""
        taken = [own for prompt, end in ends for own in self._decide(prompt, end)]
        total = sum(own.tokens for own in taken)
        assert total <= self.room.tokens, "the pass has room for them"
        assert len(taken) <= self.room.parts, "and for as many rows"
        b = self.buffers
        numbers = tiles_of(self._parts(taken))
        put(b.tiles, numbers + [[0] * FIELDS] * (len(b.tiles) - len(numbers)))
        last = [end - 1 for end in accumulate(own.tokens for own in taken)]
        put(b.last, last + [0] * (len(b.last) - len(last)))
        torch.cat([own.prompt.tokens[own.row, own.done : own.done + own.tokens] for own in taken], out=b.tokens[:total])
        torch.cat([own.weights for own in taken], out=b.weights[:total])
        rows = to_device(torch.tensor([own.prompt.first + own.row for own in taken], dtype=torch.int32), b.tiles.device)
        lengths = torch.tensor([own.done + own.tokens for own in taken], dtype=torch.int32)
        claim(self.tables, self.pool.free, rows, to_device(lengths, b.tiles.device))
        self._graph(total, len(taken)).replay()
        self._take_in(ends, taken)
        if self.pool.units.coded:
            settle_pages(self.tables, self.pool.free, self._lanes.kept, rows, self._settled)
            quantise_turned(self.pool.memory, self._settled, self.pool.units, self.model.dtype)
            give_back(self.pool.free, self._settled)
        for prompt, end in ends:
            prompt.done = end

    def _decide(self, prompt: Prompt, end: int) -> Iterator[Taken]:
        """What a prompt brings up to a column: rungs, and what multiplies each token's update, the ladders' own scales
        included."""
        columns = torch.arange(prompt.done, end, device=prompt.tokens.device)
        real = columns < prompt.lengths[:, None]
        full = end <= min(prompt.counts)
        weights = prompt.stream.open_block(prompt.tokens[:, prompt.done : end], real, full=full, prompt=True)
        weights = weights.expand(-1, end - prompt.done, -1)
        # A deliberate wait, once a block of rows whose budget is below their start rung.
        rungs = weights.argmax(2).tolist() if prompt.moves else None
        own = (weights if prompt.scales is None else weights * prompt.scales).sum(2)
        for row, count in enumerate(prompt.columns(end)):
            if count:
                runs = [(prompt.start[row], count)] if rungs is None else runs_of(rungs[row][:count])
                yield Taken(prompt, row, prompt.done, count, own[row, :count], runs)

    def _parts(self, taken: Sequence[Taken]) -> Iterator[Part]:
        """What tiles are cut from: of each row the tokens that follow each other at one rung."""
        keys: list[Key] = [
            (own.prompt.slots[own.row], rung) for own in taken if own.prompt.slots[own.row] >= 0 for rung, _ in own.runs
        ]
        numbers = {} if self._loaded is None else self._loaded.numbers(keys)
        for own in taken:
            position = own.done
            for rung, count in own.runs:
                factors = numbers.get((own.prompt.slots[own.row], rung), -1)
                yield Part(own.prompt.first + own.row, position, count, factors)
                position += count

    def _graph(self, tokens: int, parts: int) -> Graph:
        """The pass of so many tokens and rows, or a few more."""
        key = self.room.size(tokens), self.room.rows(parts)
        if key not in self._graphs:
            signals = self.settings.signals
            made = PromptPass.of(
                self.model, self._loaded, self.pool, self.tables, self.buffers, self.room, *key,
                signals.attention_layers, signals.recent_pages,
            )  # fmt: skip
            # Captured by running it, on no tokens.
            tiles = self.buffers.tiles.clone()
            self.buffers.tiles.zero_()
            self._graphs[key] = Graph(made, self.model.device)
            self.buffers.tiles.copy_(tiles)
        return self._graphs[key]

    def _take_in(self, ends: Sequence[tuple[Prompt, int]], taken: Sequence[Taken]) -> None:
        """What the model has put out: logits behind prompts, and signals."""
        b = self.buffers
        for number, own in enumerate(taken):
            prompt = own.prompt
            if own.done + own.tokens == prompt.counts[own.row]:
                if prompt.logits is None:
                    prompt.logits = b.logits.new_zeros(len(prompt), b.logits.shape[1])
                prompt.logits[own.row] = b.logits[number]
        if not self.room.listens:
            assert all(prompt.stream.static is not None for prompt, _ in ends), "who decides is told what came out"
            return
        attention = b.distant[:, : sum(own.tokens for own in taken)].mean((0, 2)).clamp_(0.0, 1.0)
        outputs: dict[int, list[Heard]] = {}
        first = 0
        for number, own in enumerate(taken):
            part = slice(first, first + own.tokens)
            first += own.tokens
            heard = own.row, b.entropy[part], attention[part], b.following[part], b.logits[number]
            outputs.setdefault(id(own.prompt), []).append(heard)
        for prompt, end in ends:
            if prompt.stream.static is None:
                self._close(prompt, end, outputs[id(prompt)])

    def _close(self, prompt: Prompt, end: int, outputs: Sequence[Heard]) -> None:
        """Let the stream take in what the model has put out, and pages their tokens' complexity."""
        stream, columns = prompt.stream, end - prompt.done
        if len(outputs) == len(prompt) == 1:
            entropy, attention, following, logits = (own[None] for own in outputs[0][1:])
        else:
            # Of rows without a token in the block anything: it is not taken in.
            logits = self.buffers.logits.new_zeros(len(prompt), self.buffers.logits.shape[1])
            entropy, attention, following = logits.new_zeros(3, len(prompt), columns)
            for row, *values, last in outputs:
                for whole, own in zip((entropy, attention, following), values, strict=True):
                    whole[row, : len(own)] = own
                logits[row] = last
        complexity = stream.close_outputs(entropy, attention, following[:, :-1], log_probabilities(logits))
        sums = self._lanes.kept.complexity
        pages = torch.arange(prompt.done, end, device=sums.device) // PAGE_TOKENS
        rows = slice(prompt.first, prompt.first + len(prompt))
        sums[rows].scatter_add_(1, pages.expand(len(prompt), -1), complexity.double() * stream.block.real)

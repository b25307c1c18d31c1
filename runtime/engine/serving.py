"""Requests that come and go while others are answered: continuous batching over one pool of pages.

A step lets in who waits, launches a step of decode for all rows whose prompts are through, and a pass over parts of
prompts that are not. Graphs were captured before the first request came; joining and leaving is writing to tensors. The
host looks a step behind: what a step has chosen it reads while the next one runs.

A row whose turn would find no free units makes the one of least rank give way: that gives up its pages, waits, and is
computed again, its prompt in the same blocks and its answer token by token, in steps that it shares with others. So it
decides again as it has decided, and its pages are what they were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from policy.checkpoint import PolicyCheckpoint
from policy.limits import Whole
from policy.operating import KVRows, Operating
from policy.rungs import Rung
from policy.settings import FULL_KV, KVSettings

from ..control.record import Keep
from ..control.stream import Stream
from ..fingerprint import model_fingerprint
from ..kv.formats import FULL
from ..kv.units import pages_for
from ..loading import context_limit, end_tokens, kernels_why_not, require_plain
from ..ops.pages import leave
from ..plan import AdapterSource, engine_plan
from ..sending import to_device
from . import control
from . import model as engine_model
from .bank import held
from .decoder import Begin, Bucket, Decoder
from .model import model_of
from .page_pool import Pool
from .prompt_pass import Room
from .prompts import Prefill, Prompt, Workroom
from .request import CANCELLED, END, LENGTH, STOP, Answer, News, Request, check_operating, pages_why_not
from .scheduler import Account, Queue, Seat, most_units, pool_units
from .text import Text

ROWS, PART_TOKENS, PARTS, CONTEXT = 64, 512, 4, 4096
_ROWS, _TOKENS = Whole(1, 128), Whole(1, 2**20)


@dataclass
class _Note:
    """What the host will read of a step."""

    chosen: list[tuple[Seat, int]]
    """Who has got a token, and which of its answer's"""
    tokens: Tensor
    ended: Tensor
    free: Tensor
    event: torch.cuda.Event | None


class Engine:
    """A model of the LLaMA family, adapters of it by name, and requests."""

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, adapters: Mapping[str, AdapterSource], *,
        policy: str | Path | PolicyCheckpoint | None = None, resident_rung: Rung | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None, rows: int = ROWS, context: int | None = None,
        pool_bytes: int | None = None, part_tokens: int = PART_TOKENS,
    ) -> None:  # fmt: skip
        """At most `rows` requests are answered at a time, each of up to `context` tokens, answer included (default: as
        many as the model was trained on, at most 4,096). `pool_bytes` is the room for keys and values, by default nine
        tenths of what is free on the GPU. A pass over prompts has up to `part_tokens` tokens, or a block of the
        policy, where that is longer. With a `tokenizer` answers have text, and may have stop strings.

        Raises ValueError for what does not fit together or is not covered, in one line, and MemoryError for a pool in
        which no request could run.
        """
        require_plain(model)
        _refuse(kernels_why_not(model.device, interpreted=True))
        rows, part_tokens = _ROWS.take("rows", rows), _TOKENS.take("part_tokens", part_tokens)
        checkpoint = PolicyCheckpoint.load(policy) if isinstance(policy, str | Path) else policy
        if not adapters:
            raise ValueError("adapters: expected at least one by name, got none; pass {'name': adapter}")
        self.names = {name: number for number, name in enumerate(adapters)}
        plan = engine_plan(
            list(adapters.values()), policy=checkpoint, resident_rung=resident_rung,
            model_fingerprint=None if checkpoint is None else model_fingerprint(model),
        )  # fmt: skip
        _refuse(engine_model.why_not(model) or control.why_not(plan.policy, plan.settings))
        self.plan, self.checkpoint, self.tokenizer = plan, checkpoint, tokenizer
        limit = context_limit(model)
        self.context = min(CONTEXT, limit or CONTEXT) if context is None else _TOKENS.take("context", context)
        if limit is not None and self.context > limit:
            raise ValueError(f"context: expected at most {limit}, which the model was trained on, got {context}")
        self.model = model_of(model, self.context + 1)
        _refuse(pages_why_not(KVRows.of([plan.settings.kv]), self.model, plan.settings))
        self.policy = plan.policy_on(self.model.device)
        self.decides = plan.policy.looks or not plan.settings.kv.is_full
        self.store, self.ladders = held(self.model, plan)
        self._offer, self._difficulty = plan.offer(), plan.difficulty().to(self.model.device)
        self._ends = torch.tensor(end_tokens(model, {}), dtype=torch.long, device=self.model.device)
        coded = not plan.settings.kv.is_full
        block, parts = plan.settings.prompt_tokens if self.decides else 1, min(PARTS, rows)
        room = Room(max(part_tokens, block), parts, parts, self.decides)
        # Before the pool, which takes its share of what is free then.
        workroom = Workroom.of(self.model, self.store, plan.settings, room)
        self.pool = Pool.of(self.model, pool_units(self.model, rows, self.context + 1, pool_bytes, coded=coded), coded)
        pages = pages_for(self.context + 1)
        self._decoders: list[Decoder] = []
        for size in sorted({min(rows, 4**power) for power in range(5)}, reverse=True):
            bucket = Bucket(size, pages, self.context, len(self._ends), self.decides)
            own = Decoder(
                self.model, self.pool, self.store, self.ladders, self.policy, plan.settings, bucket,
                within=self._decoders[0] if self._decoders else None,
            )  # fmt: skip
            self._decoders.append(own)
        self._wide = self._decoders[0]
        self._prefill = Prefill(self.model, self.pool, workroom, self.ladders, self._wide.lanes, plan.settings)
        self._prefill.capture()
        self._account = Account(len(self.pool))
        self._queue = Queue()
        self.rows = rows
        self._free_rows = list(range(rows))
        self._seats: list[Seat] = []
        """Whose prompts are through"""
        self._prompts: list[tuple[Seat, Prompt]] = []
        self._notes: deque[_Note] = deque()
        self._spare: list[list[Tensor]] = []
        self._texts: dict[int, Text] = {}
        self._count = 0
        self._said: list[News] = []

    # What users call

    def operating(
        self, adapter: str, *, budget: float | None = None, rung: Rung | None = None, kv: KVSettings | None = None
    ) -> Operating:
        """What a request may spend: `adapter` by name, with a policy a `budget`, by default the policy's own, without
        one a `rung`, by default the highest there is. `kv` replaces what becomes of its pages.

        Raises ValueError for a name, budget or rung that there is not.
        """
        if adapter not in self.names:
            raise ValueError(
                f"adapter: expected one of {', '.join(self.names)}, got {adapter!r}; load it, or correct it"
            )
        number, ladder = self.names[adapter], self.plan.ladders[self.names[adapter]]
        highest = ladder.rungs[ladder.highest]
        if budget == 1 and highest != ladder.rungs[-1]:
            raise ValueError(
                f"budget: expected less than 1, which is the exact adapter {ladder.rungs[-1]}, with the resident rung "
                f"{highest}, got 1; lower it, or make the engine without resident_rung"
            )
        if self.checkpoint is not None:
            if rung is not None:
                raise ValueError(f"rung: expected a budget, as the engine has a policy, got rung {rung}; drop one")
            own = self.checkpoint.operating([self.checkpoint.budget_for(budget)], [number])
        else:
            if budget is not None and budget != 1:
                raise ValueError(f"policy: expected one to spend budget={budget} by, got none; pass a policy folder")
            index = ladder.highest if rung is None else ladder.rung_index(rung)
            ladder.require_resident(index)
            own = Operating.at(float(index), index, FULL_KV, number)
        return own if kv is None else replace(own, kv=KVRows.of([kv]))

    def add(self, request: Request) -> Answer:
        """Let a request wait for its turn; what it is answered, `step` by `step`, is in what this returns.

        Raises ValueError for one that is longer than the context, or asks for what the engine has not, and MemoryError
        for one that would not fit the pool alone.
        """
        asked = len(request.prompt) + request.max_new_tokens
        if asked > self.context:
            raise ValueError(
                f"request: expected at most {self.context} tokens, got {len(request.prompt)} and "
                f"{request.max_new_tokens} new ones; shorten it, or make the engine with a longer context"
            )
        vocabulary = self.model.shape.vocabulary
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise ValueError(f"request.prompt: expected token ids below {vocabulary}, got others; use the model's own")
        if request.stop and self.tokenizer is None:
            raise ValueError("request.stop: expected an engine with a tokenizer, got one without; pass it")
        check_operating(request.operating, self.plan, self._offer, self.model, self.pool.units, decides=self.decides)
        answer = Answer(request, self._count)
        needed = most_units(answer, self.pool.units, self._prefill.room.tokens)
        if needed > len(self.pool):
            raise MemoryError(
                f"pool: expected room for {needed} units, which a request of {asked} tokens may take, got "
                f"{len(self.pool)}; make the pool larger, or the request shorter"
            )
        self._count += 1
        if self.tokenizer is not None:
            self._texts[answer.number] = Text(self.tokenizer, request.stop)
        self._queue.put(answer)
        return answer

    @torch.no_grad()
    def step(self) -> list[News]:
        """Launch what there is to do, and tell what the step before has brought."""
        self._let_in()
        chosen = self._decode()
        chosen += self._pass()
        if chosen or self._prompts:
            self._note(chosen)
            for seat, _ in chosen:
                if seat in self._seats and seat.chosen == seat.answer.request.max_new_tokens:
                    self._vacate(seat)
        while len(self._notes) > (1 if chosen or self._prompts else 0):
            self._read()
        said, self._said = self._said, []
        return said

    @torch.no_grad()
    def cancel(self, answer: Answer) -> None:
        """Stop answering; what it has held is free for the next step."""
        if answer.finished is not None:
            return
        if not self._queue.remove(answer):
            for seat in self._all_seats():
                if seat.answer is answer:
                    self._vacate(seat)
        self._finish(answer, CANCELLED)

    def stream(self, request: Request) -> Iterator[News]:
        """Answer a request, and all others on the way: what steps have brought this one, whoever made them. It waits
        for its turn from when it is first asked for news. One that is given up is cancelled."""
        answer = self.add(request)
        tokens = text = 0
        try:
            while answer.finished is None or tokens < len(answer.tokens):
                if tokens == len(answer.tokens):
                    self.step()
                if tokens < len(answer.tokens):
                    news = News(answer, answer.tokens[tokens:], answer.text[text:], answer.finished)
                    tokens, text = len(answer.tokens), len(answer.text)
                    yield news
        finally:
            self.cancel(answer)

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all of them, and all others that wait. Raises as `add` does, and then answers none of them."""
        answers: list[Answer] = []
        try:
            for request in requests:
                answers.append(self.add(request))
        except (ValueError, MemoryError):
            for answer in answers:
                self.cancel(answer)
            raise
        while self.busy:
            self.step()
        return answers

    @property
    def live(self) -> int:
        """Requests that have a row."""
        return len(self._seats) + len(self._prompts)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do, or to be read."""
        return bool(len(self._queue) or self._seats or self._prompts or self._notes)

    # A step's parts

    def _let_in(self) -> None:
        """Rows for those who wait, as far as there are rows, and units for their prompts."""
        while self._free_rows and self._queue.first is not None:
            answer = self._queue.first
            request = answer.request
            seat = Seat(answer, self._free_rows[0], self.pool.units)
            promised = sum(own.to_come(self._prefill.room.tokens) for own in (seat, *self._all_seats()))
            spare = self.pool.units.of(FULL) * (self.live + 1)
            if self.live and self._account.least < promised + spare:
                return
            self._queue.remove(answer)
            self._free_rows.pop(0)
            operating = request.operating
            index, offer = operating.adapter, self._offer.select(operating.adapter)
            stream = Stream(
                self.plan.settings, self.policy, operating, offer, self.model.device,
                keep=Keep.SUMS, difficulty=self._difficulty.select(to_device(index, self.model.device)),
            )  # fmt: skip
            prompt = Prompt(
                seat.row, [request.prompt], stream, operating, offer, index.tolist(),
                blocks=None if stream.static is not None else self.plan.settings.prompt_tokens,
                device=self.model.device,
            )  # fmt: skip
            self._prefill.begin(prompt)
            self._prompts.append((seat, prompt))

    def _decode(self) -> list[tuple[Seat, int]]:
        """A step for all whose prompts are through; who gets which token of its answer."""
        if self._step_units() > self._account.least:
            self._know()
        while self._step_units() > self._account.least:
            self._give_way()
        if not self._seats:
            return []
        self._account.take(self._step_units())
        most = max(seat.row for seat in self._seats)
        next(own for own in reversed(self._decoders) if own.bucket.rows > most).run()
        chosen = [(seat, seat.chosen) for seat in self._seats]
        for seat in self._seats:
            seat.stepped()
        return chosen

    def _step_units(self) -> int:
        return sum(seat.step_units() for seat in self._seats)

    def _know(self) -> None:
        """Wait until it is known how many units are free."""
        while self._notes:
            self._read()
        self._account.known(int(self.pool.free.top))

    def _give_way(self) -> None:
        """Who is to be let in last waits again; nothing is under way that has not been read."""
        victim = max(self._all_seats(), key=lambda seat: seat.answer.rank)
        self._vacate(victim)
        victim.answer.preempted += 1
        self._queue.put(victim.answer)
        self._account.known(int(self.pool.free.top))

    def _pass(self) -> list[tuple[Seat, int]]:
        """A pass over parts of prompts; who is through, and has got its first token."""
        room, ends, taking = self._prefill.room.tokens, [], []
        for seat, prompt in self._prompts[: self._prefill.room.parts]:
            end = prompt.upto(room)
            units = seat.prompt_units(end - prompt.done)
            if end == prompt.done or units > self._account.least:
                break
            self._account.take(units)
            room -= end - prompt.done
            ends.append((prompt, end))
            taking.append(seat)
            seat.prompted(end - prompt.done)
        if not ends:
            if self._prompts and not self._seats:
                seat, prompt = self._prompts[0]
                self._know()
                if seat.prompt_units(prompt.upto(room) - prompt.done) > self._account.least:
                    self._give_way()
            return []
        self._prefill.run(ends)
        through = [(seat, prompt) for seat, (prompt, _) in zip(taking, ends, strict=True) if prompt.over]
        self._prompts = [own for own in self._prompts if not own[1].over]
        for seat, prompt in through:
            self._begin(seat, prompt)
        return [(seat, 0) for seat, _ in through]

    def _begin(self, seat: Seat, prompt: Prompt) -> None:
        """A row goes on behind its prompt, and has chosen its first token."""
        answer, device = seat.answer, self.model.device
        assert prompt.logits is not None, "it went through the model"
        given = to_device(torch.tensor([answer.tokens], dtype=torch.long), device) if answer.tokens else None
        slots = to_device(torch.tensor(prompt.slots, dtype=torch.int32), device)
        self._wide.begin(Begin(
            seat.row, prompt.stream, slots, prompt.lengths, prompt.logits, prompt.tokens, [answer.request.sampling],
            self._ends, pad=0, given=given,
        ))  # fmt: skip
        seat.chosen = 1
        self._seats.append(seat)

    def _note(self, chosen: list[tuple[Seat, int]]) -> None:
        """Have copied what the host will read of this step."""
        lanes, cuda = self._wide.lanes, self.model.device.type == "cuda"
        news = (lanes.generated.tokens, lanes.generated.ended, self.pool.free.top)
        # Of notes that were read, as pinning memory may wait for the device.
        copies = (
            self._spare.pop() if self._spare else [torch.empty_like(own, device="cpu", pin_memory=cuda) for own in news]
        )
        for kept, own in zip(copies, news, strict=True):
            kept.copy_(own, non_blocking=True)
        event = None
        if cuda:
            event = torch.cuda.Event()
            event.record()
        self._notes.append(_Note(chosen, copies[0], copies[1], copies[2], event))
        self._account.note()

    def _read(self) -> None:
        """Take in the oldest note."""
        note = self._notes.popleft()
        if note.event is not None:
            note.event.synchronize()
        self._account.told(int(note.free))
        tokens, ended = note.tokens.tolist(), note.ended.tolist()
        self._spare.append([note.tokens, note.ended, note.free])
        for seat, index in note.chosen:
            answer = seat.answer
            if answer.finished is not None or index != len(answer.tokens):
                continue  # cancelled, or computed again: it has that token
            self._take(seat, tokens[seat.row], bool(ended[seat.row]))

    def _take(self, seat: Seat, token: int, ended: bool) -> None:
        """An answer is a token longer."""
        answer = seat.answer
        answer.tokens.append(token)
        text, before = self._texts.get(answer.number), answer.text
        if text is not None:
            text.add(token)
        reason = None
        if ended:
            reason = END
        elif text is not None and text.stopped:
            reason = STOP
        elif len(answer.tokens) == answer.request.max_new_tokens:
            reason = LENGTH
        if text is not None:
            answer.text = text.shown(over=reason is not None)
        self._said.append(News(answer, [token], answer.text[len(before) :], reason))
        if reason is not None:
            if seat in self._all_seats():
                self._vacate(seat)
            self._finish(answer, reason)

    def _finish(self, answer: Answer, reason: str) -> None:
        answer.finished = reason
        self._texts.pop(answer.number, None)

    def _vacate(self, seat: Seat) -> None:
        """The row is somebody else's; its units are free for whatever is launched from here on."""
        if seat in self._seats:
            self._wide.leave(seat.row)
            self._seats.remove(seat)
        else:
            index = torch.full_like(self._wide.lanes.rows.slot[:1], seat.row)
            leave(self._prefill.tables, self.pool.free, self._wide.lanes.turned, index)
            self._prompts = [own for own in self._prompts if own[0] is not seat]
        self._free_rows = sorted([*self._free_rows, seat.row])

    def _all_seats(self) -> list[Seat]:
        return [*self._seats, *(seat for seat, _ in self._prompts)]


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"engine: expected a model and a policy that it covers, got others: {reason}; use generate")

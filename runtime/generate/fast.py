"""A generation through the engine: the prompt in passes over many tokens, every token behind it in one graph.

The reference path's forward, decisions, signals and pages are the specification.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.operating import Operating

from ..control.bucket import affordable
from ..control.record import RESPONSE
from ..control.stream import static_rungs
from ..engine import control
from ..engine import model as engine_model
from ..engine.bank import held
from ..engine.decoder import Begin, Bucket, Decoder
from ..engine.model import model_of
from ..engine.page_pool import Pool, kv_bytes, units_needed, units_of
from ..engine.prompt_pass import Room
from ..engine.prompts import Prefill, Prompt, Workroom
from ..engine.request import pages_why_not
from ..kv.units import pages_for
from ..loading import end_tokens, generation_option
from ..plan import RunPlan
from ..reference.adaptive import AdaptiveRun
from .lookback import Lookback
from .options import Options


def why_not(model: PreTrainedModel, plan: RunPlan) -> str | None:
    """Why the engine cannot serve a run, as a clause; None where it can."""
    reason = engine_model.why_not(model)
    if reason is not None:
        return reason
    reason = control.why_not(plan.policy, plan.settings)
    if reason is not None:
        return f"of the policy: {reason}"
    own = model_of(model, 1)
    reason = pages_why_not(plan.operating.kv, own, plan.settings)
    if reason is not None:
        return reason
    known = own.modules()
    other = next((name for ladder in plan.ladders for name in ladder.modules if name not in known), None)
    return None if other is None else f"an adapter adapts {other}, which is no linear of a layer"


PASS_TOKENS, PASS_ROWS, PASS_SETS = 2048, 16, 4
"""Of a pass over prompts, at most; a longer block of a policy is a pass of its own. Sets of factors are as large as an
adapter."""


@dataclass
class Counted:
    """Tokens by active rung, as `control.record.Sums` has them, and the ladder of every row."""

    counts: Tensor
    """[B, 2, J] float64"""
    beside: Tensor
    adapters: list[int]

    @property
    def sums(self) -> Counted:
        return self


@dataclass
class Spent:
    """What the latest generation of the engine holds: stands where the reference path's cache would."""

    stream: Counted
    lengths: list[int]
    token_bytes: int
    held: int
    """Bytes of its keys and values, each page in its format"""
    allocated: int

    def kv_bytes(self) -> int:
        return self.held

    def kv_bytes_full(self) -> int:
        return self.token_bytes * sum(self.lengths)

    def kv_bytes_allocated(self) -> int:
        return self.allocated


class FastPath:
    """The engine of one run: its adapters on the device, a pool of pages, and a decoder for every bucket in use."""

    def __init__(self, model: PreTrainedModel, run: AdaptiveRun) -> None:
        self.hf, self.run, plan = model, run, run.plan
        limit = getattr(model.config, "max_position_embeddings", 4096)
        self.model = model_of(model, limit)
        self.store, self.ladders = held(self.model, plan)
        self._decoders: dict[Bucket, Decoder] = {}
        self._prefills: dict[tuple[Bucket, Room], Prefill] = {}
        self._workrooms: dict[Room, Workroom] = {}
        self._pool: Pool | None = None

    @torch.no_grad()
    def generate(self, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What `model.generate` returns: ids [B, T] and the new tokens behind them, padded where rows have ended."""
        options = Options.of(self.hf, ids, kwargs)
        if options.streamer is not None:
            options.streamer.put(ids.cpu())
        decoder, prompts = self.begin(ids, kwargs, options)
        new = self._decode(decoder, len(ids), options)
        self._account(decoder, prompts, new, options)
        return torch.cat([ids, new], 1)

    @torch.no_grad()
    def begin(
        self, ids: Tensor, kwargs: dict[str, Any], options: Options, given: Tensor | None = None
    ) -> tuple[Decoder, list[Prompt]]:
        """The prompts: a decoder whose first rows go on from there, first tokens chosen, and what went through it;
        arguments as `generate` has them. `given` [B, g] long are what the first tokens behind the prompts are,
        whatever the model makes of them."""
        tokens = self._tokens(ids, kwargs)
        operating = self.run.plan.operating.for_rows(len(ids))
        decoder, prefill = self._decoder([len(own) + options.new_tokens for own in tokens], operating, options)
        decoder.pool.clear()
        decoder.clear()
        block = self.run.plan.settings.prompt_tokens if decoder.bucket.decides else None
        offer = self.run.plan.offer().select(operating.adapter)
        ends = torch.tensor(options.ends, dtype=torch.long, device=self.model.device)
        prompts = []
        for rows in self._groups(tokens, operating, prefill.room, block):
            index, part = torch.tensor(rows), slice(rows.start, rows.stop)
            own = operating.select(index)
            stream = self.run.new_stream(len(rows), operating=own)
            prompt = Prompt(
                rows.start, tokens[part], stream, own, offer.select(index), own.adapter.tolist(), blocks=block,
                device=self.model.device,
            )  # fmt: skip
            prefill.begin(prompt)
            while not prompt.over:
                prefill.run([(prompt, prompt.upto(prefill.room.tokens // len(rows)))])
            assert prompt.logits is not None, "it went through the model"
            slots = own.adapter.to(self.model.device, torch.int32)
            decoder.begin(Begin(
                rows.start, stream, slots, prompt.lengths, prompt.logits, ids[part], options.sampling[part], ends,
                options.pad, None if given is None else given[part],
            ))  # fmt: skip
            prompts.append(prompt)
        return decoder, prompts

    def _groups(
        self, tokens: Sequence[Sequence[int]], operating: Operating, room: Room, block: int | None
    ) -> Iterator[range]:
        """Rows that go through the model together: as many as a pass has room for."""
        longest = max(map(len, tokens))
        most = 1 if room.moves else max(1, min(room.parts, room.tokens // min(longest, block or longest)))
        keys = list(zip(operating.adapter.tolist(), operating.start_rung.tolist(), strict=True))
        first = 0
        for row in range(1, len(tokens) + 1):
            full = row == len(tokens) or row - first == most or len(set(keys[first : row + 1])) > room.sets
            if full:
                yield range(first, row)
                first = row

    def _tokens(self, ids: Tensor, kwargs: dict[str, Any]) -> list[list[int]]:
        """Every row's own tokens. Waits for the device, as how many there are decides what is launched."""
        mask = kwargs.get("attention_mask")
        if mask is None:  # as transformers has it
            pad = generation_option(self.hf, kwargs, "pad_token_id")
            padded = pad is not None and pad not in end_tokens(self.hf, kwargs)
            mask = (ids != pad).long() if padded else torch.ones_like(ids)
        if mask.shape != ids.shape:
            got = f"{list(mask.shape)}"
            raise ValueError(f"attention_mask: expected {list(ids.shape)}, got {got}; pass the tokenizer's own mask")
        both = torch.stack([ids, mask.to(ids)]).cpu()
        found = [row[real.bool()].tolist() for row, real in zip(*both, strict=True)]
        if not all(found):
            raise ValueError("attention_mask: expected a real token in every row, got padding alone; pass a prompt")
        return found

    def _decoder(self, longest: Sequence[int], operating: Operating, options: Options) -> tuple[Decoder, Prefill]:
        """A decoder for rows that grow up to `longest` tokens, what their prompts go through, and a pool with room."""
        plan, kv = self.run.plan, operating.kv
        offer = plan.offer().select(operating.adapter)
        decides = static_rungs(plan.policy, operating, offer) is None
        pages = pages_for(max(longest))
        bucket = Bucket(_power(len(longest)), _power(pages), _power(options.new_tokens), len(options.ends), decides)
        units = units_of(self.model, coded=not kv.is_full)
        block = plan.settings.prompt_tokens if decides else 1
        moving = decides and not affordable(operating, offer)
        sets = len(plan.policy.rungs) if moving else min(PASS_SETS, len(plan.operating))
        room = Room(block if moving else max(PASS_TOKENS, block), PASS_ROWS, sets, decides, moving)
        needed = units_needed(kv, longest, units, room.tokens)
        pool = self._pool
        if pool is None or pool.units != units or len(pool) < needed:
            # Graphs hold the addresses of the old one.
            self._decoders, self._prefills, self._pool = {}, {}, None
            pool = self._pool = Pool.of(self.model, _rounded(needed), units.coded)
        if bucket not in self._decoders:
            self._decoders[bucket] = Decoder(
                self.model, pool, self.store, self.ladders, self.run.policy, plan.settings, bucket
            )  # fmt: skip
        decoder = self._decoders[bucket]
        if room not in self._workrooms:
            self._workrooms[room] = Workroom.of(self.model, self.store, plan.settings, room)
        if (bucket, room) not in self._prefills:
            self._prefills[bucket, room] = Prefill(
                self.model, pool, self._workrooms[room], self.ladders, decoder.lanes, plan.settings
            )  # fmt: skip
        return decoder, self._prefills[bucket, room]

    def _decode(self, decoder: Decoder, rows: int, options: Options) -> Tensor:
        """New tokens [B, columns] of all rows: up to where the last of them ended."""
        generated, seen = decoder.generated, Lookback(decoder, rows, options.new_tokens, options.streamer)
        seen.note()
        ran = 0
        while ran < options.new_tokens - 1 and not (ran and seen.all_ended()):
            decoder.run()
            # The step just launched is under way while the one before it is looked at.
            seen.note()
            ran += 1
        columns = seen.finish()
        if ran < columns:  # else the step beyond has said what becomes of pages
            decoder.turn()
        tokens: Tensor = generated.log[:rows, :columns].clone()
        return tokens

    def _account(self, decoder: Decoder, prompts: Sequence[Prompt], new: Tensor, options: Options) -> None:
        """Count what was read, as the reference path does: of every row's response the tokens that went through the
        model, up to its end."""
        ends = torch.tensor(options.ends, dtype=torch.long, device=new.device)
        over = torch.isin(new, ends).cumsum(1) > 0
        fed = (~over[:, :-1]).long().sum(1)
        steps = torch.arange(new.shape[1] - 1, device=new.device)
        if decoder.bucket.decides:
            rungs = decoder.rungs[: len(new), : len(steps)].long()
        else:
            static = [rung for prompt in prompts for rung in prompt.start]
            rungs = torch.tensor(static, device=new.device)[:, None].expand(-1, len(steps))
        streams = [prompt.stream for prompt in prompts]
        counts, beside = (torch.cat([getattr(own.sums, name) for own in streams]) for name in ("counts", "beside"))
        counts[:, RESPONSE].scatter_add_(1, rungs, (steps < fed[:, None]).double())
        # Rows that have ended hold the padding that they were fed.
        lengths = [count + len(steps) for prompt in prompts for count in prompt.counts]
        shape = self.model.shape
        token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * self.model.dtype.itemsize
        assert int(decoder.pool.free.dry) == 0, "a pool has what its rows may need"
        held = kv_bytes(decoder.lanes.tables, lengths, decoder.pool.units, shape.layers)
        counted = Counted(counts, beside, [number for own in streams for number in own.adapters])
        self.run.last = Spent(counted, lengths, token_bytes, held, decoder.pool.nbytes)  # type: ignore[assignment]


def _power(count: int) -> int:
    """The next power of two: graphs are captured for few sizes."""
    return 1 << max(count - 1, 0).bit_length()


def _rounded(count: int) -> int:
    """Up to an eighth more, so that a pool is seldom made anew for texts that are a little longer."""
    step = max(1, _power(count) // 16)
    return -(-count // step) * step

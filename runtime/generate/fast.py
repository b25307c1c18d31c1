"""A generation through the engine: the prompt by the reference path, every token behind it in one graph.

The reference path's forward, decisions, signals and pages are the specification; what it leaves of a prompt, the engine
goes on with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.settings import PAGE_TOKENS

from ..control.record import RESPONSE
from ..control.stream import Stream
from ..engine import control
from ..engine import model as engine_model
from ..engine.control import Ladders
from ..engine.decoder import Begin, Bucket, Decoder
from ..engine.model import Model, model_of
from ..engine.page_pool import Pool, kv_bytes, units_needed, units_of
from ..engine.store import AdapterStore, needed_bytes
from ..kv.units import pages_for
from ..plan import RunPlan
from ..reference.adaptive import AdaptiveRun, end_tokens, generation_option
from ..reference.run import AdaptiveCache
from .handover import hand_over
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
    reason = _pages_why_not(own, plan)
    if reason is not None:
        return reason
    known = own.modules()
    other = next((name for ladder in plan.ladders for name in ladder.modules if name not in known), None)
    return None if other is None else f"an adapter adapts {other}, which is no linear of a layer"


def _pages_why_not(model: Model, plan: RunPlan) -> str | None:
    """Why the engine cannot keep the pages of a run, as a clause; None where it can."""
    kv = plan.operating.kv
    if kv.is_full:
        return None
    if kv.may_be_sparse:
        return "its KV policy makes pages sparse"
    if any(layer.window for layer in model.layers):
        return "its KV policy codes pages, and layers of the model see a window of the text"
    least = PAGE_TOKENS * max(1, plan.settings.signals.recent_pages - 1)
    shortest = int(kv.window_tokens.min())
    if shortest < least:
        return f"its KV policy keeps a window of {shortest} tokens, and attention is listened to over {least}"
    return None


@dataclass
class Spent:
    """What the latest generation of the engine holds: stands where the reference path's cache would."""

    stream: Stream
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
        modules, ladders = self.model.modules(), plan.ladders
        directions = max(int(own.edges[: own.highest + 1].max()) for own in ladders)
        directions = max(directions, 1)
        self.store = AdapterStore(
            modules, slots=len(ladders), capacity_bytes=needed_bytes(ladders, modules, directions, model.dtype),
            rungs=len(plan.policy.rungs), directions=directions, dtype=model.dtype, device=self.model.device,
            banks=max(len(own.banks) for own in ladders),
        )  # fmt: skip
        self.ladders = Ladders.of(
            len(ladders), self.model.shape.vocabulary, len(plan.policy.rungs), self.model.device
        )  # fmt: skip
        difficulty = plan.difficulty()
        for number, ladder in enumerate(ladders):
            slot = self.store.load(ladder)
            own = difficulty.select(torch.tensor(number))
            self.ladders.put(slot, own, torch.tensor(ladder.scales))
        self._decoders: dict[Bucket, Decoder] = {}
        self._pool: Pool | None = None

    @torch.no_grad()
    def generate(self, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What `model.generate` returns: ids [B, T] and the new tokens behind them, padded where rows have ended."""
        options = Options.of(self.hf, ids, kwargs)
        if options.streamer is not None:
            options.streamer.put(ids.cpu())
        decoder, cache = self.begin(ids, kwargs, options)
        new = self._decode(decoder, len(ids), options)
        self._account(decoder, cache, new, options)
        return torch.cat([ids, new], 1)

    @torch.no_grad()
    def begin(self, ids: Tensor, kwargs: dict[str, Any], options: Options) -> tuple[Decoder, AdaptiveCache]:
        """The prompt through the reference path: a decoder whose first rows go on from there, first tokens chosen, and
        the cache that the prompt has left; arguments as `generate` has them."""
        cache, logits = self._prefill(ids, kwargs)
        return self._begin(ids, cache, logits, options), cache

    def _prefill(self, ids: Tensor, kwargs: dict[str, Any]) -> tuple[AdaptiveCache, Tensor]:
        cache = self.run.new_cache(len(ids))
        cache.next_call_is_prompt = True
        mask = kwargs.get("attention_mask")
        if mask is None:  # as transformers has it
            pad = generation_option(self.hf, kwargs, "pad_token_id")
            padded = pad is not None and pad not in end_tokens(self.hf, kwargs)
            mask = (ids != pad).long() if padded else torch.ones_like(ids)
        return cache, self.run.logits(ids, mask, cache, 1)[:, -1].float()

    def _begin(self, ids: Tensor, cache: AdaptiveCache, logits: Tensor, options: Options) -> Decoder:
        longest = [length + options.new_tokens for length in cache.lengths]
        decoder = self._decoder(longest, cache, options)
        slots = cache.stream.state.operating.adapter.to(self.model.device, torch.int32)
        ends = torch.tensor(options.ends, dtype=torch.long, device=self.model.device)
        hand_over(cache, decoder.pool, decoder.buffers.tables, decoder.buffers.turned)
        complexity = cache.table.complexity if decoder.pool.units.coded else None
        decoder.begin(Begin(cache.stream, slots, complexity, logits, ids, options.sampling, ends, options.pad))
        return decoder

    def _decoder(self, longest: Sequence[int], cache: AdaptiveCache, options: Options) -> Decoder:
        """A decoder for rows that grow up to `longest` tokens, and a pool with room for them."""
        decides, kv = cache.stream.static is None, cache.kv
        pages = pages_for(max(longest))
        bucket = Bucket(_power(len(longest)), _power(pages), _power(options.new_tokens), len(options.ends), decides)
        units = units_of(self.model, coded=not kv.is_full)
        needed = units_needed(kv, longest, units)
        pool = self._pool
        if pool is None or pool.units != units or len(pool) < needed:
            # Graphs hold the addresses of the old one.
            self._decoders, self._pool = {}, None
            pool = self._pool = Pool.of(self.model, _rounded(needed), units.coded)
        if bucket not in self._decoders:
            self._decoders[bucket] = Decoder(
                self.model, pool, self.store, self.ladders, self.run.policy, self.run.plan.settings, bucket
            )  # fmt: skip
        return self._decoders[bucket]

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

    def _account(self, decoder: Decoder, cache: AdaptiveCache, new: Tensor, options: Options) -> None:
        """Count what the response read into the stream's sums, as the reference path does: of every row the tokens that
        went through the model, up to its end."""
        ends = torch.tensor(options.ends, dtype=torch.long, device=new.device)
        over = torch.isin(new, ends).cumsum(1) > 0
        fed = (~over[:, :-1]).long().sum(1)
        stream, steps = cache.stream, torch.arange(new.shape[1] - 1, device=new.device)
        if stream.static is not None:
            rungs = torch.tensor(stream.static, device=new.device)[:, None].expand(-1, len(steps))
        else:
            rungs = decoder.rungs[: len(new), : len(steps)].long()
        counted = (steps < fed[:, None]).double()
        stream.sums.counts[:, RESPONSE].scatter_add_(1, rungs, counted)
        # Rows that have ended hold the padding that they were fed.
        lengths = [length + len(steps) for length in cache.lengths]
        token_bytes = sum(layer.token_bytes for layer in cache.layers)
        assert int(decoder.pool.free.dry) == 0, "a pool has what its rows may need"
        held = kv_bytes(decoder.buffers.tables, lengths, decoder.pool.units, len(cache.layers))
        self.run.last = Spent(stream, lengths, token_bytes, held, decoder.pool.nbytes)  # type: ignore[assignment]


def _power(count: int) -> int:
    """The next power of two: graphs are captured for few sizes."""
    return 1 << max(count - 1, 0).bit_length()


def _rounded(count: int) -> int:
    """Up to an eighth more, so that a pool is seldom made anew for texts that are a little longer."""
    step = max(1, _power(count) // 16)
    return -(-count // step) * step

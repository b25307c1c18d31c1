"""A model with adapters and pages, on which cases are timed.

    floor = (weights + adapters at the rungs of every step + KV) / measured read bandwidth

Shape legend: B rows, N steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from policy.fixed import FixedPolicy
from policy.learned import LearnedPolicy
from policy.operating import KVRows, Operating
from policy.settings import FULL_KV, PAGE_TOKENS, KVSettings, Settings
from runtime.control.bucket import Offer
from runtime.control.stream import Stream
from runtime.engine.control import Ladders
from runtime.engine.decoder import Bucket, Decoder
from runtime.engine.model import Model, model_of
from runtime.engine.page_pool import Pool, kv_bytes, place, set_policy, units_of
from runtime.engine.store import AdapterStore, needed_bytes
from runtime.kv.formats import FULL, INT4, INT8
from runtime.kv.units import pages_for
from runtime.ladder import Ladder

from .cases import Case
from .fused import fuse
from .ladders import MIX, RANK, fill, random_ladder, read_bytes
from .peers import ms_per_step, release
from .printing import spread
from .shapes import build_model, kv_token_bytes, weight_bytes

STEPS = 64
"""Of a run: a trace is replayed whole, and a row's log holds as many."""

KV_POLICY = KVSettings()
"""Of pages that are in fewer bits."""
KV = {torch.bfloat16: "bf16", torch.float32: "fp32"}
"""Pages are in the model's dtype."""


class Bench:
    """A random model of a shape; adapters are made as a case asks for them, and kept for the next that asks alike."""

    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device, positions: int) -> None:
        """Of texts of up to so many positions, which are a case's context and half of `STEPS`."""
        self.shape = shape
        self.hf = build_model(shape, dtype, device)
        fuse(self.hf)  # as peers want it; before the engine takes hold of the weights
        self.model: Model = model_of(self.hf, positions)
        self._ladder: Ladder | None = None
        self._store: AdapterStore | None = None
        self._held: tuple[int, int | None] | None = None

    def time(self, case: Case, repeats: int, bandwidth: float) -> dict[str, Any]:
        """The case's record: milliseconds a step, bytes, peak memory; bandwidth in bytes a second."""
        device = self.model.device
        self._hold(case)
        release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rungs = self._rungs(case)
        decoder = self._decoder(case, rungs)

        def run() -> float:
            # So that a step reads `context` tokens on average: it counts its own before it reads.
            self._place(case, decoder)
            decoder.generated.count.zero_()
            if decoder.controller is not None:
                decoder.controller.state.step.zero_()
            return ms_per_step(decoder.run, STEPS, device)

        run()
        times = [run() for _ in range(repeats)]
        self._check(case, decoder, rungs)
        held, adapter_bytes = spread(times), self._adapter_bytes(case, rungs)
        kv = self._kv_bytes(case, decoder)
        read = weight_bytes(self.hf) + adapter_bytes + kv
        return {
            "name": case.name, "shape": self.shape, "batch": case.batch, "adapters": case.adapters,
            "context": case.context, "rung": case.rung,
            "kv": KV[self.model.dtype] if case.int8_share is None else "mixed",
            "controller": case.controller, "ms_per_step": held["median"], "spread": held, "bytes": read,
            "floor_ms": 1000 * read / bandwidth,
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "kv_bytes": kv, "kv_share": kv / self._full_bytes(case), "adapter_bytes": adapter_bytes, "peer": None,
            **self._details(case),
        }  # fmt: skip

    def _details(self, case: Case) -> dict[str, Any]:
        """What only some cases have."""
        found: dict[str, Any] = {}
        if case.trace is not None:
            own = case.trace
            found["trace"] = {"adapter": own.adapter, "budget": own.budget, "mean_rank": own.mean_rank}
        if case.resident_rung is not None:
            assert self._store is not None, "there are adapters"
            exact = int(self._some_ladder().rung_bytes()[-1])
            found |= {
                "resident_rung": case.resident_rung,
                "resident_bytes": sum(map(self._store.bytes_of, range(case.adapters))),
                "exact_bytes": case.adapters * exact,
            }
        return found

    def drop(self) -> None:
        """Let go of all adapters."""
        self._store = self._ladder = self._held = None
        release(self.model.device)

    def _hold(self, case: Case) -> None:
        """Have the case's adapters on the device, and no others."""
        wanted = (case.adapters, case.resident_rung) if case.rung is not None else None
        if wanted == self._held:
            return
        self.drop()
        self._held = wanted
        if wanted is None:
            return
        modules, dtype, device = self.model.modules(), self.model.dtype, self.model.device
        ladder = random_ladder(modules, dtype, device)
        if case.resident_rung is not None:
            ladder = ladder.up_to(case.resident_rung)
        one = needed_bytes([ladder], modules, RANK, dtype)
        self._store = AdapterStore(
            modules, slots=case.adapters, capacity_bytes=case.adapters * one, rungs=len(MIX), directions=RANK,
            dtype=dtype, device=device,
        )  # fmt: skip
        self._ladder = fill(self._store, ladder, case.adapters)

    def _some_ladder(self) -> Ladder:
        assert self._ladder is not None, "who reads adapters has some"
        return self._ladder

    def _rungs(self, case: Case) -> Tensor | None:
        """[B, STEPS] int16, indices of `MIX`, of every row and step; None without adapters."""
        if case.rung is None:
            return None
        if case.trace is not None:
            return case.trace.replay(case.batch, STEPS, tuple(MIX))
        return torch.full((case.batch, STEPS), list(MIX).index(case.rung), dtype=torch.int16)

    def _adapter_bytes(self, case: Case, rungs: Tensor | None) -> int:
        """What a step reads of adapters, all rows together, on average."""
        if rungs is None:
            return 0
        spent = torch.tensor([*read_bytes(self.model.modules().values(), self.model.dtype).values()]).double()
        return round(case.batch * float(spent[rungs.long()].mean()))

    def _formats(self, case: Case) -> tuple[Tensor, int]:
        """[B, pages] formats of every row's pages before a run, as the default KV policy leaves them, and how many of a
        row's pages are settled."""
        start = case.context - (STEPS + 1) // 2
        formats = torch.full((case.batch, pages_for(start)), FULL)
        if case.int8_share is None:
            return formats, 0
        settled = max(0, start - KV_POLICY.window_tokens) // PAGE_TOKENS
        coded = formats[:, KV_POLICY.sink_pages : settled]
        # Spread evenly: formats change along a text.
        place_of = torch.arange(coded.shape[1]) * case.int8_share
        coded.copy_(torch.where((place_of + case.int8_share).floor() > place_of.floor(), INT8, INT4).expand_as(coded))
        return formats, settled

    def _place(self, case: Case, decoder: Decoder) -> None:
        """Rows as a run begins, of so many tokens that a step reads `context` of them on average: it counts its own
        before it reads."""
        formats, settled = self._formats(case)
        lengths = [case.context - (STEPS + 1) // 2] * case.batch
        place(decoder.pool, decoder.buffers.tables, decoder.buffers.turned, formats, lengths, [settled] * case.batch)
        decoder.buffers.kept.complexity.zero_()

    def _pool(self, case: Case) -> Pool:
        """With no more room than a run takes: what there is, what is begun, and what is given back a step later."""
        formats, _ = self._formats(case)
        coded = case.int8_share is not None
        units = units_of(self.model, coded)
        begun = pages_for(case.context + STEPS) - formats.shape[1]
        more = units.of(FULL) * begun if not coded else 2 * units.of(FULL) + units.of(INT8) * begun
        held = sum(int((formats == code).sum()) * units.of(code) for code in ((FULL, INT8, INT4) if coded else (FULL,)))
        pool = Pool.of(self.model, held + case.batch * more, coded)
        pool.memory.random_(0, 64)  # small numbers in any format
        return pool

    def _full_bytes(self, case: Case) -> int:
        """Keys and values of a step in the model's dtype."""
        return case.batch * case.context * kv_token_bytes(self.hf)

    def _kv_bytes(self, case: Case, decoder: Decoder) -> int:
        """What a step reads of keys and values, all rows together, on average: between a run's begin and end."""
        if case.int8_share is None:
            return self._full_bytes(case)
        tables, units, layers = decoder.buffers.tables, decoder.pool.units, self.model.shape.layers
        start = case.context - (STEPS + 1) // 2
        after = kv_bytes(tables, [start + STEPS] * case.batch, units, layers)
        self._place(case, decoder)
        return (after + kv_bytes(tables, [start] * case.batch, units, layers)) // 2

    def _decoder(self, case: Case, rungs: Tensor | None) -> Decoder:
        device, rows = self.model.device, case.batch
        pages = pages_for(case.context + STEPS)
        kv = FULL_KV if case.int8_share is None else KV_POLICY
        settings = Settings(kv=kv)
        policy: Any = LearnedPolicy(tuple(MIX)) if case.controller else FixedPolicy(tuple(MIX))
        policy = policy.to(device)
        ladders = None
        if rungs is not None:
            ladders = Ladders.of(case.adapters, self.model.shape.vocabulary, len(MIX), device)
        decoder = Decoder(
            self.model, self._pool(case), self._store, ladders, policy, settings,
            Bucket(rows, pages, STEPS, 1, case.controller),
            trace=rungs.to(device) if rungs is not None and case.controller else None,
        )  # fmt: skip
        if decoder.controller is not None and rungs is not None:
            spent = self._some_ladder().rung_bytes()
            start = rungs[:, 0].long()
            operating = Operating.at(0.0 if case.controller else start.float(), start)
            stream = Stream(settings, policy, operating, Offer.of((spent / spent[-1]).expand(rows, -1)), device)
            # Far apart, where there are more adapters than rows.
            slots = torch.arange(rows) * max(1, case.adapters // rows) % case.adapters
            decoder.controller.load(torch.arange(rows, device=device), stream, slots.int().to(device))
        set_policy(decoder.buffers.kept, KVRows.of([kv] * rows))
        decoder.generated.ended.zero_()
        return decoder

    def _check(self, case: Case, decoder: Decoder, rungs: Tensor | None) -> None:
        """Raise ValueError unless logits are finite and the rungs were those that the case says."""
        if not bool(decoder.buffers.logits.isfinite().all()):
            raise ValueError(f"{case.name}: expected finite logits, got others; the figures mean nothing")
        if case.controller and not torch.equal(decoder.rungs.cpu(), rungs if rungs is not None else decoder.rungs):
            raise ValueError(f"{case.name}: expected the trace's rungs at every step, got others; mend that first")

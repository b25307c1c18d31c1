"""Milliseconds of the engine's decode step at every rung of a ladder, and without adapter, by the rows of a batch.

What is timed is the decoder that a user decodes with: one graph for a bucket, in which a rung is a number in a device
tensor, written by the controller that writes it in serving. Without adapter is a rung of no bytes in the same graph.
All rungs are timed in turn, round by round, so that a device that speeds up or slows down does so for all of them; the
first round only warms up. Beside them, in the same rounds, stands a second graph that decides at every step, held by a
trace to the top rung: what it takes more is what deciding adds.

Speed depends on how many bytes are read and from where, so rows hold random keys and values and their own next tokens.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from policy.contract import RankPolicy
from policy.cost import LatencyTable, adapter_cost
from policy.difficulty import Difficulty
from policy.fixed import FixedPolicy
from policy.learned import LearnedPolicy
from policy.limits import Several, Whole, refused
from policy.measured import MeasuredCost
from policy.operating import Operating
from policy.rungs import Rung
from policy.settings import FULL_KV, MOST_TOKENS, Settings

from ..control.bucket import Offer
from ..control.stream import Stream
from ..engine.control import Ladders
from ..engine.decoder import Bucket, Decoder
from ..engine.model import model_of
from ..engine.page_pool import Pool
from ..engine.store import AdapterStore, needed_bytes
from ..fingerprint import model_fingerprint
from ..generate.fast import why_not
from ..generate.options import MOST_ROWS
from ..kv.units import pages_for
from ..ladder import Ladder
from ..loading import context_limit, device_name
from ..plan import static_plan

BATCHES = Several(Whole(1, MOST_ROWS), 1, 8, distinct=True)
CONTEXT = Whole(1, MOST_TOKENS)
ADAPTERS = Whole(1, MOST_ROWS)
ROUNDS = 12
STEPS = 8
"""Of every rung in a round, timed together."""
NO_TOKEN = -1

Clock = Callable[[Decoder, int], float]
"""Mean milliseconds of so many steps of a decoder, taken in a row."""
Say = Callable[[str], None]


def gpu_ms(decoder: Decoder, steps: int) -> float:
    """By the device's own clock, which no wait of the host disturbs."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(steps):
        decoder.run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / steps


@torch.no_grad()
def measure_cost(
    model: PreTrainedModel, ladder: Ladder, batches: Sequence[int] = (1,), *, context_tokens: int = 512,
    adapters: int = 1, rounds: int = ROUNDS, steps: int = STEPS, clock: Clock | None = None,
    say: Say = lambda line: None,
) -> MeasuredCost:  # fmt: skip
    """Median milliseconds of a decode step of `batches` rows at every rung of `ladder`, each row holding
    `context_tokens`; the spread is the largest interquartile range of any rung.

    Rows take `adapters` copies of the adapter in turn, each in memory of its own, as rows of different adapters do.
    Raises ValueError for a model or an adapter that the engine does not cover, a ladder of which not all is in memory,
    batches that are no ascending powers of two, a context that does not fit the model or the device's memory, and,
    where no `clock` is given (on a GPU its own is taken), a device that is no GPU.
    """
    if clock is None and model.device.type != "cuda":
        raise ValueError(f"device: expected a GPU, whose steps are timed, got {model.device.type}; run it on one")
    batches = BATCHES.take("batch", batches)
    for batch in batches:
        if batch & (batch - 1):
            raise refused("batch", "powers of two, which buckets are", batch, "take one of them")
    CONTEXT.take("context", context_tokens)
    limit = context_limit(model)
    if limit is not None and context_tokens + steps > limit:
        raise refused(
            "context", f"at most {limit - steps} tokens, with {steps} behind them", context_tokens, "lower it"
        )
    ladder.require_resident(len(ladder.rungs) - 1)
    reason = why_not(model, static_plan(ladder, ladder.rungs[-1]))
    if reason is not None:
        raise ValueError(
            f"model: expected a model and an adapter that the engine covers, got some that it does not: {reason}; "
            "leave the table out, and training.fit measures the reference path"
        )
    adapters = ADAPTERS.take("adapters", adapters)
    with _fits("adapters", "copies", adapters):
        bench = Bench(model, ladder, adapters, context_tokens, rounds, steps)
    tables = []
    for batch in batches:
        with _fits("batch", "rows", f"{batch} rows of {context_tokens} tokens"):
            tables.append(bench.measure(batch, clock or gpu_ms))
        say(described(tables[-1], ladder.rungs))
    return MeasuredCost(
        model=model_fingerprint(model), adapter=ladder.adapter, ladder=ladder.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."), rungs=ladder.rungs, context_tokens=context_tokens,
        adapters=adapters, buckets=tuple(tables),
    )  # fmt: skip


class Bench:
    """A model and copies of its adapter on the device, with a rung of no bytes below those of the ladder."""

    def __init__(
        self, model: PreTrainedModel, ladder: Ladder, adapters: int, context_tokens: int, rounds: int, steps: int
    ) -> None:
        self.asked, self.context_tokens, self.rounds, self.steps = ladder.rungs, context_tokens, rounds, steps
        self.ladder = own = ladder if 0 in ladder.rungs else ladder.with_rungs((0, *ladder.rungs))
        self.model = model_of(model, context_tokens + steps)
        modules = self.model.modules()
        directions, dtype, device = max(int(own.edges.max()), 1), self.model.dtype, self.model.device
        self.store = AdapterStore(
            modules, slots=adapters, capacity_bytes=adapters * needed_bytes([own], modules, directions, dtype),
            rungs=len(own.rungs), directions=directions, dtype=dtype, device=device, banks=len(own.banks),
        )  # fmt: skip
        self.ladders = Ladders.of(adapters, self.model.shape.vocabulary, len(own.rungs), device)
        for _ in range(adapters):
            self.ladders.put(self.store.load(own), Difficulty.neutral(), torch.tensor(own.scales))
        self.cost = adapter_cost(own.rung_bytes())

    def measure(self, batch: int, clock: Clock) -> LatencyTable:
        """The table of a bucket of `batch` rows."""
        release(self.model.device)
        pages = pages_for(self.context_tokens + self.steps)
        pool = Pool.of(self.model, batch * pages, coded=False)
        pool.memory.view(self.model.dtype).normal_()
        fixed = self._decoder(pool, batch, FixedPolicy(self.ladder.rungs), None)
        top = len(self.ladder.rungs) - 1
        trace = torch.full((batch, self.steps), top, dtype=torch.int16, device=self.model.device)
        deciding = self._decoder(pool, batch, LearnedPolicy(self.ladder.rungs, cost=self.cost), trace)
        by_rung: dict[Rung, list[float]] = {rung: [] for rung in self.ladder.rungs}
        with_controller: list[float] = []
        for number in range(self.rounds + 1):
            for index, rung in enumerate(self.ladder.rungs):
                taken = self._time(fixed, index, clock)
                by_rung[rung] += [taken] if number else []
            taken = self._time(deciding, top, clock)
            with_controller += [taken] if number else []
        quartiles = [statistics.quantiles(own, n=4) for own in by_rung.values()]
        ms = {rung: statistics.median(own) for rung, own in by_rung.items()}
        return LatencyTable(
            device_name(self.model.device), tuple(ms[rung] for rung in self.asked), ms[0],
            max(own[2] - own[0] for own in quartiles), batch, statistics.median(with_controller) - ms[self.asked[-1]],
        )  # fmt: skip

    def _decoder(self, pool: Pool, batch: int, policy: RankPolicy, trace: torch.Tensor | None) -> Decoder:
        """A decoder of `batch` rows, none of which ends; it decides where there is a trace to hold it."""
        pages = len(pool) // batch
        decoder = Decoder(
            self.model, pool, self.store, self.ladders, policy.to(self.model.device), Settings(kv=FULL_KV),
            Bucket(batch, pages, self.steps, 1, trace is not None), trace=trace,
        )  # fmt: skip
        decoder.generated.ends.fill_(NO_TOKEN)
        decoder.generated.ended.zero_()
        return decoder

    def _time(self, decoder: Decoder, rung: int, clock: Clock) -> float:
        """Milliseconds a step, all rows at the rung of this index behind as many tokens as ever."""
        controller = decoder.controller
        assert controller is not None, "there is a store of adapters"
        batch, device = decoder.bucket.rows, self.model.device
        operating = Operating.at(_knob(controller.policy, rung), torch.full((batch,), rung))
        stream = Stream(controller.settings, controller.policy, operating, Offer.of(self._costs(batch)), device)
        rows = torch.arange(batch, device=device)
        controller.load(rows, stream, rows.int() % len(self.store.ladders))
        decoder.hold([self.context_tokens] * batch)
        decoder.generated.count.zero_()
        taken = clock(decoder, self.steps)
        if not bool(decoder.buffers.logits.isfinite().all()):
            raise ValueError(
                f"model: expected finite logits at rung {self.ladder.rungs[rung]}, got others; the milliseconds would "
                "mean nothing, so check the model and the adapter"
            )
        return taken

    def _costs(self, batch: int) -> torch.Tensor:
        return self.cost.double().expand(batch, -1)


def _knob(policy: RankPolicy, rung: int) -> float:
    """Where the rung is settled: a fixed policy's knob is the rung; a traced one may stand anywhere."""
    return float(rung) if isinstance(policy, FixedPolicy) else policy.knob_range()[1]


@contextmanager
def _fits(name: str, what: str, got: object) -> Iterator[None]:
    """Turn a device that is out of memory into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise refused(name, f"{what} that fit the device's memory", got, "lower it, or --context") from None


def release(device: torch.device) -> None:
    """Give back the memory of the bucket before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def described(table: LatencyTable, rungs: Sequence[Rung]) -> str:
    """One line a bucket, for people."""
    by_rung = ", ".join(f"{rung}: {ms:.3f}" for rung, ms in zip(rungs, table.ms, strict=True))
    return (
        f"{table.where}: {table.ms_base:.3f} ms without adapter, +- {table.spread_ms:.3f}; by rung {by_rung}; deciding "
        f"adds {table.controller_ms:.3f}; {table.says}"
    )

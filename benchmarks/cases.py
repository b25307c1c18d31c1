"""What is timed: how many rows, which adapters at which rungs, deciding or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .ladders import MIX, RANK
from .traces import Trace

UNIFORM = (16, 8, 4)
RESIDENT_ROWS, RESIDENT_ADAPTERS, RESIDENT_RUNG = 64, 256, 16
"""Many adapters, of which no more than a rung is in memory."""
INT8_SHARES = (0.0, 0.25, 1.0)
"""A quarter makes 40 % of the bytes of bf16 at 2,048 tokens."""
DEFAULT_SHARE = 0.08
"""What the default KV policy keeps in int8 of WikiText-2 test (`benchmarks/results/perplexity-base-16m-h200.json`)."""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    batch: int
    context: int
    """Tokens that a step reads, on average over the steps timed"""
    rung: int | None = None
    """Equivalent rank that every row takes, and around which a trace is; None: no adapter"""
    adapters: int = 0
    """How many are resident; rows take different ones as far as there are"""
    controller: bool = False
    """Signals and policy at every step; which rung follows is the trace's business, or else it is `rung` for good"""
    trace: Trace | None = None
    resident_rung: int | None = None
    """The highest that is in memory; None: all are"""
    int8_share: float | None = None
    """Of the pages that sinks and window leave, those in int8, the others in int4; None: all in the model's dtype"""

    @property
    def name(self) -> str:
        if self.rung is None:
            return "no adapter"
        rung = "exact" if self.rung == RANK else f"rung {self.rung}"
        what = f"trace around {rung}" if self.trace else rung + (", deciding" if self.controller else "")
        resident = "" if self.resident_rung is None else f" resident at rung {self.resident_rung}"
        pages = "" if self.int8_share is None else f", KV int8 {self.int8_share:.0%} and int4"
        return f"{self.adapters} adapter{'s' * (self.adapters > 1)}{resident}, {what}{pages}"


def cases(
    context: int, batch_context: int, long_context: int, adapters: int, traces: Sequence[Trace]
) -> Iterator[Case]:
    """One row and 32: nothing, exact, with the controller, lower rungs, and traces around them; then many adapters, and
    pages in fewer bits, of 32 rows and of a long text.

    Raises ValueError for a trace around a rung that `MIX` has not.
    """
    for trace in traces:
        if trace.around not in MIX or trace.around == RANK:
            there = ", ".join(map(str, [*MIX][:-1]))
            raise ValueError(
                f"--trace: expected budgets of one of the rungs {there}, got {trace.around}; record others"
            )
    for batch, tokens, resident in ((1, context, 1), (32, batch_context, adapters)):
        yield Case(batch, tokens)
        yield Case(batch, tokens, RANK, resident)
        yield Case(batch, tokens, RANK, resident, controller=True)
        for rung in sorted({*UNIFORM, *(int(trace.around) for trace in traces)}, reverse=True):
            yield Case(batch, tokens, rung, resident)
        for trace in traces:
            yield Case(batch, tokens, int(trace.around), resident, controller=True, trace=trace)
    yield Case(RESIDENT_ROWS, context, RESIDENT_RUNG, RESIDENT_ADAPTERS, resident_rung=RESIDENT_RUNG)
    for share in INT8_SHARES:
        yield Case(32, batch_context, 8, adapters, True, resident_rung=RESIDENT_RUNG, int8_share=share)
    for long in (None, 0.0, DEFAULT_SHARE, 1.0):
        yield Case(1, long_context, RANK, 1, controller=True, int8_share=long)

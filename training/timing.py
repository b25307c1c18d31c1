"""The milliseconds that a fit was given: the table of the user's own model and ladder, measured with the engine."""

from __future__ import annotations

from dataclasses import dataclass

from policy.cost import LatencyTables
from policy.measured import MeasuredCost
from runtime.fingerprint import adapter_fingerprint
from runtime.ladder import Adapter, Ladder

from .task import AdapterTask, FitContext


@dataclass(frozen=True)
class GivenLatency:
    """What the file at `path` holds, and the bucket of it that the fit goes by."""

    path: str
    cost: MeasuredCost
    tables: LatencyTables

    @classmethod
    def read(cls, path: str | None, batch: int | None) -> GivenLatency | None:
        """None where there is no file. Raises what `MeasuredCost.load` and `tables` raise, and ValueError for a batch
        without a file."""
        if path is None:
            if batch is not None:
                raise ValueError(f"latency_batch: expected --latency with it, got {batch} alone; add it")
            return None
        cost = MeasuredCost.load(path)
        return cls(path, cost, cost.tables(batch))

    def check(self, context: FitContext, source: Adapter | Ladder) -> None:
        """Raise ValueError, before there is a ladder, unless it is of this model and adapter."""
        adapter = source.adapter if isinstance(source, Ladder) else adapter_fingerprint(source)
        self.cost.check(model=context.model_fingerprint, adapter=adapter)

    def of(self, context: FitContext, task: AdapterTask) -> LatencyTables:
        """The tables; says which one the fit goes by. Raises ValueError unless they are of the task's ladder."""
        own = task.ladder
        self.cost.check(
            model=context.model_fingerprint, adapter=own.adapter, rungs=own.rungs, ladder=own.fingerprint
        )  # fmt: skip
        table, cost = self.tables.chosen, self.cost
        batches = ", ".join(map(str, cost.batches))
        context.say(
            f"latency of {self.path}: {table.where} (of {batches}), {cost.dtype}, context {cost.context_tokens}: "
            f"{table.ms_base:.3f} ms without adapter, {min(table.ms):.3f} to {max(table.ms):.3f} with it, "
            f"+- {table.spread_ms:.3f}: {table.says}"
        )
        return self.tables

"""What an adapter costs in milliseconds, as a file: written by `python -m runtime.measure`, read by `training.fit`.

It names the model and the ladder that were measured, so that no fit goes by the milliseconds of another one: a ladder
of other rungs, or of other bits in the same rungs, reads other bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .cost import MOST_BUCKETS, LatencyTable, LatencyTables, check_buckets
from .files import write_whole
from .limits import Choice, Record, Several, Text, Whole, check_fields, limited, read_record, refused, shown
from .reading import read_json
from .rungs import RUNGS, Rung
from .settings import MOST_TOKENS

SCHEMA_VERSION = 1
AGAIN = "measure it with python -m runtime.measure"
OF_LADDER = "measure the folder `ladder` that the fit writes into its output, and pass that as --adapter"


@dataclass(frozen=True)
class MeasuredCost:
    """Milliseconds of a decode step of the engine at every rung of one ladder, by batch bucket."""

    model: str = field(metadata=limited(Text()))
    """Fingerprints of the model, the adapter and the ladder"""
    adapter: str = field(metadata=limited(Text()))
    ladder: str = field(metadata=limited(Text()))
    dtype: str = field(metadata=limited(Text()))
    """What the model computes in"""
    rungs: tuple[Rung, ...] = field(metadata=limited(RUNGS))
    context_tokens: int = field(metadata=limited(Whole(1, MOST_TOKENS)))
    """Tokens that every row holds"""
    adapters: int = field(metadata=limited(Whole(1, 4096)))
    """Copies of the adapter in memory that rows take in turn"""
    buckets: tuple[LatencyTable, ...] = field(metadata=limited(Several(Record(LatencyTable), 1, MOST_BUCKETS)))
    """In ascending order of their batches"""
    schema_version: int = field(default=SCHEMA_VERSION, metadata=limited(Choice((SCHEMA_VERSION,))))

    def __post_init__(self) -> None:
        check_fields(self)
        check_buckets("buckets", self.buckets)
        if None in self.batches:
            raise refused("buckets", "the batch of each", None, AGAIN)
        if len(self.buckets[0].ms) != len(self.rungs):
            raise refused("buckets.ms", f"{len(self.rungs)} latencies, one per rung", self.buckets[0].ms)

    @property
    def batches(self) -> tuple[int | None, ...]:
        return tuple(own.batch for own in self.buckets)

    def tables(self, batch: int | None = None) -> LatencyTables:
        """All tables, of which a fit goes by that of `batch`, by default the smallest. Raises ValueError for a batch
        that was not measured."""
        batch = self.batches[0] if batch is None else batch
        if batch not in self.batches:
            measured = ", ".join(map(str, self.batches))
            raise ValueError(
                f"latency_batch: expected one that was measured ({measured}), got {shown(batch)}; take one of them, or "
                f"{AGAIN} --batch"
            )
        return LatencyTables(self.buckets, batch)

    def check(
        self, *, model: str, adapter: str, rungs: Sequence[Rung] | None = None, ladder: str | None = None
    ) -> None:
        """Raise ValueError unless this model, adapter and, where they are known, rungs and ladder were measured."""
        for name, own, given in (("model", self.model, model), ("adapter", self.adapter, adapter)):
            if own != given:
                raise ValueError(
                    f"latency: expected the {name} of this fit, fingerprint {given}, got the table of {own}; {AGAIN}"
                )
        if rungs is not None and tuple(rungs) != self.rungs:
            raise ValueError(f"latency: expected rungs {tuple(rungs)}, got the table of {self.rungs}; {OF_LADDER}")
        if ladder is not None and ladder != self.ladder:
            raise ValueError(
                f"latency: expected the ladder of this fit, fingerprint {ladder}, got the table of {self.ladder}; "
                f"{OF_LADDER}"
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, replacing what is there."""
        write_whole(Path(path), (json.dumps(asdict(self), indent=2, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> MeasuredCost:
        """Read what `save` wrote. Raises FileNotFoundError for a missing file and ValueError, in one line with the
        file's name, for anything that is not as `save` writes it."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"latency: expected a file, got {path}, which is none; {AGAIN}")
        record = read_json(path, AGAIN)
        try:
            return read_record(cls, record, "")
        except ValueError as error:
            raise ValueError(f"{path}: {error} or {AGAIN}") from None

"""Requests that arrive over time: what `benchmarks.serve` is given, drawn once and committed.

Prompts and answers have lengths as conversations have, log-normal. Arrivals come in waves, a quiet beginning, a flood
and an ebb, so that one row is in use at times, and all are at others. Times are in steps of the engine, not in
milliseconds: so the same trace fills a slow device and a fast one alike.

    python -m benchmarks.request_trace       # write it again
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from policy.limits import Entries, Number, Several, Whole
from policy.reading import read_json
from runtime.command import one_line_errors

from .printing import parse, result_path

PATH = Path(__file__).parent / "traces" / "requests.json"
ADAPTERS = 32
BUDGETS = (0.0625, 0.125, 0.25, 1.0)
WAVES = ((20, 40.0), (120, 1.0), (60, 12.0))
"""How many requests come, and how many steps lie between two of them on average"""
PROMPT, ANSWER = (math.log(160), 0.9, 8, 1500), (math.log(110), 0.7, 4, 400)
"""Median and spread of the lengths' logarithm, and the shortest and the longest"""
MOST = 10**6
_TRACE = Entries(
    {
        "requests": Several(
            Entries(
                {
                    "arrival": Whole(0, MOST), "prompt": Whole(1, MOST), "answer": Whole(1, MOST),
                    "adapter": Whole(0, MOST), "budget": Number(0, 1, above=True),
                }
            ), 1, MOST,
        )
    }
)  # fmt: skip


@dataclass(frozen=True)
class Arrival:
    """One request of the trace."""

    arrival: int
    """Steps of the engine before it comes"""
    prompt: int
    """Tokens"""
    answer: int
    """Tokens"""
    adapter: int
    """Number of the adapter"""
    budget: float
    """Share of the exact adapter's bytes that a token may read on average"""


def draw(seed: int = 0) -> list[Arrival]:
    """The trace."""
    source = random.Random(seed)

    def length(middle: float, spread: float, least: int, most: int) -> int:
        return round(min(most, max(least, source.lognormvariate(middle, spread))))

    found, now = [], 0.0
    for count, apart in WAVES:
        for _ in range(count):
            now += source.expovariate(1 / apart)
            own = source.randrange(ADAPTERS), source.choice(BUDGETS)
            found.append(Arrival(round(now), length(*PROMPT), length(*ANSWER), *own))
    return found


def load(path: Path = PATH) -> list[Arrival]:
    """Read a trace. Raises ValueError for what is not as `main` writes it, FileNotFoundError where there is none."""
    record = _TRACE.take(str(path), read_json(path, "write it again with benchmarks.request_trace"))
    return [Arrival(**own) for own in record["requests"]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.request_trace", description="Draw requests anew.")
    parser.add_argument("--output", default=str(PATH), help="JSON file")
    parser.add_argument("--seed", type=int, default=0)
    return parse(parser, {"seed": Whole(0, 2**31)})


def main() -> None:
    with one_line_errors():
        args = arguments()
        path = result_path(args.output, "requests")
        found = draw(args.seed)
        path.write_text(json.dumps({"requests": [asdict(own) for own in found]}, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} requests -> {path}")


if __name__ == "__main__":
    main()

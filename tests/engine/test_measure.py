"""What a step of the engine takes: what is timed, in which order, what becomes of the times, and what is refused.

Kernels are run where what they do is looked at; everywhere else a clock stands in that only looks at what it is given.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from policy import FixedPolicy, Settings
from policy.measured import MeasuredCost
from runtime.engine import decoder as decoders
from runtime.fingerprint import model_fingerprint
from runtime.kv.units import pages_for
from runtime.ladder import save_ladder
from runtime.loading import device_name
from runtime.measure.__main__ import measure, parser
from runtime.measure.steps import described, measure_cost
from runtime.ops.shrink import Shares

ROOT = Path(__file__).resolve().parents[2]
CONTEXT, ROUNDS = 20, 4


@dataclass
class Watch:
    """A clock that notes what it is given, and says what `of` (rung, decides, round) says."""

    of: object
    asked: list[dict] = field(default_factory=list)

    def __call__(self, decoder, steps: int) -> float:
        rows, b, decides = decoder.buffers.rows, decoder.buffers, decoder.bucket.decides
        before = [own for own in self.asked if own["decoder"] is decoder]
        per_round = 1 if decides else rungs_timed(decoder)
        rung = decoder.controller.trace[0, 0] if decides else rows.rung[0]
        note = {
            "decoder": decoder, "rung": int(rung), "decides": decides, "round": len(before) // per_round,
            "steps": steps, "batch": decoder.bucket.rows, "lengths": b.tables.lengths.tolist(),
            "slots": rows.slot.tolist(), "ended": decoder.generated.ended.tolist(),
            "counts": decoder.generated.count.tolist(), "rungs": rows.rung.tolist(), "weights": rows.weight.tolist(),
            "table": [own[: pages_for(CONTEXT)].flatten().tolist() for own in b.tables.full],
        }  # fmt: skip
        self.asked.append(note)
        return self.of(note["rung"], decides, note["round"])


def rungs_timed(decoder) -> int:
    return len(decoder.controller.policy.rungs)


def by_rung(rung: int, decides: bool, number: int) -> float:
    """Rung j takes 10 + j ms, deciding half of one more; the first round, in which everything is new, far more."""
    return (1000 if number == 0 else 10 + rung) + 0.5 * decides


def measured(llama, ladder, batches=(1,), clock=None, **options) -> tuple[MeasuredCost, Watch]:
    watch = Watch(by_rung) if clock is None else clock
    given = {"context_tokens": CONTEXT, "rounds": ROUNDS, "steps": 3} | options
    return measure_cost(llama, ladder, batches, clock=watch, **given), watch


def test_every_rung_is_timed_in_turn_round_by_round_in_one_graph_a_bucket(llama, ladders):
    ladder = ladders[0]
    cost, watch = measured(llama, ladder, (1, 4))
    timed = range(len(ladder.rungs) + 1)
    for batch in (1, 4):
        own = [note for note in watch.asked if note["batch"] == batch]
        order = [(note["decides"], note["rung"]) for note in own]
        assert order == (ROUNDS + 1) * [*((False, rung) for rung in timed), (True, timed[-1])]
        assert len({id(note["decoder"]) for note in own if not note["decides"]}) == 1
        assert own[0]["decoder"].controller.policy.rungs == (0, *ladder.rungs), "below them all one of no bytes"
    assert [own.batch for own in cost.buckets] == [1, 4]
    assert cost.rungs == ladder.rungs
    assert (cost.adapter, cost.ladder) == (ladder.adapter, ladder.fingerprint)
    assert cost.model == model_fingerprint(llama)
    assert (cost.dtype, cost.context_tokens, cost.adapters) == ("float32", CONTEXT, 1)


def test_every_row_is_in_use_at_the_rung_that_is_timed_behind_the_same_context(llama, ladders):
    ladder = ladders[0]
    _, watch = measured(llama, ladder, (2,), adapters=2)
    scales = [1.0, *ladder.scales]  # nothing scales the rung of no bytes
    for note in watch.asked:
        assert note["lengths"] == [CONTEXT] * 2
        assert note["ended"] == note["counts"] == [0, 0]
        assert note["slots"] == [0, 1], "each its own copy of the adapter"
        named = [unit for row in note["table"] for unit in row]
        assert len(set(named)) == len(named) == 2 * pages_for(CONTEXT), "no page is shared"
        assert note["steps"] == 3
        if not note["decides"]:
            assert note["rungs"] == [note["rung"]] * 2
            assert note["weights"] == pytest.approx([scales[note["rung"]]] * 2)


def test_of_a_row_without_a_copy_of_its_own_the_adapter_is_shared(llama, ladders):
    _, watch = measured(llama, ladders[0], (4,), adapters=2)
    assert {tuple(note["slots"]) for note in watch.asked} == {(0, 1, 0, 1)}


def test_a_table_has_medians_behind_the_first_round_and_the_widest_spread_of_a_rung(llama, ladders):
    """A machine that gets slower: every rung by as much, and one rung more than the others."""
    ladder = ladders[0]

    def slower(rung: int, decides: bool, number: int) -> float:
        return by_rung(rung, decides, number) + 0.1 * number + (0.4 * number if rung == 2 else 0)

    (table,) = measured(llama, ladder, clock=Watch(slower))[0].buckets
    rounds = range(1, ROUNDS + 1)
    expected = [statistics.median(slower(rung, False, n) for n in rounds) for rung in range(len(ladder.rungs) + 1)]
    assert [table.ms_base, *table.ms] == pytest.approx(expected)
    quartiles = statistics.quantiles([slower(2, False, n) for n in rounds], n=4)
    assert table.spread_ms == pytest.approx(quartiles[2] - quartiles[0])
    assert table.controller_ms == pytest.approx(0.5)
    assert table.device == device_name(llama.device)
    assert described(table, ladder.rungs).startswith(f"{table.device} at batch 1: 10.250 ms without adapter, +- ")


def test_what_runs_reads_the_rung_that_it_is_timed_as(llama, ladders, monkeypatch):
    """For real: tokens and pages alike, the base model, a coded rung and the exact adapter differ, and deciding at the
    exact one computes what it does."""
    monkeypatch.setattr(decoders, "splits_for", lambda *_: 2)
    monkeypatch.setattr(Shares, "of", lambda batch, width, directions: Shares(1, 8, 128, 128))
    ladder = ladders[0].with_rungs([2])
    found: dict[tuple[int, bool], torch.Tensor] = {}
    plain: list[torch.Tensor] = []

    def without_adapter(timed) -> torch.Tensor:
        own = decoders.Decoder(timed.model, timed.pool, None, None, FixedPolicy((8,)), Settings(), timed.bucket)
        own.buffers.tokens.fill_(5)
        own.hold([CONTEXT] * timed.bucket.rows)
        own.run()
        return own.buffers.logits

    def real(rung: int, decides: bool, number: int) -> float:
        if number == 1:
            decoder = watch.asked[-1]["decoder"]
            decoder.buffers.tokens.fill_(5)
            decoder.run()
            found[rung, decides] = decoder.buffers.logits.clone()
            if rung == 0:
                plain.append(without_adapter(decoder))
        return 1.0

    watch = Watch(real)
    measured(llama, ladder, clock=watch, rounds=2, steps=1)
    assert list(found) == [(0, False), (1, False), (2, False), (2, True)]
    base, coded, exact, deciding = found.values()
    torch.testing.assert_close(deciding, exact)
    for one, other in ((base, coded), (base, exact), (coded, exact)):
        assert (one - other).abs().max() > 1e-2
    torch.testing.assert_close(base, *plain)


def test_the_rung_of_no_bytes_may_be_the_ladders_own(llama, ladders):
    ladder = ladders[0].with_rungs([0, 2])
    cost, _ = measured(llama, ladder)
    (table,) = cost.buckets
    assert cost.rungs == (0, 2, 8)
    assert table.ms_base == table.ms[0] == 10
    assert table.ms == (10, 11, 12)


def lost(decoder, steps):
    decoder.buffers.logits.fill_(torch.nan)
    return 1.0


def too_large(decoder, steps):
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ((3,), {}, "batch: expected powers of two, which buckets are, got 3; take one of them"),
        ((4, 1), {}, r"batch: expected a list of .*, strictly ascending, .*, got \(4, 1\)"),
        ((), {}, "batch: expected a list of 1 to 8, .*, got "),
        ((0,), {}, r"batch\[0\]: expected a whole number in \[1, 128\], got 0"),
        ((1,), {"context_tokens": 126}, "context: expected at most 125 tokens, with 3 behind them, got 126; lower it"),
        ((1,), {"context_tokens": 0}, "context: expected a whole number in .*, got 0"),
        ((1,), {"adapters": 0}, "adapters: expected a whole number in .*, got 0"),
        (
            (2,),
            {"clock": too_large},
            "batch: expected rows that fit the device's memory, got '2 rows of 20 tokens'",
        ),
        ((1,), {"clock": lost}, "model: expected finite logits at rung 0, got others"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(llama, ladders, batches, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        measured(llama, ladders[0], batches, **options)
    assert "\n" not in str(caught.value)


def test_a_ladder_of_which_not_all_is_there_and_a_model_that_the_engine_lacks_are_refused(llama, ladders, tiny_gpt2):
    with pytest.raises(ValueError, match="rung: expected at most the resident rung 2, got 8"):
        measured(llama, ladders[0].up_to(2))
    with pytest.raises(ValueError, match="got some that it does not: the model is gpt2, not one of llama"):
        measured(tiny_gpt2, ladders[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU cannot do")
def test_without_a_gpu_there_is_one_line(llama, ladders, tmp_path):
    with pytest.raises(ValueError, match="device: expected a GPU, whose steps are timed, got cpu; run it on one"):
        measure_cost(llama, ladders[0])
    path = tmp_path / "new" / "latency.json"
    command = [sys.executable, "-m", "runtime.measure", "--model", "m", "--adapter", "a", "--output", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: device: expected a GPU, whose steps are timed, got cpu; run it on one\n"
    assert not path.parent.exists()


def test_the_command_writes_what_it_was_asked_to_measure(llama, ladders, device, tmp_path, capsys):
    llama.save_pretrained(tmp_path / "model")
    save_ladder(ladders[0], tmp_path / "ladder")
    path, watch = tmp_path / "new" / "latency.json", Watch(by_rung)
    flags = f"--model {tmp_path / 'model'} --adapter {tmp_path / 'ladder'} --batch 2 1 --context 24 --adapters 2"
    measure(parser().parse_args([*flags.split(), "--dtype", "float32", "--output", str(path)]), device, watch)
    cost = MeasuredCost.load(path)
    assert ([own.batch for own in cost.buckets], cost.context_tokens, cost.adapters) == ([1, 2], 24, 2)
    assert (cost.model, cost.ladder, cost.dtype) == (model_fingerprint(llama), ladders[0].fingerprint, "float32")
    assert {tuple(note["lengths"]) for note in watch.asked} == {(24,), (24, 24)}
    assert cost.buckets[1].ms == tuple(11.0 + rung for rung in range(len(ladders[0].rungs)))
    one, two, last = capsys.readouterr().out.splitlines()
    assert one == described(cost.buckets[0], cost.rungs)
    assert two == described(cost.buckets[1], cost.rungs)
    assert last.startswith(
        f"written to {path}; python -m training.fit --adapter {tmp_path / 'ladder'} --latency {path}"
    )
    with pytest.raises(ValueError, match=f"output: expected a file, got the folder {tmp_path}; name a file in it"):
        measure(parser().parse_args([*flags.split(), "--output", str(tmp_path)]), device, watch)


@pytest.mark.gpu
def test_on_a_gpu_its_own_clock_is_taken(llama, ladders):
    cost = measure_cost(llama, ladders[0], (1, 2), context_tokens=CONTEXT, rounds=3)
    assert all(own.ms_base > 0 and min(own.ms) > 0 for own in cost.buckets)

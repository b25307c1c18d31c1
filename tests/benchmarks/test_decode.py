"""What `benchmarks.decode` times and records, on a shape so small that it can be interpreted."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bench as timing
from benchmarks import decode, opponents
from benchmarks.bench import Bench
from benchmarks.cases import RESIDENT_ADAPTERS, Case, cases
from benchmarks.ladders import MIX, RANK, fill, random_ladder, read_bytes
from benchmarks.net import COLUMNS, RETURNED, net, returned, rows_of
from benchmarks.records import load_record
from benchmarks.shapes import SHAPES
from benchmarks.traces import DEFAULT, Trace, load_traces, save_traces
from policy.settings import KVSettings
from runtime.engine.model import model_of
from runtime.engine.store import AdapterStore, needed_bytes
from runtime.kv.formats import FULL, INT8
from runtime.ladder.formats import BITS
from runtime.ops.packed import ROWS, STARTS_A

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS, CONTEXT = 2, 40
SPECK = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip
TRACE = Trace("some", 4, 1 / 16, ((2, 6), (4, 4), (6, 2)))
FIELDS = {
    "name", "shape", "batch", "adapters", "context", "rung", "kv", "controller", "ms_per_step", "spread", "floor_ms",
    "bytes", "peak_bytes", "kv_share", "adapter_bytes", "peer",
}  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "speck", SPECK)
        patch.setattr(timing, "STEPS", STEPS)
        yield Bench("speck", torch.float32, DEVICE, CONTEXT + STEPS)


@pytest.fixture(scope="module")
def records(bench):
    """Of two rows: nothing, exact with and without the controller, a rung, and a trace around it."""
    own = [
        Case(2, CONTEXT),
        Case(2, CONTEXT, RANK, 4),
        Case(2, CONTEXT, RANK, 4, controller=True),
        Case(2, CONTEXT, 4, 4),
        Case(2, CONTEXT, 4, 4, controller=True, trace=TRACE),
    ]
    return [bench.time(case, 1, 1e9) for case in own]


def test_a_record_has_what_it_must(records):
    for record in records:
        assert set(record) >= FIELDS
        assert record["ms_per_step"] == record["spread"]["median"] > 0
        assert (record["shape"], record["batch"], record["context"], record["kv"]) == ("speck", 2, CONTEXT, "fp32")
        assert record["floor_ms"] == record["bytes"] / 1e6
    assert [record["rung"] for record in records] == [None, RANK, RANK, 4, 4]
    assert [record["adapters"] for record in records] == [0, 4, 4, 4, 4]
    assert [record["controller"] for record in records] == [False, False, True, False, True]
    assert records[-1]["trace"] == {"adapter": "some", "budget": 1 / 16, "mean_rank": 4}


def test_a_trace_is_paid_for_rung_by_rung(bench, records):
    none, exact, _, uniform, traced = records
    assert none["adapter_bytes"] == 0
    spent = read_bytes(bench.model.modules().values(), torch.float32)
    assert exact["adapter_bytes"] == 2 * spent[RANK]
    assert uniform["adapter_bytes"] == 2 * spent[4]
    # The two rows that are nearest to the mean.
    assert traced["adapter_bytes"] == round(spent[2] / 2 + spent[6] / 2 + spent[4])
    assert traced["bytes"] - none["bytes"] == traced["adapter_bytes"]


def test_a_trace_that_was_not_followed_is_refused(bench, records):
    case = Case(2, CONTEXT, 4, 4, controller=True, trace=TRACE)
    bench._hold(case)
    rungs = bench._rungs(case)
    decoder = bench._decoder(case, rungs)
    decoder.rungs.copy_(rungs)
    bench._check(case, decoder, rungs)
    decoder.rungs[1, 1] += 1
    with pytest.raises(ValueError, match="trace around rung 4: expected the trace's rungs at every step, got others"):
        bench._check(case, decoder, rungs)
    decoder.buffers.logits[0] = torch.nan
    with pytest.raises(ValueError, match="expected finite logits, got others"):
        bench._check(case, decoder, rungs)


def test_many_adapters_take_what_their_resident_rung_reads(bench):
    record = bench.time(Case(2, CONTEXT, 4, 5, resident_rung=16), 1, 1e9)
    assert record["name"] == "5 adapters resident at rung 16, rung 4"
    modules = bench.model.modules()
    whole = random_ladder(modules, torch.float32, DEVICE)
    assert record["resident_bytes"] == 5 * needed_bytes([whole.up_to(16)], modules, RANK, torch.float32)
    assert record["resident_bytes"] < 5 * needed_bytes([whole], modules, RANK, torch.float32)
    assert record["exact_bytes"] == 5 * int(whole.rung_bytes()[-1])
    # What is kept of the ladder lies nowhere.
    assert all(part.is_meta for own in bench._ladder.banks[0].values() for part in own.a.parts().values())


def test_adapters_share_scales_and_no_code(bench):
    model = model_of(bench.hf, 64)
    ladder = random_ladder(model.modules(), torch.float32, DEVICE)
    one = needed_bytes([ladder], model.modules(), RANK, torch.float32)
    store = AdapterStore(
        model.modules(), slots=3, capacity_bytes=3 * one, rungs=len(MIX), directions=RANK, dtype=torch.float32,
        device=DEVICE,
    )  # fmt: skip
    fill(store, ladder, 3)
    # As a store that loads the ladder has it, byte for byte, but for the codes.
    loaded = AdapterStore(
        model.modules(), slots=1, capacity_bytes=one, rungs=len(MIX), directions=RANK, dtype=torch.float32,
        device=DEVICE,
    )  # fmt: skip
    loaded.load(ladder)
    assert torch.equal(store.tables.edges[1], loaded.tables.edges[0])
    assert [store.bytes_of(slot) for slot in range(3)] == [one] * 3
    parts = store.arena.view(3, one)
    # Of every bank, module and format how many rows there are; no block of outputs is filled up here.
    rows = loaded.tables.parts[0, :, :, ROWS - STARTS_A :][..., : len(BITS)].cpu()
    widths = torch.tensor([own.inputs + own.outputs for own in model.modules().values()])
    exact, eight, four, two = (rows * widths[:, None]).sum((0, 1)).tolist()
    coded = four // 2 + two // 4
    assert 0 < coded - int((parts[0] != parts[1]).sum()) < 0.01 * coded, "one byte in 256 is drawn again"
    floats = loaded.arena[:one].view(torch.float32)
    same = parts.view(torch.float32) == floats
    assert exact == RANK * widths.sum()
    assert same.all(0).sum() >= exact + eight > exact
    assert not torch.isnan(parts[2][same[2].repeat_interleave(4)].view(torch.float32)).any()


def test_pages_in_fewer_bits_are_counted_as_what_they_are(bench, monkeypatch):
    """Of 39 to 41 tokens one page is a sink, one is coded, and the rest is live; the pool is no larger than that takes,
    and what a page has lost is free."""
    decoders = []
    monkeypatch.setattr(timing, "KV_POLICY", KVSettings(window_tokens=0))
    monkeypatch.setattr(Bench, "_check", lambda own, case, decoder, rungs: decoders.append(decoder))
    record = bench.time(Case(2, CONTEXT, 4, 4, controller=True, int8_share=1.0), 1, 1e9)
    (decoder,) = decoders
    units, rows = decoder.pool.units, 2 * bench.model.shape.layers
    assert record["kv_bytes"] == rows * (24 * units.page_bytes(FULL) // 16 + units.page_bytes(INT8))
    assert record["kv"] == "mixed"
    assert record["kv_share"] == record["kv_bytes"] / (rows * CONTEXT * units.page_bytes(FULL) / 16)
    assert decoder.buffers.tables.counts.tolist() == [[1, 1, 0]] * 2
    assert int(decoder.pool.free.dry) == 0
    held = 2 * (2 * units.of(FULL) + units.of(INT8))
    assert held <= len(decoder.pool) <= held + 2 * (2 * units.of(FULL) + units.of(INT8))


def test_the_cases_are_those_of_the_issue():
    traces = [Trace("some", around, around / 64, ((around,),)) for around in (16, 8, 4)]
    found = list(cases(512, 2048, 4096, 32, traces))
    assert len({(case.batch, case.context, case.name) for case in found}) == len(found)
    names = [case.name for case in found if case.batch == 32]
    assert names == [
        "no adapter", "32 adapters, exact", "32 adapters, exact, deciding", "32 adapters, rung 16",
        "32 adapters, rung 8", "32 adapters, rung 4", "32 adapters, trace around rung 16",
        "32 adapters, trace around rung 8", "32 adapters, trace around rung 4",
        *(f"32 adapters resident at rung 16, rung 8, deciding, KV int8 {share}% and int4" for share in (0, 25, 100)),
    ]  # fmt: skip
    assert [case.int8_share for case in found if case.context == 4096] == [None, 0, 0.08, 1]
    (many,) = (case for case in found if case.batch == 64)
    assert (many.batch, many.context, many.rung, many.adapters, many.resident_rung) == (
        64, 512, 16, RESIDENT_ADAPTERS, 16,
    )  # fmt: skip


def test_a_trace_around_no_rung_of_the_benchmarks_ladder_is_refused():
    with pytest.raises(ValueError, match=r"--trace: expected budgets of one of the rungs 2, .*, got 5; record others"):
        list(cases(512, 2048, 4096, 32, [Trace("some", 5, 0.1, ((5,),))]))


def test_what_deciding_is_worth_is_told_beside_the_rung_it_is_around(records):
    (found,) = net(records, 1e9)
    _, exact, idle, uniform, traced = (record["ms_per_step"] for record in records)
    assert found["net_ms"] == exact - traced
    assert found["controller_ms"] == idle - exact
    assert found["against_uniform_ms"] == traced - uniform
    assert found["saved_bytes"] == records[1]["bytes"] - records[-1]["bytes"] > 0
    assert found["saved_ms_at_bandwidth"] == found["saved_bytes"] / 1e6
    (row,) = rows_of([found])
    assert len(row) == len(COLUMNS)
    assert row[0] == "2 rows, trace around rung 4"


def test_what_comes_back_is_told_of_the_bytes_that_a_rung_saves(records):
    """At 1 GB/s the rung's bytes less would take `would` milliseconds, and those of its rank in 16 bits `peers`."""
    would = (records[1]["bytes"] - records[3]["bytes"]) / 1e6
    peers = (1 - records[3]["rung"] / RANK) * (records[1]["bytes"] - records[0]["bytes"]) / 1e6
    assert peers < 0.98 * would
    times = [10.0, 10.0 + 2 * would, 99.0, 10.0 + 1.25 * would, 10.0 + would]
    told = [record | {"ms_per_step": ms} for record, ms in zip(records, times, strict=True)]
    for case, ms in ((1, 9.0), (3, 9.0 - 0.4 * peers)):
        told[case] = told[case] | {"peer": {opponents.GRAPH: {"ms_per_step": ms}}}
    several = [record | {"batch": 3} for record in records]
    uniform, traced = returned([*several, *told], 1e9)[2:]
    assert len(uniform) == len(RETURNED)
    assert uniform == [told[3]["name"], "75%", "40%", f"{0.125 * would:.1%}"]
    told[3]["peer"] = {opponents.GRAPH: {"ms_per_step": 9.0 + 0.004 * peers}}
    assert returned([*several, *told], 1e9)[2][2] == "0%", "a little less than nothing is nothing"
    assert traced[2] == ""
    saved = (records[1]["bytes"] - records[4]["bytes"]) / 1e6
    assert traced[1] == f"{would / saved:.0%}"


def test_peers_belong_to_the_cases_they_do_the_same_as(bench):
    def named(**record):
        own = {"controller": False, "batch": 1, "context": CONTEXT, "rung": None} | record
        return [(one.name, one.compiled) for one in opponents.opponents(bench, own, "folder")]

    plain, compiled = (opponents.GRAPH, False), (opponents.GRAPH_COMPILED, True)
    assert named() == [plain, compiled, (opponents.EAGER, False), (opponents.STATIC, True)]
    assert named(rung=RANK) == [plain, compiled, (opponents.PEFT_EAGER, False), (opponents.PEFT_STATIC, True)]
    assert named(batch=32, rung=RANK) == [plain, compiled]
    assert named(batch=32, rung=16) == [plain]
    assert named(controller=True, rung=16) == named(resident_rung=16, rung=16) == []


def test_peers_are_written_beside_the_case(bench, monkeypatch, capsys):
    base = {"controller": False, "batch": 1, "context": CONTEXT, "name": "a case", "peer": None}
    own = [base | {"rung": None}, base | {"rung": RANK}, base | {"rung": 16, "controller": True}]

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory\nand more")

    only = {"plain": True, "compiled": False, "read_tb_s": 3.5}
    opponents.add_peers(bench, own, 1, **only)
    assert list(own[0]["peer"]) == [opponents.GRAPH, opponents.EAGER]
    assert list(own[1]["peer"]) == [opponents.GRAPH, opponents.PEFT_EAGER]
    assert own[2]["peer"] is None
    for found in (*own[0]["peer"].values(), *own[1]["peer"].values()):
        assert found["ms_per_step"] == found["spread"]["median"] > 0
        assert found["read_tb_s"] == 3.5
    before, saved = own[0]["peer"].pop(opponents.EAGER), []
    monkeypatch.setattr(opponents, "graphed", broken)
    timed = own[0]["peer"].pop(opponents.GRAPH)
    opponents.add_peers(bench, own[:1], 1, **only, save=lambda: saved.append(len(own[0]["peer"])))
    assert saved == [1, 2]
    opponents.add_peers(bench, own[:1], 1, **only, save=lambda: saved.append(0))
    assert saved == [1, 2]  # there already
    assert before.keys() == timed.keys() == own[0]["peer"][opponents.EAGER].keys()
    assert own[0]["peer"][opponents.GRAPH] == {"failed": "RuntimeError: out of memory", "read_tb_s": 3.5}
    assert "out of memory" in capsys.readouterr().out


def test_the_command_writes_cases_and_adds_peers_to_them(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(decode, "gate", lambda device: "not looked at here")
    monkeypatch.setattr(decode, "STEPS", STEPS)
    path = tmp_path / "record.json"
    monkeypatch.setattr("sys.argv", ["decode", "--context", "128", "--repeats", "1"])
    args = decode.arguments()
    args.shape, args.context, args.batch_context, args.repeats = "speck", CONTEXT, CONTEXT, 1
    decode.measure(args, DEVICE, path, [Case(2, CONTEXT)], None)
    record = load_record(path)
    assert record == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"device", "versions", "read_tb_s", "cases", "commit", "trace", "controller", "gate"} <= set(record)
    assert (record["cases"][0]["kv"], record["cases"][0]["peer"]) == ("bf16", None)
    args.peers = True
    monkeypatch.setattr(decode, "read_bandwidth", lambda device: 7e9)
    decode.measure(args, DEVICE, path, [], record)
    (case,) = load_record(path)["cases"]
    assert case["ms_per_step"] == record["cases"][0]["ms_per_step"]
    assert case["peer"][opponents.GRAPH]["ms_per_step"] > 0
    assert case["peer"][opponents.GRAPH]["read_tb_s"] == 0.007 != record["read_tb_s"]


def test_a_case_has_a_line_for_people(records):
    row = decode.table_row(records[-1] | {"peak_bytes": 2 * 10**9, "floor_ms": 2.0, "ms_per_step": 3.0})
    assert row[0] == "2 x 40, 4 adapters, trace around rung 4"
    assert row[1] == "3.000"
    assert row[3:] == ["2.000", "1.50", "2.0"]


def test_the_committed_trace_is_of_32_rows_at_three_budgets():
    traces = load_traces(DEFAULT)
    assert [trace.around for trace in traces] == [16, 8, 4]
    for trace in traces:
        assert (len(trace.rungs), len(trace.rungs[0])) == (32, 64)
        assert trace.mean_rank == pytest.approx(trace.around, rel=0.1)
        assert len({rung for row in trace.rungs for rung in row}) >= 3
        replayed = trace.replay(32, 64, tuple(MIX))
        assert [[list(MIX)[j] for j in row] for row in replayed.tolist()] == [list(row) for row in trace.rungs]


def test_a_trace_is_replayed_on_the_rungs_there_are():
    assert TRACE.mean_rank == 4
    assert TRACE.replay(3, 3, (2, 3, 4, 6)).tolist() == [[0, 3, 0], [2, 2, 2], [3, 0, 3]]
    assert TRACE.replay(4, 1, (1, 64)).tolist() == [[0], [0], [0], [0]]
    uneven = Trace("some", 4, 1 / 16, ((2, 2), (4, 4), (8, 8)))
    assert uneven.replay(1, 2, (2, 4, 8)).tolist() == [[1, 1]]  # the row that is nearest to the mean


def test_a_trace_comes_back_as_it_was_saved(tmp_path):
    path = tmp_path / "deep" / "trace.json"
    traces = [{"around": 2, "budget": 0.5, "mean_rank": 2.25, "rungs": [[2, 2.5], [2, 2.5]]}]
    save_traces(path, {"adapter": "one", "rows": 2}, traces)
    assert load_traces(path) == [Trace("one", 2, 0.5, ((2, 2.5), (2, 2.5)))]
    assert json.loads(path.read_text())["rows"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version: expected a whole number in"),
        ({"traces": []}, "traces: expected a list of at least one"),
        (
            {"traces": [{"around": 4, "budget": 0.1, "rungs": [[4], [4, 4]]}]},
            r"traces\[0\].rungs: expected rows of one",
        ),
        ({"traces": [{"around": 4, "budget": 0.1, "rungs": [[-1]]}]}, r"traces\[0\].rungs\[0\]\[0\]: expected a rank"),
        ({"traces": [{"around": 4, "rungs": [[4]]}]}, r"traces\[0\].budget: expected a number"),
        ({"adapter": 3}, "adapter: expected text"),
    ],
)
def test_a_trace_that_is_none_is_refused_in_one_line(change, message, tmp_path):
    good = {"schema_version": 1, "adapter": "one", "traces": [{"around": 4, "budget": 0.1, "rungs": [[4]]}]}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(good | change))
    with pytest.raises(ValueError, match=message) as refusal:
        load_traces(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


def test_a_missing_trace_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--trace: expected a file, got none at .*; record one"):
        load_traces(tmp_path / "none.json")

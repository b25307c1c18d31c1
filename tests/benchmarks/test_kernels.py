"""What `benchmarks.kernels` launches and counts, without its clock: on the tiny shape, interpreted where no GPU is."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import kernels as command
from benchmarks.kernels import check, kernels_of, record_of, table
from benchmarks.ladders import MIX, RANK, read_bytes
from benchmarks.launches import AT_LEAST, NO_ADAPTER, RUNGS, SITES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTEXT = 40


@pytest.fixture(scope="module")
def both():
    """(one row, three rows): what `kernels_of` makes."""
    return kernels_of("tiny", torch.float32, DEVICE, 4, {1: CONTEXT, 3: CONTEXT})


@pytest.fixture(scope="module")
def listed(both):
    """[(the batch's `Kernels`, its kernels)]"""
    return [(own, list(own.all())) for own in both]


def test_every_kernel_runs_and_writes_numbers(listed):
    for _, kernels in listed:
        for kernel in kernels:
            if kernel.rung in (16, 8) and kernel.name != "linear o":
                continue  # interpreted they take long, and do what this one does
            for out in kernel.outputs:
                out.fill_(torch.nan if out.is_floating_point() else 7)
            if kernel.name in ("residual", "controller", "sampling, greedy", "sampling, top-p"):
                for out in kernel.outputs:  # added to, or one of a few rows
                    out.zero_()
            kernel.launches[-1]()
            check(kernel)


def test_linears_with_and_without_adapters_are_what_they_are_called(both):
    for own in both:
        for rung in (RANK, NO_ADAPTER):
            kernel = own._linear("down", rung)
            x = kernel.launches[0].args[0]
            # Round and round, as a graph is replayed: what an earlier launch has counted is not taken for this one's.
            for launch in kernel.launches[:2] + kernel.launches[:1]:
                update = launch.keywords["update"]
                for out in (*kernel.outputs, *([] if update is None else [update.u])):
                    out.fill_(torch.nan)
                launch()
                if update is not None:
                    assert update.ready.nonzero()[:, 0].unique().tolist() == [update.site]
            y, *added = kernel.outputs
            assert torch.allclose(y, x @ own.model.layers[0].down.weights[0].T, atol=1e-5)
            if rung == RANK:
                factors = own.ladder.banks[1]["model.layers.0.mlp.down_proj"]
                expected = x @ factors.a.wide.T @ factors.b.wide
                assert float(expected.abs().max()) > 1e-4
                assert torch.allclose(added[0], expected, atol=1e-6)
            else:
                assert added == []


def test_consumers_add_what_adapters_add_and_only_then(both):
    for own in both:
        for rung in (RANK, NO_ADAPTER):
            kernel = own._residual(rung)
            launch, r = kernel.launches[0], kernel.outputs[0]
            y, update, before = launch.args[0], launch.keywords["update"], r.clone()
            launch()
            assert (update is None) == (rung == NO_ADAPTER)
            assert torch.allclose(r, before + y + (0 if update is None else update.added), atol=1e-6)


def test_each_launch_puts_back_what_the_one_before_it_has_counted(both):
    for own in both:
        for name in SITES:
            updates = [update for _, update in own._updates(name, 4)]
            sites = [update.site for update in updates]
            assert [update.before for update in updates] == [sites[-1], *sites[:-1]]
            assert len({id(update.ready) for update in updates}) == 1


def test_no_two_launches_of_a_kernel_share_what_they_read_of_weights_and_adapters(both):
    alone, several = both
    for name in SITES:
        for own in both:
            for rung in (4, NO_ADAPTER):
                weights = [launch.args[1][0].data_ptr() for launch in own._linear(name, rung).launches]
                layers = own.model.shape.layers
                assert all(len(set(weights[at : at + layers])) == layers for at in range(0, len(weights), layers))
        for own, times in ((alone, 4), (several, 1)):
            updates = [launch.keywords["update"] for launch in own._linear(name, 4).launches]
            reads = [(update.reads, update.site) for update in updates]
            starts = {int(read.records[0, site, 5 + f]) for read, site in reads for f in (2,)}
            assert len(starts) == len(reads) == times * own.model.shape.layers


def test_the_bytes_of_adapters_are_those_of_a_rung_with_8_bits_as_numbers():
    own = kernels_of("tiny", torch.bfloat16, DEVICE, 1, {1: CONTEXT})[0]
    modules = own.store.modules.values()
    for number, rung in enumerate(MIX):
        # Two bytes a value instead of one, and no scale of A' and of B' in two bytes each.
        more = MIX[rung][1] * sum(module.inputs + module.outputs - 4 for module in modules)
        expected = int(own.ladder.rung_bytes()[number]) + more
        assert own.model.shape.layers * sum(own._direction_bytes(name, rung) for name in SITES) == expected
        assert read_bytes(modules, torch.bfloat16)[rung] == expected


def test_bytes_are_of_all_rows_and_of_no_adapter_without_one(listed):
    (_, one), (_, three) = listed
    names = [(own.name, own.rung) for own in one]
    assert names == [(own.name, own.rung) for own in three]
    assert len(set(names)) == len(names)
    bytes_of = [{(own.name, own.rung): own.read_bytes for own in kernels} for kernels in (one, three)]
    for rung in (RANK, 16, 8, 4):
        adapters = [own["linear qkv", rung] - own["linear qkv", NO_ADAPTER] for own in bytes_of]
        assert adapters[1] == 3 * adapters[0] > 0
    for own, rows in zip(bytes_of, (1, 3), strict=True):
        assert own["gated", NO_ADAPTER] == rows * 4 * 2 * 352
        assert own["gated", RANK] == 2 * own["gated", NO_ADAPTER]
        assert own["residual", RANK] == rows * 4 * 3 * 128
        assert own["linear o", NO_ADAPTER] == 4 * (128 * 128 + rows * 128)
    # The exact adapter in float32: q, k and v.
    assert bytes_of[0]["linear qkv", RANK] == 4 * (128 + 128 * 256 + RANK * (3 * 128 + 256))
    assert bytes_of[0]["attention", None] == 2 * CONTEXT * 2 * 32 * 4
    assert all(len(own.launches) >= AT_LEAST for own in one if own.name in ("controller", "sampling, greedy"))


def test_a_table_has_a_line_for_each_kernel_and_batch(listed):
    records = [record_of(own, [2.0, 4.0, 3.0], 1e9) for _, kernels in listed for own in kernels]
    assert records[0]["measured_us"] == 3.0
    assert records[0]["ratio"] == pytest.approx(3.0 / (records[0]["read_bytes"] / 1e3))
    rows = table(records)
    assert len(rows) == len({(own["kernel"], own["batch"]) for own in records})
    assert all(len(row) == 2 + len(RUNGS) for row in rows)
    assert [row[0] for row in rows if row[0].startswith("gated")] == ["gated, 1 row", "gated, 3 rows"]
    found = {row[0]: [bool(cell) for cell in row[1:]] for row in rows}
    assert found["linear o, 3 rows"] == [False, *(True for _ in RUNGS)]
    assert found["gated, 3 rows"] == [False, True, False, False, False, True]


def test_the_command_writes_every_kernel(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "gate", lambda device: "not looked at here")
    monkeypatch.setattr(command, "FLUSH_BYTES", 2**10)
    monkeypatch.setattr(command, "BATCH", 2)
    monkeypatch.setattr(command, "microseconds", lambda kernel, repeats, flush: [2.0] * repeats)
    monkeypatch.setattr("sys.argv", ["kernels", "--shape", "tiny", "--repeats", "3", "--batch-context", "64"])
    path = tmp_path / "kernels.json"
    command.measure(command.arguments(), DEVICE, path)
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads(path.read_text())
    assert {own["batch"] for own in record["kernels"]} == {1, command.BATCH}
    assert {"kernel", "rung", "read_bytes", "predicted_us", "measured_us", "ratio"} <= set(record["kernels"][0])
    assert "rotary, 2 rows" in out


def test_a_kernel_that_writes_no_number_is_refused(listed):
    kernel = listed[0][1][2]
    kernel.outputs[0].fill_(torch.inf)
    with pytest.raises(ValueError, match="linear qkv: expected finite numbers, got others"):
        check(kernel)

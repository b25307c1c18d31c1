"""What `benchmarks.kernels` launches and counts, without its clock: on the tiny shape, interpreted where no GPU is."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import kernels as command
from benchmarks.kernels import RUNGS, check, kernels_of, record_of, table
from benchmarks.ladders import MIX, RANK
from benchmarks.launches import AT_LEAST, NO_ADAPTER, SITES

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
            if kernel.rung in (16, 8) and "residual" not in kernel.name:
                continue  # interpreted they take a minute; what 8 bits are the residual's launch reads
            for out in kernel.outputs:
                out.fill_(torch.nan if out.is_floating_point() else 7)
            if kernel.name in ("expand residual", "controller", "sampling, greedy", "sampling, top-p"):
                for out in kernel.outputs:  # added to, or one of a few rows
                    out.zero_()
            if kernel.rung is not None and "shrink" in kernel.name:
                kernel.outputs[0].zero_()  # directions that no rung reads are left as they are
            kernel.launches[-1]()
            check(kernel)


def test_linear_and_shrink_are_what_they_are_called(both):
    for own in both:
        kernel = own._linear("down")
        kernel.launches[-1]()
        x = kernel.launches[-1].args[0]
        expected = x @ own.model.layers[-1].down.weights[0].T
        assert torch.allclose(kernel.outputs[0], expected, atol=1e-5)
        shrink = own._shrink("o", RANK)
        shrink.launches[0]()
        a = own.ladder.modules["model.layers.0.self_attn.o_proj"].a.wide.float()
        assert torch.allclose(shrink.outputs[0][:, 0], shrink.launches[0].args[0] @ a.T, atol=1e-5)


def test_no_two_launches_of_a_kernel_share_what_they_read_of_weights_and_adapters(both):
    alone, several = both
    for name in SITES:
        for own in both:
            weights = [launch.args[1][0].data_ptr() for launch in own._linear(name).launches]
            assert len(set(weights)) == len(weights) == own.model.shape.layers
        for own, times in ((alone, 4), (several, 1)):
            updates = [launch.keywords.get("update") or launch.args[1] for launch in own._shrink(name, 4).launches]
            reads = [(update.reads, update.site) for update in updates]
            starts = {int(read.records[0, site, 5 + f]) for read, site in reads for f in (2,)}
            assert len(starts) == len(reads) == times * own.model.shape.layers


def test_the_bytes_of_shrink_and_expand_are_those_of_a_rung(both):
    own = kernels_of("tiny", torch.bfloat16, DEVICE, 1, {1: CONTEXT})[0]
    for number, rung in enumerate(MIX):
        read = sum(own._direction_bytes(name, rung, inputs=half) for name in SITES for half in (True, False))
        assert own.model.shape.layers * read == int(own.ladder.rung_bytes()[number])


def test_bytes_are_of_all_rows_and_of_no_adapter_without_one(listed):
    (_, one), (_, three) = listed
    # Of one row a shrink is part of the linear.
    names = [(own.name.removeprefix("linear + "), own.rung) for own in one]
    assert names == [(own.name, own.rung) for own in three]
    assert len(set(names)) == len(names)
    bytes_of = [{(own.name, own.rung): own.read_bytes for own in kernels} for kernels in (one, three)]
    for rung in (RANK, 16, 8, 4):
        assert bytes_of[1]["expand gated", rung] == 3 * bytes_of[0]["expand gated", rung]
        both = bytes_of[0]["linear + shrink qkv", rung] - 4 * 128 * (128 + 64 + 64)
        assert bytes_of[1]["shrink qkv", rung] == 3 * both
    assert bytes_of[0]["expand gated", NO_ADAPTER] == 4 * 2 * 352
    assert bytes_of[0]["attention", None] == 2 * CONTEXT * 2 * 32 * 4
    assert bytes_of[0]["linear o", None] == 4 * (128 * 128 + 128)
    assert all(len(own.launches) >= AT_LEAST for own in one if own.name in ("controller", "sampling, greedy"))


def test_a_table_has_a_line_for_each_kernel_and_batch(listed):
    records = [record_of(own, [2.0, 4.0, 3.0], 1e9) for _, kernels in listed for own in kernels]
    assert records[0]["measured_us"] == 3.0
    assert records[0]["ratio"] == pytest.approx(3.0 / (records[0]["read_bytes"] / 1e3))
    rows = table(records)
    assert len(rows) == len({(own["kernel"], own["batch"]) for own in records})
    assert all(len(row) == 2 + len(RUNGS) for row in rows)
    assert [row[0] for row in rows if row[0].startswith("expand gated")] == [
        "expand gated, 1 row", "expand gated, 3 rows",
    ]  # fmt: skip
    assert all(all(row[2:]) for row in rows if row[0].startswith("expand"))


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
    assert "expand rotary, 2 rows" in out


def test_a_kernel_that_writes_no_number_is_refused(listed):
    kernel = listed[0][1][2]
    kernel.outputs[0].fill_(torch.inf)
    with pytest.raises(ValueError, match="linear qkv: expected finite numbers, got others"):
        check(kernel)

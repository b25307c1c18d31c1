"""`python -m runtime.export` writes what it was asked for, or ends in one line."""

import re
import sys

import pytest
import torch

from policy import FixedPolicy, LearnedPolicy, PercentilePolicy, RandomPolicy
from runtime import build_ladder, export_policy, load_adapter, load_ladder, open_ladder, save_ladder
from runtime.export.__main__ import main
from runtime.ladder.adapter import CONFIG_NAME, WEIGHTS_NAME
from tests.runtime.coded import coded_ladder
from tests.runtime.export.exported import CODED_RUNGS


def test_command_writes_what_the_policy_serves(fixed_policy, llama_adapter, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rung"
    arguments = ["--adapter", llama_adapter, "--policy", fixed_policy(), "--budget", "0.5", "--output", output]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    main()
    ladder = build_ladder(load_adapter(llama_adapter))
    size, exact = (
        (output / WEIGHTS_NAME).stat().st_size + (output / CONFIG_NAME).stat().st_size,
        ladder.rung_bytes()[-1],
    )
    assert capsys.readouterr().out == (
        f"rung 4 written to {output} at scale 0.85\n{size:,} bytes; the exact adapter takes {int(exact):,}\n"
    )
    again = load_adapter(export_policy(tmp_path / "policy", llama_adapter, tmp_path / "again", budget=0.5))
    for name, factors in load_adapter(output).modules.items():
        assert torch.equal(factors.a, again.modules[name].a)
        assert torch.equal(factors.b, again.modules[name].b)


MISTAKES = {
    "both": (FixedPolicy, ["--rung", "4", "--policy", "POLICY"], "rung: expected --rung or --policy, got both"),
    "neither": (FixedPolicy, [], "rung: expected --rung or --policy, got neither"),
    "padding of what is packed": (FixedPolicy, ["--rung", "4", "--packed", "--uniform"], "uniform: expected a PEFT"),
    "a scale of all": (FixedPolicy, ["--packed", "--scale", "1.1"], "scale: expected 1 for a whole ladder, got 1.1"),
    "the top packed": (FixedPolicy, ["--rung", "8", "--packed"], "rung: expected one below 8 to pack"),
    "a budget alone beside packed": (FixedPolicy, ["--packed", "--budget", "0.5"], "budget: expected --policy with it"),
    "half a direction": (FixedPolicy, ["--rung", "2.5"], "rungs: expected whole ranks of an svd ladder, got [2.5]"),
    "a rung that is no number": (FixedPolicy, ["--rung", "nan"], "--rung: expected a rank in"),
    "a budget alone": (FixedPolicy, ["--rung", "4", "--budget", "0.5"], "budget: expected --policy with it"),
    "a scale beside": (FixedPolicy, ["--policy", "POLICY", "--scale", "1.1"], "scale: expected the policy's own"),
    "a budget beyond": (FixedPolicy, ["--policy", "POLICY", "--budget", "1.5"], "budget: expected a share"),
    "a budget that is none": (FixedPolicy, ["--policy", "POLICY", "--budget", "nan"], "budget: expected a share"),
    "no policy": (FixedPolicy, ["--policy", "/nowhere"], "policy: expected a folder"),
    "percentile": (
        PercentilePolicy,
        ["--policy", "POLICY"],
        "policy: expected a fixed one, got percentile, which mixes",
    ),
    "learned": (LearnedPolicy, ["--policy", "POLICY"], "policy: expected a fixed one, got learned, which mixes"),
    "random": (RandomPolicy, ["--policy", "POLICY"], "policy: expected a fixed one, got random, which mixes"),
    "a scale that overflows": (FixedPolicy, ["--rung", "4", "--scale", "1e300"], "scale: expected"),
}


@pytest.mark.parametrize(("kind", "more", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_command_ends_in_one_line_for_what_does_not_fit(
    kind, more, message, fixed_policy, llama_adapter, tmp_path, monkeypatch, capsys
):
    folder, output = fixed_policy(kind), tmp_path / "rung"
    given = [str(folder) if argument == "POLICY" else argument for argument in more]
    monkeypatch.setattr(sys, "argv", ["export", "--adapter", str(llama_adapter), "--output", str(output), *given])
    with pytest.raises(SystemExit, match="2"):
        main()
    found = capsys.readouterr().err
    assert found.startswith(f"error: {message}")
    assert found.count("\n") == 1
    assert not output.exists()


def test_command_writes_the_rung(llama_adapter, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rung"
    arguments = ["--adapter", str(llama_adapter), "--rung", "5", "--output", str(output), "--uniform"]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    main()
    assert "rung 5 written" in capsys.readouterr().out
    assert load_adapter(output).rank == 5


PACKING = {
    "a fractional rung": ("coded", ["--rung", "0.5", "--packed"], "rung 0.5", (0.5, 8)),
    "a whole rung": ("coded", ["--rung", "4.0", "--packed"], "rung 4", (4, 8)),
    "a rung of svd at a scale": ("peft", ["--rung", "5", "--packed", "--scale", "1.25"], "rung 5", (5, 8)),
    "all of them": ("coded", ["--packed"], "ladder", (0.5, 1, 2, 4, 8)),
    "all of svd": ("peft", ["--packed"], "ladder", (1, 2, 3, 4, 8)),
    "what a policy serves": ("peft", ["--policy", "POLICY", "--packed", "--budget", "0.5"], "rung 4", (4, 8)),
}


@pytest.mark.parametrize(("source", "more", "what", "rungs"), PACKING.values(), ids=PACKING)
def test_command_packs(source, more, what, rungs, fixed_policy, llama_adapter, tmp_path, monkeypatch, capsys):
    ladder = coded_ladder(load_adapter(llama_adapter), CODED_RUNGS)
    adapter = {"peft": llama_adapter, "coded": save_ladder(ladder, tmp_path / "ladder")}[source]
    given, output = (
        [str(fixed_policy()) if argument == "POLICY" else argument for argument in more],
        tmp_path / "packed",
    )
    monkeypatch.setattr(sys, "argv", ["export", "--adapter", str(adapter), "--output", str(output), *given])
    main()
    found = load_ladder(output)
    assert found.rungs == rungs
    assert found.resident == (None if what == "ladder" else 0)
    own = {"a rung of svd at a scale": 1.25, "what a policy serves": 0.85}
    scale = next((value for name, value in own.items() if PACKING[name][1] == more), 1)
    at = "" if scale == 1 else f" at scale {scale}"
    assert found.scales[0] == pytest.approx(scale * (1 if source == "peft" else open_ladder(adapter, rungs).scales[0]))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{what} written to {output}{at}"
    sizes = re.fullmatch(r"([\d,]+) bytes; the exact adapter takes ([\d,]+)", second)
    assert [int(size.replace(",", "")) for size in sizes.groups()] == [
        sum(file.stat().st_size for file in output.iterdir()), int(ladder.rung_bytes()[-1]),
    ]  # fmt: skip


def test_command_writes_a_fractional_rung(llama_adapter, tmp_path, monkeypatch, capsys):
    adapter = save_ladder(coded_ladder(load_adapter(llama_adapter), CODED_RUNGS), tmp_path / "ladder")
    output = tmp_path / "rung"
    arguments = ["--adapter", str(adapter), "--rung", "0.5", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    main()
    assert capsys.readouterr().out.startswith(f"rung 0.5 written to {output}\n")
    assert load_adapter(output).rank == int(load_ladder(adapter).rank_table[0].max())


@pytest.mark.parametrize("rung", ["9", "0", "-1"])
def test_command_ends_in_one_line_for_a_bad_rung(rung, llama_adapter, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rung"
    arguments = ["--adapter", str(llama_adapter), "--rung", rung, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not output.exists()

"""A policy on disk: exact round trips, those of old schemas too, and nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from policy import (
    KINDS,
    LearnedPolicy,
    OraclePolicy,
    PercentilePolicy,
    PolicyCheckpoint,
    RankPolicy,
)
from policy.settings import PAPER_SIGNALS
from tests.policy.checkpoints import (
    REFERENCE,
    RUNGS,
    SETTINGS,
    WEIGHTS,
    checkpoint,
    edit,
    learned,
    replace_tensors,
    summary_of,
    tables,
)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    saved = checkpoint(kind)
    saved.save(tmp_path / "deep" / "policy")
    state = torch.get_rng_state()
    loaded = PolicyCheckpoint.load(str(tmp_path / "deep" / "policy"))
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random numbers"
    assert type(loaded.policy) is type(saved.policy)
    assert not loaded.policy.training
    assert loaded.policy.config() == saved.policy.config()
    assert loaded.settings == saved.settings == SETTINGS
    expected = saved.policy.state_dict()
    assert loaded.policy.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.policy.state_dict().items())
    for name in ("curve", "cost", "fingerprints", "default_budget", "latency", "metrics"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert sorted(path.name for path in (tmp_path / "deep").rglob("*")) == [
        "policy",
        "policy.json",
        "policy.safetensors",
    ]
    record = json.loads((tmp_path / "deep" / "policy" / "policy.json").read_text())
    assert record["schema_version"] == 5
    assert record["rungs"] == list(RUNGS)
    assert record["libraries"]["torch"] == torch.__version__


def test_saving_again_replaces_the_policy_and_nothing_else(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    checkpoint("fixed", curve=None, latency=None).save(folder)
    loaded = PolicyCheckpoint.load(folder)
    assert loaded.policy.kind == "fixed"
    assert (loaded.curve, loaded.latency) == (None, None)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]


@pytest.mark.parametrize("metrics", [{"kl": float("nan")}, {"kl": torch.ones(1)}])
@pytest.mark.parametrize("existing", [False, True])
def test_metrics_that_are_not_json_leave_nothing_behind(metrics: dict, existing: bool, tmp_path: Path) -> None:
    target = tmp_path / "policy"
    if existing:
        checkpoint("fixed").save(target)
    before = {path.name: path.read_bytes() for path in target.glob("*")}
    with pytest.raises(ValueError, match=r"metrics: expected JSON values and finite numbers, got .*; convert them"):
        checkpoint(metrics=metrics).save(target)
    assert {path.name: path.read_bytes() for path in target.glob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"] * existing


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("call", ["write_text", "replace"])
def test_a_failing_write_leaves_what_was_there(
    call: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "policy"
    if existing:
        checkpoint("fixed").save(target)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "write_text" else os, call, fail)
        with pytest.raises(OSError, match="disk full"):
            checkpoint().save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"] * existing
    if existing:
        assert PolicyCheckpoint.load(target).policy.kind == "fixed"


def test_an_interrupted_replacement_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, calls = os.replace, []

    def fail_second(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("power cut")
        replace(*args)

    changed = checkpoint()
    with torch.no_grad():
        next(changed.policy.parameters()).add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_second)
        with pytest.raises(OSError, match="power cut"):
            changed.save(folder)
    with pytest.raises(ValueError, match=r"expected the file policy.json was written with, got another"):
        PolicyCheckpoint.load(folder)


def test_an_oracle_is_not_exported(tmp_path: Path) -> None:
    oracle = OraclePolicy(RUNGS, torch.zeros(1, 4).long())
    message = r"policy: expected a kind that can be exported \(fixed, percentile, learned, random\), got 'oracle'"
    with pytest.raises(ValueError, match=message):
        checkpoint(policy=oracle).save(tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_served_are_not_exported(tmp_path: Path) -> None:
    diverged = checkpoint()
    diverged.policy.get_parameter("log_temperature").data.fill_(float("nan"))
    with pytest.raises(ValueError, match="policy: tensor log_temperature: expected finite numbers, got NaN"):
        diverged.save(tmp_path / "policy")
    half = checkpoint()
    half.policy.bfloat16()
    with pytest.raises(ValueError, match=r"tensor \w+: expected .* torch.float32, got .* torch.bfloat16"):
        half.save(tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_rungs_may_be_fractional_and_whole_ones_are_written_as_such(tmp_path: Path) -> None:
    rungs = (0.25, 0.75, 1.0, 8)
    saved = checkpoint(policy=LearnedPolicy(rungs), cost=(1 / 32, 3 / 32, 1 / 8, 1), latency=None, default_budget=1 / 8)
    saved.save(tmp_path / "policy")
    text = (tmp_path / "policy" / "policy.json").read_text()
    assert [*map(json.dumps, json.loads(text)["rungs"])] == ["0.25", "0.75", "1", "8"]
    loaded = PolicyCheckpoint.load(tmp_path / "policy")
    assert loaded.policy.rungs == rungs
    assert [*map(type, loaded.policy.rungs)] == [float, float, int, int]
    assert loaded.policy.cost.tolist() == [1 / 32, 3 / 32, 1 / 8, 1], "the rung's share of the top"
    with pytest.raises(ValueError, match=r"budget: expected at least 0.03125, which the smallest rung 0.25 costs"):
        loaded.operating([1 / 64], [0])
    edit(tmp_path / "policy", lambda record: record.update(rungs=[0.25, 0.75, 1.0, 8.0]))
    assert PolicyCheckpoint.load(tmp_path / "policy").policy.rungs == rungs


@pytest.mark.parametrize("kind", KINDS)
def test_difficulty_comes_back_with_the_policy_that_carries_it(kind: str, tmp_path: Path) -> None:
    checkpoint(kind).save(tmp_path / "policy")
    found, expected = PolicyCheckpoint.load(tmp_path / "policy").policy.difficulty(), tables()
    if kind != "learned":
        assert found is None
        return
    assert (found.token.dtype, found.pair.dtype) == (torch.uint8, torch.uint8)
    assert found.token.unique().numel() > 5
    assert torch.equal(found.token, expected.token)
    assert torch.equal(found.pair, expected.pair)


def assert_decide_alike(one: RankPolicy, other: RankPolicy) -> None:
    summary, (cheap, dear) = summary_of(200), one.knob_range()
    knob = cheap + (dear - cheap) * torch.rand(200, generator=torch.Generator().manual_seed(3))
    mine, yours = one.eval().decide(summary, knob), other.decide(summary, knob)
    assert torch.equal(mine.rung, yours.rung)
    assert torch.equal(mine.scale, yours.scale)
    assert mine.rung.unique().numel() > 2


@pytest.mark.parametrize(
    ("policy", "config"),
    [
        (lambda: learned(signals=["pair", "age", "entropy"]), {"signals": ["entropy", "pair", "age"]}),
        (lambda: learned(signals=("age",), vocabulary=3), {"signals": ["age"], "vocabulary": 3}),
        (
            lambda: PercentilePolicy(RUNGS, "difficulty", sign=-1, of="token"),
            {"signal": "difficulty", "sign": -1, "of": "token"},
        ),
        (lambda: PercentilePolicy(RUNGS, "surprisal", sign=-1), {"signal": "surprisal", "sign": -1, "of": "chunk"}),
    ],
)
def test_what_a_policy_looks_at_comes_back_with_it(policy: Callable, config: dict, tmp_path: Path) -> None:
    saved = checkpoint(policy=policy())
    saved.save(tmp_path / "policy")
    record = json.loads((tmp_path / "policy" / "policy.json").read_text())
    assert {name: record["config"][name] for name in config} == config
    loaded = PolicyCheckpoint.load(tmp_path / "policy")
    assert loaded.policy.config() == saved.policy.config()
    assert_decide_alike(saved.policy, loaded.policy)


OLD_SIGNALS = ("entropy", "novelty", "attention", "prior")
ADDED = ("signals", "vocabulary", "sign", "of")
"""What a configuration has had since schema 3."""


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_of_an_old_schema_decides_as_it_did(kind: str, schema: int, tmp_path: Path) -> None:
    """Written by hand as the schema had it, 1 with signals in another order, rungs and start rung among the settings,
    and a learned policy of either with the four signals of the paper alone."""
    saved = checkpoint(kind)
    if kind == "percentile":
        saved = checkpoint(kind, policy=PercentilePolicy(RUNGS, "complexity", spread=2.0, weights=WEIGHTS))
    if kind == "learned":
        saved = checkpoint(kind, policy=learned(signals=PAPER_SIGNALS))
    saved.save(tmp_path / "policy")

    def downgrade(record: dict[str, Any]) -> None:
        record["schema_version"] = schema
        table = record["latency"]["buckets"][0]
        record["latency"] = {name: table[name] for name in ("device", "ms", "ms_base", "spread_ms")}
        for name in ADDED:
            record["config"].pop(name, None)
        record["settings"].pop("prompt_tokens")
        for weights in (record["settings"]["chunk"]["weights"], record["config"].get("weights", {})):
            for name in set(weights) - set(OLD_SIGNALS):
                weights.pop(name)
        if schema == 1:
            record["settings"] |= {"rungs": list(RUNGS), "start_rung": 2}
            record["settings"]["chunk"]["weights"] = [WEIGHTS[name] for name in OLD_SIGNALS]
            record["config"].pop("weights", None)

    def old_order(state: dict[str, torch.Tensor]) -> None:
        if kind != "learned" or schema == 2:
            return
        for name, axis in (("feature_mean", 0), ("feature_std", 0), ("trunk.0.weight", 1)):
            columns = state[name].unbind(axis)
            statistics = {signal: columns[3 * s : 3 * s + 3] for s, signal in enumerate(PAPER_SIGNALS)}
            known = dict(zip(PAPER_SIGNALS, columns[12:16], strict=True))
            moved = [column for signal in OLD_SIGNALS for column in statistics[signal]]
            moved += [known[signal] for signal in OLD_SIGNALS] + list(columns[16:])
            state[name] = torch.stack(moved, axis).contiguous()

    replace_tensors(tmp_path / "policy", old_order)
    edit(tmp_path / "policy", downgrade)
    loaded = PolicyCheckpoint.load(tmp_path / "policy")
    assert loaded.settings == replace(SETTINGS, prompt_tokens=SETTINGS.block_tokens)
    assert loaded.latency == REFERENCE
    assert loaded.policy.config() == saved.policy.config()
    assert_decide_alike(saved.policy, loaded.policy)


def test_schema_1_whose_parts_disagree_is_refused(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "policy")
    edit(tmp_path / "policy", lambda r: r.update(schema_version=1))
    with pytest.raises(ValueError, match=r"policy\.json: schema 1: .* or export the policy again"):
        PolicyCheckpoint.load(tmp_path / "policy")

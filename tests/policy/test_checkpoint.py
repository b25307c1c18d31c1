"""A policy on disk: exact round trips, nothing half-written, and an error message for whatever can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from policy import (
    FULL_KV,
    KINDS,
    PAGE_ACTIONS,
    SIGNALS,
    TOKEN_SIGNALS,
    ChunkSettings,
    Fingerprints,
    FixedPolicy,
    KnobCurve,
    KVSettings,
    LatencyTable,
    LatencyTables,
    LearnedPolicy,
    OraclePolicy,
    PercentilePolicy,
    PolicyCheckpoint,
    RandomPolicy,
    RankPolicy,
    Settings,
    SignalSettings,
    Summary,
)
from policy.difficulty import PAIRS, Difficulty
from policy.settings import PAPER_SIGNALS

RUNGS = (2, 4, 8, 16)
COST = (0.125, 0.25, 0.5, 1.0)
VOCABULARY = 11
WEIGHTS = dict(zip(PAPER_SIGNALS, (0.1, 0.3, 0.2, 0.4), strict=True))
SETTINGS = Settings(
    block_tokens=8,
    fade_tokens=1,
    signals=SignalSettings(recent_pages=3),
    chunk=ChunkSettings(min_tokens=1, max_tokens=5, weights=WEIGHTS, thresholds=(0.3,)),
    kv=KVSettings(hard="full", easy="sparse"),
)
PRINTS: Fingerprints = {"model": "m-1", "adapter": "a-1", "ladder": "l-1", "shared": False}
TABLE = LatencyTable("NVIDIA H200", ms=(10.5, 11.0, 13.0, 14.0), ms_base=10.0, spread_ms=0.1)
REFERENCE = LatencyTables((TABLE,))
ALONE = dataclasses.replace(TABLE, batch=1, controller_ms=0.01)
TABLES = LatencyTables((ALONE, LatencyTable("NVIDIA H200", (22.0, 24.0, 28.0, 30.0), 20.0, 0.2, 32, -0.01)), 1)


def tables() -> Difficulty:
    generator = torch.Generator().manual_seed(2)
    return Difficulty.of(*(4 * torch.rand(size, generator=generator) + 0.1 for size in (VOCABULARY, PAIRS)))


def build(kind: str) -> RankPolicy:
    torch.manual_seed(0)
    scales = torch.tensor([1.3, 1.2, 1.1, 1.0])
    if kind == "fixed":
        return FixedPolicy(RUNGS, scales)
    if kind == "percentile":
        return PercentilePolicy.calibrate(torch.rand(500), RUNGS, "entropy", scales, spread=1.25)
    if kind == "random":
        return RandomPolicy(RUNGS, seed=5, spread=0.5, scales=scales)
    policy = learned(vocabulary=VOCABULARY)
    policy.set_difficulty(tables())
    return policy


def learned(**config: Any) -> LearnedPolicy:
    policy = LearnedPolicy(
        RUNGS, hidden=7, scale_range=0.1, log_lambda_range=(-9.5, 3), cost=torch.tensor(COST), **config
    )
    policy.calibrate(torch.rand(50, Summary.FEATURES), torch.rand(50, 4))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter))
    return policy


def checkpoint(kind: str = "learned", **changes: Any) -> PolicyCheckpoint:
    policy = build(kind)
    cheap, dear = policy.knob_range()
    values: dict[str, Any] = {
        "policy": policy,
        "settings": SETTINGS,
        "curve": KnobCurve((0.2, 0.9), (cheap, dear)),
        "cost": COST,
        "fingerprints": PRINTS,
        "default_budget": 0.4,
        "latency": TABLES,
        "metrics": {"kl_nats": 0.1, "best fixed": [1, 2, None]},
    }
    return PolicyCheckpoint(**(values | changes))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / "policy.json").read_text())
    change(record)
    (folder / "policy.json").write_text(json.dumps(record))


def replace_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """New tensors with a digest that agrees, as another program would write them."""
    state = safetensors.torch.load_file(folder / "policy.safetensors")
    change(state)
    data = safetensors.torch.save(state)
    (folder / "policy.safetensors").write_bytes(data)
    edit(folder, lambda record: record.update(tensors_sha256=hashlib.sha256(data).hexdigest()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint().save(tmp_path / "policy")
    return tmp_path / "policy"


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
    assert record["schema_version"] == 4
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


def test_a_missing_folder_or_file_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"policy: expected a folder, got .*nowhere, which is not one"):
        PolicyCheckpoint.load(folder / "nowhere")
    for name in ("policy.safetensors", "policy.json"):
        (folder / name).unlink()
        with pytest.raises(
            FileNotFoundError, match=f"expected policy.json and policy.safetensors in .*, got no {name}"
        ):
            PolicyCheckpoint.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected JSON, got Expecting property name"),
        (b"", "expected JSON, got Expecting value"),
        (b"\xff\xfe{}", "expected JSON, got .*codec can't decode"),
        (b"[1]", "expected a JSON object, got list"),
        (b"{}", r"expected schema_version 4 \(or 1, 2, 3\), got None"),
        (b'{"schema_version": 0}', r"expected schema_version 4 \(or 1, 2, 3\), got 0; export the policy with this"),
        (b'{"schema_version": 5}', r"expected schema_version 4 \(or 1, 2, 3\), got 5; export the policy with this"),
        (b'{"schema_version": 1, "kind": "fixed"}', "expected settings, config, .*, got a record without"),
        (b'{"schema_version": 2, "kind": "fixed"}', "expected settings, config, .*, got a record without"),
    ],
)
def test_a_damaged_record_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "policy.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"policy.json: {message}"):
        PolicyCheckpoint.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(kind="magic"), "kind: expected one of fixed, percentile, learned, random, got 'magic'"),
        (lambda r: r.update(kind="oracle"), "kind: expected one of fixed, percentile, learned, random, got 'oracle'"),
        (
            lambda r: r.update(settings=3),
            r"settings: expected values by name \(block_tokens, .*\), got 3; correct it or export the policy again",
        ),
        (
            lambda r: r["settings"].update(speed=3),
            r"settings: expected names among block_tokens, .*, got \['speed'\]; leave out what is not or export",
        ),
        (
            lambda r: r["settings"].update(rungs=[1]),
            r"settings: expected names among block_tokens, .*, got \['rungs'\]",
        ),
        (
            lambda r: r["settings"]["chunk"].update(weights=[1, 1, 1, 1]),
            r"chunk.weights: expected values by name \(entropy, .*\), got \[1, 1, 1, 1\]",
        ),
        (lambda r: r["settings"]["chunk"].update(weights={"luck": 1}), "chunk.weights: expected names among"),
        (
            lambda r: r["settings"].update(fade_tokens=3),
            "fade_tokens: expected one of 1, 4, 8, 16, got 3",
        ),
        (
            lambda r: r.update(rungs=[4, 2]),
            r"rungs: expected a list of 1 to 1024, strictly ascending, .*, got \[4, 2\]",
        ),
        (lambda r: r["config"].update(depth=9), r"config: expected names among hidden, .*, got \['depth'\]"),
        (lambda r: r["config"].update(hidden=-1), r"config.hidden: expected a whole number in \[1, 8192\], got -1"),
        (lambda r: r["config"].update(signals=[]), r"config.signals: expected a list of some of entropy, .*, got \[\]"),
        (lambda r: r["config"].update(signals="age"), "config.signals: expected a list of some of .*, got 'age'"),
        (
            lambda r: r["config"].update(signals=["prior", "prior"]),
            r"config.signals: expected a list of some of .*, each once, got \['prior', 'prior'\]",
        ),
        (
            lambda r: r["config"].update(signals=["entropy", "luck"]),
            r"config.signals: expected a list of some of .*, got \['entropy', 'luck'\]",
        ),
        (
            lambda r: r["config"].update(signals=[["entropy"]]),
            r"config.signals: expected a list of some of .*, got \[\['entropy'\]\]",
        ),
        (lambda r: r["config"].pop("signals"), "config.signals: expected a list of some of .*, got none; add it"),
        (
            lambda r: r["config"].update(vocabulary=-1),
            r"config.vocabulary: expected a whole number in \[0, 16777216\], got -1",
        ),
        (
            lambda r: r["config"].update(vocabulary=2**24 + 1),
            r"config.vocabulary: expected a whole number in \[0, 16777216\], got 16777217",
        ),
        (lambda r: r["curve"].update(knobs=[1, 2, 3]), "expected as many budgets as knobs"),
        (lambda r: r.update(curve=3), r"curve: expected values by name \(budgets, knobs\), got 3"),
        (lambda r: r.update(curve=None), "curve: expected a calibrated knob curve for a learned policy, got None"),
        (
            lambda r: [own.update(ms=[1]) for own in r["latency"]["buckets"]],
            "latency.ms: expected 4 latencies, one per rung, got",
        ),
        (
            lambda r: r["latency"]["buckets"][1].update(ms=[1]),
            r"latency.buckets: expected as many rungs in each, got \[4, 1\]; measure them together",
        ),
        (lambda r: r["latency"]["buckets"][1].update(device="cpu"), "latency.buckets: expected one device, got"),
        (lambda r: r["latency"]["buckets"].reverse(), r"latency.buckets: expected batches in strictly ascending order"),
        (lambda r: r["latency"]["buckets"][0].update(batch=None), "latency.buckets: expected batches in strictly"),
        (lambda r: r["latency"].update(batch=2), "latency.batch: expected one of 1, 32, got 2"),
        (lambda r: r["latency"]["buckets"][0].pop("ms"), r"latency.buckets\[0\].ms: expected a list .*, got none; add"),
        (lambda r: r.update(latency=dataclasses.asdict(TABLE)), "latency: expected names among buckets, batch, got"),
        (lambda r: r.update(cost=[0.5, 1]), r"cost: expected 4 ascending numbers in \[0, 1\] ending in 1, got"),
        (lambda r: r.update(cost=None), "cost: expected a list of 1 to 1024, ascending, .*, got None"),
        (lambda r: r.update(default_budget=2), r"default_budget: expected a number in \[0, 1\], got 2"),
        (lambda r: r["fingerprints"].pop("shared"), "fingerprints.shared: expected true or false, got none; add it"),
        (
            lambda r: r["fingerprints"].update(model=1),
            "fingerprints.model: expected text of 1 to 4096 characters, got 1",
        ),
        (lambda r: r.update(metrics=3), "metrics: expected a dict, got 3"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(folder: Path, change: Callable, message: str) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=f"policy.json: .*{message}") as caught:
        PolicyCheckpoint.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sign": 0}, "config.sign: expected one of 1, -1, got 0"),
        ({"sign": True}, "config.sign: expected one of 1, -1, got True"),
        ({"sign": -1.0}, "config.sign: expected one of 1, -1, got -1.0"),
        ({"of": "row"}, "config.of: expected one of chunk, token, got 'row'"),
        ({"of": ["token"]}, r"config.of: expected one of chunk, token, got \['token'\]"),
        ({"of": "token"}, "of: expected chunk: entropy is not known of a token before it is processed, got 'token'"),
        ({"signal": "age"}, "config.signal: expected one of entropy, .*, complexity, got 'age'"),
    ],
)
def test_a_wrong_value_of_a_percentile_policy_is_named_in_one_line(change: dict, message: str, tmp_path: Path) -> None:
    checkpoint("percentile").save(tmp_path / "policy")
    edit(tmp_path / "policy", lambda record: record["config"].update(change))
    with pytest.raises(ValueError, match=f"policy.json: {message}; correct it or export") as caught:
        PolicyCheckpoint.load(tmp_path / "policy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": 12}, r"tensor token_difficulty: expected \(12,\) torch.uint8, got \(11,\) torch.uint8"),
        ({"vocabulary": 0}, "tensor 'pair_difficulty': expected no such tensor, got one"),
        # Three statistics, validity and the first token's own value are 5 columns.
        ({"signals": ["prior"]}, r"tensor feature_mean: expected \(5,\) torch.float32, got \(33,\) torch.float32"),
    ],
)
def test_tensors_that_are_not_those_of_the_record_are_refused(folder: Path, change: dict, message: str) -> None:
    edit(folder, lambda record: record["config"].update(change))
    with pytest.raises(ValueError, match=f"policy.safetensors: {message}; export the policy again") as caught:
        PolicyCheckpoint.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_tensor_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"policy.safetensors: expected a whole safetensors file, got one that does not"
    ):
        PolicyCheckpoint.load(folder)


def test_a_flipped_bit_is_noticed(folder: Path) -> None:
    path = folder / "policy.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"policy.safetensors: expected the file policy.json was written with"):
        PolicyCheckpoint.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("cost"), r"tensor cost: expected \(4,\) torch.float32, got none"),
        (
            lambda s: s.update(cost=torch.ones(3)),
            r"tensor cost: expected \(4,\) torch.float32, got \(3,\) torch.float32",
        ),
        (lambda s: s.update(cost=torch.ones(4).half()), r"tensor cost: expected \(4,\) torch.float32, got .*float16"),
        (lambda s: s.update(cost=torch.full((4,), torch.nan)), "tensor cost: expected finite numbers, got NaN"),
        (lambda s: s.update(extra=torch.ones(1)), "tensor 'extra': expected no such tensor, got one"),
        (
            lambda s: s.update(token_difficulty=torch.ones(VOCABULARY)),
            r"tensor token_difficulty: expected \(11,\) torch.uint8, got \(11,\) torch.float32",
        ),
        (
            lambda s: s.update(token_difficulty=torch.ones(VOCABULARY, dtype=torch.int8)),
            r"tensor token_difficulty: expected \(11,\) torch.uint8, got \(11,\) torch.int8",
        ),
        (
            lambda s: s.update(pair_difficulty=torch.ones(9, dtype=torch.uint8)),
            r"tensor pair_difficulty: expected \(65536,\) torch.uint8, got \(9,\) torch.uint8",
        ),
        (lambda s: s.pop("pair_difficulty"), r"tensor pair_difficulty: expected \(65536,\) torch.uint8, got none"),
    ],
)
def test_a_wrong_tensor_is_named(folder: Path, change: Callable, message: str) -> None:
    replace_tensors(folder, change)
    with pytest.raises(ValueError, match=f"policy.safetensors: {message}"):
        PolicyCheckpoint.load(folder)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("fixed", "scales", [1.0, 1.0, 0.0, 1.0], "scales: expected positive finite numbers"),
        ("random", "scales", [1.0, 1.0, 1.0, 1.1], "scales: expected 1 at the top rung"),
        ("percentile", "scales", [1.0, -1.0, 1.0, 1.0], "scales: expected positive finite numbers"),
        ("percentile", "grid", list(range(101, 0, -1)), "grid: expected 101 ascending finite numbers"),
        ("learned", "cost", [0.5, 0.25, 0.5, 1.0], "cost: expected 4 ascending numbers"),
        ("learned", "feature_std", [0.0] * Summary.FEATURES, "feature_std: expected numbers above 0"),
        ("learned", "log_lambda_spread", 0.0, "log_lambda_spread: expected numbers above 0"),
        ("learned", "damage_unit", [1.0, -1.0, 1.0], "damage_unit: expected numbers above 0"),
        ("learned", "token_difficulty", [255] * VOCABULARY, "token_difficulty: expected codes up to 254"),
        ("learned", "pair_difficulty", [0] * (PAIRS - 1) + [255], "pair_difficulty: expected codes up to 254"),
    ],
)
def test_tensors_that_the_constructor_would_refuse_are_refused(
    kind: str, name: str, value: Any, message: str, tmp_path: Path
) -> None:
    checkpoint(kind).save(tmp_path / "policy")
    changed = checkpoint(kind)
    tensor = torch.tensor(value, dtype=changed.policy.get_buffer(name).dtype)
    replace_tensors(tmp_path / "policy", lambda state: state.update({name: tensor}))
    with pytest.raises(ValueError, match=f"policy.safetensors: tensor {message}.*, got .*; ") as caught:
        PolicyCheckpoint.load(tmp_path / "policy")
    assert "\n" not in str(caught.value)
    changed.policy.get_buffer(name).copy_(tensor)
    with pytest.raises(ValueError, match=f"policy: tensor {message}"):
        changed.save(tmp_path / "other")


def test_check_accepts_what_it_was_fitted_to() -> None:
    checkpoint().check(model="m-1", adapter="a-1", rungs=list(RUNGS), ladder="l-1")
    checkpoint().check(model="m-1", adapter="a-1", rungs=RUNGS)
    shared = checkpoint(fingerprints=PRINTS | {"shared": True})
    shared.check(model="m-1", adapter="another", rungs=RUNGS, ladder="another")


THE_FITS_LADDER = "pass the folder `ladder` that the fit wrote beside the policy as --adapter$"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "m-2"}, "model: expected fingerprint m-1, got m-2; load the base model the policy was fitted to"),
        ({"adapter": "a-2"}, "adapter: expected fingerprint a-1, got a-2; load the adapter the policy was fitted to"),
        ({"rungs": (2, 4)}, rf"rungs: expected \(2, 4, 8, 16\), got \(2, 4\); {THE_FITS_LADDER}"),
        ({"ladder": "l-2"}, f"ladder: expected fingerprint l-1, got l-2; {THE_FITS_LADDER}"),
        (
            {"adapter": "a-2", "rungs": (1, 2), "ladder": "l-2"},
            "adapter: expected fingerprint a-1, got a-2; load the adapter",
        ),
    ],
)
def test_check_refuses_anything_else(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint().check(**({"model": "m-1", "adapter": "a-1", "rungs": RUNGS} | changes))
    assert "\n" not in str(caught.value)


def test_budget_goes_through_the_curve() -> None:
    learned = checkpoint()
    cheap, dear = learned.policy.knob_range()
    assert learned.knob_for(0.55) == pytest.approx((cheap + dear) / 2)
    assert learned.knob_for() == learned.knob_for(0.4)
    assert learned.knob_for(0) == cheap
    narrow = checkpoint(curve=KnobCurve((0.2, 0.9), (cheap, 0.0)))
    assert narrow.knob_for(1.0) == dear, "the full budget is the top rung, whatever was calibrated"


@pytest.mark.parametrize(("budget", "rung"), [(0, 0), (0.125, 0), (0.2499, 0), (0.25, 1), (0.99, 2), (1.0, 3)])
def test_fixed_takes_the_dearest_rung_within_the_budget(budget: float, rung: int) -> None:
    assert checkpoint("fixed", curve=None).knob_for(budget) == rung


def test_fixed_reaches_a_cost_that_float32_rounded_up() -> None:
    cost = (torch.tensor([8, 24, 48, 96]) / 96).tolist()
    fixed = checkpoint("fixed", curve=None, cost=cost)
    assert [fixed.knob_for(rank / 96) for rank in (8, 24, 48, 96)] == [0, 1, 2, 3]


def test_latency_becomes_a_budget() -> None:
    fixed = checkpoint("fixed", curve=None)
    # Costs are shares of bytes here, so a rung's latency must come back as that rung, not as its share of time.
    assert [fixed.knob_for(latency_budget_ms=ms) for ms in (10.5, 11.0, 13.0, 14.0)] == [0, 1, 2, 3]
    timed = checkpoint(cost=TABLE.cost())
    assert timed.knob_for(latency_budget_ms=12.0) == timed.knob_for(0.5)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"budget": 0.5, "latency_budget_ms": 12.0}, "expected budget or latency_budget_ms, got budget=0.5 and"),
        (
            {"latency": None},
            {"latency_budget_ms": 12.0},
            "expected a policy with a latency table, got none; use budget",
        ),
        (
            {},
            {"latency_budget_ms": 99.0},
            "expected 10.500 to 14.000 ms, the reachable range on NVIDIA H200 at batch 1, got 99.0",
        ),
        ({}, {"budget": -0.1}, r"budget: expected a share of the full adapter's cost in \[0, 1\], got -0.1"),
        ({}, {"budget": float("nan")}, r"budget: expected a share of the full adapter's cost in \[0, 1\], got nan"),
        (
            {"latency": LatencyTables((dataclasses.replace(TABLE, spread_ms=2.0),))},
            {"latency_budget_ms": 12.0},
            "expected rungs that differ by more than noise on NVIDIA H200, got",
        ),
        (
            {"latency": LatencyTables((dataclasses.replace(ALONE, spread_ms=2.0),), 1)},
            {"latency_budget_ms": 12.0},
            "expected rungs that differ by more than noise on NVIDIA H200 at batch 1, got",
        ),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(changes: dict, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint(**changes).knob_for(**arguments)


@pytest.mark.parametrize(
    ("chosen", "rows", "latency_ms"),
    [(1, None, 13.0), (32, None, 28.0), (1, 1, 13.0), (32, 1, 13.0), (1, 17, 28.0), (1, 32, 28.0)],
)
def test_milliseconds_are_those_of_the_bucket_that_the_rows_decode_in(chosen: int, rows: int | None, latency_ms: float):
    """Rung 2 takes 13 ms alone and 28 ms in a batch of 32, and either means the bytes of rung 2."""
    saved = checkpoint(latency=dataclasses.replace(TABLES, batch=chosen))
    assert saved.budget_for(latency_budget_ms=latency_ms, rows=rows) == COST[2]
    with pytest.raises(ValueError, match=r"expected (10.500 to 14|22.000 to 30).000 ms, the reachable range"):
        saved.budget_for(latency_budget_ms=41.0 - latency_ms, rows=rows)


@pytest.mark.parametrize("rows", [2, 16, 33])
def test_a_bucket_that_was_not_measured_is_refused(rows: int) -> None:
    message = (
        rf"latency_budget_ms: expected a batch in a bucket that was measured \(1, 32\), got {rows} rows; use budget"
    )
    with pytest.raises(ValueError, match=message):
        checkpoint().budget_for(latency_budget_ms=13.0, rows=rows)
    assert checkpoint(latency=REFERENCE).budget_for(latency_budget_ms=13.0, rows=rows) == COST[2], (
        "of any batch, as ever"
    )


def test_the_rung_of_a_budget_is_the_dearest_within_it():
    saved = checkpoint()
    assert [saved.rung_for(c) for c in saved.cost] == list(range(len(saved.cost)))
    assert saved.rung_for(0.0) == 0, "the cheapest when none is within"
    assert saved.rung_for((saved.cost[1] + saved.cost[2]) / 2) == 1


def test_rows_of_every_budget_start_within_it_and_only_the_whole_one_keeps_full_pages() -> None:
    saved = checkpoint()
    budgets, adapters = [0.125, 0.3, 1.0, 0.5], [0, 1, 1, 0]
    rows = saved.operating(budgets, adapters)
    assert rows.knob.tolist() == pytest.approx([saved.knob_for(budget) for budget in budgets])
    assert rows.start_rung.tolist() == [0, 1, 3, 2]
    assert rows.adapter.tolist() == adapters
    names = [(PAGE_ACTIONS[hard], PAGE_ACTIONS[easy]) for hard, easy in zip(rows.kv.hard, rows.kv.easy, strict=True)]
    own = (SETTINGS.kv.hard, SETTINGS.kv.easy)
    assert names == [own, own, (FULL_KV.hard, FULL_KV.easy), own]


def test_a_shared_policy_serves_other_ranks_at_the_same_shares() -> None:
    shared = checkpoint(fingerprints=PRINTS | {"shared": True})
    assert shared.rungs_for(16) == RUNGS
    assert shared.rungs_for(64) == (8, 16, 32, 64)
    shared.check(model="m-1", adapter="another", rungs=(8, 16, 32, 64))
    assert shared.rungs_for(12) == (1.5, 3, 6, 12)
    shared.check(model="m-1", adapter="another", rungs=(1.5, 3, 6, 12))
    with pytest.raises(ValueError, match=r"rungs: expected \(2, 4, 8, 16\), got \(8, 32, 48, 64\)"):
        shared.check(model="m-1", adapter="another", rungs=(8, 32, 48, 64))
    assert checkpoint().rungs_for(64) == RUNGS, "one adapter's own rungs stay what they are"


def test_shares_are_the_same_but_for_rounding() -> None:
    """Thirds of a rank have no float; neither has what a user writes of them."""
    shared = checkpoint(
        "fixed", policy=FixedPolicy((1, 2, 3)), curve=None, cost=(1 / 3, 2 / 3, 1), latency=None,
        fingerprints=PRINTS | {"shared": True},
    )  # fmt: skip
    assert shared.rungs_for(8) == (8 / 3, 16 / 3, 8)
    for rungs in ((8 / 3, 16 / 3, 8), (2.666667, 5.333333, 8), (10 / 3, 20 / 3, 10)):
        shared.check(model="m-1", adapter="another", rungs=rungs)
    for rungs in ((2.6667, 5.3334, 8), (8 / 3, 8), (3, 5, 8)):
        with pytest.raises(ValueError, match=r"rungs: expected \(1, 2, 3\), got "):
            shared.check(model="m-1", adapter="another", rungs=rungs)


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


def summary_of(rows: int) -> Summary:
    generator = torch.Generator().manual_seed(1)
    return Summary(
        torch.rand(rows, len(SIGNALS), 3, generator=generator),
        torch.rand(rows, len(SIGNALS), generator=generator) < 0.8,
        torch.rand(rows, len(TOKEN_SIGNALS), generator=generator), torch.arange(rows),
        age=torch.rand(rows, generator=generator),
    )  # fmt: skip


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
    assert loaded.settings == SETTINGS
    assert loaded.latency == REFERENCE
    assert loaded.policy.config() == saved.policy.config()
    assert_decide_alike(saved.policy, loaded.policy)


def test_schema_1_whose_parts_disagree_is_refused(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "policy")
    edit(tmp_path / "policy", lambda r: r.update(schema_version=1))
    with pytest.raises(ValueError, match=r"policy\.json: schema 1: .* or export the policy again"):
        PolicyCheckpoint.load(tmp_path / "policy")

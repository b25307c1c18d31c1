"""Policies of schemas 1 to 4: `schema1/` to `schema4/` are some as they were exported, decided once more by plain
arithmetic; of schema 3 what changed is its table of latency, of schema 4 that its prompts had no block of their own.

Nothing of `policy` computes the expected values: the files' own tensors do, in float64, on features laid out in the
order of their schema, which is written down here and nowhere read from the code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from policy import SIGNALS, TOKEN_SIGNALS, PolicyCheckpoint, Settings, Summary

HERE = Path(__file__).parent
EXPORTED = {1: HERE / "schema1", 2: HERE / "schema2" / "learned"}
PERCENTILE = HERE / "schema2" / "percentile"
TIMED = HERE / "schema3"
BLOCKS = HERE / "schema4"
OLD_SIGNALS = {1: ("entropy", "novelty", "attention", "prior"), 2: ("entropy", "attention", "novelty", "prior")}
OLD_FIRST = ("novelty", "prior")
ROWS = 2000


@pytest.fixture(scope="module")
def signals() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By signal: mean, max and last value [ROWS, 3], and whether they are known [ROWS]."""
    rng = np.random.default_rng(0)
    return {name: (rng.random((ROWS, 3)), rng.random(ROWS) < 0.7) for name in sorted(OLD_SIGNALS[1])}


@pytest.fixture(scope="module")
def first() -> np.ndarray:
    return np.random.default_rng(1).random((ROWS, len(OLD_FIRST)))


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "policy.json").read_text())


def write(folder: Path, record: dict[str, Any]) -> None:
    (folder / "policy.json").write_text(json.dumps(record))


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {k: v.double().numpy() for k, v in safetensors.torch.load_file(folder / "policy.safetensors").items()}


def knobs(low: float, high: float) -> np.ndarray:
    return np.random.default_rng(2).uniform(low, high, ROWS)


def decided(folder: Path, signals: dict, first: np.ndarray, knob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rung index and scale of every row by the formulas of the learned policy, in float64."""
    w, record = tensors(folder), read(folder)
    order, config = OLD_SIGNALS[record["schema_version"]], record["config"]
    low = config["log_lambda_range"][0]
    statistics = [np.where(signals[name][1][:, None], signals[name][0], 0) for name in order]
    known = [signals[name][1][:, None] for name in order]
    features = np.concatenate([*statistics, *known, first], 1)
    seen = (features - w["feature_mean"]) / w["feature_std"]
    price = (knob - w["log_lambda_centre"]) / w["log_lambda_spread"]
    x = np.concatenate([seen, price[:, None]], 1)
    for layer in ("trunk.0", "trunk.2"):
        x = x @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
        x = x / (1 + np.exp(-x))
    heads = {name: x @ w[f"{name}_head.weight"].T + w[f"{name}_head.bias"] for name in ("damage", "scale")}
    growth = 6 * np.tanh(heads["damage"] / 6)
    steps = w["damage_unit"] * np.exp(growth) + 2 * np.exp(low) * np.diff(w["cost"])
    damage = np.concatenate([np.cumsum(steps[:, ::-1], 1)[:, ::-1], np.zeros((len(x), 1))], 1)
    # The temperature divides everything alike and cannot change which rung is best.
    rung = (damage * np.exp(-knob)[:, None] + w["cost"]).argmin(1)
    scale = np.concatenate([1 + config["scale_range"] * np.tanh(heads["scale"]), np.ones((len(x), 1))], 1)
    return rung, scale[np.arange(len(x)), rung]


def decided_by_percentile(folder: Path, signals: dict, knob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of the percentile policy, whose grid rises throughout."""
    w, record = tensors(folder), read(folder)
    config = record["config"]
    weight = np.stack([config["weights"][name] * signals[name][1] for name in OLD_SIGNALS[2]])
    mean = np.stack([signals[name][0][:, 0] for name in OLD_SIGNALS[2]])
    total = weight.sum(0)
    value = (weight * mean).sum(0) / np.where(total > 0, total, 1)
    percentile = np.where(total > 0, np.interp(value, w["grid"], np.linspace(0, 1, len(w["grid"]))), 0.5)
    band = knob + config["spread"] * (2 * percentile - 1)
    rung = band.clip(0, len(record["rungs"]) - 1).round().astype(int)
    return rung, w["scales"][rung]


def summary_of(signals: dict, first: np.ndarray) -> Summary:
    """What schema 3 hands over: the signals of old in their places, and all that came later."""
    rng = np.random.default_rng(3)
    stats, valid = rng.random((ROWS, len(SIGNALS), 3)), rng.random((ROWS, len(SIGNALS))) < 0.7
    for name, (values, known) in signals.items():
        stats[:, SIGNALS.index(name)], valid[:, SIGNALS.index(name)] = values, known
    firsts = rng.random((ROWS, len(TOKEN_SIGNALS)))
    firsts[:, [TOKEN_SIGNALS.index(name) for name in OLD_FIRST]] = first
    stats, firsts, age = (torch.from_numpy(values).float() for values in (stats, firsts, rng.random(ROWS)))
    return Summary(stats, torch.from_numpy(valid), firsts, torch.arange(ROWS), age=age)


def as_schema_2(folder: Path) -> None:
    """Say that the file is of the next schema and leave its tensors as they are: what a reader must not do."""
    record = read(folder)
    record["schema_version"] = 2
    record["settings"].pop("rungs")
    record["settings"].pop("start_rung")
    record["settings"]["chunk"]["weights"] = dict.fromkeys(OLD_SIGNALS[1], 1.0)
    write(folder, record)


@pytest.mark.parametrize("schema", EXPORTED)
def test_an_exported_policy_decides_as_it_did(schema, signals, first) -> None:
    folder = EXPORTED[schema]
    knob = knobs(*read(folder)["config"]["log_lambda_range"])
    rung, scale = decided(folder, signals, first, knob)
    decision = PolicyCheckpoint.load(folder).policy.decide(summary_of(signals, first), torch.from_numpy(knob).float())
    assert len(np.unique(rung)) > 2, "the comparison needs rungs that differ"
    assert decision.rung.tolist() == rung.tolist()
    # float32 against float64, numbers of size 1
    np.testing.assert_allclose(decision.scale.numpy(), scale, rtol=0, atol=1e-5)


def test_the_order_of_the_features_matters(signals, first, tmp_path) -> None:
    knob = knobs(*read(EXPORTED[1])["config"]["log_lambda_range"])
    rung, _ = decided(EXPORTED[1], signals, first, knob)
    other = shutil.copytree(EXPORTED[1], tmp_path / "policy")
    as_schema_2(other)
    confused = PolicyCheckpoint.load(other).policy.decide(summary_of(signals, first), torch.from_numpy(knob).float())
    assert (confused.rung.numpy() != rung).mean() > 0.01


def test_an_exported_percentile_policy_decides_as_it_did(signals, first) -> None:
    knob = knobs(0, 3)
    rung, scale = decided_by_percentile(PERCENTILE, signals, knob)
    policy = PolicyCheckpoint.load(PERCENTILE).policy
    decision = policy.decide(summary_of(signals, first), torch.from_numpy(knob).float())
    assert len(np.unique(rung)) > 2, "the comparison needs rungs that differ"
    assert decision.rung.tolist() == rung.tolist()
    np.testing.assert_allclose(decision.scale.numpy(), scale, rtol=0, atol=1e-7)


OF_OLD = {"1": EXPORTED[1], "2": EXPORTED[2], "2 percentile": PERCENTILE, "3": TIMED, "4": BLOCKS}


@pytest.mark.parametrize("folder", OF_OLD.values(), ids=OF_OLD)
def test_an_exported_policy_keeps_everything_else(folder) -> None:
    record = read(folder)
    loaded = PolicyCheckpoint.load(folder)
    assert list(loaded.policy.rungs) == record["rungs"]
    settings, old = loaded.settings.to_dict(), record["settings"]
    weights = old["chunk"]["weights"]
    if record["schema_version"] == 1:
        weights = dict(zip(OLD_SIGNALS[1], weights, strict=True))
    assert dict(settings["chunk"]["weights"]) == dict.fromkeys(SIGNALS, 0.0) | weights
    assert settings.keys() == old.keys() - {"rungs", "start_rung"} | {"prompt_tokens"}
    for name in ("block_tokens", "fade_tokens", "signals", "kv"):
        assert settings[name] == old[name]
    for name in ("min_tokens", "max_tokens", "smoothing", "hysteresis"):
        assert settings["chunk"][name] == old["chunk"][name]
    assert list(settings["chunk"]["thresholds"]) == old["chunk"]["thresholds"]
    assert list(loaded.cost) == record["cost"]
    assert list(loaded.curve.knobs) == record["curve"]["knobs"]
    assert loaded.fingerprints == record["fingerprints"]
    assert loaded.metrics == record["metrics"]
    assert loaded.policy.difficulty() is None


@pytest.mark.parametrize("schema", EXPORTED)
def test_a_policy_of_an_old_schema_saved_again_is_of_the_new_one_and_the_same(schema, signals, first, tmp_path) -> None:
    knob = knobs(*read(EXPORTED[schema])["config"]["log_lambda_range"])
    assert read(EXPORTED[schema])["schema_version"] == schema
    PolicyCheckpoint.load(EXPORTED[schema]).save(tmp_path / "policy")
    assert read(tmp_path / "policy")["schema_version"] == 5
    rung, _ = decided(EXPORTED[schema], signals, first, knob)
    again = PolicyCheckpoint.load(tmp_path / "policy").policy
    assert again.decide(summary_of(signals, first), torch.from_numpy(knob).float()).rung.tolist() == rung.tolist()


def test_the_latency_of_schema_3_is_of_one_row_of_the_reference_path(tmp_path) -> None:
    """And is served as it was, whatever the batch; saved again and read again too."""
    old = read(TIMED)["latency"]
    first = PolicyCheckpoint.load(TIMED)
    first.save(tmp_path / "policy")
    for loaded in (first, PolicyCheckpoint.load(tmp_path / "policy")):
        table = loaded.latency.for_rows(5)
        assert (table.device, list(table.ms), table.ms_base, table.spread_ms) == tuple(old.values())
        assert (table.batch, table.controller_ms, loaded.latency.batch) == (None, None, None)
        assert not loaded.latency.of_engine
        # rungs of 10.5, 11, 13 and 14 ms and of 1/8, 1/4, 1/2 and 1 of the bytes
        assert loaded.budget_for(latency_budget_ms=13.0) == loaded.budget_for(latency_budget_ms=13.0, rows=7) == 0.5
    assert read(tmp_path / "policy")["schema_version"] == 5


@pytest.mark.parametrize("folder", OF_OLD.values(), ids=OF_OLD)
def test_prompts_of_an_old_policy_go_in_the_blocks_that_they_went_in(folder, tmp_path) -> None:
    """In those of every other text, which are not what a new policy has by itself; saved again and read again too."""
    old = read(folder)["settings"]
    assert "prompt_tokens" not in old
    first = PolicyCheckpoint.load(folder)
    first.save(tmp_path / "policy")
    for loaded in (first, PolicyCheckpoint.load(tmp_path / "policy")):
        assert (loaded.settings.block_tokens, loaded.settings.prompt_tokens) == (old["block_tokens"],) * 2
    assert Settings().prompt_tokens not in (old["block_tokens"], Settings().block_tokens)


def test_a_block_of_prompts_that_somebody_wrote_into_an_old_policy_is_kept(tmp_path) -> None:
    folder = shutil.copytree(BLOCKS, tmp_path / "policy")
    record = read(folder)
    record["settings"]["prompt_tokens"] = 24
    write(folder, record)
    assert PolicyCheckpoint.load(folder).settings.prompt_tokens == 24


def test_the_latency_of_schema_4_is_what_it_was() -> None:
    """A step between schemas changes nothing that it does not know."""
    old, loaded = read(BLOCKS)["latency"], PolicyCheckpoint.load(BLOCKS).latency
    assert loaded.batch == old["batch"] == 1
    assert [{**asdict(own), "ms": list(own.ms)} for own in loaded.buckets] == old["buckets"]


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record["settings"].pop(name)


@pytest.mark.parametrize(
    ("schema", "change", "message"),
    [
        (1, drop("rungs"), "schema 1: settings.rungs: expected a list .*, got none; add it"),
        (1, drop("start_rung"), "schema 1: settings.start_rung: expected a whole number .*, got none; add it"),
        (
            1,
            lambda r: r["settings"].update(rungs=[2, 32]),
            r"schema 1: rungs: expected those of settings, \[2, 32\], got \[2, 4",
        ),
        (
            1,
            lambda r: r["settings"]["chunk"].update(weights=[1.0]),
            r"schema 1: chunk.weights: expected a list of 4, .*, got \[1.0\]",
        ),
        (3, lambda r: r.update(latency=3), "schema 3: latency: expected an object, got 3; correct it"),
        (3, lambda r: r["latency"].pop("ms"), r"latency.buckets\[0\].ms: expected a list .*, got none; add it"),
        (4, lambda r: r.update(settings=3), "schema 4: settings: expected an object, got 3; correct it"),
        (4, drop("block_tokens"), "settings.block_tokens: expected a whole number in .*, got none; add it"),
        (4, lambda r: r["settings"].update(block_tokens=0), "block_tokens: expected a whole number in .*, got 0"),
        (2, lambda r: r.update(config=3), "schema 2: config: expected an object, got 3; correct it"),
        (2, lambda r: r["config"].pop("hidden"), "config.hidden: expected a whole number .*, got none; add it"),
        (2, lambda r: r["config"].update(depth=9), r"config: expected names among hidden, .*, got \['depth'\]"),
        (
            2,
            lambda r: r["settings"]["chunk"].update(weights=[1.0] * 4),
            r"chunk.weights: expected values by name \(entropy, .*\), got \[1.0",
        ),
    ],
)
def test_a_damaged_record_is_one_line(schema: int, change: Callable, message: str, tmp_path: Path) -> None:
    folder = shutil.copytree({**EXPORTED, 3: TIMED, 4: BLOCKS}[schema], tmp_path / "policy")
    record = read(folder)
    change(record)
    write(folder, record)
    with pytest.raises(ValueError, match=f"policy.json: {message}") as caught:
        PolicyCheckpoint.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schema", EXPORTED)
def test_a_flipped_bit_is_noticed(schema: int, tmp_path: Path) -> None:
    folder = shutil.copytree(EXPORTED[schema], tmp_path / "policy")
    data = bytearray((folder / "policy.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "policy.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"expected the file policy\.json was written with, got another"):
        PolicyCheckpoint.load(folder)


@pytest.mark.parametrize("schema", EXPORTED)
def test_a_tensor_of_another_shape_is_named(schema: int, tmp_path: Path) -> None:
    folder = shutil.copytree(EXPORTED[schema], tmp_path / "policy")
    state = safetensors.torch.load_file(folder / "policy.safetensors")
    data = safetensors.torch.save(state | {"feature_mean": torch.zeros(20), "feature_std": torch.ones(20)})
    (folder / "policy.safetensors").write_bytes(data)
    write(folder, read(folder) | {"tensors_sha256": hashlib.sha256(data).hexdigest()})
    with pytest.raises(ValueError, match=r"policy\.safetensors: tensor feature_mean: expected \(18,\)"):
        PolicyCheckpoint.load(folder)

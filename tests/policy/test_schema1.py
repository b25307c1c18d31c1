"""Policies of schema 1: `schema1/` is one as it was exported, decided here once more by plain arithmetic.

Nothing of `policy` computes the expected values: the file's own tensors do, in float64, on features laid out in the
order of that schema, which is written down here and nowhere read from the code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from policy import SIGNALS, PolicyCheckpoint, Summary

EXPORTED = Path(__file__).parent / "schema1"
OLD_SIGNALS = ("entropy", "novelty", "attention", "prior")
ROWS = 2000


@pytest.fixture(scope="module")
def signals() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By signal: mean, max and last value [ROWS, 3], and whether they are known [ROWS]."""
    rng = np.random.default_rng(0)
    return {name: (rng.random((ROWS, 3)), rng.random(ROWS) < 0.7) for name in sorted(OLD_SIGNALS)}


@pytest.fixture(scope="module")
def first() -> np.ndarray:
    return np.random.default_rng(1).random((ROWS, 2))


@pytest.fixture(scope="module")
def knob() -> np.ndarray:
    low, high = json.loads((EXPORTED / "policy.json").read_text())["config"]["log_lambda_range"]
    return np.random.default_rng(2).uniform(low, high, ROWS)


def decided(folder: Path, signals: dict, first: np.ndarray, knob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rung index and scale of every row by the formulas of the learned policy, in float64."""
    w = {k: v.double().numpy() for k, v in safetensors.torch.load_file(folder / "policy.safetensors").items()}
    config = json.loads((folder / "policy.json").read_text())["config"]
    low = config["log_lambda_range"][0]
    statistics = [np.where(signals[name][1][:, None], signals[name][0], 0) for name in OLD_SIGNALS]
    known = [signals[name][1][:, None] for name in OLD_SIGNALS]
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


def summary_of(signals: dict, first: np.ndarray) -> Summary:
    stats = torch.stack([torch.from_numpy(signals[name][0]).float() for name in SIGNALS], 1)
    valid = torch.stack([torch.from_numpy(signals[name][1]) for name in SIGNALS], 1)
    return Summary(stats, valid, torch.from_numpy(first).float(), torch.arange(ROWS))


def as_schema_2(folder: Path) -> None:
    """Say that the file is of the present schema and leave its tensors as they are: what a reader must not do."""
    record = json.loads((folder / "policy.json").read_text())
    record["schema_version"] = 2
    record["settings"].pop("rungs")
    record["settings"].pop("start_rung")
    record["settings"]["chunk"]["weights"] = dict.fromkeys(OLD_SIGNALS, 1.0)
    (folder / "policy.json").write_text(json.dumps(record))


def test_an_exported_policy_decides_as_it_did(signals, first, knob, tmp_path) -> None:
    rung, scale = decided(EXPORTED, signals, first, knob)
    decision = PolicyCheckpoint.load(EXPORTED).policy.decide(summary_of(signals, first), torch.from_numpy(knob).float())
    assert len(np.unique(rung)) > 2, "the comparison needs rungs that differ"
    assert decision.rung.tolist() == rung.tolist()
    # float32 against float64, numbers of size 1
    np.testing.assert_allclose(decision.scale.numpy(), scale, rtol=0, atol=1e-5)

    other = shutil.copytree(EXPORTED, tmp_path / "policy")
    as_schema_2(other)
    confused = PolicyCheckpoint.load(other).policy.decide(summary_of(signals, first), torch.from_numpy(knob).float())
    assert (confused.rung.numpy() != rung).mean() > 0.01, "the order of the features must matter"


def test_an_exported_policy_keeps_everything_else() -> None:
    record = json.loads((EXPORTED / "policy.json").read_text())
    assert record["schema_version"] == 1
    loaded = PolicyCheckpoint.load(EXPORTED)
    assert list(loaded.policy.rungs) == record["rungs"]
    settings = loaded.settings.to_dict()
    assert dict(settings["chunk"]["weights"]) == dict.fromkeys(SIGNALS, 1.0)
    old = record["settings"]
    assert settings.keys() == old.keys() - {"rungs", "start_rung"}
    for name in ("block_tokens", "fade_tokens", "signals", "kv"):
        assert settings[name] == old[name]
    for name in ("min_tokens", "max_tokens", "smoothing", "hysteresis"):
        assert settings["chunk"][name] == old["chunk"][name]
    assert list(settings["chunk"]["thresholds"]) == old["chunk"]["thresholds"]
    assert list(loaded.cost) == record["cost"]
    assert list(loaded.curve.knobs) == record["curve"]["knobs"]
    assert loaded.fingerprints == record["fingerprints"]
    assert loaded.metrics == record["metrics"]


def test_a_policy_of_schema_1_saved_again_is_of_schema_2_and_the_same(signals, first, knob, tmp_path) -> None:
    PolicyCheckpoint.load(EXPORTED).save(tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["schema_version"] == 2
    rung, _ = decided(EXPORTED, signals, first, knob)
    again = PolicyCheckpoint.load(tmp_path / "policy").policy
    assert again.decide(summary_of(signals, first), torch.from_numpy(knob).float()).rung.tolist() == rung.tolist()


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record["settings"].pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("rungs"), "schema 1: settings.rungs: expected a list .*, got none; add it"),
        (drop("start_rung"), "schema 1: settings.start_rung: expected a whole number .*, got none; add it"),
        (
            lambda r: r["settings"].update(rungs=[2, 32]),
            r"schema 1: rungs: expected those of settings, \[2, 32\], got \[2, 4",
        ),
        (
            lambda r: r["settings"]["chunk"].update(weights=[1.0]),
            r"schema 1: chunk.weights: expected a list of 4, .*, got \[1.0\]",
        ),
    ],
)
def test_a_damaged_record_is_one_line(change: Callable, message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(EXPORTED, tmp_path / "policy")
    record = json.loads((folder / "policy.json").read_text())
    change(record)
    (folder / "policy.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as caught:
        PolicyCheckpoint.load(folder)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder = shutil.copytree(EXPORTED, tmp_path / "policy")
    data = bytearray((folder / "policy.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "policy.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"expected the file policy\.json was written with, got another"):
        PolicyCheckpoint.load(folder)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(EXPORTED, tmp_path / "policy")
    state = safetensors.torch.load_file(folder / "policy.safetensors")
    data = safetensors.torch.save(state | {"feature_mean": torch.zeros(20), "feature_std": torch.ones(20)})
    (folder / "policy.safetensors").write_bytes(data)
    record = json.loads((folder / "policy.json").read_text())
    record["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "policy.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"policy\.safetensors: tensor feature_mean: expected \(18,\)"):
        PolicyCheckpoint.load(folder)

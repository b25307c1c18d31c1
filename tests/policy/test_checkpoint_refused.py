"""Files of a policy of which anything is wrong, and a policy for something else: refused in one line that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from policy import (
    PolicyCheckpoint,
    Summary,
)
from policy.difficulty import PAIRS
from tests.policy.checkpoints import (
    PRINTS,
    RUNGS,
    TABLE,
    VOCABULARY,
    checkpoint,
    edit,
    replace_tensors,
)


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
        (b"{}", r"expected schema_version 5 \(or 1, 2, 3, 4\), got None"),
        (b'{"schema_version": 0}', r"expected schema_version 5 \(or 1, 2, 3, 4\), got 0; export the policy with this"),
        (b'{"schema_version": 6}', r"expected schema_version 5 \(or 1, 2, 3, 4\), got 6; export the policy with this"),
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

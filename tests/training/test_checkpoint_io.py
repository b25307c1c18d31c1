"""Lightning checkpoints without pickle: all of it comes back, nothing runs on load, training goes on bit for bit."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from policy import LearnedPolicy
from tests.training.synthetic import RANKS, RUNGS, SCALES, chunk_samples
from training.learn.checkpoint_io import TENSORS, TREE, SafetensorsCheckpointIO, latest
from training.learn.module import PolicyFit, loader

IO = SafetensorsCheckpointIO()


def same(left, right) -> bool:
    """Equal values of equal types, all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def test_everything_comes_back_as_it_was(tmp_path):
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8)
    checkpoint = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 1: {}},
        "groups": [{"betas": (0.9, 0.999), "params": [0, 1], "lr": 1e-3, "fused": None}],
        "dtypes": [torch.ones(2).to(dtype) for dtype in dtypes],
        "empty": torch.zeros(0, 4),
        "view": torch.arange(12).view(3, 4).T,
        "dots.in.key": {"a.b": 1, ("tuple", 2): "key"},
        "nothing": None,
        "flag": True,
        "text": "λ",
    }
    IO.save_checkpoint(checkpoint, tmp_path / "last")
    assert same(IO.load_checkpoint(tmp_path / "last"), checkpoint)


def test_keys_that_join_to_the_same_name_keep_their_own_tensors(tmp_path):
    checkpoint = {"a.b": {"c": torch.tensor(1)}, "a": {"b.c": torch.tensor(2), "b": {"c": torch.tensor(3)}}}
    IO.save_checkpoint(checkpoint, tmp_path / "last")
    assert same(IO.load_checkpoint(tmp_path / "last"), checkpoint)


def test_tensors_that_share_memory_come_back(tmp_path):
    weight = torch.randn(3)
    checkpoint = {"tied": weight, "again": weight, "part": weight[:2]}
    IO.save_checkpoint(checkpoint, tmp_path / "last")
    assert same(IO.load_checkpoint(tmp_path / "last"), checkpoint)


@pytest.mark.parametrize("value", [object(), {1, 2}, print, torch.float32])
def test_what_is_no_plain_data_is_refused_by_name_and_nothing_is_written(value, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.callbacks\.0: expected tensors and plain data"):
        IO.save_checkpoint({"callbacks": [value]}, tmp_path / "last")
    assert list(tmp_path.iterdir()) == []


def test_files_hold_no_pickle(tmp_path):
    IO.save_checkpoint({"state": {0: torch.ones(2)}, "epoch": 1}, tmp_path / "last")
    assert {path.name for path in (tmp_path / "last").iterdir()} == {TENSORS, TREE}
    json.loads((tmp_path / "last" / TREE).read_text())
    for path in (tmp_path / "last").iterdir():
        head = path.read_bytes()[:2]
        assert head != b"PK", "a zip archive, which is how torch pickles"
        assert head[:1] != b"\x80", "a pickle"


def test_saving_again_replaces_and_leaves_nothing_beside(tmp_path):
    for epoch in (1, 2):
        IO.save_checkpoint({"epoch": epoch}, tmp_path / "last")
    assert IO.load_checkpoint(tmp_path / "last") == {"epoch": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_damaged_or_missing_checkpoint_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected checkpoint\.safetensors and checkpoint\.json"):
        IO.load_checkpoint(tmp_path / "last")
    assert latest(tmp_path) is None
    IO.save_checkpoint({"weight": torch.ones(8)}, tmp_path / "last")
    assert latest(tmp_path) == tmp_path / "last"
    data = (tmp_path / "last" / TENSORS).read_bytes()
    (tmp_path / "last" / TENSORS).write_bytes(data[:-4])
    with pytest.raises(ValueError, match="expected whole files") as caught:
        IO.load_checkpoint(tmp_path / "last")
    assert "\n" not in str(caught.value)


@pytest.fixture
def train(tmp_path, make_trainer):
    """`train(epochs, resume=None)`: the policy after training on synthetic chunks, checkpoints under tmp_path."""
    samples, held_out = (chunk_samples(torch.maximum, count, seed=count) for count in (96, 40))

    def run(epochs: int, resume=None):
        torch.manual_seed(0)
        policy = LearnedPolicy(RUNGS, hidden=8, log_lambda_range=(-6.0, 2.0))
        policy.calibrate(samples.features, samples.damage[..., 0])
        module = PolicyFit(policy.train(), SCALES, RANKS, torch.ones(len(RANKS)), learning_rate=3e-3, seed=5)
        keep = ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)
        keep.FILE_EXTENSION = ""
        trainer = make_trainer(max_epochs=epochs, callbacks=[keep], plugins=[IO], enable_checkpointing=True)
        torch.manual_seed(epochs)  # what stands in the global generator must not matter
        trainer.fit(module, loader(samples, 32, seed=1), loader(held_out, 32), ckpt_path=resume)
        return policy.state_dict()

    return run


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(train, tmp_path):
    whole = train(6)
    IO.remove_checkpoint(tmp_path / "last")
    halfway = train(3)
    resumed = train(6, resume=latest(tmp_path))
    assert not same(dict(halfway), dict(whole))
    assert same(dict(resumed), dict(whole))

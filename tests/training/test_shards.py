"""Collected targets on disk: whole or missing, checked when read, and the same for any world size."""

import functools
import os

import pytest
import torch

from training.targets.collect import collect_shards
from training.targets.shards import ShardStore

KEY = {"model": "abc", "documents": 7}


def tensors(index: int) -> dict[str, torch.Tensor]:
    return {"table.0": torch.full((3, 2), float(index)), "table.1": torch.arange(index + 1)}


@pytest.fixture
def store(tmp_path):
    return ShardStore(tmp_path, "tables", KEY, 5)


def test_what_was_written_is_read_back_and_no_longer_missing(store):
    assert store.missing() == [0, 1, 2, 3, 4]
    store.write(2, tensors(2))
    assert store.missing() == [0, 1, 3, 4]
    for name, expected in tensors(2).items():
        torch.testing.assert_close(store.read(2)[name], expected, rtol=0, atol=0)


def test_killed_between_data_and_checksum_means_missing(store, monkeypatch):
    replace, moved = os.replace, []

    def die_after_the_data(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_after_the_data)
    with pytest.raises(KeyboardInterrupt):
        store.write(0, tensors(0))
    monkeypatch.undo()
    assert moved[0].suffix == ".safetensors"
    assert store.missing() == [0, 1, 2, 3, 4]
    store.write(0, tensors(0))
    assert store.missing() == [1, 2, 3, 4]


def test_a_damaged_shard_is_refused_in_one_line(store):
    store.write(1, tensors(1))
    (path,) = store.folder.glob("shard-00001.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00001.*expected a whole shard.*got a damaged one; delete") as caught:
        store.read(1)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_refused(store):
    with pytest.raises(ValueError, match="expected a whole shard"):
        store.read(3)


def test_another_key_is_another_folder(store, tmp_path):
    store.write(0, tensors(0))
    other = ShardStore(tmp_path, "tables", {**KEY, "documents": 8}, 5)
    assert other.folder != store.folder
    assert other.missing() == [0, 1, 2, 3, 4]
    assert ShardStore(tmp_path, "tables", dict(reversed(KEY.items())), 5).missing() == [1, 2, 3, 4]


def test_nothing_is_left_beside_the_shards(store):
    store.write(0, tensors(0))
    assert {path.name for path in store.folder.iterdir()} == {"key.json", "shard-00000.json", "shard-00000.safetensors"}


def test_collecting_makes_only_what_is_missing(store, make_trainer):
    made = []

    def collect(index):
        made.append(index)
        return tensors(index)

    store.write(3, tensors(3))
    model = tiny_model()
    assert collect_shards(store, collect, model, make_trainer) == 4
    assert made == [0, 1, 2, 4]
    assert collect_shards(store, collect, model, make_trainer) == 0


def tiny_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_do_not_depend_on_the_world_size(tmp_path, make_trainer):
    """One process, and two that share the work through gloo, leave the same bytes; one goes on where two stopped."""

    def collect(index):
        (tmp_path / f"made-{index}-by-{os.getpid()}").touch()
        return tensors(index)

    folders = []
    for world in (1, 2):
        store = ShardStore(tmp_path / str(world), "tables", KEY, 5)
        spread = {"devices": world, "strategy": "ddp_fork"} if world > 1 else {}
        collect_shards(store, collect, tiny_model(), functools.partial(make_trainer, **spread))
        assert store.missing() == []
        folders.append(store.folder)
    workers = {path.name.rsplit("-", 1)[1] for path in tmp_path.glob("made-*")}
    assert len(workers) == 3, "one process of its own and two forked ones"
    assert bytes_of(folders[0]) == bytes_of(folders[1])
    next(folders[1].glob("shard-00002.json")).unlink()
    assert collect_shards(store, collect, tiny_model(), make_trainer) == 1
    assert bytes_of(folders[0]) == bytes_of(folders[1])

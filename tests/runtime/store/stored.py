"""A ladder on disk: how two are compared, and how a saved one is changed behind its back."""

import hashlib
import json

import torch
from safetensors.torch import load, save

from runtime.ladder.store import RECORD, TENSORS


def parts(ladder):
    """Every tensor of a ladder by its name, the empty ones too."""
    return {
        f"{number}.{name}.{half}.{part}": tensor
        for number, bank in enumerate(ladder.banks)
        for name, own in bank.items()
        for half, rows in (("a", own.a), ("b", own.b))
        for part, tensor in rows.parts().items()
    }


def assert_same(found, ladder):
    for name in ("kind", "rungs", "bank_of", "scales", "adapter", "base_model", "resident", "quality", "fingerprint"):
        assert getattr(found, name) == getattr(ladder, name), name
    assert list(found.modules) == list(ladder.modules)
    assert torch.equal(found.edges, ladder.edges)
    own = parts(ladder)
    for name, tensor in parts(found).items():
        assert torch.equal(tensor, own[name]), name
        assert tensor.dtype == own[name].dtype or not tensor.numel(), name
    assert_same_tables(found.difficulty, ladder.difficulty)


def assert_same_tables(found, expected):
    assert (found is None) == (expected is None)
    if expected is not None:
        for own, table in ((found.token, expected.token), (found.pair, expected.pair)):
            assert own.dtype == torch.uint8
            assert torch.equal(own, table)


def damage_tensors(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)


def change(**fields):
    def edit(folder):
        record = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps({**record, **fields}))

    return edit


def rewritten(folder, change, record_change=lambda record: None):
    """Other tensors with a record that agrees with them in digest and fingerprint, as another program would write."""
    tensors = load((folder / TENSORS).read_bytes())
    change(tensors)
    data = save(tensors)
    (folder / TENSORS).write_bytes(data)
    record = json.loads((folder / RECORD).read_text())
    record_change(record)
    identity = {key: record[key] for key in ("kind", "rungs")}
    identity |= {"edges": tensors["edges"].tolist(), "adapter": record["fingerprints"]["adapter"]}
    if record["kind"] != "svd":
        identity |= {key: record[key] for key in ("bank_of", "scales")} | {"rows": record["fingerprints"]["directions"]}
    record["fingerprints"]["ladder"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    record["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / RECORD).write_text(json.dumps(record))


Q = "model.layers.0.self_attn.q_proj"


def edge(j, m, f, value):
    return lambda tensors: tensors["edges"].__setitem__((j, m, f), value)


def part(name, value):
    """`name` is bank, half and part; the module is Q."""
    bank, rest = name.split(".", 1)
    full = f"{bank}.{Q}.{rest}"
    return lambda tensors: tensors.update({full: value(tensors[full]).contiguous()})

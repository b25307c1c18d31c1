"""A ladder on disk: what is loaded is what was saved, whatever took an adapter takes it, damage is refused."""

import hashlib
import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save

from policy.difficulty import Difficulty
from runtime import adaptive, build_ladder, generate, load_adapter, load_ladder, open_ladder, save_ladder
from runtime.export.__main__ import main as export
from runtime.ladder import store
from runtime.ladder.formats import PARTS
from runtime.ladder.store import RECORD, TENSORS
from tests.runtime.coded import coded_ladder, two_bank_ladder
from tests.runtime.reference import drawn_tables

GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, "min_new_tokens": 12}
CODED_RUNGS = (0.5, 1, 2, 4)


@pytest.fixture(scope="module")
def adapter(llama_adapter):
    return load_adapter(llama_adapter)


@pytest.fixture(scope="module")
def ladder(adapter):
    return build_ladder(adapter, (0, 2, 4, 8))


@pytest.fixture(scope="module")
def coded(adapter):
    return coded_ladder(adapter, CODED_RUNGS)


@pytest.fixture(params=["svd", "coded", "two banks", "bf16"])
def any_ladder(request, adapter, ladder, coded):
    if request.param == "bf16":
        narrow = {n: replace(f, a=f.a.bfloat16(), b=f.b.bfloat16()) for n, f in adapter.modules.items()}
        return build_ladder(replace(adapter, modules=narrow), (2, 3))
    return {"svd": ladder, "coded": coded, "two banks": two_bank_ladder(adapter)}[request.param]


@pytest.fixture
def saved(ladder, tmp_path):
    return save_ladder(ladder, tmp_path / "ladder")


@pytest.fixture
def saved_coded(coded, tmp_path):
    return save_ladder(coded, tmp_path / "coded")


@pytest.fixture
def saved_tables(ladder, tmp_path):
    return save_ladder(replace(ladder, difficulty=drawn_tables(0)), tmp_path / "tables")


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


def test_loaded_is_what_was_saved(any_ladder, tmp_path):
    quality = tuple(
        {"rung": r, "share": 0.1, "bytes": 12.0, "kl": -1e-12, "kl_se": None, "perplexity": 3.5}
        for r in any_ladder.rungs
    )
    ladder = replace(any_ladder, quality=quality)
    folder = save_ladder(ladder, tmp_path / "ladder", {"texts": ["a", "b"], "kind": "nobody's business"})
    assert_same(load_ladder(folder), ladder)
    assert_same(open_ladder(str(folder)), ladder)
    record = json.loads((folder / RECORD).read_text())
    assert record["bytes"] == ladder.rung_bytes().tolist()
    assert record["texts"] == ["a", "b"]
    assert record["kind"] == ladder.kind, "what a ladder says of itself cannot be said otherwise"


def test_tables_of_difficulty_go_wherever_their_ladder_goes(any_ladder, tmp_path):
    tables = drawn_tables(1, vocabulary=300)
    ladder = replace(any_ladder, difficulty=tables)
    folder = save_ladder(ladder, tmp_path / "ladder")
    lowest = ladder.rungs[0]
    found = [
        load_ladder(folder), load_ladder(folder, lowest), open_ladder(folder, (lowest,)),
        open_ladder(folder, (0,), resident_rung=0),
        load_ladder(save_ladder(load_ladder(folder, lowest), tmp_path / "again")), ladder.up_to(lowest),
        ladder.with_rungs((0,)), ladder.with_rungs((lowest,)).up_to(lowest),
    ]  # fmt: skip
    for own in found:
        assert_same_tables(own.difficulty, tables)
    names = load_file(folder / TENSORS).keys() - load_file(save_ladder(any_ladder, tmp_path / "plain") / TENSORS).keys()
    assert names == {"difficulty.token", "difficulty.pair"}


def test_tables_of_difficulty_are_no_part_of_the_fingerprint(any_ladder, tmp_path):
    prints = set()
    for number, tables in enumerate((None, drawn_tables(0), drawn_tables(1), Difficulty.neutral())):
        ladder = replace(any_ladder, difficulty=tables)
        folder = save_ladder(ladder, tmp_path / str(number))
        prints |= {
            ladder.fingerprint,
            load_ladder(folder).fingerprint,
            load_ladder(folder, ladder.rungs[0]).fingerprint,
        }
    assert len(prints) == 1


def test_tables_that_share_memory_are_written_each(ladder, tmp_path):
    codes = drawn_tables(0, 900).token
    for number, tables in enumerate((Difficulty(codes[:400], codes[100:500]), Difficulty(codes[100:500:2], codes))):
        found = load_ladder(save_ladder(replace(ladder, difficulty=tables), tmp_path / str(number)))
        assert_same_tables(found.difficulty, tables)


def test_it_is_loaded_as_far_up_as_asked_for(any_ladder, tmp_path):
    """Equal to what the whole one keeps of itself, with the fingerprint of the whole, and saved again as it is."""
    folder = save_ladder(any_ladder, tmp_path / "ladder")
    for rung in any_ladder.rungs:
        found = load_ladder(folder, rung)
        assert_same(found, any_ladder.up_to(rung))
        again = save_ladder(found, tmp_path / "again")
        assert_same(load_ladder(again), found)
        for lower in any_ladder.rungs[: found.highest + 1]:
            assert_same(load_ladder(again, lower), any_ladder.up_to(lower))
        if found.resident is not None:
            with pytest.raises(ValueError, match=rf"rung: expected at most the resident rung {rung}, got"):
                load_ladder(again, any_ladder.rungs[found.resident + 1])
            with pytest.raises(
                ValueError, match=r"rungs: expected .*, those of a ladder of which not all is in memory"
            ):
                open_ladder(again, (1, 2, 3))


def test_no_more_is_read_than_asked_for(saved_coded, coded, monkeypatch):
    read = []

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs).__enter__()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def get_tensor(self, name):
            assert name == "edges"
            return self.file.get_tensor(name)

        def get_slice(self, name):
            inner = self.file.get_slice(name)
            return type("Slice", (), {"__getitem__": lambda _, rows: read.append(inner[rows]) or read[-1]})()

    monkeypatch.setattr(store, "safe_open", Watched)
    for rung in coded.rungs:
        read.clear()
        held = load_ladder(saved_coded, rung)
        assert sum(x.nbytes for x in read) == sum(x.nbytes for x in parts(held).values())
    assert len(read) == len(load_file(saved_coded / TENSORS)) - 1


def test_the_rungs_and_the_memory_that_were_asked_for(saved, saved_coded, coded, ladder, llama_adapter):
    assert open_ladder(saved, (2, 6)).rungs == (2, 6, 8)
    held = open_ladder(saved, (3, 5), resident_rung=5)
    assert (held.rungs, held.resident) == ((3, 5, 8), 1)
    assert held.resident_bytes() == ladder.with_rungs((3, 5)).rung_bytes()[1]
    assert held.fingerprint == ladder.with_rungs((3, 5)).fingerprint
    held = open_ladder(saved_coded, (0, 0.5, 4), resident_rung=0.5)
    assert_same(held, coded.with_rungs((0, 0.5, 4)).up_to(0.5))
    assert open_ladder(llama_adapter, (1, 2), resident_rung=1).resident_bytes() == ladder.rung_bytes()[1] / 2
    assert open_ladder(coded, resident_rung=1).resident == 1
    assert open_ladder(coded) is coded
    assert open_ladder(coded.up_to(1), resident_rung=0.5).resident == 0
    for source in (saved_coded, coded):
        with pytest.raises(ValueError, match=r"^rung: expected one of \(0\.5, 1, 2, 4, 8\), got 3; "):
            open_ladder(source, resident_rung=3)


def test_no_factoring_when_loaded(saved, monkeypatch):
    monkeypatch.setattr("runtime.ladder.factors.svd_factors", lambda factors: 1 / 0)
    assert open_ladder(saved, (2, 6)).rungs == (2, 6, 8)
    assert open_ladder(str(saved)).rungs == (0, 2, 4, 8)


def test_everything_that_takes_an_adapter_takes_a_ladder(
    tiny_llama, llama_adapter, ladder, saved, tmp_path, monkeypatch
):
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    for asked in ({}, {"rung": 3}):
        outs = [generate(tiny_llama, source, ids, **asked, **GREEDY) for source in (llama_adapter, saved, ladder)]
        assert all(torch.equal(outs[0].sequences, out.sequences) for out in outs)
    with adaptive(tiny_llama, str(saved), rung=2):
        logits = tiny_llama(ids).logits
    folders = []
    for name, source in (("from-peft", llama_adapter), ("from-ladder", saved)):
        folders.append(tmp_path / name)
        monkeypatch.setattr(
            "sys.argv", ["export", "--adapter", str(source), "--rung", "2", "--output", str(folders[-1])]
        )
        export()
    exported = [load_adapter(folder) for folder in folders]
    for name, factors in exported[0].modules.items():
        assert torch.equal(factors.a, exported[1].modules[name].a)
    with adaptive(tiny_llama, folders[1]):
        torch.testing.assert_close(tiny_llama(ids).logits, logits, atol=1e-5, rtol=1e-5)


def test_a_coded_ladder_serves_the_same_saved_and_in_part(tiny_llama, coded, saved_coded):
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    for rung in coded.rungs:
        sources = (coded, saved_coded, str(saved_coded), load_ladder(saved_coded, rung), coded.up_to(rung))
        outs = [generate(tiny_llama, source, ids, rung=rung, **GREEDY).sequences for source in sources]
        assert all(torch.equal(outs[0], out) for out in outs)


def test_the_fingerprint_is_that_of_source_and_table(
    ladder, llama_adapter, make_peft_adapter, tiny_llama_factory, tmp_path
):
    assert build_ladder(load_adapter(llama_adapter), (0, 2, 4, 8)).fingerprint == ladder.fingerprint
    assert ladder.with_rungs((0, 2, 4)).fingerprint == ladder.fingerprint
    assert ladder.with_rungs((2, 4)).fingerprint != ladder.fingerprint
    other = make_peft_adapter(tiny_llama_factory, tmp_path / "other", seed=3)
    assert build_ladder(load_adapter(other), (0, 2, 4, 8)).fingerprint != ladder.fingerprint


def test_a_ladder_replaces_a_ladder_and_nothing_else(ladder, coded, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_same(load_ladder(save_ladder(ladder, tmp_path / "empty")), ladder)
    assert_same(load_ladder(save_ladder(coded, saved)), coded)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary").write_text("today")
    (tmp_path / "file").write_text("today")
    for path in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(FileExistsError, match=r"ladder: expected a new folder or an older ladder, got .*; choose"):
            save_ladder(ladder, path)
    assert (tmp_path / "mine" / "diary").read_text() == (tmp_path / "file").read_text() == "today"


def test_tensors_that_share_memory_are_written_each(adapter, tmp_path):
    """Views of one large tensor, and one bank used twice."""
    ladder = build_ladder(adapter, (2,))
    pool = torch.cat([own.a.wide for own in ladder.banks[0].values() if own.a.width == 64])
    views = iter(pool.split(8))
    bank = {
        name: replace(own, a=replace(own.a, wide=next(views))) if own.a.width == 64 else own
        for name, own in ladder.banks[0].items()
    }
    shared = replace(ladder, banks=(bank, bank))
    folder = save_ladder(shared, tmp_path / "ladder")
    assert_same(load_ladder(folder), shared)
    assert (folder / TENSORS).stat().st_size < 1.1 * 2 * sum(4 * 8 * (o.a.width + o.b.width) for o in bank.values())


def test_a_record_that_could_not_be_read_again_is_not_written(ladder, tmp_path):
    good = {"rung": 2, "share": 0.1, "bytes": 1.0, "kl": 0.1, "kl_se": 0.1, "perplexity": 2.0}
    for quality, message in (
        ({**good, "kl": math.nan}, r"quality\[0\]\.kl: expected a number"),
        ({**good, "extra": 1}, "quality.*: expected names among"),
        ({"rung": 2}, r"quality\[0\]\.share: expected .*, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            save_ladder(replace(ladder, quality=(quality,) * 4), tmp_path / "ladder")
    with pytest.raises(ValueError, match=r"extra: expected what JSON can say, got .*; correct it"):
        save_ladder(ladder, tmp_path / "ladder", {"loss": math.inf})
    assert not list(tmp_path.iterdir())


def test_the_file_is_written_from_any_device_and_layout(coded, tmp_path):
    turned = {
        name: replace(own, a=replace(own.a, scales=tuple(torch.stack([s, s], 1)[:, 0] for s in own.a.scales)))
        for name, own in coded.banks[0].items()
    }
    assert not next(iter(turned.values())).a.scales[0].is_contiguous()
    exact = {
        name: replace(own, b=replace(own.b, wide=own.b.wide.T.contiguous().T)) for name, own in coded.modules.items()
    }
    assert not next(iter(exact.values())).b.wide.is_contiguous()
    assert_same(load_ladder(save_ladder(replace(coded, banks=(turned, exact)), tmp_path / "l")), coded)


def damage_tensors(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)


def change(**fields):
    def edit(folder):
        record = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps({**record, **fields}))

    return edit


DAMAGE = {
    "another tensor file": (damage_tensors, "expected the file ladder.json was written with"),
    "half a tensor file": (
        lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:5000]),
        "expected a whole safetensors file",
    ),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "got no ladder.safetensors"),
    "no JSON": (lambda folder: (folder / RECORD).write_text("{"), "expected JSON"),
    "another schema": (change(schema_version=9), "schema_version: expected one of 1, 2, got 9"),
    "an older schema": (change(schema_version=1), "fingerprints: expected names among adapter, ladder, got"),
    "a module too many": (change(modules=["nowhere"]), "widths: expected 1 pairs, one for each module, got 14"),
    "another module": (change(modules=["nowhere"], widths=[[1, 1]]), r"tensor edges: expected \(4, 1, 4\) torch.int64"),
    "a module twice": (change(modules=["m", "m"]), r"modules: expected every name once, got \('m', 'm'\)"),
    "another kind": (
        change(kind="mixed"),
        "fingerprints.directions: expected none of svd, text of any other kind, got",
    ),
    "another coded kind": (
        change(kind="mixed", fingerprints={"adapter": "a", "ladder": "b", "directions": "c"}),
        "expected fingerprint b, got",
    ),
    "no kind": (change(kind="ladder"), "kind: expected one of svd, ranked, mixed, distilled, got 'ladder'"),
    "other rungs": (change(rungs=[0, 2, 5, 8]), "expected fingerprint"),
    "half a rung": (change(rungs=[0, 2, 4.5, 8]), "expected fingerprint"),
    "fewer rungs": (change(rungs=[0, 2, 8]), r"tensor edges: expected \(3, 14, 4\) torch.int64, got \(\(4, 14, 4\)"),
    "a huge rung": (change(rungs=[0, 2, 4, 10**12]), r"rungs\[3\]: expected a rank in"),
    "rungs that fall": (change(rungs=[4, 2, 0, 8]), "rungs: expected a list of .* strictly ascending"),
    "a bank without end": (change(bank_of=[0, 0, 0, 10**9]), r"bank_of\[3\]: expected a whole number in"),
    "a bank more": (change(bank_of=[0, 0, 1, 2]), "edges: expected at most the directions that module .* in bank 2"),
    "a scale": (change(scales=[1, 1.1, 1, 1]), "expected fingerprint"),
    "a scale of none": (change(scales=[1, 0, 1, 1]), r"scales\[1\]: expected a number in \(0"),
    "another width": (change(widths=[[64, 65]] * 14), r"tensor 0\..*\.wide: expected \[rows, "),
    "the top as resident": (change(resident=3), "resident: expected .* not the top's, got 3"),
    "a list": (lambda folder: (folder / RECORD).write_text("[]"), "expected a JSON object, got list"),
    "nested": (lambda folder: (folder / RECORD).write_text("[" * 100_000), "nested too deep"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused_in_one_line(saved, damage, message):
    damage(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_ladder(saved)
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value)


HOSTILE = [math.nan, math.inf, -1, 0, 1.5, True, None, "", "x", [], {}, [1], {"a": 1}, [None] * 2000, 1e308, 10**13]


@pytest.mark.parametrize("kind", ["svd", "coded"])
def test_any_value_in_the_place_of_any_other_is_right_or_refused_in_one_line(kind, ladder, coded, tmp_path):
    ladder = {"svd": ladder, "coded": coded}[kind]
    saved = save_ladder(ladder, tmp_path / "ladder")
    text = (saved / RECORD).read_text()
    record = json.loads(text)
    places = [(name,) for name in record] + [(name, 1) for name in ("rungs", "bank_of", "scales", "widths")]
    places += [("modules", 0), ("bytes", 0)] + [("fingerprints", name) for name in record["fingerprints"]]
    accepted = set()
    for place, value in product(places, HOSTILE):
        changed = json.loads(text)
        holder = changed if len(place) == 1 else changed[place[0]]
        if holder[place[-1]] == value and type(holder[place[-1]]) is type(value):
            continue
        holder[place[-1]] = value
        (saved / RECORD).write_text(json.dumps(changed))
        found = loaded_or_refused(saved)
        if isinstance(found, str):
            assert found.startswith(str(saved)), (place, value)
            assert "\n" not in found
            assert ", got " in found
            assert len(found) < 1000
        else:
            accepted.add((place[0], str(value)))
            assert found.base_model is None or isinstance(found.base_model, str)
            if place[0] != "resident":
                assert found.fingerprint == ladder.fingerprint
    # A name, a figure that nothing reads; and, of what is there, less.
    assert {name for name, _ in accepted} <= {"base_model", "bytes", "resident", "quality"}
    assert {value for name, value in accepted if name == "resident"} <= {"0"}
    assert {value for name, value in accepted if name == "quality"} <= {"[]"}


def loaded_or_refused(folder):
    try:
        return load_ladder(folder)
    except ValueError as error:
        return str(error)


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


WRONG_TENSORS = {
    "an edge beyond the module": (edge(2, 0, 3, 9), r"edges: expected at most the directions that module"),
    "an edge below 0": (edge(0, 0, 0, -1), "edges: expected counts that do not fall over formats"),
    "an edge that falls along formats": (edge(2, 0, 1, 3), "edges: expected counts that do not fall over formats"),
    "an edge that falls along rungs": (edge(1, 0, slice(None), 5), "edges: expected none to fall"),
    "fewer bits than are there": (edge(1, 0, 0, 1), "edges: expected at most the directions that module"),
    "a top rung that leaves something out": (
        edge(3, 0, slice(None), 7),
        "edges: expected a top rung that is the whole adapter",
    ),
    "a top rung in fewer bits": (edge(3, 0, 0, 7), "edges: expected"),
    "edges of another type": (
        lambda tensors: tensors.update(edges=tensors["edges"].float()),
        r"tensor edges: expected \(4, 14, 4\) torch.int64, got .*torch.float32",
    ),
    "a factor of other rows": (
        part("0.a.wide", lambda a: a[:3]),
        f"edges: expected at most .* module {Q} has in bank 0",
    ),
    "an exact factor of other rows": (
        part("1.b.wide", lambda b: b[:5]),
        f"edges: expected at most the directions that module {Q} has in bank 1",
    ),
    "a factor with an axis more": (
        part("1.b.wide", lambda b: b[None]),
        rf"tensor 1\.{Q}\.b\.wide: expected \[rows, 64\]",
    ),
    "a factor of another type": (
        part("0.a.wide", torch.Tensor.int),
        rf"tensor 0\.{Q}\.a\.wide: expected .* or torch.float64, got \[8, 64\] of torch.int32",
    ),
    "a factor of a type that there is not": (
        part("0.a.wide", lambda a: a.to(torch.float8_e5m2)),
        rf"tensor '0\.{Q}\.a\.wide': expected a dtype of PyTorch's, got F8_E5M2",
    ),
    "a factor that is not finite": (part("0.b.wide", lambda b: b * torch.inf), f"module {Q}: expected finite numbers"),
    "an exact factor that is not finite": (
        part("1.a.wide", lambda a: a * torch.nan),
        f"module {Q}: expected finite numbers",
    ),
    "a tensor too many": (lambda tensors: tensors.update(x=torch.ones(1)), "tensor 'x': expected none, got"),
    "a part that there is not": (
        lambda tensors: tensors.update({f"0.{Q}.a.plane3": torch.ones(1)}),
        rf"tensor '0\.{Q}\.a\.plane3': expected none, got",
    ),
    "a tensor too few": (lambda tensors: tensors.pop(f"0.{Q}.b.wide"), f"edges: expected at most .* module {Q} has"),
}


def table(name, value):
    return lambda tensors: tensors.update({f"difficulty.{name}": value(tensors[f"difficulty.{name}"]).contiguous()})


TABLES = r"expected some torch.uint8 codes, got "
WRONG_TABLES = {
    "codes of another type": (table("token", torch.Tensor.long), rf"tensor difficulty\.token: {TABLES}.*torch.int64"),
    "codes below 0": (table("pair", torch.Tensor.char), rf"tensor difficulty\.pair: {TABLES}.*torch.int8"),
    "codes of a type that there is not": (
        table("pair", lambda t: t.float().to(torch.float8_e5m2)),
        rf"tensor difficulty\.pair: {TABLES}.*F8_E5M2",
    ),
    "no code": (table("token", lambda t: t[:0]), rf"tensor difficulty\.token: {TABLES}\(\(0,\), torch.uint8\)"),
    "one code alone": (table("pair", lambda t: t[0]), rf"tensor difficulty\.pair: {TABLES}\(\(\), torch.uint8\)"),
    "a table with an axis more": (
        table("pair", lambda t: t[None]),
        rf"tensor difficulty\.pair: {TABLES}.*\(1, 65536\)",
    ),
    "no table of pairs": (lambda tensors: tensors.pop("difficulty.pair"), rf"tensor difficulty\.pair: {TABLES}None"),
    "no table of tokens": (lambda tensors: tensors.pop("difficulty.token"), rf"tensor difficulty\.token: {TABLES}None"),
    "a code beyond 1": (
        table("token", lambda t: t.index_fill(0, torch.tensor([7]), 255)),
        r"tensor difficulty\.token: expected codes up to 254, got 255",
    ),
    "a table of something else": (
        lambda tensors: tensors.update({"difficulty.triple": tensors["difficulty.pair"].clone()}),
        r"tensor 'difficulty\.triple': expected none, got one",
    ),
}
WRONG_CODED = {
    "a plane of other rows": (part("0.a.plane2", lambda x: x[:5]), rf"tensor 0\.{Q}\.a\.plane2: expected the 8 rows"),
    "a finer plane of other rows": (
        part("0.b.plane8", lambda x: x[:5]),
        rf"tensor 0\.{Q}\.b\.plane8: expected the 8 rows that have a scale at 8 bits",
    ),
    "a plane of another width": (
        part("0.a.plane4", lambda x: x[:, :-1]),
        rf"tensor 0\.{Q}\.a\.plane4: expected \[rows, 16\] of torch.uint8, got \[8, 15\]",
    ),
    "a plane of another type": (part("0.a.plane4", torch.Tensor.float), rf"tensor 0\.{Q}\.a\.plane4: expected .*uint8"),
    "a scale too few": (part("0.a.scale8", lambda x: x[:5]), f"edges: expected at most .* module {Q} has in bank 0"),
    "a scale too few of those that nobody reads": (
        part("0.a.scale2", lambda x: x[:7]),
        "expected directions of which .* is the sample, got",
    ),
    "a scale of another type": (
        part("0.a.scale2", torch.Tensor.float),
        rf"tensor 0\.{Q}\.a\.scale2: expected .*bfloat16",
    ),
    "a scale that is not finite": (part("0.b.scale8", lambda x: x * torch.inf), f"module {Q}: expected finite numbers"),
    "other scales": (part("0.b.scale8", lambda x: x * 2), "expected directions of which .* is the sample, got"),
}


@pytest.mark.parametrize(("damage", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_tensors_that_contradict_each_other_are_refused(saved, damage, message):
    assert_refused(saved, damage, message)


@pytest.mark.parametrize(("damage", "message"), WRONG_TABLES.values(), ids=WRONG_TABLES.keys())
def test_tables_that_are_none_are_refused(saved_tables, damage, message):
    assert_refused(saved_tables, damage, message)


@pytest.mark.parametrize(("damage", "message"), WRONG_CODED.values(), ids=WRONG_CODED.keys())
def test_coded_tensors_that_contradict_each_other_are_refused(saved_coded, damage, message):
    assert_refused(saved_coded, damage, message)


def assert_refused(folder, damage, message):
    rewritten(folder, lambda tensors: None)
    load_ladder(folder)
    rewritten(folder, damage)
    with pytest.raises(ValueError, match=rf"{TENSORS}: {message}") as error:
        load_ladder(folder)
    assert "\n" not in str(error.value)
    assert ", got " in str(error.value)
    assert str(error.value).endswith("again")


def test_a_file_cannot_hold_more_than_it_says(saved_coded, coded):
    """A ladder of fewer rungs over the same directions is right; what nobody reads is loaded and saved all the same."""

    def fewer(record):
        for name in ("rungs", "bank_of", "scales", "bytes"):
            record[name] = record[name][2:]

    rewritten(saved_coded, lambda tensors: tensors.update(edges=tensors["edges"][2:].contiguous()), fewer)
    assert_same(load_ladder(saved_coded), coded.with_rungs((2, 4)))


@pytest.fixture
def schema1(ladder, tmp_path):
    """A ladder as version 1 wrote it: float32 factors and singular values by module, the edges, a record."""
    folder = tmp_path / "old"
    folder.mkdir()
    tensors = {"edges": ladder.edges}
    for name, own in ladder.banks[0].items():
        a, b = own.read(0, 8, 16)
        tensors |= {f"{name}.a": a, f"{name}.b": b, f"{name}.singular_values": a.square().sum(1)}
    data = save(tensors, metadata={"format": "pt"})
    (folder / TENSORS).write_bytes(data)
    record = {
        "schema_version": 1, "kind": "svd", "rungs": ladder.rungs, "modules": list(ladder.modules),
        "bytes": ladder.rung_bytes().tolist(), "base_model": ladder.base_model,
        "fingerprints": {"adapter": ladder.adapter, "ladder": ladder.fingerprint},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return folder


def test_a_ladder_of_the_first_version_still_loads(schema1, ladder, tmp_path):
    found = load_ladder(schema1)
    assert (found.kind, found.rungs, found.fingerprint) == ("svd", ladder.rungs, ladder.fingerprint)
    assert torch.equal(found.edges, ladder.edges)
    for name, own in ladder.banks[0].items():
        for j in range(len(ladder.rungs)):
            rank = ladder.rungs[j]
            a, b = found.update(name, j)
            assert torch.equal(a, own.a.wide[:rank])
            assert torch.equal(b, own.b.wide[:rank])
    assert float(found.lost_energy()[-1]) == 0
    held = open_ladder(schema1, (2, 3), resident_rung=3)
    assert (held.rungs, held.resident, held.resident_bytes()) == ((2, 3, 8), 1, ladder.with_rungs((3,)).rung_bytes()[0])
    assert load_ladder(schema1, 4).resident == 2
    assert_same(load_ladder(save_ladder(found, tmp_path / "again")), found)


OLD_DAMAGE = {
    "another tensor file": (damage_tensors, "expected the file ladder.json was written with"),
    "other rungs": (change(rungs=[0, 2, 5, 8]), "expected fingerprint"),
    "fewer rungs": (change(rungs=[0, 2, 8]), r"edges: expected \(3, 14, 4\) torch.int64"),
    "another kind": (change(kind="mixed"), "kind: expected one of svd, got 'mixed'"),
    "a module twice": (change(modules=["m", "m"]), "modules: expected every name once"),
    "a module too many": (change(modules=["m"]), r"tensor 'm\.a': expected \[R, D\] of torch.float32, got none"),
    "no kind": (change(kind=None), "kind: expected"),
}
WRONG_OLD = {
    "a factor of another type": (
        lambda t: t.update({f"{Q}.a": t[f"{Q}.a"].half()}),
        rf"tensor '{Q}\.a': expected \[R, D\] of torch.float32, got \[8, 64\] of torch.float16",
    ),
    "a factor of fewer rows": (lambda t: t.update({f"{Q}.a": t[f"{Q}.a"][:5].clone()}), "edges: expected at most the"),
    "a factor that is not finite": (lambda t: t[f"{Q}.b"].fill_(math.nan), f"module {Q}: expected finite numbers"),
    "no edges": (lambda t: t.pop("edges"), "tensor edges: expected one, got none"),
    "edges of another type": (lambda t: t.update(edges=t["edges"].int()), r"edges: expected .*, got .* torch.int32"),
    "a top rung that leaves something out": (
        edge(3, 0, slice(None), 7),
        "edges: expected a top rung that is the whole",
    ),
}


@pytest.mark.parametrize(("damage", "message"), OLD_DAMAGE.values(), ids=OLD_DAMAGE.keys())
def test_damage_of_the_first_version_is_refused_in_one_line(schema1, damage, message):
    damage(schema1)
    with pytest.raises(ValueError, match=message) as error:
        load_ladder(schema1)
    assert "\n" not in str(error.value)
    assert str(schema1) in str(error.value)


@pytest.mark.parametrize(("damage", "message"), WRONG_OLD.values(), ids=WRONG_OLD.keys())
def test_tensors_of_the_first_version_that_contradict_each_other_are_refused(schema1, damage, message):
    tensors = load_file(schema1 / TENSORS)
    damage(tensors)
    data = save(tensors)
    (schema1 / TENSORS).write_bytes(data)
    change(tensors_sha256=hashlib.sha256(data).hexdigest())(schema1)
    with pytest.raises(ValueError, match=rf"{TENSORS}: {message}") as error:
        load_ladder(schema1)
    assert "\n" not in str(error.value)


def test_the_names_in_a_file_are_those_of_the_parts(saved_coded):
    names = {
        name.removeprefix(f"0.{Q}.a.") for name in load_file(saved_coded / TENSORS) if name.startswith(f"0.{Q}.a.")
    }
    assert names == set(PARTS) - {"wide"}

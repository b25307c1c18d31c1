"""`python -m training.ladder` as a user meets it: what it writes, looks at and refuses, and how it goes on."""

import json
from types import SimpleNamespace

import pytest
import torch

from runtime.ladder import load_ladder
from runtime.stop import Stopped
from training import ladder as command
from training.documents import load_corpus
from training.ladder import main
from training.ladders import distil as distillation
from training.ladders.distil import Distillation

RUNGS = "[0.5,1,2,4]"


def arguments(case, output, *more, **changes):
    """A command line that takes a second; a changed value of None leaves the flag out."""
    flags = {
        "model": case.model, "adapter": case.adapter, "dataset": case.dataset, "output": output, "kind": "mixed",
        "rungs": RUNGS, "steps": 2, "step_tokens": 128, "train_documents": 6, "validation_documents": 3,
        "test_documents": 4, "max_tokens": 64, "trainer.accelerator": "cpu",
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in {**flags, **changes}.items() if value is not None] + list(more)


class Tape:
    """Which documents each stage was handed, in order."""

    def __init__(self, patch):
        self.corpus, self.stages = None, []

        def corpus(*args, **kwargs):
            self.corpus = load_corpus(*args, **kwargs)
            return self.corpus

        patch.setattr(command, "load_corpus", corpus)
        for name, places in {
            "adapter_directions": [2], "calibrated": [2], "distil": [3, 4], "measure": [3], "compare": [4],
        }.items():  # fmt: skip
            patch.setattr(command, name, self.noting(name, getattr(command, name), places))

    def noting(self, name, original, places):
        def noted(*args, **kwargs):
            self.stages.append((name, [self.part_of(args[i]) for i in places]))
            return original(*args, **kwargs)

        return noted

    def part_of(self, documents):
        return next(n for n in ("train", "validation", "test") if documents is getattr(self.corpus, n))


def quality_is_whole(folder, kind, rungs):
    record, saved = json.loads((folder / "ladder.json").read_text()), load_ladder(folder)
    assert (saved.kind, saved.rungs) == (kind, rungs)
    assert [own["rung"] for own in record["quality"]] == list(rungs)
    assert [own["bytes"] for own in record["quality"]] == saved.rung_bytes().tolist() == record["bytes"]
    assert record["quality"][-1]["kl"] < 1e-6
    assert record["quality"][-1]["share"] == 1
    kls = [own["kl"] for own in record["quality"]]
    assert kls[0] > 3 * kls[-2] > 0
    assert all(own["perplexity"] > 1 and own["kl_se"] is not None for own in record["quality"])
    assert len(record["origin"]) == 16
    return saved


def test_a_mixed_ladder_is_written_with_what_every_rung_loses(case, tmp_path, capsys, monkeypatch):
    tape = Tape(monkeypatch)
    main(arguments(case, tmp_path / "out"))
    quality_is_whole(tmp_path / "out", "mixed", (0.5, 1, 2, 4, 8))
    assert tape.stages == [("adapter_directions", ["train"]), ("calibrated", ["train"]), ("measure", ["test"])]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing beside it"
    shown, errors = capsys.readouterr()
    assert errors == ""
    assert "6 train, 3 validation, 4 test documents; kind mixed" in shown
    assert "mixed ladder: KL is in nats per completion token" in shown


def test_a_distilled_ladder_trains_on_train_and_is_judged_on_validation(case, tmp_path, monkeypatch):
    tape = Tape(monkeypatch)
    main(arguments(case, tmp_path / "out", kind="distilled", rungs=None))
    quality_is_whole(tmp_path / "out", "distilled", (0.25, 0.5, 0.75, 1, 2, 3, 4, 8))
    assert tape.stages == [
        ("adapter_directions", ["train"]), ("calibrated", ["train"]), ("distil", ["train", "validation"]),
        ("measure", ["test"]),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("kind", "rungs"), [("svd", (2, 6, 8)), ("ranked", (2, 6, 8))])
def test_16_bit_ladders_may_have_rungs_above_a_half_and_be_compared(kind, rungs, case, tmp_path, monkeypatch, capsys):
    tape = Tape(monkeypatch)
    monkeypatch.setattr("training.ladders.compare.INTEGERS", (4,))
    monkeypatch.setattr("training.ladders.compare.LORAQUANT", ())
    main(arguments(case, tmp_path / "out", "--compare", kind=kind, rungs="[2,6]"))
    quality_is_whole(tmp_path / "out", kind, rungs)
    assert tape.stages[0] == ("adapter_directions", ["train"])
    assert tape.stages[-2:] == [("measure", ["test"]), ("compare", ["test"])]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"ladder.json", "ladder.safetensors", "compare.json", "ladder.png"}
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [own["name"] for own in record["ladders"]["mixed"]] == ["mixed 2"]
    assert [own["baseline"]["name"] for own in record["against"]] == ["int4", "convert_to_lora 2"]
    assert "convert_to_lora 2" in capsys.readouterr().out


def test_svd_alone_measures_no_effects(case, tmp_path, monkeypatch):
    tape = Tape(monkeypatch)
    main(arguments(case, tmp_path / "out", kind="svd", rungs="[2]"))
    assert tape.stages == [("measure", ["test"])]


def test_without_peft_the_comparison_says_so(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.ladders.compare.INTEGERS", (4,))
    monkeypatch.setattr("training.ladders.compare.LORAQUANT", ())

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(command, "importlib", SimpleNamespace(import_module=missing))
    main(arguments(case, tmp_path / "out", "--compare", rungs="[2]"))
    assert "[ladder] peft is not installed: its convert_to_lora is left out" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [own["baseline"]["name"] for own in record["against"]] == ["int4"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "tall"}, "kind: expected one of"),
        ({"steps": 0}, "steps: expected a whole number in [1, 1000000000], got 0"),
        ({"steps": "few"}, "steps: expected int, got few"),
        ({"step_tokens": 0}, "step_tokens: expected a whole number in [1, "),
        ({"learning_rate": 0}, "learning_rate: expected a number in (0, 1], got 0"),
        ({"max_tokens": 1}, "error: max_tokens: expected"),
        ({"test_documents": 0}, "error: test_documents: expected"),
        ({"dtype": "float8"}, "dtype: expected one of"),
        ({"rungs": "[1,5]"}, "rungs: expected at most half of the adapter"),
        ({"rungs": "[1,16]"}, "rungs: expected ranks up to the adapter's 8, got 16"),
        ({"rungs": "[-1]"}, "rungs[0]: expected a rank in [0, 65536], got -1"),
        ({"rungs": "[2,4]", "kind": "distilled"}, "rungs: expected one up to 1, an eighth of the adapter"),
        ({"rungs": "[1.5]", "kind": "svd"}, "rungs: expected whole ranks of an svd ladder"),
        ({"dataset": "/nowhere/text.jsonl"}, "/nowhere/text.jsonl"),
        ({"model": "/nowhere/model"}, "/nowhere/model"),
        ({"adapter": "/nowhere/adapter"}, "/nowhere/adapter"),
        ({"adapter": "other_adapter"}, "it is of another model"),
        ({"max_tokens": 513}, "max_tokens: expected at most the model's context of 512, got 513"),
        ({"trainer.devices": 0}, "trainer: `Trainer(devices='0')` value is not a valid input"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(change, says, case, tmp_path, capsys):
    change = {k: case.other_adapter if v == "other_adapter" else v for k, v in change.items()}
    with pytest.raises(SystemExit) as caught:
        main(arguments(case, tmp_path / "runs" / "out", **change))
    errors = capsys.readouterr().err
    assert caught.value.code == 2
    assert len(errors.strip().splitlines()) == 1, errors
    assert errors.startswith("error: ")
    assert says in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["", " ", ".", "a file", "a file/under", "a folder"])
def test_an_output_that_is_something_else_is_refused_before_anything_is_loaded(
    output, case, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / "thesis.tex").write_text("mine")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(arguments(case, output, model="/nowhere/model"))
    errors = capsys.readouterr().err
    assert caught.value.code == 2
    assert errors.startswith("error: output: expected a ")
    assert errors.count("\n") == 1
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"mine"}


def test_a_folder_that_ends_in_a_slash_is_the_same_folder_and_an_older_ladder_is_replaced(case, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    main(arguments(case, f"{output}/", rungs="[1]", kind="svd"))
    assert load_ladder(output).rungs == (1, 8)
    main(arguments(case, f"{output}/", rungs="[2]", kind="svd"))
    assert load_ladder(output).rungs == (2, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_older_ladder_stays_until_there_is_a_new_one(case, tmp_path, capsys):
    output = tmp_path / "out"
    main(arguments(case, output, rungs="[1]", kind="svd"))
    with pytest.raises(SystemExit):
        main(arguments(case, output, rungs="[1,5]"))
    assert load_ladder(output).rungs == (1, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    capsys.readouterr()


@pytest.fixture
def epochs_of_two(monkeypatch):
    monkeypatch.setattr(distillation, "STEPS_PER_EPOCH", 2)
    original = distillation.measure

    def helped(model, exact, candidates, documents, *, name):
        """Whatever training did, it helped: what is compared is what was trained."""
        found = original(model, exact, candidates, documents, name=name)
        return [type(own)(own.name, own.bytes, 1.0 + (name == "rungs before"), None, 1.0) for own in found]

    monkeypatch.setattr(distillation, "measure", helped)


def test_a_stopped_run_goes_on_where_it_was_and_another_does_not(case, tmp_path, monkeypatch, capfd, epochs_of_two):
    flags = {"kind": "distilled", "steps": 6, "rungs": "[0.5,1,4]"}
    main(arguments(case, tmp_path / "whole", **flags))
    step, done = Distillation.training_step, []

    def stopping(module, batch, index):
        if len(done) == stop:
            raise Stopped(15)
        done.append(module.current_epoch * 2 + index)
        return step(module, batch, index)

    monkeypatch.setattr(Distillation, "training_step", stopping)
    stop = 5
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments(case, tmp_path / "out", **flags))
    assert caught.value.code == 143
    assert capfd.readouterr().err == "terminated; the same command goes on where it stopped\n"
    assert [path.name for path in (tmp_path / "out.work").iterdir()] == ["checkpoints"]
    assert not (tmp_path / "out").exists()

    # of other documents: its checkpoints are its own
    stop = len(done) + 1
    with pytest.raises(SystemExit):
        main(arguments(case, tmp_path / "out", **flags, seed=1))
    assert done[5:] == [0]

    stop = -1
    main(arguments(case, tmp_path / "out", **flags))
    assert done[6:] == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"], "what was kept to go on is gone"
    one, other = load_ladder(tmp_path / "out"), load_ladder(tmp_path / "whole")
    assert one.fingerprint == other.fingerprint
    assert one.bank_of == (0, 0, 1, 2)
    for name in one.modules:
        for j in range(len(one.rungs)):
            assert all(map(torch.equal, one.update(name, j), other.update(name, j)))

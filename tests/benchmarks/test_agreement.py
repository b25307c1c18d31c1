"""What the engine's agreement is judged by, and that a whole comparison finds the engine equal and a fault in it."""

from __future__ import annotations

import json
import lzma
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import agreement
from benchmarks.agreement import EXACT, FIRST_TOKENS, batches, judged, ladder_of, prompts_of
from benchmarks.shapes import write_adapter
from benchmarks.teacher import Found, Text
from runtime import build_ladder, load_adapter, save_ladder
from runtime.engine import decoder as decoders
from tests.engine import tiny

WORDS = [f"w{number}" for number in range(tiny.VOCABULARY)]


@pytest.fixture(scope="module")
def tokenizer():
    own = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w1"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="w1", pad_token="w0", eos_token="w2")


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """A model, two adapters of it, and a file of prompts."""
    root, model = tmp_path_factory.mktemp("agreement"), tiny.model()
    model.bfloat16().save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    for name, factor in (("one", 1.0), ("two", -1.0)):
        write_adapter(model, 8, root / name)
        config = json.loads((root / name / "adapter_config.json").read_text())
        (root / name / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 32 * factor}))
    prompts = [{"prompt": "w5 w9 w30"}, {"prompt": "", "completion": "w7 w8 w9"}, {"prompt": "w4 w4"}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(own) + "\n" for own in prompts))
    return root


@pytest.fixture
def run(folders, monkeypatch, capsys, tmp_path):
    """`run(*more)`: (status, record, printed) of the command on the tiny model, two steps of a prompt each."""
    monkeypatch.setattr(decoders, "splits_for", lambda *_: 2)

    def call(*more):
        output = tmp_path / "agreement.json"
        arguments = ["--model", folders / "model", "--adapters", folders / "one", folders / "two", "--prompts",
                     folders / "prompts.jsonl", "--rows", "1", "--tokens", "2", "--output", output, *more]  # fmt: skip
        monkeypatch.setattr("sys.argv", ["agreement", *map(str, arguments)])
        status = 0
        try:
            agreement.main()
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        record = json.loads(output.read_text()) if output.exists() else None
        assert record is None or json.loads(out.splitlines()[-1]) == record
        return status, record, out + err

    return call


def test_a_whole_comparison(run):
    _, record, out = run("--rungs", "2")
    assert [(own["rung"], own["rows_are"], own["rows"]) for own in record["results"]] == [
        ("2", "together", 2), ("2", "alone", 2),
    ]  # fmt: skip
    for own in record["results"]:
        assert own["steps"] == 2 * 2
        assert own["float32_tokens_equal"], own
        # Triton's interpreter cuts bits off where a GPU rounds, so that no bar of bf16 is held here.
        assert 0 < own["error_engine"] < 4 * own["error_reference"]
        assert [one["steps"] for one in own["by_adapter"].values()] == [2, 2]
    assert list(record["results"][0]["by_adapter"]) == record["adapters"] == ["one", "two"]
    assert record["passed"] == ("MISSED" not in out) == ("all bars are kept" in out)


def test_a_fault_in_the_engine_is_found_and_is_a_status(run, folders, monkeypatch):
    """Adapters that count half: every bar but none of the reference's numbers shows it."""
    begin = decoders.Decoder.begin

    def faulty(self, given):
        begin(self, given)
        self.buffers.rows.weight.mul_(0.5)

    monkeypatch.setattr(decoders.Decoder, "begin", faulty)
    status, record, out = run("--rungs", EXACT, "--adapters", str(folders / "one"))
    assert status == 1
    assert not record["passed"]
    assert "MISSED: exact together: " in out
    assert "error" in record["results"][0]["missed"]
    assert record["results"][0]["error_engine"] > 4 * record["results"][0]["error_reference"]


def found(agree=(True, True), gap=(1.0, 1.0), reference=(4.0, 4.0), engine=(4.0, 4.0)):
    numbers = (torch.tensor([own], dtype=torch.float64) for own in (gap, reference, engine))
    right = torch.tensor([[True] * len(agree)])
    return Found(torch.tensor([agree]), *numbers, right, ~right)


@pytest.mark.parametrize(
    ("given", "exactly", "missed"),
    [
        (found(), 3, []),
        (found(engine=(5.76, 5.75)), 3, []),
        (found(engine=(5.77, 5.76)), 3, ["error"]),
        (found(engine=(9.0, 0.0)), 3, []),
        (found(reference=(0.0, 0.0), engine=(0.0, 0.0)), 3, []),
        (found(reference=(0.0, 0.0)), 3, ["error"]),
        (found(engine=(float("nan"), 4.0)), 3, ["error"]),
        (found((True,) * 49 + (False,), (6.0,) * 50, (4.0,) * 50, (4.0,) * 50), 3, []),
        (found((True,) * 49 + (False,), (6.1,) * 50, (4.0,) * 50, (4.0,) * 50), 3, ["gap"]),
        (found((True, False), (9.0, 0.0)), 3, ["agreement"]),
        (found(), 2, ["float32"]),
    ],
)
def test_bars(given, exactly, missed):
    record = judged(given, [exactly], 2)
    assert record["missed"] == missed
    assert (record["right_reference"], record["right_engine"]) == (record["disagreements"], 0)


def test_what_is_found_at_a_step():
    exact = torch.tensor([[[1.0, 3.0, 2.5, 0.0]]])
    own = Found.of(exact + torch.tensor([0.0, 0.0, 1.0, 1.0]), exact + 2, exact)
    assert [own.agree.tolist(), own.gap.tolist()] == [[[False]], [[0.5]]]
    assert [own.reference.tolist(), own.engine.tolist()] == [[[4.0]], [[0.5]]]
    assert [own.right_reference.tolist(), own.right_engine.tolist()] == [[[True]], [[False]]]
    assert Found.joined([own, Found.of(exact, exact, exact)]).rows([1]).agree.tolist() == [[True]]


def test_rows_are_of_the_adapters_in_turn():
    texts = [Text(ladder, [ladder, row]) for ladder in (0, 1, 2) for row in range(2)]
    got = [(how, [tuple(own.ids) for own in batch]) for how, batch in batches(texts, 3, 4)]
    assert got == [
        ("together", [(0, 0), (1, 0), (2, 0), (0, 1)]), ("together", [(1, 1), (2, 1)]),
        ("alone", [(0, 0)]), ("alone", [(1, 0)]), ("alone", [(2, 0)]),
    ]  # fmt: skip


def test_prompts_are_the_files(tokenizer, tmp_path):
    documents = [
        {"prompt": "w5 w6 w7"},
        {"prompt": "w5", "completion": "w8 " * 50},
        {"prompt": "w5"},
        {"prompt": "w9 w3"},
    ]
    with lzma.open(tmp_path / "own.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(own) + "\n" for own in documents))
    read = prompts_of(tmp_path / "own.jsonl.xz", tokenizer, 3, 1000)
    assert read == [[5, 6, 7], [8] * FIRST_TOKENS, [9, 3]]
    assert prompts_of(tmp_path / "own.jsonl.xz", tokenizer, 2, 2) == [[6, 7], [8, 8]]
    with pytest.raises(ValueError, match=r"--prompts: expected 4 prompts in .*, got 3; lower --rows or add some"):
        prompts_of(tmp_path / "own.jsonl.xz", tokenizer, 4, 1000)


@pytest.mark.parametrize("text", ["no json\n", "[]\n", '{"completion": "w1"}\n', '{"prompt": 3}\n'])
def test_a_file_of_another_kind_is_one_line(text, tokenizer, tmp_path):
    (tmp_path / "own.jsonl").write_text(text)
    with pytest.raises(ValueError, match='--prompts: expected a JSON object with "prompt" in every line of') as error:
        prompts_of(tmp_path / "own.jsonl", tokenizer, 1, 10)
    assert "\n" not in str(error.value)


def test_a_ladder_has_the_rungs_asked_for(folders, tmp_path):
    assert {3, 8} <= {*ladder_of(folders / "one", [EXACT, "3"]).rungs}
    saved = build_ladder(load_adapter(folders / "one"), (2, 4)).up_to(4)
    save_ladder(saved, tmp_path / "part")
    assert ladder_of(tmp_path / "part", ["4", "2"]).rungs == (2, 4, 8)
    with pytest.raises(ValueError, match="rungs: expected"):
        ladder_of(tmp_path / "part", ["3"])


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--rungs", "some"), "error: --rungs: expected .*, got 'some'; .*"),
        (("--rows", "0"), "error: --rows: expected .*"),
        (("--prompts", "/nowhere.jsonl"), "error: --prompts: expected a file, got '/nowhere.jsonl'; correct the path"),
        (("--prompts", "a", "b", "c"), "error: --prompts: expected one file, or one for each of 2 adapters, got 3; .*"),
        (
            ("--rows", "4", "--rungs", EXACT),
            "error: --prompts: expected 4 prompts in .*, got 3; lower --rows or add some",
        ),
    ],
)
def test_what_is_wrong_is_one_line(run, more, line):
    status, record, out = run(*more)
    assert (status, record) == (2, None)
    assert re.fullmatch(line, out.splitlines()[-1]), out

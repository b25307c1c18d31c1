"""What is wrong with a command line or a configuration file is one line and status 2, before anything is loaded."""

import re
from dataclasses import replace

import pytest
import torch

import training.evaluate
import training.fit
from policy.limits import limits_of
from training.amounts import Amounts
from training.console import plain

COMMANDS = {"fit": training.fit.main, "evaluate": training.evaluate.main}
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


def refused(main, arguments, capsys) -> str:
    """The one line with which `main` ends."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, errors = capsys.readouterr()
    assert caught.value.code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    assert out == ""
    return errors


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--amounts.learning_rate=1e309", "amounts.learning_rate: expected a number in (0, 1], got inf"),
        ("--amounts.learning_rate=-1", "amounts.learning_rate: expected a number in (0, 1], got -1.0"),
        ("--amounts.learning_rate=nan", "amounts.learning_rate: expected float, got nan"),
        ("--amounts.learning_rate=.nan", "amounts.learning_rate: expected a number in (0, 1], got nan"),
        (
            "--amounts.scales=[]",
            "amounts.scales: expected a list of 1 to 32, strictly ascending",
        ),
        ("--amounts.scales=[0.8,.inf]", "amounts.scales[1]: expected a number in (0, 2), got inf"),
        ("--amounts.epochs=1000000000", "amounts.epochs: expected a whole number in [1, 1000000], got 1000000000"),
        ("--amounts.epochs=0", "amounts.epochs: expected a whole number in [1, 1000000], got 0"),
        ("--amounts.hidden=-3", "amounts.hidden: expected a whole number in [1, 8192], got -3"),
        ("--trainer.devices=0", "trainer: `Trainer(devices='0')` value is not a valid input"),
        ("--trainer.devices=abc", "trainer: `devices`"),
        ("--trainer.strategy=sideways", "trainer: You selected an invalid strategy name"),
        pytest.param("--trainer.accelerator=cuda", "trainer: `CUDAAccelerator` can not run", marks=NO_CUDA),
        ("--output=", "output: expected a folder, got ''; leave it out for runs/NAME-OF-ADAPTER"),
        ("--output= ", "output: expected a folder, got ' '"),
    ],
    ids=lambda value: value if value.startswith("--") else "",
)
def test_a_fit_refuses_it_before_it_looks_for_the_model(flag, says, case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = case.arguments(tmp_path / "out", model="/nowhere/model", **{"trainer.accelerator": "auto"})
    assert refused(COMMANDS["fit"], [*arguments, flag], capsys).startswith(f"error: {says}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seed=abc"], "seed: expected int, got abc"),
        (["--seed"], "argument --seed: expected one argument"),
        (["--no_such_flag=3"], "unrecognized arguments: --no_such_flag=3"),
        (["--config=/nowhere.yaml"], "config: File does not exist: '/nowhere.yaml'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_flag_of_the_wrong_kind_is_one_line(command, flags, says, capsys):
    assert refused(COMMANDS[command], flags, capsys) == f"error: {says}; --help lists what there is\n"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"seed: abc\n", "seed: expected int, got abc; --help lists what there is\n"),
        (b"sed: 3\n", "sed"),
        (b"model: [\n", "Problems parsing config: "),
        (b"- 1\n", "Unexpected config: - 1"),
        (b"\xff\xfe", "'utf-8' codec can't decode"),
    ],
    ids=["type", "name", "yaml", "list", "binary"],
)
def test_a_configuration_file_with_a_mistake_is_one_line(command, content, says, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert says in refused(COMMANDS[command], ["--config", str(path)], capsys)


def test_a_setting_that_may_be_of_several_types_names_them(capsys):
    shown = refused(COMMANDS["fit"], ["--rungs=x"], capsys)
    assert shown == "error: rungs: expected one of list[float], NoneType, got x; --help lists what there is\n"
    assert plain("something\n  new: entirely") == "something new: entirely"


INTEGERS = [name for name, value in vars(Amounts()).items() if isinstance(value, int)]


@pytest.mark.parametrize("name", INTEGERS)
def test_every_integer_amount_has_its_type_and_its_ends(name):
    limit = limits_of(Amounts)[name]
    wide = Amounts(max_tokens=2**31 - 1, min_completion_tokens=1)
    for wrong in (limit.least - 1, limit.most + 1, float(limit.least + 1), True, "3", None):
        with pytest.raises(ValueError, match=re.escape(f"amounts.{name}: expected {limit}, got")):
            replace(wide, **{name: wrong})


@pytest.mark.parametrize("rate", [0.0, -1e-9, float("inf"), float("nan"), 1.5, True, "0.1", None])
def test_a_learning_rate_is_a_positive_number_up_to_one(rate):
    with pytest.raises(ValueError, match=r"amounts\.learning_rate: expected a number in \(0, 1\], got"):
        Amounts(learning_rate=rate)
    assert Amounts(learning_rate=1).learning_rate == 1.0


@pytest.mark.parametrize(
    "scales",
    [(), (0.8, 1.2), (1.2, 1.0, 0.8), (1.0, 1.0), (0.8, 1.0, 1.3), (0.0, 1.0, 2.0), (float("nan"),), (True,), 1.0, "1"],
)
def test_scales_ascend_and_are_symmetric_around_one(scales):
    with pytest.raises(ValueError, match=r"amounts\.scales(\[0\])?: expected"):
        Amounts(scales=scales)
    assert Amounts(scales=[0.5, 1, 1.5]).scales == (0.5, 1.0, 1.5)


def test_abbreviated_flags_still_work_without_a_page_of_warning(capsys):
    parser = training.fit.make_parser()
    assert parser.parse_args(["--amounts.epo=3"]).amounts.epochs == 3
    assert capsys.readouterr().err == ""

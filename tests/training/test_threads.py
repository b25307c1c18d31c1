"""A process computes with no more threads than it has CPUs, and several of one command share them."""

import os

import pytest
import torch

from training import evaluate, fit
from training.threads import cpu_quota, share_threads, usable_cpus


@pytest.fixture(autouse=True)
def _threads_stay(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("OMP_NUM_THREADS")  # now it is restored whatever a test does
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def groups(tmp_path, own, **files):
    """A tree of control groups; `own` is what /proc/self/cgroup says."""
    (tmp_path / "own").write_text(own)
    for name, content in files.items():
        path = tmp_path / "root" / name.replace("__", "/").replace("max", "cpu.max").replace("cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "root", tmp_path / "own"


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/\n", {}, float("inf")),
        ("0::/\n", {"max": "max 100000\n"}, float("inf")),
        ("0::/\n", {"max": "150000 100000\n"}, 1.5),
        ("0::/user/fit\n", {"user__fit__max": "max 100000\n", "user__max": "300000 100000\n"}, 3.0),
        ("0::/user/fit\n", {"user__fit__max": "200000 100000\n", "user__max": "300000 100000\n"}, 2.0),
        ("0::/of/the/host\n", {"max": "50000 100000\n"}, 0.5),
        ("4:cpu:/box\n0::/\n", {"cpu__box__cfs_quota_us": "400000\n", "cpu__box__cfs_period_us": "100000\n"}, 4.0),
        ("4:cpu:/\n", {"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}, float("inf")),
        ("5:memory:/\n", {"memory__max": "1 1\n"}, float("inf")),
    ],
)
def test_the_quota_is_the_smallest_on_the_way_to_the_root(own, files, cpus, tmp_path):
    assert cpu_quota(*groups(tmp_path, own, **files)) == cpus


def test_where_there_are_no_control_groups_nothing_is_limited(tmp_path):
    assert cpu_quota(tmp_path / "none", tmp_path / "nothing") == float("inf")


@pytest.mark.parametrize(("quota", "affinity", "cpus"), [(2.9, 8, 2), (0.5, 8, 1), (float("inf"), 3, 3), (9.0, 4, 4)])
def test_usable_are_whole_cpus_of_affinity_and_quota(quota, affinity, cpus, monkeypatch):
    monkeypatch.setattr("training.threads.cpu_quota", lambda *_: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    assert usable_cpus() == cpus


@pytest.mark.parametrize(
    ("threads", "processes", "own", "found", "inherited"),
    [
        (8, 1, None, 6, None),
        (8, 2, None, 3, "3"),
        (8, 9, None, 1, "1"),
        (2, 1, None, 2, None),
        (8, 2, "8", 8, "8"),
    ],
    ids=["one", "two", "many", "fewer", "the user's"],
)
def test_processes_share_the_cpus(threads, processes, own, found, inherited, monkeypatch):
    monkeypatch.setattr("training.threads.usable_cpus", lambda: 6)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    torch.set_num_threads(threads)
    share_threads(processes)
    assert torch.get_num_threads() == found
    assert os.environ.get("OMP_NUM_THREADS") == inherited


@pytest.mark.parametrize(
    ("module", "flags", "processes"),
    [(fit, ["--trainer.devices=3", "--trainer.accelerator=cpu"], 3), (evaluate, [], 1)],
    ids=["fit", "evaluate"],
)
def test_commands_share_the_threads_of_their_processes_before_the_model_is_loaded(
    module, flags, processes, monkeypatch, tmp_path, capsys
):
    asked = []
    monkeypatch.setattr(module, "share_threads", lambda processes: asked.append(processes))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        module.main([*flags, "--model=/nowhere/model"])
    assert "/nowhere/model" in capsys.readouterr().err
    assert asked == [processes]

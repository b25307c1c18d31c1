"""How many threads a process computes with: as many as there are CPUs for it, and no more."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
UNLIMITED = float("inf")


def share_threads(processes: int) -> None:
    """Divide this machine's usable CPUs among `processes` of one command; a user's OMP_NUM_THREADS wins.

    Never raises the number of threads. Processes that this one starts inherit their share.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = max(1, usable_cpus() // processes)
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    if processes > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def usable_cpus() -> int:
    """CPUs that the scheduler gives this process: its affinity, cut by the quota of its control groups; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(affinity, cpu_quota(CGROUPS, OWN_CGROUP))))


def cpu_quota(root: Path, own: Path) -> float:
    """CPUs that control groups under `root` allow a process whose `/proc/self/cgroup` is `own`; inf without a limit."""
    found = UNLIMITED
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        group = base / path.lstrip("/")
        # A limit holds for everything below it. In a container the path may be the host's: then the root is its own.
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                found = min(found, _limit(folder))
    return found


def _limit(group: Path) -> float:
    unified, quota, period = (group / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
    if unified.is_file():
        words = unified.read_text().split()
    elif quota.is_file() and period.is_file():
        words = [quota.read_text().strip(), period.read_text().strip()]
    else:
        return UNLIMITED
    return UNLIMITED if words[0] in ("max", "-1") else int(words[0]) / int(words[1])

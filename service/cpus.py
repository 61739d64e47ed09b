"""The number of CPUs that this process may use: its affinity, and the CPU quota of its cgroups (v1 and v2)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")


@dataclass(frozen=True)
class Cpus:
    """The CPUs that a process may use."""

    affinity: int
    """Number of CPUs in the process's affinity mask."""
    quota: float | None
    """CPU time per time that its cgroups allow, the smallest of all levels; None: no limit."""

    @property
    def usable(self) -> int:
        """The number of threads that can run at a time, at least 1; the quota is rounded up."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, math.ceil(self.quota)))

    def __str__(self) -> str:
        quota = "no cgroup quota" if self.quota is None else f"a cgroup quota of {self.quota:g}"
        return f"{self.usable} usable (affinity {self.affinity}, {quota})"


def available_cpus(proc: Path = PROC) -> Cpus:
    """Return the CPUs that this process may use now.

    Args:
        proc: the folder with `cgroup` and `mountinfo` of the process; without them there is no quota.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Cpus(affinity, min(_quotas(proc), default=None))


def _quotas(proc: Path) -> Iterator[float]:
    """Yield the quotas of this process's cgroups and of their parents, except where there is no limit."""
    try:
        memberships = (proc / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (proc / "mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    paths: dict[int | None, str] = {}  # of the process's cgroup, by version
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths[2] = path
        elif "cpu" in controllers.split(","):
            paths[1] = path
    for line in mounts:
        place, _, kind = line.partition(" - ")
        root, point = place.split(" ")[3:5]
        filesystem, _, options = kind.split(" ", 2)  # the field between them may be empty
        version = {"cgroup2": 2, "cgroup": 1 if "cpu" in options.split(",") else None}.get(filesystem)
        if version not in paths:
            continue
        try:
            inside = PurePosixPath(paths[version]).relative_to(root).parts
        except ValueError:  # in a container the mount may be the cgroup itself, under another name
            inside = ()
        folder = Path(point)
        for part in ("", *inside):
            folder /= part
            if (quota := _quota_v2(folder) if version == 2 else _quota_v1(folder)) is not None:
                yield quota


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # the root cgroup has none
        return ""


def _ratio(quota: str, period: str) -> float | None:
    """Return CPU time per time; None for "max", -1, or text that is not a number."""
    if not (quota.isdecimal() and period.isdecimal()) or int(period) == 0:
        return None
    return int(quota) / int(period)

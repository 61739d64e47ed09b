"""How many processors this process may use: the scheduler's affinity, and the CPU quota of its cgroups (v1 and v2)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")


@dataclass(frozen=True)
class Cpus:
    """Processors of this process."""

    affinity: int
    """Those that the scheduler may put it on."""
    quota: float | None
    """Processors' worth of time that its cgroups allow, the least of all levels; None: no limit."""

    @property
    def usable(self) -> int:
        """The number of threads that can run: the quota is rounded up, since a part of a processor's time is some."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, math.ceil(self.quota)))

    def __str__(self) -> str:
        quota = "no cgroup quota" if self.quota is None else f"a cgroup quota of {self.quota:g}"
        return f"{self.usable} usable: affinity to {self.affinity}, {quota}"


def available_cpus(proc: Path = PROC) -> Cpus:
    """Look at what this process may use now.

    Args:
        proc: the folder with `cgroup` and `mountinfo` of the process; systems without it have no quota.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Cpus(affinity, min(_quotas(proc), default=None))


def _quotas(proc: Path) -> Iterator[float]:
    """Yield the quota of each cgroup that this process is in, and of those around it, where there is one."""
    try:
        memberships = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
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
        filesystem, _, options = kind.split(" ", 2)  # what is between them may be empty
        version = {"cgroup2": 2, "cgroup": 1 if "cpu" in options.split(",") else None}.get(filesystem)
        if version not in paths:
            continue
        try:
            inside = PurePosixPath(paths[version]).relative_to(root).parts
        except ValueError:  # a container whose mount is its own cgroup, which it knows by another name
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
        return path.read_text().strip()
    except OSError:  # the outermost cgroup has none
        return ""


def _ratio(quota: str, period: str) -> float | None:
    """Return microseconds of computing per microsecond; None for "max", -1, or no numbers at all."""
    if not (quota.isdecimal() and period.isdecimal()) or int(period) == 0:
        return None
    return int(quota) / int(period)

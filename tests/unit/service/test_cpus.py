"""The number of threads follows the CPU quota of cgroups, for the file trees of several kinds of containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cli.threads import limit_torch_threads
from service.cpus import Cpus, available_cpus

V2 = "31 23 0:28 {root} {point} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {root} {point} rw,relatime - cgroup cgroup rw,{controllers}"


def system(folder: Path, memberships: list[str], mounts: list[str], files: dict[str, str]) -> Path:
    """Write what a process sees of its cgroups; return the folder that stands for /proc/self."""
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in memberships))
    other = f"30 23 0:27 / {folder / 'tmp'} rw - tmpfs  rw,cpu"
    (folder / "mountinfo").write_text("".join(f"{line}\n" for line in (other, *mounts)))
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("limits", "quota"),
    [
        ({"sys/cpu.max": "50000 100000"}, 0.5),
        ({"sys/cpu.max": "max 100000"}, None),
        ({"sys/cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_a_container_with_a_namespace_of_its_own(tmp_path: Path, limits: dict[str, str], quota: float | None) -> None:
    proc = system(tmp_path, ["0::/"], [V2.format(root="/", point=tmp_path / "sys")], limits)
    assert available_cpus(proc).quota == quota


@pytest.mark.parametrize(
    ("outer", "middle", "inner", "quota"),
    [
        ("max", "150000", "max", 1.5),
        ("200000", "300000", "max", 2),
        ("max", "300000", "100000", 1),
        ("max",) * 3 + (None,),
    ],
)
def test_the_lowest_quota_of_nested_cgroups_applies(
    tmp_path: Path, outer: str, middle: str, inner: str, quota: float | None
) -> None:
    files = {
        "sys/a.slice/cpu.max": f"{outer} 100000",
        "sys/a.slice/b/cpu.max": f"{middle} 100000",
        "sys/a.slice/b/c/cpu.max": f"{inner} 100000",
        "sys/a.slice/other/cpu.max": "1000 100000",
    }
    mount = V2.format(root="/", point=tmp_path / "sys")
    assert available_cpus(system(tmp_path, ["0::/a.slice/b/c"], [mount], files)).quota == quota


def test_version_1_with_controllers_mounted_together(tmp_path: Path) -> None:
    files = {
        "sys/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "sys/cpu,cpuacct/cpu.cfs_period_us": "100000",
        "sys/cpu,cpuacct/kubepods/pod/cpu.cfs_quota_us": "250000",
        "sys/cpu,cpuacct/kubepods/pod/cpu.cfs_period_us": "100000",
    }
    mounts = [
        V1.format(root="/", point=tmp_path / "sys/cpu,cpuacct", controllers="cpu,cpuacct"),
        V1.format(root="/", point=tmp_path / "sys/cpuset", controllers="cpuset"),
        V2.format(root="/", point=tmp_path / "sys/unified"),
    ]
    memberships = ["5:cpuset:/", "4:cpu,cpuacct:/kubepods/pod/container", "0::/"]
    assert available_cpus(system(tmp_path, memberships, mounts, files)).quota == 2.5


@pytest.mark.parametrize("root", ["/docker/abc", "/../.."])
def test_version_1_where_the_mount_is_the_container_s_own_cgroup(tmp_path: Path, root: str) -> None:
    files = {"sys/cpu/cpu.cfs_quota_us": "100000", "sys/cpu/cpu.cfs_period_us": "50000"}
    mount = V1.format(root=root, point=tmp_path / "sys/cpu", controllers="cpu")
    assert available_cpus(system(tmp_path, ["4:cpu:/docker/abc"], [mount], files)).quota == 2


def test_systems_without_cgroups_have_no_quota(tmp_path: Path) -> None:
    assert available_cpus(tmp_path).quota is None


@pytest.mark.parametrize(
    ("affinity", "quota", "usable"), [(64, 1, 1), (64, 0.2, 1), (64, 1.5, 2), (2, 8, 2), (3, None, 3), (64, 4.0, 4)]
)
def test_the_number_of_threads_is_limited_by_affinity_and_quota(
    affinity: int, quota: float | None, usable: int
) -> None:
    assert Cpus(affinity, quota).usable == usable


def test_affinity_is_read_from_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert available_cpus().affinity == 3
    assert str(Cpus(3, None)) == "3 usable (affinity 3, no cgroup quota)"
    assert str(Cpus(64, 1.5)) == "2 usable (affinity 64, a cgroup quota of 1.5)"


def test_torch_uses_no_more_threads_than_the_quota_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        for has, quota, expected in ((8, 1.5, 2), (1, 1.5, 1), (2, None, 2)):
            torch.set_num_threads(has)
            monkeypatch.setattr("cli.threads.available_cpus", lambda quota=quota: Cpus(8, quota))
            limit_torch_threads()
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)

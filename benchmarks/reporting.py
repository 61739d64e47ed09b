"""Common parts of the sections of RESULTS.md: date, machine, commit, and tables."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from trainer.provenance import git_commit

RUNTIMES = ("torch", "openvino", "onnxruntime", "diffusers")
"""Packages whose versions a speed depends on."""


def describe_run(device: torch.device, threads: int) -> dict[str, str]:
    """Return date, commit, machine and versions, by name."""
    versions = ", ".join(f"{name} {_version(name)}" for name in RUNTIMES)
    load = f"; load average {os.getloadavg()[0]:.2f} at the start" if hasattr(os, "getloadavg") else ""
    facts = {
        "Date": f"{datetime.now(UTC):%Y-%m-%d}",
        "Commit": git_commit() or "unknown",
        "Machine": f"{cpu_name()}, {os.cpu_count()} cores; {threads} threads used{load}",
        "Versions": versions,
    }
    if device.type == "cuda":
        facts["Device"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return facts


def command_line(module: str) -> str:
    """Return the command that is running."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def markdown_section(facts: Mapping[str, str], table: str, module: str) -> str:
    """Write the body of a section of RESULTS.md: the facts, a table, and the command that is running."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join([*lines, "", table, "", "```", command_line(module), "```", ""])


def publish(folder: Path, name: str, section: str) -> None:
    """Print a section of RESULTS.md, and write it as NAME.md into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(section, encoding="utf-8")
    print(section)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a markdown table: the first column to the left, numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def cpu_name() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

"""The base installation, made from the project's own files, has no torch and serves the bundled artifact."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.integration.server import running
from tests.paths import ROOT

PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install what `make serve` installs into a separate environment; return its Python."""
    folder = tmp_path_factory.mktemp("base")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    # With the pip of this environment: to install another one takes seconds
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    install = [*pip, "install", "-q", "--no-compile", "-c", source / "constraints.txt", source]
    subprocess.run(install, check=True, cwd=folder)
    return python


def output(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([python, *arguments], capture_output=True, text=True, cwd=python.parent, env=environment)


def test_the_bundled_artifact_is_served_without_torch(python: Path, tmp_path: Path) -> None:
    assert "No module named 'torch'" in output(python, "-c", "import torch").stderr

    with running(
        ROOT / "models" / "fashion32",
        tmp_path / "log",
        iddpm=python.with_name("iddpm"),
        environment={"IDDPM_CACHE_DIR": ""},
    ) as server:
        answer = server.generate(**{"class": "Bag", "n": 3, "steps": 2, "seed": 5}).json()
        page = [server.get(path).status_code for path in ("/", "/page/main.js")]
        again = server.generate(**{"class": "Bag", "n": 1, "steps": 2, "seed": 5, "image_index": 2}).json()

    assert len(answer["images"]) == 3
    assert page == [200, 200]
    assert again["images"][0]["b64_json"] == answer["images"][2]["b64_json"]
    assert "openvino" in (tmp_path / "log").read_text()


def test_commands_that_need_torch_name_the_extra_to_install(python: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "plain"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "models" / "fashion32" / name, checkpoint / name)
    iddpm = python.with_name("iddpm")

    commands: list[tuple[list[str | Path], str]] = [
        (["serve", "--model", checkpoint], "torch"),
        (["export", checkpoint, tmp_path / "out"], "export"),
        (["export", checkpoint, tmp_path / "out", "--format", "diffusers"], "export"),
        (
            ["import", checkpoint / "model.safetensors", "--preset", "cifar10-uncond-50m", "--out", tmp_path / "out"],
            "torch",
        ),
        (["train", "fashion32", "--data", tmp_path, "--out", tmp_path / "out"], "train"),
    ]
    for arguments, extra in commands:
        done = output(iddpm, *arguments)
        assert done.returncode == 1, (arguments, done.stderr)
        assert f".[{extra}]" in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr

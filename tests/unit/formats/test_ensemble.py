"""Ensemble folders: complete in themselves, and refused where their members do not fit together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.main import app
from diffusion.config import DiffusionConfig
from formats.ensemble import ENSEMBLE_FILE, EnsembleError, is_ensemble, read_ensemble, write_ensemble
from tests.networks import RANDOM_MODEL_STEPS as STEPS
from tests.networks import write_random_model


@pytest.fixture
def members(tmp_path: Path) -> tuple[Path, Path]:
    return write_random_model(tmp_path / "vlb" / "model", seed=0), write_random_model(tmp_path / "hybrid", seed=1)


def test_an_ensemble_is_complete_in_itself(members: tuple[Path, Path], tmp_path: Path) -> None:
    vlb, hybrid = members
    (vlb / "state").mkdir()
    out = tmp_path / "both"
    arguments = ["ensemble", str(out), "--range", f":10={vlb}", "--range", f"10:-5={hybrid}", "--range", f"-5:={vlb}"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "vlb at 15 timesteps, hybrid at 25 timesteps" in done.output
    shutil.rmtree(vlb.parent)
    shutil.rmtree(hybrid)

    read = read_ensemble(out.rename(tmp_path / "moved"))
    assert is_ensemble(read.folder)
    assert read.members == ("vlb", "hybrid")
    np.testing.assert_array_equal(read.network_of, np.repeat([0, 1, 0], [10, 25, 5]))
    assert read.config.diffusion.num_timesteps == STEPS
    assert not (read.folders[0] / "state").exists()


def test_the_hash_tells_other_ranges_and_other_weights_apart(members: tuple[Path, Path], tmp_path: Path) -> None:
    vlb, hybrid = members
    hashes = {
        write_ensemble(tmp_path / "out", ranges).sha256
        for ranges in (
            [(0, 10, vlb), (10, 0, hybrid)],
            [(0, 11, vlb), (11, 0, hybrid)],
            [(0, 10, hybrid), (10, 0, vlb)],
        )
    }
    assert len(hashes) == 3


def test_members_have_names_of_their_own(tmp_path: Path) -> None:
    folders = [write_random_model(tmp_path / name, seed=k) for k, name in enumerate(("a/x", "b/x", "c/x_1"))]
    ranges = list(zip((0, 10, 20), (10, 20, 0), folders, strict=True))
    assert write_ensemble(tmp_path / "out", ranges).members == ("x_2", "x_3", "x_1")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("model.num_classes", {"num_classes": None, "class_names": None}),
        ("class_names", {"class_names": ("x", "y", "w")}),
        ("diffusion.num_timesteps", {"diffusion": DiffusionConfig(num_timesteps=STEPS + 1)}),
        (
            "diffusion.noise_schedule",
            {"diffusion": DiffusionConfig(num_timesteps=STEPS, noise_schedule="linear")},
        ),
        ("diffusion.variance", {"diffusion": DiffusionConfig(num_timesteps=STEPS, variance="learned")}),
    ],
)
def test_members_that_differ_are_refused(
    field: str, change: dict[str, object], members: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_random_model(tmp_path / "other", seed=2, **change)
    with pytest.raises(EnsembleError, match=f"members must agree in {field}"):
        write_ensemble(tmp_path / "out", [(0, 10, members[0]), (10, 0, other)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 10), (11, 0)], "ascending without gaps"),
        ([(0, 10), (9, 0)], "ascending without gaps"),
        ([(1, 10), (10, 0)], "ascending without gaps"),
        ([(0, 10), (10, 39)], "must end at num_timesteps, 40"),
        ([(0, 10), (10, 10)], "must hold a timestep"),
    ],
)
def test_ranges_must_cover_every_timestep_once(
    ranges: list[tuple[int, int]], message: str, members: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(EnsembleError, match=message):
        write_ensemble(tmp_path / "out", [(*one, member) for one, member in zip(ranges, members, strict=True)])


def test_a_folder_of_something_else_is_not_replaced(members: tuple[Path, Path]) -> None:
    with pytest.raises(EnsembleError, match="is not an ensemble"):
        write_ensemble(members[1], [(0, 0, members[0])])


def test_members_are_folders_inside(members: tuple[Path, Path], tmp_path: Path) -> None:
    out = write_ensemble(tmp_path / "out", [(0, 10, members[0]), (10, 0, members[1])]).folder
    content = json.loads((out / ENSEMBLE_FILE).read_text())
    for name, message in (("../hybrid", "member"), ("absent", "is missing")):
        content["ranges"][1]["member"] = name
        (out / ENSEMBLE_FILE).write_text(json.dumps(content))
        with pytest.raises(EnsembleError, match=message):
            read_ensemble(out)

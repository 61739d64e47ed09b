from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli.main import app
from formats.checkpoint_config import read_config
from tests.unit.trainer.test_trainer import npz, tiny, train
from trainer.ema import EMA, power_decay
from trainer.ema_snapshots import SnapshotError, list_snapshots
from trainer.posthoc_ema import Profile, fit_profile
from trainer.run_folder import checkpoints

__all__ = ["npz"]


def test_an_overlap_is_the_integral_of_the_product() -> None:
    a, b = Profile(300, 0.05), Profile(400, 0.12)
    from trainer.ema import power_exponent

    t = (np.arange(400_000) + 0.5) / 1000
    profiles = []
    for profile in (a, b):
        gamma = power_exponent(profile.sigma_rel)
        inside = t <= profile.updates
        profiles.append(np.where(inside, (gamma + 1) * t**gamma / profile.updates ** (gamma + 1), 0))
    assert a.overlap(b) == pytest.approx(b.overlap(a))
    assert a.overlap(b) == pytest.approx((profiles[0] * profiles[1]).sum() / 1000, rel=1e-4)


def test_an_average_of_another_width_is_approximated_from_snapshots() -> None:
    """Weights that are one-hot in time show the profile itself."""
    n, sigma_rels = 640, (0.05, 0.10)
    kept = {s: EMA(torch.nn.ParameterDict({"p": torch.zeros(n)}), power_decay(s)) for s in (*sigma_rels, 0.075)}
    profiles, snapshots = [], []
    for index, row in enumerate(torch.eye(n), start=1):
        for ema in kept.values():
            ema.update({"p": row})
        if index % 40 == 0:
            for s in sigma_rels:
                profiles.append(Profile(index, s))
                snapshots.append(kept[s].weights["p"].clone())
    coefficients, error = fit_profile(profiles, Profile(n, 0.075))
    made = sum(c * snapshot for c, snapshot in zip(coefficients.tolist(), snapshots, strict=True))
    assert isinstance(made, torch.Tensor)
    wanted = kept[0.075].weights["p"]
    assert error < 0.01
    assert float((made - wanted).norm() / wanted.norm()) < 0.02
    assert float(made.sum()) == pytest.approx(1, abs=0.01)


def test_a_stored_average_is_reproduced(npz: Path, tmp_path: Path) -> None:
    train(tiny(ema_sigma_rels=(0.05, 0.1)), npz, tmp_path / "run")
    out = tmp_path / "averaged"
    result = CliRunner().invoke(app, ["ema", str(tmp_path / "run"), str(out), "--sigma-rel", "0.1"])
    assert result.exit_code == 0, result.output
    kept = load_file(tmp_path / "run" / "ema" / "000000000040.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, kept[f"0.1/{name}"], rtol=1e-4, atol=1e-6)
    provenance = json.loads((out / "config.json").read_text())["provenance"]
    assert provenance["ema"]["sigma_rel"] == 0.1
    assert provenance["ema"]["snapshots"] == 4


def test_a_model_is_written_for_each_decay(npz: Path, tmp_path: Path) -> None:
    """The first decay is the model's; each of the others has the weights of a run with that decay alone."""
    run, out = tmp_path / "run", tmp_path / "out"
    plain = {"ema_warmup": False, "checkpoint_every_images": 20}
    train(tiny(ema_decay=(0.9, 0.5), **plain), npz, run)
    for decay in (0.9, 0.5):
        alone = train(tiny(ema_decay=decay, **plain), npz, tmp_path / f"{decay}")
        assert not (alone.parent / "ema").exists()
        for images, wanted in ((20, checkpoints(alone.parent)[0]), (40, alone)):
            arguments = ["--decay", str(decay), *(["--at-images", "20"] if images == 20 else [])]
            result = CliRunner().invoke(app, ["ema", str(run), str(out), *arguments])
            assert result.exit_code == 0, result.output
            assert f"(decay {decay} at {images} images)" in " ".join(result.output.split())
            for name, tensor in load_file(wanted / "model.safetensors").items():
                assert torch.equal(load_file(out / "model.safetensors")[name], tensor), name
            provenance = read_config(out).provenance
            assert (provenance["images_seen"], provenance["ema"]) == (images, {"decay": decay})
    assert (run / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "0.9" / "model" / "model.safetensors"
    ).read_bytes()


def test_impossible_averages_are_refused_with_one_line(npz: Path, tmp_path: Path) -> None:
    train(tiny(ema_sigma_rels=(0.1,), total_images=20), npz, tmp_path / "run")
    train(tiny(ema_decay=(0.9, 0.5), total_images=4, preview_per_class=0), npz, tmp_path / "decays")
    for run, arguments, message in (
        ("run", ["--sigma-rel", "0.5"], "sigma_rel must be above 0 and below 0.288"),
        ("run", ["--sigma-rel", "0.1", "--at-images", "7"], "must be one of the run's snapshots: 20; got 7"),
        ("run", ["--decay", "0.9999"], "needs a run with several ema_decay; the average of this one's only decay is"),
        (
            "decays",
            ["--sigma-rel", "0.1"],
            "--sigma-rel needs a run with ema_sigma_rels; this one has --decay 0.5, 0.9",
        ),
        ("decays", ["--decay", "0.99"], "--decay must be one of the run's ema_decay: 0.5, 0.9; got 0.99"),
        ("decays", ["--decay", "0.5", "--at-images", "7"], "must be one of the run's snapshots: 4; got 7"),
        ("run", [], "give either --sigma-rel, the width of an average, or --decay, one of the run's ema_decay"),
        ("run", ["--decay", "0.9", "--sigma-rel", "0.1"], "give either --sigma-rel, the width of an average, or"),
    ):
        result = CliRunner().invoke(app, ["ema", str(tmp_path / run), str(tmp_path / "out"), *arguments])
        assert (result.exit_code, message in " ".join(result.output.split())) == (1, True), result.output
    assert not (tmp_path / "out").exists()
    with pytest.raises(SnapshotError, match="contains no snapshot; train with"):
        list_snapshots(tmp_path)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(SnapshotError, match="is not a snapshot"):
        list_snapshots(tmp_path)

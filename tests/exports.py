"""Exported graphs of the golden networks, shared by all tests: to trace one takes 20 seconds of CPU time or more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli.main import app
from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig, DiffusionConfig
from diffusion.time_mlp import WEIGHTS, TimeMLP
from formats.artifact import (
    GRADIENT_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    TIME_MLP_FILE,
    BandError,
    Manifest,
    NetworkParity,
    file_entry,
    manifest_json,
)
from formats.checkpoint import load_classifier, write_checkpoint
from formats.checkpoint_config import checkpoint_sha256
from formats.classifier_folder import CLASSIFIER_FOLDER
from model_export import parity
from model_export.onnx_export import OPSET, PRECISIONS, export_classifier, export_classifier_gradient, export_unet
from tests import golden
from tests.fakes import tiny_checkpoint
from tests.paths import BUNDLED

EXPORTED = "imp_cond_ls"
"""The golden network that `iddpm export` exports."""
CLASSIFIER = "clf_attention"
"""The golden classifier that guides it, and that of the golden file `guidance`."""
GRADIENT = Path(__file__).parent / "data" / f"{CLASSIFIER}_gradient.onnx"
"""The graph of its gradient."""


def golden_checkpoint(folder: Path) -> Path:
    """Write a golden network, trained a little, as a checkpoint folder."""
    diffusion = DiffusionConfig(num_timesteps=4000, rescale_timesteps=True)
    config = CheckpointConfig(model=golden.model_config(EXPORTED), diffusion=diffusion)
    write_checkpoint(folder, config, load_file(golden.GOLDEN_DIR / f"{EXPORTED}.safetensors"))
    return folder


def write_golden_classifier(folder: Path, diffusion: DiffusionConfig | None = None) -> None:
    """Write the golden classifier of the golden guidance as a checkpoint folder."""
    config = ClassifierCheckpointConfig(
        model=golden.classifier_config(CLASSIFIER), diffusion=diffusion or DiffusionConfig(num_timesteps=1000)
    )
    write_checkpoint(folder, config, load_file(golden.GOLDEN_DIR / f"{CLASSIFIER}.safetensors"))


def write_golden_gradient(folder: Path, checkpoint: Path) -> None:
    """Write the artifact of a golden classifier's checkpoint, with a parity that was not measured."""
    config, classifier = load_classifier(checkpoint)
    folder.mkdir()
    shutil.copy(GRADIENT, folder / GRADIENT_FILE)
    (folder / MODEL_FILE).write_bytes(b"logits that no test computes")
    TimeMLP({name: classifier.state_dict()[name].numpy() for name in WEIGHTS}).write(folder / TIME_MLP_FILE)
    band = BandError(t_min=0, t_max=999, prediction=0.0)
    measured = tuple(
        NetworkParity(backend="openvino 0", precision="fp32", file=name, limit=1e-4, bands=(band,))
        for name in (MODEL_FILE, GRADIENT_FILE)
    )
    manifest = Manifest(
        checkpoint=config,
        checkpoint_sha256=checkpoint_sha256(checkpoint),
        opset=OPSET,
        buckets=(1, 2, 4),
        files={path.name: file_entry(path) for path in sorted(folder.iterdir())},
        parity=measured,
    )
    (folder / MANIFEST_FILE).write_text(manifest_json(manifest), encoding="utf-8")


class Exports:
    """Makes each graph at its first use and keeps it; processes of a parallel test run share a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def checkpoint(self) -> Path:
        """Return the golden checkpoint with its artifact, as `iddpm export` wrote it."""
        return self._exported()[0]

    def output(self) -> str:
        """Return what `iddpm export` printed."""
        return self._exported()[1]

    def unet(self, name: str, precision: str = "fp32") -> Path:
        """Return a golden UNet's graph."""
        if (name, precision) == (EXPORTED, "fp32"):
            return self.checkpoint() / "artifact" / MODEL_FILE
        return self._once(
            f"{name}-{precision}.onnx", lambda path: export_unet(golden.network(name), path, PRECISIONS[precision])
        )

    def logits(self, name: str) -> Path:
        """Return a golden classifier's graph."""
        return self._once(f"{name}-logits.onnx", lambda path: export_classifier(golden.classifier(name), path))

    def gradient(self, name: str) -> Path:
        """Return the graph of a golden classifier's gradient."""
        classifier = golden.classifier(name)
        return self._once(f"{name}-gradient.onnx", lambda path: export_classifier_gradient(classifier, path))

    def bundled(self) -> Path:
        """Return the artifact of the bundled model; make one if the repository has none."""
        if (BUNDLED / "artifact").is_dir():
            return BUNDLED / "artifact"
        return self._once("bundled", lambda path: _export(BUNDLED, path, "1,2,4,8"))

    def guided(self) -> Path:
        """Return a copy of the golden checkpoint and artifact with a golden classifier in both.

        The gradient's graph is copied, not traced (tests/data/README.md); no test opens the graph of its logits.
        """

        def add_classifier(folder: Path) -> None:
            shutil.copytree(self.checkpoint(), folder)
            write_golden_classifier(folder / CLASSIFIER_FOLDER)
            write_golden_gradient(folder / "artifact" / CLASSIFIER_FOLDER, folder / CLASSIFIER_FOLDER)

        return self._once("guided", add_classifier)

    def proven(self) -> Path:
        """Return the golden checkpoint with a golden classifier, as `iddpm export` writes the two: minutes."""

        def export(folder: Path) -> None:
            golden_checkpoint(folder)
            write_golden_classifier(folder / CLASSIFIER_FOLDER)
            _export(folder, folder / "artifact", "1,2")

        return self._once("proven", export)

    def conditioned(self, **changes: int) -> Path:
        """Return a small checkpoint that takes conditioning images, with its artifact; changes as in `tiny_config`."""

        def export(folder: Path) -> None:
            # One level without attention: tracing takes time for each layer
            tiny_checkpoint(folder, channel_mult=(1,), attention_resolutions=(), **changes)
            with pytest.MonkeyPatch.context() as shorter:
                shorter.setattr(parity, "STEPS", 5)
                shorter.setattr(parity, "ROWS", 2)
                _export(folder, folder / "artifact", "4,1,2")

        return self._once("-".join(["tiny", *(f"{name}-{value}" for name, value in changes.items())]), export)

    def _exported(self) -> tuple[Path, str]:
        output = self._folder / "golden.txt"

        def export(folder: Path) -> None:
            golden_checkpoint(folder)
            output.write_text(_export(folder, folder / "artifact", "4,1,2"), encoding="utf-8")

        folder = self._once("golden", export)
        return folder, output.read_text(encoding="utf-8")

    def _once(self, name: str, export: Callable[[Path], object]) -> Path:
        path = self._folder / name
        with FileLock(self._folder / f"{name}.lock"):
            if not path.exists():
                export(path)
        return path


def _export(checkpoint: Path, out: Path, buckets: str) -> str:
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(out), "--buckets", buckets])
    assert result.exit_code == 0, result.output
    return result.output

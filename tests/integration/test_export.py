"""`iddpm export` from a checkpoint to an artifact, and the failures that must leave no artifact."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from cli.main import app
from diffusion.classifier import Classifier
from diffusion.network_inputs import NetworkInputs
from diffusion.unet import UNet
from formats.artifact import (
    GRADIENT_FILE,
    MODEL_FILE,
    ArtifactError,
    BandError,
    NetworkParity,
    read_artifact,
    read_classifier_artifact,
)
from formats.checkpoint import load_unet, write_checkpoint
from formats.checkpoint_config import checkpoint_sha256
from model_export import artifact_export, onnx_export, parity
from service.backends.base import BackendOptions
from service.backends.select import load_denoiser
from tests import bfloat16
from tests.counts import LONG
from tests.exports import GRADIENT, Exports, golden_checkpoint, write_golden_classifier
from tests.fakes import tiny_checkpoint, tiny_guided_checkpoint
from tests.paths import ROOT
from tests.waiting import PATIENCE_S


def export(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return golden_checkpoint(tmp_path / "golden")


@pytest.fixture
def traced(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the exporter use the graph that was traced before."""
    graph = exports.checkpoint() / "artifact" / "model.onnx"

    def copy(network: UNet, path: Path, dtype: torch.dtype) -> None:
        assert dtype == torch.float32
        shutil.copy(graph, path)

    monkeypatch.setattr(artifact_export, "export_unet", copy)
    monkeypatch.setattr(parity, "STEPS", 5)
    monkeypatch.setattr(parity, "ROWS", 2)


def test_an_exported_checkpoint_is_compared_described_and_read_back(exports: Exports) -> None:
    folder = exports.checkpoint()
    manifest = read_artifact(folder / "artifact")
    assert sorted(path.name for path in (folder / "artifact").iterdir()) == [
        "manifest.json", "model.onnx", "time_mlp.npz",
    ]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == ["artifact", "config.json", "model.safetensors"]
    assert (manifest.precision, manifest.opset, manifest.buckets) == ("fp32", 22, (1, 2, 4))
    assert manifest.checkpoint_sha256 == checkpoint_sha256(folder)
    assert set(manifest.versions) == {"torch", "onnx", "onnxscript"}
    measured = [(p.backend.split(" ")[0], p.precision) for p in manifest.parity]
    not_measured = [(m.backend.split(" ")[0], m.precision) for m in manifest.not_measured]
    assert measured + not_measured == [("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")]
    assert not_measured == ([("openvino", "bf16")] if bfloat16.why_not_in_openvino() else [])
    for p in manifest.parity:
        assert [(band.t_min, band.t_max) for band in p.bands] == [(800 * k, 800 * k + 799) for k in range(5)]
        assert 0 < p.worst < p.limit
    assert [c.limit for c in manifest.chains] == [1e-3, 1e-3, None][: len(measured)]
    assert all((c.steps, c.images) == (50, 4) for c in manifest.chains)


@pytest.mark.skipif(not LONG, reason="traces two graphs; test_shapes.py exports a model with conditioning always")
@pytest.mark.parametrize("changes", [{"low_res_size": 4}, {"cond_channels": 2}])
def test_models_with_conditioning_are_exported_for_all_runtimes(exports: Exports, changes: dict[str, int]) -> None:
    checkpoint = exports.conditioned(**changes)
    graph = onnx.load(checkpoint / "artifact" / "model.onnx")
    assert [value.name for value in graph.graph.input] == ["x_t", "emb_t", "y", "cond"]
    assert read_artifact(checkpoint / "artifact").inputs == ("x_t", "emb_t", "y", "cond")
    config, network = load_unet(checkpoint)
    x_t, cond, y = torch.randn(2, 1, 8, 8), torch.rand(2, *(config.model.cond_shape or ())), torch.tensor([0, 3])
    with torch.no_grad():
        expected = network(x_t, torch.tensor([10.0, 900.0]), y, cond).numpy()
    for backend in ("openvino", "onnxruntime"):
        served = load_denoiser(checkpoint, backend, BackendOptions(max_rows=2, precision="fp32", device="cpu"))
        emb_t = served.embed_timesteps(np.array([10.0, 900.0], dtype=np.float32))
        out = served(NetworkInputs(x_t.numpy(), emb_t, y.numpy(), cond.numpy()))
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)


def test_the_table_shows_every_band_and_chain(exports: Exports) -> None:
    lines = [" ".join(line.split()) for line in exports.output().splitlines()]
    assert lines[-1].startswith("exported: ")
    manifest = read_artifact(exports.checkpoint() / "artifact")
    for p in manifest.parity:
        head = f"model.onnx, {p.backend}, {p.precision}: at most {p.worst:.1e}, limit {p.limit:.0e}: ok"
        start = lines.index(head)
        for line, band in zip(lines[start + 1 :], p.bands, strict=False):
            assert line == f"t {band.t_min}..{band.t_max} {band.prediction:.1e} / {band.variance:.1e}"
    assert sum("50 steps, 4 images" in line for line in lines) == len(manifest.parity)
    assert sum("limit 0.1% beyond 2: ok" in line for line in lines) == 2


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("limit", ["call", "pixel"])
def test_a_graph_outside_tolerance_is_not_written(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    if limit == "call":
        monkeypatch.setitem(parity.LIMITS, "fp32", 1e-9)
    else:
        monkeypatch.setattr(parity, "PIXEL_LIMIT", -1.0)
    out = checkpoint / "artifact"
    code, output = export(checkpoint, out)
    assert code == 1
    assert "TOO FAR" in output
    assert "model.onnx, openvino" in output
    assert "error: the graph is too far from PyTorch, see the table; nothing was written" in output
    assert "exported" not in output
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.usefixtures("traced")
def test_another_network_s_graph_is_not_written(checkpoint: Path, tmp_path: Path) -> None:
    config, network = load_unet(checkpoint)
    weights = network.state_dict()
    weights["out.2.weight"] *= 1.001
    write_checkpoint(tmp_path / "other", config, weights)
    code, output = export(tmp_path / "other", tmp_path / "out")  # with the graph of the first
    assert (code, "TOO FAR" in output) == (1, True), output
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("traced")
def test_bfloat16_outside_tolerance_is_recorded_and_does_not_fail_the_export(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bfloat16.need_in_openvino()
    monkeypatch.setitem(parity.LIMITS, "bf16", 1e-9)
    code, output = export(checkpoint, checkpoint / "artifact")
    assert (code, "bf16" in output and "TOO FAR" in output) == (0, True), output
    measured = read_artifact(checkpoint / "artifact").parity_of("openvino", "bf16")
    assert measured is not None
    assert not measured.passed


@pytest.fixture(params=["ignored", "failing"])
def without_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make OpenVINO ignore a bfloat16 hint, as without hardware for it, or raise, as under an instruction set limit."""
    compile_model = openvino.Core.compile_model

    def compile_in_float32(core: Any, model: Any, device: str, settings: dict[str, Any]) -> Any:
        if settings["INFERENCE_PRECISION_HINT"] != "f32" and request.param == "failing":
            raise RuntimeError("object is not initialized")
        return compile_model(core, model, device, {**settings, "INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(openvino.Core, "compile_model", compile_in_float32)


@pytest.mark.usefixtures("traced", "without_bfloat16")
def test_bfloat16_is_not_recorded_as_measured_on_a_processor_without_it(checkpoint: Path) -> None:
    code, output = export(checkpoint, checkpoint / "artifact")
    assert code == 0, output
    manifest = read_artifact(checkpoint / "artifact")
    assert [(p.backend.split(" ")[0], p.precision) for p in manifest.parity] == [
        ("onnxruntime", "fp32"), ("openvino", "fp32"),
    ]  # fmt: skip
    assert manifest.parity_of("openvino", "bf16") is None
    (missing,) = manifest.not_measured
    assert (missing.precision, missing.file) == ("bf16", MODEL_FILE)
    assert missing.reason == manifest.reason_not_measured("openvino", "bf16")
    assert "on this processor" in missing.reason
    assert f"model.onnx, {missing.backend}, bf16: not measured: {missing.reason}" in output


@pytest.mark.usefixtures("traced", "without_bfloat16")
def test_a_graph_in_bfloat16_is_not_exported_where_it_cannot_be_compared(
    exports: Exports, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = exports.checkpoint() / "artifact" / MODEL_FILE
    monkeypatch.setattr(artifact_export, "export_unet", lambda _network, path, _dtype: shutil.copy(graph, path))
    code, output = export(checkpoint, checkpoint / "artifact", "--precision", "bf16")
    assert code == 1
    assert re.search(r"error: OpenVINO comp.* on this processor.*, so an artifact in bf16 cannot be compared", output)
    assert "nothing was written. Export on a processor with bf16, or with --precision fp32" in output
    assert not (checkpoint / "artifact").exists()


@pytest.mark.usefixtures("traced")
def test_an_artifact_is_replaced_completely_or_not_at_all(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = checkpoint / "artifact"
    assert export(checkpoint, out, "--buckets", "1,2")[0] == 0
    first = read_artifact(out)

    monkeypatch.setitem(parity.LIMITS, "fp32", 1e-9)
    assert export(checkpoint, out, "--buckets", "1,4")[0] == 1
    assert read_artifact(out) == first

    monkeypatch.setitem(parity.LIMITS, "fp32", 1e-4)
    assert export(checkpoint, out, "--buckets", "4,1,4")[0] == 0
    assert read_artifact(out).buckets == (1, 4)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["artifact", "config.json", "model.safetensors"]


@pytest.mark.usefixtures("traced")
def test_a_model_is_exported_with_the_classifier_that_guides_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_logits(network: Classifier, path: Path, dtype: torch.dtype) -> None:
        path.write_bytes(b"logits that no test compares")

    measure = artifact_export.measure

    def measure_unets(folder: Path, network: UNet | Classifier, *others: Any) -> Any:
        if isinstance(network, UNet):
            return measure(folder, network, *others)
        errors = {MODEL_FILE: 0.0, GRADIENT_FILE: gradient_error}
        parity = [
            NetworkParity(
                backend="none 1",
                precision="fp32",
                file=name,
                limit=1e-4,
                bands=(BandError(t_min=0, t_max=999, prediction=error),),
            )
            for name, error in errors.items()
        ]
        return artifact_export.Measured(parity=parity)

    monkeypatch.setattr(artifact_export, "export_classifier", write_logits)
    monkeypatch.setattr(artifact_export, "export_classifier_gradient", lambda _, path: shutil.copy(GRADIENT, path))
    monkeypatch.setattr(artifact_export, "measure", measure_unets)
    write_golden_classifier(checkpoint / "classifier")
    out, gradient_error = checkpoint / "artifact", 0.5
    code, output = export(checkpoint, out)
    assert (code, "gradient.onnx, none 1, fp32: at most 5.0e-01, limit 1e-04: TOO FAR" in output) == (1, True), output
    assert not out.exists()

    gradient_error = 1e-6
    code, output = export(checkpoint, out)
    assert (code, "gradient.onnx, none 1, fp32: at most 1.0e-06, limit 1e-04: ok" in output) == (0, True), output
    found = read_classifier_artifact(out)
    assert found is not None
    assert found[0].checkpoint_sha256 == checkpoint_sha256(checkpoint / "classifier")
    assert sorted(read_artifact(out).files) == ["model.onnx", "time_mlp.npz"]
    assert sorted(found[0].files) == ["gradient.onnx", "model.onnx", "time_mlp.npz"]


@pytest.mark.skipif(not LONG, reason="traces a classifier and its gradient: IDDPM_TEST_LONG=1")
def test_a_classifier_is_compared_with_pytorch_like_its_model(exports: Exports) -> None:
    found = read_classifier_artifact(exports.proven() / "artifact")
    assert found is not None
    measured = [(p.file, p.backend.split(" ")[0], p.precision) for p in found[0].parity if p.passed]
    assert [m for m in measured if m[2] == "fp32"] == [
        (file, runtime, "fp32") for file in ("model.onnx", "gradient.onnx") for runtime in ("onnxruntime", "openvino")
    ]


def test_a_classifier_that_does_not_fit_its_model_is_not_exported(checkpoint: Path) -> None:
    tiny_guided_checkpoint(checkpoint.parent / "tiny")
    shutil.move(checkpoint.parent / "tiny" / "classifier", checkpoint / "classifier")
    code, output = export(checkpoint, checkpoint / "artifact")
    assert (code, "cannot guide the model" in " ".join(output.split())) == (1, True), output
    assert not (checkpoint / "artifact").exists()


def test_models_that_no_engine_supports_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny_guided_checkpoint(tmp_path / "tiny") / "classifier"
    code, output = export(checkpoint, tmp_path / "out", "--format", "tensorrt")
    assert (code, "holds a noisy classifier" in output, "use --format onnx" in output) == (1, True, True), output
    assert not (tmp_path / "out").exists()


def test_an_occupied_folder_is_not_changed(checkpoint: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"cat")
    for out in (photos, photos / "cat.jpg", checkpoint):
        code, output = export(checkpoint, out)
        assert code == 1
        assert "exists and is not an artifact folder; it was not changed" in " ".join(output.split())
    assert (photos / "cat.jpg").read_bytes() == b"cat"
    assert [path.name for path in photos.iterdir()] == ["cat.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int8"], "--precision must be one of fp32, bf16, fp16; got 'int8'"),
        (["--format", "tflite"], "--format must be one of onnx, tensorrt, diffusers; got 'tflite'"),
        (["--buckets", "0"], "--buckets must be numbers in 1..1024, separated by commas; got '0'"),
        (["--buckets", "1,two"], "--buckets must be numbers in 1..1024"),
        (["--buckets", ""], "--buckets must be numbers in 1..1024"),
        (["--buckets", "1,,2"], "--buckets must be numbers in 1..1024"),
        (["--buckets", "2000"], "--buckets must be numbers in 1..1024"),
        (["--buckets=-1"], "--buckets must be numbers in 1..1024"),
        (["--gpu", "sm89"], "--gpu cannot be used with --format onnx, which takes only --precision and --buckets"),
        (
            ["--format", "diffusers", "--precision", "fp32"],
            "--precision cannot be used with --format diffusers, which takes none of --precision, --buckets, --gpu",
        ),
        (
            ["--format", "diffusers", "--buckets", "1,2", "--gpu", "sm89"],
            "--buckets and --gpu cannot be used with --format diffusers, which takes none of --precision, --buckets, "
            "--gpu",
        ),
    ],
)
def test_invalid_arguments_end_with_one_line(
    checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, output = export(checkpoint, tmp_path / "out", *arguments)
    assert (code, message in " ".join(output.split())) == (2, True), output
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_checkpoint_ends_with_one_line(tmp_path: Path) -> None:
    code, output = export(tmp_path / "nowhere", tmp_path / "out")
    assert (code, "has no config.json" in " ".join(output.split())) == (1, True)
    assert not (tmp_path / "out").exists()


class Branching(nn.Module):
    """A module that the exporter cannot trace."""

    def forward(self, x_t: Tensor, emb_t: Tensor) -> Tensor:
        return x_t if emb_t.sum() > 0 else -x_t


class Untranslatable(nn.Module):
    """A module that the exporter can trace but not translate to ONNX."""

    def forward(self, x_t: Tensor, emb_t: Tensor) -> Tensor:
        return torch.linalg.eigvals(x_t).real * emb_t[:, :1, None, None]


class Doubling(nn.Module):
    """A module that the exporter can write."""

    def forward(self, x_t: Tensor, emb_t: Tensor) -> Tensor:
        return 2 * x_t


def export_module(module: nn.Module) -> Callable[..., None]:
    """Return an `export_unet` that exports another module."""

    def export_it(network: UNet, path: Path, dtype: torch.dtype) -> None:
        onnx_export.export_graph(module, onnx_export.image_and_embedding(network.config), "out", path)

    return export_it


def damage(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Nonsense"


def write_garbage(network: UNet, path: Path, dtype: torch.dtype) -> None:
    path.write_bytes(b"no graph")


@pytest.mark.parametrize(
    ("write", "strip", "precision", "message"),
    [
        (export_module(Branching()), None, "fp32", r"PyTorch \S+ failed to export model.onnx: \w+: Could not guard"),
        (export_module(Untranslatable()), None, "fp32", r"PyTorch \S+ failed to export model.onnx: .*linalg_eig"),
        (export_module(Doubling()), damage, "fp32", r"onnx.checker \S+ failed to verify model.onnx: .*Nonsense"),
        (export_module(Doubling()), None, "fp32", r"onnxruntime \S+ failed to run model.onnx: .*"),
        (write_garbage, None, "fp32", r"onnxruntime \S+ failed to load model.onnx: InvalidProtobuf: "),
        (write_garbage, None, "bf16", r"openvino \S+ failed to compile model.onnx: RuntimeError: "),
    ],
    ids=["trace", "translate", "check", "run", "load", "compile"],
)
def test_an_error_of_a_library_ends_the_export_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[..., None],
    strip: Callable[[onnx.ModelProto], None] | None,
    precision: str,
    message: str,
) -> None:
    monkeypatch.setattr(artifact_export, "export_unet", write)
    if strip is not None:
        monkeypatch.setattr(onnx_export, "_strip", strip)
    monkeypatch.setattr(parity, "STEPS", 2)
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    code, output = export(checkpoint, checkpoint / "artifact", "--precision", precision)
    (error,) = [line for line in output.splitlines() if not line.endswith(" ...")]
    assert code == 1
    assert re.match(f"error: {message}", error), error
    assert "; nothing was written. Install the versions in constraints.txt, which are known to work" in error
    assert len(error) < 800
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_an_error_of_our_own_code_keeps_its_traceback(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(network: UNet, path: Path, dtype: torch.dtype) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(artifact_export, "export_unet", mistaken)
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(checkpoint / "artifact")])
    assert isinstance(result.exception, ValueError)
    assert "error:" not in result.output
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors"]


def run_script(script: str) -> subprocess.CompletedProcess[bytes]:
    """Run a script in a separate process, which may kill itself."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.parametrize("moment", ["graph", "manifest"])
def test_an_export_that_is_killed_leaves_nothing_that_loads(checkpoint: Path, moment: str) -> None:
    out = checkpoint / "artifact"
    script = f"""
        import os, signal
        from pathlib import Path
        from formats import atomic_folder
        from model_export import artifact_export

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def graph(network, path, dtype):
            path.write_bytes(b"half a graph")
            if {moment!r} == "graph":
                die()

        artifact_export.export_unet = graph
        artifact_export.measure = lambda *_: artifact_export.Measured(parity=MEASURED)
        atomic_folder._rename_into_place = die
        from formats.artifact import BandError, NetworkParity
        band = BandError(t_min=0, t_max=1, prediction=0.0)
        MEASURED = [NetworkParity(backend="none", precision="fp32", limit=1.0, bands=(band,))]
        artifact_export.export_artifact(Path({str(checkpoint)!r}), Path({str(out)!r}))
    """
    result = run_script(script)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert not out.exists()
    with pytest.raises(ArtifactError, match="is not an artifact folder"):
        read_artifact(out)
    left = [path for path in checkpoint.iterdir() if path.is_dir()]
    assert [path.name.startswith(".artifact.new-") for path in left] == [True]
    assert (left[0] / "model.onnx").read_bytes() == b"half a graph"
    assert (left[0] / "manifest.json").exists() == (moment == "manifest")


def test_an_export_that_gets_sigterm_leaves_nothing(checkpoint: Path) -> None:
    script = f"""
        import os, signal
        from cli.main import app
        from model_export import artifact_export

        def graph(network, path, dtype):
            path.write_bytes(b"half a graph")
            os.kill(os.getpid(), signal.SIGTERM)

        artifact_export.export_unet = graph
        app(["export", {str(checkpoint)!r}, {str(checkpoint / "artifact")!r}])
    """
    result = run_script(script)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr.decode()
    assert [path.name for path in checkpoint.iterdir() if path.is_dir()] == []


def test_engines_that_are_too_far_from_pytorch_fail_the_command(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(far: float) -> dict[int, NetworkParity]:
        band = BandError(t_min=0, t_max=999, prediction=far)
        return {4: NetworkParity(backend="tensorrt 10.0", precision="fp16", limit=1e-2, bands=(band,))}

    monkeypatch.setattr("model_export.tensorrt_build.find_target", lambda _: None)
    monkeypatch.setattr("model_export.tensorrt_build.build_missing", lambda *_, **__: None)
    monkeypatch.setattr("cli.export_command._is_current", lambda *_: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("cli.engines.measure_engines", lambda *_: measured(1e-3))
    code, output = export(checkpoint, tmp_path / "out", "--format", "tensorrt", "--precision", "fp16")
    assert (code, "exported: " in output) == (0, True), output
    monkeypatch.setattr("cli.engines.measure_engines", lambda *_: measured(0.5))
    code, output = export(checkpoint, tmp_path / "out", "--format", "tensorrt", "--precision", "fp16")
    assert (code, "exported: " in output) == (1, False)
    assert "engines for batches of 4 are too far from PyTorch" in " ".join(output.split())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_graph_is_traced_in_the_requested_precision(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    asked: list[torch.dtype] = []

    def record(_: UNet, __: Path, dtype: torch.dtype) -> None:
        asked.append(dtype)
        raise OSError("enough")

    monkeypatch.setattr(artifact_export, "export_unet", record)
    assert export(checkpoint, tmp_path / "out", "--precision", precision)[0] == 1
    assert asked == [{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]]

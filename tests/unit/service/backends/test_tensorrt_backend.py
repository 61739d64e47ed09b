"""The control flow of the TensorRT backend, with a fake of the package that computes on the CPU.

TensorRT itself is not tested here: see tests/integration/test_tensorrt_build.py and tests/gpu.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cli.engines import as_graph, build_engines, measure_engines
from cli.main import app
from diffusion.network_inputs import NetworkInputs
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from formats.artifact import (
    MANIFEST_FILE,
    MODEL_FILE,
    ArtifactError,
    Manifest,
    graph_inputs,
    manifest_json,
    read_artifact,
)
from formats.checkpoint_config import checkpoint_sha256
from formats.tensorrt_files import Target, Wanted, record_parity
from formats.tensorrt_package import EngineError, logger_of
from model_export.tensorrt_build import build_missing
from service.backends import tensorrt_backend
from service.backends.base import BackendOptions
from service.backends.select import load_denoiser
from service.backends.tensorrt_backend import TensorRTBackend
from service.backends.tensorrt_engines import mismatch
from service.engine.config import EngineConfig
from service.engine.request import GivenArrays, ImageStep
from service.engine.runners.array_runner import ArrayRunner
from service.errors import ModelError
from service.http.app import create_app
from service.settings import Settings
from tests import tensorrt_fakes as fakes
from tests.denoisers import AsNetwork
from tests.fakes import params, tiny_checkpoint, tiny_config
from tests.late_queue import LateQueue
from tests.tensorrt_fakes import TARGET, expected_output, parity, wanted_of, write_artifact, write_fake_engine

OPTIONS = BackendOptions(max_rows=4)


def fake_queue(device: torch.device, network: Any, classifier: None, *, fuses: bool, normal: Any) -> LateQueue:
    """Return a queue without graphs: PyTorch does not see the fake engines, so their calls cannot be recorded."""
    queue = LateQueue(network, classifier)
    queue.lacks_memory_after = 0
    return queue


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the CPU in place of a GPU, and the fake in place of TensorRT."""
    monkeypatch.setitem(sys.modules, "tensorrt", fakes.fake_tensorrt())
    monkeypatch.setattr(tensorrt_backend, "_cuda_device", lambda wanted: torch.device("cpu"))
    monkeypatch.setattr(tensorrt_backend, "CudaQueue", fake_queue)
    stream = SimpleNamespace(cuda_stream=7)
    for name, value in {
        "get_device_capability": fakes.CAPABILITY,
        "get_device_name": fakes.GPU,
        "get_device_properties": SimpleNamespace(multi_processor_count=132),
        "current_stream": stream,
        "Stream": stream,
        "device": contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


@pytest.fixture
def manifest(artifact: Path) -> Manifest:
    return write_artifact(artifact, tiny_config())


@pytest.fixture
def engines(artifact: Path, manifest: Manifest) -> Path:
    for bucket in manifest.buckets:
        write_fake_engine(artifact, manifest, bucket)
    return artifact


def test_the_fake_has_no_name_that_the_real_package_lacks() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    for fake in (fakes.IExecutionContext, fakes.ICudaEngine, fakes.Runtime, fakes.ILogger):
        names = {name for name in vars(fake) if not name.startswith("_")}
        assert names - {"INFO"} <= set(dir(getattr(real, fake.__name__))), fake
    assert set(fakes.DataType.__members__) <= set(real.DataType.__members__)


def test_each_batch_size_runs_its_engine_and_keeps_its_output(engines: Path) -> None:
    backend = TensorRTBackend(engines, OPTIONS)
    assert backend.batch_sizes == (1, 2, 4)
    outputs = []
    for size in (4, 1, 2, 4):
        x_t, y = torch.randn(size, 1, 8, 8), torch.arange(size)
        emb_t = backend.embed_timesteps(torch.linspace(0, 999, size))
        expected = expected_output(x_t.numpy(), emb_t.numpy(), y.numpy(), 2)
        outputs.append((backend(NetworkInputs(x_t, emb_t, y)), expected))
    for out, expected in outputs:
        np.testing.assert_array_equal(out.numpy(), expected)
    with pytest.raises(ValueError, match="batch size must be one of 1, 2, 4, as built; got 3"):
        backend(NetworkInputs(torch.zeros(3, 1, 8, 8), torch.zeros(3, 128), torch.zeros(3, dtype=torch.int64)))


@pytest.mark.parametrize("changes", [{"cond_channels": 2}, {"low_res_size": 4}])
def test_conditioning_images_reach_the_engines(artifact: Path, changes: dict[str, int]) -> None:
    config = tiny_config(**changes)
    manifest = write_artifact(artifact, config, inputs=graph_inputs(config))
    for bucket in manifest.buckets:
        write_fake_engine(artifact, manifest, bucket)
    backend = TensorRTBackend(artifact, OPTIONS)
    assert config.model.cond_shape is not None
    for size in (4, 1, 2):
        x_t, y, cond = torch.randn(size, 1, 8, 8), torch.arange(size), torch.randn(size, *config.model.cond_shape)
        emb_t = backend.embed_timesteps(torch.linspace(0, 999, size))
        expected = expected_output(x_t.numpy(), emb_t.numpy(), y.numpy(), 2, cond.numpy())
        np.testing.assert_array_equal(backend(NetworkInputs(x_t, emb_t, y, cond)).numpy(), expected)

    spec = ImageSpec(seed=3, image_index=1, class_index=2, cond=cond[1].numpy())
    plan = build_plan(config.diffusion, "ancestral", "3")
    pixels = sample_images(AsNetwork(backend), plan, [spec], xp=torch)
    other = replace(spec, cond=cond[0].numpy())
    assert not np.array_equal(pixels, sample_images(AsNetwork(backend), plan, [other], xp=torch))
    runner = ArrayRunner(backend, EngineConfig(max_rows=4, slots_per_row=1))
    runner.warm_up()
    image = replace(params(steps=3, seed=3), image_index=1, class_index=2, given=GivenArrays(cond=cond[1].numpy()))
    runner.start([ImageStep(slot=2, params=image, step=0)])
    for step in range(3):
        assert runner.launch([ImageStep(slot=2, params=image, step=step)]).wait() == [True]
    np.testing.assert_array_equal(runner.read([2]).wait(), pixels)


def test_an_engine_without_its_conditioning_input_is_refused(artifact: Path) -> None:
    manifest = write_artifact(artifact, tiny_config(cond_channels=2), buckets=(1,))
    write_fake_engine(artifact, manifest, 1, tensors=json.loads(fakes.fake_plan(tiny_config(), 1))["tensors"])
    with pytest.raises(ModelError, match="cond"):
        TensorRTBackend(artifact, BackendOptions(max_rows=1))


def test_a_runner_with_this_backend_passes_its_self_test(engines: Path) -> None:
    backend = load_denoiser(engines, "tensorrt", OPTIONS)
    runner = ArrayRunner(backend, EngineConfig(max_rows=4, slots_per_row=1))
    assert runner.depth == 2
    runner.warm_up()
    assert runner.sizes.network == (1, 2, 4)


def test_queued_steps_run_the_engines(engines: Path) -> None:
    backend = load_denoiser(engines, "tensorrt", OPTIONS)
    spec = ImageSpec(seed=3, image_index=1, class_index=2)
    plan = build_plan(tiny_config().diffusion, "ancestral", "3")
    expected = sample_images(AsNetwork(backend), plan, [spec], xp=torch)
    runner = ArrayRunner(backend, EngineConfig(max_rows=4, slots_per_row=1))
    runner.warm_up()
    image = replace(params(steps=3, seed=3), image_index=1, class_index=2)
    runner.start([ImageStep(slot=2, params=image, step=0)])
    for step in range(3):
        assert runner.launch([ImageStep(slot=2, params=image, step=step)]).wait() == [True]
    np.testing.assert_array_equal(runner.read([2]).wait(), expected)


def test_only_engines_that_the_width_uses_are_loaded(artifact: Path, manifest: Manifest) -> None:
    for bucket in (1, 2):
        write_fake_engine(artifact, manifest, bucket)
    assert TensorRTBackend(artifact, BackendOptions(max_rows=2)).batch_sizes == (1, 2)


def test_the_network_id_depends_on_the_engine_files(engines: Path, manifest: Manifest) -> None:
    first, again = TensorRTBackend(engines, OPTIONS), TensorRTBackend(engines, OPTIONS)
    assert first.network_id == again.network_id
    assert first.description == "tensorrt 10.99.0.1 cuda NVIDIA H200 fp32"
    write_fake_engine(engines, manifest, 2, built="again")
    assert TensorRTBackend(engines, OPTIONS).network_id != first.network_id


def test_engines_are_not_built_without_a_request(artifact: Path, manifest: Manifest) -> None:
    write_fake_engine(artifact, manifest, 2)
    with pytest.raises(ModelError) as caught:
        TensorRTBackend(artifact, OPTIONS)
    lines = str(caught.value).splitlines()
    assert [line.rpartition(" ")[2] for line in lines[:2]] == ["1", "4"]
    assert lines[2].endswith(f"iddpm serve --model {artifact} --backend tensorrt --build")
    assert [path.name for path in (artifact / "tensorrt" / TARGET.name).glob("*.plan")] == ["2.plan"]


def test_unusable_engines_are_built_on_request(artifact: Path, manifest: Manifest) -> None:
    for bucket in (1, 2):
        write_fake_engine(artifact, manifest, bucket)
    (artifact / "tensorrt" / TARGET.name / "2.plan").write_bytes(b"damaged")
    asked = []

    def build(folder: Path, store: Path, target: Target, buckets: tuple[int, ...]) -> None:
        asked.append((folder, store, target, buckets))
        for bucket in buckets:
            write_fake_engine(folder, manifest, bucket, store)

    options = BackendOptions(max_rows=4, build_engines=build)
    assert TensorRTBackend(artifact, options).batch_sizes == (1, 2, 4)
    assert TensorRTBackend(artifact, options).batch_sizes == (1, 2, 4)
    assert asked == [(artifact, artifact / "tensorrt", TARGET, (2, 4))]


def test_engines_are_kept_in_the_folder_of_the_setting_by_graph(
    artifact: Path, manifest: Manifest, tmp_path: Path
) -> None:
    write_artifact(tmp_path / "other", tiny_config(), b"another graph")

    def build(folder: Path, store: Path, target: Target, buckets: tuple[int, ...]) -> None:
        for bucket in buckets:
            write_fake_engine(folder, read_artifact(folder), bucket, store)

    options = BackendOptions(max_rows=4, engines_dir=str(tmp_path / "engines"), build_engines=build)
    stores = [TensorRTBackend(folder, options).store for folder in (artifact, tmp_path / "other")]
    assert sorted(stores) == sorted((tmp_path / "engines").iterdir())
    assert not (artifact / "tensorrt").exists()
    assert TensorRTBackend(artifact, replace(options, build_engines=None)).store == stores[0]
    with pytest.raises(ModelError, match="has no engine for batches of 1"):
        TensorRTBackend(artifact, OPTIONS)


def test_the_error_about_a_folder_that_cannot_be_written_names_the_setting(
    artifact: Path, manifest: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    options = BackendOptions(max_rows=4, engines_dir=str(tmp_path / "file"), build_engines=build_engines)
    with pytest.raises(ModelError, match=r"engines cannot be written: .*file.*; set engines_dir \(IDDPM_ENGINES_DIR\)"):
        TensorRTBackend(artifact, options)


def test_a_build_that_fails_ends_start_up(artifact: Path, manifest: Manifest) -> None:
    def build(folder: Path, store: Path, target: Target, buckets: tuple[int, ...]) -> None:
        raise EngineError("no kernel for this")

    with pytest.raises(ModelError, match="no kernel for this"):
        TensorRTBackend(artifact, BackendOptions(max_rows=4, build_engines=build))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"error": "version tag does not match"},
            "cannot load the engine for batches of 2: version tag does not match",
        ),
        ({"no_memory": True}, "cannot prepare the engine for batches of 2"),
        ({"tensors": {"x_t": ([2, 1, 8, 8], "HALF")}}, "batches of 2 is not this model's: it has no tensor emb_t"),
        ({"unequal": True}, "batches of 2 gives identical rows different outputs; build it again"),
        ({"nan": True}, "batches of 2 gives numbers that are not finite"),
    ],
)
def test_an_engine_that_fails_its_self_test_is_refused(
    engines: Path, manifest: Manifest, changes: dict[str, Any], reason: str
) -> None:
    write_fake_engine(engines, manifest, 2, **changes)
    with pytest.raises(ModelError, match=reason):
        TensorRTBackend(engines, OPTIONS)


def test_an_engine_that_does_not_start_is_an_error(engines: Path, manifest: Manifest) -> None:
    write_fake_engine(engines, manifest, 4, fails=True)
    with pytest.raises(RuntimeError, match="TensorRT did not run the engine for batches of 4"):
        TensorRTBackend(engines, OPTIONS)


def test_engines_that_cannot_be_captured_are_launched_without_graphs(
    engines: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    write_fake_engine(engines, manifest, 2, capturable=False)
    backend = TensorRTBackend(engines, OPTIONS)
    assert backend.description.endswith("without graphs")
    assert backend.queue is None
    assert "these engines cannot be captured in CUDA graphs; running without" in caplog.text


def test_engines_without_a_measured_parity_are_logged(engines: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        TensorRTBackend(engines, OPTIONS)
    assert "no parity with PyTorch was measured for the engines for batches of 1, 2, 4" in caplog.text


def test_a_precision_other_than_the_graph_s_is_refused(engines: Path) -> None:
    with pytest.raises(ModelError, match=r"precision 'bf16': the graph in .* computes in fp32"):
        TensorRTBackend(engines, BackendOptions(max_rows=4, precision="bf16"))


def test_a_checkpoint_without_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'tensorrt' serves exported artifacts, and .* has none: iddpm export"):
        TensorRTBackend(tiny_checkpoint(tmp_path / "tiny"), OPTIONS)


@pytest.mark.parametrize("backend", ["tensorrt", "openvino", "onnxruntime"])
def test_a_graph_of_an_earlier_version_s_upsampler_is_refused(artifact: Path, backend: str) -> None:
    write_artifact(artifact, tiny_config(low_res_size=4))
    options = replace(OPTIONS, build_engines=lambda *_: pytest.fail("built"))
    with pytest.raises(ModelError, match=f"export it again with: iddpm export CHECKPOINT {artifact}$"):
        load_denoiser(artifact, backend, options)


def test_a_checkpoint_beside_a_graph_of_an_earlier_version_is_served_with_torch(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", low_res_size=4)
    write_artifact(checkpoint / "artifact", tiny_config(low_res_size=4))
    assert load_denoiser(checkpoint, "torch", OPTIONS).config.model.low_res_size == 4
    with pytest.raises(ModelError, match=f"iddpm export {checkpoint} {checkpoint / 'artifact'}$"):
        load_denoiser(checkpoint, "openvino", OPTIONS)


def test_a_damaged_graph_is_refused(engines: Path) -> None:
    (engines / MODEL_FILE).write_bytes(b"another")
    with pytest.raises(ModelError, match=r"model\.onnx does not match manifest\.json"):
        TensorRTBackend(engines, OPTIONS)


def test_the_error_without_the_package_has_the_command_to_install_it(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise EngineError("TensorRT is not installed")

    monkeypatch.setattr(tensorrt_backend, "installed_flavour", missing)
    with pytest.raises(ModelError, match="TensorRT is not installed"):
        TensorRTBackend(engines, OPTIONS)


def test_the_error_without_a_gpu_has_the_reason(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt", fakes.fake_tensorrt())
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ModelError, match="device 'auto': TensorRT needs a CUDA device"):
        TensorRTBackend(engines, OPTIONS)


def test_differences_of_tensors_are_described() -> None:
    image = ((2, 1, 8, 8), torch.float32)
    assert mismatch({"x_t": image}, {"x_t": image}) is None
    assert mismatch({"x_t": image, "t": image}, {"x_t": image}) == "it has a tensor t"
    found = mismatch({"x_t": ((2, 1, 8, 8), torch.float16)}, {"x_t": image})
    assert found == "x_t is [2, 1, 8, 8] float16 instead of [2, 1, 8, 8] float32"


def test_there_is_one_logger_and_it_keeps_errors() -> None:
    trt: Any = importlib.import_module("tensorrt")
    logger = logger_of(trt)
    assert logger_of(trt) is logger
    logger.errors.clear()
    logger.log(trt.ILogger.WARNING, "mind")
    assert logger.error_suffix() == ""
    logger.log(trt.ILogger.ERROR, "one")
    logger.log(trt.ILogger.INTERNAL_ERROR, "two")
    assert logger.error_suffix() == ": one; two"


def test_a_service_without_a_builder_refuses_to_build(engines: Path) -> None:
    settings = Settings(models=(engines,), backend="tensorrt", build_engines=True, max_rows=4)
    with pytest.raises(ModelError, match="use iddpm serve --build"):
        create_app(settings)
    asked = []
    create_app(settings, lambda *arguments: asked.append(arguments))
    assert asked == []  # no engine was missing


def test_the_builder_is_passed_to_the_backend_only_if_the_settings_request_it(
    artifact: Path, manifest: Manifest
) -> None:
    asked = []

    def build(folder: Path, store: Path, target: Target, buckets: tuple[int, ...]) -> None:
        asked.append(buckets)
        for bucket in buckets:
            write_fake_engine(folder, manifest, bucket, store)

    settings = Settings(models=(artifact,), backend="tensorrt", max_rows=4)
    with pytest.raises(ModelError, match="has no engine for batches of 1"):
        create_app(settings, build)
    create_app(settings.model_copy(update={"build_engines": True}), build)
    assert asked == [(1, 2, 4)]


@pytest.mark.parametrize("flag", [True, False])
def test_the_command_line_flag_controls_building(artifact: Path, monkeypatch: pytest.MonkeyPatch, flag: bool) -> None:
    given = []

    def create(settings: Settings, builder: object) -> None:
        given.append((settings.build_engines, builder))
        raise ModelError("far enough")

    monkeypatch.setattr("service.http.app.create_app", create)
    monkeypatch.setattr("service.logs.configure_logging", lambda: None)  # it would keep the runner's stderr
    arguments = ["serve", "--model", str(artifact), "--backend", "tensorrt", *(["--build"] if flag else [])]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert given == [(flag, build_engines)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_rows_is_run_in_batches_of_one_size(engines: Path, size: int) -> None:
    graph = as_graph(TensorRTBackend(engines, OPTIONS), size)
    rng = np.random.default_rng(0)
    x_t, emb_t = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 1, 8, 8), (5, 128)))
    y = np.arange(5)
    out = graph({"x_t": x_t, "emb_t": emb_t, "y": y})
    np.testing.assert_allclose(out, expected_output(x_t, emb_t, y, 2), rtol=1e-6)


def test_an_engine_with_a_measured_parity_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    artifact = tmp_path / "artifact"
    manifest = write_artifact(artifact, tiny_config())
    manifest = manifest.replace(checkpoint_sha256=checkpoint_sha256(checkpoint))
    (artifact / MANIFEST_FILE).write_text(manifest_json(manifest))
    for bucket in manifest.buckets:
        write_fake_engine(artifact, manifest, bucket)
    TensorRTBackend(artifact, OPTIONS)
    found = measure_engines(checkpoint, artifact)
    assert list(found) == [1, 2, 4]
    for measured in found.values():
        assert measured.backend == "tensorrt 10.99.0.1"
        assert len(measured.bands) == 5
        assert not measured.passed  # the fake is not a UNet
    with pytest.raises(ModelError, match=r"4\.plan is too far from PyTorch"):
        TensorRTBackend(artifact, OPTIONS)


def test_a_rejected_engine_is_built_again_only_where_it_is_measured_again(
    engines: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def build(artifact: Path, wanted: Wanted, batch_size: int, **_: object) -> None:
        built.append(batch_size)
        write_fake_engine(artifact, manifest, batch_size)

    monkeypatch.setattr("model_export.tensorrt_build.build_engine", build)
    record_parity(engines / "tensorrt", wanted_of(manifest), 2, parity(0.5))
    (engines / "tensorrt" / TARGET.name / "4.plan").unlink()
    for _ in range(2):
        with pytest.raises(ModelError) as caught:
            TensorRTBackend(engines, BackendOptions(max_rows=4, build_engines=build_engines))
        assert "2.plan is too far from PyTorch" in str(caught.value)
        assert "--build" not in str(caught.value)
    assert built == []
    assert build_missing(engines, TARGET, rebuild_rejected=True) == (2, 4)
    assert built == [2, 4]


def test_engines_of_another_checkpoint_are_not_measured(engines: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="was exported from another checkpoint"):
        measure_engines(tiny_checkpoint(tmp_path / "tiny"), engines)

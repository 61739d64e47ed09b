"""The backends that run artifacts: compared with the torch backend, their refusals, and the choice of `auto`."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import openvino
import pytest
import torch
from openvino import opset13

from diffusion.network_inputs import NetworkInputs, take_rows
from formats.artifact import MANIFEST_FILE, MODEL_FILE, NotMeasured, file_entry, manifest_json, read_artifact
from service.backends import artifact_model, openvino_backend, openvino_graph, select
from service.backends.artifact_model import ArtifactGraph, cpu_threads, open_artifact
from service.backends.base import BackendOptions, Denoiser, FailureKind
from service.backends.onnxruntime_backend import OnnxRuntimeBackend
from service.backends.openvino_backend import (
    OpenVinoBackend,
    bfloat16_is_fast,
    choose_precision,
    compile_cache,
)
from service.backends.openvino_graph import StaticGraph, equal_parts
from service.backends.processor import has_bfloat16, vector_instructions
from service.backends.select import BACKENDS, Backend, load_denoiser, preference
from service.backends.self_test import invariant_batch_sizes
from service.backends.torch_backend import TorchBackend
from service.errors import ModelError
from tests import bfloat16
from tests.denoisers import BatchDependent
from tests.exports import Exports
from tests.fakes import tiny_checkpoint
from tests.paths import BUNDLED
from tests.unit.test_without_torch import without_torch

ArtifactBackend = OnnxRuntimeBackend | OpenVinoBackend
PLAIN = BackendOptions(max_rows=4, threads=2, device="cpu", cache_dir="")
LIMITS = {"fp32": 1e-4, "bf16": 5e-2}
KINDS: dict[str, Callable[[Path], ArtifactBackend]] = {
    "onnxruntime fp32": lambda folder: OnnxRuntimeBackend(folder, PLAIN),
    "openvino fp32": lambda folder: OpenVinoBackend(folder, with_options(precision="fp32")),
    "openvino bf16": lambda folder: OpenVinoBackend(folder, with_options(precision="bf16")),
}


def with_options(**changes: Any) -> BackendOptions:
    return BackendOptions(**{**vars(PLAIN), **changes})


class Backends:
    """Opens each kind once, on request; skips tests of kinds that the processor does not have."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, ArtifactBackend] = {}

    def __getitem__(self, kind: str) -> ArtifactBackend:
        if kind == "openvino bf16":
            bfloat16.need_in_openvino()
        if kind not in self._opened:
            self._opened[kind] = KINDS[kind](self._folder)
        return self._opened[kind]


@pytest.fixture(scope="module")
def backends(exports: Exports) -> Backends:
    return Backends(exports.bundled())


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest, backends: Backends) -> ArtifactBackend:
    return backends[request.param]


@pytest.fixture(scope="module")
def reference() -> TorchBackend:
    return TorchBackend(BUNDLED, BackendOptions(device="cpu", precision="fp32"))


@pytest.fixture
def artifact(exports: Exports, tmp_path: Path) -> Path:
    """Return a copy that may be changed."""
    return Path(shutil.copytree(exports.checkpoint() / "artifact", tmp_path / "changed"))


def edit_manifest(folder: Path, **changes: Any) -> None:
    manifest = read_artifact(folder)
    (folder / MANIFEST_FILE).write_text(manifest_json(manifest.replace(**changes)), encoding="utf-8")


def with_bfloat16(folder: Path, error: float = 1e-2) -> Path:
    """Record a parity of OpenVINO in bfloat16 in an artifact, wherever it was exported; return the artifact."""
    in_fp32 = next(p for p in read_artifact(folder).parity if "openvino" in p.backend and p.precision == "fp32")
    bands = tuple(band.replace(prediction=error, variance=error) for band in in_fp32.bands)
    in_bf16 = in_fp32.replace(precision="bf16", limit=LIMITS["bf16"], bands=bands)
    others = [p for p in read_artifact(folder).parity if p.precision != "bf16"]
    edit_manifest(folder, parity=[*others, in_bf16], not_measured=())
    return folder


def rows_at(backend: ArtifactBackend, t: npt.NDArray[Any]) -> NetworkInputs[Any]:
    rng = np.random.default_rng(0)
    x_t = rng.standard_normal((len(t), 1, 32, 32)).astype(np.float32)
    return NetworkInputs(x_t, backend.embed_timesteps(t.astype(np.float32)), np.arange(len(t)) % 11)


def by_torch(reference: TorchBackend, x_t: Any, t: npt.NDArray[Any], y: Any) -> npt.NDArray[np.float32]:
    emb_t = reference.embed_timesteps(torch.from_numpy(t.astype(np.float32)))
    return reference(NetworkInputs(torch.from_numpy(x_t), emb_t, torch.from_numpy(y))).numpy()


def error_of(backend: ArtifactBackend, reference: TorchBackend, t: npt.NDArray[Any]) -> float:
    rows = rows_at(backend, t)
    expected = by_torch(reference, rows.x_t, t, rows.y)
    return float(np.linalg.norm(backend(rows) - expected) / np.linalg.norm(expected))


def precision_of(backend: ArtifactBackend) -> str:
    return "bf16" if " bf16 " in backend.description else "fp32"


def test_onnxruntime_reports_lack_of_memory(backends: Backends) -> None:
    said = "BFCArena::AllocateRawInternal ... Failed to allocate memory for requested buffer of size 4096"
    assert backends["onnxruntime fp32"].failure_kind(RuntimeError(said)) is FailureKind.OUT_OF_MEMORY
    assert backends["onnxruntime fp32"].failure_kind(RuntimeError("shape mismatch")) is FailureKind.ROWS


def test_it_agrees_with_torch_at_every_timestep(backend: ArtifactBackend, reference: TorchBackend) -> None:
    limit = LIMITS[precision_of(backend)]
    low, high = (error_of(backend, reference, np.linspace(*band, 4)) for band in ((0, 99.75), (900, 999.75)))
    least = 1e-4 if "bf16" in backend.description else 0  # otherwise it would not be computed in bfloat16
    assert least < low < limit
    assert least < high < limit
    if least:
        assert high < 3 * low  # with a raw t in the graph, it would be five times higher


def test_neighbouring_timesteps_give_different_outputs(backend: ArtifactBackend) -> None:
    for start in (0, 500, 990):
        t = start + np.arange(4) * 0.25
        rows = rows_at(backend, t)
        out = backend(rows._replace(x_t=np.repeat(rows.x_t[:1], 4, axis=0), y=np.zeros_like(rows.y)))
        assert len(np.unique(out.reshape(4, -1), axis=0)) == 4


def test_rows_are_bit_identical_at_every_allowed_batch_size(backend: ArtifactBackend) -> None:
    denoiser: Denoiser[Any] = backend
    sizes = invariant_batch_sizes(denoiser, 4)
    compiled = isinstance(backend, OpenVinoBackend)
    assert backend.batch_sizes == ((1, 2, 4) if compiled else None)
    assert sizes == ((1, 2, 4) if compiled else (1, 2, 3, 4))
    rows = rows_at(backend, np.linspace(0, 999.75, 4))
    together = backend(rows)
    for size in sizes:
        for start in range(5 - size):
            part = slice(start, start + size)
            np.testing.assert_array_equal(backend(take_rows(rows, part)), together[part])


def test_a_later_call_does_not_change_returned_arrays(backend: ArtifactBackend) -> None:
    rows = rows_at(backend, np.linspace(0, 999.75, 2))
    given = [np.array(array) for array in rows]
    first = backend(rows)
    kept = first.copy()
    backend(rows._replace(x_t=-rows.x_t))
    np.testing.assert_array_equal(first, kept)
    first[:] = 0
    np.testing.assert_array_equal(backend(rows), kept)
    for array, before in zip(rows, given, strict=True):
        np.testing.assert_array_equal(array, before)


def test_a_call_reads_its_arguments_at_its_begin_and_need_not_be_fetched(backends: Backends) -> None:
    backend = backends["openvino fp32"]
    assert isinstance(backend, OpenVinoBackend)
    rows = rows_at(backend, np.linspace(0, 999, 4))
    expected = backend(rows)
    backend.begin(rows._replace(x_t=np.ones_like(rows.x_t)))  # not fetched, as after an error elsewhere
    call = backend.begin(rows)
    rows.x_t[:] = 0
    np.testing.assert_array_equal(call.wait(), expected)
    assert call.seconds > 0


@pytest.mark.parametrize("unfit_part", [0, 1])
def test_a_call_that_failed_leaves_its_batch_size_usable(tmp_path: Path, unfit_part: int) -> None:
    x_t = opset13.parameter([4, 2], np.float32, name="x_t")
    emb_t = opset13.parameter([4, 2], np.float32, name="emb_t")
    x_t.output(0).set_names({"x_t"})
    emb_t.output(0).set_names({"emb_t"})
    zero = opset13.constant(np.array(0))
    shape = opset13.convert(opset13.gather(emb_t, zero, zero), "i64")  # rows that do not fit x_t raise an error
    shaped = opset13.reshape(opset13.reshape(x_t, shape, False), opset13.constant(np.array([4, 2])), False)
    openvino.save_model(openvino.Model([shaped], [x_t, emb_t], "m"), tmp_path / "m.xml", compress_to_fp16=False)
    artifact = ArtifactGraph(tmp_path / "m.xml", cast("Any", None), cast("Any", None))
    graph = StaticGraph(artifact, (8,), "fp32", threads=2)  # in parts, one of which fails

    x, fit = np.arange(16, dtype=np.float32).reshape(8, 2), np.tile(np.array([4, 2], np.float32), (8, 1))

    def unfit(size: int) -> npt.NDArray[np.float32]:  # new each time: a stream does not check an array again
        values = fit.copy()
        values[4 * unfit_part] = size
        return values

    for size in (3, 4):
        with pytest.raises(RuntimeError):
            graph.begin(NetworkInputs(x, unfit(size), None)).wait()
        np.testing.assert_array_equal(graph.begin(NetworkInputs(x, fit, None)).wait(), x)
        graph.begin(NetworkInputs(x, unfit(size + 2), None))  # and is not fetched
        np.testing.assert_array_equal(graph.begin(NetworkInputs(x, fit, None)).wait(), x)


@pytest.mark.parametrize(
    ("threads", "parts"),
    [(1, [1, 1, 1, 1]), (2, [1, 2, 2, 2]), (3, [1, 1, 3, 1]), (4, [1, 2, 2, 4]), (16, [1, 2, 2, 4])],
)
def test_rows_are_split_into_equal_parts_that_share_threads_evenly(threads: int, parts: list[int]) -> None:
    assert [equal_parts(rows, threads) for rows in (4, 8, 12, 64)] == parts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_are_bit_identical_in_parts(exports: Exports, backends: Backends, precision: str) -> None:
    uncut = backends[f"openvino {precision}"]
    options = with_options(max_rows=8, batch_sizes=(2, 8), precision=precision)
    network = OpenVinoBackend(exports.bundled(), options)
    assert network.graph.parts(8) == equal_parts(8, min(2, os.cpu_count() or 1))
    rows = rows_at(network, np.linspace(0, 999.75, 8))
    together = network(rows)
    for part in (slice(0, 4), slice(4, 8)):
        np.testing.assert_array_equal(together[part], uncut(take_rows(rows, part)))


def test_openvino_reads_no_labels_of_an_earlier_call(backends: Backends) -> None:
    backend = backends["openvino fp32"]
    rows = rows_at(backend, np.array([500]))
    backend(rows)
    with pytest.raises(ValueError, match="the graph reads x_t, emb_t, y; got x_t, emb_t"):
        backend(rows._replace(y=None))


def test_it_accepts_arrays_that_are_not_contiguous(backend: ArtifactBackend) -> None:
    rows = rows_at(backend, np.linspace(0, 999.75, 4))
    assert rows.y is not None
    turned = NetworkInputs(np.asfortranarray(rows.x_t), np.asfortranarray(rows.emb_t), np.repeat(rows.y, 2)[::2])
    np.testing.assert_array_equal(backend(turned), backend(rows))


def test_its_network_id_has_everything_that_its_results_depend_on(
    backend: ArtifactBackend, reference: TorchBackend
) -> None:
    kind = f"{type(backend).__name__.removesuffix('Backend').lower()} {precision_of(backend)}"
    assert set(kind.split()) <= set(backend.description.split())
    assert (backend.threads, backend.config) == (2, reference.config)


def test_every_backend_and_precision_has_its_own_network_id(exports: Exports, reference: TorchBackend) -> None:
    model = open_artifact(exports.bundled(), "any")
    of_kinds = [model.network_id(kind) for kind in KINDS]
    assert len({*of_kinds, reference.network_id}) == len(KINDS) + 1


def test_the_processor_is_part_of_the_network_id(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_artifact(exports.bundled(), "openvino")
    here = model.network_id("somewhere")
    monkeypatch.setattr("service.backends.artifact_model.vector_instructions", lambda: ("abacus",))
    assert model.network_id("somewhere") != here


@pytest.mark.parametrize(
    ("name", "changes", "rule"),
    [
        ("openvino", {"precision": "fp16"}, "backend 'openvino' computes in fp32 or bf16; got precision 'fp16'"),
        ("onnxruntime", {"precision": "fp16"}, "backend 'onnxruntime' computes in fp32; got precision 'fp16'"),
        ("onnxruntime", {"precision": "bf16"}, "backend 'onnxruntime' computes in fp32; got precision 'bf16'"),
        ("openvino", {"device": "cuda"}, "backend 'openvino' runs on the CPU; device must be auto or cpu; got 'cuda'"),
        ("onnxruntime", {"device": "cuda:1"}, "device must be auto or cpu; got 'cuda:1'"),
        ("openvino", {"torch_compile": True}, "torch_compile is for backend 'torch'"),
        ("onnxruntime", {"torch_compile": True}, "torch_compile is for backend 'torch'"),
    ],
)
def test_unsupported_options_are_refused(exports: Exports, name: str, changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ModelError) as refused:
        load_denoiser(exports.bundled(), name, with_options(**changes))
    assert rule in str(refused.value)


def test_bfloat16_that_is_too_far_from_torch_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_backend, "bfloat16_is_fast", lambda: True)
    assert choose_precision(open_artifact(with_bfloat16(artifact), "openvino"), "auto") == "bf16"
    model = open_artifact(with_bfloat16(artifact, error=0.1), "openvino")
    with pytest.raises(ModelError, match=r"openvino in bf16 is too far from PyTorch"):
        choose_precision(model, "bf16")
    assert choose_precision(model, "auto") == "fp32"


def test_auto_is_float32_where_bfloat16_is_emulated(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_backend, "bfloat16_is_fast", lambda: False)
    model = open_artifact(with_bfloat16(artifact), "openvino")
    assert choose_precision(model, "auto") == "fp32"
    assert choose_precision(model, "bf16") == "bf16"


def test_bfloat16_without_parity_is_not_served_and_a_warning_is_logged(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(openvino_backend, "bfloat16_is_fast", lambda: True)
    reason = "OpenVINO computes in f32 on this processor, and not in bf16"
    parity = [p for p in read_artifact(artifact).parity if p.precision == "fp32"]
    missing = NotMeasured(backend="openvino 2026.4.1", precision="bf16", reason=reason)
    edit_manifest(artifact, parity=parity, not_measured=[missing])
    model = open_artifact(artifact, "openvino")
    assert choose_precision(model, "auto") == "fp32"
    assert "no parity of openvino in bf16; export the checkpoint again on a processor with bf16" in caplog.text
    with pytest.raises(ModelError, match=rf"in bf16 \(where it was exported, {reason}\); export the checkpoint again"):
        choose_precision(model, "bf16")


def test_a_parity_of_bfloat16_measured_in_float32_is_ignored(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_backend, "bfloat16_is_fast", lambda: True)
    model = open_artifact(with_bfloat16(artifact, error=1.6e-6), "openvino")  # from an export that did not check
    assert choose_precision(model, "auto") == "fp32"
    with pytest.raises(ModelError, match="the manifest has no parity of openvino in bf16; export the checkpoint again"):
        choose_precision(model, "bf16")


@pytest.mark.parametrize("capabilities", [["FP32", "INT8"], ["FP32", "BF16"]])
def test_bfloat16_is_fast_if_processor_and_openvino_support_it(
    capabilities: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: capabilities)
    for instructions in (("x86_64", "avx512_bf16"), ("x86_64", "avx2"), ("aarch64", "bf16")):
        monkeypatch.setattr(openvino_backend, "vector_instructions", lambda has=instructions: has)
        assert bfloat16_is_fast() == ("BF16" in capabilities and has_bfloat16(instructions))


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_precision_without_parity_is_not_served(artifact: Path, precision: str) -> None:
    edit_manifest(artifact, parity=[p for p in read_artifact(artifact).parity if "onnxruntime" in p.backend])
    with pytest.raises(ModelError, match="the manifest has no parity of openvino in fp32; export the checkpoint again"):
        OpenVinoBackend(artifact, with_options(precision=precision))


def test_onnxruntime_needs_a_float32_graph(artifact: Path) -> None:
    parity = [p for p in read_artifact(with_bfloat16(artifact)).parity if p.precision == "bf16"]
    edit_manifest(artifact, precision="bf16", parity=parity, chains=[])
    with pytest.raises(ModelError, match="needs an artifact exported with --precision fp32"):
        OnnxRuntimeBackend(artifact, PLAIN)
    assert choose_precision(open_artifact(artifact, "openvino"), "auto") == "bf16"


def test_onnxruntime_needs_a_parity_of_its_own(artifact: Path) -> None:
    edit_manifest(artifact, parity=[p for p in read_artifact(artifact).parity if "openvino" in p.backend])
    with pytest.raises(ModelError, match="the manifest has no parity of onnxruntime in fp32"):
        OnnxRuntimeBackend(artifact, PLAIN)


def test_bfloat16_is_refused_on_a_processor_without_it(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_graph, "compile_settings", lambda *_: {"INFERENCE_PRECISION_HINT": "f32"})
    with pytest.raises(ModelError, match="OpenVINO computes in f32 on this processor, and not in bf16"):
        OpenVinoBackend(with_bfloat16(artifact), with_options(precision="bf16"))


def test_files_that_cannot_be_read_are_model_errors(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> None:
        raise PermissionError(13, "Permission denied", "model.onnx")

    monkeypatch.setattr(artifact_model, "read_artifact", fails)
    with pytest.raises(ModelError, match=r"cannot be read: .*Permission denied: 'model\.onnx'"):
        load_denoiser(artifact, "openvino", PLAIN)
    with pytest.raises(ModelError, match=r"no backend can serve .* openvino: .*Permission denied"):
        load_denoiser(artifact, "auto", PLAIN)
    monkeypatch.setattr(select, "find_artifact", fails)
    with pytest.raises(ModelError, match="cannot be read: "):
        load_denoiser(artifact, "auto", PLAIN)


def test_the_network_id_depends_on_the_configuration(artifact: Path) -> None:
    before = OnnxRuntimeBackend(artifact, PLAIN).network_id
    checkpoint = read_artifact(artifact).checkpoint
    edit_manifest(artifact, checkpoint=checkpoint.replace(diffusion=checkpoint.diffusion.replace(num_timesteps=500)))
    assert OnnxRuntimeBackend(artifact, PLAIN).network_id != before


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_file_that_is_no_graph_is_refused(artifact: Path, name: str) -> None:
    (artifact / MODEL_FILE).write_bytes(b"no graph")
    content = json.loads((artifact / MANIFEST_FILE).read_text())
    content["files"][MODEL_FILE] = file_entry(artifact / MODEL_FILE).model_dump()
    (artifact / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"model\.onnx: .* cannot (load|compile) it"):
        load_denoiser(artifact, name, PLAIN)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_the_error_for_a_missing_artifact_has_the_command_to_export_it(tmp_path: Path, name: str) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    with pytest.raises(ModelError, match=rf"backend '{name}' serves exported artifacts, .* has none: iddpm export "):
        load_denoiser(folder, name, PLAIN)


def test_threads_are_those_requested_or_one_per_available_core(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_threads(3) == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert cpu_threads(None) == 3


class TestAuto:
    """The backend that `auto` chooses."""

    @pytest.mark.parametrize(
        ("has_artifact", "device", "has_gpu", "expected"),
        [
            (True, "auto", False, ["openvino auto", "onnxruntime auto", "torch auto"]),
            (True, "cpu", False, ["openvino cpu", "onnxruntime cpu", "torch cpu"]),
            (True, "cpu", True, ["openvino cpu", "onnxruntime cpu", "torch cpu"]),
            (True, "auto", True, ["torch cuda", "openvino auto", "onnxruntime auto", "torch cpu"]),
            (True, "cuda:1", True, ["torch cuda:1"]),
            (True, "cuda", False, ["torch cuda"]),
            (False, "auto", False, ["torch auto"]),
            (False, "auto", True, ["torch cuda", "torch cpu"]),
        ],
    )
    def test_order(
        self, tmp_path: Path, artifact: Path, has_artifact: bool, device: str, has_gpu: bool, expected: list[str]
    ) -> None:
        found = preference(artifact if has_artifact else tmp_path, device, has_gpu)
        assert [" ".join(place) for place in found] == expected

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_auto_serves_an_artifact_if_torch_cannot_use_the_gpu(
        self, exports: Exports, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(select, "NVIDIA_DEVICE", Path("/dev/null"))
        folder = Path(shutil.copytree(exports.checkpoint(), tmp_path / "model"))
        options = with_options(max_rows=2, device="auto")
        assert isinstance(load_denoiser(folder, "auto", options), OpenVinoBackend)
        assert "passed over torch: device 'cuda': torch" in caplog.text
        shutil.rmtree(folder / "artifact")
        assert isinstance(load_denoiser(folder, "auto", options), TorchBackend)

    def test_it_chooses_the_fastest_and_logs_the_reason(self, artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            denoiser = load_denoiser(artifact, "auto", with_options(max_rows=2))
        assert isinstance(denoiser, OpenVinoBackend)
        assert f"backend auto: {denoiser.description}, the fastest for this machine" in caplog.text

    def test_it_skips_backends_that_fail_to_load(
        self, artifact: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        absent = Backend(module="service.backends.none", factory="None", requires="no_such_runtime")
        monkeypatch.setitem(BACKENDS, "openvino", absent)
        with caplog.at_level(logging.INFO):
            denoiser = load_denoiser(artifact, "auto", with_options(max_rows=2))
        assert isinstance(denoiser, OnnxRuntimeBackend)
        assert (
            "passed over openvino: backend 'openvino' needs no_such_runtime, which is not installed: pip" in caplog.text
        )

    def test_it_skips_backends_that_fail_to_be_imported(
        self, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "broken_runtime.py").write_text("raise ImportError('libbroken.so.1: cannot open shared object')")
        monkeypatch.syspath_prepend(tmp_path)
        broken = Backend(module="service.backends.none", factory="None", requires="broken_runtime")
        monkeypatch.setitem(BACKENDS, "openvino", broken)
        with caplog.at_level(logging.INFO):
            assert isinstance(load_denoiser(artifact, "auto", with_options(max_rows=2)), OnnxRuntimeBackend)
        assert "broken_runtime is installed but cannot be imported: libbroken.so.1: cannot open" in caplog.text

    def test_it_skips_backends_that_fail_their_self_test(
        self, artifact: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails_for_openvino(denoiser: Any, width: int) -> tuple[int, ...]:
            if isinstance(denoiser, OpenVinoBackend):
                raise RuntimeError("a row's result depends on its place in the batch")
            return invariant_batch_sizes(denoiser, width)

        monkeypatch.setattr(select, "invariant_batch_sizes", fails_for_openvino)
        with caplog.at_level(logging.INFO):
            assert isinstance(load_denoiser(artifact, "auto", with_options(max_rows=2)), OnnxRuntimeBackend)
        assert "passed over openvino: a row's result depends on its place" in caplog.text

    def test_it_serves_the_checkpoint_of_a_damaged_artifact_and_logs_the_reason(
        self, exports: Exports, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = Path(shutil.copytree(exports.checkpoint(), tmp_path / "model"))
        graph = folder / "artifact" / MODEL_FILE
        graph.write_bytes(graph.read_bytes()[:-1])
        with caplog.at_level(logging.INFO):
            assert isinstance(load_denoiser(folder, "auto", with_options(max_rows=2)), TorchBackend)
        assert "it is damaged" in caplog.text

    def test_the_error_lists_the_reasons_if_no_backend_can_serve(self, artifact: Path) -> None:
        (artifact / MODEL_FILE).unlink()
        with pytest.raises(ModelError) as refused:
            load_denoiser(artifact, "auto", PLAIN)
        for reason in ("no backend can serve", "openvino: ", "onnxruntime: ", "torch: ", "has no config.json"):
            assert reason in str(refused.value)

    def test_a_checkpoint_without_artifact_is_served_by_torch(self, tmp_path: Path) -> None:
        folder = tiny_checkpoint(tmp_path / "tiny")
        assert isinstance(load_denoiser(folder, "auto", PLAIN), TorchBackend)

    def test_an_artifact_without_checkpoint_needs_no_torch(self, artifact: Path) -> None:
        code = f"""
            from pathlib import Path
            from service.backends.base import BackendOptions, Denoiser, FailureKind
            from service.backends.select import load_denoiser
            from service.errors import ModelError

            options = BackendOptions(max_rows=2, threads=1, cache_dir="")
            for name in ("auto", "onnxruntime"):
                print(load_denoiser(Path({str(artifact)!r}), name, options).description.split()[0])
            try:
                load_denoiser(Path({str(artifact)!r}), "torch", options)
            except ModelError as error:
                print(error)
        """  # noqa: S608  # no SQL
        assert without_torch(code).splitlines() == [
            "openvino",
            "onnxruntime",
            "backend 'torch' needs torch, which is not installed: "
            "pip install -c constraints.txt -e '.[torch]' (in a checkout of iddpm)",
        ]


def test_the_self_test_excludes_sizes_of_a_compiled_backend_that_differ(exports: Exports) -> None:
    honest = OpenVinoBackend(exports.bundled(), with_options(precision="fp32", max_rows=4))
    dependent = BatchDependent(honest, {2})
    dependent.batch_sizes = honest.batch_sizes
    assert invariant_batch_sizes(dependent, 4) == (1, 4)


class TestCompileCache:
    """The folder of compiled graphs."""

    def test_it_is_the_user_s_folder_or_the_requested_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert compile_cache(None) == tmp_path / "xdg" / "iddpm" / "openvino"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert compile_cache(None) == tmp_path / "home" / ".cache" / "iddpm" / "openvino"
        assert compile_cache(str(tmp_path / "deep" / "mine")) == tmp_path / "deep" / "mine"
        assert (tmp_path / "deep" / "mine").is_dir()
        assert compile_cache("") is None

    def test_an_unusable_folder_is_an_error_only_if_it_was_requested(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ModelError, match="cache_dir cannot be used: "):
            compile_cache(str(tmp_path / "file" / "inside"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert compile_cache(None) is None

    def test_a_user_without_a_home_has_no_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", homeless)
        assert compile_cache(None) is None
        assert compile_cache(str(tmp_path / "mine")) == tmp_path / "mine"

    def test_a_second_start_from_the_cache_is_bit_identical(self, artifact: Path, tmp_path: Path) -> None:
        options = with_options(max_rows=2, precision="fp32", cache_dir=str(tmp_path / "cache"))
        rng = np.random.default_rng(0)
        first = OpenVinoBackend(artifact, options)
        assert list((tmp_path / "cache").iterdir())
        second = OpenVinoBackend(artifact, options)
        inputs = NetworkInputs(
            rng.standard_normal((2, 3, 8, 8)).astype(np.float32),
            first.embed_timesteps(np.array([1, 900], dtype=np.float32)),
            np.array([1, 2]),
        )
        np.testing.assert_array_equal(first(inputs), second(inputs))


X86 = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu sse sse4_2 avx2 fma avx512_bf16 amx_bf16 sha_ni\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd fphp asimdhp sve bf16 svebf16 crc32\n"


class TestProcessor:
    """The instructions listed in /proc/cpuinfo."""

    @pytest.mark.parametrize(
        ("text", "expected", "low"),
        [
            (X86, ["amx_bf16", "avx2", "avx512_bf16", "fma", "sse", "sse4_2"], True),
            (X86.replace("avx512_bf16 amx_bf16", ""), ["avx2", "fma", "sse", "sse4_2"], False),
            (ARM, ["asimd", "asimdhp", "bf16", "fphp", "sve", "svebf16"], True),
            (ARM.replace("bf16 svebf16", ""), ["asimd", "asimdhp", "fphp", "sve"], False),
            ("processor: 0\n", [], False),
            ("", [], False),
        ],
    )
    def test_vector_instructions(self, tmp_path: Path, text: str, expected: list[str], low: bool) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        machine, *found = vector_instructions(tmp_path / "cpuinfo", {})
        assert machine == platform.machine()
        assert found == expected
        assert has_bfloat16((machine, *found)) == low

    def test_without_cpuinfo(self, tmp_path: Path) -> None:
        found = vector_instructions(tmp_path / "nowhere", {})
        assert found == (platform.machine(), platform.processor())
        assert not has_bfloat16(found)

    @pytest.mark.parametrize(
        ("limits", "low"),
        [
            ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
            ({"DNNL_MAX_CPU_ISA": "avx512_core"}, False),
            ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
            ({"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, True),
            ({"ONEDNN_MAX_CPU_ISA": "", "DNNL_MAX_CPU_ISA": "AVX2"}, False),
            ({"ATEN_CPU_CAPABILITY": "avx2", "NPY_DISABLE_CPU_FEATURES": "X86_V4"}, True),
            ({"HOME": "/"}, True),
        ],
    )
    def test_instruction_set_limits_of_the_environment_apply(
        self, tmp_path: Path, limits: dict[str, str], low: bool
    ) -> None:
        (tmp_path / "cpuinfo").write_text(X86)
        found = vector_instructions(tmp_path / "cpuinfo", limits)
        assert has_bfloat16(found) == low
        plain = vector_instructions(tmp_path / "cpuinfo", {})
        assert found == (*plain, *(f"{name}={value}" for name, value in limits.items() if value and name != "HOME"))


def test_backends_of_artifacts_do_not_import_torch() -> None:
    assert "torch" in sys.modules  # in this process; hidden in the other
    code = "import service.backends.openvino_backend, service.backends.onnxruntime_backend; print('imported')"
    assert without_torch(code).strip() == "imported"


def test_a_signal_is_handled_after_backends_were_closed_in_any_order(exports: Exports) -> None:
    """Each openvino.Core replaces its thread's signal stack; two of them left a freed one behind."""
    script = (
        "import faulthandler, gc, signal, sys\n"
        "from pathlib import Path\n"
        "from service.backends.base import BackendOptions\n"
        "from service.backends.openvino_backend import OpenVinoBackend\n"
        "faulthandler.enable()  # gives the main thread a signal stack of its own\n"
        "options = BackendOptions(max_rows=1, batch_sizes=(1,), threads=1, precision='fp32', cache_dir='')\n"
        "first, second = (OpenVinoBackend(Path(sys.argv[1]), options) for _ in range(2))\n"
        "del first\n"
        "del second\n"
        "gc.collect()\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('handled'))\n"
        "signal.raise_signal(signal.SIGTERM)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(exports.bundled())], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr

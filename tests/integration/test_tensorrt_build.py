"""Engines built with the real TensorRT-RTX, which needs no GPU to build. To run them needs one; no test here does."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli.engines import build_engines
from formats.artifact import MODEL_FILE
from formats.folder_lock import folder_lock
from formats.precision import Precision
from formats.tensorrt_files import Target, Wanted, engine_folder, read_engine, unusable_engines
from formats.tensorrt_package import EngineError, logger_of
from model_export import tensorrt_build
from model_export.onnx_export import PRECISIONS, export_unet
from model_export.tensorrt_build import (
    TimingCache,
    build_engine,
    build_missing,
    find_target,
    fix_batch,
    network_precision,
    parse,
)
from tests.counts import LONG
from tests.fakes import tiny_config, tiny_network
from tests.tensorrt_fakes import wanted_of, write_artifact
from tests.waiting import until

trt: Any = pytest.importorskip("tensorrt_rtx")
onnx: Any = pytest.importorskip("onnx")

TYPES = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
EVERY_PRECISION = pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
SM89 = Target(flavour="tensorrt_rtx", version=trt.__version__, compute_capability="sm89")


@pytest.fixture(autouse=True)
def prefer_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use this package even where the other one is installed, too."""
    monkeypatch.setattr(tensorrt_build, "installed_flavour", lambda: "tensorrt_rtx")


def small_graph(precision: Precision = "fp32", operator: str = "Tanh") -> bytes:
    """Make a graph with the inputs and the output of the tiny UNet: a convolution, a table and a linear layer."""
    rng = np.random.default_rng(0)
    helper, config = onnx.helper, tiny_config().model
    kind = TYPES[precision]

    def weights(name: str, *shape: int) -> Any:
        values = rng.standard_normal(shape).astype(np.float32)
        return helper.make_tensor(name, onnx.TensorProto.FLOAT, shape, values.tobytes(), raw=True)

    def cast(name: str, to: int = kind) -> Any:
        return helper.make_node("Cast", [name], [f"{name}_cast"], to=to)

    nodes = [
        *(cast(name) for name in ("x_t", "emb_t", "kernel", "matrix", "table")),
        helper.make_node("Conv", ["x_t_cast", "kernel_cast"], ["convolved"], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["emb_t_cast", "matrix_cast"], ["embedded"]),
        helper.make_node("Gather", ["table_cast", "y"], ["labelled"]),
        helper.make_node("Add", ["embedded", "labelled"], ["condition"]),
        helper.make_node("Unsqueeze", ["condition", "axes"], ["spread"]),
        helper.make_node("Add", ["convolved", "spread"], ["sum"]),
        helper.make_node(operator, ["sum"], ["low"], name="the_last_one"),
        helper.make_node("Cast", ["low"], ["out"], to=onnx.TensorProto.FLOAT),
    ]
    size, channels = config.image_size, config.out_channels
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "small",
        [
            info("x_t", onnx.TensorProto.FLOAT, ["batch", config.image_channels, size, size]),
            info("emb_t", onnx.TensorProto.FLOAT, ["batch", config.emb_channels]),
            info("y", onnx.TensorProto.INT64, ["batch"]),
        ],
        [info("out", onnx.TensorProto.FLOAT, ["batch", channels, size, size])],
        [
            weights("kernel", channels, config.image_channels, 3, 3),
            weights("matrix", config.emb_channels, channels),
            weights("table", config.num_labels, channels),
            helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    return bytes(model.SerializeToString())


def artifact_of(folder: Path, graph: bytes, precision: Precision = "fp32") -> Wanted:
    return wanted_of(write_artifact(folder, tiny_config(), graph, precision, (1, 2)), SM89)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@EVERY_PRECISION
def test_an_engine_is_built_for_each_bucket_in_the_precision_of_the_graph(tmp_path: Path, precision: Precision) -> None:
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, small_graph(precision), precision)
    assert build_missing(folder, SM89) == (1, 2)
    assert names(folder / "tensorrt" / f"sm89-rtx-{trt.__version__}") == [
        ".lock",
        "1.json",
        "1.plan",
        "2.json",
        "2.plan",
    ]
    plans = []
    for bucket in (1, 2):
        record, plan = read_engine(folder / "tensorrt", wanted, bucket)
        assert (record.precision, record.bucket, record.target) == (precision, bucket, SM89)
        assert record.onnx_sha256 == wanted.onnx_sha256
        assert "TF32" not in record.flags
        assert "REQUIRE_USER_ALLOCATION" in record.flags
        plans.append(plan)
    assert plans[0] != plans[1]
    assert unusable_engines(folder / "tensorrt", wanted, (1, 2)) == {}


def test_only_unusable_engines_are_rebuilt(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, small_graph())
    notes: list[str] = []
    assert build_missing(folder, SM89, [1, 2], notify=notes.append) == (1, 2)
    assert build_missing(folder, SM89, [1, 2], notify=notes.append) == ()
    path = engine_folder(folder / "tensorrt", SM89) / "2.plan"
    path.write_bytes(path.read_bytes()[:-100])
    assert build_missing(folder, SM89, [1, 2], notify=notes.append) == (2,)
    assert [line.split(": ", 1)[0] for line in notes] == [
        f"building {SM89.name}, batches of {bucket}" for bucket in (1, 2, 2)
    ]
    assert notes[-1].endswith("it is damaged")
    read_engine(folder / "tensorrt", wanted, 2)


def test_a_second_builder_waits_for_the_first_and_builds_nothing_again(tmp_path: Path) -> None:
    wanted = artifact_of(tmp_path / "artifact", small_graph())
    store = tmp_path / "engines"
    engine_folder(store, SM89).mkdir(parents=True)
    notes: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with folder_lock(engine_folder(store, SM89)):
            second = pool.submit(build_missing, tmp_path / "artifact", SM89, [1], store=store, notify=notes.append)
            until(lambda: bool(notes))
            build_engine(tmp_path / "artifact", wanted, 1, store=store)
            assert not second.done()
        assert second.result() == ()
    (note,) = notes
    assert f"waiting for another process (process {os.getpid()} on " in note
    read_engine(store, wanted, 1)
    assert not (tmp_path / "artifact" / "tensorrt").exists()


def test_an_engine_of_another_graph_is_refused_and_replaced(tmp_path: Path) -> None:
    wanted = artifact_of(tmp_path / "old", small_graph())
    build_engine(tmp_path / "old", wanted, 1)
    new = artifact_of(tmp_path / "new", small_graph(operator="Sigmoid"))
    (tmp_path / "old" / "tensorrt").rename(tmp_path / "new" / "tensorrt")
    with pytest.raises(EngineError, match=r"1\.plan is stale: it was built from another graph"):
        read_engine(tmp_path / "new" / "tensorrt", new, 1)
    assert build_missing(tmp_path / "new", SM89, [1]) == (1,)
    read_engine(tmp_path / "new" / "tensorrt", new, 1)


def test_an_engine_of_another_gpu_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, small_graph())
    build_engine(folder, wanted, 1)
    sm120 = Wanted(SM89.replace(compute_capability="sm120"), wanted.precision, wanted.onnx_sha256)
    with pytest.raises(EngineError, match=f"the engines for {SM89.name} cannot be used here"):
        read_engine(folder / "tensorrt", sm120, 1)


def test_progress_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, small_graph())
    reported: dict[str, list[tuple[int, int]]] = {}
    build_engine(folder, wanted, 1, progress=lambda phase, done, of: reported.setdefault(phase, []).append((done, of)))
    assert len(reported) > 3
    whole = reported["Building engine"]
    assert whole[0] == (0, whole[0][1])
    assert whole[-1] == (whole[0][1], whole[0][1])
    assert [done for done, _ in whole] == sorted(done for done, _ in whole)


def test_the_command_line_shows_what_is_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, small_graph())
    build_engines(folder, folder / "tensorrt", SM89, (2,))
    read_engine(folder / "tensorrt", wanted, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"building {SM89.name}, batches of 2: ")
    assert any(line.startswith("  Building engine (") for line in lines[1:])


def test_an_exception_of_the_progress_callback_ends_the_build_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, small_graph())
    calls = []

    def interrupt(phase: str, done: int, of: int) -> None:
        calls.append(phase)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(folder, wanted, 1, progress=interrupt)
    assert len(calls) == 1
    assert not (folder / "tensorrt").exists()


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (b"no graph", r"model\.onnx cannot be parsed: .*[Ff]ailed to parse the ONNX model"),
        (
            small_graph(operator="NoSuchOperator"),
            r"model\.onnx cannot be parsed: node 'the_last_one' \(NoSuchOperator\): ",
        ),
    ],
    ids=["garbage", "unknown operator"],
)
def test_the_error_for_a_graph_that_cannot_be_parsed_has_the_reason(tmp_path: Path, graph: bytes, reason: str) -> None:
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, graph)
    with pytest.raises(EngineError, match=reason):
        build_engine(folder, wanted, 1)
    assert not (folder / "tensorrt").exists()


def test_the_error_for_an_engine_that_cannot_be_built_has_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, small_graph("bf16"), "bf16")
    turing = Wanted(SM89.replace(compute_capability="sm75"), "bf16", wanted.onnx_sha256)
    with pytest.raises(EngineError, match=r"batches of 1 on sm75-rtx-.*: TensorRT built nothing: .*b16"):
        build_engine(folder, turing, 1)
    assert not (folder / "tensorrt").exists()


def test_a_graph_of_another_precision_or_hash_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, small_graph("fp16"), "bf16")
    with pytest.raises(EngineError, match=r"model\.onnx computes in fp16; wanted is bf16"):
        build_engine(folder, wanted, 1)
    with pytest.raises(EngineError, match="is not the wanted graph: its sha256 is"):
        build_engine(folder, Wanted(SM89, "fp16", "0" * 64), 1)
    (folder / MODEL_FILE).unlink()
    with pytest.raises(EngineError, match=r"has no model\.onnx"):
        build_engine(folder, wanted, 1)


def test_a_gpu_that_the_package_does_not_build_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"builds for sm.*; got 'sm90' \(data-centre GPUs need the package"):
        find_target("sm90")
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, small_graph())
    hopper = Wanted(SM89.replace(compute_capability="sm90"), "fp32", wanted.onnx_sha256)
    with pytest.raises(EngineError, match="got 'sm90'"):
        build_engine(folder, hopper, 1)


def test_a_target_is_named_or_detected() -> None:
    assert find_target("sm89") == SM89
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match=r"name a compute capability \(such as sm89\) to build without a GPU"):
            find_target()


def test_a_target_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, small_graph())
    with pytest.raises(EngineError, match=r"needs tensorrt_rtx 1\.0; installed is"):
        build_engine(folder, Wanted(SM89.replace(version="1.0"), "fp32", wanted.onnx_sha256), 1)
    other = Target(flavour="tensorrt", version="10.8", compute_capability="sm90", gpu="H200")
    with pytest.raises(EngineError, match="needs the package tensorrt, which is not the one installed"):
        build_engine(folder, Wanted(other, "fp32", wanted.onnx_sha256), 1)


def test_a_graph_with_a_fixed_batch_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes(small_graph())
    network = parsed(tmp_path / MODEL_FILE)
    fix_batch(network, 2, tmp_path / MODEL_FILE)
    assert [tuple(network.get_input(k).shape) for k in range(3)] == [(2, 1, 8, 8), (2, 128), (2,)]
    assert tuple(network.get_output(0).shape) == (2, 2, 8, 8)
    with pytest.raises(EngineError, match=r"only the batch of input x_t may be dynamic; its shape is \(2, 1, 8, 8\)"):
        fix_batch(network, 4, tmp_path / MODEL_FILE)


def test_the_data_centre_build_detects_the_local_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the real package under the other's name, up to the point that needs a GPU."""
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, small_graph())
    target = Target(flavour="tensorrt", version=trt.__version__, compute_capability="sm90", gpu="H200")
    monkeypatch.setattr(tensorrt_build, "installed_flavour", lambda: "tensorrt")
    monkeypatch.setattr("importlib.import_module", lambda name: trt)
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="tensorrt builds for this machine's GPU, and torch finds none"):
            build_engine(folder, Wanted(target, "fp32", wanted.onnx_sha256), 1)


def test_a_timing_cache_is_kept(tmp_path: Path) -> None:
    """TensorRT-RTX still has these calls of the data-centre package; they have no effect and are deprecated."""
    path = tmp_path / "timing.cache"
    config = trt.Builder(logger_of(trt)).create_builder_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        TimingCache(config, path).save()
        first = path.read_bytes()
        assert first
        TimingCache(config, path).save()
    assert path.read_bytes() == first
    assert names(tmp_path) == ["timing.cache"]


def test_a_timing_cache_of_another_gpu_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Cache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> bytes:
            return self.content + b" and what was measured"

    class Config:
        """A fake of the builder's configuration that accepts empty caches only."""

        def create_timing_cache(self, content: bytes) -> Cache:
            return Cache(content)

        def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
            return not cache.content and not ignore_mismatch

    path = tmp_path / "timing.cache"
    path.write_bytes(b"foreign")
    TimingCache(Config(), path).save()
    assert path.read_bytes() == b" and what was measured"
    assert "of another GPU or version; kernels are measured again" in caplog.text


def parsed(path: Path) -> Any:
    logger = logger_of(trt)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(trt, logger, network, path)
    return network


@pytest.mark.skipif(not LONG, reason="exporting a UNet takes half a minute: IDDPM_TEST_LONG=1")
@EVERY_PRECISION
def test_a_unet_is_built(tmp_path: Path, precision: Precision) -> None:
    graph = tmp_path / MODEL_FILE
    export_unet(tiny_network(tiny_config()), graph, PRECISIONS[precision])
    assert network_precision(trt, parsed(graph)) == precision
    folder = tmp_path / "artifact"
    wanted = artifact_of(folder, graph.read_bytes(), precision)
    assert build_missing(folder, SM89) == (1, 2)
    for bucket in (1, 2):
        assert read_engine(folder / "tensorrt", wanted, bucket)[0].plan.size > 0

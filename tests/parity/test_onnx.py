"""Exported graphs compared with their networks, in the runtimes that serve them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from diffusion.classifier import Classifier, classifier_gradient
from diffusion.config import ClassifierConfig, ClassifierPool, ModelConfig
from diffusion.unet import UNet
from model_export import onnx_export
from model_export.onnx_export import OPSET, PRECISIONS, export_classifier, export_classifier_gradient, export_unet
from model_export.parity import LIMITS
from model_export.runtimes import Graph, Runtime, runtimes_for
from tests import bfloat16, golden
from tests.counts import LONG
from tests.exports import CLASSIFIER, EXPORTED, GRADIENT, Exports
from tests.networks import random_classifier
from tests.parity.test_networks import CLASSIFIERS, UNETS
from tests.paths import ROOT

Inputs = dict[str, npt.NDArray[Any]]

SOME_UNETS = UNETS if LONG else (EXPORTED,)
SOME_LOGITS = CLASSIFIERS if LONG else ()
SOME_GRADIENTS = CLASSIFIERS if LONG else ()
LONG_ONLY = pytest.mark.skipif(not LONG, reason="traces more graphs: IDDPM_TEST_LONG=1")
SIZES = (1, 2, 3, 5, 7, 17)
FLOATS = {
    "fp32": onnx.TensorProto.FLOAT,
    "bf16": onnx.TensorProto.BFLOAT16,
    "fp16": onnx.TensorProto.FLOAT16,
}


def name_of(runtime: Runtime) -> str:
    return f"{runtime.backend.split(' ')[0]}-{runtime.precision}"


RUNTIMES = pytest.mark.parametrize("runtime", runtimes_for("fp32"), ids=name_of)
FP32 = [runtime for runtime in runtimes_for("fp32") if runtime.precision == "fp32"]
FP32_RUNTIMES = pytest.mark.parametrize("runtime", FP32, ids=name_of)


def open_here(runtime: Runtime, path: Path) -> Graph:
    """Open a graph; skip the test if the processor does not have the runtime's precision."""
    if runtime.precision == "bf16":
        bfloat16.need_in_openvino()
    return runtime.open(path)


def relative(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    return float(np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected))


def inputs_of(network: UNet | Classifier, rows: int, *, labels: bool = True) -> Inputs:
    """Make noise at fractional timesteps from the complete chain; emb_t is the network's own."""
    config = network.config
    rng = np.random.default_rng(rows)
    t = torch.linspace(0.25, 999.75, rows + 1)[:rows]
    inputs: Inputs = {
        "x_t": rng.standard_normal((rows, *config.image_shape)),
        "emb_t": network.embed_timesteps(t).numpy(),
    }
    if labels and config.num_classes is not None:
        inputs["y"] = rng.integers(config.num_classes, size=rows)
    if isinstance(config, ModelConfig) and config.cond_shape is not None:
        inputs["cond"] = rng.uniform(-1, 1, (rows, *config.cond_shape))
    return {name: a if a.dtype == np.int64 else a.astype(np.float32) for name, a in inputs.items()}


def expected_of(network: UNet | Classifier, inputs: Inputs) -> npt.NDArray[Any]:
    with torch.no_grad():
        return network.forward_emb(**{name: torch.from_numpy(a) for name, a in inputs.items()}).numpy()


def repeat_row(inputs: Inputs, row: int, rows: int) -> Inputs:
    return {name: np.repeat(a[row : row + 1], rows, axis=0) for name, a in inputs.items()}


def check_rows(graph: Graph, make: Callable[[int], Inputs], runtime: Runtime) -> None:
    """Check that a repeated row gives equal rows, and the same as alone."""
    inputs = make(5)
    alone = graph(repeat_row(inputs, 3, 1))
    for rows in (2, 4, 8):
        together = graph(repeat_row(inputs, 3, rows))
        assert (together == together[:1]).all(), runtime
    np.testing.assert_allclose(together[:1], alone, rtol=0, atol=LIMITS[runtime.precision] * np.abs(alone).max())


@RUNTIMES
@pytest.mark.parametrize("name", SOME_UNETS)
def test_a_unet_gives_what_pytorch_gives(exports: Exports, name: str, runtime: Runtime) -> None:
    network, graph = golden.network(name), open_here(runtime, exports.unet(name))
    trained = golden.load(name).config["trained_on_toy_images"]
    # random weights amplify every error: the limit of bfloat16 applies to the trained network
    limit = LIMITS[runtime.precision] * (1 if trained or runtime.precision == "fp32" else 3)
    for rows in SIZES:
        inputs = inputs_of(network, rows)
        assert relative(graph(inputs), expected_of(network, inputs)) < limit, rows
    check_rows(graph, lambda rows: inputs_of(network, rows), runtime)


@LONG_ONLY
@RUNTIMES
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_gives_what_pytorch_gives(exports: Exports, name: str, runtime: Runtime) -> None:
    classifier, graph = golden.classifier(name), open_here(runtime, exports.logits(name))
    for rows in SIZES:
        inputs = inputs_of(classifier, rows, labels=False)
        error = relative(graph(inputs), expected_of(classifier, inputs))
        assert error < LIMITS[runtime.precision], rows
    check_rows(graph, lambda rows: inputs_of(classifier, rows, labels=False), runtime)


@LONG_ONLY
@FP32_RUNTIMES
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_s_gradient_is_pytorch_s(exports: Exports, name: str, runtime: Runtime) -> None:
    check_gradient(golden.classifier(name), runtime, exports.gradient(name), SIZES)


POOLS = get_args(ClassifierPool)


@pytest.mark.parametrize("pool", POOLS if LONG else ["spatial_v2"])
def test_the_gradient_of_every_pool_is_pytorch_s(tmp_path: Path, pool: ClassifierPool) -> None:
    # No golden classifier has pool `spatial_v2`; these are small, so that tracing takes seconds
    config = ClassifierConfig(
        image_size=8,
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        num_head_channels=32,
        num_classes=5,
        pool=pool,
    )
    classifier = random_classifier(config)
    export_classifier_gradient(classifier, tmp_path / "gradient.onnx")
    for runtime in FP32:
        check_gradient(classifier, runtime, tmp_path / "gradient.onnx", (1, 4))


def check_gradient(classifier: Classifier, runtime: Runtime, path: Path, sizes: Sequence[int]) -> None:
    graph = runtime.open(path)
    for rows in sizes:
        inputs = inputs_of(classifier, rows)
        x_t, emb_t, y = (torch.from_numpy(inputs[key]) for key in ("x_t", "emb_t", "y"))
        expected = classifier_gradient(partial(_of_embedding, classifier, emb_t), x_t, y, y, 1.0)
        assert relative(graph(inputs), expected.numpy()) < LIMITS["fp32"], (runtime, rows)
    inputs = inputs_of(classifier, 5)
    alone, together = (graph(repeat_row(inputs, 3, rows)) for rows in (1, 4))
    # ONNX Runtime gives rows of a gradient different last bits; a row still does not depend on the values of others
    same = LIMITS["fp32"] if "onnx" in runtime.backend else 1e-30
    assert relative(together, np.repeat(alone, 4, axis=0)) < same, runtime


@LONG_ONLY
@FP32_RUNTIMES
def test_the_gradient_that_tests_read_is_the_one_that_is_exported(exports: Exports, runtime: Runtime) -> None:
    inputs = inputs_of(golden.classifier(CLASSIFIER), 3)
    read, traced = (runtime.open(path)(inputs) for path in (GRADIENT, exports.gradient(CLASSIFIER)))
    np.testing.assert_array_equal(read, traced)


def _of_embedding(classifier: Classifier, emb_t: torch.Tensor, x_t: torch.Tensor, _t: torch.Tensor) -> torch.Tensor:
    return classifier.forward_emb(x_t, emb_t)


def graphs(exports: Exports) -> dict[Path, tuple[list[str], str]]:
    """Return every exported graph with the names of its inputs and its output."""
    found: dict[Path, tuple[list[str], str]] = {}
    for name in SOME_UNETS:
        config = golden.model_config(name)
        extra = [("y", config.num_classes), ("cond", config.cond_shape)]
        found[exports.unet(name)] = ["x_t", "emb_t", *(key for key, value in extra if value is not None)], "out"
    for name in SOME_LOGITS:
        found[exports.logits(name)] = ["x_t", "emb_t"], "logits"
    for name in SOME_GRADIENTS:
        found[exports.gradient(name)] = ["x_t", "emb_t", "y"], "gradient"
    return found


def test_names_types_and_opset_are_fixed_and_only_the_batch_is_open(exports: Exports) -> None:
    for path, (inputs, output) in graphs(exports).items():
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert [value.name for value in model.graph.input] == inputs
        assert [value.name for value in model.graph.output] == [output]
        for value in [*model.graph.input, *model.graph.output]:
            kind = value.type.tensor_type
            assert kind.elem_type == (onnx.TensorProto.INT64 if value.name == "y" else onnx.TensorProto.FLOAT)
            batch, *others = kind.shape.dim
            assert batch.dim_param == "batch"
            assert all(extent.dim_value > 0 for extent in others)


def test_a_graph_contains_no_path_of_its_machine(exports: Exports) -> None:
    for path in graphs(exports):
        content = path.read_bytes()
        for trace in (str(ROOT).encode(), b"site-packages", b".py", b"pkg.", b"torch", str(Path.home()).encode()):
            # a short word may occur in a megabyte of weights by chance: search it outside of the weights
            assert trace not in content or not _named(path, trace), (path, trace)
        model = onnx.load(path)
        assert (model.producer_name, model.producer_version, model.domain, model.doc_string) == ("", "", "", "")
        assert not model.metadata_props
        assert not model.graph.doc_string
        assert not model.graph.metadata_props
        assert not model.graph.value_info
        assert not model.functions
        for part in [*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output]:
            assert not part.doc_string
            assert not part.metadata_props


def _named(path: Path, trace: bytes) -> bool:
    """Return whether a text occurs in a graph outside its weights."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
    for node in model.graph.node:
        for attribute in node.attribute:
            attribute.t.ClearField("raw_data")
    return trace in model.SerializeToString()


@LONG_ONLY
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_graph_of_lower_precision_computes_in_it(exports: Exports, precision: str) -> None:
    path = exports.unet(EXPORTED, precision)
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    assert {value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]} == {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert convolutions
    for node in convolutions:
        assert {types[name] for name in [*node.input, *node.output]} == {FLOATS[precision]}
    for node in model.graph.node:
        if node.op_type in ("Softmax", "ReduceMean", "ReduceL2", "Sqrt"):
            assert {types[name] for name in node.output} == {onnx.TensorProto.FLOAT}

    network = golden.network(EXPORTED)
    for runtime in runtimes_for("bf16" if precision == "bf16" else "fp16"):
        graph = open_here(runtime, path)
        for rows in (1, 3):
            inputs = inputs_of(network, rows)
            assert 1e-6 < relative(graph(inputs), expected_of(network, inputs)) < LIMITS[runtime.precision]


def test_precisions_are_those_of_artifacts() -> None:
    assert set(PRECISIONS) == set(LIMITS)


def test_weights_beyond_the_limit_of_protobuf_are_in_a_second_file(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "MAX_PROTOBUF", 10_000)
    path = tmp_path / "model.onnx"
    for _ in range(2):  # the second export replaces the first; nothing is appended
        onnx_export.write_model(onnx.load(exports.unet(EXPORTED)), path)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    weights = sum(len(tensor.raw_data) for tensor in onnx.load(exports.unet(EXPORTED)).graph.initializer)
    assert (tmp_path / "model.onnx.data").stat().st_size < weights * 1.1 + 100_000
    assert str(tmp_path).encode() not in path.read_bytes()

    network = golden.network(EXPORTED)
    inputs = inputs_of(network, 3)
    for runtime in FP32:
        np.testing.assert_array_equal(runtime.open(path)(inputs), runtime.open(exports.unet(EXPORTED))(inputs))


@LONG_ONLY
def test_exports_are_reproducible(exports: Exports, tmp_path: Path) -> None:
    export_unet(golden.network("imp_superres"), tmp_path / "unet.onnx")
    assert (tmp_path / "unet.onnx").read_bytes() == exports.unet("imp_superres").read_bytes()
    export_classifier(golden.classifier("clf_attention"), tmp_path / "classifier.onnx")
    assert (tmp_path / "classifier.onnx").read_bytes() == exports.logits("clf_attention").read_bytes()

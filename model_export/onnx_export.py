"""Write a network as an ONNX file: dynamic batch, fixed names and opset, the same bytes for the same input.

Graphs, all with the embedded timestep as an input (a raw t inside a bfloat16 graph is silently rounded):

    UNet                  x_t, emb_t[, y][, cond] -> out
    Classifier            x_t, emb_t                 -> logits
    Classifier's gradient x_t, emb_t, y              -> gradient
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from diffusion.classifier import Classifier
from diffusion.config import BackboneConfig
from diffusion.unet import UNet
from model_export.classifier_gradient import gradient_graph
from model_export.inference_graph import rewrite
from model_export.library_errors import library_call

OPSET = 22
"""Supported by every runtime; newer opsets have fused operations (GroupNormalization, Attention) that are slower."""
DATA_SUFFIX = ".data"
MAX_PROTOBUF = 2**31 - 2**24
"""Weights larger than this number of bytes are stored in a second file: protobuf's limit is 2 GiB."""
EXAMPLE_ROWS = 2
PYTORCH = f"PyTorch {torch.__version__}"

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_unet(network: UNet, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a UNet, super-resolution included.

    Args:
        network: in eval mode.
        path: the file; the weights of a network larger than 2 GiB are stored beside it, with the suffix `.data`.
        dtype: precision of the graph; inputs and output are always float32 (y: int64).

    Raises:
        LibraryError: PyTorch cannot trace or translate the network, or the ONNX checker rejects the result.
    """
    config = network.config
    examples = image_and_embedding(config)
    if config.num_classes is not None:
        examples["y"] = torch.arange(EXAMPLE_ROWS) % config.num_labels
    if config.cond_shape is not None:
        examples["cond"] = torch.zeros(EXAMPLE_ROWS, *config.cond_shape)
    export_graph(_UNetGraph(rewrite(network, dtype), tuple(examples)), examples, "out", path)


def export_classifier(classifier: Classifier, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a noisy classifier's logits; arguments as for `export_unet`."""
    export_graph(_ClassifierGraph(rewrite(classifier, dtype)), image_and_embedding(classifier.config), "logits", path)


def export_classifier_gradient(classifier: Classifier, path: Path) -> None:
    """Write the gradient of log p(y | x_t) with respect to x_t, in float32; arguments as for `export_unet`."""
    examples = image_and_embedding(classifier.config)
    examples["y"] = torch.arange(EXAMPLE_ROWS) % classifier.config.num_classes
    rewritten = rewrite(classifier)
    with library_call(PYTORCH, f"trace {path.name}", RuntimeError):
        graph = gradient_graph(rewritten, *examples.values())
    export_graph(graph, examples, "gradient", path)


class _UNetGraph(nn.Module):
    def __init__(self, network: UNet, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network.forward_emb(**dict(zip(self.names, inputs, strict=True)))


class _ClassifierGraph(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x_t: Tensor, emb_t: Tensor) -> Tensor:
        return self.classifier.forward_emb(x_t, emb_t)


def image_and_embedding(config: BackboneConfig) -> dict[str, Tensor]:
    """Return example inputs: x_t [EXAMPLE_ROWS, C, H, W] and emb_t [EXAMPLE_ROWS, E], zeros."""
    return {
        "x_t": torch.zeros(EXAMPLE_ROWS, *config.image_shape),
        "emb_t": torch.zeros(EXAMPLE_ROWS, config.emb_channels),
    }


def export_graph(graph: nn.Module, examples: dict[str, Tensor], output: str, path: Path) -> None:
    """Trace a module with example inputs by name, and write it with this output; the first dimension is free."""
    batch = torch.export.Dim.DYNAMIC
    shapes = tuple({0: batch} for _ in examples)
    with torch.no_grad(), _quiet(), library_call(PYTORCH, f"export {path.name}", RuntimeError):
        program = torch.onnx.export(
            graph.eval(),
            tuple(examples.values()),
            dynamo=True,
            input_names=list(examples),
            output_names=[output],
            dynamic_shapes=(shapes,) if isinstance(graph, _UNetGraph) else shapes,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # noqa: S101  # dynamo=True returns one
    model = program.model_proto
    _strip(model)
    write_model(model, path)


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's metadata and source paths, and name the batch dimension."""
    for field in ("producer_name", "producer_version", "domain", "doc_string", "metadata_props"):
        model.ClearField(field)
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        graph.ClearField("doc_string")
        graph.ClearField("metadata_props")
        for node in graph.node:
            node.ClearField("doc_string")
            node.ClearField("metadata_props")
        graph.ClearField("value_info")
    values = [*model.graph.input, *model.graph.output]
    for entry in [*values, *model.graph.initializer]:
        entry.ClearField("doc_string")
        entry.ClearField("metadata_props")
    for value in values:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Check a graph and write it, with its weights beside it if they exceed `MAX_PROTOBUF` bytes."""
    data = path.with_name(path.name + DATA_SUFFIX)
    data.unlink(missing_ok=True)  # an existing file would be appended to
    # not ByteSize(), which serialises and therefore fails above the limit
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > MAX_PROTOBUF:
        onnx.save_model(model, path, save_as_external_data=True, location=data.name)
        _check(path, path.name)
    else:
        _check(model, path.name)
        path.write_bytes(model.SerializeToString(deterministic=True))


def _check(model: onnx.ModelProto | Path, name: str) -> None:
    refusals = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
    with library_call(f"onnx.checker {onnx.__version__}", f"verify {name}", *refusals):
        onnx.checker.check_model(model, full_check=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's output and log lines; its errors are raised as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""Networks that compute features of images, from files that the user names. Nothing is downloaded.

Three kinds of files: the Inception weights of torch-fidelity, a TorchScript file, an ONNX file. A TorchScript file
contains code that runs with the rights of this process. Only the evaluation loads such files; the service never does.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from formats.file_content import describe_wrong_content
from formats.images import Uint8Array
from trainer.evaluation.errors import EvaluationError

Float32Array = npt.NDArray[np.float32]

OUTPUTS = ("features", "logits", "spatial")
"""Outputs of a network by position; outputs with other names are ignored if one has the name `features`."""
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
WHERE_INCEPTION_IS = f"the Inception weights are at {INCEPTION_SOURCE} (sha256 {INCEPTION_SHA256})"
SPATIAL_CHANNELS = 7
"""Channels of Inception's spatial features that the sFID uses, as in guided-diffusion's evaluator."""


class Extracted(NamedTuple):
    """Outputs of a network for N images, float32."""

    features: Float32Array
    """[N, D], for FID, KID, precision and recall."""
    logits: Float32Array | None
    """[N, K], for the Inception score."""
    spatial: Float32Array | None
    """[N, S], for the sFID."""


class Extractor(Protocol):
    """A network that computes features."""

    description: dict[str, str]
    """Kind, file name, sha256 and preprocessing: what features depend on."""

    def __call__(self, pixels: Uint8Array) -> Extracted:
        """Compute the features of images [N, H, W, C]."""
        ...


def open_extractor(
    path: Path, *, value_range: tuple[float, float] = (-1.0, 1.0), channels: int | None = None
) -> Extractor:
    """Open a file with a network that computes features.

    Args:
        path: `.onnx`: an ONNX graph; `.pth`: torch-fidelity's Inception weights; `.pt`, `.ts`, `.torchscript`, `.jit`:
            TorchScript.
        value_range: of a TorchScript or ONNX network's input [N, C, H, W]: the values of black and white.
        channels: of a TorchScript network's input; grey images are repeated. None: as many as the images have. An ONNX
            file declares them.

    Raises:
        EvaluationError: the file is missing, damaged or of another kind, or a package is missing.
    """
    if not path.is_file():
        raise EvaluationError(f"--features {path} does not exist; {WHERE_INCEPTION_IS}")
    if problem := describe_wrong_content(path):
        raise EvaluationError(f"--features {path} {problem}; {WHERE_INCEPTION_IS}")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    low, high = value_range
    if not low < high:
        raise EvaluationError(f"--features-range must be two rising numbers; got {low:g},{high:g}")
    match path.suffix.lower():
        case ".onnx":
            return OnnxExtractor(path, sha256, value_range)
        case ".pth":
            return InceptionExtractor(path, sha256)
        case ".pt" | ".ts" | ".torchscript" | ".jit":
            return TorchScriptExtractor(path, sha256, value_range, channels)
    raise EvaluationError(f"--features must be a file .onnx, .pt, .ts, .torchscript, .jit or .pth; got {path}")


class OnnxExtractor:
    """An ONNX graph with one input [N, C, H, W]."""

    def __init__(self, path: Path, sha256: str, value_range: tuple[float, float]) -> None:
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors have no common class
            raise EvaluationError(f"--features {path} is not an ONNX file that can be run: {error}") from error
        self._path = path
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            shapes = ", ".join(f"{given.name} {given.shape}" for given in inputs)
            raise EvaluationError(f"--features {path} must have one input [N, C, H, W]; it has: {shapes}")
        self._input = inputs[0].name
        self._shape = [size if isinstance(size, int) else None for size in inputs[0].shape]
        self._names = [output.name for output in self._session.get_outputs()]
        self._range = value_range
        self.description = _described("onnx", path, sha256, value_range, self._shape[1])

    def __call__(self, pixels: Uint8Array) -> Extracted:
        """Compute the features of images [N, H, W, C]."""
        images = _scaled(pixels, self._range, self._shape[1])
        for axis, name in ((1, "channels"), (2, "height"), (3, "width")):
            if self._shape[axis] not in (None, images.shape[axis]):
                raise EvaluationError(
                    f"--features {self._path} takes images of {name} {self._shape[axis]}; these have "
                    f"{images.shape[axis]}: the network must scale them itself"
                )
        size = self._shape[0] or len(images)
        parts = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            fill = np.repeat(batch[-1:], size - len(batch), axis=0)  # a graph with a fixed batch size
            out = self._session.run(None, {self._input: np.concatenate([batch, fill])})
            parts.append([np.asarray(values)[: len(batch)] for values in out])
        outputs = [np.concatenate(values) for values in zip(*parts, strict=True)]
        return _named(dict(zip(self._names, outputs, strict=True)), self._path, len(images))


class TorchScriptExtractor:
    """A TorchScript module of images [N, C, H, W] that returns a tensor, a tuple or a dictionary of tensors."""

    def __init__(self, path: Path, sha256: str, value_range: tuple[float, float], channels: int | None) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self._module = torch.jit.load(path, map_location=_device()).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise EvaluationError(f"--features {path} is not a TorchScript file: {line}") from error
        self._path, self._range, self._channels = path, value_range, channels
        self.description = _described("torchscript", path, sha256, value_range, channels)

    @torch.no_grad()
    def __call__(self, pixels: Uint8Array) -> Extracted:
        """Compute the features of images [N, H, W, C]."""
        images = torch.from_numpy(_scaled(pixels, self._range, self._channels)).to(_device())
        try:
            out = self._module(images)
        except RuntimeError as error:
            line = str(error).strip().splitlines()[-1]
            raise EvaluationError(
                f"--features {self._path} fails for images {list(images.shape)}: {line}. If it takes another number of "
                "channels, set --features-channels"
            ) from error
        return _named(_by_name(out), self._path, len(images))


class InceptionExtractor:
    """The Inception network of FID (TensorFlow's of 2015), from torch-fidelity 0.4, with its weights from a file.

    The spatial features are those of guided-diffusion's evaluator: the first 7 channels of the first branch of its
    block `mixed_6`, 17x17, channels last.
    """

    def __init__(self, path: Path, sha256: str) -> None:
        if sha256 != INCEPTION_SHA256:
            raise EvaluationError(
                f"--features {path} is not torch-fidelity's Inception network: its sha256 is {sha256}; "
                f"{WHERE_INCEPTION_IS}"
            )
        weights = torch.load(path, map_location="cpu", weights_only=True)
        held = io.BytesIO()  # the class loads its argument with pickle; it gets a file that was written here
        torch.save(weights, held)
        held.seek(0)
        make = _torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        outputs = ["2048", "logits_unbiased"]
        self._network = make("inception-v3-compat", outputs, feature_extractor_weights_path=held).to(_device())
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self._spatial: Tensor | None = None
        self.description = {"kind": "inception", "file": path.name, "sha256": sha256}

    def _keep_spatial(self, _module: object, _inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def __call__(self, pixels: Uint8Array) -> Extracted:
        """Compute the features of images [N, H, W, C], C 1 or 3."""
        images = np.ascontiguousarray(_repeated(pixels, 3).transpose(0, 3, 1, 2))
        features, logits = self._network(torch.from_numpy(images).to(_device()))
        assert self._spatial is not None  # noqa: S101  # set by the hook in every call
        return Extracted(_array(features), _array(logits), _array(self._spatial))


def _torch_fidelity(module: str) -> Any:
    """Import a module of torch-fidelity without the package's `__init__`, which needs torchvision."""
    if f"torch_fidelity.{module}" not in sys.modules and "torch_fidelity" not in sys.modules:
        found = importlib.util.find_spec("torch_fidelity")
        if found is None or found.submodule_search_locations is None:
            raise EvaluationError(
                "the Inception network needs the package torch-fidelity: pip install --no-deps torch-fidelity==0.4.0"
            )
        package = types.ModuleType("torch_fidelity")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["torch_fidelity"] = package
    return importlib.import_module(f"torch_fidelity.{module}")


def _described(
    kind: str, path: Path, sha256: str, value_range: tuple[float, float], channels: int | None
) -> dict[str, str]:
    low, high = value_range
    described = {"kind": kind, "file": path.name, "sha256": sha256, "range": f"{low:g},{high:g}"}
    return described if channels is None else {**described, "channels": str(channels)}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _scaled(pixels: Uint8Array, value_range: tuple[float, float], channels: int | None) -> Float32Array:
    """Return images [N, H, W, C] as [N, C, H, W] between the values of black and white."""
    low, high = value_range
    images = _repeated(pixels, channels or pixels.shape[-1]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low))


def _repeated(pixels: Uint8Array, channels: int) -> Uint8Array:
    """Return images with a number of channels: grey ones are repeated."""
    if pixels.shape[-1] not in (1, channels):
        raise EvaluationError(f"--features takes images of {channels} channels; these have {pixels.shape[-1]}")
    return np.broadcast_to(pixels, (*pixels.shape[:-1], channels))


def _by_name(out: object) -> dict[str, Float32Array]:
    if isinstance(out, Tensor):
        return {"features": _array(out)}
    if isinstance(out, Mapping):
        return {str(name): _array(values) for name, values in out.items() if isinstance(values, Tensor)}
    if isinstance(out, Sequence):
        return {name: _array(values) for name, values in zip(OUTPUTS, out, strict=False) if isinstance(values, Tensor)}
    return {}


def _named(outputs: dict[str, Float32Array], path: Path, count: int) -> Extracted:
    if "features" not in outputs:  # by position
        outputs = dict(zip(OUTPUTS, outputs.values(), strict=False))
    flat = {name: np.asarray(values, np.float32).reshape(len(values), -1) for name, values in outputs.items()}
    if "features" not in flat or any(len(values) != count for values in flat.values()):
        shapes = {name: list(values.shape) for name, values in outputs.items()}
        raise EvaluationError(f"--features {path} must return features [N, D] for N = {count} images; got {shapes}")
    return Extracted(flat["features"], flat.get("logits"), flat.get("spatial"))


def _array(values: Tensor) -> Float32Array:
    return values.detach().cpu().float().numpy()

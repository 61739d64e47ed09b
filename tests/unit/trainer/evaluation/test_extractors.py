"""Feature extractors: files of three kinds, their outputs by name or position, and clear refusals."""

from __future__ import annotations

import hashlib
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from trainer.evaluation import extractors
from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.extractors import INCEPTION_SHA256, INCEPTION_SOURCE, open_extractor

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
SCALED = PIXELS.transpose(0, 3, 1, 2).astype(np.float64) / 127.5 - 1


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"spatial": x[:, 0], "features": x.mean(dim=[2, 3]), "logits": x[:, :2].amax(dim=[2, 3])}


class Positional(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(dim=[2, 3]), x[:, :2].amax(dim=[2, 3])


class Single(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[2, 3])


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))  # type: ignore[no-untyped-call]
    return path


def onnx_means(path: Path, shape: tuple[int | str, ...] = ("n", 3, "h", "w"), name: str = "features") -> Path:
    """Write a graph that returns the mean of each channel."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    out = helper.make_tensor_value_info(name, TensorProto.FLOAT, (shape[0], shape[1], 1, 1))
    node = helper.make_node("GlobalAveragePool", ["x"], [name])
    graph = helper.make_graph([node], "means", [given], [out])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def test_a_torchscript_file_returns_a_dictionary_a_tuple_or_one_tensor(tmp_path: Path) -> None:
    named = open_extractor(scripted(Named(), tmp_path / "named.ts"))(PIXELS)
    np.testing.assert_allclose(named.features, SCALED.mean(axis=(2, 3)), atol=1e-6)
    assert named.logits is not None
    np.testing.assert_allclose(named.logits, SCALED[:, :2].max(axis=(2, 3)), atol=1e-6)
    assert named.spatial is not None
    np.testing.assert_allclose(named.spatial, SCALED[:, 0].reshape(5, -1), atol=1e-6)

    positional = open_extractor(scripted(Positional(), tmp_path / "positional.pt"))(PIXELS)
    assert np.array_equal(positional.features, named.features)
    assert positional.logits is not None
    assert np.array_equal(positional.logits, named.logits)
    assert positional.spatial is None

    single = open_extractor(scripted(Single(), tmp_path / "single.jit"))(PIXELS)
    assert np.array_equal(single.features, named.features)
    assert single.logits is None


def test_an_onnx_file_gives_the_features_of_its_output_by_name_or_position(tmp_path: Path) -> None:
    for name in ("features", "pooled"):
        extractor = open_extractor(onnx_means(tmp_path / f"{name}.onnx", name=name))
        np.testing.assert_allclose(extractor(PIXELS).features, SCALED.mean(axis=(2, 3)), atol=1e-6)


def test_the_range_of_the_input_is_what_was_asked(tmp_path: Path) -> None:
    path = onnx_means(tmp_path / "means.onnx")
    extractor = open_extractor(path, value_range=(0, 255))
    np.testing.assert_allclose(extractor(PIXELS).features, PIXELS.mean(axis=(1, 2)), rtol=1e-6)
    assert extractor.description["range"] == "0,255"
    with pytest.raises(EvaluationError, match="two rising numbers"):
        open_extractor(path, value_range=(1, 0))


def test_a_graph_with_a_fixed_batch_size_computes_any_number_of_images(tmp_path: Path) -> None:
    fixed = open_extractor(onnx_means(tmp_path / "fixed.onnx", (2, 3, 8, 6)))
    np.testing.assert_allclose(fixed(PIXELS).features, SCALED.mean(axis=(2, 3)), atol=1e-6)


def test_grey_images_are_repeated_for_networks_of_colour(tmp_path: Path) -> None:
    grey = PIXELS[..., :1]
    in_onnx = open_extractor(onnx_means(tmp_path / "means.onnx"))(grey).features
    path = scripted(Single(), tmp_path / "single.ts")
    np.testing.assert_allclose(open_extractor(path, channels=3)(grey).features, in_onnx, atol=1e-6)
    assert open_extractor(path)(grey).features.shape == (5, 1)
    with pytest.raises(EvaluationError, match="3 channels; these have 2"):
        open_extractor(path, channels=3)(PIXELS[..., :2])


def test_images_of_another_size_than_the_graph_takes_are_refused(tmp_path: Path) -> None:
    extractor = open_extractor(onnx_means(tmp_path / "means.onnx", ("n", 3, 16, 16)))
    with pytest.raises(EvaluationError, match="height 16; these have 8"):
        extractor(PIXELS)


def test_a_missing_file_is_refused_with_the_place_and_hash_of_the_inception_weights(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError) as refused:
        open_extractor(tmp_path / "weights.pth")
    assert INCEPTION_SOURCE in str(refused.value)
    assert INCEPTION_SHA256 in str(refused.value)


@pytest.mark.parametrize(("name", "message"), [
    ("net.pth", "is not torch-fidelity's Inception network"),
    ("net.ts", "is not a TorchScript file"),
    ("net.onnx", "is not an ONNX file"),
    ("net.bin", "must be a file .onnx"),
])  # fmt: skip
def test_files_of_other_content_are_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)) * 4)
    with pytest.raises(EvaluationError, match=message):
        open_extractor(tmp_path / name)


STAND_IN = """
import torch
from torch import nn
from torch_fidelity.helpers import KEPT


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch1x1 = nn.Conv2d(3, 9, 1)


class FeatureExtractorInceptionV3(nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = Block()
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == KEPT
        out = self.Mixed_6d.branch1x1(x.float())
        return out.mean(dim=(2, 3)), out.amax(dim=(2, 3))
"""


def test_the_inception_class_is_used_without_importing_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "torch_fidelity"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import torchvision_that_is_not_installed\n")
    (package / "helpers.py").write_text("KEPT = 3\n")
    (package / "feature_extractor_inceptionv3.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(package.parent)
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    convolution = nn.Conv2d(3, 9, 1)
    weights = {f"Mixed_6d.branch1x1.{name}": values for name, values in convolution.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())

    out = open_extractor(path)(PIXELS)
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    with torch.no_grad():
        expected = convolution(torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float())
    np.testing.assert_allclose(out.features, expected.mean(dim=(2, 3)).numpy(), rtol=1e-4, atol=1e-4)
    assert out.spatial is not None
    np.testing.assert_allclose(
        out.spatial, expected[:, :7].permute(0, 2, 3, 1).flatten(1).numpy(), rtol=1e-4, atol=1e-4
    )


def test_a_missing_torch_fidelity_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.zeros(200)}, path)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EvaluationError, match="pip install --no-deps torch-fidelity"):
        open_extractor(path)

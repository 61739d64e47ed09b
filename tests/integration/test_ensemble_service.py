"""An ensemble served over HTTP: each image is that of the reference loop, with the network of each timestep."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli.main import app
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, NetworkEnsemble, sample_images
from formats.artifact import MANIFEST_FILE, MODEL_FILE, file_entry
from formats.checkpoint import write_checkpoint
from formats.checkpoint_config import WEIGHTS_FILE, read_config
from formats.ensemble import write_ensemble
from service.backends.base import BackendOptions
from service.backends.ensemble import DenoiserEnsemble
from service.backends.select import load_denoiser, load_model
from service.errors import ModelError
from service.http.app import create_app
from service.settings import Settings
from tests.denoisers import AsNetwork
from tests.exports import Exports
from tests.integration.in_process import client_of
from tests.waiting import run_async

WIDTH = 4
STEPS, SEED = 8, 5
CONV_OUT = "out.2.weight"


def mirrored_checkpoint(source: Path, folder: Path) -> Path:
    """Write a checkpoint of another network of the same shape: its output has the opposite sign, apart from a bias."""
    weights = load_file(source / WEIGHTS_FILE)
    weights[CONV_OUT] = -weights[CONV_OUT]
    write_checkpoint(folder, read_config(source), weights)
    return folder


def mirrored_artifact(source: Path, folder: Path) -> Path:
    """Write an artifact of the same kind of network; its graph is edited, because tracing takes 20 seconds."""
    shutil.copytree(source, folder)
    graph = onnx.load(folder / MODEL_FILE)
    shape = (6, 32, 3, 3)  # of CONV_OUT
    (kernel,) = (one for one in graph.graph.initializer if tuple(one.dims) == shape)
    kernel.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(kernel), kernel.name))
    onnx.save(graph, folder / MODEL_FILE)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"][MODEL_FILE] = file_entry(folder / MODEL_FILE).model_dump()
    manifest["checkpoint_sha256"] = "0" * 64
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder


def written(backend: str, exports: Exports, tmp_path: Path) -> Path:
    checkpoint = exports.checkpoint()
    if backend == "torch":
        first, second = checkpoint, mirrored_checkpoint(checkpoint, tmp_path / "second")
    else:
        first = checkpoint / "artifact"
        second = mirrored_artifact(first, tmp_path / "second")
    return write_ensemble(tmp_path / "both", [(0, 1500, first), (1500, 3000, second), (3000, 0, first)]).folder


def options(backend: str) -> BackendOptions:
    return BackendOptions(max_rows=WIDTH, threads=1, cache_dir="", precision="fp32", device="cpu")


def reference(ensemble: DenoiserEnsemble[Any], spec: ImageSpec, *, use: int | None = None) -> Any:
    """Sample an image with the ensemble, or with one of its members, alone."""
    network = NetworkEnsemble(
        members=[AsNetwork(member) for member in ensemble.members],
        network_of=ensemble.network_of,
        diffusion=ensemble.config.diffusion,
    )
    plan = build_plan(ensemble.config.diffusion, spec=str(STEPS))
    return sample_images(network if use is None else network.members[use], plan, [spec], xp=ensemble.xp)[0]


@pytest.mark.parametrize("backend", ["torch", "openvino", "onnxruntime"])
def test_the_service_gives_the_pixels_of_the_reference_loop(backend: str, exports: Exports, tmp_path: Path) -> None:
    folder = written(backend, exports, tmp_path)
    settings = Settings.model_validate(
        {
            "models": (folder,),
            "backend": backend,
            "max_rows": WIDTH,
            "threads": 1,
            "cache_dir": "",
            "precision": "fp32",
            "device": "cpu",
        }
    )
    service = create_app(settings)

    async def ask() -> tuple[bytes, str, str]:
        async with client_of(service) as client:
            body = {"class": ["3", "1", "4"], "steps": STEPS, "seed": SEED}
            other = {"class": "2", "steps": 10 * STEPS, "seed": 1, "stream": True, "preview_every": 1}
            beside = asyncio.create_task(client.post("/v1/generate", json=other))
            answer = await client.post("/v1/generate", json=body, headers={"Accept": "application/x-npz"})
            assert answer.status_code == 200, answer.text
            events = await beside
            assert events.status_code == 200, events.text
            return answer.content, (await client.get("/v1/models")).text, events.text

    content, models, events = run_async(ask())
    assert "ensemble of" in models
    assert "event: preview" in events
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        pixels = arrays["arr_0"]
    ensemble = load_model(folder, backend, options(backend))
    assert isinstance(ensemble, DenoiserEnsemble)
    for index, label in enumerate((3, 1, 4)):
        spec = ImageSpec(seed=SEED, image_index=index, class_index=label)
        np.testing.assert_array_equal(pixels[index], reference(ensemble, spec))
        for member in (0, 1):
            assert (pixels[index] != reference(ensemble, spec, use=member)).any()


def test_an_ensemble_is_sampled_in_this_process(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written("onnxruntime", exports, tmp_path)
    for name, value in (("BACKEND", "onnxruntime"), ("MAX_ROWS", str(WIDTH)), ("THREADS", "1")):
        monkeypatch.setenv(f"IDDPM_{name}", value)
    out = tmp_path / "sampled.npz"
    arguments = ["sample", "--model", str(folder), "--class", "3", "--steps", str(STEPS), "--seed", str(SEED)]
    done = CliRunner().invoke(app, [*arguments, "-o", str(out)])
    assert done.exit_code == 0, done.output
    ensemble = load_model(folder, "onnxruntime", options("onnxruntime"))
    assert isinstance(ensemble, DenoiserEnsemble)
    with np.load(out, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"][0], reference(ensemble, ImageSpec(seed=SEED, class_index=3)))


def test_auto_takes_one_backend_for_all_members(exports: Exports, tmp_path: Path) -> None:
    folder = written("openvino", exports, tmp_path)
    model = load_model(folder, "auto", options("auto"))
    assert isinstance(model, DenoiserEnsemble)
    assert {member.description.split()[0] for member in model.members} == {"openvino"}
    with pytest.raises(ModelError, match="is an ensemble of 2 networks"):
        load_denoiser(folder, "auto", options("auto"))
    shutil.rmtree(folder / "second")
    with pytest.raises(ModelError, match="member 'second' is missing"):
        load_model(folder, "auto", options("auto"))


def test_a_damaged_description_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text('{"ranges": []}')
    with pytest.raises(ModelError, match=r"ensemble\.json: ranges"):
        load_model(tmp_path, "torch", options("torch"))

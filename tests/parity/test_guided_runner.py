"""Classifier guidance as the service computes it, for both kinds of array, compared with OpenAI's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.torch import load_file

from diffusion.arrays import to_numpy
from diffusion.config import CheckpointConfig
from diffusion.network_inputs import NetworkInputs
from formats.checkpoint import write_checkpoint
from formats.classifier_folder import CLASSIFIER_FOLDER
from service.backends.artifact_model import open_artifact
from service.backends.base import BackendOptions, Denoiser, GuidingClassifier
from service.backends.onnxruntime_backend import OnnxRuntimeClassifier
from service.backends.openvino_backend import OpenVinoClassifier
from service.backends.torch_backend import TorchBackend
from service.engine.config import EngineConfig
from service.engine.request import ImageParams, ImageStep, PlanKey
from service.engine.runners import host_steps
from service.engine.runners.array_runner import ArrayRunner
from tests import golden
from tests.denoisers import ExactDenoiser
from tests.exports import CLASSIFIER, Exports, write_golden_classifier
from tests.kinds import of_kind, on_kind

GOLDEN = golden.load("guidance")
CASES = pytest.mark.parametrize("case", GOLDEN.cases, ids=lambda case: case["key"])
CONFIG = EngineConfig(max_rows=4)
OPTIONS = BackendOptions(max_rows=CONFIG.max_rows, threads=1, device="cpu", precision="fp32")

Subject = Literal["torch", "openvino", "onnxruntime"]
SUBJECTS = pytest.mark.parametrize("subject", get_args(Subject))
"""The torch backend, and the gradient's graph in a runtime with the network on numpy arrays."""
Make = Callable[[Subject, dict[str, Any]], ArrayRunner[Any]]


class GoldenDenoiser(ExactDenoiser):
    """The golden network of the golden guidance, on numpy arrays."""

    def embed_timesteps(self, t_model: Any) -> Any:
        return on_kind("numpy", golden.network(GOLDEN.config["unet"]).embed_timesteps)(t_model)

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        return on_kind("numpy", golden.network(GOLDEN.config["unet"]).forward_emb)(*inputs)


@pytest.fixture(scope="module")
def gradients(exports: Exports) -> dict[Subject, GuidingClassifier[Any]]:
    """Return the gradient's graph, opened in each runtime."""
    classifier = open_artifact(exports.guided(), "any").classifier
    assert classifier is not None
    return {
        "openvino": OpenVinoClassifier(classifier, (CONFIG.max_rows,), 1),
        "onnxruntime": OnnxRuntimeClassifier(classifier, 1),
    }


@pytest.fixture
def make(gradients: dict[Subject, GuidingClassifier[Any]], tmp_path: Path) -> Make:
    def denoiser(subject: Subject, config: CheckpointConfig) -> Denoiser[Any]:
        if subject == "torch":
            weights = load_file(golden.GOLDEN_DIR / f"{GOLDEN.config['unet']}.safetensors")
            write_checkpoint(tmp_path / "golden", config, weights)
            write_golden_classifier(tmp_path / "golden" / CLASSIFIER_FOLDER, config.diffusion)
            return TorchBackend(tmp_path / "golden", OPTIONS)
        return GoldenDenoiser(config, classifier=gradients[subject])

    def runner(subject: Subject, case: dict[str, Any]) -> ArrayRunner[Any]:
        assert GOLDEN.config["classifier"] == CLASSIFIER
        assert case["clip_denoised"]
        diffusion = golden.diffusion_config(case)
        config = CheckpointConfig(model=golden.model_config(GOLDEN.config["unet"]), diffusion=diffusion)
        return ArrayRunner(denoiser(subject, config), CONFIG)

    return runner


def put(
    runner: ArrayRunner[Any], case: dict[str, Any], sampler: str, num_steps: int, x: Any, y: Any, step: Any
) -> list[ImageStep]:
    """Put images into slots; return the step of each, which need not be its first."""
    steps = [
        ImageStep(
            slot=slot,
            params=ImageParams(
                plan=PlanKey(sampler=sampler, spec=case["respacing"]),
                num_steps=num_steps,
                seed=0,
                image_index=0,
                class_index=int(label),
                classifier_scale=case["classifier_scale"],
            ),
            step=int(number),
        )
        for slot, (label, number) in enumerate(zip(y, step, strict=True))
    ]
    runner.start(steps)
    kind: Any = "numpy" if isinstance(runner.slots.x, np.ndarray) else "torch"
    runner.slots.x[: len(y)] = of_kind(kind, x)
    return steps


def draw(monkeypatch: pytest.MonkeyPatch, noise: npt.NDArray[Any]) -> None:
    """Make the next step draw the reference's noise."""

    def normal(seed: Any, *_: Any) -> Any:
        return of_kind("numpy" if isinstance(seed, np.ndarray) else "torch", noise)

    monkeypatch.setattr(host_steps, "normal", normal)


@SUBJECTS
@CASES
@pytest.mark.parametrize(("sampler", "expected"), [("ancestral", "p_sample.sample"), ("ddim", "ddim.sample")])
def test_a_guided_step_of_the_runner_equals_the_reference(
    make: Make, monkeypatch: pytest.MonkeyPatch, case: dict[str, Any], sampler: str, expected: str, subject: Subject
) -> None:
    runner, key = make(subject, case), case["key"]
    x, t, y = (GOLDEN[f"{key}.{name}"] for name in ("x", "t", "y"))
    steps = put(runner, case, sampler, case["num_timesteps"], x, y, case["num_timesteps"] - 1 - t)
    draw(monkeypatch, GOLDEN[f"{key}.p_sample.noise"])
    assert all(runner.launch(steps).wait())

    sample = GOLDEN[f"{key}.{expected}"]
    error = np.abs(to_numpy(runner.slots.x)[: len(y)] - sample).max() / np.abs(sample).max()
    assert error < golden.GUIDANCE_TOLERANCE


@SUBJECTS
@pytest.mark.parametrize(("key", "sampler"), [("chain_p_sample_loop", "ancestral"), ("chain_ddim_sample_loop", "ddim")])
def test_a_guided_chain_of_the_runner_equals_the_reference(
    make: Make, monkeypatch: pytest.MonkeyPatch, key: str, sampler: str, subject: Subject
) -> None:
    case = GOLDEN.config["chain"]
    runner, y = make(subject, case), GOLDEN[f"{key}.y"]
    steps = put(runner, case, sampler, 8, GOLDEN[f"{key}.init_noise"], y, np.zeros(len(y), dtype=np.int64))
    for noise, sample in zip(GOLDEN[f"{key}.step_noise"], GOLDEN[f"{key}.samples"], strict=True):
        draw(monkeypatch, noise)
        assert all(runner.launch(steps).wait())
        steps = [step._replace(step=step.step + 1) for step in steps]
        x = to_numpy(runner.slots.x)[: len(y)]
        np.testing.assert_allclose(x, sample, rtol=0, atol=golden.GUIDED_CHAIN_TOLERANCE)

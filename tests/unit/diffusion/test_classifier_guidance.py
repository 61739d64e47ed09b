"""Classifier guidance in the engine: rows, failures, costs and ids.

tests/unit/service/engine/test_engine.py tests that pixels do not depend on other images, with classifier guidance too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.network_inputs import NetworkInputs
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from service.backends.base import BackendOptions
from service.backends.cuda_graphs import CallAgain, GraphedNetwork
from service.backends.select import load_denoiser
from service.backends.torch_backend import TorchBackend
from service.backends.torch_classifier import load_torch_classifier
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.forecast import Forecast
from service.engine.ledger import Ledger
from service.engine.order import ServiceOrder
from service.engine.request import ImageResult, ImageStatus
from service.engine.runners.array_runner import ArrayRunner
from service.engine.step_costs import StepCosts
from service.errors import ModelError
from service.metrics import Metrics
from tests.denoisers import AsNetwork, ExactClassifier, ExactDenoiser
from tests.fakes import (
    CountingRunner,
    generation,
    params,
    tiny_checkpoint,
    tiny_classifier_config,
    tiny_config,
    tiny_guided_checkpoint,
)

WIDTH = 4
CONFIG = EngineConfig(max_rows=WIDTH, slots_per_row=2)


def guided(**changes: object) -> tuple[ExactDenoiser, ExactClassifier]:
    classifier = ExactClassifier(tiny_classifier_config())
    return ExactDenoiser(tiny_config(**changes), classifier=classifier), classifier


def engine_of(denoiser: ExactDenoiser, metrics: Metrics | None = None) -> Engine:
    runner: ArrayRunner[Any] = ArrayRunner(denoiser, CONFIG)
    engine = Engine({"m": runner}, CONFIG, metrics or Metrics())
    engine.warm_up()
    return engine


def run(engine: Engine) -> list[ImageResult]:
    results = []
    while engine.has_work():
        results += engine.step()
    return results


def test_the_classifier_is_called_on_rows_with_classifier_guidance_only() -> None:
    denoiser, classifier = guided()
    metrics = Metrics()
    engine = engine_of(denoiser, metrics)
    classifier.calls.clear()
    engine.add(generation("plain", params(steps=3), params(steps=3, cfg_scale=2.0)), submitted_at=0.0)
    run(engine)
    assert classifier.calls == []
    asking = [params(steps=2, classifier_scale=1.0), params(steps=4, cfg_scale=2.0, classifier_scale=5.0)]
    engine.add(generation("some", params(steps=3), *asking), submitted_at=0.0)
    run(engine)
    assert classifier.calls == [2, 2, 1, 1]
    value = metrics.registry.get_sample_value
    assert value("iddpm_classifier_calls_total", {"model": "m"}) == 4
    assert value("iddpm_classified_rows_total", {"model": "m"}) == 6


def test_an_unconditional_model_is_guided_to_a_class_of_its_classifier() -> None:
    denoiser, _ = guided(num_classes=None, null_class=False)
    engine = engine_of(denoiser)
    images = [replace(params(steps=5, seed=3, classifier_scale=2.0), class_index=label) for label in (0, 3)]
    engine.add(generation("r", *images), submitted_at=0.0)
    pictures = [result.pixels for result in run(engine)]
    plan = build_plan(denoiser.config.diffusion, "ancestral", "5")
    for label, pixels in zip((0, 3), pictures, strict=True):
        spec = ImageSpec(seed=3, class_index=label, classifier_scale=2.0)
        expected = sample_images(AsNetwork(denoiser), plan, [spec], gradient=denoiser.classifier, xp=np)
        np.testing.assert_array_equal(pixels, expected[0])
    assert pictures[0] is not None
    assert pictures[1] is not None
    assert not np.array_equal(pictures[0], pictures[1])


def test_an_image_that_needs_a_missing_classifier_fails_alone() -> None:
    engine = engine_of(ExactDenoiser(tiny_config()))
    engine.add(generation("r", params(steps=2), params(steps=2, classifier_scale=1.0)), submitted_at=0.0)
    assert sorted((r.position, r.status) for r in run(engine)) == [(0, ImageStatus.DONE), (1, ImageStatus.FAILED)]


class FaultyClassifier(ExactClassifier):
    """Raises on class 1, overflows on class 2; or raises on every call."""

    broken = False

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        if self.broken or (len(inputs.x_t) and np.any(inputs.y == 1) and inputs.emb_t[0, 0] < 1):
            raise ValueError("this row cannot be classified")
        out = super().__call__(inputs)
        out[(inputs.y == 2) & (inputs.emb_t[:, 0] < 1)] = np.inf  # t below 512
        return out


def test_an_image_that_makes_the_classifier_fail_fails_alone() -> None:
    denoiser = ExactDenoiser(tiny_config(), classifier=FaultyClassifier(tiny_classifier_config()))
    fine = [replace(params(steps=6, seed=k, classifier_scale=2.0), class_index=3 * k) for k in (0, 1)]
    others = [
        replace(params(steps=6, classifier_scale=2.0), class_index=1),
        replace(params(steps=6, classifier_scale=2.0), class_index=2),
        replace(params(steps=6), class_index=1),
    ]
    engine = Engine({"m": ArrayRunner(denoiser, CONFIG)}, CONFIG, Metrics())  # the self-test would find the faults
    engine.add(generation("r", *others, *fine), submitted_at=0.0)
    results = {result.position: result for result in run(engine)}
    assert [(results[k].status, results[k].failure) for k in range(3)] == [
        (ImageStatus.FAILED, "error"),
        (ImageStatus.FAILED, "not_finite"),
        (ImageStatus.DONE, None),
    ]
    honest = engine_of(guided()[0])
    honest.add(generation("r", *fine), submitted_at=0.0)
    for position, expected in enumerate(run(honest), start=3):
        np.testing.assert_array_equal(results[position].pixels, expected.pixels)


def test_a_classifier_that_fails_for_every_image_ends_the_engine() -> None:
    classifier = FaultyClassifier(tiny_classifier_config())
    engine = Engine({"m": ArrayRunner(ExactDenoiser(tiny_config(), classifier=classifier), CONFIG)}, CONFIG, Metrics())
    classifier.broken = True
    engine.add(generation("r", params(classifier_scale=1.0)), submitted_at=0.0)
    with pytest.raises(ValueError, match="cannot be classified"):
        engine.step()


class SizeDependent(ExactClassifier):
    """Gives different bits at some batch sizes."""

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        out = super().__call__(inputs)
        return out * (1 + 1e-6) if len(inputs.x_t) in (1, 3) else out


class PlaceMatters(ExactClassifier):
    """Gives the last row different bits."""

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        out = super().__call__(inputs)
        out[-1] *= 1 + 1e-6
        return out


def test_the_classifier_has_its_own_self_test() -> None:
    classifier = SizeDependent(tiny_classifier_config())
    runner: ArrayRunner[Any] = ArrayRunner(ExactDenoiser(tiny_config(), classifier=classifier), CONFIG)
    runner.warm_up()
    assert (runner.sizes.network, runner.sizes.classifier) == ((1, 2, 3, 4), (2, 4))
    assert [runner.padded_classified_rows(rows) for rows in (1, 2, 3, 4)] == [2, 2, 4, 4]

    unequal = ExactDenoiser(tiny_config(), classifier=PlaceMatters(tiny_classifier_config()))
    with pytest.raises(ModelError, match="exact classifier: a row's result depends on its place in the batch"):
        ArrayRunner(unequal, CONFIG).warm_up()
    small = ExactDenoiser(tiny_config(), classifier=ExactClassifier(tiny_classifier_config(), batch_sizes=(1, 2)))
    with pytest.raises(ModelError, match="exact classifier: max_rows must be at most 2"):
        ArrayRunner(small, CONFIG)


def test_the_numerics_id_depends_on_the_classifier(tmp_path: Path) -> None:
    plain = TorchBackend(tiny_checkpoint(tmp_path / "plain"))
    with_classifier = TorchBackend(tiny_guided_checkpoint(tmp_path / "guided"))
    other = tiny_guided_checkpoint(tmp_path / "other")
    weights = other / "classifier" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ids = {plain.network_id, with_classifier.network_id, TorchBackend(other).network_id}
    assert len(ids) == 3
    assert TorchBackend(tiny_guided_checkpoint(tmp_path / "again")).network_id in ids


def test_the_gradient_can_be_computed_from_the_buffers_of_a_graph(tmp_path: Path) -> None:
    folder = tiny_guided_checkpoint(tmp_path / "guided")
    classifier = load_torch_classifier(folder, tiny_config(), torch.device("cpu"), (1, 2))
    assert classifier is not None

    def zero_inputs(size: int) -> NetworkInputs[torch.Tensor]:
        emb_t = classifier.embed_timesteps(torch.zeros(size))
        return NetworkInputs(torch.zeros(size, 1, 8, 8), emb_t, torch.zeros(size, dtype=torch.int64))

    graphed = GraphedNetwork(classifier.gradient, (1, 2), zero_inputs, CallAgain())
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    emb_t, y = classifier.embed_timesteps(torch.tensor([3.0, 900.0])), torch.tensor([1, 3])
    inputs = NetworkInputs(x_t, emb_t, y)
    gradient = classifier(inputs)
    assert gradient.abs().max() > 0
    assert torch.equal(graphed(inputs), gradient)


def test_a_damaged_classifier_is_refused_at_start_up(tmp_path: Path) -> None:
    folder = tiny_guided_checkpoint(tmp_path / "guided")
    (folder / "classifier" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"classifier/config\.json: model: Field required"):
        load_denoiser(folder, "torch", BackendOptions())


def test_the_cost_of_a_classifier_call_is_the_step_s_time_beyond_one_without() -> None:
    costs = StepCosts()
    costs.observe(2, 1.0)
    costs.observe(4, 2.0)
    costs.observe(4, 3.5, classified=2)
    assert costs.table() == {2: 1.0, 4: 2.0}
    assert [costs.seconds(rows, classified) for rows, classified in [(4, 0), (4, 2), (2, 2)]] == [2.0, 3.5, 2.5]


class TimedRunner(CountingRunner):
    """Takes a second per row, and three per classified row, on its own clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._classified: dict[int, int] = {}

    def padded_classified_rows(self, rows: int) -> int:
        return rows

    def start(self, starts: Any) -> None:
        super().start(starts)
        self._classified |= {start.slot: start.params.classified_rows for start in starts}

    def step(self, slots: Any) -> list[bool]:
        self.now += len(slots) + 3 * sum(self._classified[slot] for slot in slots)
        return super().step(slots)


def test_predictions_include_the_classifier_s_time_for_images_with_classifier_guidance() -> None:
    runner = TimedRunner()
    engine = Engine({"m": runner}, CONFIG, Metrics(), clock=lambda: runner.now)
    engine.measure()
    snapshot = engine.snapshot

    def finish(*images: Any) -> float:
        accepted = ServiceOrder(CONFIG).images_of(generation("r", *images), 0.0, snapshot.steps)
        return Forecast(CONFIG, Ledger(["m"])).predict(accepted, snapshot).finish_s

    assert finish(params(steps=5)) == 5 * 1
    assert finish(params(steps=5, classifier_scale=1.0)) == 5 * (1 + 3)
    assert finish(params(steps=5), params(steps=5, classifier_scale=1.0)) == 5 * (2 + 3)

    engine.add(generation("r", params(steps=5), params(steps=5, classifier_scale=1.0)), submitted_at=runner.now)
    begun = runner.now
    run(engine)
    assert runner.now - begun == 5 * (2 + 3)
    assert engine.costs["m"].seconds(2, 1) == 5.0

"""The engine: pixels do not depend on company, a bad row leaves alone, metrics count what happened."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion.plans import Sampler, build_plan
from diffusion.sampling import ImageSpec, sample_images
from diffusion.unet import UNet
from service.backends.self_test import candidate_sizes
from service.backends.torch_backend import TorchBackend
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import ImageParams, ImageResult, ImageStatus, PlanKey
from service.engine.runners.torch_runner import TorchRunner
from service.metrics import Metrics
from tests.counts import count
from tests.fakes import CLASS_NAMES, CountingRunner, generation, params, tiny_checkpoint, tiny_config, tiny_network

WIDTH = 4
CONFIG = EngineConfig(max_rows=WIDTH, slots_per_row=2, plan_lines=64)


@cache
def backend() -> TorchBackend:
    with TemporaryDirectory() as folder:
        return TorchBackend(tiny_checkpoint(Path(folder) / "tiny"))


@cache
def network() -> UNet:
    return tiny_network(tiny_config())


def warm_runner() -> TorchRunner:
    runner = TorchRunner(backend(), CONFIG)
    runner.warm_up()
    return runner


@cache
def reference(image: ImageParams) -> bytes:
    """Sample one image alone, without any engine."""
    plan = build_plan(tiny_config().diffusion, image.plan.sampler, image.plan.spec, image.plan.eta)
    spec = ImageSpec(
        seed=image.seed, image_index=image.image_index, class_index=image.class_index, cfg_scale=image.cfg_scale
    )
    return sample_images(network(), plan, [spec])[0].tobytes()


@st.composite
def image_params(draw: st.DrawFn) -> ImageParams:
    steps = draw(st.integers(2, 6))
    sampler: Sampler = draw(st.sampled_from(["ancestral", "ddim"]))
    eta = draw(st.sampled_from([0.0, 0.5])) if sampler == "ddim" else 0.0
    return ImageParams(
        plan=PlanKey(sampler=sampler, spec=str(steps), eta=eta),
        num_steps=steps,
        seed=draw(st.sampled_from([0, 7, 2**53 - 1])),
        image_index=draw(st.integers(0, 2)),
        class_index=draw(st.integers(0, len(CLASS_NAMES) - 1)),
        cfg_scale=draw(st.sampled_from([1.0, 1.0, 2.5])),
    )


SCRIPTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(image_params(), min_size=1, max_size=3)),
        st.tuples(st.just("abort"), st.integers(0, 8)),
        st.tuples(st.just("step"), st.integers(1, 3)),
    ),
    min_size=2,
    max_size=12,
)


@settings(max_examples=count(2000))
@given(SCRIPTS)
def test_joins_leaves_and_cancels_change_no_pixel(script: list[tuple[str, object]]) -> None:
    engine = Engine({"m": warm_runner_shared()}, CONFIG, Metrics())
    requests: list[list[ImageParams]] = []
    results: list[ImageResult] = []
    for action, argument in script:
        if action == "add" and isinstance(argument, list):
            engine.add(generation(str(len(requests)), *argument), submitted_at=0.0)
            requests.append(argument)
        elif action == "abort":
            results += engine.abort(str(argument))
        elif isinstance(argument, int):
            for _ in range(argument):
                results += engine.step()
    while engine.has_work():
        results += engine.step()

    ends = [(result.request_id, result.position) for result in results]
    assert sorted(ends) == sorted((str(r), k) for r, images in enumerate(requests) for k in range(len(images)))
    for result in results:
        if result.status is ImageStatus.DONE:
            assert result.pixels is not None
            assert result.pixels.tobytes() == reference(requests[int(result.request_id)][result.position])


@cache
def warm_runner_shared() -> TorchRunner:
    return warm_runner()


def test_a_batch_of_one_costs_no_padding_where_the_self_test_allows_it() -> None:
    runner = warm_runner()
    assert runner.batch_sizes[-1] == WIDTH
    assert runner.padded_rows(WIDTH) == WIDTH


class BatchDependent:
    """A denoiser whose rows change a little with the batch size, as badly chosen kernels make them."""

    def __init__(self, honest: TorchBackend, dependent_sizes: set[int]) -> None:
        self.config = honest.config
        self.numerics_id = honest.numerics_id
        self.description = "batch dependent"
        self._honest = honest
        self._dependent_sizes = dependent_sizes

    def embed_timesteps(self, t_model: Tensor) -> Tensor:
        return self._honest.embed_timesteps(t_model)

    def __call__(self, x_t: Tensor, emb_t: Tensor, y: Tensor | None) -> Tensor:
        out = self._honest(x_t, emb_t, y)
        return out * (1 + 1e-6) if len(x_t) in self._dependent_sizes else out


def test_batch_sizes_that_change_a_row_are_padded_up_to_ones_that_do_not() -> None:
    honest = TorchRunner(BatchDependent(backend(), set()), CONFIG)
    honest.warm_up()
    runner = TorchRunner(BatchDependent(backend(), {1, 3}), CONFIG)
    runner.warm_up()
    assert set(honest.batch_sizes) - set(runner.batch_sizes) == {1, 3} & set(honest.batch_sizes)
    assert candidate_sizes(16) == [1, 2, 3, 4, 6, 8, 12]
    assert candidate_sizes(5) == [1, 2, 3, 4]
    assert runner.padded_rows(3) == WIDTH


def test_padding_changes_no_pixel() -> None:
    padded = TorchRunner(backend(), CONFIG)  # before its self-test it pads everything to the full width
    engine = Engine({"m": padded}, CONFIG, Metrics())
    image = replace(params(steps=4, cfg_scale=2.0, seed=3), class_index=2)
    engine.add(generation("r", image), submitted_at=0.0)
    results = [result for _ in range(4) for result in engine.step()]
    assert results[0].pixels is not None
    assert results[0].pixels.tobytes() == reference(image)


def test_a_row_that_is_not_finite_fails_alone_and_its_slot_serves_again() -> None:
    runner = warm_runner()
    engine = Engine({"m": runner}, CONFIG, Metrics())
    good, bad = params(steps=4, seed=1), params(steps=4, seed=2)
    engine.add(generation("r", good, bad), submitted_at=0.0)
    assert engine.step() == []
    runner._slots.x[CONFIG.num_slots - 2] = torch.nan  # the second slot given out
    (failed,) = engine.step()
    assert (failed.position, failed.status, failed.pixels) == (1, ImageStatus.FAILED, None)
    engine.add(generation("again", bad), submitted_at=0.0)
    finished = {r.request_id: r for _ in range(4) for r in engine.step()}
    for request_id, expected in (("r", good), ("again", bad)):
        pixels = finished[request_id].pixels
        assert pixels is not None
        assert pixels.tobytes() == reference(expected)


def test_metrics_count_calls_rows_and_row_steps() -> None:
    metrics = Metrics()
    engine = Engine({"m": CountingRunner()}, CONFIG, metrics)
    engine.add(generation("r", params(steps=3), params(steps=2, cfg_scale=2.0)), submitted_at=0.0)
    while engine.has_work():
        engine.step()
    value = metrics.registry.get_sample_value
    assert value("iddpm_network_calls_total", {"model": "m"}) == 3
    assert value("iddpm_row_steps_total") == 3 + 2 * 2
    assert value("iddpm_rows_per_network_call_sum") == 3 + 3 + 1
    assert value("iddpm_images_running") == value("iddpm_images_waiting") == 0


def test_times_are_split_into_queue_and_compute() -> None:
    ticks = iter(range(100))
    engine = Engine({"m": CountingRunner()}, CONFIG, Metrics(), clock=lambda: float(next(ticks)))
    engine.add(generation("r", params(steps=2)), submitted_at=-5.0)
    engine.step()
    (result,) = engine.step()
    assert result.queue_s == 5.0  # the first step began at 0
    assert result.compute_s == 3.0  # the second ended at 3


def test_pixels_have_the_shape_of_an_image() -> None:
    engine = Engine({"m": warm_runner()}, CONFIG, Metrics())
    engine.add(generation("r", params(steps=2)), submitted_at=0.0)
    results = [result for _ in range(2) for result in engine.step()]
    assert results[0].pixels is not None
    assert results[0].pixels.shape == (8, 8, 1)
    assert results[0].pixels.dtype == np.uint8


@pytest.mark.parametrize("changes", [{"num_classes": None, "null_class": False}, {"image_channels": 3}])
def test_other_kinds_of_model_run_too(tmp_path: Path, changes: dict[str, object]) -> None:
    other = TorchBackend(tiny_checkpoint(tmp_path / "other", **changes))
    runner = TorchRunner(other, CONFIG)
    runner.warm_up()
    engine = Engine({"m": runner}, CONFIG, Metrics())
    conditional = other.config.model.num_classes is not None
    image = replace(params(steps=3, seed=5), class_index=1 if conditional else None)
    engine.add(generation("r", image), submitted_at=0.0)
    results = [result for _ in range(3) for result in engine.step()]
    plan = build_plan(other.config.diffusion, "ancestral", "3")
    alone = sample_images(tiny_network(other.config), plan, [ImageSpec(seed=5, class_index=image.class_index)])
    assert results[0].pixels is not None
    assert np.array_equal(results[0].pixels, alone[0])

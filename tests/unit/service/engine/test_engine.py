"""The engine: pixels do not depend on other images, a row that overflows fails alone, metrics are correct."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion.chains import Chain, Resample, build_chain
from diffusion.classifier import log_p_gradient
from diffusion.network_inputs import NetworkInputs
from diffusion.plans import build_plan
from diffusion.sampling import ClassGradient, ClassNetwork, ImageSpec, sample_images
from diffusion.update import to_uint8
from service.backends import self_test
from service.backends.self_test import invariant_batch_sizes
from service.backends.torch_backend import TorchBackend
from service.engine.config import EngineConfig
from service.engine.engine import WIDTH_INTERVAL, Engine
from service.engine.request import (
    GivenArrays,
    ImageParams,
    ImagePreview,
    ImageProgress,
    ImageResult,
    ImageStatus,
    ImageStep,
    PlanKey,
    Priority,
    Watch,
)
from service.engine.runners.array_runner import ArrayRunner
from service.engine.scheduler import TRIAL_INTERVAL
from service.errors import ModelError
from service.metrics import Metrics
from tests.counts import count
from tests.denoisers import (
    AsNetwork,
    AsynchronousDenoiser,
    BatchDependent,
    ExactClassifier,
    ExactDenoiser,
    PlaceDependent,
)
from tests.fakes import (
    CLASS_NAMES,
    CountingRunner,
    generation,
    params,
    tiny_checkpoint,
    tiny_classifier,
    tiny_classifier_config,
    tiny_config,
    tiny_guided_checkpoint,
    tiny_network,
)
from tests.given_images import CHAINS, DIFFUSION, MASKED, output_of, sampled_alone, with_any_chain, with_chain
from tests.late_queue import QueuedDenoiser

WIDTH = 4
CONFIG = EngineConfig(max_rows=WIDTH, slots_per_row=2)
FEW_SLOTS = EngineConfig(max_rows=WIDTH, slots_per_row=1)
"""So few that images are evicted."""


@cache
def backend() -> TorchBackend:
    with TemporaryDirectory() as folder:
        return TorchBackend(tiny_guided_checkpoint(Path(folder) / "tiny"))


Subject = Literal["unet", "numpy", "numpy, compiled sizes", "asynchronous", "queued"]
SUBJECTS = pytest.mark.parametrize("subject", get_args(Subject))
"""A torch network, and exact arithmetic on numpy arrays: at any batch size, compiled for some, asynchronous."""


class TorchGradient:
    """The tiny classifier's gradient, by autograd."""

    def __init__(self) -> None:
        self._classifier = tiny_classifier(tiny_classifier_config())
        self.embed_timesteps = self._classifier.embed_timesteps

    def __call__(self, inputs: NetworkInputs[Any], /) -> Tensor:
        assert inputs.y is not None
        return log_p_gradient(self._classifier.forward_emb, inputs.x_t, inputs.emb_t, inputs.y)


@cache
def subject_of(subject: Subject) -> tuple[ArrayRunner[Any], ClassNetwork, ClassGradient, Any]:
    """Return a warmed-up runner, its network and its classifier's gradient, and its kind of array."""
    if subject == "unet":
        return warm_runner(), tiny_network(tiny_config()), TorchGradient(), torch
    sizes = (1, WIDTH, 2 * WIDTH) if subject in ("numpy, compiled sizes", "queued") else None
    xp = torch if subject == "queued" else np
    guide = ExactClassifier(tiny_classifier_config(), xp, batch_sizes=sizes)
    made = {"asynchronous": AsynchronousDenoiser, "queued": QueuedDenoiser}.get(subject, ExactDenoiser)
    exact = made(tiny_config(), batch_sizes=sizes, classifier=guide)
    runner: ArrayRunner[Any] = ArrayRunner(exact, CONFIG)
    runner.warm_up()
    return runner, AsNetwork(exact), guide, xp


def warm_runner() -> ArrayRunner[Tensor]:
    runner = ArrayRunner(backend(), CONFIG)
    runner.warm_up()
    return runner


@cache
def reference(image: ImageParams, subject: Subject = "unet") -> bytes:
    """Sample one image alone, without an engine."""
    _, network, gradient, xp = subject_of(subject)
    return sampled_alone(image, network, gradient, xp=xp)


@st.composite
def image_params(draw: st.DrawFn) -> ImageParams:
    steps = draw(st.integers(2, 6))
    sampler: str = draw(st.sampled_from(["ancestral", "ddim"]))
    eta = draw(st.sampled_from([0.0, 0.5])) if sampler == "ddim" else 0.0
    return ImageParams(
        plan=PlanKey(sampler=sampler, spec=str(steps), eta=eta),
        num_steps=steps,
        seed=draw(st.sampled_from([0, 7, 2**53 - 1])),
        image_index=draw(st.integers(0, 2)),
        class_index=draw(st.integers(0, len(CLASS_NAMES) - 1)),
        cfg_scale=draw(st.sampled_from([1.0, 1.0, 2.5])),
        classifier_scale=draw(st.sampled_from([0.0, 0.0, 3.0])),
    )


SCRIPTS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["add", "add watched"]), st.lists(with_any_chain(image_params()), min_size=1, max_size=3)
        ),
        st.tuples(st.just("abort"), st.integers(0, 8)),
        st.tuples(st.just("step"), st.integers(1, 3)),
    ),
    min_size=2,
    max_size=12,
)


@pytest.mark.parametrize("subject", ["unet", "queued"])  # others, with failures: `test_random_scripts`
@settings(max_examples=count(2000, 80))
@given(script=SCRIPTS)
def test_joining_leaving_cancelled_and_watched_images_change_no_pixel(
    subject: Subject, script: list[tuple[str, object]]
) -> None:
    engine = Engine({"m": subject_of(subject)[0]}, CONFIG, Metrics())
    requests: list[list[ImageParams]] = []
    results: list[ImageResult] = []
    for action, argument in script:
        if isinstance(argument, list):
            watch = Watch(preview_every=1 + len(argument)) if action == "add watched" else None
            engine.add(generation(str(len(requests)), *argument, watch=watch), submitted_at=0.0)
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
            assert output_of(result) == reference(requests[int(result.request_id)][result.position], subject)


def test_a_batch_of_one_costs_no_padding_where_the_self_test_allows_it() -> None:
    runner = warm_runner()
    assert runner.sizes.network[-1] == WIDTH
    assert runner.padded_rows(WIDTH) == WIDTH


def test_batch_sizes_that_change_a_row_are_padded_to_sizes_that_do_not() -> None:
    honest = ArrayRunner(BatchDependent(backend(), set()), CONFIG)
    honest.warm_up()
    runner = ArrayRunner(BatchDependent(backend(), {1, 3}), CONFIG)
    runner.warm_up()
    assert set(honest.sizes.network) - set(runner.sizes.network) == {1, 3} & set(honest.sizes.network)
    assert runner.padded_rows(3) == WIDTH


def test_only_compiled_batch_sizes_without_different_rows_are_used(caplog: pytest.LogCaptureFixture) -> None:
    exact = ExactDenoiser(tiny_config(), batch_sizes=(1, 2, 6))
    runner: ArrayRunner[Any] = ArrayRunner(BatchDependent(exact, {2}, exact.batch_sizes), CONFIG)
    with caplog.at_level("INFO"):
        runner.warm_up()
    assert runner.sizes.network == (1, 6)
    assert set(exact.calls) == {1, 2, 6}
    assert "batch dependent: batch size 2 excluded: results are not bit-identical to batch size 6" in caplog.messages
    assert "bit-identical batch sizes: 1, 6" in caplog.messages
    assert [runner.padded_rows(rows) for rows in (1, 2, WIDTH)] == [1, 6, 6]


def test_a_compiled_size_with_results_that_depend_on_the_place_is_excluded_or_refused() -> None:
    exact = ExactDenoiser(tiny_config(), batch_sizes=(1, 3, 4))
    assert invariant_batch_sizes(PlaceDependent(exact, {3}, exact.batch_sizes), WIDTH) == (1, 4)
    with pytest.raises(ModelError, match="depends on its place in the batch"):
        invariant_batch_sizes(PlaceDependent(exact, {4}, exact.batch_sizes), WIDTH)


class NotFinite(ExactDenoiser):
    """Gives one value that is not a finite number."""

    value = float("nan")

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        out = super().__call__(inputs)
        out[0, 0, 0, 0] = self.value
        return out


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_network_whose_output_is_not_finite_is_refused_for_that(value: float) -> None:
    network = NotFinite(tiny_config())
    network.value = value
    with pytest.raises(ModelError, match="the network's output is not finite: its weights are damaged, or overflow"):
        invariant_batch_sizes(network, WIDTH)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({1: 1, 2: 1, 3: 1}, (1, 2, 3)),  # the full width differs from all others
        ({1: 1, 2: 1}, (3, 4)),  # of two sets of two sizes, the one with the larger size
        ({1: 1, 2: 2, 3: 3}, (4,)),
    ],
)
def test_the_largest_set_of_equal_sizes_is_used(
    groups: dict[int, int], expected: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    class Grouped(ExactDenoiser):
        def __call__(self, inputs: NetworkInputs[Any]) -> Any:
            return super().__call__(inputs) * (1 + 1e-6 * groups.get(len(inputs.x_t), 0))

    runner: ArrayRunner[Any] = ArrayRunner(Grouped(tiny_config(), batch_sizes=(1, 2, 3, 4)), CONFIG)
    engine = Engine({"m": runner}, CONFIG, Metrics())
    engine.warm_up()  # and no timed steps: on a busy machine, a smaller width may seem as fast
    assert runner.sizes.network == expected
    assert runner.max_rows == engine.scheduler.width("m") == expected[-1]
    engine.add(generation("r", *[params(steps=2, seed=k) for k in range(6)]), submitted_at=0.0)
    while engine.has_work():
        assert all(result.pixels is not None for result in engine.step())
    assert max(engine.costs["m"].table()) == expected[-1]
    limited = "exact arithmetic: steps have at most 3 rows instead of 4"
    assert (limited in caplog.messages) == (expected[-1] < WIDTH)
    alone = "exact arithmetic: no two batch sizes give bit-identical results; all are padded to 4"
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == ([alone] if len(expected) == 1 else [])


def test_the_self_test_of_a_denoiser_runs_once_per_width() -> None:
    exact = ExactDenoiser(tiny_config())
    found = invariant_batch_sizes(exact, WIDTH)
    calls = len(exact.calls)
    assert invariant_batch_sizes(exact, WIDTH) == found
    assert len(exact.calls) == calls
    assert exact.calls.count(WIDTH) == 2  # all rows, in both orders; calls of this size cost most of the start-up
    assert invariant_batch_sizes(exact, WIDTH - 1) != found  # the result depends on the width


@pytest.mark.parametrize(("width", "cure"), [(WIDTH, "; a smaller IDDPM_MAX_ROWS shortens it"), (2, "")])
def test_the_log_announces_a_long_self_test(
    width: int, cure: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = ExactDenoiser(tiny_config())
    invariant_batch_sizes(exact, width + 1)
    assert caplog.messages == []
    monkeypatch.setattr(self_test, "SLOW_TEST_S", -1.0)
    invariant_batch_sizes(exact, width)
    (message,) = caplog.messages
    expected = rf"exact arithmetic: the self-test takes about \d+ s more, because {width} rows took \d+ s{cure}"
    assert re.fullmatch(expected, message)


def test_a_width_beyond_the_largest_compiled_size_is_refused() -> None:
    with pytest.raises(ModelError, match=r"exact arithmetic: max_rows must be at most 2, .*; got 4"):
        ArrayRunner(ExactDenoiser(tiny_config(), batch_sizes=(1, 2)), CONFIG)


def test_the_numerics_id_depends_on_the_reference_batch_size() -> None:
    exact, threaded = ExactDenoiser(tiny_config()), ExactDenoiser(tiny_config())
    threaded.threads = 2
    runners: list[ArrayRunner[Any]] = [
        ArrayRunner(exact, CONFIG),
        ArrayRunner(exact, CONFIG.replace(max_rows=3)),
        ArrayRunner(threaded, CONFIG),
    ]
    assert len({runner.numerics_id for runner in runners}) == 3


def test_numpy_arrays_and_tensors_give_equal_images() -> None:
    images = [
        replace(params(steps=6, cfg_scale=scale, seed=seed, classifier_scale=2 * scale), class_index=2)
        for seed, scale in [(1, 1), (2, 2.5)]
    ]
    pictures = []
    for xp in (np, torch):
        guide = ExactClassifier(tiny_classifier_config(), xp)
        runner: ArrayRunner[Any] = ArrayRunner(ExactDenoiser(tiny_config(), xp, classifier=guide), CONFIG)
        runner.warm_up()
        engine = Engine({"m": runner}, CONFIG, Metrics())
        engine.add(generation("r", *images), submitted_at=0.0)
        pictures.append([result.pixels for _ in range(6) for result in engine.step()])
    for of_numpy, of_torch in zip(*pictures, strict=True):
        assert of_numpy is not None
        assert of_torch is not None
        assert len(np.unique(of_numpy)) > 10  # an image, not a constant
        assert np.abs(of_numpy.astype(int) - of_torch).max() <= 1


@SUBJECTS
def test_the_last_prediction_of_ancestral_sampling_is_the_image(subject: Subject) -> None:
    runner = subject_of(subject)[0]
    image = replace(params(steps=3, cfg_scale=2.0, seed=3), class_index=2)
    steps = [ImageStep(slot=1, params=image, step=step) for step in range(3)]
    runner.start(steps[:1])
    previews = []
    for step in steps:
        runner.launch([step]).wait()
        previews.append(runner.preview([1]).wait()[0].tobytes())
    assert previews[-1] == runner.read([1]).wait()[0].tobytes() == reference(image, subject)
    assert len(set(previews)) == 3


def test_only_watched_images_have_reports_with_previews_when_due() -> None:
    engine = Engine({"m": CountingRunner()}, CONFIG, Metrics())
    engine.add(generation("seen", params(steps=5), params(steps=2), watch=Watch(preview_every=2)), submitted_at=0.0)
    engine.add(generation("unseen", params(steps=9)), submitted_at=0.0)
    reports = []
    while engine.has_work():
        engine.step()
        reports.append(engine.observations)
    assert all(seen.request_id == "seen" for step in reports for seen in step)
    steps = [[(type(seen), seen.position, seen.step, seen.steps) for seen in step] for step in reports]
    assert sorted(steps[0], key=itemgetter(1)) == [(ImageProgress, 0, 1, 5), (ImageProgress, 1, 1, 2)]
    assert steps[1] == [(ImageProgress, 0, 2, 5), (ImagePreview, 0, 2, 5)]
    assert isinstance(reports[1][1], ImagePreview)
    assert reports[1][1].pixels.tolist() == [[[102]]]
    assert [len(step) for step in steps] == [2, 2, 1, 2, 0, 0, 0, 0, 0]


def test_padding_changes_no_pixel() -> None:
    padded = ArrayRunner(backend(), CONFIG)  # before its self-test, it pads every batch to the full width
    engine = Engine({"m": padded}, CONFIG, Metrics())
    image = replace(params(steps=4, cfg_scale=2.0, seed=3), class_index=2)
    engine.add(generation("r", image), submitted_at=0.0)
    results = [result for _ in range(4) for result in engine.step()]
    assert results[0].pixels is not None
    assert results[0].pixels.tobytes() == reference(image)


@SUBJECTS
def test_a_row_that_is_not_finite_fails_alone_and_its_slot_is_reused(subject: Subject) -> None:
    runner = subject_of(subject)[0]
    engine = Engine({"m": runner}, CONFIG, Metrics())
    good, bad = params(steps=6, seed=1), params(steps=6, seed=2)
    engine.add(generation("r", good, bad), submitted_at=0.0)
    assert engine.step() == []
    runner.slots.x[CONFIG.num_slots - 2] = torch.nan  # the second slot that is assigned
    left: list[ImageResult] = []
    while not left:  # a queued device is two steps ahead
        left += engine.step()
    (failed,) = left
    assert (failed.position, failed.status, failed.pixels) == (1, ImageStatus.FAILED, None)
    engine.add(generation("again", bad), submitted_at=0.0)
    while engine.has_work():
        left += engine.step()
    finished = {r.request_id: r for r in left[1:]}
    for request_id, expected in (("r", good), ("again", bad)):
        pixels = finished[request_id].pixels
        assert pixels is not None
        assert pixels.tobytes() == reference(expected, subject)


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


def test_a_step_is_reported_after_the_launch_of_the_next_one() -> None:
    metrics, runner = Metrics(), CountingRunner()
    engine = Engine({"m": runner}, CONFIG, metrics)
    engine.add(generation("short", params(steps=1)), submitted_at=0.0)
    engine.add(generation("long", params(steps=2), watch=Watch(preview_every=1)), submitted_at=0.0)
    engine.launch()
    assert engine.report() == []
    engine.settle()
    engine.launch()
    engine.add(generation("later", params(steps=3)), submitted_at=0.0)  # is not part of the step reported now
    (short,) = engine.report()
    assert (short.request_id, short.pixels is not None and short.pixels.tolist()) == ("short", [[[1]]])
    assert [(seen.request_id, seen.step) for seen in engine.observations] == [("long", 1), ("long", 1)]
    assert metrics.registry.get_sample_value("iddpm_row_steps_total") == 2
    assert len(runner.calls) == 1  # the second step has not been waited for
    engine.settle()
    assert [result.request_id for result in engine.report()] == ["long"]
    assert engine.report() == []


def test_an_image_that_ends_with_an_unreported_step_adds_no_predicted_work() -> None:
    engine = Engine({"m": CountingRunner()}, CONFIG, Metrics())
    engine.add(generation("r", params(steps=1)), submitted_at=0.0)
    for act in (engine.launch, engine.settle, engine.report):
        act()
        assert [placed.remaining_row_steps for placed in engine.snapshot.started] == [0]
    engine.add(generation("s", params(steps=2)), submitted_at=0.0)
    engine.launch()
    assert [(placed.image.request_id, placed.remaining_row_steps) for placed in engine.snapshot.started] == [("s", 1)]


def test_a_published_snapshot_does_not_change() -> None:
    engine = Engine({"m": CountingRunner()}, CONFIG, Metrics())
    engine.add(generation("r", params(steps=5)), submitted_at=0.0)
    engine.step()
    before = engine.snapshot
    seen = (before.started, dict(before.steps), dict(before.widths), before.costs["m"].table())
    engine.costs["m"].observe(3, 1.0)
    engine.step()
    engine.abort("r")
    assert (before.started, dict(before.steps), dict(before.widths), before.costs["m"].table()) == seen
    assert before.started[0].remaining_row_steps == 4
    engine.report()
    engine.publish()
    assert engine.snapshot.started == ()


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
    runner = ArrayRunner(other, CONFIG)
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


@SUBJECTS
def test_evicted_images_are_restored_with_their_pixels(subject: Subject) -> None:
    config = CONFIG.replace(slots_per_row=1)
    metrics = Metrics()
    engine = Engine({"m": subject_of(subject)[0]}, config, metrics)
    long = [
        replace(params(steps=12, seed=seed, cfg_scale=scale, classifier_scale=4 * seed), class_index=1)
        for seed, scale in enumerate([1, 1.5])
    ]
    short = [replace(params(steps=3, seed=9), image_index=k) for k in range(4)]
    engine.add(generation("long", *long, *long), submitted_at=0.0)
    results = engine.step() + engine.step()
    engine.add(generation("short", *short), submitted_at=0.0)
    while engine.has_work():
        results += engine.step()
    assert metrics.registry.get_sample_value("iddpm_evictions_total") == 3
    assert [result.request_id for result in results[:4]] == ["short"] * 4
    for result in results:
        expected = short[result.position] if result.request_id == "short" else long[result.position % 2]
        assert result.pixels is not None
        assert result.pixels.tobytes() == reference(expected, subject)


@SUBJECTS
def test_images_with_given_arrays_come_back_from_eviction_into_slots_that_had_others(subject: Subject) -> None:
    config = CONFIG.replace(slots_per_row=1)
    metrics = Metrics()
    engine = Engine({"m": subject_of(subject)[0]}, config, metrics)
    plans = [
        Chain(spec="9"),
        Chain(sampler="dpm++", spec="9"),
        *[Chain(sampler="ddim", spec="7", resample=Resample(2, 2))] * 2,
    ]
    long = [
        replace(
            params(steps=build_chain(DIFFUSION, plan).num_steps, seed=seed),
            plan=plan,
            given=MASKED[seed % 2],
            output="values" if seed == 0 else "pixels",
        )
        for seed, plan in enumerate(plans)
    ]
    short = [with_chain(params(seed=seed), 5 + seed % 2, as_values=seed == 1) for seed in range(4)]
    engine.add(generation("long", *long), submitted_at=0.0)
    results = engine.step()
    engine.add(generation("short", *short), submitted_at=0.0)
    while engine.has_work():
        results += engine.step()
    assert (metrics.registry.get_sample_value("iddpm_evictions_total") or 0) >= 2
    assert len(results) == 8
    for result in results:
        images = short if result.request_id == "short" else long
        assert output_of(result) == reference(images[result.position], subject)


def test_all_kinds_of_chains_share_a_network_call() -> None:
    network = ExactDenoiser(tiny_config())
    config = EngineConfig(max_rows=len(CHAINS))
    runner: ArrayRunner[Any] = ArrayRunner(network, config)
    runner.warm_up()
    engine = Engine({"m": runner}, config, Metrics())
    images = [with_chain(params(seed=seed), seed) for seed in range(len(CHAINS))]
    engine.add(generation("r", *images), submitted_at=0.0)
    network.calls.clear()
    engine.step()
    assert network.calls == [len(CHAINS)]
    assert len({image.num_steps for image in images}) > 3


@SUBJECTS
def test_kept_pixels_are_the_given_ones(subject: Subject) -> None:
    engine = Engine({"m": subject_of(subject)[0]}, CONFIG, Metrics())
    images = [with_chain(params(seed=3), 8), with_chain(params(seed=4), 8, 1, as_values=True)]
    engine.add(generation("r", *images), submitted_at=0.0)
    results: list[ImageResult] = []
    while engine.has_work():
        results += engine.step()
    for result, image in zip(sorted(results, key=lambda result: result.position), images, strict=True):
        assert image.given is not None
        assert image.given.mask is not None
        assert image.given.image is not None
        kept = image.given.mask[0] == 0
        if result.values is not None:
            np.testing.assert_array_equal(result.values[:, kept], image.given.image[:, kept])
        else:
            assert result.pixels is not None
            np.testing.assert_array_equal(result.pixels[kept], to_uint8(image.given.image[None])[0][kept])


def test_a_given_image_of_another_shape_fails_its_image_only() -> None:
    engine = Engine({"m": subject_of("numpy")[0]}, CONFIG, Metrics())
    wrong = GivenArrays(image=np.zeros((3, 8, 8), dtype=np.float32))
    good = params(steps=2, seed=1)
    engine.add(generation("wrong", replace(with_chain(params(), 2), given=wrong)), submitted_at=0.0)
    engine.add(generation("good", good), submitted_at=0.0)
    results: list[ImageResult] = []
    while engine.has_work():
        results += engine.step()
    assert {result.request_id: result.failure for result in results} == {"wrong": "error", "good": None}
    assert output_of(next(result for result in results if result.failure is None)) == reference(good, "numpy")


@pytest.mark.parametrize("subject", ["unet", "numpy", "asynchronous", "queued"])
def test_conditioned_images_of_all_kinds_in_mixed_batches_equal_those_sampled_alone(
    subject: Subject, tmp_path: Path
) -> None:
    config, xp = tiny_config(cond_channels=2), torch if subject in ("unet", "queued") else np
    runner: ArrayRunner[Any]
    network: ClassNetwork
    if subject == "unet":
        runner = ArrayRunner(TorchBackend(tiny_checkpoint(tmp_path / "tiny", cond_channels=2)), FEW_SLOTS)
        network = tiny_network(config)
    else:
        made = {"asynchronous": AsynchronousDenoiser, "queued": QueuedDenoiser}.get(subject, ExactDenoiser)
        exact = made(config, batch_sizes=(1, WIDTH) if subject == "queued" else None)
        runner, network = ArrayRunner(exact, FEW_SLOTS), AsNetwork(exact)
    metrics = Metrics()
    engine = Engine({"m": runner}, FEW_SLOTS, metrics)
    engine.warm_up()
    rng = np.random.default_rng(0)
    conds = [rng.uniform(-1, 1, (2, 8, 8)).astype(np.float32) for _ in range(3)]

    def conditioned(number: int, seed: int, cfg_scale: float) -> ImageParams:
        image = with_chain(replace(params(steps=5, seed=seed), cfg_scale=cfg_scale), number)
        return replace(image, given=replace(image.given or GivenArrays(), cond=conds[seed % 3]))

    sent = {
        "early": [conditioned(number, number, 1.0) for number in reversed(range(len(CHAINS)))],
        "late": [conditioned(number, number + 1, 2.5) for number in range(len(CHAINS))],
    }
    engine.add(generation("early", *sent["early"], priority=Priority.BATCH), submitted_at=0.0)
    results = [*engine.step(), *engine.step()]
    engine.add(generation("late", *sent["late"]), submitted_at=0.0)
    while engine.has_work():
        results += engine.step()
    assert len(results) == 2 * len(CHAINS)
    assert (metrics.registry.get_sample_value("iddpm_evictions_total") or 0) > 0
    for result in results:
        alone = sampled_alone(sent[result.request_id][result.position], network, xp=xp)
        assert (result.failure, output_of(result)) == (None, alone)
    for image in sent["early"] if subject == "numpy" else sent["early"][:1]:  # seconds with torch
        conditioned_each = [replace(image, given=replace(image.given or GivenArrays(), cond=cond)) for cond in conds]
        found = {sampled_alone(each, network, xp=xp) for each in conditioned_each}
        assert len(found) == (1 if image.plan.strength == 0 else 3), image.plan


@pytest.mark.parametrize("cond", [None, np.zeros((1, 8, 8), dtype=np.float32)])
def test_a_missing_or_unfit_conditioning_image_fails_its_image_only(cond: npt.NDArray[np.float32] | None) -> None:
    runner = ArrayRunner(ExactDenoiser(tiny_config(cond_channels=2)), CONFIG)
    engine = Engine({"m": runner}, CONFIG, Metrics())
    good = replace(params(steps=2), given=GivenArrays(cond=np.ones((2, 8, 8), dtype=np.float32)))
    engine.add(generation("wrong", replace(good, given=GivenArrays(cond=cond))), submitted_at=0.0)
    engine.add(generation("good", good), submitted_at=0.0)
    results: list[ImageResult] = []
    while engine.has_work():
        results += engine.step()
    assert {result.request_id: result.failure for result in results} == {"wrong": "error", "good": None}


def test_a_model_without_conditioning_has_no_memory_for_it() -> None:
    assert subject_of("numpy")[0].slots.cond is None


def test_only_evicted_images_can_be_restored() -> None:
    with pytest.raises(TypeError, match="only states returned by `evict`"):
        warm_runner().restore([0], ["nonsense"])


class Clock:
    """A clock that advances only while a runner works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedRunner(CountingRunner):
    """Takes fixed + per_row * rows on a clock."""

    def __init__(self, clock: Clock, fixed: float, per_row: float) -> None:
        super().__init__()
        self._clock = clock
        self.fixed = fixed
        self.per_row = per_row

    def step(self, slots: Sequence[int]) -> list[bool]:
        self._clock.now += self.fixed + self.per_row * len(slots)
        return super().step(slots)


@pytest.mark.parametrize(("fixed", "per_row", "width"), [(1.0, 0.0, 8), (0.0, 1.0, 2)])
def test_step_costs_are_measured_at_start_up_and_determine_the_width(fixed: float, per_row: float, width: int) -> None:
    clock, metrics = Clock(), Metrics()
    engine = Engine({"m": TimedRunner(clock, fixed, per_row)}, EngineConfig(max_rows=8), metrics, clock)
    engine.measure()
    assert engine.costs["m"].table() == {rows: fixed + per_row * rows for rows in range(1, 9)}
    assert engine.scheduler.width("m") == width
    assert metrics.registry.get_sample_value("iddpm_width_rows", {"model": "m"}) == width
    engine.add(generation("r", params()), submitted_at=0.0)
    with pytest.raises(RuntimeError, match="only while nothing is in flight"):
        engine.measure()


def test_an_aborted_image_stays_in_the_snapshot_until_its_result_has_been_delivered() -> None:
    engine = Engine({"m": CountingRunner()}, EngineConfig(max_rows=2), Metrics())
    engine.add(generation("aborted", params(steps=9), params(steps=9), params(steps=9)), submitted_at=0.0)
    engine.add(generation("next", params(steps=9)), submitted_at=0.0)
    engine.step()
    before = engine.snapshot.started
    assert [(placed.image.position, placed.remaining_row_steps) for placed in before] == [(0, 8), (1, 8)]
    assert len(engine.abort("aborted")) == 3
    assert engine.snapshot.started == before
    engine.launch()  # the event loop may read this snapshot before it receives the results
    assert {placed.image for placed in before} < set(engine.snapshot.images)
    engine.settle()
    engine.report()
    engine.step()
    assert [image.request_id for image in engine.snapshot.images] == ["next"]


def test_the_width_follows_changed_costs() -> None:
    clock = Clock()
    runner = TimedRunner(clock, 0.0, 1.0)
    engine = Engine({"m": runner}, EngineConfig(max_rows=8), Metrics(), clock)
    engine.measure()
    assert engine.scheduler.width("m") == 2
    for _ in range(200):  # the device was in use by another process at start-up
        for rows in range(1, 9):
            for _ in range(2):
                engine.costs["m"].observe(rows, 1.0)
    runner.fixed, runner.per_row = 1.0, 0.0
    engine.add(generation("r", params(steps=WIDTH_INTERVAL)), submitted_at=0.0)
    while engine.has_work():
        engine.step()
    assert engine.scheduler.width("m") == 8


def test_a_slow_call_at_start_up_does_not_narrow_the_width() -> None:
    class Hiccup(TimedRunner):
        late = 100.0

        def step(self, slots: Sequence[int]) -> list[bool]:
            if len(slots) == 8:
                self._clock.now, self.late = self._clock.now + self.late, 0.0
            return super().step(slots)

    clock = Clock()
    engine = Engine({"m": Hiccup(clock, 1.0, 0.0)}, EngineConfig(max_rows=8), Metrics(), clock)
    engine.measure()
    assert engine.costs["m"].seconds(8) == 1.0
    assert engine.scheduler.width("m") == 8


def test_a_size_measured_as_too_slow_is_measured_again() -> None:
    clock = Clock()
    engine = Engine({"m": TimedRunner(clock, 1.0, 0.0)}, EngineConfig(max_rows=8), Metrics(), clock)
    for rows in range(1, 9):
        engine.costs["m"].observe(rows, 1.0 if rows < 8 else 2.0)  # the largest, measured on a busy device
    engine.load("m", engine.runners["m"], engine.costs["m"])
    assert engine.scheduler.width("m") == 7
    engine.add(generation("r", *[params(steps=1000, seed=k) for k in range(16)]), submitted_at=0.0)
    while engine.scheduler.steps("m") < 1000:
        engine.step()
    assert engine.scheduler.width("m") == 8


def test_the_best_size_is_found_again_if_the_next_size_is_no_better() -> None:
    true = {1: 1.0, 2: 1.95, 4: 3.85, 8: 6.66}

    class Stairs(TimedRunner):
        def padded_rows(self, rows: int) -> int:
            return min(size for size in true if size >= rows)

        def step(self, slots: Sequence[int]) -> list[bool]:
            self.fixed = true[self.padded_rows(len(slots))]
            return super().step(slots)

    clock = Clock()
    engine = Engine({"m": Stairs(clock, 0.0, 0.0)}, EngineConfig(max_rows=8), Metrics(), clock)
    for rows, seconds in true.items():
        engine.costs["m"].observe(rows, seconds if rows < 8 else 1.2 * seconds)
    engine.load("m", engine.runners["m"], engine.costs["m"])
    assert engine.scheduler.width("m") == 2
    engine.add(generation("r", *[params(steps=1000, seed=k) for k in range(16)]), submitted_at=0.0)
    while engine.scheduler.steps("m") < 1000:
        engine.step()
    assert engine.scheduler.width("m") == 8


def test_trial_widths_are_no_wider_than_memory_allows() -> None:
    class Short(TimedRunner):
        def step(self, slots: Sequence[int]) -> list[bool]:
            tried.append(len(slots))
            if len(slots) > 4:
                raise MemoryError
            return super().step(slots)

    tried: list[int] = []
    clock = Clock()
    runner = Short(clock, 1.0, 0.0)
    engine = Engine({"m": runner}, EngineConfig(max_rows=8), Metrics(), clock)
    for rows in range(1, 9):
        engine.costs["m"].observe(rows, 1.0)
    engine.load("m", runner, engine.costs["m"])
    engine.add(generation("r", *[params(steps=100, seed=k) for k in range(8)]), submitted_at=0.0)
    for _ in range(3 * TRIAL_INTERVAL):
        engine.step()
    assert engine.scheduler.width("m") == 4
    assert [rows for rows in tried if rows > 4] == [8]


def test_sizes_are_timed_in_turns_so_that_a_slowdown_affects_all() -> None:
    class Slowing(TimedRunner):
        def step(self, slots: Sequence[int]) -> list[bool]:
            self.fixed *= 1.1
            return super().step(slots)

    clock = Clock()
    engine = Engine({"m": Slowing(clock, 1.0, 0.0)}, EngineConfig(max_rows=8, timed_calls=3), Metrics(), clock)
    engine.measure()
    assert engine.costs["m"].seconds(8) / engine.costs["m"].seconds(1) == pytest.approx(
        1.1**14
    )  # one after the other: 1.1**42


def test_timing_steps_changes_no_image() -> None:
    runner = warm_runner()
    engine = Engine({"m": runner}, CONFIG, Metrics())
    engine.measure()
    image = replace(params(steps=4, cfg_scale=2.0, seed=3), class_index=2)
    engine.add(generation("r", image), submitted_at=0.0)
    results = [result for _ in range(4) for result in engine.step()]
    assert results[0].pixels is not None
    assert results[0].pixels.tobytes() == reference(image)


def test_wasted_and_remaining_work_are_counted() -> None:
    metrics = Metrics()
    engine = Engine({"m": CountingRunner(fail_slots_at={CONFIG.num_slots - 1: 2})}, CONFIG, metrics)
    engine.add(generation("fails", params(steps=3)), submitted_at=0.0)
    engine.add(generation("aborted", params(steps=9, cfg_scale=2.0)), submitted_at=0.0)
    value = metrics.registry.get_sample_value
    assert value("iddpm_remaining_row_steps") == 3 + 18
    for _ in range(3):
        engine.step()
    engine.abort("aborted")
    assert value("iddpm_wasted_row_steps_total") == 2 + 3 * 2
    assert value("iddpm_remaining_row_steps") == 0
    counts = [value("iddpm_engine_step_seconds_count", {"model": "m", "padded_rows": rows}) for rows in ("2", "3")]
    assert counts == [1, 2]


def test_a_step_that_raised_is_not_counted_as_wasted() -> None:
    class Broken(CountingRunner):
        def step(self, slots: Sequence[int]) -> list[bool]:
            raise RuntimeError("no")

    metrics = Metrics()
    engine = Engine({"m": Broken()}, CONFIG, metrics)
    engine.add(generation("r", params(cfg_scale=2.0)), submitted_at=0.0)
    assert [result.failure for result in engine.step()] == ["error"]
    assert metrics.registry.get_sample_value("iddpm_wasted_row_steps_total") == 0


def test_an_image_reports_its_lateness() -> None:
    clock = Clock()
    engine = Engine({"m": TimedRunner(clock, 1.0, 0.0)}, CONFIG, Metrics(), clock)
    engine.add(generation("late", params(steps=3), deadline_s=2.0), submitted_at=0.0)
    engine.add(generation("in time", params(steps=3), deadline_s=4.0), submitted_at=0.0)
    results = [result for _ in range(3) for result in engine.step()]
    assert [(result.request_id, result.late_s) for result in results] == [("late", 1.0), ("in time", 0.0)]

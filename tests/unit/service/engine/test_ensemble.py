"""A model of several networks: every image takes each step with the network of its timestep, whatever its company."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.arrays import namespace
from diffusion.network_inputs import NetworkInputs
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, NetworkEnsemble, sample_images
from service.backends.ensemble import DenoiserEnsemble
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import ImageParams, ImageResult, ImageStatus, PlanKey, StepBatch
from service.engine.runners.array_runner import ArrayRunner
from service.engine.scheduler import Scheduler
from service.errors import ModelError
from service.metrics import Metrics
from tests.arriving import ArrivingScheduler
from tests.counts import count
from tests.denoisers import AsNetwork, AsynchronousDenoiser, ExactClassifier, ExactDenoiser
from tests.fakes import CLASS_NAMES, generation, params, tiny_classifier_config, tiny_config
from tests.late_queue import QueuedDenoiser
from tests.unit.service.engine.test_scheduler import image, names, run_step

WIDTH = 4
CONFIG = EngineConfig(max_rows=WIDTH, slots_per_row=2, timed_calls=0)
NETWORK_OF = np.repeat([0, 1, 0], [200, 700, 100])  # of T = 1000
POISON = 3
"""Class for which the second network raises."""
Kind = Literal["host", "asynchronous", "queued"]
KINDS = pytest.mark.parametrize("kind", get_args(Kind))


def members(kind: Kind) -> tuple[ExactDenoiser, ExactDenoiser]:
    base = {"host": ExactDenoiser, "asynchronous": AsynchronousDenoiser, "queued": QueuedDenoiser}[kind]
    xp = torch if kind == "queued" else np
    sizes = (1, 2, WIDTH) if kind == "queued" else None

    class Mirrored(base):  # type: ignore[misc, valid-type]
        """Another network, exact too."""

        def __call__(self, inputs: NetworkInputs[Any]) -> Any:
            out = super().__call__(inputs)
            return -namespace(out).flip(out, axis=3)

    def make(cls: Any) -> ExactDenoiser:
        guide = ExactClassifier(tiny_classifier_config(), xp, batch_sizes=sizes)
        made: ExactDenoiser = cls(tiny_config(), batch_sizes=sizes, classifier=guide)
        return made

    return make(base), make(Mirrored)


def ensemble(networks: tuple[Any, ...]) -> DenoiserEnsemble[Any]:
    return DenoiserEnsemble(
        config=tiny_config(),
        names=tuple("abc"[: len(networks)]),
        members=networks,
        network_of=NETWORK_OF % len(networks),
    )


@cache
def warm(kind: Kind) -> ArrayRunner[Any]:
    runner: ArrayRunner[Any] = ArrayRunner(ensemble(members(kind)), CONFIG)
    runner.warm_up()
    return runner


@cache
def alone(asked: ImageParams, kind: Kind) -> bytes:
    """Sample one image with the reference loop."""
    networks = members(kind)
    diffusion = tiny_config().diffusion
    plan = build_plan(diffusion, asked.plan.sampler, asked.plan.spec, asked.plan.eta)
    spec = ImageSpec(
        seed=asked.seed,
        image_index=asked.image_index,
        class_index=asked.class_index,
        cfg_scale=asked.cfg_scale,
        classifier_scale=asked.classifier_scale,
    )
    network = NetworkEnsemble(
        members=[AsNetwork(member) for member in networks], network_of=NETWORK_OF, diffusion=diffusion
    )
    gradient = networks[0].classifier if asked.classifier_scale else None
    return sample_images(network, plan, [spec], gradient=gradient, xp=networks[0].xp)[0].tobytes()


def finish(engine: Engine) -> dict[str, ImageResult]:
    results: list[ImageResult] = []
    while engine.has_work():
        engine.launch()
        engine.settle()
        results += engine.report()
    return {result.request_id: result for result in results}


@st.composite
def image_params(draw: st.DrawFn) -> ImageParams:
    steps = draw(st.integers(2, 8))
    return ImageParams(
        plan=PlanKey(sampler=draw(st.sampled_from(["ancestral", "ddim"])), spec=str(steps)),
        num_steps=steps,
        seed=draw(st.integers(0, 2**53 - 1)),
        image_index=draw(st.integers(0, 3)),
        class_index=draw(st.integers(0, len(CLASS_NAMES) - 1)),
        cfg_scale=draw(st.sampled_from([1.0, 2.0])),
        classifier_scale=draw(st.sampled_from([0.0, 1.5])),
    )


@KINDS
@given(data=st.data())
@settings(max_examples=count(200), deadline=None)
def test_images_that_join_and_leave_are_those_of_the_reference_loop(kind: Kind, data: st.DataObject) -> None:
    engine = Engine({"m": warm(kind)}, CONFIG, Metrics())
    images: dict[str, ImageParams] = {}
    gone: set[str] = set()
    results: dict[str, ImageResult] = {}
    for number in range(data.draw(st.integers(1, 12))):
        asked = data.draw(image_params())
        images[str(number)] = asked
        engine.add(generation(str(number), asked), submitted_at=0.0)
        for _ in range(data.draw(st.integers(0, 3))):
            engine.launch()
            engine.settle()
            results |= {result.request_id: result for result in engine.report()}
        if data.draw(st.integers(0, 9)) == 0:
            gone.add(str(number))
            engine.abort(str(number))
    results |= finish(engine)
    for name, asked in images.items():
        if name in gone and name not in results:
            continue
        pixels = results[name].pixels
        assert pixels is not None
        assert pixels.tobytes() == alone(asked, kind)


def calls(network: ExactDenoiser) -> int:
    """Return the calls of a network; replays of its steps do not call it from Python."""
    return network.queue.replays if isinstance(network, QueuedDenoiser) else len(network.calls)


@KINDS
def test_a_step_calls_one_network_and_both_are_called(kind: Kind) -> None:
    networks = members(kind)
    runner: ArrayRunner[Any] = ArrayRunner(ensemble(networks), CONFIG)
    runner.warm_up()
    engine = Engine({"m": runner}, CONFIG, Metrics())
    before = [calls(network) for network in networks]
    engine.add(generation("r", *[params(steps=10, seed=k) for k in range(3)]), submitted_at=0.0)
    finish(engine)
    timesteps = build_plan(tiny_config().diffusion, spec="10").timesteps
    wanted = [int((NETWORK_OF[timesteps] == index).sum()) for index in range(2)]
    assert [calls(network) - made for network, made in zip(networks, before, strict=True)] == wanted
    assert min(wanted) > 0


def test_images_at_different_networks_take_turns_and_none_waits_longer() -> None:
    engine = Engine({"m": warm("host")}, CONFIG, Metrics())
    scheduler = engine.scheduler
    engine.add(generation("early", *[params(steps=50, seed=k) for k in range(2)]), submitted_at=0.0)
    for _ in range(10):
        engine.step()
    engine.add(generation("late", *[params(steps=50, seed=k) for k in range(2)]), submitted_at=0.0)
    done = {image: image.steps_done for image in scheduler.running()}
    assert len(done) == 2
    for _ in range(6):
        engine.step()
    steps = {(image.request_id, image.steps_done - done.get(image, 0)) for image in scheduler.running()}
    assert steps == {("early", 3), ("late", 3)}
    engine.abort("early")
    engine.abort("late")
    assert not finish(engine)


def test_an_image_that_one_network_cannot_take_costs_no_other_image() -> None:
    first, second = members("host")

    class Poisoned(type(second)):  # type: ignore[misc]
        def __call__(self, inputs: NetworkInputs[Any]) -> Any:
            if (np.asarray(inputs.y) == POISON).any():
                raise RuntimeError("poison")
            return super().__call__(inputs)

    poisoned = Poisoned(tiny_config(), classifier=first.classifier)
    runner: ArrayRunner[Any] = ArrayRunner(ensemble((first, poisoned)), CONFIG)
    engine = Engine({"m": runner}, CONFIG, Metrics())
    asked = {
        str(index): ImageParams(
            plan=PlanKey(sampler="ancestral", spec="8"), num_steps=8, seed=index, image_index=0, class_index=index
        )
        for index in range(4)
    }
    for name, one in asked.items():
        engine.add(generation(name, one), submitted_at=0.0)
    results = finish(engine)
    assert results[str(POISON)].status is ImageStatus.FAILED
    assert results[str(POISON)].failure == "error"
    for name in "012":
        pixels = results[name].pixels
        assert pixels is not None
        assert pixels.tobytes() == alone(asked[name], "host")


def test_numerics_depend_on_members_and_their_timesteps() -> None:
    first, second = members("host")
    second.network_id = "mirrored"
    whole = ensemble((first, second))
    other = DenoiserEnsemble(
        config=whole.config, names=whole.names, members=whole.members, network_of=NETWORK_OF[::-1].copy()
    )
    ids = {
        ArrayRunner(model, CONFIG).numerics_id
        for model in (whole, other, ensemble((second, first)), ensemble((first,)), first)
    }
    assert len(ids) == 5


def test_members_compiled_for_other_sizes_are_refused() -> None:
    small, large = (ExactDenoiser(tiny_config(), batch_sizes=(1, 2, size)) for size in (WIDTH, 2 * WIDTH))
    with pytest.raises(ModelError, match=r"equal batch sizes; got \[4, 8\]"):
        ArrayRunner(ensemble((small, large)), CONFIG)


def test_only_batch_sizes_at_which_all_members_agree_are_run() -> None:
    runner: ArrayRunner[Any] = ArrayRunner(
        ensemble(tuple(ExactDenoiser(tiny_config(), batch_sizes=sizes) for sizes in ((1, 2, 4), (1, 3, 4)))), CONFIG
    )
    runner.warm_up()
    assert runner.sizes.network == (1, 4)


# The scheduler


def by_steps_done(*changes: int) -> Scheduler:
    """Return a scheduler of a model whose images change their network after these numbers of steps."""
    config = EngineConfig(policy="fifo", max_rows=WIDTH, slots_per_row=2)
    return ArrivingScheduler(config, ["m"], {"m": lambda params, step: sum(step >= change for change in changes)})


def started(scheduler: Scheduler, steps: int, *images: str) -> None:
    scheduler.add(image(name, steps=9) for name in images)
    for _ in range(steps):
        run_step(scheduler)


def test_a_round_takes_one_step_of_every_picked_image() -> None:
    scheduler = by_steps_done(2)
    started(scheduler, 2, "a", "b")
    scheduler.add([image("c", 9), image("d", 9), image("e", 9)])
    taken = [run_step(scheduler)[0] for _ in range(5)]
    assert taken == [["a", "b"], ["c", "d"], ["a", "b"], ["c", "d"], ["a", "b", "c", "d"]]


def test_images_that_left_in_the_middle_of_a_round_are_left_out() -> None:
    scheduler = by_steps_done(1)
    started(scheduler, 1, "a")
    scheduler.add([image("b"), image("c")])
    assert run_step(scheduler)[0] == ["a"]
    scheduler.abort("b")
    assert run_step(scheduler)[0] == ["c"]
    assert run_step(scheduler)[0] == ["a", "c"]
    started(scheduler, 1, "d")
    scheduler.abort("d")
    scheduler.abort("c")
    assert run_step(scheduler)[0] == ["a"]


def test_images_of_a_round_are_not_evicted_for_each_other_or_counted_as_preempted() -> None:
    config = EngineConfig(policy="srw", max_rows=WIDTH, slots_per_row=1)
    scheduler = ArrivingScheduler(config, ["m"], {"m": lambda params, step: int(step >= 1)})
    scheduler.add(image(name, steps=9) for name in "abcd")
    run_step(scheduler)
    scheduler.add(image(name, steps=3) for name in "xy")
    batches: list[StepBatch] = []
    for _ in range(2):
        batch = scheduler.schedule(now=0.0)
        assert batch is not None
        scheduler.complete(batch, [True] * len(batch.images))
        batches.append(batch)
    assert sorted(names(batches[0]) + names(batches[1])) == ["a", "b", "x", "y"]
    assert sorted(move.image.request_id for batch in batches for move in batch.evictions) == ["c", "d"]
    assert [batch.preempted for batch in batches] == [2, 0]

"""Random scripts of all that the engine does at once: whatever happens, no pixel differs and every image ends once.

Two models run in one engine, the second conditioned on images. Requests begin with given images, keep parts of them,
encode them, are single calls of a network or cascades of both models, use all samplers and both kinds of guidance, are
watched and cancelled. The networks overflow, raise, and run out of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.update import from_uint8_reversibly
from service.engine.engine import Engine
from service.engine.policies import PolicyName
from service.engine.request import (
    GenerationRequest,
    GivenArrays,
    ImageParams,
    ImageResult,
    ImageStatus,
    NextStage,
    PlanKey,
    Priority,
    Watch,
)
from service.metrics import Metrics
from service.models.registry import served_model
from service.requests.cascading import next_stage
from tests.counts import count
from tests.denoisers import AsNetwork, ExactClassifier, ExactDenoiser
from tests.fakes import generation, tiny_classifier_config
from tests.faulty import FAULTY_CONFIG, FINE, MODELS, OVERFLOWS, RAISES, Kind, faulty
from tests.given_images import output_of, sampled_alone, with_any_chain

CONDS = [from_uint8_reversibly(np.full((1, 8, 8, 1), level, dtype=np.uint8))[0] for level in (50, 200)]
UPSAMPLER = served_model("up", ExactDenoiser(MODELS["up"]), "numerics")
LARGE = 1000
"""More rows than a step has."""


@st.composite
def image_params(draw: st.DrawFn) -> ImageParams:
    steps = draw(st.sampled_from([2, 3, 12]))
    sampler: str = draw(st.sampled_from(["ancestral", "ddim"]))
    return ImageParams(
        plan=PlanKey(sampler=sampler, spec=str(steps), eta=draw(st.sampled_from([0.0, 0.5])) * (sampler == "ddim")),
        num_steps=steps,
        seed=draw(st.sampled_from([0, 7])),
        image_index=draw(st.integers(0, 2)),
        class_index=draw(st.sampled_from([0, FINE, FINE, OVERFLOWS, RAISES])),
        cfg_scale=draw(st.sampled_from([1.0, 1.0, 2.5])),
        classifier_scale=draw(st.sampled_from([0.0, 0.0, 3.0])),
    )


def conditioned(image: ImageParams, number: int) -> ImageParams:
    """Add a conditioning image to what else is given."""
    return replace(image, given=replace(image.given or GivenArrays(), cond=CONDS[number]))


IMAGES = with_any_chain(image_params())
STAGES = st.tuples(
    IMAGES.filter(lambda image: image.plan.kind == "sample").map(lambda image: replace(image, output="pixels")),
    IMAGES.filter(lambda image: image.given is None),
)


@st.composite
def requests(draw: st.DrawFn) -> GenerationRequest:
    """Draw a request to either model or to both; its id is set when it is made."""
    kind = draw(st.sampled_from(["m", "up", "cascade"]))
    images: tuple[ImageParams, ...] = ()
    then: NextStage | None = None
    if kind == "cascade":
        images, later = zip(*draw(st.lists(STAGES, min_size=1, max_size=3)), strict=True)
        then = next_stage(MODELS["m"], UPSAMPLER, later)
    else:
        images = tuple(draw(st.lists(IMAGES, min_size=1, max_size=4)))
        if kind == "up":
            images = tuple(conditioned(image, image.seed % 2) for image in images)
    request = generation(
        "",
        *images,
        model="up" if kind == "up" else "m",
        priority=draw(st.sampled_from(Priority)),
        client=draw(st.sampled_from(["", "a", "b"])),
        deadline_s=draw(st.sampled_from([None, 5.0, 50.0])),
        watch=draw(st.sampled_from([None, Watch(preview_every=2)])),
    )
    return replace(request, then=then and replace(then, model="up"))


SCRIPTS = st.lists(
    st.one_of(
        st.tuples(st.just("add and step"), requests()),
        st.tuples(st.just("add and step"), requests()),
        st.tuples(st.just("add"), requests()),
        st.tuples(st.just("abort"), st.integers(0, 6)),
        st.tuples(st.sampled_from(["step", "overlap"]), st.integers(1, 4)),
        st.tuples(st.just("memory"), st.tuples(st.sampled_from([*MODELS]), st.sampled_from([1, 2, 3, LARGE]))),
        st.tuples(
            st.just("trouble"),
            st.tuples(st.sampled_from([*MODELS]), st.sampled_from([RuntimeError("passing"), MemoryError()])),
        ),
    ),
    min_size=4,
    max_size=20,
)


@cache
def alone(model: str, image: ImageParams, xp: Any) -> bytes:
    """Sample one image without an engine, with a network that does not fail."""
    guide = ExactClassifier(tiny_classifier_config(), xp)
    return sampled_alone(image, AsNetwork(ExactDenoiser(MODELS[model], xp)), guide, xp=xp)


def expected(request: GenerationRequest, position: int, xp: Any) -> bytes:
    """Run the stages of an image one after the other, each alone."""
    image = request.images[position]
    made = alone(request.model, image, xp)
    if request.then is None:
        return made
    small = np.frombuffer(made, dtype=np.uint8).reshape(8, 8, 1)
    cond = from_uint8_reversibly(small[None])[0]
    later = replace(request.then.images[position], given=GivenArrays(cond=cond))
    return sampled_alone(
        later, AsNetwork(ExactDenoiser(MODELS["up"], xp)), ExactClassifier(tiny_classifier_config(), xp), xp=xp
    )


@dataclass
class Play:
    """A script that is being played."""

    kind: Kind
    policy: PolicyName
    requests: list[GenerationRequest] = field(default_factory=list)
    results: list[ImageResult] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    least_memory: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODELS, LARGE))

    def __post_init__(self) -> None:
        self.networks = {model: faulty(self.kind, model)[0] for model in MODELS}
        self.runners = {model: faulty(self.kind, model)[1] for model in MODELS}
        for network in self.networks.values():
            network.armed, network.most_rows, network.next_error = True, LARGE, None
        config = FAULTY_CONFIG.replace(policy=self.policy)
        self.engine = Engine(self.runners, config, self.metrics, clock=lambda: 0.0)

    def act(self, action: str, argument: Any) -> None:
        if action.startswith("add"):
            request = replace(argument, request_id=str(len(self.requests)))
            self.requests.append(request)
            self.engine.add(request, 0.0)
        elif action == "abort":
            self.results += self.engine.abort(str(argument))
        elif action == "memory":
            model, rows = argument
            self.networks[model].most_rows = rows
            self.least_memory[model] = min(self.least_memory[model], rows)
        elif action == "trouble":
            model, error = argument
            self.networks[model].next_error = error
        for _ in range({"add and step": 1, "step": argument, "overlap": argument}.get(action, 0)):
            self.step(overlap=action == "overlap")

    def step(self, *, overlap: bool = False) -> None:
        if overlap:  # as the engine's thread does
            self.engine.launch()
            self.results += self.engine.report()
            self.engine.settle()
        else:
            self.results += self.engine.step()

    def finish(self) -> None:
        while self.engine.has_work():
            self.step()
        self.results += self.engine.report()

    def stages(self, result: ImageResult) -> Iterator[tuple[str, ImageParams]]:
        request = self.requests[int(result.request_id)]
        yield from zip(request.models, (images[result.position] for images in request.stages), strict=True)


@pytest.mark.parametrize("kind", get_args(Kind))
@settings(max_examples=count(2000, 40))
@given(script=SCRIPTS, policy=st.sampled_from(get_args(PolicyName)))
def test_no_pixel_differs_no_row_leaks_and_every_image_ends_once(
    kind: Kind, script: Sequence[tuple[str, Any]], policy: PolicyName
) -> None:
    play = Play(kind, policy)
    for action, argument in script:
        play.act(action, argument)
    play.finish()

    ends = [(result.request_id, result.position) for result in play.results]
    assert sorted(ends) == sorted((r.request_id, k) for r in play.requests for k in range(len(r.images)))
    for result in play.results:
        check_result(play, result)
    failed = [result for result in play.results if result.status is ImageStatus.FAILED]
    value = play.metrics.registry.get_sample_value
    reasons = ("not_finite", "error", "out_of_memory")
    counted = [value("iddpm_images_failed_total", {"reason": reason}) for reason in reasons]
    assert counted == [sum(result.failure == reason for result in failed) for reason in reasons]
    check_nothing_is_left(play.engine)


def check_result(play: Play, result: ImageResult) -> None:
    """An image that is done has the bytes of one made alone; one that failed has a reason of its own."""
    stages = [*play.stages(result)]
    classes = {image.class_index for _, image in stages if image.plan.kind != "denoise"}  # whose call is early
    if result.status is ImageStatus.DONE:
        assert classes <= {0, FINE}
        request = play.requests[int(result.request_id)]
        assert output_of(result) == expected(request, result.position, play.networks["m"].xp)
    elif result.failure == "not_finite":
        assert OVERFLOWS in classes
    elif result.failure == "error":
        assert RAISES in classes
    elif result.failure == "out_of_memory":
        assert any(play.runners[m].padded_rows(image.rows) > play.least_memory[m] for m, image in stages)
    else:
        assert result.status is ImageStatus.ABORTED


def check_nothing_is_left(engine: Engine) -> None:
    scheduler = engine.scheduler
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_evicted) == (0, 0, 0)
    assert scheduler.remaining_row_steps == 0
    assert engine.num_saved == 0
    assert engine.under_way is None
    assert engine.report() == []
    for model in engine.runners:
        assert scheduler.free_slots(model) == list(range(FAULTY_CONFIG.num_slots))

"""Measure step costs before the engine accepts requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from service.engine.config import EngineConfig
from service.engine.request import ImageParams, ImageStep, PlanKey
from service.engine.runners.base import Runner
from service.engine.step_costs import StepCosts

_TIMED = ImageParams(
    plan=PlanKey(sampler="ancestral", spec="2"), num_steps=2, seed=0, image_index=0, class_index=None, cfg_scale=1.0
)
"""A dummy image for timing. Every model has a plan of two steps."""
_TIMED_CLASSIFIED = replace(_TIMED, classifier_scale=1.0)

ENOUGH_S = 60.0
"""Seconds after which only the smallest size is still timed.

The costs of larger sizes are then taken as proportional to their rows, which is nearly so for networks this slow, and
are learned from the first steps.
"""


def time_steps(runner: Runner, config: EngineConfig, clock: Callable[[], float]) -> StepCosts:
    """Time steps of every batch size, in rounds, each after a warm-up step of the same size, for `ENOUGH_S` seconds.

    Overwrites slots: call this only while no image holds one.
    """
    costs = StepCosts()
    widths = range(1, min(config.max_rows, runner.max_rows) + 1)
    network = sorted({runner.padded_rows(rows) for rows in widths})
    classifier = sorted({runner.padded_classified_rows(rows) for rows in widths} - {0})
    timed, classified = (replace(image, given=runner.trial_given) for image in (_TIMED, _TIMED_CLASSIFIED))
    kinds = [*((timed, rows) for rows in network), *((classified, rows) for rows in classifier)]
    smallest = (0, len(network))
    found: list[list[float]] = [[] for _ in kinds]
    begun = clock()
    for number in range(config.timed_calls):
        for place, (params, rows) in enumerate(kinds):
            if clock() - begun < ENOUGH_S or (number == 0 and place in smallest):
                found[place].append(_time(runner, config, clock, rows, params))
    for (params, rows), seconds in zip(kinds, found, strict=True):
        if seconds:
            used = _used(rows, config)  # use the minimum: delays by other load are not part of the cost
            observe_step(costs, runner, used, used * params.classified_rows, min(seconds))
    return costs


def observe_step(costs: StepCosts, runner: Runner, rows: int, classified: int, seconds: float) -> None:
    """Record the duration of a step of `rows` rows, without padding."""
    padded = runner.padded_classified_rows(classified) if classified else 0
    costs.observe(runner.padded_rows(rows), seconds, padded)


def _time(runner: Runner, config: EngineConfig, clock: Callable[[], float], rows: int, params: ImageParams) -> float:
    slots = range(_used(rows, config))
    first, second = ([ImageStep(slot=slot, params=params, step=step) for slot in slots] for step in range(2))
    runner.start(first)
    runner.launch(first).wait()
    begun = clock()
    runner.launch(second).wait()
    return clock() - begun


def _used(rows: int, config: EngineConfig) -> int:
    """Return the number of images that a step of `rows` padded rows can have."""
    return min(rows, config.max_rows, config.num_slots)

"""The service's engine in this process, so that the pixels equal the service's.

The service's settings are read from the environment, because pixels depend on them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from diffusion.config import CheckpointConfig
    from service.engine.request import GenerationRequest, GivenArrays
    from service.models.served_model import ServedModel
    from service.requests.results import Pixels
    from service.settings import Settings

    Conditions = npt.NDArray[np.float32]

AHEAD = 2
"""Batches of images that the engine holds while there are more to come: one that runs, and one that follows it."""


def local_settings(*models: Path, cascade: str | None = None) -> Settings:
    """Read the settings of an engine without HTTP from the environment.

    Args:
        *models: the folders, as FOLDER or NAME=FOLDER.
        cascade: the cascade that is run, as NAME=BASE+UPSAMPLER; None: there is one model, which is run.

    Raises:
        ValidationError: a setting breaks a rule, or the cascade names another model.
        ValueError: an environment variable has the name of an unknown setting; there are more models than are run.
    """
    from service.settings import Settings, refuse_unknown_variables

    refuse_unknown_variables()
    cascades = () if cascade is None else (cascade,)
    settings = Settings(models=models, cascades=cascades, host="127.0.0.1")  # no socket is opened
    linking = settings.cascade_models
    if unused := settings.model_folders.keys() - (linking[0].models if linking else [*settings.model_folders][:1]):
        raise ValueError(
            f"--model: {', '.join(sorted(unused))} would not be run: give one model, or two and "
            "--cascade NAME=BASE+UPSAMPLER"
        )
    return settings


class LocalEngine:
    """A model folder, or the two of a cascade, loaded and run in this process."""

    def __init__(self, settings: Settings, check: Callable[[CheckpointConfig], None] = lambda _: None) -> None:
        """Load the models.

        Args:
            settings: what `local_settings` returned, here or on another machine.
            check: called with the configuration of the model that makes the results, before a network is run; its
                exceptions are passed on.

        Raises:
            ModelError: a model cannot be run, or the two do not make a cascade.
        """
        from service.backends.select import load_model
        from service.engine.engine import Engine
        from service.engine.runners.array_runner import ArrayRunner
        from service.metrics import Metrics
        from service.models.cascades import linked
        from service.models.registry import served_model

        self._config = settings.engine_config()
        folders, linking = settings.model_folders, settings.cascade_models
        backends = {
            name: load_model(folder, settings.backend, settings.backend_options()) for name, folder in folders.items()
        }
        check(backends[linking[0].models[-1] if linking else next(iter(backends))].config)
        runners = {name: ArrayRunner(backend, self._config) for name, backend in backends.items()}
        served = {name: served_model(name, backends[name], runner.numerics_id) for name, runner in runners.items()}
        self._served = linked(linking[0], served) if linking else next(iter(served.values()))
        self.stages = tuple((model, folders[model.name]) for model in self._stages)
        """The model and its folder; of a cascade, those of its base and its upsampler."""
        self._engine = Engine(runners, self._config, Metrics())
        self._warm = False

    @property
    def _stages(self) -> tuple[ServedModel, ...]:
        return self._served.stages or (self._served,)

    @property
    def name(self) -> str:
        """Name of the model or cascade."""
        return self._served.name

    @property
    def config(self) -> CheckpointConfig:
        """Configuration of the model; of a cascade, that of its base."""
        return self._served.config

    @property
    def result_config(self) -> CheckpointConfig:
        """Configuration of the model that makes the results."""
        return self._served.result_config

    @property
    def numerics_id(self) -> str:
        """Identity of the numerics: equal ids give equal pixels."""
        return self._served.numerics_id

    @property
    def backend(self) -> str:
        """Backend, device and precision, for human readers."""
        return self._served.backend

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty without classes."""
        return self._served.class_names or ()

    def read_given(self, fields: dict[str, Any]) -> tuple[GivenArrays, ...]:
        """Read the given images of a request's fields: none, one for all images, or one per image.

        Raises:
            ValidationError, InvalidRequest: a field breaks a rule, or a file has another shape than the model's images.
        """
        from service.requests.generate_request import GenerateRequest
        from service.requests.given import check_cond, check_given, read_given

        body = GenerateRequest.model_validate(fields)
        check_given(body)
        check_cond(body.cond, self.config.model)
        return read_given(body, self.config)

    def complete(
        self, fields: dict[str, Any], given: Sequence[GivenArrays] = (), *, cond: Conditions | None = None
    ) -> GenerationRequest:
        """Return the request of some fields, with the model's defaults.

        Args:
            fields: of the request.
            given: what `read_given` returned for them.
            cond: instead of a field, the conditioning image of each image as the network takes it, [n, C', H, W].

        Raises:
            ValidationError, InvalidRequest: a field breaks a rule.
        """
        from service.engine.request import GivenArrays
        from service.requests.completion import complete
        from service.requests.generate_request import GenerateRequest
        from service.requests.source import ArraySource

        if cond is not None:
            fields = {**fields, "cond": ArraySource(cond)}
            given = [GivenArrays(cond=one) for one in cond]
        body = GenerateRequest.model_validate(fields)
        return complete(body, self._served, "cli", max_row_steps=sys.maxsize, given=given)

    def complete_encoding(self, fields: dict[str, Any]) -> tuple[GenerationRequest, int]:
        """Read the images of a request to encode them.

        Args:
            fields: of the body of `POST /v1/encode`.

        Returns:
            The request, and the training timestep of its latents.

        Raises:
            ValidationError, InvalidRequest: a field breaks a rule, or the file has another shape than the model's
                images.
        """
        from diffusion.chains import encoding_end
        from service.requests.array_requests import EncodeRequest, complete_arrays, read_encoded
        from service.requests.given import check_cond

        body = EncodeRequest.model_validate(fields)
        check_cond(body.cond, self.config.model)
        given = read_encoded(body, self.config)
        request = complete_arrays(body, given, self._served, "cli", max_row_steps=sys.maxsize)
        return request, encoding_end(self.config.diffusion, request.images[0].plan)

    def run(
        self, groups: Iterable[Sequence[GenerationRequest] | None], progress: Callable[[int], object]
    ) -> Iterator[tuple[int, list[Pixels]]]:
        """Generate the images of groups of requests, and yield each group when it is complete, with its number.

        The engine always holds enough images to fill its batches, across groups, and never many more.

        Args:
            groups: read as needed. None, which has no number, means that there is no group now: the next is asked for
                after a step.
            progress: called with the network rows computed since the last call. After an exception of it, or if not all
                groups are taken, the engine cannot be used again.

        Yields:
            The number of a group and its images, [H, W, C]: uint8 pixels, or float32 values in the units of the data;
            of encodings, in the units of the network.

        Raises:
            GenerationFailed: an image failed.
        """
        from formats.value_range import value_range_of
        from service.engine.tickets import image_failure
        from service.requests.results import network_values, output_of

        if not self._warm:
            self._engine.warm_up()
            self._warm = True
        engine, values = self._engine, value_range_of(self.result_config)
        parts = _parts(groups, self._config.max_rows)
        running: dict[str, _Part] = {}
        outputs: dict[int, dict[int, Pixels]] = {}
        in_flight = 0
        more = True
        counted = engine.activity.row_steps
        while more or in_flight:
            while more and in_flight < AHEAD * self._config.max_rows:
                try:
                    part = next(parts)
                except StopIteration:
                    more = False
                    break
                if part is None:
                    break
                running[part.request.request_id] = part
                outputs.setdefault(part.group, {})
                engine.add(part.request, time.monotonic())
                in_flight += len(part.request.images)
            engine.launch()
            results = engine.report()  # of the step before, while the device computes this one
            engine.settle()
            if not engine.has_work():
                results += engine.report()  # there is no next step
            progress(engine.activity.row_steps - counted)
            counted = engine.activity.row_steps
            for result in results:
                part = running[result.request_id]
                image = part.request.results[result.position]
                if result.failure is not None:
                    raise image_failure(image.image_index, result.failure)
                found = outputs[part.group]
                found[part.first + result.position] = (
                    output_of(image, result, values) if image.plan.kind == "sample" else network_values(result)
                )
                in_flight -= 1
                part.left -= 1
                if part.left == 0:
                    del running[result.request_id]
                if len(found) == part.of:
                    del outputs[part.group]
                    yield part.group, [found[position] for position in range(part.of)]


@dataclass
class _Part:
    """Images of a group that enter the engine together."""

    group: int
    first: int
    """Position of the first image in the group."""
    of: int
    """Images of the whole group."""
    request: GenerationRequest
    left: int
    """Images without a result."""


def _parts(groups: Iterable[Sequence[GenerationRequest] | None], size: int) -> Iterator[_Part | None]:
    group = -1
    for requests in groups:
        if requests is None:
            yield None
            continue
        group += 1
        first, of = 0, sum(len(request.images) for request in requests)
        for request in requests:
            for begin in range(0, len(request.images), size):
                part = _part(request, slice(begin, begin + size), f"{group} {first}")
                yield _Part(group, first, of, part, len(part.images))
                first += len(part.images)


def _part(request: GenerationRequest, images: slice, name: str) -> GenerationRequest:
    then = None if request.then is None else replace(request.then, images=request.then.images[images])
    return replace(request, request_id=name, images=request.images[images], then=then)
